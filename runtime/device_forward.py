"""The decoder's layers through the fused operations of `kernels/`, for a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from anabranch.kernels.fixed_linear import fixed_linear
from anabranch.kernels.norms import rms_norm_residual
from anabranch.kernels.swiglu import swiglu_packed
from anabranch.runtime.linear import Linear
from anabranch.runtime.model import Decoder, Layer

Attend: TypeAlias = Callable[[int, Layer, Tensor, Tensor, Tensor], Tensor]
"""attend(number, layer, q, k, v) -> out

q, out: [num_rows, num_heads, head_dim]; k, v: [num_rows, num_kv_heads, head_dim], neither normed nor rotated.
"""


class DeviceForward:
    """Token ids to logits.

    fixed: every linear is `fixed_linear`, so that a row's bits do not depend on how many rows there are
    block_m: its tile
    Raises ValueError for a decoder whose weights are packed for a CPU.
    """

    def __init__(self, decoder: Decoder, *, fixed: bool, block_m: int = 16) -> None:
        self.config = decoder.config
        self._decoder = decoder
        self._fixed = fixed
        self._block_m = block_m
        _ = decoder.lm_head.weight

    def __call__(self, token_ids: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """token_ids: int64 [num_rows]. rows: int64, whose logits are wanted; None for all.

        Returns fp32 [num_rows or len(rows), num_logits of the decoder].
        """
        config, decoder = self.config, self._decoder
        eps = config.rms_norm_eps
        hidden = torch.nn.functional.embedding(token_ids, decoder.embedding)
        count = hidden.shape[0]
        sizes = [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        added: Tensor | None = None
        for number, layer in enumerate(decoder.layers):
            normed, hidden = rms_norm_residual(hidden, added, layer.attention_norm, eps)
            qkv = self._linear(layer.qkv, normed)
            q, k, v = (x.view(count, -1, config.head_dim) for x in torch.split(qkv, sizes, dim=-1))
            added = self._linear(layer.output, attend(number, layer, q, k, v).reshape(count, -1))
            normed, hidden = rms_norm_residual(hidden, added, layer.mlp_norm, eps)
            added = self._linear(layer.down, swiglu_packed(self._linear(layer.gate_up, normed)))
        if rows is not None:
            hidden = hidden.index_select(0, rows)
            added = None if added is None else added.index_select(0, rows)
        normed, _ = rms_norm_residual(hidden, added, decoder.final_norm, eps)
        return self._linear(decoder.lm_head, normed).float()

    def _linear(self, linear: Linear, x: Tensor) -> Tensor:
        if self._fixed:
            return fixed_linear(x, linear.weight, linear.bias, block_m=self._block_m)
        return torch.nn.functional.linear(x, linear.weight, linear.bias)
