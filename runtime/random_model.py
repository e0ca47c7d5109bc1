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
    """Weights by Hugging Face name, fp32, the same for the same seed on every machine."""
    # NumPy's stream, because torch's normal draws depend on the processor's vector width.
    generator = np.random.Generator(np.random.PCG64(seed))

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return torch.from_numpy(generator.standard_normal((rows, columns)) * scale).to(torch.float32)

    def linear(out_features: int, in_features: int, gain: float) -> Tensor:
        """Keeps the size of a vector of unit entries, times `gain`."""
        return normal(out_features, in_features, gain / in_features**0.5)

    hidden, head_dim, ff = config.hidden_size, config.head_dim, config.intermediate_size
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    weights = {"model.embed_tokens.weight": normal(config.vocab_size, hidden, 1.0)}
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}."
        weights |= {
            f"{prefix}input_layernorm.weight": torch.ones(hidden),
            f"{prefix}self_attn.q_proj.weight": linear(q_size, hidden, 1.5),
            f"{prefix}self_attn.k_proj.weight": linear(kv_size, hidden, 1.5),
            f"{prefix}self_attn.v_proj.weight": linear(kv_size, hidden, 1.5),
            f"{prefix}self_attn.o_proj.weight": linear(hidden, q_size, 1.5),
            f"{prefix}post_attention_layernorm.weight": torch.ones(hidden),
            f"{prefix}mlp.gate_proj.weight": linear(ff, hidden, 1.0),
            f"{prefix}mlp.up_proj.weight": linear(ff, hidden, 1.0),
            f"{prefix}mlp.down_proj.weight": linear(hidden, ff, 1.0),
        }
    weights["model.norm.weight"] = torch.ones(hidden)
    weights["lm_head.weight"] = linear(config.vocab_size, hidden, 2.0)
    return weights
