"""Engines on a device, tried on a CPU by the torch definitions of the kernels: the same plans, tokens and schedules.

Whether the kernels compute what their definitions say is `tests/test_kernel_*.py`; what a GPU adds (captured graphs,
events, pinned copies) is `benchmarks/gpu.py`, which runs this file on one: ANABRANCH_DEVICE and ANABRANCH_DTYPE say
where and in what.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from law_runs import COMMON, traits

from anabranch.compiler.scheduler import Need, Policy
from anabranch.compiler.verify_recording import verify_recording
from anabranch.dsl.diagnostics import PlanError
from anabranch.runtime.chat import read_chat
from anabranch.runtime.device import Device
from anabranch.runtime.engine import Engine, EngineConfig, RunResult
from anabranch.runtime.model import Decoder
from anabranch.runtime.models import LoadedModel, load
from anabranch.runtime.pages import PagePool
from anabranch.runtime.random_model import random_config, random_weights
from anabranch.runtime.recorder import Recorder
from anabranch.runtime.reference import check_run
from anabranch.runtime.task_plan import Capacity
from anabranch.runtime.tokenizer import byte_tokenizer
from anabranch.testing import Plan, plans

DEVICE = os.environ.get("ANABRANCH_DEVICE", "cpu")
DTYPE: torch.dtype = getattr(torch, os.environ.get("ANABRANCH_DTYPE", "float32"))
in_fp32 = pytest.mark.skipif(torch.float32 != DTYPE, reason="in 16 bits a rounding may turn a draw")

# fp32 against the reference in fp64, at logits of up to 20; a fault moves them by 0.1 and more.
TOLERANCE = 1e-3
CLOSE = 1e-4 if DEVICE == "cpu" else TOLERANCE
# On a GPU each example captures graphs of its own.
EXAMPLES = 120 if DEVICE == "cpu" else 40
ROOMY = EngineConfig(lanes=8, pages=512, trace_logits=True)


@cache
def model(*, on_device: bool = True, qk_norm: bool = False, windows: bool = False) -> LoadedModel:
    """The random model with heads of a size that the kernels have."""
    torch.set_num_threads(1)
    tokenizer = byte_tokenizer()
    config = replace(
        random_config(tokenizer), head_dim=64, qk_norm=qk_norm, sliding_window=(24, None, 9) if windows else (None,) * 3
    )
    weights = random_weights(config, tokenizer, 0)
    if qk_norm:
        generator = torch.Generator().manual_seed(1)
        for layer in range(config.num_layers):
            for name in ("q_norm", "k_norm"):
                weights[f"model.layers.{layer}.self_attn.{name}.weight"] = 1 + torch.rand(64, generator=generator)
    if on_device:
        decoder = Decoder(config, weights, dtype=DTYPE, device=DEVICE, pack=False)
    else:
        decoder = Decoder(config, weights)
    return LoadedModel(decoder, tokenizer, read_chat(tokenizer, "random"), "random", "0")


def reference_weights() -> dict[str, torch.Tensor]:
    found = model()
    return {k: v.double() for k, v in random_weights(found.decoder.config, found.tokenizer, 0).items()}


def run_on(engine: Engine, plan: Any, inputs: dict[str, Any] | None = None, *, seed: int = 0) -> RunResult:
    return engine.run(plan, inputs or {}, seed=seed)[0]


MIXED = """
go = plan(q) {
  user("#{q}");
  a = fork(4) {
    w = gen(max=40, temperature=0.9, stop=["e."]);
    n = gen("N: ", type=int, max=6);
    return(n);
  } join(vote(n), stitch);
  b = gen("why ", max=20, repetition_penalty=1.3, presence_penalty=0.2);
  c = fork(3) { x = gen(max=10, top_k=5, min_p=0.02); return(x); } join(all, stitch(sum));
  d = gen("L:", type=lines(2, 3), max=30, top_p=0.8);
  e = gen("{", type=json(\"\"\"{"type": "object"}\"\"\"), max=24);
  f = gen("best: ", type=choice("yes", "no", by="logprob"), max=3);
  g = fork(3) { y = gen(max=12); return(y); } join(best(logprob), stitch);
  h = gen(max=8, temperature=0.0);
  return([a, b, d, f, g, h]);
}
"""


@in_fp32
@pytest.mark.parametrize("variant", ["plain", "qk_norm", "windows"])
def test_a_device_draws_what_the_cpu_draws(variant: str) -> None:
    """Every token and count is the CPU engine's, logits agree within rounding, and the schedule passes the verifier."""
    options = {} if variant == "plain" else {variant: True}
    config = EngineConfig(pages=512, trace_logits=True)
    expected = run_on(Engine(model(on_device=False, **options), config), MIXED, {"q": "hello there"}, seed=3)
    assert expected.status == "ok", expected.reason
    recorder = Recorder()
    engine = Engine(model(**options), config, recorder=recorder)
    found = run_on(engine, MIXED, {"q": "hello there"}, seed=3)
    assert (found.value, found.status) == (expected.value, expected.status)
    same = {k: v for k, v in expected.counts.items() if k not in ("elapsed_s", "pages_peak")}
    assert {k: found.counts[k] for k in same} == same
    by_draw = {(row.path, row.index): row for row in found.logits}
    for row in expected.logits:
        torch.testing.assert_close(by_draw[row.path, row.index].logits, row.logits, rtol=0, atol=CLOSE)
    assert len(by_draw) == len(expected.logits)
    verify_recording(recorder.recording())
    assert engine.waves is not None and engine.waves.num_launches > 50


@st.composite
def engines(draw: st.DrawFn) -> EngineConfig:
    """Engines of every shape that a device has. `pages` counts those beyond the least that a plan needs."""
    return EngineConfig(
        lanes=draw(st.sampled_from([8, 3, 1])),
        pages=draw(st.sampled_from([300, 6, 0])),
        chunk=draw(st.sampled_from([64, 7, 1])),
        run_ahead=draw(st.sampled_from([0, 1, 2, 5])),
        deterministic=draw(st.booleans()),
        preempt=draw(st.sampled_from(["swap", "recompute", "never"])),
        prefix_cache=draw(st.booleans()),
        trace_logits=True,
    )


@in_fp32
def test_aliasing_is_invisible_on_a_device() -> None:
    """Law 1: forced to the engine's tokens, the reference gives its logits; each run's schedule passes the verifier."""
    held: Counter[str] = Counter()
    weights = reference_weights()

    @seed(0)
    @settings(COMMON, max_examples=EXAMPLES)
    @given(plans(), engines(), st.integers(0, 2**32))
    def law(plan: Plan, config: EngineConfig, noise: int) -> None:
        found = model()
        config = replace(config, deterministic=config.deterministic and not plan.has_deadline)
        roomy = Engine(found, replace(config, pages=2048))
        compiled = roomy.compile(plan.program, functions=tuple(plan.functions))
        least = compiled.bounds(roomy, plan.inputs).pages_depth_first
        recorder = Recorder()
        engine = Engine(found, replace(config, pages=least + (config.pages or 0)), recorder=recorder)
        now = [0.0]
        engine.clock = lambda: now[0]  # type: ignore[method-assign]
        engine.sleep = lambda seconds: now.append(now.pop() + seconds)  # type: ignore[method-assign]
        run = engine.submit(compiled, plan.inputs, seed=noise, functions=plan.functions)
        while run.result is None:
            engine.step()
            now.append(now.pop() + 1)
        verify_recording(recorder.recording(), compiled=[compiled])
        report = check_run(
            plan.program, None, plan.inputs, run.result.events, found.tokenizer, found.chat, found.decoder.config,
            weights, run.result.logits, tolerance=TOLERANCE,
        )  # fmt: skip
        assert engine.waves is not None
        held.update(traits(report.layout, run.result.events))
        held.update({
            "plans": 1, "rows": report.num_rows, "launches": engine.waves.num_launches,
            "dropped": engine.waves.rows_dropped,
        })  # fmt: skip

    law()
    print(f"{dict(held)}")  # shown with `pytest -s`
    assert held["rows"] >= 5 * held["plans"], held
    assert held["launches"] >= 5 * held["plans"], held
    assert held["dropped"] >= 0.2 * held["plans"], held
    assert held["a stitch of several branches"] >= 0.25 * held["plans"], held
    assert held["nested forks"] >= 0.25 * held["plans"], held
    assert held["a failure or a cancellation"] >= 0.15 * held["plans"], held


@in_fp32
@pytest.mark.parametrize("preempt", ["swap", "recompute"])
def test_lanes_that_are_preempted_go_on_elsewhere(preempt: Literal["swap", "recompute"]) -> None:
    """Seats of threads whose pages were taken are given up; they come back to other pages, and draw the same tokens."""

    class Bold(Policy):
        def expects(self, need: Need) -> int:
            return 1

    plan = """
    go = plan() {
      x = fork(5) {
        a = gen("k", type=regex("([ab][0-9]){25}"), max=70);
        b = gen("so", max=9);
        return(a);
      } join(all, drop);
      z = gen(" then", max=3);
      return(x);
    }
    """
    calm = run_on(Engine(model(), EngineConfig(lanes=6, pages=512, preempt="never")), plan, seed=4)
    roomy = Engine(model(), EngineConfig(pages=512))
    bounds = roomy.compile(plan).bounds(roomy, {})
    recorder = Recorder()
    config = EngineConfig(lanes=6, preempt=preempt, run_ahead=2, pages=bounds.pages_depth_first + 3)
    engine = Engine(model(), config, policy=Bold(), recorder=recorder)
    found = run_on(engine, plan, seed=4)
    assert engine.num_preempted > 0
    assert (found.value, found.status) == (calm.value, "ok")
    verify_recording(recorder.recording())
    assert engine.pool.used == engine.pool.idle


def test_running_ahead_changes_no_bit() -> None:
    """Run-ahead 0, 1, 2 and 7: the same tokens, and under `deterministic` the same bits of every row of logits."""
    for deterministic in (False, True) if torch.float32 == DTYPE else (True,):
        found = [
            run_on(
                Engine(model(), replace(ROOMY, run_ahead=ahead, deterministic=deterministic)),
                MIXED, {"q": "what is it"}, seed=5,
            )
            for ahead in (0, 1, 2, 7)
        ]  # fmt: skip
        for other in found[1:]:
            assert other.value == found[0].value
            for a, b in zip(found[0].logits, other.logits, strict=True):
                assert (a.path, a.index, a.token) == (b.path, b.index, b.token)
                torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=0 if deterministic else CLOSE)


LONG = """
go = plan(q) {
  user("#{q} #{q}");
  a = fork(3) {
    text("first");
    x = gen(type=regex("([ab][0-9]){20}"), max=60, temperature=0.9);
    text("then");
    y = gen("N: ", type=int, max=4);
    z = gen("so", max=14);
    return(y);
  } join(vote(y), CONTEXT);
  b = fork(2) { w = gen("k", max=12); return(w); } join(all, stitch(sum));
  c = gen("end ", max=9);
  return([b, c]);
}
"""


@pytest.mark.parametrize("changed", [
    {"lanes": 2}, {"chunk": 1}, {"chunk": 7}, {"run_ahead": 3}, {"prefix_cache": True}, {"preempt": "swap"},
    {"preempt": "recompute"}, {},
], ids=["lanes", "chunk-1", "chunk-7", "ahead", "cache", "swap", "recompute", "company"])  # fmt: skip
def test_a_branch_has_its_bits_on_a_device(changed: dict[str, Any]) -> None:
    """Under `deterministic` each row of logits is the same, whatever runs beside it and however it came to be fed."""

    class Bold(Policy):
        def expects(self, need: Need) -> int:
            return 1

    inputs = {"q": "what does this come to, all in all?"}
    base = EngineConfig(
        lanes=8, pages=256, deterministic=True, trace_logits=True, prefix_cache=False, preempt="never", run_ahead=0
    )
    pressed = "preempt" in changed
    # What a stitch keeps of each branch would be part of the least that a pool must hold.
    plan = LONG.replace("CONTEXT", "drop" if pressed else "stitch")
    alone = Engine(model(), base)
    expected = {(row.path, row.index): row for row in run_on(alone, plan, inputs, seed=6).logits}
    assert len(expected) > 100
    pages = alone.compile(plan).bounds(alone, inputs).pages_depth_first + 1 if pressed else base.pages
    engine = Engine(model(), replace(base, **changed, pages=pages), policy=Bold() if pressed else None)
    if "prefix_cache" in changed:
        assert run_on(engine, plan, inputs, seed=1).counts["tokens_cached"] == 0
    run = engine.submit(plan, inputs, seed=6)
    if not changed:
        engine.submit(MIXED, {"q": "hello"}, seed=2)
    while run.result is None:
        engine.step()
    for row in run.result.logits:
        other = expected[row.path, row.index]
        assert row.token == other.token
        assert torch.equal(row.logits, other.logits), (row.path, row.index)
    assert len(run.result.logits) == len(expected)
    if pressed:
        assert engine.num_preempted > 0
    if "prefix_cache" in changed:
        assert run.result.counts["tokens_cached"] > 0


@in_fp32
def test_lists_that_overflow_fall_back_to_a_step_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a wave does not fit its lists the rows are split over lists of their own, and the run is the same."""
    expected = run_on(Engine(model(), ROOMY), MIXED, {"q": "hi"}, seed=2)
    made = Device.__init__

    def small(self: Device, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        # A few tasks: enough for one lane at the start, and not for a view of many segments.
        self.capacity = Capacity(rows=6, tasks=3, task_rows=6, pages=512, parts=6, chunks=64)
        self.forget()
        self._lists = type(self._lists)(self.capacity, self.device)

    monkeypatch.setattr(Device, "__init__", small)
    engine = Engine(model(), ROOMY)
    found = run_on(engine, MIXED, {"q": "hi"}, seed=2)
    assert (found.value, found.status) == (expected.value, "ok")
    assert engine.waves is not None
    assert 0 < engine.waves.num_launches < expected.counts["steps"]


def test_a_lane_beyond_its_stop_writes_nowhere() -> None:
    """What runs far ahead of a stop changes no slot of a page that no segment was ever given."""
    plan = """go = plan() {
      x = fork(3) { a = gen("x", max=200, stop=["e"]); } join(all, drop);
      b = gen("more", max=30);
      return(b);
    }"""
    expected = run_on(Engine(model(), EngineConfig(lanes=4, run_ahead=0, pages=80, prefix_cache=False)), plan)
    engine = Engine(model(), EngineConfig(lanes=4, run_ahead=40, pages=80, prefix_cache=False))
    for store in (*engine.store.k, *engine.store.v):
        store.fill_(1234.5)
    given: set[int] = set()
    allocate = engine.pool.allocate

    def watched(after: int | None = None, expect: int = 1) -> int:
        page = allocate(after, expect)
        given.add(page)
        return page

    engine.pool.allocate = watched  # type: ignore[method-assign]
    found = run_on(engine, plan)
    assert found.value == expected.value
    assert found.counts["rows"] == expected.counts["rows"]
    assert engine.waves is not None and engine.waves.rows_dropped > 20
    assert found.counts["pages_peak"] <= found.counts["pages_bound"]
    free = [page for page in range(80) if page not in given]
    assert free
    for store in (*engine.store.k, *engine.store.v):
        assert (store[free] == 1234.5).all()
    assert all((store[sorted(given)] != 1234.5).any() for store in engine.store.k)


def test_a_lane_that_was_swapped_out_begins_anew() -> None:
    """What the device wrote ahead is gone with a swap, also where the very same pages come back."""
    plan = """go = plan() { a = gen("x", type=regex("([ab][0-9]){20}"), max=60); return(a); }"""
    config = EngineConfig(lanes=1, run_ahead=3, pages=64, prefix_cache=False, trace_logits=True)
    expected = run_on(Engine(model(), config), plan)
    engine = Engine(model(), config)
    run = engine.submit(plan)
    swaps = 0
    while run.result is None:
        engine.step()
        for task in list(engine._tasks.values()):
            segment = task.context.segment
            if segment is not None and segment.length % 9 == 0 and segment.pages:
                before = list(segment.pages)
                segment.swap_out(engine.store)
                for store in (*engine.store.k, *engine.store.v):
                    store[before] = 7.0
                engine.pool._cursor = before[0]
                segment.swap_in(engine.store)
                swaps += segment.pages == before[: len(segment.pages)]
    assert swaps > 1
    assert run.result.value == expected.value
    for a, b in zip(run.result.logits, expected.logits, strict=True):
        torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-4)


def test_an_engine_on_a_device_goes_with_its_last_owner() -> None:
    """Nothing that an engine holds holds it: its pages are free at once, without a collection of garbage."""
    engine = Engine(model(), ROOMY)
    run_on(engine, MIXED, {"q": "hi"}, seed=2)
    known = weakref.ref(engine.store.k[0])
    gc.disable()
    try:
        del engine
        assert known() is None
    finally:
        gc.enable()


def test_what_the_kernels_do_not_support_is_refused_by_name() -> None:
    """Head size, page size, type and packed weights: a ValueError that names the limit, before anything is launched."""
    with pytest.raises(ValueError, match="head size of 16 is not supported: it is one of"):
        Engine(load("random", device="cpu"), EngineConfig(pages=64))
    with pytest.raises(ValueError, match="page of 20 tokens is not supported: it is one of"):
        Engine(model(), EngineConfig(pages=64, page_size=20))
    wide = model().decoder
    config = replace(wide.config)
    double = Decoder(config, random_weights(config, model().tokenizer, 0), dtype=torch.float64, pack=False)
    with pytest.raises(ValueError, match="float64 is not supported on a device: it is one of"):
        Engine(replace(model(), decoder=double), EngineConfig(pages=64))
    with pytest.raises(ValueError, match="pack=False"):
        Device(model(on_device=False).decoder, PagePool(8, 16), lanes=1, chunk=1, deterministic=False)
    with pytest.raises(ValueError, match="run_ahead=-1 is at least 0"):
        Engine(model(), EngineConfig(pages=64, run_ahead=-1))
    with pytest.raises(PlanError) as error:
        load("random", device="cuda:99")
    assert error.value.diagnostics[0].code == "bad-device"
    with pytest.raises(PlanError):
        load("random", device="no such")


def test_a_broken_model_is_told_of() -> None:
    """Logits that are not finite raise as they do on the CPU, and the engine is usable afterwards."""
    broken = model()
    weights = random_weights(broken.decoder.config, broken.tokenizer, 0)
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    decoder = Decoder(broken.decoder.config, weights, pack=False)
    engine = Engine(replace(broken, decoder=decoder), EngineConfig(lanes=2, pages=64))
    with pytest.raises(ValueError, match="not finite"):
        engine.run("""go = plan() { a = gen("x", max=5); return(a); }""")
    assert not engine.step()
