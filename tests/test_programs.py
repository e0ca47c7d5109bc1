"""An engine whose model is two exported programs, against a device's own steps."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.compiler.graph_json import from_json, to_json
from anabranch.compiler.pipeline import Compiled, from_graph
from anabranch.compiler.verify_recording import verify_recording
from anabranch.dsl.diagnostics import PlanError, Source
from anabranch.runtime.artefact import PROGRAMS
from anabranch.runtime.chat import read_chat
from anabranch.runtime.device import decode_tile
from anabranch.runtime.engine import Engine, EngineConfig, RunResult
from anabranch.runtime.model import Decoder
from anabranch.runtime.models import LoadedModel
from anabranch.runtime.programs import ProgramDecoder
from anabranch.runtime.random_model import random_config, random_weights
from anabranch.runtime.recorder import Recorder
from anabranch.runtime.step_graph import export_step
from anabranch.runtime.tokenizer import byte_tokenizer
from anabranch.testing import Plan, plans


@cache
def models(deterministic: bool) -> tuple[LoadedModel, LoadedModel]:
    """The random model on a device, and as programs."""
    torch.set_num_threads(1)
    tokenizer = byte_tokenizer()
    config = replace(random_config(tokenizer), head_dim=64)
    decoder = Decoder(config, random_weights(config, tokenizer, 0), pack=False)
    tile = decode_tile(config, decoder.dtype, lanes=8, deterministic=deterministic)
    programs = {
        f"run_{kind}": export_step(decoder, kind, block_m=tile, deterministic=deterministic).module()
        for kind in PROGRAMS
    }
    built = ProgramDecoder(
        config, decoder.dtype, decoder.device, decoder.num_logits, 16, tile, deterministic, **programs
    )
    model = LoadedModel(decoder, tokenizer, read_chat(tokenizer, "random"), "random", "0")
    return model, replace(model, decoder=built)


@st.composite
def engines(draw: st.DrawFn) -> EngineConfig:
    """Engines of every shape. `pages` counts those beyond the least that a plan needs."""
    return EngineConfig(
        lanes=draw(st.sampled_from([8, 3, 1])),
        pages=draw(st.sampled_from([300, 6, 0])),
        chunk=draw(st.sampled_from([64, 7, 1])),
        run_ahead=draw(st.sampled_from([0, 1, 5])),
        deterministic=draw(st.booleans()),
        preempt=draw(st.sampled_from(["swap", "recompute", "never"])),
        trace_logits=True,
    )


@given(plans(deadlines=False), engines(), st.integers(0, 3))
@settings(max_examples=20, derandomize=True, deadline=None)
def test_generated_plans_run_as_programs(plan: Plan, config: EngineConfig, seed: int) -> None:
    """By the graph that was read back and the programs: the tokens, values and counts of a device's own steps; bit for
    bit the same logits where the engine is deterministic; and the schedule passes the verifier."""
    device, programs = models(config.deterministic)
    roomy = Engine(device, replace(config, pages=512))
    compiled = roomy.compile(plan.program, functions=tuple(plan.functions))
    least = compiled.bounds(roomy, plan.inputs).pages_depth_first
    config = replace(config, pages=least + (config.pages or 0))
    recorder = Recorder()

    def run(model: LoadedModel, what: Compiled, recorder: Recorder | None = None) -> RunResult:
        engine = Engine(model, config, recorder=recorder)
        return engine.run(what, plan.inputs, seed=seed, functions=plan.functions)[0]

    expected = run(device, compiled)
    found = run(programs, from_graph(from_json(to_json(compiled.graph)), Source("generated", plan.text)), recorder)
    assert (found.value, found.status, found.reason) == (expected.value, expected.status, expected.reason)
    assert [(e.path, e.token) for e in found.logits] == [(e.path, e.token) for e in expected.logits]
    assert {**found.counts, "elapsed_s": 0} == {**expected.counts, "elapsed_s": 0}
    if config.deterministic:
        assert all(torch.equal(a.logits, b.logits) for a, b in zip(found.logits, expected.logits, strict=True))
    verify_recording(recorder.recording())


def test_a_decoder_of_programs_says_what_it_is_not() -> None:
    """No callback, no other pages, no determinism that it was not exported for."""
    _, model = models(False)
    with pytest.raises(TypeError, match="ProgramDevice"):
        model.decoder.forward(None, None, None, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pages of 16 tokens, not 64"):
        Engine(model, EngineConfig(pages=8, page_size=64))
    with pytest.raises(PlanError, match="not-deterministic"):
        Engine(model, EngineConfig(pages=8, deterministic=True))
