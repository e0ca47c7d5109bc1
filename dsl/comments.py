"""Where the comments and blank lines of a text belong in its syntax, so that a formatter can keep them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from anabranch.dsl import ast
from anabranch.dsl.diagnostics import Span

_SKIPPED = r'"""[^"]*(?:""?[^"]+)*"""|"[^"\n]*"|' + r"'[^'\n]*'"
_COMMENT = re.compile(_SKIPPED + r"|(?P<comment>#[^\n]*)")
_BRACKET = re.compile(_SKIPPED + r"|#[^\n]*|(?P<bracket>[()\[\]{}])")

_Item: TypeAlias = ast.Stmt | ast.Branch | ast.PlanDef


@dataclass(frozen=True, slots=True)
class Remark:
    """A comment on a line of its own."""

    text: str
    blank_before: bool


@dataclass(slots=True)
class Remarks:
    """The comments of a text, by the offset of what they belong to.

    before: comments on lines of their own, before the statement, branch or plan that starts there
    beside: the comment after its end, on the same line
    opening: the comment after the `{` of a block, on the same line; a block's key is the offset of its `{`
    closing: the comments after a block's last statement, before its `}`
    at_end: the comments after the last plan
    spaced: starts of what has a blank line before it, after any comments of `before`
    """

    before: dict[int, list[Remark]] = field(default_factory=dict)
    beside: dict[int, str] = field(default_factory=dict)
    opening: dict[int, str] = field(default_factory=dict)
    closing: dict[int, list[Remark]] = field(default_factory=dict)
    at_end: list[Remark] = field(default_factory=list)
    spaced: set[int] = field(default_factory=set)


def remarks(program: ast.Program) -> Remarks:
    """The comments of `program.source`. One in the middle of a statement belongs before it."""
    text = program.source.text
    placer = _Placer(text, [found.span("comment") for found in _COMMENT.finditer(text) if found["comment"]])
    placer.place(program.plans, Span(0, len(text)), None)
    return placer.remarks


def braces(stmt: ast.Branches, text: str) -> Span:
    """The span of the block of a fork of named branches, which has no node of its own."""
    opened: list[int] = []
    for found in _BRACKET.finditer(text, stmt.span.start):
        bracket = found["bracket"]
        if bracket is None:
            continue
        if bracket in "([{":
            opened.append(found.start())
        else:
            start = opened.pop()
            if bracket == "}" and not opened:
                return Span(start, found.end())
    raise ValueError("the statement is not of this text")


class _Placer:
    """Goes over the comments and the statements side by side, in the order of the text."""

    def __init__(self, text: str, comments: list[tuple[int, int]]) -> None:
        self.remarks = Remarks()
        self._text = text
        self._comments = comments
        self._next = 0

    def place(self, items: Sequence[_Item], region: Span, block: int | None) -> None:
        """Place the comments within `region`, in which `items` stand; `block` is the offset of its `{`, if any."""
        done = region.start
        last: _Item | None = None
        for item in items:
            start = item.span.start
            done = self._between(done, start, last, block)
            spaced = last is not None or start in self.remarks.before
            spaced = spaced and self._blank(done, start)
            inner = self._inside(item)
            if inner:
                before = self.remarks.before.setdefault(start, [])
                before += [Remark(text, spaced and i == 0) for i, text in enumerate(inner)]
            elif spaced:
                self.remarks.spaced.add(start)
            done = item.span.end
            last = item
        own = self._own(region.end, last, block, done)
        if block is None:
            self.remarks.at_end = own
        elif own:
            self.remarks.closing[block] = own

    def _between(self, done: int, start: int, last: _Item | None, block: int | None) -> int:
        """Place the comments up to `start`; the offset after the last of them, or `done`."""
        first = self._next
        own = self._own(start, last, block, done)
        if own:
            self.remarks.before[start] = own
        return self._comments[self._next - 1][1] if self._next > first else done

    def _own(self, end: int, last: _Item | None, block: int | None, done: int) -> list[Remark]:
        """The comments up to `end` that stand on lines of their own; one beside what was before goes there."""
        own: list[Remark] = []
        placed = last is not None
        while self._next < len(self._comments) and self._comments[self._next][0] < end:
            start, stop = self._comments[self._next]
            self._next += 1
            text = self._text[start:stop].rstrip()
            if not own and "\n" not in self._text[done:start] and last is not None:
                self.remarks.beside[last.span.start] = text
            elif not own and "\n" not in self._text[done:start] and block is not None:
                self.remarks.opening[block] = text
            else:
                own.append(Remark(text, (placed or bool(own)) and self._blank(done, start)))
            done = stop
        return own

    def _blank(self, done: int, start: int) -> bool:
        return self._text.count("\n", done, start) > 1

    def _inside(self, item: _Item) -> list[str]:
        """Place the comments within the blocks of `item`; those outside them are given back."""
        loose: list[str] = []
        for region, items in _blocks(item, self._text):
            loose += self._loose(region.start)
            self.place(items, Span(region.start + 1, region.end - 1), region.start)
        return loose + self._loose(item.span.end)

    def _loose(self, end: int) -> list[str]:
        found: list[str] = []
        while self._next < len(self._comments) and self._comments[self._next][0] < end:
            start, stop = self._comments[self._next]
            found.append(self._text[start:stop].rstrip())
            self._next += 1
        return found


def _blocks(item: _Item, text: str) -> list[tuple[Span, Sequence[_Item]]]:
    """The blocks that stand directly in `item`, with what they hold."""
    match item:
        case ast.Branches():
            return [(braces(item, text), item.branches)]
        case ast.If(_, then, orelse):
            return [(block.span, block.stmts) for block in (then, orelse) if block is not None]
        case (
            ast.PlanDef(body=body)
            | ast.Branch(body=body)
            | ast.Fork(body=body)
            | ast.Map(body=body)
            | ast.Reduce(body=body)
            | ast.Loop(body=body)
        ):
            return [(body.span, body.stmts)]
        case _:
            return []
