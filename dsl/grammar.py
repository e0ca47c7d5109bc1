"""The one grammar, `plan.lark`, for its readers.

Three readers must agree on it: lark's LALR parser (here), the token-mask engine llguidance, and
`hypothesis.extra.lark` in the tests. Building the parser takes about 40 ms, so no cache of it is kept. lark's
`strict=True`, which refuses conflicts that lark would else resolve in silence, costs 90 ms more; the tests build the
grammar strictly, and a load does not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from lark import Lark, Token, Transformer
from lark.common import LexerConf
from lark.lexer import ContextualLexer

_LLGUIDANCE_HEADER = '%llguidance {"allow_initial_skip": true}\n'


class TokenFilter(Protocol):
    """What lark calls `postlex`: sees every token between the lexer and the parser."""

    always_accept: tuple[str, ...]

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        """Pass the tokens on."""
        ...


@cache
def grammar_text() -> str:
    """The text of `plan.lark`."""
    return Path(__file__).with_name("plan.lark").read_text(encoding="utf-8")


def llguidance_grammar() -> str:
    """The grammar as llguidance reads it.

    Unlike lark, llguidance refuses text that is ignored at the very end: strip white space and comments there.
    """
    return _LLGUIDANCE_HEADER + grammar_text()


class _UncheckedLexer(ContextualLexer):
    """lark's contextual lexer, without the search for colliding terminals that lark makes if `interegular` is there."""

    def __init__(
        self, conf: LexerConf, states: dict[int, Collection[str]], always_accept: Collection[str] = ()
    ) -> None:
        conf.skip_validation = True
        super().__init__(conf, states, always_accept)


def lark_parser(
    transformer: Transformer[Token, Any] | None = None, postlex: TokenFilter | None = None, *, strict: bool = False
) -> Lark:
    """A LALR parser of the grammar.

    With a `transformer`, its methods run as rules are reduced and no tree is built. Every token is kept (brackets and
    separators too), so a rule's span is that of its first and last child and lark need not propagate positions.
    A comment must end in a newline: give the parser the text with one appended.
    `strict` needs the package `interegular`.
    """
    return Lark(
        grammar_text(),
        parser="lalr",
        transformer=transformer,
        postlex=postlex,
        keep_all_tokens=True,
        maybe_placeholders=True,
        strict=strict,
        _plugins={} if strict else {"ContextualLexer": _UncheckedLexer},
    )
