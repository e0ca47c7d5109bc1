"""Preemption: threads that started on expected need give their pages up, and nobody can tell from what they write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law_runs import COMMON, hold_against_reference, model
from test_laws import drawn

from anabranch.compiler.recording import Lose, SwapIn, SwapOut
from anabranch.compiler.scheduler import Child, Machine, Need, Policy, Scheduler
from anabranch.runtime.engine import Engine, EngineConfig, RunResult
from anabranch.runtime.pages import Segment
from anabranch.runtime.recorder import Recorder
from anabranch.testing import Outcome, Plan, Trace, simulate

PLAN = """
main = plan(n: int) {
  text("Go on and on");
  x = fork(n, upto=7) {
    a = gen(max=LONG);
    INNER
    b = gen("so", type=int, max=5);
    c = gen(type=choice("a", "the", by="logprob"), max=4);
    return(b);
  } join(all(min=1), CONTEXT);
  z = gen(" then", max=3);
}
"""
INNER = 'd = fork(2) { e = gen("k", max=4); } join(all, JOIN);'
LEFT = 'main = plan() { text("Beside"); a = gen(max=12); b = fork(2) { c = gen(max=5); }; }'


class Bold(Policy):
    """Lets everything start, so that much must be taken back."""

    def expects(self, need: Need) -> int:
        return 1


def run(config: EngineConfig, plans: Sequence[Plan], more: int, seed: int) -> tuple[Engine, list[RunResult], Recorder]:
    """Run the plans in one batch, in a pool of what the largest needs depth first and `more` pages."""
    roomy = Engine(model(), replace(config, pages=4096))
    least = max(roomy.compile(case.program).bounds(roomy, case.inputs).pages_depth_first for case in plans)
    recorder = Recorder()
    engine = Engine(model(), replace(config, pages=least + more), policy=Bold(), recorder=recorder)
    runs = [engine.submit(case.program, case.inputs, seed=seed) for case in plans]
    while any(run.result is None for run in runs):
        engine.step()
        assert engine.pool.used <= least + more
    assert engine.pool.used == engine.pool.idle
    assert engine.scheduler.reserved == 0
    assert engine.scheduler.idle
    return engine, [run.result for run in runs if run.result is not None], recorder


@st.composite
def pressed(draw: st.DrawFn) -> tuple[EngineConfig, list[Plan], int, int]:
    """An engine, plans, pages beyond the least, and a seed: so that pages often run out."""
    contexts = st.sampled_from(["drop", "drop", "text", "stitch"])
    text = PLAN.replace("LONG", str(draw(st.sampled_from([14, 8])))).replace("CONTEXT", draw(contexts))
    text = text.replace("INNER", draw(st.sampled_from(["", INNER]))).replace("JOIN", draw(contexts))
    plans = [Plan.parse(text, {"n": draw(st.integers(3, 6))})]
    plans += [Plan.parse(LEFT)] * draw(st.integers(0, 1))
    config = EngineConfig(
        lanes=draw(st.sampled_from([8, 5])),
        page_size=draw(st.sampled_from([1, 3])),
        chunk=draw(st.sampled_from([64, 5, 1])),
        trace_logits=True,
        prefix_cache=draw(st.booleans()),
        preempt=draw(st.sampled_from(["swap", "recompute"])),
    )
    return config, plans, draw(st.integers(0, 6)), draw(st.integers(0, 2**32))


def test_what_is_preempted_goes_on_as_if_nothing_had_been() -> None:
    """Each logit is the reference's, and each token that of an engine that preempts nobody."""
    held: Counter[str] = Counter()

    @settings(COMMON, max_examples=50)
    @given(pressed())
    def law(drawn_case: tuple[EngineConfig, list[Plan], int, int]) -> None:
        config, plans, more, seed = drawn_case
        engine, results, recorder = run(config, plans, more, seed)
        _, calm, _ = run(replace(config, preempt="never"), plans, 4096, seed)
        for case, result, other in zip(plans, results, calm, strict=True):
            hold_against_reference(case, result)
            assert drawn(result) == drawn(other)
        steps = recorder.recording().steps
        held.update(
            plans=1,
            preempted=engine.num_preempted > 0,
            out=sum(isinstance(step, SwapOut) for step in steps),
            back=sum(isinstance(step, SwapIn) for step in steps),
            lost=sum(isinstance(step, Lose) for step in steps),
            recomputed=sum(result.counts["tokens_recomputed"] > 0 for result in results),
        )

    law()
    print(f"{dict(held)}")  # shown with `pytest -s`
    assert held["preempted"] >= 0.20 * held["plans"], held
    assert held["out"] == held["back"] > 0, held
    assert held["lost"] > 0 and held["recomputed"] > 0, held


def test_a_swap_brings_the_same_bits_back() -> None:
    """Keys and values come back from host memory bit for bit, into other pages."""
    engine = Engine(model(), EngineConfig(pages=64, page_size=4))
    segment = Segment(engine.pool, 0)
    segment.append(range(10))
    generator = torch.Generator().manual_seed(0)
    slots = torch.cat([torch.arange(a, b) for a, b in segment.runs()])
    for store in (*engine.store.k, *engine.store.v):
        store[:, slots] = torch.randn(store.shape[0], 10, store.shape[2], generator=generator, dtype=store.dtype)
    before = [store[:, slots].clone() for store in (*engine.store.k, *engine.store.v)]
    pages = list(segment.pages)
    segment.swap_out(engine.store)
    assert engine.pool.used == 0
    other = Segment(engine.pool, 0)
    other.append(range(4))
    segment.swap_in(engine.store)
    assert segment.pages != pages
    slots = torch.cat([torch.arange(a, b) for a, b in segment.runs()])
    after = [store[:, slots] for store in (*engine.store.k, *engine.store.v)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_guests_fill_lanes_that_reservations_leave_empty() -> None:
    """In a pool of the least size, a fork takes far fewer calls than where everything is reserved."""
    case = Plan.parse(PLAN.replace("LONG", "24").replace("INNER", "").replace("CONTEXT", "drop"), {"n": 7})
    config = EngineConfig(lanes=8, page_size=4)
    calm, bold = (run(replace(config, preempt=mode), [case], 20, 1)[1][0] for mode in ("never", "swap"))
    assert bold.counts["steps"] < 0.8 * calm.counts["steps"]
    assert bold.value == calm.value


def test_an_earlier_plan_is_not_overtaken_for_ever() -> None:
    """Guests of later plans get no reservation before a plan that waits for the whole pool."""
    scheduler = Scheduler(Machine(lanes=4, pages=10), room=lambda: 10)
    first = scheduler.open(Child(Need(8)))
    large = scheduler.open(Child(Need(10)))
    small = scheduler.open(Child(Need(2)))
    assert scheduler.start() == [first, large, small]
    assert not first.guest and large.guest and small.guest
    scheduler.preempt(large, feed=0)
    assert not scheduler.promote(small)  # two pages are free, and they are not for it
    scheduler.end(first)
    assert scheduler.start() == [large]
    assert large.charge == 10
    scheduler.end(large)
    assert scheduler.start() == [small]
    assert not small.guest


def test_only_guests_are_preempted() -> None:
    """What is reserved cannot be taken, and a pool that runs out without guests is a fault."""
    scheduler = Scheduler(Machine(lanes=4, pages=10), room=lambda: 10)
    root = scheduler.open(Child(Need(8)))
    scheduler.start()
    with pytest.raises(ValueError, match="only a guest"):
        scheduler.preempt(root, feed=0)
    with pytest.raises(RuntimeError, match="ran out"):
        scheduler.victim()


def test_a_guest_holds_nothing_but_what_can_be_taken() -> None:
    """Several runs of one plan in a small pool: who has no reservation adopts no pages of the prefix cache."""
    plan = Plan.parse('main = plan() { text("hello there"); a = gen(max=3); x = fork(2) { b = gen(max=2); }; }')
    for pages in range(13, 20):
        simulation = simulate([plan] * 3, Machine(8, pages, 1, 64), Trace((Outcome(30),)))
        simulation.verify()
        assert [result.status for result in simulation.results] == ["ok"] * 3


FRESH = 'main = plan() { text("hello"); a = gen(max=9); x = fork(2, fresh=true) { b = gen("k", max=2); }; }'


@pytest.mark.parametrize("preempt", ["swap", "recompute"])
def test_what_lost_its_pages_may_be_cancelled_or_fork_afresh(preempt: str) -> None:
    """A run is cancelled while its keys are in host memory; a thread that lost its tokens forks from an empty view."""
    plans = [Plan.parse(FRESH)] * 3
    preempted = 0
    for pages in range(21, 33):
        for cancel_at in (None, 6, 12, 18):
            traces = [Trace((Outcome(30),), cancel_at=cancel_at if place else None) for place in range(3)]
            simulation = simulate(plans, Machine(8, pages, 1, 64), traces, policy=Bold(), preempt=preempt)
            simulation.verify()
            preempted += simulation.num_preempted
    assert preempted > 0
