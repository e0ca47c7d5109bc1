"""The reference's dense forward against transformers, on tiny random configurations of each family member."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import AutoConfig

from anabranch.runtime.config import ModelConfig
from anabranch.runtime.dense import dense_forward

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

MEMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("llama", {"num_key_value_heads": 4}),
    "llama 3": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "num_attention_heads": 6, "head_dim": 8, "hidden_size": 48}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 7, "head_dim": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, yarn": ("qwen3", {"head_dim": 16, "rope_parameters": {**YARN, "truncate": False, "beta_fast": 16.0}}),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_equals_transformers(member: str) -> None:
    """On one plain sequence the dense forward gives the logits of transformers."""
    model_type, changes = MEMBERS[member]
    torch.manual_seed(20)
    config = AutoConfig.for_model(model_type, **{**TINY, **changes})
    theirs = AutoModelForCausalLM.from_config(config).to(torch.float64).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(0, config.vocab_size, (24,))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    visible = torch.ones(24, 24, dtype=torch.bool).tril()
    ours = dense_forward(
        ids,
        torch.arange(24),
        visible,
        torch.zeros(24, 24, dtype=torch.int64),
        ModelConfig.from_hf(config.to_dict()),
        theirs.state_dict(),
    )
    # transformers computes the angles in fp32, whatever the weights' dtype.
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
