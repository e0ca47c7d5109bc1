"""The decoder equals transformers on every member of the family, and on SmolLM2's real weights."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from anabranch.dsl.diagnostics import PlanError
from anabranch.kernels.norms import rms_norm
from anabranch.kernels.swiglu import swiglu
from anabranch.runtime.config import ModelConfig, RopeConfig
from anabranch.runtime.model import Attend, Decoder
from anabranch.runtime.models import LoadedModel, load
from anabranch.runtime.rope import rope_table, rotate

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}

FAMILY: dict[str, Any] = {
    "llama 2, all heads its own": LlamaConfig(**{**SMALL, "num_key_value_heads": 4}),
    "llama 3, grouped heads": LlamaConfig(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "llama 3.1, llama3 rope": LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE),
    "llama, linear rope": LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "llama, yarn": LlamaConfig(**SMALL, rope_parameters=YARN_ROPE),
    "llama, yarn with its own factor": LlamaConfig(
        **SMALL, rope_parameters={**YARN_ROPE, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}
    ),
    "llama, yarn with mscale, not truncated": LlamaConfig(
        **SMALL, rope_parameters={**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False}
    ),
    "llama with biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama, wide heads": LlamaConfig(**SMALL, head_dim=20),
    "mistral, window shorter than the text": MistralConfig(**SMALL, sliding_window=7),
    "mistral, no window": MistralConfig(**SMALL, sliding_window=None),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2, window from layer 1": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen2, window written and unused": Qwen2Config(**SMALL, use_sliding_window=False, sliding_window=7),
    "qwen3": Qwen3Config(**SMALL, head_dim=24),
    "qwen3, tied, with biases": Qwen3Config(**SMALL, head_dim=12, tie_word_embeddings=True, attention_bias=True),
}


def dense_attend(decoder: Decoder, positions: Tensor) -> Attend:
    """Causal attention over the fed tokens alone, each layer under its window."""
    config = decoder.config
    cos, sin = rope_table(config.rope, config.head_dim, positions, decoder.dtype)
    distance = positions[:, None] - positions[None, :]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = config.sliding_window[layer]
        sees = (distance >= 0) & (distance < window if window is not None else True)
        heads = [x.transpose(0, 1)[None] for x in (rotate(q, cos, sin), rotate(k, cos, sin), v)]
        out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=sees, enable_gqa=True)
        return out[0].transpose(0, 1)

    return attend


def logits_of(decoder: Decoder, ids: Tensor) -> Tensor:
    positions = torch.arange(len(ids))
    return decoder.forward(ids, positions, dense_attend(decoder, positions), positions)


def random_model(config: Any) -> Any:
    """A transformers model whose norms and biases are random too, or an error in them would not show."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_()
    return model


def compute_in_fp64(model: Any) -> Any:
    """transformers computes norms and rotary angles in fp32 whatever the model's type; here they follow it."""

    def norm(module: Any) -> Any:
        return lambda x: x * (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt() * module.weight

    def rotary(module: Any) -> Any:
        def forward(x: Tensor, position_ids: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
            angles = position_ids[0].double()[:, None] * module.inv_freq.double()[None, :]
            both = torch.cat((angles, angles), dim=-1)[None]
            return both.cos() * module.attention_scaling, both.sin() * module.attention_scaling

        return forward

    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm(module)
        elif type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = rotary(module)
    return model


@pytest.mark.parametrize("member", FAMILY)
def test_decoder_equals_transformers(member: str) -> None:
    """The same weights give the same logits, in fp32 and in fp64."""
    model = random_model(FAMILY[member])
    config = ModelConfig.from_hf(json.loads(FAMILY[member].to_json_string(use_diff=False)))
    ids = torch.randint(0, SMALL["vocab_size"], (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits_of(Decoder(config, model.state_dict()), ids), expected, rtol=0, atol=1e-4)
    model = compute_in_fp64(model)
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    decoder = Decoder(config, model.state_dict(), dtype=torch.float64)
    torch.testing.assert_close(logits_of(decoder, ids), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("member", ["llama 3.1, llama3 rope", "llama, yarn", "qwen2, window from layer 1", "qwen3"])
def test_saved_config_reads_the_same(member: str, tmp_path: Any) -> None:
    """What transformers leaves out of a saved config is filled in as transformers would."""
    FAMILY[member].save_pretrained(tmp_path)
    whole = ModelConfig.from_hf(json.loads(FAMILY[member].to_json_string(use_diff=False)))
    assert ModelConfig.from_folder(tmp_path) == whole


def test_old_rope_spelling_reads_the_same() -> None:
    """`rope_theta` beside `rope_scaling`, and `type` for `rope_type`, mean what `rope_parameters` does."""
    old = {k: v for k, v in LLAMA3_ROPE.items() if k not in ("rope_theta", "rope_type")} | {"type": "llama3"}
    base = {"model_type": "llama", **SMALL}
    new = ModelConfig.from_hf({**base, "rope_parameters": LLAMA3_ROPE})
    assert ModelConfig.from_hf({**base, "rope_theta": 10000.0, "rope_scaling": old}) == new
    assert new.rope == RopeConfig("llama3", 10000.0, 8.0, 32, low_freq_factor=1.0, high_freq_factor=4.0)


REFUSED = {
    "architecture `gpt2`": {"model_type": "gpt2"},
    "did you mean `mistral`": {"model_type": "mixtral"},
    "it is a `LlamaForSequenceClassification`": {"architectures": ["LlamaForSequenceClassification"]},
    "rope type `dynamic`": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "rope type `longrope`": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
    "differ by layer": {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    "activation `gelu`": {"hidden_act": "gelu"},
    "quantisation `gptq`": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "`partial_rotary_factor` 0.5": {"partial_rotary_factor": 0.5},
    "`hidden_size` is missing": {"hidden_size": None},
    "`num_hidden_layers` is -1": {"num_hidden_layers": -1},
    "`vocab_size` is 'many'": {"vocab_size": "many"},
    "`rms_norm_eps` is inf": {"rms_norm_eps": float("inf")},
    "4 heads cannot share 3": {"num_key_value_heads": 3},
    "head size 7 is odd": {"head_dim": 7},
    "`factor` is missing": {"rope_scaling": {"type": "linear"}},
    "`rope_theta` is 1.0": {"rope_theta": 1.0},
    "layer type `linear_attention`": {
        "model_type": "qwen2",
        "architectures": None,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["linear_attention"] * 3,
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_unsupported_config_is_refused_by_name(reason: str) -> None:
    """What would change the result is named, never ignored."""
    with pytest.raises(PlanError) as caught:
        ModelConfig.from_hf({"model_type": "llama", **SMALL, **REFUSED[reason]}, where="here/config.json")
    assert caught.value.code == "bad-model"
    assert reason in str(caught.value) and "here/config.json" in str(caught.value)


def test_missing_and_misshapen_tensors_are_named() -> None:
    """A checkpoint without a tensor, or with one of another shape, is refused by that tensor's name."""
    model = random_model(LlamaConfig(**SMALL))
    config = ModelConfig.from_hf(model.config.to_dict())
    weights = model.state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(PlanError, match=rf"tensor `{name}` is missing"):
        Decoder(config, {k: v for k, v in weights.items() if k != name})
    with pytest.raises(PlanError, match=rf"tensor `{name}` has shape \[80, 47\], expected \[80, 48\]"):
        Decoder(config, {**weights, name: weights[name][:, :47]})


def test_logit_rows_select_tokens() -> None:
    """Logits come for the rows that are asked for, in that order, repeated or none."""
    model = random_model(LlamaConfig(**SMALL))
    decoder = Decoder(ModelConfig.from_hf(model.config.to_dict()), model.state_dict())
    ids = torch.arange(9)
    attend = dense_attend(decoder, ids)
    every = decoder.forward(ids, ids, attend, ids)
    some = decoder.forward(ids, ids, attend, torch.tensor([7, 2, 2]))
    assert torch.equal(some, every[[7, 2, 2]])
    assert decoder.forward(ids, ids, attend, torch.tensor([], dtype=torch.int64)).shape == (0, 131)
    assert decoder.forward(ids, ids, attend, torch.tensor([8])).shape == (1, 131)
    with pytest.raises(ValueError, match="9 token ids and 8 positions"):
        decoder.forward(ids, ids[:8], attend, ids)


def test_rotation_depends_on_distance_alone() -> None:
    """Moving query and key by the same amount leaves their product as it is; negative positions are fine."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 3, 16, generator=generator, dtype=torch.float64)
    products = []
    for at in (0, -5, 900):
        cos, sin = rope_table(RopeConfig(), 16, torch.tensor([at, at + 11]), torch.float64)
        products.append((rotate(q, cos[:1], sin[:1]) * rotate(k, cos[1:], sin[1:])).sum(-1))
    assert torch.allclose(products[0], products[1], rtol=0, atol=1e-12)
    assert torch.allclose(products[0], products[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_norm_and_activation_follow_their_formulas(rows: int) -> None:
    """The few-operation forms equal the textbook ones, also on views of a wider row."""
    wide = torch.randn(rows, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y = wide[:, :12], wide[:, 12:]
    weight = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)
    before = wide.clone()
    normed = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), normed, rtol=0, atol=1e-14)
    torch.testing.assert_close(swiglu(x, y), x / (1 + torch.exp(-x)) * y, rtol=0, atol=1e-14)
    assert torch.equal(wide, before)


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    try:
        return load("smollm2")
    except PlanError as error:
        if error.code == "no-model":
            pytest.skip("needs SmolLM2: `anabranch model get smollm2`")
        raise


def test_smollm2_knows_paris(smollm2: LoadedModel) -> None:
    """The figure that two other engines give."""
    ids = torch.tensor(smollm2.tokenizer.encode([("The capital of France is", True)]))
    log_probs = logits_of(smollm2.decoder, ids)[-1].log_softmax(-1)
    assert smollm2.tokenizer.token_bytes(int(log_probs.argmax())) == b" Paris"
    assert abs(log_probs.max().item() - -0.2581) < 1e-3


def test_smollm2_equals_transformers(smollm2: LoadedModel) -> None:
    """On the real weights, over the converted folder as transformers reads it."""
    from anabranch.runtime.smollm2 import folder

    text = "Water boils at 100 degrees. In 1969, two people walked on the Moon;\n\tthe rest is history."
    ids = torch.tensor(smollm2.tokenizer.encode([(text, True)]))
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(ids[None]).logits[0]
    torch.testing.assert_close(logits_of(smollm2.decoder, ids), expected, rtol=0, atol=1e-3)


def test_smollm2_rows_have_the_same_bits_alone_and_together(smollm2: LoadedModel) -> None:
    """A row's bits do not depend on how many rows are fed beside it."""
    ids = torch.randint(100, 40000, (64,), generator=torch.Generator().manual_seed(0))

    def logits(rows: int) -> Tensor:
        every = torch.arange(rows)
        return smollm2.decoder.forward(ids[:rows], every, lambda layer, q, k, v: q, every)

    together = logits(64)
    for rows in (1, 2, 3, 7, 31, 33):
        assert torch.equal(logits(rows), together[:rows]), rows
