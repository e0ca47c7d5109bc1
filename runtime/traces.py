"""Runs that are over, as what a model is trained on: the segments it saw, and the tokens it is to predict in them.

example = Example(segment*, target*)
segment = Segment(view: (segment, shift)*, start, ids)            its tokens see the view, and one another causally
target  = Target(segment, place, token)                           to be predicted after that token of the segment

A trace is what a journal holds of one run. The reference lays it out from the plan and its events alone, so what is
exported is what it says; that the engine did the same is what tests hold. Of the layout, only what a target sees is
kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Literal, NoReturn, TypeAlias

from anabranch.dsl import ast
from anabranch.dsl.diagnostics import Diagnostic, PlanError, Source
from anabranch.dsl.parse import parse
from anabranch.dsl.spec import Value
from anabranch.runtime.events import BranchEnded, BranchStarted, GenEnded, Path, RunEnded
from anabranch.runtime.journal import Header, read_runs
from anabranch.runtime.layout import Layout
from anabranch.runtime.models import LoadedModel, LoadedText
from anabranch.runtime.reference import ReferenceMismatch, lay_out
from anabranch.runtime.replay import LogEntry, finished_events

Kind: TypeAlias = Literal["drawn", "trimmed", "recorded", "scored"]
KINDS: Final[tuple[Kind, ...]] = ("drawn", "trimmed", "recorded", "scored")
"""What a gen wrote: tokens that were drawn and stay; that were drawn, and taken back since they end a turn or stop a
text; that the plan recorded; and the option of a `choice(by="logprob")` that scored best."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One run, as its journal holds it.

    where: the journal, and of which input the run is, for messages
    entries: all of them, in order; `over` says whether the run came to its end
    """

    where: str
    header: Header
    inputs: Mapping[str, Value]
    entries: tuple[LogEntry, ...]

    @property
    def over(self) -> bool:
        return bool(self.entries) and isinstance(self.entries[-1].event, RunEnded)


def read_traces(paths: Iterable[str]) -> Iterator[Trace]:
    """The runs of the journals at `paths`, one after another, those that are not over too.

    A journal is read as it is asked for: in memory are the runs of one that were under way at the same time.
    Raises PlanError: no-such-file, unreadable-file, bad-journal.
    """
    for path in paths:
        for header, run, entries in read_runs(path):
            where = f"run {run + 1} of `{path}`" if len(header.inputs) > 1 else f"`{path}`"
            yield Trace(where, header, header.inputs[run], entries)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens in a row, at positions from `start` on, each of which sees the view and those before it.

    view: (index of an earlier segment, shift), all tokens of which are seen; in order
    """

    view: tuple[tuple[int, int], ...]
    start: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """`token` is what the model wrote after the token at `place` of `segment`.

    draw: (thread, index), as in `LogitsRow`; None for what was not drawn
    """

    segment: int
    place: int
    token: int
    kind: Kind
    draw: tuple[Path, int] | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A run to train on. No segment is there for nothing, so one without targets has no segments.

    paths: of the thread that wrote each segment
    """

    segments: tuple[Segment, ...]
    targets: tuple[Target, ...]
    paths: tuple[Path, ...] = field(repr=False, default=())

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)

    @property
    def has_shifts(self) -> bool:
        """Whether a token sees keys at another distance than that of the positions."""
        return any(shift for segment in self.segments for _, shift in segment.view)


def example_of(
    trace: Trace,
    model: LoadedText | LoadedModel,
    *,
    kinds: Iterable[Kind] = KINDS,
    statuses: Literal["ok", "all"] = "ok",
) -> Example:
    """What is to be learnt from a run.

    kinds: what is predicted, of all that gens wrote
    statuses: `ok`: what a thread wrote is predicted if it and all that it stands in ended ok, the plan itself too;
        `all`: whatever a gen that ended wrote, also in branches that failed, or that a join cut off
    Raises PlanError `bad-trace`: it is of another model, or its entries are not what its plan means.
    """
    if trace.header.fingerprint != model.fingerprint:
        _bad(
            trace,
            f"it is of a model with the fingerprint {trace.header.fingerprint}, and that of `{model.name}` is "
            f"{model.fingerprint}",
            "traces of different models are packed apart; `--model` says where that of the traces is now",
        )
    layout = layout_of(trace, model)
    wanted = frozenset(kinds)
    unlearnt = _not_ok(trace.entries) if statuses == "ok" else frozenset()
    if () in unlearnt:
        return Example((), ())

    def is_learnt(path: Path) -> bool:
        return not unlearnt or not any(path[:n] in unlearnt for n in range(len(path) + 1))

    found: list[tuple[int, int, Kind, tuple[Path, int] | None]] = []
    for draw in layout.draws.values():
        kind: Kind = "drawn" if draw.stays else "trimmed"
        if kind in wanted and draw.token is not None and is_learnt(draw.path):
            found.append((draw.after, draw.token, kind, (draw.path, draw.index)))
    for forced in layout.forced:
        if forced.kind in wanted and is_learnt(forced.path):
            found.append((forced.after, forced.token, forced.kind, None))
    return _cut_down(layout, found)


def layout_of(trace: Trace, model: LoadedText | LoadedModel) -> Layout:
    """Every token of a run, as the reference lays them out. Raises PlanError `bad-trace` where it can't."""
    try:
        return lay_out(
            _program(trace.header.source, trace.header.text),
            trace.header.plan,
            trace.inputs,
            finished_events(trace.entries),
            model.tokenizer,
            model.chat,
            drawn=_drawn(trace.entries),
        )
    except ReferenceMismatch as mismatch:
        _bad(trace, f"it is not what its plan means {mismatch}", "leave it out, or run its plan anew")
    except (ValueError, KeyError, IndexError, RecursionError) as error:
        _bad(trace, f"it can't be laid out: {error}", "leave it out, or run its plan anew")


@lru_cache(maxsize=64)
def _program(name: str, text: str) -> ast.Program:
    """Runs of one plan come together, mostly."""
    return parse(Source(name, text))


def _drawn(entries: Sequence[LogEntry]) -> dict[tuple[Path, int], int]:
    """The id of each draw by (thread, index)."""
    counts: defaultdict[Path, int] = defaultdict(int)
    drawn: dict[tuple[Path, int], int] = {}
    for entry in entries:
        if isinstance(entry.event, GenEnded):
            first = counts[entry.thread]
            drawn.update(((entry.thread, first + n), token) for n, token in enumerate(entry.drawn_ids))
            counts[entry.thread] = first + entry.event.drawn
    return drawn


def _not_ok(entries: Sequence[LogEntry]) -> frozenset[Path]:
    """The threads that did not end ok."""
    begun = {entry.thread for entry in entries if isinstance(entry.event, BranchStarted)} | {()}
    return frozenset(begun - {e.thread for e in entries if isinstance(e.event, BranchEnded) and e.event.status == "ok"})


def _cut_down(layout: Layout, found: Sequence[tuple[int, int, Kind, tuple[Path, int] | None]]) -> Example:
    """The part of a layout that the targets see. found: (index of the token it comes after, token, kind, draw)"""
    place = [0] * len(layout.tokens)
    for segment in layout.segments:
        for n, token in enumerate(segment.tokens):
            place[token] = n
    # How much of each segment is needed. One that another sees is needed whole, and stands before it.
    length = [0] * len(layout.segments)
    for after, _, _, _ in found:
        of = layout.tokens[after].segment
        length[of] = max(length[of], place[after] + 1)
    for number in range(len(length) - 1, -1, -1):
        if length[number]:
            for other, _ in layout.segments[number].view:
                length[other] = len(layout.segments[other].tokens)
    number_of = {old: new for new, old in enumerate(n for n, size in enumerate(length) if size)}
    segments = []
    for old in number_of:
        segment = layout.segments[old]
        tokens = [layout.tokens[token] for token in segment.tokens[: length[old]]]
        view = tuple((number_of[other], shift) for other, shift in segment.view if other in number_of)
        segments.append(Segment(view, tokens[0].position, tuple(token.id for token in tokens)))
    targets = tuple(
        Target(number_of[layout.tokens[after].segment], place[after], token, kind, draw)
        for after, token, kind, draw in found
    )
    return Example(tuple(segments), targets, tuple(layout.segments[old].path for old in number_of))


def _bad(trace: Trace, what: str, help: str) -> NoReturn:
    raise PlanError(Diagnostic("bad-trace", f"{trace.where} can't be trained on: {what}", help=help)) from None
