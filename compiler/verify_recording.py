"""Replay a recorded schedule without a model, and hold every step of it against what a plan means.

The replay shares no code with the scheduler, the engine or the page pool. From the text of each run's plan it compiles
the graph anew; from the control steps it derives, by sections 2 and 3 of the design, each thread's view and position;
from the memory steps what stands in every slot; and so what each row must read, and from which logits a token is drawn.
The rules are in `replay_rules.RULES`.

What is not checked, since it takes values or a model: which arm a condition takes, whether a loop with `until` goes on,
how wide a fork under `upto` is, which branches a vote, a quorum or `best` agrees on, that written ids are the plan's
text, and that drawn ids are what the model and the seed give.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from anabranch.compiler import recording as rec
from anabranch.compiler.bounds import Bounds, steps_bound
from anabranch.compiler.json_values import bad_schedule
from anabranch.compiler.pipeline import Compiled, compile_plan
from anabranch.compiler.recording import Recording, Source, Step
from anabranch.compiler.replay_joins import join
from anabranch.compiler.replay_memory import Memory
from anabranch.compiler.replay_plan import (
    at_end,
    begin_branch,
    begin_round,
    check_cause,
    check_drew,
    check_wrote,
    end_branch,
    enter,
    fork,
    kind_of_text,
    may_draw,
    take_arm,
)
from anabranch.compiler.replay_rules import RULES, Fault, fault
from anabranch.compiler.replay_threads import DRAWN, Thread
from anabranch.compiler.sizes import Sizes
from anabranch.dsl.check import Target
from anabranch.dsl.parse import parse_text

# Steps shown before and after the one that breaks a rule, and characters of each.
_AROUND, _WIDTH = 4, 160
_STATUSES = ("ok", "failed", "truncated", "cancelled", "late")


class ScheduleFault(Exception):
    """A recorded schedule breaks a rule. rule: its name in `RULES`; step_index: of the step that breaks it."""

    def __init__(self, rule: str, step_index: int, message: str, around: str = "") -> None:
        self.rule = rule
        self.step_index = step_index
        self.message = message
        super().__init__(f"rule `{rule}` is broken at step {step_index}: {message}\n({RULES[rule]})\n{around}".rstrip())


@dataclass(frozen=True, slots=True)
class Report:
    """What a recording held. rows: fed, by kind; pages_peak: in use at once; recomputed: rows fed once more."""

    runs: int
    threads: int
    segments: int
    calls: int
    rows: Mapping[str, int]
    tokens_drawn: int
    pages_peak: int
    swaps: int
    recomputed: int


def verify_recording(
    recording: Recording, *, sizes: Sizes | None = None, compiled: Sequence[Compiled] | None = None
) -> Report:
    """Check every rule.

    sizes: how the model makes tokens of text. Without it pages and calls are not held against their bounds, which
        count the tokens of known text
    compiled: what each run's plan compiled to, where the caller has it; else it is compiled from the recorded text
    Raises ScheduleFault for the first rule that is broken, and PlanError if a plan does not compile or does not take
    its recorded inputs.
    """
    if compiled is None:
        known: dict[tuple[str, str, tuple[str, ...]], Compiled] = {}
        compiled = [_compile(source, recording.deterministic, known) for source in recording.runs]
    elif len(compiled) != len(recording.runs):
        raise ValueError(f"{len(compiled)} plans are given for {len(recording.runs)} runs")
    bounds = []
    for plan, source in zip(compiled, recording.runs, strict=True):
        plan.check_inputs(source.inputs, sizes)
        bounds.append(plan.bounds_on(recording.machine, sizes, source.inputs))
    replay = _Replay(recording, compiled)
    at = 0
    try:
        for step in recording.steps:
            replay.step(step)
            at += 1
        replay.end()
        replay.check_bounds(bounds, exact=sizes is not None)
    except Fault as found:
        raise ScheduleFault(found.rule, at, found.message, _around(recording.steps, at)) from None
    return replay.report()


def _compile(source: Source, deterministic: bool, known: dict[tuple[str, str, tuple[str, ...]], Compiled]) -> Compiled:
    key = (source.text, source.plan, source.functions)
    if key not in known:
        try:
            program = parse_text(source.text)
            target = Target("the recording", deterministic=deterministic)
            known[key] = compile_plan(program, source.plan, functions=source.functions, target=target)
        except KeyError:
            raise bad_schedule(f"its text has no plan `{source.plan}`") from None
    return known[key]


def _around(steps: Sequence[Step], index: int) -> str:
    lines = []
    for place in range(max(0, index - _AROUND), min(len(steps), index + _AROUND + 1)):
        text = str(steps[place])
        cut = text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"
        lines.append(f"{'>' if place == index else ' '} {place:>6} {cut}")
    if index >= len(steps):
        lines.append(f"> {index:>6} (the end)")
    return "\n".join(lines)


class _Replay:
    def __init__(self, recording: Recording, compiled: Sequence[Compiled]) -> None:
        self.recording = recording
        self.compiled = compiled
        self.machine = recording.machine
        self.memory = Memory(recording.machine)
        self.threads: list[Thread] = []
        self.roots: dict[int, Thread] = {}
        self.running = self.orphans = self.calls = self.tokens = 0
        self.began_late = False
        self.rows: Counter[str] = Counter()
        self.idle: set[int] = set()
        self.waiting = self.startable = 0
        self.held_back = False
        self.losses = 0

    def step(self, step: Step) -> None:
        match step:
            case rec.Call():
                self._call(step)
            case rec.Token(thread, token):
                self._token(self._acting(thread), token)
            case rec.Page(segment, page):
                self.memory.page(segment, page)
            case rec.Open(segment, thread, start):
                self.memory.open(segment, self._writing(thread), start)
            case rec.Enter(thread, node):
                enter(self._acting(thread), node)
            case rec.Begin():
                self._begin(step)
            case rec.End(thread, status):
                self._end(self._thread(thread), status)
            case rec.Seal(segment):
                self._seal(segment)
            case rec.Free(segment):
                self.memory.free(segment, self.threads[self.memory.segment(segment).holder])
            case rec.Write(thread, ids):
                self._write(self._acting(thread), ids)
            case rec.Trim(thread, count):
                self._trim(self._thread(thread), count)
            case rec.Forked(thread, node, width):
                self._forked(self._acting(thread), node, width)
            case rec.Joined(thread, node, ok, winners, failed):
                self._joined(self._thread(thread), node, ok, winners, failed)
            case rec.Stitch(thread, winners):
                self._stitch(self._thread(thread), winners)
            case rec.Round(thread, node, number):
                begin_round(self._acting(thread), node, number)
            case rec.Arm(thread, node, place):
                take_arm(self._acting(thread), node, place)
            case rec.Shrink(segment, count):
                self.memory.shrink(segment, count)
            case rec.Adopt(segment, thread, ids, pages):
                self.memory.adopt(segment, self._acting(thread), ids, pages)
            case rec.Cache(page):
                self.memory.cache(page)
            case rec.Uncache(page):
                self.memory.uncache(page)
            case rec.SwapOut(segment):
                self.memory.swap_out(segment)
            case rec.SwapIn(segment, pages):
                self.memory.swap_in(segment, pages)
            case rec.Lose(thread):
                self.losses += 1
                self.memory.lose(self._acting(thread))
            case _:
                assert_never(step)

    # --- threads

    def _thread(self, number: int) -> Thread:
        if not 0 <= number < len(self.threads):
            fault("known-names", f"there is no thread {number}")
        return self.threads[number]

    def _acting(self, number: int) -> Thread:
        """A thread that does something: it runs, and waits for nothing."""
        thread = self._thread(number)
        if thread.status is not None:
            fault("over-is-over", f"{thread} ended {thread.status}")
        self._not_waiting(thread)
        return thread

    def _not_waiting(self, thread: Thread) -> None:
        if thread.forked is not None and not thread.forked.closed:
            fault("waits-for-its-branches", f"{thread} waits for its branches of {thread.forked.ref}")
        if thread.stitching:
            fault("stitch-the-winners", f"{thread} has yet to stitch its winners")

    def _writing(self, number: int) -> Thread:
        """A thread that may open a segment: one that acts, or a winner with tokens to feed for its join."""
        thread = self._thread(number)
        return thread if thread.pinned else self._acting(number)

    def _begin(self, step: rec.Begin) -> None:
        if step.thread != len(self.threads):
            fault("known-names", f"thread {step.thread} begins where thread {len(self.threads)} must begin")
        if step.parent is None or step.fork is None:
            thread = self._root(step)
        else:
            parent = self._thread(step.parent)
            if parent.run != step.run:
                fault("known-names", f"thread {step.thread} of run {step.run} is a branch of {parent}, of {parent.run}")
            graph = self.compiled[step.run].graph
            branches = parent.forked
            self.startable -= branches.startable if branches is not None else 0
            thread = begin_branch(graph, step.thread, parent, step.fork, step.index, step.path, step.fresh)
            self.startable += parent.forked.startable if parent.forked is not None else 0
            if not step.fresh:
                self._inherit(thread, parent)
        self.threads.append(thread)
        self.running += 1

    def _root(self, step: rec.Begin) -> Thread:
        if not 0 <= step.run < len(self.compiled) or step.run in self.roots:
            fault("known-names", f"thread {step.thread} begins run {step.run}, which is not there or has begun")
        if step.parent is not None or step.fork is not None or step.index or not step.fresh:
            fault("known-names", f"thread {step.thread} begins run {step.run} and is a branch, or sees something")
        if step.path:
            fault("path-of-the-branch", f"thread {step.thread} begins run {step.run} at {step.path}, not at its root")
        graph = self.compiled[step.run].graph
        plan = graph.plans[graph.main]
        thread = self.roots[step.run] = Thread(step.thread, step.run, (), plan, plan.region)
        self.began_late = self.began_late or self.calls > 0
        return thread

    def _sealed(self, thread: Thread, what: str) -> None:
        if thread.unfed.size or (thread.segment is not None and thread.segment.length):
            fault("reads-its-view", f"{thread} {what} before what it wrote is fed and sealed")

    def _inherit(self, thread: Thread, parent: Thread) -> None:
        self._sealed(parent, "has a branch that begins")
        thread.view, thread.position, thread.logits_at = parent.view, parent.position, parent.logits_at
        parent.watchers += 1

    def _end(self, thread: Thread, status: str) -> None:
        if thread.status is not None or status not in _STATUSES:
            fault("over-is-over", f"{thread} ended {thread.status}, and ends {status}")
        check_cause(thread, status)
        if status == "ok":
            self._acting(thread.number)
            if thread.must_seal:
                fault("flush-then-seal", f"{thread} ends after a flushed token, which nothing sealed")
            if thread.must_go_on:
                fault("kind-of-row", f"the last token of {thread} was fed so that it can go on, and it ends")
            check_drew(thread)
            check_wrote(thread)
            if not at_end(thread):
                fault("ends-at-its-end", f"{thread} ends ok, and its plan goes on")
        elif thread.stitching and status in ("failed", "truncated"):
            fault("stitch-the-winners", f"{thread} ends {status} of itself before it stitches its winners")
        branches = thread.fork
        thread.status, thread.ended_at = status, self.calls
        thread.stitching = ()
        self.running -= 1
        if thread.forked is not None and not thread.forked.closed:
            self.orphans += thread.forked.live
            self.waiting -= 1
            self.startable -= thread.forked.startable
            thread.forked.closed = True
        if branches is not None and thread.parent is not None:
            if branches.closed or thread.parent.status is not None:
                self.orphans -= 1
            thread.pinned = status == "ok" and branches.stitches and not branches.closed
        self.startable -= branches.startable if branches is not None else 0
        end_branch(thread)
        self.startable += branches.startable if branches is not None else 0
        # A thread that has ended sees nothing more once none of its branches does.
        while thread.status is not None and not thread.watchers and not thread.fresh and thread.parent is not None:
            thread = thread.parent
            thread.watchers -= 1

    def _forked(self, thread: Thread, node: tuple[str, int], width: int) -> None:
        fork(thread, node, width)
        branches = thread.forked
        if branches is not None and width and not branches.all_fresh:
            self._sealed(thread, "forks")
        self.waiting += 1
        self.startable += branches.startable if branches is not None else 0

    def _joined(
        self, thread: Thread, node: tuple[str, int], ok: tuple[int, ...], winners: tuple[int, ...], failed: bool
    ) -> None:
        if thread.status is not None:
            fault("over-is-over", f"{thread} ended {thread.status}, and reads a join")
        before = thread.forked.startable if thread.forked is not None else 0
        join(thread, node, ok, winners, failed, self.recording.deterministic)
        self.waiting -= 1
        self.startable -= before
        self.orphans += thread.forked.live if thread.forked is not None else 0

    def _stitch(self, thread: Thread, winners: tuple[int, ...]) -> None:
        expected = tuple(winner.number for winner in thread.stitching)
        if thread.status is not None or thread.forked is None or not expected or winners != expected:
            fault("stitch-the-winners", f"{thread} stitches threads {winners}, and its winners are {expected}")
        self.memory.stitch(thread, thread.stitching, thread.forked.join.positions)
        thread.stitching = ()

    # --- tokens

    def _write(self, thread: Thread, ids: tuple[int, ...]) -> None:
        if thread.expects:
            fault("in-order", f"{thread} writes where {thread.expects} must come")
        if not ids or min(ids) < 0:
            fault("known-names", f"{thread} writes {ids}, which are no tokens")
        thread.unfed.push(kind_of_text(thread), ids)
        thread.wrote = True
        thread.must_go_on = False
        thread.position += len(ids)

    def _token(self, thread: Thread, token: int) -> None:
        if thread.lost:
            fault("lost-is-fed-again", f"{thread} draws, and has yet to feed {thread.lost} lost tokens again")
        if token < 0:
            fault("known-names", f"{thread} draws {token}, which is no token")
        if may_draw(thread) < 1:
            site = f"`{thread.node.site}`" if thread.node is not None else "its start"
            fault("draws-of-the-gen", f"{thread} draws a token at {site} after {thread.drawn} others")
        if thread.seat != self.calls or thread.drew == self.calls:
            why = "draws twice" if thread.drew == self.calls else "has no seat"
            fault("draw-has-a-seat", f"{thread} {why} in the last call")
        if thread.must_seal:
            fault("flush-then-seal", f"{thread} draws on after a flushed token")
        if thread.unfed.size or thread.logits_at != thread.position:
            fault("logits-at-hand", f"{thread} draws, and the logits of its last token are not at hand")
        thread.drew = self.calls
        thread.must_go_on = False
        self.idle.discard(thread.number)
        thread.drawn += 1
        thread.decoded += 1
        thread.rank += 1
        thread.path_tokens += 1
        self.tokens += 1
        thread.unfed.push(DRAWN, (token,))
        thread.position += 1

    def _trim(self, thread: Thread, count: int) -> None:
        if thread.status is not None:
            # What nobody will feed may be forgotten.
            if thread.pinned or count > thread.unfed.size:
                fault("over-is-over", f"{thread} ended {thread.status}, and takes back {count} tokens")
        else:
            self._not_waiting(thread)
        self.memory.trim(thread, count)

    def _seal(self, number: int) -> None:
        segment = self.memory.segment(number)
        thread = self.threads[segment.holder]
        if thread.status is None:
            self._not_waiting(thread)
        self.memory.seal(number, thread)

    # --- calls

    def _call(self, call: rec.Call) -> None:
        self._check_idle()
        self.calls += 1
        if self.orphans:
            fault("losers-stop", f"{self.orphans} branches run on after their join was read, or their parent ended")
        if not call.seats:
            fault("seats-work", "a call of the model seats nobody")
        if len(call.seats) > self.machine.lanes:
            fault("lanes", f"a call seats {len(call.seats)} threads, and there are {self.machine.lanes} lanes")
        for number in call.seats:
            thread = self._thread(number)
            if thread.status is not None or (thread.forked is not None and not thread.forked.closed):
                fault("lanes", f"{thread} holds a seat, and {'ended' if thread.status else 'waits for its branches'}")
            if thread.seat == self.calls:
                fault("lanes", f"{thread} holds two seats")
            thread.seat = self.calls
        self.idle = set(call.seats)
        fed: set[int] = set()
        rows = 0
        for block in call.blocks:
            thread = self._feeding(block.thread)
            if block.thread in fed:
                fault("lanes", f"{thread} feeds two blocks in a call")
            fed.add(block.thread)
            self.memory.feed(thread, block.segment, block.first, block.position, block.kinds, block.reads)
            for kind, count in block.kinds:
                self.rows[kind] += count
                rows += count if kind in ("prefill", "reprefill", "recompute") else 0
        is_full = len(call.seats) == self.machine.lanes or rows >= self.machine.chunk
        if not is_full and (self.startable or self.running - self.waiting > len(call.seats)):
            self.held_back = True
        if rows > self.machine.chunk:
            fault("chunk", f"a call feeds {rows} rows beside sampled tokens, and the chunk is {self.machine.chunk}")

    def _feeding(self, number: int) -> Thread:
        """A thread that feeds rows: it holds a seat, or is a winner whose parent holds one for its join."""
        thread = self._thread(number)
        if thread.status is None:
            self._not_waiting(thread)
            if thread.seat != self.calls:
                fault("lanes", f"{thread} feeds rows without a seat")
            self.idle.discard(number)
            return thread
        parent = thread.parent
        # Once the join is read, it is the winners that are pinned.
        if not thread.pinned or parent is None or not parent.stitching:
            fault("over-is-over", f"{thread} ended {thread.status}, and feeds rows")
        if parent.seat != self.calls:
            fault("lanes", f"{thread} feeds rows for its join, and {parent} holds no seat")
        self.idle.discard(parent.number)
        return thread

    def _check_idle(self) -> None:
        # A thread may be stopped instead: cancelled, or failed since no token fits the type of its gen.
        idle = [
            number
            for number in self.idle
            if self.threads[number].status in (None, "ok") or may_draw(self.threads[number]) < 1
        ]
        if idle:
            fault("seats-work", f"thread {min(idle)} held a seat in the call before, and did nothing with it")

    # --- the end

    def end(self) -> None:
        self._check_idle()
        if len(self.roots) != len(self.compiled):
            fault("all-over", f"{len(self.compiled) - len(self.roots)} runs have not begun")
        if self.running:
            left = [thread.number for thread in self.threads if thread.status is None]
            fault("all-over", f"threads {left[:8]} have not ended")
        if self.memory.num_open:
            left = [segment.number for segment in self.memory.segments if not segment.freed]
            fault("all-freed", f"segments {left[:8]} are not freed")

    def check_bounds(self, bounds: Sequence[Bounds], *, exact: bool) -> None:
        """exact: the bounds count the model's tokens, so pages and calls are held against them too."""
        for run, bound in enumerate(bounds):
            root = self.roots[run]
            self._within(f"tokens drawn in run {run}", root.decoded, bound.total_tokens)
            self._within(f"tokens on the critical path of run {run}", root.path_tokens, bound.critical_path_tokens)
        if not exact:
            return
        widest = sum(bound.pages_full_width for bound in bounds)
        self._within("pages", self.memory.peak, min(widest, self.machine.pages))
        if self.held_back or self.memory.swaps or self.losses or widest > self.machine.pages:
            return
        if self.began_late:
            most = sum(bound.steps_bound(self.machine) for bound in bounds)
        else:
            most = steps_bound(bounds, self.machine)
        self._within("calls", self.calls, most)

    def _within(self, what: str, count: int, most: int) -> None:
        if count > most:
            fault("within-bounds", f"{count} {what}, and there can be {most}")

    def report(self) -> Report:
        return Report(
            runs=len(self.roots),
            threads=len(self.threads),
            segments=len(self.memory.segments),
            calls=self.calls,
            rows=dict(self.rows),
            tokens_drawn=self.tokens,
            pages_peak=self.memory.peak,
            swaps=self.memory.swaps,
            recomputed=self.memory.recomputed,
        )
