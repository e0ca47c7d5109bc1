"""What the checker found, and the spans that it shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from anabranch.dsl.diagnostics import Diagnostic, PlanError, Source, Span

MAX_ERRORS = 100
"""The checker stops here: a person reads the first few, and a hostile file must not earn a report of its size."""

T = TypeVar("T")
U = TypeVar("U")


class TooManyErrors(Exception):
    """`MAX_ERRORS` have been found."""


class Report:
    """Collects findings about the plans of one source."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.errors: list[Diagnostic] = []
        self.warnings: list[Diagnostic] = []

    def add(self, diagnostic: Diagnostic) -> None:
        """Take an error. Raises TooManyErrors at the last that is taken."""
        self.errors.append(diagnostic)
        if len(self.errors) >= MAX_ERRORS:
            raise TooManyErrors

    def error(self, code: str, message: str, span: Span, *, note: str = "", help: str = "") -> None:
        """Take an error. Raises TooManyErrors at the last that is taken."""
        self.add(Diagnostic(code, message, span, note, help))

    def warn(self, code: str, message: str, span: Span, *, note: str = "", help: str = "") -> None:
        """Take a warning; those above `MAX_ERRORS` are dropped."""
        if len(self.warnings) < MAX_ERRORS:
            self.warnings.append(Diagnostic(code, message, span, note, help, "warning"))

    def read(self, read: Callable[[], T], otherwise: U) -> T | U:
        """What `read` gives; `otherwise` where it raises PlanError, whose findings are taken."""
        try:
            return read()
        except PlanError as error:
            for diagnostic in error.diagnostics:
                self.add(diagnostic)
            return otherwise

    def name_span(self, span: Span, name: str | None) -> Span:
        """The part of a statement's span that is the name it begins with; else its head."""
        if name is not None and self.source.text.startswith(name, span.start):
            return Span(span.start, span.start + len(name))
        return self.head(span)

    def head(self, span: Span) -> Span:
        """The first line of a statement, up to its block: what a person looks at."""
        text = self.source.text[span.start : min(span.end, span.start + 400)]
        line = text.split("\n", 1)[0].split("{", 1)[0].rstrip()
        return Span(span.start, span.start + len(line)) if line else span

    def line(self, span: Span) -> str:
        """ " at line 3", for a note; "" for a span that is not of the source."""
        if span.end == 0 or span.end > len(self.source.text):
            return ""
        return f" at line {self.source.position(span.start)[0]}"


def quiet(read: Callable[[], T], otherwise: U) -> T | U:
    """What `read` gives, for what is read twice: the first reading has told what is wrong."""
    try:
        return read()
    except PlanError:
        return otherwise
