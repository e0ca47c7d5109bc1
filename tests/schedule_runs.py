"""Generated plans through the scheduler, in the engine on a scripted model, and through the verifier.

`ANABRANCH_SCHEDULES` sets how many plans, in all; `SHARDS` files share them, each with plans of its own.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, seed, settings
from hypothesis import strategies as st
from law_runs import COMMON

from anabranch.compiler.recording import Begin, End, Recording, Stitch, SwapOut
from anabranch.compiler.scheduler import Need, Thread, Waiting
from anabranch.testing import Outcome, Plan, Policy, Simulation, least_pages, machines, plans, simulate, traces
from anabranch.testing._adversarial import hungry_plans

SHARDS = 4
SCHEDULES = int(os.environ.get("ANABRANCH_SCHEDULES", "20000"))


class Bold(Policy):
    """Lets everything start on a single page, so that much must be taken back."""

    def expects(self, need: Need) -> int:
        return 1


class Shuffled(Bold):
    """Gives lanes, and takes pages, in an order that has nothing to do with what is sensible."""

    def rank(self, waiting: Waiting) -> tuple[int, ...]:
        return (zlib.crc32(b"%d %d %d" % (waiting.plan, waiting.index, waiting.order)),)

    def victim(self, guests: Sequence[Thread]) -> Thread:
        return guests[len(guests) // 2]


@st.composite
def simulations(draw: st.DrawFn, drawn: st.SearchStrategy[Plan]) -> Simulation:
    """One or two plans together, on any machine that can hold each, under any policy and way to preempt."""
    pressed = draw(st.integers(0, 7)) == 7
    batch = draw(st.lists(hungry_plans() if pressed else drawn, min_size=1, max_size=2))
    if draw(st.integers(0, 5)) == 5:
        # Several runs of one plan: the later ones begin from what the prefix cache kept of the first.
        batch = batch[:1] * draw(st.integers(3, 5))
    scripts = [draw(traces()) for _ in batch]
    machine = draw(machines(*batch, least=draw(st.sampled_from([None, True]))))
    policy = draw(st.sampled_from([None, Bold(), Shuffled()]))
    preempt = draw(st.sampled_from(["swap", "recompute", "never"]))
    if pressed:
        # Whatever may be written is, on pages of one token, a few more than the least, and everybody may start: so
        # pages run out.
        scripts = [replace(script, outcomes=(Outcome(16),)) for script in scripts]
        small = replace(machine, lanes=8, page_size=1)
        pages = max(least_pages(plan, small) for plan in batch) + draw(st.integers(1, 8))
        machine, policy = replace(small, pages=pages), policy or Bold()
    return simulate(
        batch,
        machine,
        scripts,
        policy=policy,
        deterministic=draw(st.booleans()) and not any(plan.has_deadline for plan in batch),
        preempt=preempt,
        prefix_cache=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )


def traits(recording: Recording) -> list[set[str]]:
    """What came to pass in each run."""
    found: list[set[str]] = [set() for _ in recording.runs]
    run_of: list[int] = []
    for step in recording.steps:
        match step:
            case Begin(run=run, path=path):
                run_of.append(run)
                if sum("[" in part and not part.startswith("loop") for part in path) > 1:
                    found[run].add("nested forks")
            case Stitch(thread=thread, winners=winners) if len(winners) > 1:
                found[run_of[thread]].add("a stitch of several branches")
            case End(thread=thread, status=status) if status != "ok":
                found[run_of[thread]].add("a failure or a cancellation")
            case _:
                pass
    return found


def hold_schedule(simulation: Simulation) -> None:
    """The run ended, in no more steps than it had work, and the verifier finds no fault in what it did.

    Raises ScheduleFault.
    """
    simulation.verify()
    work = sum(result.counts["rows"] + result.counts["tokens_decoded"] for result in simulation.results)
    assert simulation.num_steps <= work
    for result in simulation.results:
        assert result.counts["pages_peak"] <= result.counts["pages_bound"]
        assert simulation.has_waited or result.counts["steps"] <= result.counts["steps_bound"]


def hold_schedules(shard: int) -> None:
    """Every plan of this shard ends, in any pool that holds it depth first, and breaks no rule on the way."""
    held: Counter[str] = Counter()
    different: set[int] = set()
    wanted = SCHEDULES // SHARDS

    @seed(shard)
    @settings(COMMON, max_examples=wanted * 4 // 5)
    @given(simulations(plans()))
    def law(simulation: Simulation) -> None:
        hold_schedule(simulation)
        held["plans"] += len(simulation.plans)
        different.update(hash((run.text, repr(run.inputs))) for run in simulation.recording.runs)
        held["preempted"] += simulation.num_preempted > 0
        held["swapped"] += any(isinstance(step, SwapOut) for step in simulation.recording.steps)
        for found in traits(simulation.recording):
            held.update(found)

    law()
    held["different plans"] = len(different)
    print(f"{dict(held)}")  # shown with `pytest -s`
    assert held["plans"] >= wanted, held
    assert held["a stitch of several branches"] >= 0.30 * held["plans"], held
    assert held["nested forks"] >= 0.30 * held["plans"], held
    assert held["a failure or a cancellation"] >= 0.20 * held["plans"], held
    assert held["preempted"] >= 0.005 * held["plans"], held
    assert held["swapped"] > 0, held
    assert held["different plans"] >= 0.35 * held["plans"], held
