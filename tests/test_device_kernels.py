"""A whole engine by the Triton kernels, in Triton's interpreter: the launches that a GPU gets, on real lists."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreted, run_in_interpreter, starts_interpreter
from test_device import model, run_on

from anabranch.compiler.verify_recording import verify_recording
from anabranch.runtime.engine import Engine, EngineConfig
from anabranch.runtime.recorder import Recorder

# Steps of several rows and of one, a wave with masks and one with penalties, several segments under shifts, filters.
PLAN = """
go = plan() {
  text("So");
  a = fork(2) { x = gen("n", type=int, max=2); y = gen(max=3, temperature=0.9); return(x); } join(all, stitch(sum));
  b = gen(" t", max=3, repetition_penalty=1.3, presence_penalty=0.2, top_k=7, top_p=0.9);
  c = fork(3) { z = gen(max=3, min_p=0.05); return(z); } join(best(logprob), stitch);
  d = gen(max=2, temperature=0.0);
  return([c, d]);
}
"""


@starts_interpreter
def test_in_the_interpreter() -> None:
    """The tests below pass in it."""
    printed = run_in_interpreter(__file__)
    assert "2 passed" in printed, printed


@interpreted
@pytest.mark.parametrize(
    ("variant", "deterministic"), [("plain", False), ("qk_norm", True)], ids=["plain", "qk-norm-fixed"]
)
def test_an_engine_by_its_kernels(monkeypatch: pytest.MonkeyPatch, variant: str, deterministic: bool) -> None:
    """Every token and count is what the torch definitions give, and logits agree within rounding."""
    found = model(**({} if variant == "plain" else {variant: True}))
    config = EngineConfig(lanes=4, pages=64, chunk=8, trace_logits=True, deterministic=deterministic)
    expected = run_on(Engine(found, config), PLAN, seed=3)
    assert expected.status == "ok", expected.reason
    monkeypatch.setenv("ANABRANCH_INTERPRET", "1")
    recorder = Recorder()
    engine = Engine(found, config, recorder=recorder)
    result = run_on(engine, PLAN, seed=3)
    assert (result.status, result.value) == (expected.status, expected.value)
    for a, b in zip(result.logits, expected.logits, strict=True):
        assert (a.path, a.index, a.token) == (b.path, b.index, b.token)
        torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-4)
    counts = {k: v for k, v in expected.counts.items() if k != "elapsed_s"}
    assert {k: result.counts[k] for k in counts} == counts
    verify_recording(recorder.recording())
    assert engine.waves is not None and engine.waves.num_launches > 5
