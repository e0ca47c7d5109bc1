"""Under `deterministic` the bits of a branch's logits depend on what the branch sees, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.runtime.engine import Engine, EngineConfig, RunResult
from anabranch.runtime.events import Path
from anabranch.runtime.models import LoadedModel, load
from anabranch.testing import Plan, plans

DTYPES = [torch.float32, torch.float64]
COMMON = settings(
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@cache
def model(dtype: torch.dtype) -> LoadedModel:
    torch.set_num_threads(1)
    return load("random", dtype=dtype)


@st.composite
def engines(draw: st.DrawFn) -> EngineConfig:
    """Engines of every shape. `pages` counts those beyond the least that the plans need; `run` adds that."""
    return EngineConfig(
        lanes=draw(st.sampled_from([8, 3, 2, 1])),
        pages=draw(st.sampled_from([400, 8, 1, 0])),
        page_size=draw(st.sampled_from([16, 5, 2, 1])),
        chunk=draw(st.sampled_from([64, 16, 3, 1])),
        prefix_cache=draw(st.booleans()),
        preempt=draw(st.sampled_from(["swap", "recompute", "never"])),
        deterministic=True,
        trace_logits=True,
    )


def run(dtype: torch.dtype, config: EngineConfig, batch: Sequence[Plan], *, seed: int, warm: bool = False):
    """Run the plans in one batch; `warm`: after they were run once, so that prefixes come from the cache."""
    roomy = Engine(model(dtype), replace(config, pages=4096))
    compiled = [roomy.compile(plan.program, functions=tuple(plan.functions)) for plan in batch]
    least = max(one.bounds(roomy, plan.inputs).pages_depth_first for one, plan in zip(compiled, batch, strict=True))
    engine = Engine(model(dtype), replace(config, pages=least + (config.pages or 0)))
    for _ in range(1 + warm):
        runs = [
            engine.submit(one, plan.inputs, seed=seed, functions=plan.functions)
            for one, plan in zip(compiled, batch, strict=True)
        ]
        while any(run.result is None for run in runs):
            engine.step()
    return [run.result for run in runs if run.result is not None]


def rows(result: RunResult) -> dict[tuple[Path, int], Tensor]:
    """The logits of every draw, by (path, index)."""
    return {(row.path, row.index): row.logits for row in result.logits}


@pytest.mark.parametrize("dtype", DTYPES)
def test_engines(dtype) -> None:
    held = {"rows": 0, "differ": 0, "ord": 0}

    @settings(COMMON, max_examples=100)
    @given(
        plans(deadlines=False),
        engines(),
        engines(),
        plans(fuel=30, max_depth=1, deadlines=False),
        st.integers(0, 2**32),
        st.booleans(),
    )
    def law(case, one, two, other, seed, warm) -> None:
        alone = rows(run(dtype, one, [case], seed=seed)[0])
        beside = rows(run(dtype, two, [case, other], seed=seed, warm=warm)[0])
        for key in alone.keys() & beside.keys():
            assert torch.equal(alone[key], beside[key])
            held["rows"] += 1
        a = rows(run(dtype, replace(one, deterministic=False), [case], seed=seed)[0])
        b = rows(run(dtype, replace(two, deterministic=False), [case, other], seed=seed, warm=warm)[0])
        for key in a.keys() & b.keys():
            held["ord"] += 1
            held["differ"] += not torch.equal(a[key], b[key])

    law()
    print(held)
