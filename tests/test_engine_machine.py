"""The engine as a state machine: whatever is done to it, and in whatever order, its pages and lanes add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from law_runs import COMMON, hold_against_reference, model

from anabranch.compiler.recording import Lose, Step, SwapIn, SwapOut
from anabranch.compiler.scheduler import Need, Policy
from anabranch.compiler.verify_recording import verify_recording
from anabranch.dsl.diagnostics import PlanError
from anabranch.dsl.parse import parse_text
from anabranch.runtime.context import Context
from anabranch.runtime.engine import Engine, EngineConfig, Run
from anabranch.runtime.pages import Segment, View
from anabranch.runtime.recorder import Recorder
from anabranch.runtime.replay import LogEntry, Replay
from anabranch.testing import Plan, plans

LONG = """
main = plan(n: int) {
  text("Go on");
  x = fork(n, upto=4, limit=3) { a = gen(max=9); b = gen("so", type=int, max=4); return(b); } join(all(min=1), drop);
  y = fork(2) { c = gen("k", max=7); } join(all, stitch(sum));
  z = gen(" then", max=5);
}
"""
LATE = """
main = plan(n: int) {
  text("Hurry");
  x = fork(n, upto=4, deadline="1s", fallback=["late"]) { a = gen(max=12); return("in time"); };
  y = gen("k", max=3);
}
"""
BREAKS = """
main = plan(n: int) {
  text("Try");
  x = fork(n, upto=4, retry=1, fallback=[0]) { a = gen(max=5); b = breaks(); need(b > 0); return(b); }
    join(all, stitch);
  y = gen("k", max=3);
}
"""
TEMPLATES = {name: parse_text(text) for name, text in (("long", LONG), ("late", LATE), ("breaks", BREAKS))}
seen: Counter[str] = Counter()


class Bold(Policy):
    """Lets everything start, so that pages run out."""

    def expects(self, need: Need) -> int:
        return 1


class Engines(RuleBasedStateMachine):
    """Runs come, step, break, are late, are cancelled and preempted; at the end every page is back."""

    runs = Bundle("runs")
    preempt_mode: Literal["swap", "recompute", "never"] = "swap"

    @initialize(
        lanes=st.sampled_from([8, 5, 3, 1]),
        spare=st.integers(0, 5),
        page_size=st.sampled_from([1, 2, 4]),
        chunk=st.sampled_from([1, 4, 32]),
        deterministic=st.booleans(),
    )
    def begin(self, lanes: int, spare: int, page_size: int, chunk: int, deterministic: bool) -> None:
        self.config = EngineConfig(
            lanes=lanes,
            # A little more than what the first of the templates needs depth first.
            pages=28 // page_size + 4 + spare,
            page_size=page_size,
            chunk=chunk,
            preempt=self.preempt_mode,
            deterministic=deterministic,
            trace_logits=True,
        )
        self.now = 0.0
        self.breaks = False
        self.cases: dict[Run, Plan] = {}
        self.logs: dict[Run, list[LogEntry]] = {}
        # What a run goes on as, after the process was killed.
        self.later: dict[Run, Run] = {}
        self.recorder: Recorder | None = Recorder()
        self.engine = self.new_engine()

    def new_engine(self) -> Engine:
        engine = Engine(model(), self.config, policy=Bold(), recorder=self.recorder)
        engine.clock = lambda: self.now
        engine.sleep = self.pass_time
        return engine

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def host(self) -> int:
        if self.breaks:
            raise OSError("it broke")
        return 1

    @rule(target=runs, name=st.sampled_from(sorted(TEMPLATES)), n=st.integers(0, 4), seed=st.integers(0, 99))
    def submit(self, name: str, n: int, seed: int) -> object:
        return self.queue(Plan(TEMPLATES[name], {"n": n}), seed)

    @rule(target=runs, n=st.integers(3, 4), times=st.integers(6, 30), seed=st.integers(0, 99))
    def submit_long(self, n: int, times: int, seed: int) -> object:
        run = self.queue(Plan(TEMPLATES["long"], {"n": n}), seed)
        self.step(times)
        return run

    @rule(target=runs, n=st.integers(2, 4), times=st.integers(2, 9), seed=st.integers(0, 99))
    def submit_late(self, n: int, times: int, seed: int) -> object:
        run = self.queue(Plan(TEMPLATES["late"], {"n": n}), seed)
        self.step(times)
        self.time_passes()
        return run

    @rule(target=runs, n=st.integers(1, 4), times=st.integers(2, 9), seed=st.integers(0, 99))
    def submit_breaking(self, n: int, times: int, seed: int) -> object:
        run = self.queue(Plan(TEMPLATES["breaks"], {"n": n}), seed)
        self.breaks = True
        self.step(times)
        return run

    @rule(target=runs, case=plans(fuel=25, max_depth=2), seed=st.integers(0, 99))
    def submit_any(self, case: Plan, seed: int) -> object:
        return self.queue(case, seed)

    def queue(self, case: Plan, seed: int) -> object:
        if len(self.cases) > 4:
            return multiple()
        log: list[LogEntry] = []
        try:
            run = self.put_in(case, seed, log)
        except PlanError as error:
            # The one thing that may be wrong with them: the pool is too small, or deadlines are refused.
            assert {d.code for d in error.diagnostics} <= {"pool-too-small", "wall-clock"}, error
            seen["refused"] += 1
            return multiple()
        self.cases[run], self.logs[run] = case, log
        return run

    def put_in(self, case: Plan, seed: int, log: list[LogEntry], replay: Replay | None = None) -> Run:
        functions = {"breaks": self.host, **case.functions}
        return self.engine.submit(
            case.program, case.inputs, seed=seed, functions=functions, log=log.append, replay=replay
        )

    @rule(times=st.sampled_from([12, 4, 1]))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()

    @precondition(lambda self: len(self.cases) > 3)
    @rule(run=consumes(runs))
    def cancel(self, run: Run) -> None:
        while run in self.later:
            run = self.later[run]
        seen["cancelled"] += run.result is None
        self.engine.cancel(run)
        assert run.result is not None

    @rule()
    def time_passes(self) -> None:
        self.now += 2

    @rule(breaks=st.booleans())
    def branches_break(self, breaks: bool) -> None:
        self.breaks = breaks

    @precondition(lambda self: self.engine.scheduler.guests)
    @rule()
    def preempt(self) -> None:
        """Take the pages of a guest, as if they had run out."""
        if self.engine.scheduler.guests:
            seen["guests"] += 1
            self.engine._preempt(self.engine.scheduler.victim())

    @invariant()
    def pages_add_up(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine, pool = self.engine, self.engine.pool
        assert len(engine.scheduler.seated) <= engine.machine.lanes
        assert engine.scheduler.reserved <= engine.machine.pages
        segments: Counter[Segment] = Counter()
        views: Counter[View] = Counter()
        for context in self.contexts():
            if context.segment is not None:
                segments[context.segment] += 1
            if context.view is not None:
                views[context.view] += 1
        links: dict[View, None] = {}
        waiting = list(views)
        while waiting:
            link = waiting.pop()
            if link in links:
                continue
            links[link] = None
            if link.parent is not None:
                views[link.parent] += 1
                waiting.append(link.parent)
            for entry in link.entries:
                segments[entry.segment] += 1
        for link in links:
            assert link.ref_count == views[link]
        pages = [int(cached) for cached in pool._cached]
        for segment, count in segments.items():
            assert segment.ref_count == count
            assert (segment.swapped is not None and not segment.pages) or (
                len(segment.pages) == -(-segment.length // pool.page_size)
            )
            for page in segment.pages:
                pages[page] += 1
        assert pages == pool.ref_count
        assert pool.used == sum(count > 0 for count in pages)

    def contexts(self) -> Iterator[Context]:
        """Of the threads that run, and of branches that wait for their join to be read."""
        for task in self.engine._tasks.values():
            yield task.context
            if task.joining is not None:
                yield from (branch.context for branch in task.joining.finished.values())

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.engine.step():
            self.now += 0.125
        engine = self.engine
        assert all(run.result is not None for run in self.cases)
        assert engine.pool.used == engine.pool.idle
        assert engine.scheduler.reserved == 0 and engine.scheduler.idle
        steps: Sequence[Step] = ()
        if self.recorder is not None:
            recording = self.recorder.recording()
            verify_recording(recording)
            steps = recording.steps
        for run, case in self.cases.items():
            assert run.result is not None
            hold_against_reference(case, run.result)
            seen[run.result.status] += 1
            seen["branches that broke"] += any("it broke" in b.reason for b in run.result.branches)
            seen["late"] += any(b.status == "late" for b in run.result.branches)
        seen["several at once"] += len(self.cases) > 1
        seen["swapped"] += sum(isinstance(s, SwapOut | SwapIn) for s in steps)
        seen["lost"] += sum(isinstance(s, Lose) for s in steps)


class Recomputing(Engines):
    """The same, with tokens that are computed again."""

    preempt_mode = "recompute"


class Reserving(Engines):
    """The same, with every worst case reserved."""

    preempt_mode = "never"


class Resuming(Engines):
    """The same, in processes that are killed again and again: others go on from what was logged."""

    @precondition(lambda self: any(run.result is None for run in self.cases))
    @rule()
    def stop_and_resume(self) -> None:
        self.recorder = None  # what goes on was in part done before, and is not in a recording
        self.engine = self.new_engine()
        for run in [run for run in self.cases if run.result is None]:
            case, log = self.cases.pop(run), self.logs.pop(run)
            again = self.put_in(case, run.seed, log, Replay(tuple(log)))
            self.cases[again], self.logs[again], self.later[run] = case, log, again
            seen["resumed"] += 1
            seen["resumed late"] += len(log) > 3


SETTINGS = settings(COMMON, stateful_step_count=24)


@pytest.mark.parametrize(("machine", "examples"), [(Engines, 40), (Recomputing, 40), (Reserving, 10), (Resuming, 30)])
def test_runs_come_and_go(machine: type[Engines], examples: int) -> None:
    """At the end of every sequence, each run is what the reference says and the recording is verified."""
    run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=examples))


def test_everything_came_to_pass() -> None:
    """The sequences did hold what they are there for. Runs after the machine, in this file's order."""
    wanted = (
        "refused",
        "cancelled",
        "ok",
        "branches that broke",
        "late",
        "several at once",
        "swapped",
        "lost",
        "resumed late",
    )
    assert all(seen[what] for what in wanted), seen
