"""Runs of generated plans on real engines over the random test model in fp64, held against the reference.

`ANABRANCH_EXAMPLES` sets how many plans law 1 is tried on in all (what else is tried follows in proportion); `SHARDS`
files share them, each with plans of its own.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.compiler.verify_recording import verify_recording
from anabranch.runtime.engine import Engine, EngineConfig, RunResult
from anabranch.runtime.events import BranchEnded, BranchStarted, Event
from anabranch.runtime.layout import Layout
from anabranch.runtime.models import LoadedModel, load
from anabranch.runtime.random_model import random_weights
from anabranch.runtime.recorder import Recorder
from anabranch.runtime.reference import Report, check_run
from anabranch.testing import Plan, plans

SHARDS = 4
EXAMPLES = int(os.environ.get("ANABRANCH_EXAMPLES", "2000"))
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


def hold_against_reference(plan: Plan, result: RunResult) -> Report:
    """Raises ReferenceMismatch."""
    return check_run(
        plan.program,
        None,
        plan.inputs,
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


def run(config: EngineConfig, batch: Sequence[Plan], *, seed: int) -> list[RunResult]:
    """Run the plans in one batch. The pool holds the least that the largest of them needs, and `config.pages` more.

    A step takes a second, so that deadlines pass at the same place on every machine; an engine that is asked to be
    deterministic refuses those, and is not asked where a plan has one.
    """
    deterministic = config.deterministic and not any(plan.has_deadline for plan in batch)
    roomy = Engine(model(), replace(config, pages=4096, deterministic=deterministic))
    compiled = [roomy.compile(plan.program, functions=tuple(plan.functions)) for plan in batch]
    least = max(one.bounds(roomy, plan.inputs).pages_depth_first for one, plan in zip(compiled, batch, strict=True))
    recorder = Recorder()
    engine = Engine(model(), replace(roomy.config, pages=least + (config.pages or 0)), recorder=recorder)
    # Of no name that leads back to the engine, which is large and is to go at once.
    now = [0.0]
    engine.clock = lambda: now[0]
    engine.sleep = lambda seconds: now.append(now.pop() + seconds)
    runs = [
        engine.submit(one, plan.inputs, seed=seed, functions=plan.functions)
        for one, plan in zip(compiled, batch, strict=True)
    ]
    while any(run.result is None for run in runs):
        engine.step()
        now.append(now.pop() + 1)
    verify_recording(recorder.recording(), compiled=compiled)
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


def hold_aliasing(shard: int) -> None:
    """Law 1 on this shard's plans, for any page size, lanes, chunk and pool, with another plan in the batch or without.

    Raises AssertionError where the plans were not as varied as they are meant to be.
    """
    held: Counter[str] = Counter()

    @seed(shard)
    @settings(COMMON, max_examples=EXAMPLES // SHARDS)
    @given(plans(), engines(), st.lists(plans(fuel=30, max_depth=1), max_size=1), st.integers(0, 2**32))
    def law(plan: Plan, config: EngineConfig, others: list[Plan], noise: int) -> None:
        batch = [plan, *others]
        results = run(config, batch, seed=noise)
        reports = [hold_against_reference(*pair) for pair in zip(batch, results, strict=True)]
        held.update(traits(reports[0].layout, results[0].events))
        held.update({"plans": 1, "rows": sum(report.num_rows for report in reports)})

    law()
    print(f"{dict(held)}")  # shown with `pytest -s`
    assert held["rows"] >= 5 * held["plans"], held
    assert held["a stitch of several branches"] >= 0.30 * held["plans"], held
    assert held["nested forks"] >= 0.30 * held["plans"], held
    assert held["a failure or a cancellation"] >= 0.20 * held["plans"], held
