"""What the readers of the three formats share: the push interface, and how they tell what is wrong.

    reader = Reader()
    for token in stream:
        for event in reader.feed(token): ...
    for event in reader.close(): ...

The events do not depend on where the text is cut, but for the cuts of `Wrote`. A live listener gives every thread a
reader of its own: the parent's stops at `Spawned`, each child is read by what `Reader.child()` makes until its `Ended`,
and `pass_children()` takes the parent's reader over them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final, Literal, NoReturn

from anabranch.dsl.diagnostics import Diagnostic, PlanError, Span
from anabranch.dsl.dialects.events import Event, Wrote
from anabranch.dsl.dialects.scanner import Scanner, Tag

MAX_NESTING: Final = 24
"""How deep threads may nest. A thread is two of the 64 brackets that a plan may have open, and needs some inside."""

NUMBER_LENGTH: Final = 64
"""How much of a text is kept to read its number from, in characters."""


class Reader(ABC):
    """A push parser of one format. After a PlanError, whose span counts the characters fed, it is of no more use."""

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner
        self._out: list[Event] = []
        self._end = 0

    @classmethod
    @abstractmethod
    def child(cls) -> Reader:
        """A reader of a child's text alone, as far as the child writes it itself."""

    @abstractmethod
    def pass_children(self) -> list[Event]:
        """The children that were spawned last have run elsewhere: go on as after the last of them.

        Raises ValueError where none are due.
        """

    def feed(self, text: str) -> list[Event]:
        """What `text` brings. Raises PlanError."""
        for piece in self._scanner.feed(text):
            self._end = piece.span.end
            if isinstance(piece, Tag):
                self._tag(piece)
            else:
                self._text(piece.text, piece.span.start)
        return self._taken()

    def close(self) -> list[Event]:
        """What the end of the text brings. Raises PlanError where something is still open."""
        for run in self._scanner.close():
            self._end = run.span.end
            if isinstance(run, Tag):
                raise AssertionError("what is held back is no tag")
            self._text(run.text, run.span.start)
        self._finish()
        return self._taken()

    @abstractmethod
    def _tag(self, tag: Tag) -> None: ...

    @abstractmethod
    def _text(self, text: str, start: int) -> None:
        """A text without a tag, which is not empty, from offset `start`."""

    @abstractmethod
    def _finish(self) -> None: ...

    def _taken(self) -> list[Event]:
        taken, self._out = self._out, []
        return taken

    def _wrote(self, text: str, start: int, by: Literal["model", "system"] = "model") -> None:
        self._out.append(Wrote(text, Span(start, start + len(text)), by))

    def _here(self) -> Span:
        return Span(self._end, self._end)


def refuse(code: str, message: str, span: Span, help: str, note: str = "") -> NoReturn:
    """Raise a PlanError without a source."""
    raise PlanError(Diagnostic(code, message, span, note=note, help=help))


def refuse_text(text: str, start: int, where: str, expected: str) -> NoReturn:
    """Tell of text that belongs to no thread. `text` is not blank."""
    begin = len(text) - len(text.lstrip())
    line = text[begin:].partition("\n")[0]
    refuse(
        "trace-stray-text",
        f"text stands {where}, where it would be no thread's",
        Span(start + begin, start + begin + len(line)),
        help=f"only {expected} may stand here",
    )


def check_nesting(depth: int, span: Span) -> None:
    """Refuse a thread that is `depth` threads deep."""
    if depth > MAX_NESTING:
        refuse(
            "trace-too-deep",
            f"more than {MAX_NESTING} threads nest here",
            span,
            help="a plan can't hold more: import what is inside as a trace of its own",
        )
