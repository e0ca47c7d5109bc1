"""What lark could not read, in plain words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lark import Token
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from anabranch.dsl.diagnostics import Diagnostic, Source, Span, did_you_mean
from anabranch.dsl.shapes import EXAMPLES

_CLOSES = {"(": ")", "[": "]", "{": "}"}
_WORD_OPERATORS = {"and": "&&", "or": "||", "not": "!"}
_CURLY_QUOTES = "\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u00ab\u00bb`"
_FOREIGN_LOOPS = {"for": "map", "while": "loop"}
_TAILS = ("join", "else", "until")
_A_PLAN = "a file holds plans: `name = plan(question) { ... }`"
_COMMENT_OR_STRING = r'"""[^"]*(?:""?[^"]+)*"""|"[^"\n]*"|' + r"'[^'\n]*'|#[^\n]*"
_BRACKET = re.compile(_COMMENT_OR_STRING + r"|(?P<bracket>[()\[\]{}])")
_WORD = re.compile(r"[A-Za-z0-9_]+")
_BLANK = re.compile(r"[ \t]{0,200}")
_PLAN_HEADER = re.compile(r"=\s*plan\s*\([^{}]*\)\s*$")
_COMPARISONS = ("==", "!=", "<", "<=", ">", ">=")
_NEVER_FIRST = ("=", ",", ":", ")", "]", *_COMPARISONS)
"""What no statement begins with."""

_CLIP = 40
"""The longest word that is shown whole in a message, in characters."""

_HEADER_REACH = 2000
"""How far back a plan's header is looked for, in characters."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Where reading stopped.

    open: the brackets open there, outermost first
    last: the last two tokens the parser was given
    spelled: how each terminal of fixed spelling is written
    """

    open: Sequence[Token]
    last: tuple[Token | None, Token | None]
    spelled: Mapping[str, str]


def explain(error: UnexpectedInput, source: Source, stop: Stop) -> Diagnostic:
    """The finding for the first thing in `source` that the grammar does not allow."""
    stopped: Any = error.interactive_parser
    accepted: set[str] = stopped.accepts()
    if isinstance(error, UnexpectedToken) and error.token.type != "$END":
        token: Token = error.token
        # A token that no rule allows here is refused by the lexer, before the parser is given it.
        previous = stop.last[0] if stop.last[1] is token else stop.last[1]
        return _Refused(source, stop, accepted, previous, token).explain()
    if isinstance(error, UnexpectedCharacters):
        return _bad_character(source.text, error.pos_in_stream or 0)
    return _early_end(source, stop, accepted)


def _bad_character(text: str, at: int) -> Diagnostic:
    char = text[at]
    if (unterminated := _unterminated(text, at)) is not None:
        return unterminated
    span = Span(at, at + 1)
    if char.isascii() and char.isalpha() and (word := _WORD.match(text, at)) is not None:
        return Diagnostic(
            "bad-name",
            f"`{word[0][:_CLIP]}` is no name",
            Span(at, word.end()),
            help="names are lower-case letters, digits and `_`",
        )
    if char in "&|":
        return Diagnostic("bad-character", f"`{char}` is no operator", span, help=f"write `{char * 2}`")
    if char in _CURLY_QUOTES:
        return Diagnostic("bad-character", "this is no quote of the language", span, help="write `\"` or `'`")
    if char == "%":
        return Diagnostic("bad-character", "`%` is no operator", span, help="the operators are `+ - * /`")
    shown = f"`{char}`" if char.isprintable() and not char.isspace() else "this character"
    help = "remove it, or put it in a string"
    return Diagnostic("bad-character", f"{shown} (U+{ord(char):04X}) can't stand here", span, help=help)


def _unterminated(text: str, at: int) -> Diagnostic | None:
    """The string without an end that begins at `at`, or whose first two quotes were read as an empty string."""
    quote = text[at]
    if quote not in "\"'":
        return None
    first = at - 2 if text[max(0, at - 2) : at + 1] == '"""' else at
    if text.startswith('"""', first):
        return Diagnostic(
            "unterminated-string",
            'a `"""` string is never closed',
            Span(first, first + 3),
            help='close it with `"""`',
        )
    end = text.find("\n", at)
    end = len(text) if end < 0 else end
    if text.find(quote, at + 1, end) >= 0:
        return None
    return Diagnostic(
        "unterminated-string",
        "this string does not end on its line",
        Span(at, end),
        help=f'close it with `{quote}`, or use `"""` for text of several lines',
    )


def _early_end(source: Source, stop: Stop, accepted: set[str]) -> Diagnostic:
    last = stop.last[1]
    if last is None:
        return Diagnostic("empty-file", "there is no plan in this file", Span(0, 0), help=_A_PLAN)
    if stop.open:
        return _unclosed(source, stop.open[-1], "the end of the file")
    end = last.end_pos or 0
    return Diagnostic(
        "unexpected-token",
        "the file ends too early",
        Span(max(0, end - 1), end),
        help=_expected(accepted, stop.spelled),
    )


@dataclass(frozen=True, slots=True)
class _Refused:
    """A token that can't stand where it does."""

    source: Source
    stop: Stop
    accepted: set[str]
    previous: Token | None
    token: Token

    def explain(self) -> Diagnostic:
        return (
            self._string()
            or self._outside_plans()
            or self._bracket()
            or self._foreign_word()
            or self._tail()
            or self._semicolon()
            or self._plain()
        )

    @property
    def word(self) -> str:
        return str(self.token.value)

    @property
    def shown(self) -> str:
        return self.word if len(self.word) <= _CLIP else self.word[:_CLIP] + "..."

    @property
    def span(self) -> Span:
        return Span(self.token.start_pos or 0, self.token.end_pos or 0)

    def accepts(self, *spellings: str) -> bool:
        """Whether one of these could stand here."""
        return any(self.stop.spelled.get(name, name) in spellings for name in self.accepted)

    def _string(self) -> Diagnostic | None:
        return _unterminated(self.source.text, self.span.start) if self.token.type in ("STRING", "QSTRING") else None

    def _outside_plans(self) -> Diagnostic | None:
        """What stands before, between or after plans, or in the brackets after `plan`."""
        brackets = [str(bracket.value) for bracket in self.stop.open]
        if brackets == []:
            if self.word in (")", "]", "}"):
                return Diagnostic(
                    "unopened-bracket", f"this `{self.shown}` closes nothing", self.span, help="remove it"
                )
            return Diagnostic(
                "not-a-plan",
                f"`{self.shown}` can't stand outside a plan",
                self.span,
                help=f"{_A_PLAN}; is there a `}}` too many above?" if self._after_a_plan() else _A_PLAN,
            )
        if brackets != ["("] or self.word in ("{", "}"):
            return None
        start = self.stop.open[0].start_pos or 0
        before = _WORD.findall(self.source.text[max(0, start - 200) : start])
        if before and before[-1] != "plan":
            return Diagnostic(
                "not-a-plan", f"`{before[-1][:_CLIP]}` can't stand outside a plan", self.span, help=_A_PLAN
            )
        return Diagnostic(
            "unexpected-token",
            f"`{self.shown}` can't stand among a plan's parameters",
            self.span,
            help="a parameter is `name` or `name: bound`, an option `name=value`",
        )

    def _after_a_plan(self) -> bool:
        return "}" in self.source.text[: self.span.start]

    def _bracket(self) -> Diagnostic | None:
        """A bracket that is not closed before this token."""
        if not self.stop.open:
            return None
        top = self.stop.open[-1]
        if self.word in (")", "]", "}"):
            if _CLOSES[str(top.value)] != self.word:
                return _unclosed(self.source, top, f"this `{self.shown}`", self.span)
            return None
        if top.value != "{" and self.word in (";", "{") and self.accepts(_CLOSES[str(top.value)]):
            return _unclosed(self.source, top, f"this `{self.shown}`", self.span)
        return None

    def _foreign_word(self) -> Diagnostic | None:
        """Two words side by side, which the language never has."""
        before = str(self.previous.value) if self.previous is not None else ""
        for word, span in ((self.word, self.span), (before, self._previous_span())):
            if word in _WORD_OPERATORS and self.token.type == "NAME":
                return Diagnostic(
                    "unexpected-token", f"`{word}` is no operator", span, help=f"write `{_WORD_OPERATORS[word]}`"
                )
        if (before == "else" and self.word == "if") or self.word in ("elif", "elseif", "elsif"):
            return Diagnostic(
                "unexpected-token",
                "a condition can't follow `else`",
                self.span,
                help="write `else { if (...) { ... }; }`",
            )
        starts_value = self.token.type not in self.stop.spelled
        if before in EXAMPLES and starts_value:
            return Diagnostic(
                "missing-brackets",
                f"`{before}` needs brackets",
                self._previous_span(),
                help=f"write `{EXAMPLES[before]}`",
            )
        if before in _FOREIGN_LOOPS and (starts_value or self.word == "("):
            return Diagnostic(
                "unexpected-token",
                f"there is no `{before}`",
                self._previous_span(),
                help=f"write `{EXAMPLES[_FOREIGN_LOOPS[before]]}`",
            )
        if self.source.text.startswith(("//", "/*"), self.span.start):
            return Diagnostic("unexpected-token", "this is no comment", self.span, help="a comment begins with `#`")
        return None

    def _tail(self) -> Diagnostic | None:
        """A misspelt or misplaced `join`, `else` or `until`."""
        if self.word in _TAILS:
            return Diagnostic(
                "misplaced-tail",
                f"`{self.shown}` can't stand here",
                self.span,
                help="`join` follows the block of a `fork` or `map`, `else` that of an `if`, `until` that of a `loop`",
            )
        if self.token.type == "NAME" and self.accepts(*_TAILS) and (close := did_you_mean(self.word, _TAILS)):
            return Diagnostic("unexpected-token", f"`{self.shown}` can't stand here", self.span, help=close)
        return None

    def _semicolon(self) -> Diagnostic | None:
        if self.previous is None or not self.accepts(";") or self.word in _NEVER_FIRST:
            return None
        end = self.previous.end_pos or 0
        if self.previous.value == "}" and (outer := self._around_plan(end - 1)) is not None:
            return _unclosed(self.source, outer, "the next plan")
        after = f" after `{self.previous.value}`" if len(self.previous.value) <= _CLIP else ""
        return Diagnostic(
            "missing-semicolon",
            f"a `;` is missing{after}",
            Span(end - 1, end),
            help="every statement ends in `;`, also after a block",
        )

    def _around_plan(self, closer: int) -> Token | None:
        """The bracket open around the plan that the `}` at `closer` ends: it was read as a statement."""
        opener = _opener(self.source.text, closer)
        if opener is None or not _PLAN_HEADER.search(self.source.text, max(0, opener - _HEADER_REACH), opener):
            return None
        return next((b for b in reversed(self.stop.open) if (b.start_pos or 0) < opener), None)

    def _plain(self) -> Diagnostic:
        help = _expected(self.accepted, self.stop.spelled)
        if self.word == "=":
            help = "`==` compares; a name is bound at the start of a statement: `x = ...;`"
        elif self.word in (")", "]") and self._previous_is(","):
            help = "remove the `,` before it"
        elif self.word in _COMPARISONS:
            help = "comparisons do not chain: write `a < b && b < c`"
        return Diagnostic("unexpected-token", f"`{self.shown}` can't stand here", self.span, help=help)

    def _previous_is(self, *spellings: str) -> bool:
        return self.previous is not None and self.previous.value in spellings

    def _previous_span(self) -> Span:
        if self.previous is None:
            return self.span
        return Span(self.previous.start_pos or 0, self.previous.end_pos or 0)


def _unclosed(source: Source, bracket: Token, what: str, closer: Span | None = None) -> Diagnostic:
    """`bracket` is open where something comes that can't stand inside it."""
    at = bracket.start_pos or 0
    if bracket.value == "{" and (suspect := _suspect(source, at)) is not None:
        at = suspect
    char = source.text[at]
    line, column = source.position(closer.start) if closer else (0, 0)
    where = f" (line {line}, column {column})" if closer else ""
    return Diagnostic(
        "unclosed-bracket",
        f"this `{char}` is never closed",
        Span(at, at + 1),
        help=f"close it with `{_CLOSES[char]}` before {what}{where}",
    )


def _suspect(source: Source, outer: int) -> int | None:
    """The `{` inside the unclosed one at `outer` whose `}` stands further left than it: likely another block's."""
    for start, end in _pairs(source.text, outer + 1):
        if source.text[start] != "{":
            continue
        opened, _ = _indent(source, start)
        closed, first = _indent(source, end)
        if first and closed < opened:
            return start
    return None


def _indent(source: Source, offset: int) -> tuple[int, bool]:
    """How far the line of `offset` is indented, and whether `offset` is the first thing on it."""
    _, column = source.position(offset)
    blank = _BLANK.match(source.text, offset - column + 1)
    width = blank.end() - blank.start() if blank else 0
    return width, width == column - 1


def _opener(text: str, closer: int) -> int | None:
    """The offset of the bracket that the one at `closer` closes."""
    for start, end in _pairs(text, 0):
        if end == closer:
            return start
    return None


def _pairs(text: str, start: int) -> Iterator[tuple[int, int]]:
    """Offsets of the brackets from `start` on that close one another, in the order in which they close."""
    opened: list[int] = []
    for found in _BRACKET.finditer(text, start):
        bracket = found["bracket"]
        if bracket is None:
            continue
        if bracket in _CLOSES:
            opened.append(found.start())
        elif opened:
            yield opened.pop(), found.start()


_VALUES = {"NAME": "a name", "COMPARE": "a comparison", "INT": "a number", "STRING": "a string"}


def _expected(accepted: set[str], spelled: Mapping[str, str]) -> str:
    """What could have stood here, in plain words."""
    known = {spelled.get(name, name) for name in accepted}
    words: list[str] = []
    if {"NAME", "INT", "STRING", "("} <= known:
        words.append("an expression")
        known -= {"NAME", "INT", "FLOAT", "STRING", "QSTRING", "BLOCK", "(", "[", "!", "-"}
    if {"+", "*", "COMPARE"} <= known:
        words.append("an operator")
        known -= {"+", "-", "*", "/", "COMPARE", "&&", "||", ".", "["}
    known -= {"$END"}
    words += [_VALUES.get(name, f"`{name}`") for name in sorted(known)]
    if not words:
        return ""
    return "expected " + (", ".join(words[:-1]) + " or " if len(words) > 1 else "") + words[-1]
