"""What a reader of a trace reports, in the order of the text.

    event = Wrote(by, text)         the thread that is open now goes on; a tag is text too
          | Calling                 the open thread writes a command that it will not keep, until `Joined` (APR)
          | Spawned(children)       it has said what the children do, and stops
          | Began(index)            a child's text begins; what is written from here on is the child's
          | Ended(index)            and ends: the open thread is the one around it again
          | Joined                  every child has ended, and the thread goes on
          | Returned(index, text)   what a child gave back, in the words of its parent's context (APR)

Every character of a trace is in the text of exactly one `Wrote` or `Returned`, and they come in its order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from anabranch.dsl.diagnostics import Span


@dataclass(frozen=True, slots=True)
class Wrote:
    """by: "model" decoded it; the "system" around the model put it there, as soon as what is before it was there"""

    text: str
    span: Span
    by: Literal["model", "system"] = "model"


@dataclass(frozen=True, slots=True)
class Calling:
    span: Span


@dataclass(frozen=True, slots=True)
class Child:
    """What a thread says of a child before it runs.

    number: by which the two are matched, as it is written; "" where none is
    text: the outline, or the message, without space around it
    span: of the tag that introduces it
    """

    number: str
    text: str
    span: Span


@dataclass(frozen=True, slots=True)
class Spawned:
    children: tuple[Child, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class Began:
    index: int
    span: Span


@dataclass(frozen=True, slots=True)
class Ended:
    index: int
    span: Span


@dataclass(frozen=True, slots=True)
class Joined:
    span: Span


@dataclass(frozen=True, slots=True)
class Returned:
    index: int
    text: str
    span: Span


Event: TypeAlias = Wrote | Calling | Spawned | Began | Ended | Joined | Returned
