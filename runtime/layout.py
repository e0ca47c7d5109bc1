"""A run as one list of tokens, each with a position, and each segment with the view that its tokens have.

layout  = Layout(Token*, Segment*, Draw*, Forced*, Claim*)
segment = Segment(path, view: (segment, shift)*)       its tokens see the view, and one another causally
token   = Token(id, position, segment)
draw    = Draw(path, index, after, token, stays)       drawn from the logits of the token `after`
forced  = Forced(path, kind, after, token)             put there by a gen that drew nothing
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anabranch.dsl.spec import Value
from anabranch.runtime.events import Path, Status


@dataclass(frozen=True, slots=True)
class Token:
    """One row of the run. `position` is fixed when it is written; `segment` indexes `Layout.segments`."""

    id: int
    position: int
    segment: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that one thread wrote between control points.

    path: of the thread
    view: what every token of it sees besides the earlier tokens of its own, in order: (segment, shift)
    tokens: indices into `Layout.tokens`, in order
    """

    path: Path
    view: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Draw:
    """One sampled token: drawn from the logits of the token `after` (an index into `Layout.tokens`).

    index: how many tokens the thread had drawn before
    token: the id, where events or trace tell it; None for one that was trimmed and not traced
    stays: it is the next token of its thread's context; one that a stop or the end of the turn took back is not
    """

    path: Path
    index: int
    after: int
    token: int | None
    stays: bool = True


@dataclass(frozen=True, slots=True)
class Forced:
    """One token that a gen left without drawing it, after the token `after` (an index into `Layout.tokens`).

    kind: it was recorded in the plan, or is of the choice that scored best
    """

    path: Path
    kind: Literal["recorded", "scored"]
    after: int
    token: int


@dataclass(frozen=True, slots=True)
class Claim:
    """What only the model can tell: that the candidates `chosen` score best.

    what: `best(logprob)` of a join, or the site of a gen that scores its choices
    candidates: by index, the tokens of each, as (after, token id): its score is their log-probability
    mean: the score is the mean of them, else the sum
    """

    path: Path
    what: str
    candidates: Mapping[int, tuple[tuple[int, int], ...]]
    chosen: tuple[int, ...]
    mean: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """A run, laid out.

    draws: by (path of the thread, index)
    logprobs: those that the events report, with the draw they belong to
    status, value: what the plan's own thread came to
    """

    tokens: tuple[Token, ...]
    segments: tuple[Segment, ...]
    draws: Mapping[tuple[Path, int], Draw]
    forced: tuple[Forced, ...]
    logprobs: tuple[tuple[Draw, float], ...]
    claims: tuple[Claim, ...]
    status: Status
    value: Value

    def visibility(self) -> tuple[Tensor, Tensor]:
        """(visible, shifts), both [T, T]: row q marks the keys that token q sees, and the shift of each (else 0)."""
        count = len(self.tokens)
        visible = torch.zeros(count, count, dtype=torch.bool)
        shifts = torch.zeros(count, count, dtype=torch.int64)
        for segment in self.segments:
            if not segment.tokens:
                continue
            rows = torch.tensor(segment.tokens)
            for other, shift in segment.view:
                keys = torch.tensor(self.segments[other].tokens, dtype=torch.int64)
                visible[rows[:, None], keys] = True
                shifts[rows[:, None], keys] = shift
            visible[rows[:, None], rows] = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        return visible, shifts


class LayoutBuilder:
    """A layout while it grows. A segment may be added to until something else sees it."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.draws: dict[tuple[Path, int], Draw] = {}
        self.forced: list[Forced] = []
        self.logprobs: list[tuple[Draw, float]] = []
        self.claims: list[Claim] = []
        self._segments: list[tuple[Path, tuple[tuple[int, int], ...], list[int]]] = []

    def open(self, path: Path, view: tuple[tuple[int, int], ...]) -> int:
        """A new segment of the thread `path` that sees `view`."""
        self._segments.append((path, view, []))
        return len(self._segments) - 1

    def append(self, segment: int, token_id: int, position: int) -> int:
        """One more token of `segment`; returns its index."""
        self.tokens.append(Token(token_id, position, segment))
        self._segments[segment][2].append(len(self.tokens) - 1)
        return len(self.tokens) - 1

    def finish(self, status: Status, value: Value) -> Layout:
        segments = tuple(Segment(path, view, tuple(tokens)) for path, view, tokens in self._segments)
        return Layout(
            tuple(self.tokens),
            segments,
            dict(self.draws),
            tuple(self.forced),
            tuple(self.logprobs),
            tuple(self.claims),
            status,
            value,
        )
