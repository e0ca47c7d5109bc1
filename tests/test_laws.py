"""The two laws of a run, on generated plans over the random test model in fp64.

1. Aliasing is invisible: forced to the engine's own tokens, the reference gives the engine's logits.
2. Randomness is local: a branch's tokens depend on (seed, input index, path, index) and what it sees, and nothing else.

`ANABRANCH_EXAMPLES` sets how many plans the first law is tried on (the others follow in proportion).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TypeAlias

import pytest
import strategies
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Case, cases
from torch import Tensor

from anabranch.dsl.check import check
from anabranch.dsl.parse import parse_text
from anabranch.dsl.printer import print_plan
from anabranch.runtime.engine import Engine, EngineConfig, RunResult
from anabranch.runtime.events import BranchEnded, BranchStarted, Event, GenEnded, Path, RunEnded
from anabranch.runtime.layout import Layout
from anabranch.runtime.models import LoadedModel, load
from anabranch.runtime.random_model import random_weights
from anabranch.runtime.reference import ReferenceMismatch, Report, check_run

EXAMPLES = int(os.environ.get("ANABRANCH_EXAMPLES", "300"))
TOLERANCE = 1e-9

# The same plans on every machine and in every run: a count of them means something.
COMMON = settings(
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@cache
def model() -> LoadedModel:
    torch.set_num_threads(1)
    return load("random", dtype=torch.float64)


@cache
def weights() -> Mapping[str, Tensor]:
    found = model()
    return {k: v.double() for k, v in random_weights(found.decoder.config, found.tokenizer, 0).items()}


def hold_against_reference(case: Case, result: RunResult) -> Report:
    """Raises ReferenceMismatch."""
    return check_run(
        case.program,
        None,
        case.inputs,
        result.events,
        model().tokenizer,
        model().chat,
        model().decoder.config,
        weights(),
        result.logits,
        tolerance=TOLERANCE,
    )


ROOMY = EngineConfig(lanes=8, pages=512, page_size=16, chunk=64, trace_logits=True)


@st.composite
def engines(draw: st.DrawFn) -> EngineConfig:
    """Engines of every shape. `pages` counts those beyond the least that a plan needs; `run` adds that."""
    return EngineConfig(
        lanes=draw(st.sampled_from([8, 3, 2, 1])),
        pages=draw(st.sampled_from([400, 8, 1, 0])),
        page_size=draw(st.sampled_from([16, 5, 2, 1])),
        chunk=draw(st.sampled_from([64, 16, 3, 1])),
        deterministic=draw(st.booleans()),
        prefix_cache=draw(st.booleans()),
        trace_logits=True,
    )


def run(config: EngineConfig, plans: Sequence[Case], *, seed: int) -> list[RunResult]:
    """Run the plans in one batch. The pool holds the least that the largest of them needs, and `config.pages` more."""
    roomy = Engine(model(), replace(config, pages=4096))
    least = max(roomy.compile(case.program).bounds(roomy, case.inputs).pages_depth_first for case in plans)
    engine = Engine(model(), replace(config, pages=least + (config.pages or 0)))
    runs = [engine.submit(case.program, case.inputs, seed=seed) for case in plans]
    while any(run.result is None for run in runs):
        engine.step()
    return [run.result for run in runs if run.result is not None]


def traits(layout: Layout, events: Sequence[Event]) -> set[str]:
    """What came to pass in a run."""
    found = set()
    threads = {event.path for event in events if isinstance(event, BranchStarted) and event.path}
    if any(inner[: len(outer)] == outer for outer in threads for inner in threads if inner != outer):
        found.add("nested forks")
    for segment in layout.segments:
        seen = {layout.segments[other].path for other, _ in segment.view}
        if any(a[: len(b)] != b and b[: len(a)] != a for a in seen for b in seen):
            found.add("a stitch of several branches")
    if any(isinstance(event, BranchEnded) and event.status != "ok" for event in events):
        found.add("a failure or a cancellation")
    return found


def test_the_plans_are_valid_and_varied() -> None:
    """Every generated plan passes the checker and reads back as printed; enough of them hold what is hard."""
    held: Counter[str] = Counter()

    @settings(COMMON, max_examples=EXAMPLES)
    @given(cases())
    def look(case: Case) -> None:
        check(case.program, start_token=True)
        assert parse_text(print_plan(case.program)) == case.program
        found = strategies.classify(case.program)
        held.update(plans=1, stitch=found.stitches_several, nested=found.nests_forks, fail=found.may_fail)

    look()
    assert held["stitch"] >= 0.30 * held["plans"], held
    assert held["nested"] >= 0.30 * held["plans"], held
    assert held["fail"] >= 0.20 * held["plans"], held


def test_aliasing_is_invisible() -> None:
    """Law 1, for any page size, lanes, chunk and pool, with another plan in the batch or without."""
    held: Counter[str] = Counter()

    @settings(COMMON, max_examples=EXAMPLES)
    @given(cases(), engines(), st.lists(cases(fuel=30, max_depth=1), max_size=1), st.integers(0, 2**32))
    def law(case: Case, config: EngineConfig, others: list[Case], seed: int) -> None:
        plans = [case, *others]
        results = run(config, plans, seed=seed)
        reports = [hold_against_reference(*pair) for pair in zip(plans, results, strict=True)]
        held.update(traits(reports[0].layout, results[0].events))
        held.update({"plans": 1, "rows": sum(report.num_rows for report in reports)})

    law()
    print(f"{dict(held)}")  # shown with `pytest -s`
    assert held["rows"] >= 5 * held["plans"], held
    assert held["a stitch of several branches"] >= 0.30 * held["plans"], held
    assert held["nested forks"] >= 0.30 * held["plans"], held
    assert held["a failure or a cancellation"] >= 0.20 * held["plans"], held


def test_a_fault_breaks_the_first_law() -> None:
    """The comparison is able to fail: one logit moved by a little more than the tolerance is found, and named."""
    case = Case(parse_text('main = plan() { x = fork(2) { y = gen("a", max=3); } join(all, stitch); }'), {})
    (result,) = run(ROOMY, [case], seed=1)
    hold_against_reference(case, result)
    rows = list(result.logits)
    moved = rows[2].logits.clone()
    moved[7] += 10 * TOLERANCE
    rows[2] = replace(rows[2], logits=moved)
    with pytest.raises(ReferenceMismatch, match=f"draw {rows[2].index} differ"):
        hold_against_reference(case, replace(result, logits=tuple(rows)))


# --- the second law


Tokens: TypeAlias = dict[tuple[Path, int], int]


def drawn(result: RunResult) -> Tokens:
    """The token of every draw, by (path, index)."""
    return {(row.path, row.index): row.token for row in result.logits}


def told(result: RunResult) -> dict[Path, list[Event]]:
    """The events of each thread that came to its own end, in order: what no schedule decides.

    What a cancelled branch had come to is decided by time, and so is what happened inside it.
    """
    ended = {event.path: event.status for event in result.events if isinstance(event, BranchEnded)}
    found: dict[Path, list[Event]] = {}
    for event in result.events:
        if isinstance(event, RunEnded):
            continue
        around = [event.path[:n] for n in range(len(event.path) + 1) if event.path[:n] in ended]
        if all(ended[path] not in ("cancelled", "late") for path in around):
            # Log-probabilities are compared by the first law; their last bits are the model's.
            found.setdefault(around[-1], []).append(
                replace(event, logprobs=()) if isinstance(event, GenEnded) else event
            )
    return found


def test_batch_mates_and_lanes_do_not_matter() -> None:
    """Law 2: one plan, alone or beside another, on engines of two shapes: the same tokens, values and decisions."""

    @settings(COMMON, max_examples=max(1, EXAMPLES // 3))
    @given(cases(), engines(), engines(), cases(fuel=30, max_depth=1), st.integers(0, 2**32))
    def law(case: Case, one: EngineConfig, two: EngineConfig, other: Case, seed: int) -> None:
        # Which branches had ended when a join closed is decided by time, unless the engine is deterministic.
        alone = run(replace(one, deterministic=True), [case], seed=seed)[0]
        beside = run(replace(two, deterministic=True), [case, other], seed=seed)[0]
        assert (alone.status, alone.value) == (beside.status, beside.value)
        here, there = told(alone), told(beside)
        assert () in here.keys() & there.keys()
        for path in here.keys() & there.keys():
            assert here[path] == there[path]
        tokens = drawn(beside)
        assert all(tokens.get(key, token) == token for key, token in drawn(alone).items())

    law()


WIDE = """
main = plan(n: int) {
  text("Go");
  x = fork(n, upto=6) {
    a = gen(max=4);
    b = fork(2) { c = gen(max=3, temperature=2); } join(all, stitch);
  } join(all, JOIN);
}
"""


@settings(COMMON, max_examples=max(1, EXAMPLES // 20))
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from(["drop", "text", "stitch"]), st.integers(0, 2**32))
def test_the_number_of_siblings_does_not_matter(width: int, more: int, context: str, seed: int) -> None:
    """Law 2: a branch draws the same tokens whatever branches stand beside it."""
    program = parse_text(WIDE.replace("JOIN", context))
    narrow, wide = (drawn(run(ROOMY, [Case(program, {"n": n})], seed=seed)[0]) for n in (width, min(6, width + more)))
    assert narrow
    assert narrow.items() <= wide.items()


APART = """
aid = plan() { v = gen("A", max=6, temperature=5); return(v); }
main = plan() {
  x = fork(3) { g = gen("A", max=6, temperature=5); return(g); };
  y = fork(fresh=true) {
    p = branch() { h = aid(fresh=true); return(h); };
    q = branch() { k = aid(fresh=true); return(k); };
  };
  loop(3) { z = fork(1, fresh=true) { w = gen("A", max=6, temperature=5); return(w); }; };
}
"""


def test_no_two_branches_share_a_stream() -> None:
    """Law 2: siblings, calls and rounds of a loop that see the same text draw different tokens."""
    (result,) = run(ROOMY, [Case(parse_text(APART), {})], seed=3)
    texts = [event.ids for event in result.events if isinstance(event, GenEnded)]
    assert len(texts) == 8
    assert len(set(texts)) == 8


def test_the_seed_and_the_inputs_place_matter() -> None:
    """Law 2: another seed, or another place among the inputs, is another stream; the same ones are the same."""
    program = parse_text('main = plan() { x = gen("A", max=8, temperature=5); }')
    engine = Engine(model(), ROOMY)
    first, second = engine.run(program, [{}, {}], seed=1)
    again, other = engine.run(program, [{}], seed=1)[0], engine.run(program, [{}], seed=2)[0]
    assert drawn(first) == drawn(again)
    assert drawn(first) != drawn(second)
    assert drawn(first) != drawn(other)
