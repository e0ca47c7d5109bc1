"""What is told to a person: a code, a span, the line with carets, and what to do.

A user's mistake is a `PlanError`; it carries one or more `Diagnostic`s. Nothing in here knows about a
terminal: `render` gives plain text.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open range of character offsets into `Source.text`."""

    start: int
    end: int


NOWHERE = Span(0, 0)


@dataclass(frozen=True, eq=False)
class Source:
    """One plan file: its name as the user wrote it, and its text."""

    name: str
    text: str
    _starts: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        starts = [0]
        starts.extend(newline.end() for newline in re.finditer("\n", self.text))
        object.__setattr__(self, "_starts", starts)

    def position(self, offset: int) -> tuple[int, int]:
        """(line, column) of a character offset, both from 1."""
        line = bisect_right(self._starts, offset) - 1
        return line + 1, offset - self._starts[line] + 1

    def line(self, number: int) -> str:
        """The text of line `number` (from 1), without its newline."""
        start = self._starts[number - 1]
        end = self._starts[number] - 1 if number < len(self._starts) else len(self.text)
        return self.text[start:end].rstrip("\r")


_LONG_WORD = 300
"""The longest word between backticks that is told whole, in characters: longer than any path one would type."""

_QUOTED = re.compile(f"`([^`\n]{{{_LONG_WORD - 3}}})[^`\n]{{4,}}`")


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding.

    code: stable, kebab-case; every code has an entry in docs/errors.md
    message: what is wrong; names in backticks; lower case, no full stop
    span: where; None where the finding has no place in a plan's text
    note: a few words beside the carets
    help: what to do
    """

    code: str
    message: str
    span: Span | None = None
    note: str = ""
    help: str = ""
    severity: Literal["error", "warning"] = "error"

    def __post_init__(self) -> None:
        # A name may be as long as a file, and stands in each of these.
        for name in ("message", "note", "help"):
            text = getattr(self, name)
            if len(text) > _LONG_WORD:
                object.__setattr__(self, name, _QUOTED.sub(lambda m: f"`{m[1]}...`", text))

    def render(self, source: Source | None) -> str:
        """The finding as plain text, with the line and carets where there is a span and a source."""
        out = [f"{self.severity}[{self.code}]: {self.message}"]
        if source is not None and self.span is not None:
            line, column = source.position(self.span.start)
            end_line, end_column = source.position(max(self.span.start, self.span.end))
            text, left = _shown(source.line(line), column)
            stop = end_column if end_line == line else len(source.line(line)) + 1
            stop = min(stop - left, len(text) + 1)
            # A tab must stay a tab under the carets, or they would not line up.
            pad = "".join("\t" if c == "\t" else " " for c in text[: column - left - 1])
            carets = "^" * max(1, stop - (column - left))
            gutter = " " * len(str(line))
            out.append(f"{gutter}--> {source.name}:{line}:{column}")
            out.append(f"{gutter} |")
            out.append(f"{line} | {text}")
            out.append(f"{gutter} | {pad}{carets}{' ' + self.note if self.note else ''}")
        elif source is not None:
            out.append(f" --> {source.name}")
        if self.help:
            out.append(f"help: {self.help}")
        return "\n".join(out)


_SHOWN = 160
"""The most characters of a line that are shown."""


def _shown(line: str, column: int) -> tuple[str, int]:
    """The part of `line` to show around `column` (from 1), and how many characters are left out before it.

    Control characters, which could steer a terminal, are replaced.
    """
    left = 0 if len(line) <= _SHOWN else max(0, min(column - 1 - _SHOWN * 3 // 4, len(line) - _SHOWN))
    text = line[left : left + _SHOWN]
    return "".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in text), left


class PlanError(Exception):
    """The plan, or what the user gave with it, is wrong. Carries what to show."""

    def __init__(self, diagnostics: Iterable[Diagnostic] | Diagnostic, source: Source | None = None) -> None:
        found = (diagnostics,) if isinstance(diagnostics, Diagnostic) else tuple(diagnostics)
        if not found:
            raise ValueError("a PlanError needs at least one diagnostic")
        self.diagnostics: tuple[Diagnostic, ...] = found
        self.source = source
        super().__init__(found[0].message)

    @property
    def code(self) -> str:
        """The code of the first diagnostic."""
        return self.diagnostics[0].code

    def render(self) -> str:
        """All diagnostics as plain text, a blank line between them."""
        return "\n\n".join(d.render(self.source) for d in self.diagnostics)

    def __str__(self) -> str:
        return self.render()


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "did you mean `fork`?", or "" when nothing known is close to `word`."""
    if len(word) > 40:  # no known word is as long, and the comparison takes the square of the length
        return ""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else ""
