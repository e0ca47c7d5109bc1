"""The verifier of recorded schedules, on recordings written by hand: they hold, and each fault breaks its own rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeAlias, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from law_runs import COMMON, engines, model
from test_preemption import pressed
from test_preemption import run as run_pressed

from anabranch.compiler.recording import (
    Adopt,
    Arm,
    Begin,
    Block,
    Cache,
    Call,
    End,
    Enter,
    Forked,
    Free,
    Joined,
    Lose,
    Open,
    Page,
    Read,
    Recording,
    Round,
    Seal,
    Shrink,
    Source,
    Step,
    Stitch,
    SwapIn,
    SwapOut,
    Token,
    Trim,
    Uncache,
    Write,
    from_json,
    to_json,
)
from anabranch.compiler.replay_rules import RULES
from anabranch.compiler.scheduler import Machine
from anabranch.compiler.sizes import ByteSizes, Piece, Sizes
from anabranch.compiler.verify_recording import ScheduleFault, verify_recording
from anabranch.dsl.diagnostics import PlanError
from anabranch.dsl.parse import parse_text
from anabranch.dsl.printer import print_plan
from anabranch.runtime.engine import Engine, EngineConfig
from anabranch.runtime.recorder import Recorder
from anabranch.testing import Outcome, Plan, Trace, plans, simulate

Edit: TypeAlias = Callable[[list[Step]], list[Step]]

MACHINE = Machine(lanes=2, pages=16, page_size=2, chunk=4)


def recorded(text: str, steps: Sequence[Step], *, inputs: dict[str, object] | None = None, **machine: int) -> Recording:
    source = Source(text, "main", inputs or {}, 0)
    return Recording(replace(MACHINE, **machine), False, (source,), tuple(steps))


def block(thread: int, segment: int, first: int, position: int, kind: str, *reads: tuple[Read, ...]) -> Block:
    return Block(thread, segment, first, position, ((kind, len(reads)),), reads)


def begin(run: int = 0, thread: int = 0) -> list[Step]:
    """The start of a plan's own thread, which writes the start token."""
    return [Begin(thread, run, (), None, None, 0, True), Write(thread, (1,))]


def branch(thread: int, parent: int, node: int, index: int, path: str, *, fresh: bool = False) -> Begin:
    return Begin(thread, 0, tuple(path.split("/")), parent, ("main", node), index, fresh)


# --- recordings that hold

FORK = """main = plan() {
  text("a");
  x = fork(2) { b = gen(max=2); } join(all, stitch);
  c = gen("d", max=2);
}"""

# The parent writes [1, 7], each branch two tokens; both are stitched, and the parent goes on at position 4.
FORK_STEPS: list[Step] = [
    *begin(),
    Enter(0, ("main", 1)),
    Write(0, (7,)),
    Enter(0, ("main", 4)),
    Open(0, 0, 0),
    Page(0, 0),
    Call((0,), (block(0, 0, 0, 0, "prefill", ((0, 1, 0),), ((0, 2, 0),)),)),
    Seal(0),
    Forked(0, ("main", 4), 2),
    branch(1, 0, 4, 0, "x[0]"),
    Enter(1, ("main", 3)),
    branch(2, 0, 4, 1, "x[1]"),
    Enter(2, ("main", 3)),
    Call((1, 2), ()),
    Token(1, 20),
    Token(2, 30),
    Open(1, 1, 2),
    Page(1, 3),
    Open(2, 2, 2),
    Page(2, 5),
    Call(
        (1, 2),
        (
            block(1, 1, 0, 2, "decode", ((0, 2, 0), (6, 1, 0))),
            block(2, 2, 0, 2, "decode", ((0, 2, 0), (10, 1, 0))),
        ),
    ),
    Token(1, 21),
    Token(2, 31),
    End(1, "ok"),
    End(2, "ok"),
    Joined(0, ("main", 4), (0, 1), (0, 1), False),
    Call(
        (0,),
        (
            block(1, 1, 1, 3, "flush", ((0, 2, 0), (6, 2, 0))),
            block(2, 2, 1, 3, "flush", ((0, 2, 0), (10, 2, 0))),
        ),
    ),
    Seal(1),
    Seal(2),
    Stitch(0, (1, 2)),
    Enter(0, ("main", 5)),
    Write(0, (9,)),
    Open(3, 0, 4),
    Page(3, 7),
    Call((0,), (block(0, 3, 0, 4, "prefill", ((0, 2, 0), (6, 2, 0), (10, 2, 0), (14, 1, 0))),)),
    Token(0, 40),
    Call((0,), (block(0, 3, 1, 5, "decode", ((0, 2, 0), (6, 2, 0), (10, 2, 0), (14, 2, 0))),)),
    Token(0, 41),
    End(0, "ok"),
    Free(3),
    Free(1),
    Free(2),
    Free(0),
]

# The second branch ends its turn after one token, which `sum` lays after the first branch, at a shift of 2; the parent
# goes on at 2 + 2 + 1.
SUM = FORK.replace("stitch", "stitch(sum)")
SUM_STEPS: list[Step] = [
    *FORK_STEPS[:22],
    Token(1, 21),
    Token(2, 31),
    Trim(2, 1),
    End(1, "ok"),
    End(2, "ok"),
    Joined(0, ("main", 4), (0, 1), (0, 1), False),
    Call((0,), (block(1, 1, 1, 3, "flush", ((0, 2, 0), (6, 2, 0))),)),
    Seal(1),
    Seal(2),
    Stitch(0, (1, 2)),
    Enter(0, ("main", 5)),
    Write(0, (9,)),
    Open(3, 0, 5),
    Page(3, 7),
    Call((0,), (block(0, 3, 0, 5, "prefill", ((0, 2, 0), (6, 2, 0), (10, 1, 2), (14, 1, 0))),)),
    Token(0, 40),
    End(0, "ok"),
    Free(3),
    Free(1),
    Free(2),
    Free(0),
]

# A loop whose body has a condition, then a fork of which one branch must succeed: the first attempt fails.
LOOP = """main = plan() {
  loop(2) { a = gen("k", max=1); if (a == "z") { text("q"); } else { text("r"); }; } until(a == "b");
  y = fork(2, retry=1, limit=1, budget=3) { need(a == "c"); f = gen("w", max=1); } join(first(1), drop);
}"""
LOOP_STEPS: list[Step] = [
    *begin(),
    Enter(0, ("main", 8)),
    Round(0, ("main", 8), 0),
    Enter(0, ("main", 2)),
    Write(0, (5,)),
    Open(0, 0, 0),
    Page(0, 0),
    Call((0,), (block(0, 0, 0, 0, "prefill", ((0, 1, 0),), ((0, 2, 0),)),)),
    Token(0, 6),
    Enter(0, ("main", 7)),
    Arm(0, ("main", 7), 0),
    Enter(0, ("main", 4)),
    Write(0, (8,)),
    Round(0, ("main", 8), 1),
    Enter(0, ("main", 2)),
    Write(0, (5,)),
    Page(0, 1),
    Page(0, 2),
    Call(
        (0,),
        (Block(0, 0, 2, 2, (("decode", 1), ("prefill", 2)), (((0, 3, 0),), ((0, 4, 0),), ((0, 5, 0),))),),
    ),
    Token(0, 6),
    Enter(0, ("main", 7)),
    Arm(0, ("main", 7), 1),
    Enter(0, ("main", 6)),
    Write(0, (8,)),
    Enter(0, ("main", 11)),
    Page(0, 3),
    Call((0,), (Block(0, 0, 5, 5, (("decode", 1), ("prefill", 1)), (((0, 6, 0),), ((0, 7, 0),))),)),
    Seal(0),
    Forked(0, ("main", 11), 2),
    branch(1, 0, 11, 0, "y[0]"),
    End(1, "failed"),
    branch(2, 0, 11, 0, "y[0]~1"),
    Enter(2, ("main", 10)),
    Write(2, (9,)),
    Open(1, 2, 7),
    Page(1, 4),
    Call((2,), (block(2, 1, 0, 7, "prefill", ((0, 7, 0), (8, 1, 0))),)),
    Token(2, 10),
    End(2, "ok"),
    Free(1),
    Joined(0, ("main", 11), (0,), (), False),
    End(0, "ok"),
    Free(0),
]

# A thread that is swapped out and comes back elsewhere, and one that loses what it fed.
GEN = 'main = plan() { a = gen("k", max=3); }'
SWAP_STEPS: list[Step] = [
    *begin(),
    Enter(0, ("main", 1)),
    Write(0, (5,)),
    Open(0, 0, 0),
    Page(0, 0),
    Call((0,), (block(0, 0, 0, 0, "prefill", ((0, 1, 0),), ((0, 2, 0),)),)),
    Token(0, 6),
    SwapOut(0),
    SwapIn(0, (4,)),
    Page(0, 9),
    Call((0,), (block(0, 0, 2, 2, "decode", ((8, 2, 0), (18, 1, 0))),)),
    Token(0, 7),
    End(0, "ok"),
    Free(0),
]
LOSE_STEPS: list[Step] = [
    *SWAP_STEPS[:8],
    Lose(0),
    Page(0, 4),
    Call((0,), (block(0, 0, 0, 0, "recompute", ((8, 1, 0),), ((8, 2, 0),)),)),
    Page(0, 9),
    Call((0,), (block(0, 0, 2, 2, "decode", ((8, 2, 0), (18, 1, 0))),)),
    Token(0, 7),
    End(0, "ok"),
    Free(0),
]

# Two runs, one after the other, of the same text: the second starts from the first one's page.
CACHE = 'main = plan() { text("abc"); }'
CACHE_STEPS: list[Step] = [
    *begin(),
    Enter(0, ("main", 1)),
    Write(0, (5, 6, 7)),
    Open(0, 0, 0),
    Page(0, 0),
    Page(0, 1),
    Call((0,), (block(0, 0, 0, 0, "prefill", ((0, 1, 0),), ((0, 2, 0),), ((0, 3, 0),), ((0, 4, 0),)),)),
    End(0, "ok"),
    Seal(0),
    Cache(0),
    Cache(1),
    Free(0),
    *begin(1, 1),
    Enter(1, ("main", 1)),
    Write(1, (5, 6, 8)),
    Adopt(1, 1, (1, 5), (0,)),
    Open(2, 1, 2),
    Page(2, 4),
    Call((1,), (block(1, 2, 0, 2, "prefill", ((0, 2, 0), (8, 1, 0)), ((0, 2, 0), (8, 2, 0))),)),
    Uncache(1),
    End(1, "ok"),
    Free(2),
    Free(1),
]

# Options that are scored are written and taken back, and the last token is fed again for its logits.
SCORE = 'main = plan() { a = gen("k", type=choice("u", "v", by="logprob"), max=2); b = gen(max=1); }'
SCORE_STEPS: list[Step] = [
    *begin(),
    Enter(0, ("main", 1)),
    Write(0, (5,)),
    Write(0, (6,)),
    Open(0, 0, 0),
    Page(0, 0),
    Page(0, 1),
    Call((0,), (block(0, 0, 0, 0, "prefill", ((0, 1, 0),), ((0, 2, 0),), ((0, 3, 0),)),)),
    Trim(0, 1),
    Shrink(0, 1),
    Write(0, (6,)),
    Enter(0, ("main", 2)),
    Page(0, 3),
    Call((0,), (block(0, 0, 2, 2, "recompute", ((0, 2, 0), (6, 1, 0))),)),
    Token(0, 9),
    End(0, "ok"),
    Free(0),
]

# The first branch to end wins; the other is cancelled.
RACE = 'main = plan() { x = fork(2) { b = gen("k", max=2); } join(first(1), drop); }'
RACE_BEGIN = branch(2, 0, 3, 1, "x[1]")
RACE_JOIN = Joined(0, ("main", 3), (0,), (), False)
RACE_STEPS: list[Step] = [
    *begin(),
    Enter(0, ("main", 3)),
    Open(0, 0, 0),
    Page(0, 0),
    Call((0,), (block(0, 0, 0, 0, "prefill", ((0, 1, 0),)),)),
    Seal(0),
    Forked(0, ("main", 3), 2),
    branch(1, 0, 3, 0, "x[0]"),
    RACE_BEGIN,
    Enter(1, ("main", 2)),
    Write(1, (5,)),
    Open(1, 1, 1),
    Page(1, 1),
    Call((1,), (block(1, 1, 0, 1, "prefill", ((0, 1, 0), (2, 1, 0))),)),
    Token(1, 6),
    Enter(2, ("main", 2)),
    Write(2, (5,)),
    End(1, "ok"),
    Free(1),
    RACE_JOIN,
    End(2, "cancelled"),
    End(0, "ok"),
    Free(0),
]

REDUCE = 'main = plan() { z = reduce(i: ["a", "b", "c", "d", "e"], by=2) { need(true); return("f"); }; }'


def reduced(*widths: int) -> list[Step]:
    """Levels of a `reduce` of five items, each with so many groups that are merged."""
    steps: list[Step] = [*begin(), Enter(0, ("main", 2)), Trim(0, 1)]
    count = 0
    for width in widths:
        steps.append(Forked(0, ("main", 2), width))
        for index in range(width):
            count += 1
            steps += [branch(count, 0, 2, index, f"z[{count - 1}]"), End(count, "ok")]
        steps.append(Joined(0, ("main", 2), tuple(range(width)), (), False))
    return [*steps, End(0, "ok")]


BASES = {
    "fork": recorded(FORK, FORK_STEPS),
    "sum": recorded(SUM, SUM_STEPS),
    "loop": recorded(LOOP, LOOP_STEPS),
    "swap": recorded(GEN, SWAP_STEPS),
    "lose": recorded(GEN, LOSE_STEPS),
    "cache": replace(recorded(CACHE, CACHE_STEPS), runs=(Source(CACHE, "main", {}, 0),) * 2),
    "score": recorded(SCORE, SCORE_STEPS),
    "first": recorded(RACE, RACE_STEPS),
    "reduce": recorded(REDUCE, reduced(2, 1, 1)),
}


@pytest.mark.parametrize("name", BASES)
def test_a_good_recording_holds(name: str) -> None:
    """Each of the recordings that the faults are put in keeps every rule, bounds in bytes included."""
    report = verify_recording(BASES[name], sizes=ByteSizes())
    assert report.calls == sum(isinstance(step, Call) for step in BASES[name].steps)
    assert report.threads == sum(isinstance(step, Begin) for step in BASES[name].steps)
    assert report.tokens_drawn == sum(isinstance(step, Token) for step in BASES[name].steps)


def test_a_report_counts() -> None:
    """Rows by kind, pages in use at once, swaps and rows fed again."""
    report = verify_recording(BASES["fork"])
    assert (report.rows, report.pages_peak) == ({"prefill": 3, "decode": 3, "flush": 2}, 4)
    assert (report.runs, report.threads, report.segments, report.swaps, report.recomputed) == (1, 3, 4, 0, 0)
    assert verify_recording(BASES["swap"]).swaps == 1
    assert verify_recording(BASES["lose"]).recomputed == 2


# --- faults


def drop(step: Step) -> Edit:
    def edit(steps: list[Step]) -> list[Step]:
        at = steps.index(step)
        return [*steps[:at], *steps[at + 1 :]]

    return edit


def put(step: Step, *new: Step) -> Edit:
    """`new` in the place of `step`."""

    def edit(steps: list[Step]) -> list[Step]:
        at = steps.index(step)
        return [*steps[:at], *new, *steps[at + 1 :]]

    return edit


def after(step: Step, *new: Step) -> Edit:
    return put(step, step, *new)


def before(step: Step, *new: Step) -> Edit:
    return put(step, *new, step)


def both(*edits: Edit) -> Edit:
    def edit(steps: list[Step]) -> list[Step]:
        for one in edits:
            steps = one(steps)
        return steps

    return edit


def call(number: int, place: int = 0, **changes: object) -> Edit:
    """Other fields of a block of call `number`."""

    def edit(steps: list[Step]) -> list[Step]:
        at = [at for at, step in enumerate(steps) if isinstance(step, Call)][number]
        found = steps[at]
        assert isinstance(found, Call)
        blocks = list(found.blocks)
        blocks[place] = replace(blocks[place], **changes)  # type: ignore[arg-type]
        return [*steps[:at], replace(found, blocks=tuple(blocks)), *steps[at + 1 :]]

    return edit


def seats(number: int, *threads: int) -> Edit:
    """Other seats of call `number`."""

    def edit(steps: list[Step]) -> list[Step]:
        at = [at for at, step in enumerate(steps) if isinstance(step, Call)][number]
        found = steps[at]
        assert isinstance(found, Call)
        return [*steps[:at], replace(found, seats=threads), *steps[at + 1 :]]

    return edit


def reads(number: int, place: int, *rows: tuple[Read, ...]) -> Edit:
    return call(number, place, reads=rows)


JOIN = Joined(0, ("main", 4), (0, 1), (0, 1), False)
FLUSH = next(step for step in FORK_STEPS if isinstance(step, Call) and step.blocks[-1:] and step.blocks[0].first == 1)
FIRST = Joined(0, ("main", 11), (0,), (), False)

FAULTS: list[tuple[str, str, Edit]] = [
    # memory
    ("known-names", "fork", put(Seal(0), Seal(9))),
    ("known-names", "fork", put(Enter(1, ("main", 3)), Enter(7, ("main", 3)))),
    ("known-names", "fork", put(Open(1, 1, 2), Open(4, 1, 2))),
    ("known-names", "fork", put(branch(1, 0, 4, 0, "x[0]"), branch(3, 0, 4, 0, "x[0]"))),
    ("known-names", "fork", put(Write(0, (9,)), Write(0, (-9,)))),
    ("known-names", "fork", put(Token(0, 40), Token(0, -2))),
    ("known-names", "fork", put(Begin(0, 0, (), None, None, 0, True), Begin(0, 1, (), None, None, 0, True))),
    ("known-names", "fork", put(Begin(0, 0, (), None, None, 0, True), Begin(0, 0, (), None, None, 0, False))),
    ("known-names", "cache", put(Begin(1, 1, (), None, None, 0, True), Begin(1, 0, (), None, None, 0, True))),
    ("page-is-free", "fork", put(Page(2, 5), Page(2, 3))),
    ("page-is-free", "fork", put(Page(2, 5), Page(2, 16))),
    ("page-is-free", "fork", put(Page(2, 5), Page(2, -1))),
    ("page-is-free", "cache", put(Page(2, 4), Page(2, 0))),
    ("page-is-free", "swap", put(SwapIn(0, (4,)), SwapIn(0, (16,)))),
    ("pages-as-needed", "fork", drop(Page(2, 5))),
    ("pages-as-needed", "fork", after(Page(2, 5), Page(2, 6))),
    ("pages-as-needed", "fork", before(Seal(0), Page(0, 1))),
    ("pages-as-needed", "score", drop(Shrink(0, 1))),
    ("pages-as-needed", "score", put(Shrink(0, 1), Shrink(0, 2))),
    ("pages-as-needed", "score", after(Shrink(0, 1), Shrink(0, 0))),
    ("reads-its-view", "fork", drop(Seal(0))),
    ("sealed-not-written", "fork", after(Seal(0), Seal(0))),
    ("sealed-not-written", "fork", after(Seal(0), Page(0, 1))),
    ("sealed-not-written", "fork", call(2, 0, segment=2)),
    ("sealed-not-written", "fork", after(Page(2, 5), Open(3, 2, 2))),
    ("sealed-not-written", "swap", both(drop(SwapIn(0, (4,))), drop(Page(0, 9)))),
    (
        "shared-not-written",
        "score",
        both(
            after(Page(0, 3), Cache(0), Trim(0, 2), Write(0, (5, 6))),
            call(1, first=1, position=1, kinds=(("prefill", 2),), reads=(((0, 2, 0),), ((0, 2, 0), (6, 1, 0)))),
        ),
    ),
    ("free-when-unseen", "fork", before(Enter(0, ("main", 5)), Free(0))),
    ("free-when-unseen", "fork", after(End(2, "ok"), Free(1))),
    ("free-when-unseen", "fork", before(Token(1, 20), Free(0))),
    ("free-when-unseen", "fork", after(JOIN, Free(2))),
    ("free-when-unseen", "fork", before(End(0, "ok"), Free(2))),
    ("freed-once", "fork", after(Free(1), Free(1))),
    ("freed-once", "fork", after(Free(1), SwapOut(1))),
    ("swapped-back", "swap", after(SwapOut(0), SwapOut(0))),
    ("swapped-back", "swap", put(SwapIn(0, (4,)), SwapIn(0, (4, 5)))),
    ("swapped-back", "swap", drop(SwapOut(0))),
    ("swapped-back", "fork", after(Page(2, 5), SwapOut(0))),
    ("swapped-back", "cache", before(Free(0), SwapOut(0))),
    ("kind-of-row", "lose", after(Lose(0), Trim(0, 1), Write(0, (6,)))),
    ("lost-is-fed-again", "lose", after(Lose(0), Lose(0))),
    ("lost-is-fed-again", "lose", before(Open(0, 0, 0), Lose(0))),
    ("lanes", "lose", after(Lose(0), End(0, "ok"))),
    ("cache-whole-pages", "cache", after(Cache(0), Cache(0))),
    ("cache-whole-pages", "cache", after(Cache(0), Cache(5))),
    ("cache-whole-pages", "cache", after(Uncache(1), Uncache(1))),
    ("cache-whole-pages", "score", after(Page(0, 3), Cache(3))),
    ("adopt-the-same", "cache", put(Adopt(1, 1, (1, 5), (0,)), Adopt(1, 1, (1, 5), (1,)))),
    ("adopt-the-same", "cache", put(Adopt(1, 1, (1, 5), (0,)), Adopt(1, 1, (1, 6), (0,)))),
    ("adopt-the-same", "cache", put(Adopt(1, 1, (1, 5), (0,)), Adopt(1, 1, (1,), (0,)))),
    ("adopt-the-same", "cache", put(Adopt(1, 1, (1, 5), (0,)), Adopt(1, 1, (), ()))),
    ("adopt-the-same", "cache", drop(Cache(0))),
    ("adopt-the-same", "cache", put(Write(0, (5, 6, 7)), Write(0, (4, 6, 7)))),
    # attention
    ("no-read-after-free", "fork", reads(2, 0, ((4, 2, 0), (6, 1, 0)))),
    ("no-read-after-free", "fork", reads(2, 0, ((0, 2, 0), (6, 2, 0)))),
    ("no-read-after-free", "fork", reads(2, 0, ((0, 2, 0), (6, 1, 0), (1 << 40, 1, 0)))),
    ("no-read-after-free", "fork", reads(2, 0, ((0, 2, 0), (6, -1, 0)))),
    ("reads-its-view", "fork", reads(3, 1, ((0, 2, 0), (6, 2, 0), (10, 2, 0)))),
    ("reads-its-view", "fork", reads(3, 1, ((0, 2, 0), (6, 2, 0)))),
    ("reads-its-view", "fork", reads(3, 1, ((0, 1, 0), (10, 2, 0)))),
    ("reads-its-view", "fork", reads(3, 1, ((0, 2, 0), (0, 1, 0), (10, 2, 0)))),
    ("reads-its-view", "fork", reads(0, 0, ((0, 2, 0),), ((0, 2, 0),))),
    ("reads-its-view", "fork", reads(4, 0, ((0, 2, 0), (6, 2, 0), (14, 1, 0)))),
    ("reads-its-view", "fork", both(drop(Seal(0)), drop(FORK_STEPS[7]))),
    ("right-distance", "sum", reads(4, 0, ((0, 2, 0), (6, 2, 0), (10, 1, 1), (14, 1, 0)))),
    ("right-distance", "sum", reads(4, 0, ((0, 2, 0), (6, 2, 0), (10, 1, 0), (14, 1, 0)))),
    ("right-distance", "sum", reads(4, 0, ((0, 2, 0), (6, 2, 2), (10, 1, 0), (14, 1, 0)))),
    ("right-position", "fork", call(2, 1, position=3)),
    ("right-position", "fork", put(Open(3, 0, 4), Open(3, 0, 6))),
    ("right-position", "sum", put(Open(3, 0, 5), Open(3, 0, 4))),
    # meaning
    ("in-order", "fork", put(Enter(0, ("main", 1)), Enter(0, ("main", 4)))),
    ("in-order", "fork", put(Enter(1, ("main", 3)), Enter(1, ("main", 5)))),
    ("in-order", "fork", put(Enter(1, ("main", 3)), Enter(1, ("side", 3)))),
    ("in-order", "fork", after(Token(0, 40), Enter(0, ("main", 5)))),
    ("in-order", "loop", put(Arm(0, ("main", 7), 1), Arm(0, ("main", 7), -1))),
    ("in-order", "loop", put(Arm(0, ("main", 7), 1), Arm(0, ("main", 7), 0))),
    ("in-order", "loop", after(Arm(0, ("main", 7), 0), Arm(0, ("main", 7), 1))),
    ("in-order", "loop", drop(Arm(0, ("main", 7), 0))),
    ("in-order", "loop", before(Arm(0, ("main", 7), 0), Write(0, (3,)))),
    ("in-order", "loop", drop(Round(0, ("main", 8), 0))),
    ("rounds-of-the-loop", "loop", put(Round(0, ("main", 8), 1), Round(0, ("main", 8), 2))),
    ("rounds-of-the-loop", "loop", put(Round(0, ("main", 8), 0), Round(0, ("main", 8), 1))),
    ("rounds-of-the-loop", "loop", before(Enter(0, ("main", 11)), Round(0, ("main", 8), 2))),
    ("rounds-of-the-loop", "loop", before(Arm(0, ("main", 7), 0), Round(0, ("main", 8), 1))),
    ("rounds-of-the-loop", "loop", before(Enter(0, ("main", 4)), Round(0, ("main", 8), 1))),
    ("waits-for-its-branches", "fork", put(Forked(0, ("main", 4), 2), Forked(0, ("main", 4), 3))),
    ("waits-for-its-branches", "fork", put(Forked(0, ("main", 4), 2), Forked(0, ("main", 5), 2))),
    ("waits-for-its-branches", "fork", after(Forked(0, ("main", 4), 2), Forked(0, ("main", 4), 2))),
    ("waits-for-its-branches", "fork", before(JOIN, Write(0, (9,)))),
    ("waits-for-its-branches", "fork", before(JOIN, Trim(0, 1))),
    ("waits-for-its-branches", "fork", before(JOIN, Enter(0, ("main", 5)))),
    ("waits-for-its-branches", "fork", before(Forked(0, ("main", 4), 2), Enter(0, ("main", 5)))),
    ("waits-for-its-branches", "fork", before(Forked(0, ("main", 4), 2), JOIN)),
    ("waits-for-its-branches", "reduce", lambda steps: reduced(2, 2)),
    ("waits-for-its-branches", "reduce", lambda steps: reduced(3)),
    ("branch-once", "fork", put(branch(2, 0, 4, 1, "x[1]"), branch(2, 0, 4, 0, "x[0]"))),
    ("branch-once", "fork", put(branch(2, 0, 4, 1, "x[1]"), branch(2, 0, 4, 2, "x[2]"))),
    ("branch-once", "fork", put(branch(2, 0, 4, 1, "x[1]"), branch(2, 0, 4, 1, "x[1]", fresh=True))),
    ("branch-once", "fork", put(branch(2, 0, 4, 1, "x[1]"), branch(2, 1, 4, 1, "x[1]"))),
    ("branch-once", "loop", both(put(End(2, "ok"), End(2, "failed"), branch(3, 0, 11, 0, "y[0]~2")))),
    ("branch-once", "loop", put(End(1, "failed"), End(1, "truncated"))),
    ("path-of-the-branch", "fork", put(branch(2, 0, 4, 1, "x[1]"), branch(2, 0, 4, 1, "x[0]"))),
    ("path-of-the-branch", "loop", put(branch(2, 0, 11, 0, "y[0]~1"), branch(2, 0, 11, 0, "y[0]"))),
    ("path-of-the-branch", "fork", put(Begin(0, 0, (), None, None, 0, True), Begin(0, 0, ("x",), None, None, 0, True))),
    (
        "joined-when-permitted",
        "fork",
        both(put(End(2, "ok"), End(2, "cancelled")), put(JOIN, replace(JOIN, ok=(0,), winners=(0,)))),
    ),
    ("joined-when-permitted", "fork", before(Token(1, 20), replace(JOIN, ok=(), winners=(), failed=True))),
    ("joined-when-permitted", "first", before(End(1, "ok"), replace(RACE_JOIN, ok=(), failed=True))),
    ("joined-when-permitted", "fork", put(JOIN, replace(JOIN, winners=(), failed=True))),
    ("joined-when-permitted", "loop", put(FIRST, replace(FIRST, failed=True))),
    ("joined-when-permitted", "loop", both(put(End(2, "ok"), End(2, "cancelled")), put(FIRST, replace(FIRST, ok=())))),
    ("ends-for-a-cause", "loop", both(put(End(2, "ok"), End(2, "late")), put(FIRST, replace(FIRST, ok=())))),
    ("joined-when-permitted", "loop", put(branch(2, 0, 11, 0, "y[0]~1"), replace(FIRST, ok=(), failed=True))),
    ("winners-of-the-join", "fork", put(JOIN, replace(JOIN, winners=(0,)))),
    ("winners-of-the-join", "fork", put(JOIN, replace(JOIN, winners=(1, 0)))),
    ("winners-of-the-join", "fork", put(JOIN, replace(JOIN, ok=(1, 0)))),
    ("winners-of-the-join", "fork", put(JOIN, replace(JOIN, ok=(0,), winners=(0,)))),
    ("ends-for-a-cause", "fork", put(End(2, "ok"), End(2, "truncated"))),
    ("winners-of-the-join", "loop", put(FIRST, replace(FIRST, winners=(0,)))),
    ("stitch-the-winners", "fork", put(Stitch(0, (1, 2)), Stitch(0, (2, 1)))),
    ("stitch-the-winners", "fork", put(Stitch(0, (1, 2)), Stitch(0, (1,)))),
    ("stitch-the-winners", "fork", drop(Stitch(0, (1, 2)))),
    ("stitch-the-winners", "fork", after(Stitch(0, (1, 2)), Stitch(0, (1, 2)))),
    ("stitch-the-winners", "fork", drop(Seal(2))),
    ("stitch-the-winners", "loop", after(FIRST, Stitch(0, (2,)))),
    ("losers-stop", "first", after(RACE_JOIN, Call((2,), ()))),
    ("branch-once", "first", after(RACE_JOIN, branch(3, 0, 3, 1, "x[1]"))),
    ("losers-stop", "fork", put(End(1, "ok"), End(0, "cancelled"), Call((1, 2), ()))),
    ("over-is-over", "fork", after(End(1, "ok"), Token(1, 5))),
    ("over-is-over", "fork", after(End(1, "ok"), End(1, "ok"))),
    ("over-is-over", "fork", after(End(1, "ok"), Trim(1, 1))),
    ("over-is-over", "fork", put(End(1, "ok"), End(1, "done"))),
    ("seats-work", "fork", before(JOIN, replace(FLUSH, seats=()))),
    ("over-is-over", "loop", before(FIRST, End(0, "cancelled"))),
    ("ends-at-its-end", "fork", before(Enter(0, ("main", 5)), End(0, "ok"))),
    ("ends-at-its-end", "loop", before(Arm(0, ("main", 7), 0), End(0, "ok"))),
    ("ends-at-its-end", "loop", before(Forked(0, ("main", 11), 2), End(0, "ok"))),
    ("ends-at-its-end", "reduce", lambda steps: reduced(2)),
    # tokens
    ("fed-in-order", "fork", call(2, 1, first=1)),
    ("fed-in-order", "fork", after(Token(2, 30), Trim(2, 1))),
    ("in-order", "fork", put(Write(0, (7,)), Trim(0, 1))),
    ("fed-in-order", "score", put(Trim(0, 1), Trim(0, 4))),
    ("fed-in-order", "score", put(Trim(0, 1), Trim(0, 0))),
    ("kind-of-row", "fork", call(2, 0, kinds=(("prefill", 1),))),
    ("kind-of-row", "fork", call(0, 0, kinds=(("decode", 2),))),
    ("kind-of-row", "fork", call(0, 0, kinds=(("prefill", 1),))),
    ("kind-of-row", "fork", call(0, 0, kinds=(("prefill", 1), ("recompute", 1)))),
    ("kind-of-row", "fork", call(0, 0, kinds=(("soup", 2),))),
    ("kind-of-row", "fork", call(4, 0, kinds=(("reprefill", 1),))),
    ("kind-of-row", "fork", drop(Token(0, 41))),
    ("kind-of-row", "lose", call(1, 0, kinds=(("prefill", 2),))),
    ("kind-of-row", "score", put(SCORE_STEPS[11], Write(0, (7,)))),
    ("flush-then-seal", "fork", call(5, 0, kinds=(("flush", 1),))),
    ("flush-then-seal", "fork", both(call(5, 0, kinds=(("flush", 1),)), drop(Token(0, 41)))),
    ("flush-then-seal", "fork", call(3, 1, kinds=(("decode", 1),))),
    ("draws-of-the-gen", "fork", drop(Enter(1, ("main", 3)))),
    ("draws-of-the-gen", "score", drop(Enter(0, ("main", 2)))),
    ("draws-of-the-gen", "fork", lambda steps: [*steps[:15], End(2, "ok")]),
    ("draws-of-the-gen", "loop", drop(Token(2, 10))),
    ("draws-of-the-gen", "swap", lambda steps: [*steps[:12], *[Call((0,), ()), Token(0, 7), Trim(0, 1)] * 3]),
    ("draw-has-a-seat", "fork", seats(1, 1)),
    ("draw-has-a-seat", "fork", after(Token(1, 20), Trim(1, 1), Token(1, 20))),
    ("logits-at-hand", "fork", before(Token(0, 40), Write(0, (9,)))),
    (
        "logits-at-hand",
        "score",
        both(drop(SCORE_STEPS[13]), drop(SCORE_STEPS[14]), before(Token(0, 9), Trim(0, 1), Call((0,), ()))),
    ),
    ("logits-at-hand", "fork", both(after(Enter(0, ("main", 5)), Call((0,), ()), Token(0, 3)))),
    # limits
    ("lanes", "fork", seats(1, 1, 2, 0)),
    ("lanes", "fork", seats(1, 1, 1)),
    ("lanes", "fork", seats(2, 1)),
    ("lanes", "fork", seats(3, 1)),
    ("lanes", "fork", seats(1, 0, 1)),
    ("lanes", "loop", before(FIRST, Call((2,), ()))),
    ("lanes", "fork", lambda steps: [*steps[:21], replace_call(steps[21]), *steps[22:]]),
    ("seats-work", "fork", after(Call((1, 2), ()), Call((1, 2), ()))),
    ("seats-work", "fork", before(End(0, "ok"), Call((0,), ()))),
    ("limit-of-the-fork", "loop", before(End(1, "failed"), branch(2, 0, 11, 1, "y[1]"))),
    # the end
    ("all-over", "fork", lambda steps: steps[:10]),
    ("all-over", "fork", lambda steps: []),
    ("all-over", "cache", lambda steps: steps[:13]),
    ("all-freed", "fork", drop(Free(2))),
]


def replace_call(step: Step) -> Step:
    """The first block of a call twice."""
    assert isinstance(step, Call)
    return replace(step, blocks=(step.blocks[0], step.blocks[0]))


def first_of(deterministic: bool, *ok: int) -> Recording:
    """Both branches of a `first(1)` end ok, the second after fewer tokens; the join reads `ok`."""
    steps = list(RACE_STEPS)
    at = steps.index(Enter(2, ("main", 2)))
    more: list[Step] = [
        Call((1,), (block(1, 1, 1, 2, "decode", ((0, 1, 0), (2, 2, 0))),)),
        Token(1, 7),
        Enter(2, ("main", 2)),
        Write(2, (5,)),
        End(1, "ok"),
        Free(1),
        Open(2, 2, 1),
        Page(2, 1),
        Call((2,), (block(2, 2, 0, 1, "prefill", ((0, 1, 0), (2, 1, 0))),)),
        Token(2, 6),
        End(2, "ok"),
        Free(2),
        Joined(0, ("main", 3), ok, (), False),
        End(0, "ok"),
        Free(0),
    ]
    return replace(recorded(RACE, [*steps[:at], *more]), deterministic=deterministic)


def labelled(budget: int) -> Recording:
    """The fork as two named branches, the first with a budget of its own."""
    arms = f"m = branch(budget={budget}) {{ b = gen(max=2); }}; n = branch() {{ b = gen(max=2); }};"
    text = FORK.replace("fork(2) { b = gen(max=2); }", f"fork() {{ {arms} }}")
    renamed = {("main", 4): ("main", 6), ("main", 5): ("main", 7)}
    steps: list[Step] = []
    for step in FORK_STEPS:
        match step:
            case Begin(parent=0, index=index):
                step = replace(step, path=("x[m]" if index == 0 else "x[n]",), fork=("main", 6))
            case Enter(thread=thread, node=node):
                step = Enter(thread, ("main", 5) if thread == 2 else renamed.get(node, node))
            case Forked() | Joined():
                step = replace(step, node=("main", 6))
            case _:
                pass
        steps.append(step)
    return recorded(text, steps)


def other_text(base: str, old: str, new: str) -> Recording:
    """A recording as if its plan had another text."""
    recording = BASES[base]
    assert old in recording.runs[0].text
    return replace(recording, runs=(replace(recording.runs[0], text=recording.runs[0].text.replace(old, new)),))


@dataclass(frozen=True)
class NoText(ByteSizes):
    """Counts no tokens of text, so that every bound is too small."""

    start: int = 0

    def tokens(self, pieces: Sequence[Piece]) -> int:
        return 0


# A token is written, fed and taken back.
AGAIN: list[Step] = [
    Write(0, (5,)),
    Page(0, 2),
    Call((0,), (block(0, 0, 4, 4, "prefill", ((0, 5, 0),)),)),
    Trim(0, 1),
    Shrink(0, 1),
]

OTHERS: list[tuple[str, Recording, Sizes | None]] = [
    ("budget-kept", other_text("fork", "fork(2)", "fork(2, budget=3)"), None),
    ("budget-kept", other_text("fork", "plan()", "plan(budget=5)"), None),
    ("budget-kept", labelled(1), None),
    ("chunk", replace(BASES["cache"], machine=replace(MACHINE, chunk=3)), None),
    ("lanes", replace(BASES["fork"], machine=replace(MACHINE, lanes=1)), None),
    ("page-is-free", replace(BASES["fork"], machine=replace(MACHINE, pages=7)), None),
    ("order-of-ends", first_of(False, 1), None),
    ("order-of-ends", first_of(True, 0), None),
    ("within-bounds", BASES["cache"], NoText()),
    ("within-bounds", recorded(CACHE, before(End(0, "ok"), *AGAIN * 40)(CACHE_STEPS[:13])), ByteSizes()),
    ("order-of-ends", replace(BASES["first"], deterministic=True), None),
]


@pytest.mark.parametrize(("rule", "recording", "sizes"), OTHERS, ids=[f"{n}-{o[0]}" for n, o in enumerate(OTHERS)])
def test_a_limit_is_held(rule: str, recording: Recording, sizes: Sizes | None) -> None:
    """The steps are possible, and not under this plan, on this machine, or within these bounds."""
    assert broken(recording, sizes).rule == rule


def test_every_rule_is_broken_by_some_fault() -> None:
    """No rule is there that nothing here shows to work."""
    assert {fault[0] for fault in FAULTS} | {other[0] for other in OTHERS} == set(RULES)


@pytest.mark.parametrize(("deterministic", "ok"), [(False, (0,)), (False, (0, 1)), (True, (1,)), (True, (0, 1))])
def test_joins_read_branches_as_they_end(deterministic: bool, ok: tuple[int, ...]) -> None:
    """By time, or by tokens decoded; those that ended later may be read or not."""
    assert verify_recording(first_of(deterministic, *ok)).tokens_drawn == 3


def test_a_budget_that_is_kept() -> None:
    """A branch may draw all that its budget has."""
    assert verify_recording(labelled(2)).tokens_drawn == 6


def broken(recording: Recording, sizes: Sizes | None = None) -> ScheduleFault:
    with pytest.raises(ScheduleFault) as raised:
        verify_recording(recording, sizes=sizes)
    return raised.value


def test_no_read_takes_back_another() -> None:
    """Runs of no slots, or of fewer, are no reads: they do not add up to those of the view."""
    steps = list(BASES["fork"].steps)
    place, call = next((n, s) for n, s in enumerate(steps) if isinstance(s, Call) and s.blocks)
    (first, count, shift), *rest = call.blocks[0].reads[0]
    for reads in (
        ((first, count + 9, shift), (first + count + 9, -9, shift), *rest),
        ((first, count, shift), *rest, (first, 0, shift + 5)),
    ):
        block = replace(call.blocks[0], reads=(reads, *call.blocks[0].reads[1:]))
        steps[place] = replace(call, blocks=(block, *call.blocks[1:]))
        assert broken(replace(BASES["fork"], steps=tuple(steps))).rule in ("reads-its-view", "no-read-after-free")


def test_who_comes_first_wins() -> None:
    """Of two branches that a `first` reads, the one that ended calls later is not the winner."""
    text = 'main = plan() { x = fork(2) { g = gen("a", max=9); y = 1; } join(vote(y), stitch); }'
    for content in range(20):
        # Outcomes are given out by a hash of the branch: one of these lets the second end long before the first.
        trace = Trace((Outcome(9, content=content), Outcome(1, "end_of_turn", content)))
        recording = simulate(Plan.parse(text), Machine(2, 64, 4, 8), trace, seed=content).recording
        if next(s.thread for s in recording.steps if isinstance(s, End)) == 2:
            break
    else:
        pytest.fail("the first branch never ended last")
    verify_recording(recording)
    raced = replace(recording.runs[0], text=text.replace("vote(y)", "first(1)"))
    assert broken(replace(recording, runs=(raced,))).rule == "winners-of-the-join"


def test_a_call_seats_somebody() -> None:
    """A call of the model without a seat is none."""
    steps = list(BASES["fork"].steps)
    place = next(n for n, step in enumerate(steps) if isinstance(step, Call))
    assert broken(replace(BASES["fork"], steps=(*steps[:place], Call((), ()), *steps[place:]))).rule == "seats-work"


@pytest.mark.parametrize(("rule", "base", "edit"), FAULTS, ids=[f"{n}-{f[0]}" for n, f in enumerate(FAULTS)])
def test_a_fault_breaks_its_rule(rule: str, base: str, edit: Edit) -> None:
    """One thing is wrong with a good recording, and the verifier names the rule that is broken."""
    recording = BASES[base]
    assert broken(replace(recording, steps=tuple(edit(list(recording.steps))))).rule == rule


def test_a_fault_tells_where() -> None:
    """The message has the rule, what is wrong, and the steps around the one that is."""
    at = FORK_STEPS.index(Page(2, 5))
    fault = broken(recorded(FORK, put(Page(2, 5), Page(2, 3))(FORK_STEPS)))
    assert (fault.rule, fault.step_index) == ("page-is-free", at)
    assert fault.message == "segment 2 gets page 3, which is not free"
    assert RULES["page-is-free"] in str(fault)
    assert f">     {at} Page(segment=2, page=3)\n      {at + 1} Call(" in str(fault)


@pytest.mark.parametrize("name", BASES)
def test_a_recording_survives_json(name: str) -> None:
    """Written and read again it is the same, and it still holds."""
    again = from_json(to_json(BASES[name]))
    assert again == BASES[name]
    verify_recording(again)


def test_numbers_out_of_range_are_faults() -> None:
    """Whatever whole numbers a file holds, the verifier says which rule is broken, and soon."""
    far = [-(1 << 63), -1, (1 << 63) - 1]
    for base in BASES.values():
        for at, step in enumerate(base.steps):
            for field in fields(step):
                if type(getattr(step, field.name)) is not int:
                    continue
                for number in far:
                    steps = (*base.steps[:at], replace(step, **{field.name: number}), *base.steps[at + 1 :])  # type: ignore[arg-type]
                    try:
                        verify_recording(replace(base, steps=steps))
                    except ScheduleFault:
                        continue
                    # An id is whatever the model drew, as long as it is one.
                    assert field.name == "id" and number > 0, step


def test_plans_that_the_recording_does_not_fit() -> None:
    """A plan that does not compile, or has not that name, or takes other inputs, is told as such."""
    base = BASES["fork"]
    for source, code in (
        (Source("main = plan() {", "main", {}, 0), "unclosed-bracket"),
        (Source(FORK, "side", {}, 0), "bad-schedule"),
        (Source(FORK, "main", {"q": "x"}, 0), "unknown-input"),
        (Source(FORK.replace("plan()", "plan(q)"), "main", {}, 0), "missing-input"),
    ):
        with pytest.raises(PlanError) as raised:
            verify_recording(replace(base, runs=(source,)))
        assert raised.value.diagnostics[0].code == code
    with pytest.raises(ValueError, match="0 plans are given for 1 runs"):
        verify_recording(base, compiled=[])


def wide(width: int) -> Recording:
    """A fork of so many branches, of two tokens each, all of them stitched."""
    lanes, node = 2, ("main", 4)
    steps: list[Step] = [*FORK_STEPS[:9], Forked(0, node, width)]
    for first in range(0, width, lanes):
        members = range(first, min(width, first + lanes))
        for index in members:
            steps += [branch(index + 1, 0, 4, index, f"x[{index}]"), Enter(index + 1, ("main", 3))]
        steps.append(Call(tuple(index + 1 for index in members), ()))
        steps += [Token(index + 1, 20) for index in members]
        for index in members:
            steps += [Open(index + 1, index + 1, 2), Page(index + 1, 2 * index + 2)]
        rows = [block(i + 1, i + 1, 0, 2, "decode", ((0, 2, 0), (4 * i + 4, 1, 0))) for i in members]
        steps.append(Call(tuple(index + 1 for index in members), tuple(rows)))
        steps += [Token(index + 1, 21) for index in members]
        steps += [End(index + 1, "ok") for index in members]
    everyone = tuple(range(width))
    steps.append(Joined(0, node, everyone, everyone, False))
    rows = [block(i + 1, i + 1, 1, 3, "flush", ((0, 2, 0), (4 * i + 4, 2, 0))) for i in everyone]
    steps.append(Call((0,), tuple(rows)))
    steps += [Seal(index + 1) for index in everyone]
    steps += [Stitch(0, tuple(index + 1 for index in everyone)), Enter(0, ("main", 5)), Write(0, (9,))]
    steps += [Open(width + 1, 0, 4), Page(width + 1, 2 * width + 2)]
    view = ((0, 2, 0), *((4 * index + 4, 2, 0) for index in everyone))
    steps.append(Call((0,), (block(0, width + 1, 0, 4, "prefill", (*view, (4 * width + 4, 1, 0))),)))
    steps += [Token(0, 40), End(0, "ok"), *(Free(segment) for segment in range(width + 2))]
    return recorded(FORK.replace("fork(2)", f"fork({width})"), steps, pages=2 * width + 3)


def test_a_wide_fork() -> None:
    """Thousands of branches share their parent's view, and one row reads them all."""
    good = wide(3000)
    report = verify_recording(good)
    assert (report.threads, report.rows["flush"], report.pages_peak) == (3001, 3000, 3002)
    steps = list(good.steps)
    at = max(at for at, step in enumerate(steps) if isinstance(step, Call))
    last = steps[at]
    assert isinstance(last, Call)
    (row,) = last.blocks[0].reads
    steps[at] = replace(last, blocks=(replace(last.blocks[0], reads=((*row[:1500], *row[1501:]),)),))
    assert broken(replace(good, steps=tuple(steps))).rule == "reads-its-view"


# --- what engines record


def test_what_engines_do_holds() -> None:
    """Generated plans on engines of every shape, in small pools too: each run keeps every rule, its bounds included."""
    kinds: Counter[str] = Counter()

    @settings(COMMON, max_examples=60)
    @given(engines(), plans(), st.integers(0, 2**32))
    def law(config: EngineConfig, plan: Plan, seed: int) -> None:
        if "deadline" in print_plan(plan.program):
            config = replace(config, deterministic=False)
        roomy = Engine(model(), replace(config, pages=4096))
        functions = dict(plan.functions)
        compiled = roomy.compile(plan.program, None, tuple(functions))
        least = compiled.bounds(roomy, plan.inputs).pages_depth_first
        recorder = Recorder()
        engine = Engine(model(), replace(config, pages=least + (config.pages or 0)), recorder=recorder)
        run = engine.submit(compiled, plan.inputs, seed=seed, functions=functions)
        while run.result is None:
            engine.step()
        recording = recorder.recording()
        assert from_json(to_json(recording)) == recording
        report = verify_recording(recording, sizes=engine.sizes)
        assert report.calls == run.result.counts["steps"]
        assert sum(report.rows.values()) == run.result.counts["rows"]
        assert report.tokens_drawn == run.result.counts["tokens_decoded"]
        kinds.update({type(step).__name__: 1 for step in recording.steps})

    law()
    assert {"Stitch", "Joined", "Shrink", "Round", "Arm", "Cache"} <= kinds.keys(), kinds


def test_a_second_run_starts_from_the_first_ones_pages() -> None:
    """Pages of the prefix cache hold what the run that adopts them would have written."""
    recorder = Recorder()
    engine = Engine(model(), EngineConfig(pages=64, page_size=2), recorder=recorder)
    for word in ("here", "there"):
        engine.run(parse_text(f'main = plan() {{ text("A long way to {word}"); a = gen(max=2); }}'), [{}])
    recording = recorder.recording()
    adopted = next(step for step in recording.steps if isinstance(step, Adopt))
    assert len(adopted.pages) > 1
    assert verify_recording(recording, sizes=engine.sizes).runs == 2
    at = recording.steps.index(adopted)
    swapped = replace(adopted, pages=(adopted.pages[1], adopted.pages[0], *adopted.pages[2:]))
    steps = (*recording.steps[:at], swapped, *recording.steps[at + 1 :])
    assert broken(replace(recording, steps=steps)).rule == "adopt-the-same"


def test_what_engines_preempt_holds() -> None:
    """The same where the pool runs out, and threads are swapped out or lose what they fed."""
    kinds: Counter[str] = Counter()

    @settings(COMMON, max_examples=30)
    @given(pressed())
    def law(case: tuple[EngineConfig, list[Plan], int, int]) -> None:
        engine, _, recorder = run_pressed(*case)
        verify_recording(recorder.recording(), sizes=engine.sizes)
        kinds.update({type(step).__name__: 1 for step in recorder.recording().steps})

    law()
    assert {"SwapOut", "SwapIn", "Lose"} <= kinds.keys(), kinds


def test_the_docs_tell_every_rule() -> None:
    """docs/schedules.md lists the rules, and every step with its fields."""
    page = (Path(__file__).parent.parent / "docs" / "schedules.md").read_text(encoding="utf-8")
    for rule, meaning in RULES.items():
        assert f"| `{rule}` | {meaning} |" in page
    for kind in get_args(Step):
        tag = "".join(f"_{c.lower()}" if c.isupper() else c for c in kind.__name__)[1:]
        line = next(line for line in page.splitlines() if line.startswith("| `") and f"`{tag}`" in line.split("|")[1])
        if kind is not Uncache and kind is not Cache:
            assert line.split("|")[2].strip() == ", ".join(field.name for field in fields(kind)), line
