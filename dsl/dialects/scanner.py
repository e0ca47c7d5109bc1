"""Finds tags in text that comes piece by piece.

    shape = Shape(kind, part*)
    part  = a literal text, which the first one begins with `<` | NUMBER | NODE

Tags are matched letter by letter: `<path>` and `<Path >` are text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from anabranch.dsl.diagnostics import Span

NUMBER: Final = re.compile(r"[0-9]{1,9}")
NODE: Final = re.compile(r"[^<>\n]{1,200}")
"""What stands for one thing in a tag. Each is bounded, so that no more than a tag's length is ever held back."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How a tag is written. kind: by what `Tag.kind` tells it."""

    kind: str
    parts: tuple[str | re.Pattern[str], ...]


@dataclass(frozen=True, slots=True)
class Tag:
    """fields: what stands for each NUMBER and NODE of its shape"""

    kind: str
    text: str
    span: Span
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """Text in which no tag stands. Two runs may follow one another."""

    text: str
    span: Span


Piece: TypeAlias = Tag | Run


class Scanner:
    """A push parser: `feed` text of any length, and `close` at the end. Time is linear in what is fed, but for a short
    rest that is looked at again.

    Spans count the characters from the first that was fed. Text is given out as soon as it can't be part of a tag.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self._kinds = [shape.kind for shape in shapes]
        self._whole = re.compile("|".join(f"({_whole(shape)})" for shape in shapes))
        self._begun = re.compile("|".join(_begun(shape) for shape in shapes))
        # The group of each shape, and how many of its own fields follow it.
        self._groups: dict[int, tuple[str, int]] = {}
        group = 1
        for shape in shapes:
            num_fields = sum(not isinstance(part, str) for part in shape.parts)
            self._groups[group] = (shape.kind, num_fields)
            group += 1 + num_fields
        self._held = ""
        self._offset = 0

    def feed(self, text: str) -> list[Piece]:
        """What can be told once `text` has come."""
        if not text:
            return []
        buffer = self._held + text
        found: list[Piece] = []
        done = 0
        for match in self._whole.finditer(buffer):
            if match.start() > done:
                found.append(self._run(buffer, done, match.start()))
            group = match.lastindex or 0
            kind, num_fields = self._groups[group]
            fields = match.groups()[group : group + num_fields]
            found.append(Tag(kind, match[0], self._span(*match.span()), fields))
            done = match.end()
        end = len(buffer)
        # No tag has a `<` inside, so only the last one can have begun a tag that goes on.
        last = buffer.rfind("<", done)
        if last >= 0 and self._begun.fullmatch(buffer, last):
            end = last
        if end > done:
            found.append(self._run(buffer, done, end))
        self._held = buffer[end:]
        self._offset += end
        return found

    def close(self) -> list[Piece]:
        """What was held back: a tag that never came to its end is text."""
        held, self._held = self._held, ""
        if not held:
            return []
        start = self._offset
        self._offset += len(held)
        return [Run(held, Span(start, self._offset))]

    def _run(self, buffer: str, start: int, end: int) -> Run:
        return Run(buffer[start:end], self._span(start, end))

    def _span(self, start: int, end: int) -> Span:
        return Span(self._offset + start, self._offset + end)


def _whole(shape: Shape) -> str:
    return "".join(re.escape(part) if isinstance(part, str) else f"({part.pattern})" for part in shape.parts)


def _begun(shape: Shape) -> str:
    """Any beginning of the tag: each character is optional with all that follow it."""
    units: list[str] = []
    for part in shape.parts:
        units += [re.escape(c) for c in part] if isinstance(part, str) else [part.pattern]
    pattern = ""
    for unit in reversed(units[1:]):
        pattern = f"(?:{unit}{pattern})?"
    return units[0] + pattern
