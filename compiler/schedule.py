"""The schedule: a plan's worst case as steps of a batch.

    schedule = Schedule(machine, step*)
    step     = Alias(Ref fork, Runs branches, int source, Runs lanes, Runs segments)
             | Prefill(part+)
             | Decode(part+, at_most)
             | Flush(part+)
             | Stitch(Ref fork, int thread, int lane, int segment, Runs branches, Runs gained)
             | Free(Runs segments)
             | Repeat(Ref loop, rounds, step*, moved*)
             | Choose(Ref cond, (step*)*, merged*)
    part     = Part(Runs lanes, Ref* nodes, rows, draws)

Threads, segments and lanes are numbered from 0 in order of use; thread 0 is the plan's own, in lane 0, and writes
segment 0. What comes in consecutive numbers is one run, so equal branches take one line. A `Prefill`, `Decode` or
`Flush` is one call of the model (a `Decode` as many as `at_most`), but for one that is `beside` the step before it: the
two are the same call. After a `Repeat` or a `Choose` its threads are in the lanes that they had before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from anabranch.compiler.graph import Ctx
from anabranch.compiler.scheduler import Machine

Runs: TypeAlias = tuple[tuple[int, int], ...]
"""Numbers as (first, how many) of each run of consecutive ones, in order."""

Ref: TypeAlias = tuple[str, Ctx]
"""A node: its plan, and the context that it makes."""


@dataclass(frozen=True, slots=True)
class Alias:
    """Branches of `fork` start: each sees what thread `source` sees, and no KV moves.

    branches: their thread numbers; lanes, segments: what each takes, in the same order
    fresh: they see nothing instead
    """

    fork: Ref
    branches: Runs
    source: int
    lanes: Runs
    segments: Runs
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """What the same happens to in several lanes.

    nodes: the nodes that are done with their known tokens after this, in order of the text
    rows: known tokens that each lane feeds; 0 in a `Decode`
    draws: each lane also draws a token, of the last of `nodes`
    """

    lanes: Runs
    nodes: tuple[Ref, ...]
    rows: int = 0
    draws: bool = False


@dataclass(frozen=True, slots=True)
class Prefill:
    """One call that feeds known tokens."""

    parts: tuple[Part, ...]
    beside: bool = False


@dataclass(frozen=True, slots=True)
class Decode:
    """Up to `at_most` calls, in each of which every lane draws a token of its node."""

    parts: tuple[Part, ...]
    at_most: int
    beside: bool = False


@dataclass(frozen=True, slots=True)
class Flush:
    """One call that feeds drawn tokens only because their segments seal and are read later."""

    parts: tuple[Part, ...]
    beside: bool = False


@dataclass(frozen=True, slots=True)
class Stitch:
    """The join of `fork` is read: `thread` goes on in `lane`, writing `segment`.

    branches: the threads that it waited for
    gained: segments that enter its view (none where the join drops, or appends text)
    """

    fork: Ref
    thread: int
    lane: int
    segment: int
    branches: Runs
    gained: Runs


@dataclass(frozen=True, slots=True)
class Free:
    """Nothing sees these segments any more, and their pages go back to the pool."""

    segments: Runs


@dataclass(frozen=True, slots=True)
class Moved:
    """In `thread`, a stretch that may be gone through otherwise, or again.

    segment: what `thread` goes on writing after it
    gained: segments of the thread after it that it had not before
    """

    thread: int
    segment: int
    gained: Runs


@dataclass(frozen=True, slots=True)
class Repeat:
    """One round of `loop`, gone through `rounds` times by the threads of `moved`; what a round gains, each gains."""

    loop: Ref
    rounds: int
    steps: tuple[Step, ...]
    moved: tuple[Moved, ...]


@dataclass(frozen=True, slots=True)
class Choose:
    """One of `arms` is gone through by each thread.

    ends: for each arm, how the threads come out of it
    merged: what each thread goes on with: its `segment` stands for those of the arms, and so does `gained` for theirs
    """

    cond: Ref
    arms: tuple[tuple[Step, ...], ...]
    ends: tuple[tuple[Moved, ...], ...]
    merged: tuple[Moved, ...]


Step: TypeAlias = Alias | Prefill | Decode | Flush | Stitch | Free | Repeat | Choose


@dataclass(frozen=True, slots=True)
class Schedule:
    """The static schedule of a plan's worst case. Its own length and peak are estimates: see docs/scheduler.md.

    calls: calls of the model; pages_peak: pages in use at once; lanes: rows of the widest call
    """

    machine: Machine
    main: str
    steps: tuple[Step, ...]
    calls: int
    pages_peak: int
    threads: int


def runs(numbers: Iterable[int]) -> Runs:
    """Numbers as runs of consecutive ones, in the order given."""
    found: list[tuple[int, int]] = []
    first = count = 0
    for number in numbers:
        if count and number == first + count:
            count += 1
        else:
            if count:
                found.append((first, count))
            first, count = number, 1
    if count:
        found.append((first, count))
    return tuple(found)


def members(of: Runs) -> Iterator[int]:
    """The numbers of `of`, in order."""
    for first, count in of:
        yield from range(first, first + count)


def size(of: Runs) -> int:
    """How many numbers `of` holds."""
    return sum(count for _, count in of)


def num_calls(steps: Iterable[Step]) -> int:
    """Calls of the model that `steps` make, loops and the longer arms included."""
    total = 0
    for step in steps:
        match step:
            case Prefill(beside=beside) | Flush(beside=beside):
                total += not beside
            case Decode(at_most=at_most, beside=beside):
                total += 0 if beside else at_most
            case Repeat(rounds=rounds, steps=inner):
                total += rounds * num_calls(inner)
            case Choose(arms=arms):
                total += max((num_calls(arm) for arm in arms), default=0)
            case Alias() | Stitch() | Free():
                pass
            case _:
                assert_never(step)
    return total


def schedule_text(schedule: Schedule) -> str:
    """The schedule for a person, a step a line."""
    machine = schedule.machine
    head = (
        f"schedule {schedule.main}: {schedule.calls} calls, {schedule.threads} threads, "
        f"{schedule.pages_peak} of {machine.pages} pages of {machine.page_size}, {machine.lanes} lanes"
    )
    return "\n".join([head, *_lines(schedule.steps, schedule.main, "  ")])


def step_line(step: Step, main: str) -> str:
    """A step's own line, without the steps inside it."""
    match step:
        case Alias():
            sees = "nothing" if step.fresh else f"thread {step.source}"
            return (
                f"alias    {_ref(step.fork, main)}: threads {_runs(step.branches)} see {sees}, "
                f"in lanes {_runs(step.lanes)}, writing segments {_runs(step.segments)}"
            )
        case Prefill(parts=parts, beside=beside):
            return f"prefill{'+' if beside else ' '} {_parts(parts, main)}"
        case Decode(parts=parts, at_most=at_most, beside=beside):
            return f"decode{'+' if beside else ' '}  x{at_most} {_parts(parts, main)}"
        case Flush(parts=parts, beside=beside):
            return f"flush{'+' if beside else ' '}   {_parts(parts, main)}"
        case Stitch():
            gains = f", gains segments {_runs(step.gained)}" if step.gained else ""
            return (
                f"stitch   {_ref(step.fork, main)}: thread {step.thread} goes on after threads {_runs(step.branches)}, "
                f"in lane {step.lane}, writing segment {step.segment}{gains}"
            )
        case Free(segments=segments):
            return f"free     segments {_runs(segments)}"
        case Repeat(loop=loop, rounds=rounds, moved=moved):
            return f"repeat   {_ref(loop, main)} x{rounds}: threads {_runs(runs(m.thread for m in moved))}"
        case Choose(cond=cond, merged=merged):
            return f"choose   {_ref(cond, main)}: threads {_runs(runs(m.thread for m in merged))}"
        case _:
            assert_never(step)


def _lines(steps: Iterable[Step], main: str, indent: str) -> Iterator[str]:
    for step in steps:
        yield indent + step_line(step, main)
        match step:
            case Repeat(steps=inner):
                yield from _lines(inner, main, indent + "  ")
            case Choose(arms=arms):
                for place, arm in enumerate(arms):
                    yield f"{indent}  {'then' if place == 0 else 'else'}"
                    yield from _lines(arm, main, indent + "    ")
            case _:
                pass


def _parts(parts: Iterable[Part], main: str) -> str:
    return "; ".join(
        f"lanes {_runs(part.lanes)} {' '.join(_ref(node, main) for node in part.nodes) or '...'}"
        + (f" rows={part.rows}" if part.rows else "")
        + (" draws" if part.draws and part.rows else "")
        for part in parts
    )


def _ref(ref: Ref, main: str) -> str:
    plan, ctx = ref
    return f"%{ctx}" if plan == main else f"{plan}%{ctx}"


def _runs(of: Runs) -> str:
    return ", ".join(f"{first}" if count == 1 else f"{first}..{first + count - 1}" for first, count in of) or "none"
