"""What lark could not read, in plain words."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lark import Token
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from anabranch.dsl.diagnostics import Diagnostic, Source, Span

_CLOSES = {"(": ")", "[": "]", "{": "}"}
_OPERATORS = {"and": "&&", "or": "||", "not": "!", "is": "=="}
_QUOTES = "\u2018\u2019\u201c\u201d\u00ab\u00bb"
_PLAN = "a file holds plans: `name = plan(...) { ... }`"


def explain(
    error: UnexpectedInput,
    source: Source,
    open_brackets: list[Token],
    before: tuple[Token | None, Token | None],
) -> Diagnostic:
    """The finding for the first thing in `source` that the grammar does not allow.

    open_brackets: those open where reading stopped, outermost first
    before: the last two tokens read; the second is the one refused, unless no token could be read at all
    """
    if isinstance(error, UnexpectedCharacters):
        return _bad_character(source, error.pos_in_stream or 0, open_brackets)
    if not isinstance(error, UnexpectedToken):
        raise error
    token: Token = error.token
    accepted = set(error.accepts or error.expected)
    if token.type == "$END":
        return _at_end(source, accepted, open_brackets, before[1])
    return _bad_token(source, token, accepted, open_brackets, before[0])


def _bad_character(source: Source, at: int, open_brackets: list[Token]) -> Diagnostic:
    text = source.text
    if at >= len(text):
        return _at_end(source, set(), open_brackets, None)
    char = text[at]
    if (found := _unterminated(text, at)) is not None:
        return found
    span = Span(at, at + 1)
    if char.isascii() and char.isupper():
        word = re.compile(r"[A-Za-z0-9_]+").match(text, at)
        found_word = word[0] if word else char
        return Diagnostic(
            "bad-name",
            f"`{found_word}` is no name",
            Span(at, at + len(found_word)),
            help="names are lower-case letters, digits and `_`",
        )
    if char in "&|":
        return Diagnostic("bad-character", f"`{char}` is no operator", span, help=f"write `{char * 2}`")
    if char in _QUOTES:
        return Diagnostic("bad-character", f"`{char}` is no quote of the language", span, help="write `\"` or `'`")
    shown = f"`{char}`" if char.isprintable() and not char.isspace() else "this character"
    return Diagnostic(
        "bad-character", f"{shown} (U+{ord(char):04X}) can't stand here", span, help="remove it, or put it in a string"
    )


def _unterminated(text: str, at: int) -> Diagnostic | None:
    """The string without an end that begins at `at`, or whose first two of three quotes were read as a string."""
    if text[at] not in "\"'":
        return None
    if text[max(0, at - 2) : at + 1] == '"""':
        return Diagnostic(
            "unterminated-string",
            'a `"""` string is never closed',
            Span(at - 2, at + 1),
            help='close it with `"""`',
        )
    if text.startswith('"""', at):
        return Diagnostic(
            "unterminated-string", 'a `"""` string is never closed', Span(at, at + 3), help='close it with `"""`'
        )
    end = text.find("\n", at)
    if (text + "\n").find(text[at], at + 1, end if end >= 0 else len(text)) >= 0:
        return None
    return Diagnostic(
        "unterminated-string",
        "a string does not end on its line",
        Span(at, end if end >= 0 else len(text)),
        help=f'close it with `{text[at]}`, or use `"""` for text of several lines',
    )


def _at_end(source: Source, accepted: set[str], open_brackets: list[Token], last: Token | None) -> Diagnostic:
    if last is None or not source.text.strip():
        return Diagnostic("empty-file", "there is no plan in this file", Span(0, 0), help=_PLAN)
    if open_brackets:
        return _unclosed(source, open_brackets[-1], None)
    end = last.end_pos or 0
    if "SEMICOLON" in accepted:
        return _missing_semicolon(end)
    return Diagnostic("unexpected-end", "the file ends too early", Span(max(0, end - 1), end), help=_expects(accepted))


def _bad_token(
    source: Source, token: Token, accepted: set[str], open_brackets: list[Token], last: Token | None
) -> Diagnostic:
    start, end = token.start_pos or 0, token.end_pos or 0
    span = Span(start, end)
    if token.type in ("STRING", "QSTRING") and (found := _unterminated(source.text, start)) is not None:
        return found
    word = token.value
    if word in (")", "]", "}"):
        if open_brackets and _CLOSES[open_brackets[-1].value] != word:
            return _unclosed(source, open_brackets[-1], token)
        if not open_brackets:
            # The bracket that this token closed, if any, is off the stack already.
            ...
    if word in (";", "{") and open_brackets and open_brackets[-1].value in "([":
        ...
    if "SEMICOLON" in accepted and last is not None:
        return _missing_semicolon(last.end_pos or 0)
    return Diagnostic("unexpected-token", f"`{word}` can't stand here", span, help=_expects(accepted))


def _missing_semicolon(end: int) -> Diagnostic:
    return Diagnostic(
        "missing-semicolon", "a `;` is missing", Span(max(0, end - 1), end), help="a statement ends in `;`"
    )


def _unclosed(source: Source, bracket: Token, found: Token | None) -> Diagnostic:
    start = bracket.start_pos or 0
    return Diagnostic(
        "unclosed-bracket",
        f"`{bracket.value}` is never closed",
        Span(start, start + 1),
        help=f"close it with `{_CLOSES[bracket.value]}`",
    )


def _expects(accepted: Iterable[str]) -> str:
    return "expected " + ", ".join(sorted(accepted))
