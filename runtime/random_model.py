"""The random test model: small, in memory, and so sensitive that a fault of one position or one token shows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from anabranch.runtime.config import ModelConfig, RopeConfig
from anabranch.runtime.tokenizer import Tokenizer


def random_config(tokenizer: Tokenizer) -> ModelConfig:
    """Three layers with grouped heads. The short rotary base turns every pair visibly from one position to the next."""
    num_layers = 3
    return ModelConfig(
        architecture="llama",
        hidden_size=64,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        vocab_size=tokenizer.vocab_size,
        max_context=1 << 16,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=100.0),
        sliding_window=(None,) * num_layers,
        bos_id=tokenizer.bos_id,
        eos_ids=tuple(sorted(tokenizer.eos_ids)),
    )


def random_weights(config: ModelConfig, tokenizer: Tokenizer, seed: int) -> dict[str, Tensor]:
    """Weights by Hugging Face name, fp32, the same for the same seed on every machine.

    Entry 0 of the residual stream is the same for every token and no layer reads or writes it, so column 0 of the LM
    head acts as a bias: it makes text mostly ASCII and ends a turn now and then.
    """
    # NumPy's stream, because torch's normal draws depend on the processor's vector width.
    generator = np.random.Generator(np.random.PCG64(seed))

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return torch.from_numpy(generator.standard_normal((rows, columns)) * scale).to(torch.float32)

    def linear(out_features: int, in_features: int, gain: float) -> Tensor:
        """Keeps the size of a vector of unit entries, times `gain`."""
        return normal(out_features, in_features, gain / in_features**0.5)

    def reader(out_features: int, gain: float) -> Tensor:
        """Reads the residual stream, except entry 0."""
        weight = linear(out_features, hidden, gain)
        weight[:, 0] = 0
        return weight

    def writer(in_features: int, gain: float) -> Tensor:
        """Writes to the residual stream, except to entry 0."""
        weight = linear(hidden, in_features, gain)
        weight[0] = 0
        return weight

    hidden, head_dim, ff = config.hidden_size, config.head_dim, config.intermediate_size
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    embedding = normal(config.vocab_size, hidden, 1.0)
    embedding[:, 0] = _CONSTANT
    weights = {"model.embed_tokens.weight": embedding}
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}."
        weights |= {
            f"{prefix}input_layernorm.weight": torch.ones(hidden),
            f"{prefix}self_attn.q_proj.weight": reader(q_size, 1.5),
            f"{prefix}self_attn.k_proj.weight": reader(kv_size, 1.5),
            f"{prefix}self_attn.v_proj.weight": reader(kv_size, 1.5),
            f"{prefix}self_attn.o_proj.weight": writer(q_size, 1.5),
            f"{prefix}post_attention_layernorm.weight": torch.ones(hidden),
            f"{prefix}mlp.gate_proj.weight": reader(ff, 1.0),
            f"{prefix}mlp.up_proj.weight": reader(ff, 1.0),
            f"{prefix}mlp.down_proj.weight": writer(ff, 1.0),
        }
    weights["model.norm.weight"] = torch.ones(hidden)
    lm_head = linear(config.vocab_size, hidden, 2.0)
    # End-of-turn tokens vary less from place to place than others, so that no text ends at once and none never does.
    lm_head[sorted(tokenizer.eos_ids)] *= 0.5
    lm_head[:, 0] = torch.tensor([_bias(tokenizer, i) for i in range(config.vocab_size)])
    weights["lm_head.weight"] = lm_head
    return weights


# Large beside the other entries, which are near 1, so that what remains of it after the final norm hardly varies.
_CONSTANT = 4.0


def _bias(tokenizer: Tokenizer, id: int) -> float:
    """Added to a token's logit, up to the factor (near 2) that the final norm leaves of `_CONSTANT`."""
    if id in tokenizer.eos_ids:
        return 1.7
    if tokenizer.is_special(id):
        return -3.0
    text = tokenizer.token_bytes(id)
    if len(text) == 1 and not (text.isalnum() or text in b" \n.,:;"):
        return -2.0 if text[0] >= 0x80 or text[0] < 0x20 else -0.5
    return 0.5
