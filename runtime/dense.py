"""The decoder as plain code: one forward pass over a list of tokens, each with its own position and view.

Nothing is cached, paged or batched here, and nothing is shared with the engine's model: this is what the engine's
logits are compared with. Attention is a [T, T] table of who sees whom, and at which distance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import assert_never

import torch
from torch import Tensor

from anabranch.runtime.config import ModelConfig, RopeConfig


def dense_forward(
    ids: Tensor,
    positions: Tensor,
    visible: Tensor,
    shifts: Tensor,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Logits of every token under an explicit visibility and explicit distances.

    ids, positions: [T], int64
    visible: [T, T], bool; row q marks the keys that token q sees, itself included
    shifts: [T, T], int64; a query at position q sees the key at position p at distance q - p - shift
    weights: by the names of a Hugging Face checkpoint of the family
    Returns [T, vocab] in `dtype`, on the CPU.
    Raises ValueError where shapes disagree, a token doesn't see itself, or a key lies ahead of its query.
    """
    count = ids.shape[0]
    if ids.shape != positions.shape or visible.shape != (count, count) or shifts.shape != (count, count):
        raise ValueError(
            f"ids {tuple(ids.shape)}, positions {tuple(positions.shape)}, visible {tuple(visible.shape)} and "
            f"shifts {tuple(shifts.shape)} do not describe one list of tokens"
        )
    if not bool(visible.diagonal().all()):
        raise ValueError("every token must see itself, or its attention is over nothing")
    distance = positions[:, None] - positions[None, :] - shifts
    if bool((visible & (distance < 0)).any()):
        raise ValueError("a visible key lies ahead of its query")

    def weight(name: str) -> Tensor:
        return weights[name].to(dtype)

    rope = _Rope(config.rope, config.head_dim, dtype)
    x = weight("model.embed_tokens.weight")[ids]
    for layer, window in enumerate(config.sliding_window):
        seen = visible if window is None else visible & (distance < window)
        prefix = f"model.layers.{layer}."
        h = _rms_norm(x, weight(prefix + "input_layernorm.weight"), config.rms_norm_eps)
        x = x + _attention(h, positions, seen, shifts, config, weights, prefix + "self_attn.", rope)
        h = _rms_norm(x, weight(prefix + "post_attention_layernorm.weight"), config.rms_norm_eps)
        gate = _linear(h, weights, prefix + "mlp.gate_proj")
        up = _linear(h, weights, prefix + "mlp.up_proj")
        x = x + _linear(gate * torch.sigmoid(gate) * up, weights, prefix + "mlp.down_proj")
    x = _rms_norm(x, weight("model.norm.weight"), config.rms_norm_eps)
    head = "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"
    return x @ weight(head).T


def _linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """x W^T, and the bias where the checkpoint holds one."""
    out = x @ weights[f"{name}.weight"].to(x.dtype).T
    bias = weights.get(f"{name}.bias")
    return out if bias is None else out + bias.to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x), scaled (Zhang and Sennrich 2019). x: [..., width]."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _attention(
    h: Tensor,
    positions: Tensor,
    seen: Tensor,
    shifts: Tensor,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    prefix: str,
    rope: _Rope,
) -> Tensor:
    """Masked attention, the query turned once for each distinct shift. h: [T, hidden]; returns [T, hidden]."""
    count = h.shape[0]

    q = _linear(h, weights, prefix + "q_proj").view(count, config.num_heads, config.head_dim)
    k = _linear(h, weights, prefix + "k_proj").view(count, config.num_kv_heads, config.head_dim)
    v = _linear(h, weights, prefix + "v_proj").view(count, config.num_kv_heads, config.head_dim)
    if config.qk_norm:
        q = _rms_norm(q, weights[f"{prefix}q_norm.weight"].to(h.dtype), config.rms_norm_eps)
        k = _rms_norm(k, weights[f"{prefix}k_norm.weight"].to(h.dtype), config.rms_norm_eps)
    group = config.num_heads // config.num_kv_heads
    keys = rope.turn(k, positions).repeat_interleave(group, dim=1)
    values = v.repeat_interleave(group, dim=1)
    scores = torch.full((config.num_heads, count, count), -math.inf, dtype=h.dtype)
    for shift in torch.unique(shifts[seen]).tolist():
        here = seen & (shifts == shift)
        turned = rope.turn(q, positions - shift)
        score = torch.einsum("qhd,khd->hqk", turned, keys) / math.sqrt(config.head_dim)
        scores = torch.where(here, score, scores)
    out = torch.einsum("hqk,khd->qhd", torch.softmax(scores, dim=-1), values).reshape(count, -1)
    return _linear(out, weights, prefix + "o_proj")


class _Rope:
    """Rotary positions (Su et al. 2021), in the checkpoint's half-split layout."""

    def __init__(self, rope: RopeConfig, head_dim: int, dtype: torch.dtype) -> None:
        self.frequencies, self.scale = _frequencies(rope, head_dim)
        self.dtype = dtype

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [T, heads, head_dim] to `positions` [T]."""
        angle = positions.double()[:, None] * self.frequencies
        cos = (angle.cos() * self.scale).to(self.dtype)[:, None, :]
        sin = (angle.sin() * self.scale).to(self.dtype)[:, None, :]
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def _frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Radians per position of each pair, [head_dim / 2], and the factor on cos and sin.

    The frequencies are rounded to fp32, as the published code does; the checkpoints were trained with those.
    Sources: `linear` Chen et al. 2023; `llama3` the Llama 3.1 release; `yarn` Peng et al. 2023.
    """
    base = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2).to(torch.float32) / head_dim)
    match rope.kind:
        case "default":
            return base.double(), 1.0
        case "linear":
            return (base / rope.factor).double(), 1.0
        case "llama3":
            turns = rope.original_context * base / (2 * math.pi)
            low, high = rope.low_freq_factor, rope.high_freq_factor
            keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
            return (base * (keep + (1.0 - keep) / rope.factor)).double(), 1.0
        case "yarn":
            return _blend_yarn(rope, base, head_dim).double(), rope.attention_factor
        case "given":
            return torch.tensor(rope.frequencies, dtype=torch.float64), 1.0
        case _:
            assert_never(rope.kind)


def _blend_yarn(rope: RopeConfig, base: Tensor, head_dim: int) -> Tensor:
    """Pairs that turn often in the original context stay, those that turn rarely are stretched, a ramp between."""

    def pair_with_turns(turns: float) -> float:
        return head_dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The published code clamps to head_dim - 1, not to the number of pairs, and keeps the ramp from being empty.
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    stretch = ((torch.arange(head_dim // 2) - first) / (last - first)).clamp(0.0, 1.0)
    return base * (1.0 - stretch) + base / rope.factor * stretch
