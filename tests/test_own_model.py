"""A decoder of a user's own, `examples/own_model.py`, against a dense forward of it under the plan's mask."""

from __future__ import annotations

import importlib.util
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from law_runs import COMMON, traits
from torch import Tensor

from anabranch.dsl.diagnostics import PlanError
from anabranch.kernels.rope import rotate
from anabranch.runtime.chat import RawChat
from anabranch.runtime.engine import Engine, EngineConfig
from anabranch.runtime.layout import Layout
from anabranch.runtime.models import LoadedModel
from anabranch.runtime.reference import lay_out
from anabranch.runtime.rope import rope_table
from anabranch.runtime.tokenizer import byte_tokenizer
from anabranch.testing import Plan, plans

TOLERANCE = 1e-4
EXAMPLES = 20


@cache
def example() -> ModuleType:
    """The example as a module."""
    path = Path(__file__).parent.parent / "examples" / "own_model.py"
    spec = importlib.util.spec_from_file_location("own_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def model(packed: bool) -> LoadedModel:
    """With weights so large that what a token sees moves its logits."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    decoder = example().OwnDecoder(tokenizer.vocab_size, packed=packed)
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.mul_(2)
    return LoadedModel(decoder, tokenizer, RawChat(), "own", "0")


def dense(found: LoadedModel, layout: Layout) -> Tensor:
    """Logits of every token, in one call of the decoder with plain masked attention."""
    visible, shifts = layout.visibility()
    ids = torch.tensor([token.id for token in layout.tokens])
    positions = torch.tensor([token.position for token in layout.tokens])
    config = found.decoder.config

    def turned(x: Tensor, at: Tensor) -> Tensor:
        return rotate(x, *rope_table(config.rope, config.head_dim, at, x.dtype))

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = turned(k, positions)
        scores = torch.full((q.shape[1], len(q), len(q)), float("-inf"))
        for shift in shifts[visible].unique().tolist():
            score = torch.einsum("qhd,kd->hqk", turned(q, positions - shift), keys[:, 0]) * config.head_dim**-0.5
            scores = torch.where(visible & (shifts == shift), score, scores)
        return torch.einsum("hqk,kd->qhd", scores.softmax(-1), v[:, 0])

    return found.decoder.forward(ids, positions, attend, torch.arange(len(ids)))


@pytest.mark.parametrize("packed", [True, False])
def test_an_own_decoder_gives_its_dense_logits(packed: bool) -> None:
    """Law 1 for a user's module, by the engine's attention and by the ops."""
    held: Counter[str] = Counter()
    found = model(packed)

    @seed(2)
    @settings(COMMON, max_examples=EXAMPLES)
    @given(plans(deadlines=False), st.integers(0, 2**32))
    def law(plan: Plan, noise: int) -> None:
        engine = Engine(found, EngineConfig(lanes=4, chunk=9, pages=2048, trace_logits=True))
        [result] = engine.run(plan.program, plan.inputs, seed=noise, functions=plan.functions)
        drawn = {(row.path, row.index): row.token for row in result.logits}
        layout = lay_out(plan.program, None, plan.inputs, result.events, found.tokenizer, found.chat, drawn=drawn)
        held.update(traits(layout, result.events))
        held.update({"plans": 1, "rows": len(result.logits)})
        if result.logits:
            expected = dense(found, layout)
            for row in result.logits:
                after = layout.draws[row.path, row.index].after
                torch.testing.assert_close(row.logits, expected[after], rtol=0, atol=TOLERANCE)

    law()
    print(dict(held))  # shown with `pytest -s`
    assert held["rows"] >= 5 * held["plans"] and held["plans"] >= EXAMPLES, held
    assert held["a stitch of several branches"] >= 2, held


@pytest.mark.parametrize("packed", [True, False])
def test_it_is_not_asked_to_be_deterministic(packed: bool) -> None:
    """What the decoder does not promise is refused by name, with either attention."""
    with pytest.raises(PlanError) as error:
        Engine(model(packed), EngineConfig(deterministic=True))
    assert error.value.diagnostics[0].code == "not-deterministic"
