"""Models of transformers in an engine: against the reference, and against their own forward under the plan's mask."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from law_runs import COMMON, traits
from torch import Tensor

from anabranch.dsl.diagnostics import PlanError
from anabranch.runtime.chat import read_chat
from anabranch.runtime.engine import Engine, EngineConfig, RunResult
from anabranch.runtime.layout import Layout
from anabranch.runtime.model import Decoder
from anabranch.runtime.models import LoadedModel
from anabranch.runtime.random_model import random_config, random_weights
from anabranch.runtime.reference import check_run, lay_out
from anabranch.runtime.tokenizer import byte_tokenizer
from anabranch.testing import Plan, plans

transformers = pytest.importorskip("transformers", minversion="5")

from anabranch.runtime.hf import HfDecoder, load_hf  # noqa: E402

# transformers computes norms, softmax and rotary factors in fp32 whatever the dtype. Logits are up to 20, and a fault
# moves them by 0.1 and more.
TOLERANCE = 1e-3
EXAMPLES = 60


def llama_config(**options: Any) -> Any:
    """The random test model's shape in transformers' words."""
    shape = random_config(byte_tokenizer())
    return transformers.LlamaConfig(
        **{
            "vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size, "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads, "num_key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim, "intermediate_size": shape.intermediate_size,
            "max_position_embeddings": shape.max_context, "rms_norm_eps": shape.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope.theta}, "tie_word_embeddings": False,
            "bos_token_id": None, "eos_token_id": None,
        } | options
    )  # fmt: skip


def small(kind: str, **options: Any) -> Any:
    """A model of another kind with random weights, large enough that what a token sees moves its logits."""
    sizes = {
        "vocab_size": byte_tokenizer().vocab_size, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 128, "max_position_embeddings": 1 << 16, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes | options)
    model = getattr(transformers, f"{kind}ForCausalLM", None) or getattr(transformers, f"{kind}LMHeadModel")
    model = model(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                gain = 1.0 if "embed" in name else 1.5 / weight.shape[1] ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * gain)
            elif name.endswith("bias"):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


@cache
def llama() -> tuple[LoadedModel, dict[str, Tensor]]:
    """The random test model as transformers' Llama, and its weights."""
    torch.set_num_threads(1)
    tokenizer = byte_tokenizer()
    weights = random_weights(random_config(tokenizer), tokenizer, 0)
    model = transformers.LlamaForCausalLM(llama_config())
    model.load_state_dict(weights)
    return load_hf(model, tokenizer), {name: weight.double() for name, weight in weights.items()}


@cache
def phi() -> tuple[LoadedModel, Any]:
    """What our decoder does not do: half of a head turns, layer norms, biases, attention beside the MLP; and a copy."""
    torch.set_num_threads(1)
    model = small("Phi", rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5})
    own = copy.deepcopy(model)
    return load_hf(model, byte_tokenizer()), own


def run(found: LoadedModel, plan: Plan, config: EngineConfig, noise: int) -> RunResult:
    """Run a plan with as many pages as it needs, and `config.pages` more; a step takes a second."""
    roomy = Engine(found, replace(config, pages=2048))
    compiled = roomy.compile(plan.program, functions=tuple(plan.functions))
    least = compiled.bounds(roomy, plan.inputs).pages_depth_first
    engine = Engine(found, replace(config, pages=least + (config.pages or 0)))
    now = [0.0]
    engine.clock = lambda: now[0]  # type: ignore[method-assign]
    engine.sleep = lambda seconds: now.append(now.pop() + seconds)  # type: ignore[method-assign]
    submitted = engine.submit(compiled, plan.inputs, seed=noise, functions=plan.functions)
    while submitted.result is None:
        engine.step()
        now.append(now.pop() + 1)
    return submitted.result


@st.composite
def engines(draw: st.DrawFn) -> EngineConfig:
    """Engines of several shapes."""
    return EngineConfig(
        lanes=draw(st.sampled_from([8, 3])),
        pages=draw(st.sampled_from([300, 2])),
        page_size=draw(st.sampled_from([16, 5])),
        chunk=draw(st.sampled_from([64, 7])),
        trace_logits=True,
    )


def own_forward(model: Any, layout: Layout, *, shifted: bool = True) -> Tensor:
    """The model's own forward over a run: its eager attention under a mask, with the positions of the tokens.

    Where the run has shifts, each query is turned back by the model's own rotary embedding. shifted: False leaves that
    out. Returns [num_tokens, vocab].
    """
    visible, shifts = layout.visibility()
    ids = torch.tensor([token.id for token in layout.tokens])
    positions = torch.tensor([token.position for token in layout.tokens])
    hidden = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))[None, None]

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        scores = torch.full((1, q.shape[1], *visible.shape), float("-inf"))
        rotary = model.model.rotary_emb
        for shift in shifts[visible].unique().tolist():
            cos, sin = rotary(q, torch.full_like(positions, shift)[None])
            width = cos.shape[-1]
            low, high = q[..., :width].chunk(2, -1)
            back = q[..., :width] * cos - torch.cat((-high, low), -1) * sin
            turned = torch.cat((back, q[..., width:]), -1)
            scores = torch.where(shifts == shift, turned @ k.transpose(2, 3) * scaling, scores)
        return (scores + hidden).softmax(-1).matmul(v).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("shifted", attend)
    model.set_attn_implementation("shifted" if shifted and bool(shifts.any()) else "eager")
    with torch.no_grad():
        return model(input_ids=ids[None], position_ids=positions[None], attention_mask=hidden, use_cache=False).logits[
            0
        ]


def test_llama_gives_the_reference_s_logits() -> None:
    """Law 1 for transformers' Llama: forced to the engine's tokens, the reference gives its logits."""
    held: Counter[str] = Counter()
    found, weights = llama()
    config = random_config(found.tokenizer)

    @seed(0)
    @settings(COMMON, max_examples=EXAMPLES)
    @given(plans(), engines(), st.integers(0, 2**32))
    def law(plan: Plan, engine: EngineConfig, noise: int) -> None:
        result = run(found, plan, engine, noise)
        report = check_run(
            plan.program, None, plan.inputs, result.events, found.tokenizer, found.chat, config, weights,
            result.logits, tolerance=TOLERANCE, logprob_tolerance=TOLERANCE,
        )  # fmt: skip
        held.update(traits(report.layout, result.events))
        held.update({"plans": 1, "rows": report.num_rows})

    law()
    print(dict(held))  # shown with `pytest -s`
    assert held["rows"] >= 5 * held["plans"] and held["plans"] >= EXAMPLES, held
    assert held["a stitch of several branches"] >= 0.25 * held["plans"], held


def test_phi_gives_its_own_forward_s_logits() -> None:
    """Law 1 for a kind that our decoder does not do, against that model's own forward; shifts left out would show."""
    held: Counter[str] = Counter()
    found, own = phi()

    @seed(1)
    @settings(COMMON, max_examples=EXAMPLES)
    @given(plans(), engines(), st.integers(0, 2**32))
    def law(plan: Plan, engine: EngineConfig, noise: int) -> None:
        result = run(found, plan, engine, noise)
        drawn = {(row.path, row.index): row.token for row in result.logits}
        layout = lay_out(plan.program, None, plan.inputs, result.events, found.tokenizer, found.chat, drawn=drawn)
        assert drawn.keys() <= layout.draws.keys()
        held.update(traits(layout, result.events))
        held.update({"plans": 1, "rows": len(result.logits)})
        if not result.logits:
            return
        after = torch.tensor([layout.draws[row.path, row.index].after for row in result.logits])
        engine_logits = torch.stack([row.logits for row in result.logits])
        expected = own_forward(own, layout)[after]
        torch.testing.assert_close(engine_logits, expected, rtol=0, atol=TOLERANCE)
        _, shifts = layout.visibility()
        if shifts.any():
            held["shifts"] += 1
            difference = (own_forward(own, layout, shifted=False)[after] - engine_logits).abs().max()
            held["shifts that show"] += bool(difference > 100 * TOLERANCE)

    law()
    print(dict(held))  # shown with `pytest -s`
    assert held["rows"] >= 5 * held["plans"] and held["plans"] >= EXAMPLES, held
    assert held["a stitch of several branches"] >= 0.25 * held["plans"], held
    assert held["shifts that show"] >= 1, held


PLAN = """
go = plan() {
  user("What is it?");
  a = fork(3) { x = gen(max=9, temperature=0.9); return(x); } join(all, stitch(sum));
  b = gen("so ", max=8);
  c = fork(2) { y = gen("n: ", type=int, max=5); return(y); } join(vote(y), stitch);
  d = gen(" and", max=12);
  return([b, d]);
}
"""

KINDS = {
    "GPTNeoX": {},
    "Cohere": {"num_key_value_heads": 2},
    "Glm": {"num_key_value_heads": 2, "head_dim": 16},
    "Gemma": {"num_key_value_heads": 2, "head_dim": 16},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 9},
    "Granite": {"num_key_value_heads": 2, "attention_multiplier": 0.4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_run_as_well(kind: str) -> None:
    """Neighbouring pairs, part of a head, a scale of its own, a window: every row of logits is right."""
    model = small(kind, **KINDS[kind])
    own = copy.deepcopy(model)
    found = load_hf(model, byte_tokenizer())
    plan = PLAN.replace("stitch(sum)", "drop")
    [result] = Engine(found, EngineConfig(trace_logits=True, pages=200)).run(plan, seed=3)
    assert result.status == "ok", result.reason
    drawn = {(row.path, row.index): row.token for row in result.logits}
    compiled = Engine(found, EngineConfig(pages=200)).compile(plan)
    layout = lay_out(compiled.program, None, {}, result.events, found.tokenizer, found.chat, drawn=drawn)
    if kind == "Mistral":
        positions = torch.tensor([token.position for token in layout.tokens])
        near = positions[:, None] - positions[None, :] < 9
        visibility = (layout.visibility()[0] & near, layout.visibility()[1])
        layout = _Masked(layout, visibility)  # type: ignore[assignment]
    expected = own_forward(own, layout)
    assert len(result.logits) > 30
    for row in result.logits:
        after = layout.draws[row.path, row.index].after
        torch.testing.assert_close(row.logits, expected[after], rtol=0, atol=TOLERANCE)


class _Masked:
    """A layout whose tokens see less."""

    def __init__(self, layout: Layout, visibility: tuple[Tensor, Tensor]) -> None:
        self.tokens, self.draws = layout.tokens, layout.draws
        self._visibility = visibility

    def visibility(self) -> tuple[Tensor, Tensor]:
        return self._visibility


def test_the_ops_attend_for_it() -> None:
    """With `device=` the layers call `segment_attention` and its like: the tokens are those of the CPU engine."""
    tokenizer = byte_tokenizer()
    shape = replace(random_config(tokenizer), head_dim=64)
    weights = random_weights(shape, tokenizer, 0)
    own = LoadedModel(Decoder(shape, weights), tokenizer, read_chat(tokenizer, "random"), "random", "0")
    [expected] = Engine(own, EngineConfig(trace_logits=True, pages=200)).run(PLAN, seed=5)
    model = transformers.LlamaForCausalLM(llama_config(head_dim=64))
    model.load_state_dict(weights)
    engine = Engine(load_hf(model, tokenizer, device="cpu"), EngineConfig(trace_logits=True, pages=200))
    [found] = engine.run(PLAN, seed=5)
    assert (found.status, found.value) == ("ok", expected.value)
    by_draw = {(row.path, row.index): row.logits for row in found.logits}
    for row in expected.logits:
        torch.testing.assert_close(by_draw[row.path, row.index], row.logits, rtol=0, atol=TOLERANCE)
    assert engine.waves is not None and engine.waves.num_launches > 10
    with pytest.raises(PlanError) as error:
        Engine(load_hf(model, tokenizer, device="cpu"), EngineConfig(deterministic=True))
    assert error.value.diagnostics[0].code == "not-deterministic"


REFUSED = {
    "GPT2": ({}, "positions that are embedded and not rotary"),
    "Bloom": ({}, "3 layers that do not attend through transformers' registry"),
    "Mamba": ({}, "layers of the kind linear_attention"),
    "Gemma2": ({"num_key_value_heads": 2, "head_dim": 16}, "a cap on its attention scores"),
    "SmolLM3": ({"num_hidden_layers": 4, "num_key_value_heads": 2}, "or layers without one"),
    "Phi": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}},
        "rotary frequencies that depend on the text's length (`dynamic`)",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_supported_is_named(kind: str) -> None:
    """Learned positions, ALiBi, recurrence, capped scores, layers that do not rotate, stretched frequencies."""
    options, feature = REFUSED[kind]
    with pytest.raises(PlanError) as error:
        load_hf(small(kind, **options), byte_tokenizer())
    [diagnostic] = error.value.diagnostics
    assert diagnostic.code == "bad-model" and feature in diagnostic.message


def test_a_model_comes_from_a_folder(tmp_path: Any) -> None:
    """A folder of transformers' is loaded with its tokenizer; logits are those of the model that was saved."""
    found, _ = llama()
    model = transformers.LlamaForCausalLM(llama_config())
    model.load_state_dict(llama()[1])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        load_hf(model)
    loaded = load_hf(tmp_path, found.tokenizer)
    assert loaded.fingerprint != load_hf(small("Phi"), found.tokenizer).fingerprint
    [expected], [again] = (Engine(x, EngineConfig(pages=200)).run(PLAN, seed=1) for x in (found, loaded))
    assert again.value == expected.value
    with pytest.raises(PlanError) as error:
        load_hf(tmp_path / "none", found.tokenizer)
    assert error.value.diagnostics[0].code == "bad-model"
    with pytest.raises(PlanError) as error:
        HfDecoder(model, dtype=torch.bfloat16)
    assert error.value.diagnostics[0].code == "bad-model"


def test_a_tokenizer_of_transformers_is_read() -> None:
    """A fast byte-level tokenizer is taken as it is; another kind, or one too large for the model, is refused."""
    model, _ = llama()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate([*alphabet, "<eos>"])}

    def fast(kind: Any) -> Any:
        inner = tokenizers.Tokenizer(kind)
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")

    given = fast(tokenizers.models.BPE(words, []))
    module = transformers.LlamaForCausalLM(llama_config())
    found = load_hf(module, given, template="raw")
    assert found.tokenizer.eos_ids == {256}
    assert found.tokenizer.encode([("fork é", False)]) == given.encode("fork é")
    assert found.decoder.num_logits == 257 < model.decoder.config.vocab_size
    for model_of, tokenizer, reason in (
        (
            module,
            fast(tokenizers.models.WordLevel(words, unk_token="a")),
            "`: tokenizer type `WordLevel` is not supported",
        ),
        (transformers.LlamaForCausalLM(llama_config(vocab_size=99)), given, "257 tokens, its decoder only 99"),
    ):
        with pytest.raises(PlanError) as error:
            load_hf(model_of, tokenizer, template="raw")
        assert reason in error.value.diagnostics[0].message
