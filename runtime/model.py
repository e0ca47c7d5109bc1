"""The decoder of the Llama family in one file, tied to no cache: attention is the caller's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from anabranch.kernels.norms import rms_norm
from anabranch.kernels.swiglu import swiglu
from anabranch.runtime.config import ModelConfig, bad_model
from anabranch.runtime.fixed_shapes import FixedShapes, find_fixed_shapes, tiles
from anabranch.runtime.linear import Linear

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q, k, v) -> out

q, out: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim].
q and k are normed (where the model does that) but not rotated: a query is rotated once per distinct shift in its view.
The callback owns rotation, the cache, visibility and the layer's sliding window; query head h reads key-value head
h // (num_heads / num_kv_heads), and logits are scaled by head_dim ** -0.5.
"""


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer."""

    attention_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """Token ids to logits.

    config: the shape
    weights: by Hugging Face name; each is taken once, cast to `dtype`, packed, and not kept, so a lazy mapping keeps
        the peak at one copy of the model
    dtype: torch.float32 or torch.float64, which `forward` computes in; torch.float16 and torch.bfloat16 for a device
    device: where the weights go
    pack: for a CPU's own linears; False keeps the weights plain, for kernels that read them
    num_logits: how many tokens may be drawn: checkpoints pad the vocabulary beyond their tokenizer's. All by default
    Raises PlanError `bad-model` naming a tensor that is missing or of the wrong shape.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        name: str = "weights",
        pack: bool = True,
        num_logits: int | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"the decoder computes in one of {DTYPES}, not {dtype}")
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)
        self.packed = pack
        self._fixed_shapes: dict[int, FixedShapes] = {}
        take = _Taker(weights, dtype, self.device, name)
        vocab, hidden = config.vocab_size, config.hidden_size
        self.embedding = take("model.embed_tokens.weight", vocab, hidden)
        self.layers = tuple(_layer(config, take, f"model.layers.{i}.", pack) for i in range(config.num_layers))
        self.final_norm = take("model.norm.weight", hidden)
        self.num_logits = vocab if num_logits is None else min(num_logits, vocab)
        head = self.embedding if config.tied_embeddings else take("lm_head.weight", vocab, hidden)
        self.lm_head = Linear(head[: self.num_logits], pack=pack)

    @torch.no_grad()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        logit_rows: Tensor,
        shapes: FixedShapes | None = None,
    ) -> Tensor:
        """Feed `num_tokens` tokens through every layer.

        token_ids: [num_tokens], int64, at least one
        positions: [num_tokens], int64; what rotates them is `attend`'s, and nothing here reads them
        logit_rows: [num_rows], int64, indices of the tokens whose logits are wanted; may be empty
        shapes: sizes that all calls are padded to, so that no row's bits depend on the rows beside it
        Returns [num_rows, num_logits], of the decoder's dtype.
        Raises ValueError if the shapes disagree.
        """
        num_tokens = token_ids.shape[0]
        if num_tokens == 0 or positions.shape != token_ids.shape:
            raise ValueError(f"{num_tokens} token ids and {positions.shape[0]} positions")
        sizes = _sizes(num_tokens, None if shapes is None else shapes.layer_rows)
        padded = sum(sizes)
        hidden = torch.nn.functional.embedding(_pad(token_ids, padded), self.embedding)
        for i, layer in enumerate(self.layers):
            q, k, v = _over(sizes, partial(self._before, layer), hidden)
            attended = attend(i, q[:num_tokens], k[:num_tokens], v[:num_tokens]).reshape(num_tokens, -1)
            (hidden,) = _over(sizes, partial(self._after, layer), hidden, _pad(attended, padded))
        num_rows = logit_rows.shape[0]
        if num_rows == 0:
            return hidden.new_empty(0, self.num_logits)
        sizes = _sizes(num_rows, None if shapes is None else shapes.logit_rows)
        (logits,) = _over(sizes, self._head, _pad(hidden.index_select(0, logit_rows), sum(sizes)))
        return logits[:num_rows]

    def fixed_shapes(self) -> FixedShapes:
        """Sizes of calls that agree bit for bit with the threads that torch has now; measured once for each number.

        Raises PlanError `not-deterministic`.
        """
        threads = torch.get_num_threads()
        if threads not in self._fixed_shapes:
            self._fixed_shapes[threads] = find_fixed_shapes(self)
        return self._fixed_shapes[threads]

    def probe_layer(self, hidden: Tensor) -> Tensor:
        """All that the first layer computes of [num_rows, hidden_size], with queries standing in for the attended.

        Every layer has these shapes. Returns [num_rows, some size].
        """
        rows = hidden.shape[0]
        q, k, v = self._before(self.layers[0], hidden)
        (out,) = self._after(self.layers[0], hidden, q.reshape(rows, -1))
        return torch.cat([q.reshape(rows, -1), k.reshape(rows, -1), v.reshape(rows, -1), out], dim=-1)

    def probe_head(self, hidden: Tensor) -> Tensor:
        """The logits of [num_rows, hidden_size]."""
        return self._head(hidden)[0]

    def _before(self, layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of rows: [num_rows, heads of each, head_dim]."""
        config = self.config
        rows, head_dim = hidden.shape[0], config.head_dim
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        qkv = layer.qkv(rms_norm(hidden, layer.attention_norm, config.rms_norm_eps))
        q, k, v = torch.split(qkv, [q_size, kv_size, kv_size], dim=-1)
        q = q.view(rows, config.num_heads, head_dim)
        k = k.view(rows, config.num_kv_heads, head_dim)
        v = v.view(rows, config.num_kv_heads, head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, config.rms_norm_eps), rms_norm(k, layer.k_norm, config.rms_norm_eps)
        return q, k, v

    def _after(self, layer: Layer, hidden: Tensor, attended: Tensor) -> tuple[Tensor]:
        """The residual stream after the layer."""
        hidden = hidden + layer.output(attended)
        gate, up = layer.gate_up(rms_norm(hidden, layer.mlp_norm, self.config.rms_norm_eps)).chunk(2, dim=-1)
        return (hidden + layer.down(swiglu(gate, up)),)

    def _head(self, hidden: Tensor) -> tuple[Tensor]:
        return (self.lm_head(rms_norm(hidden, self.final_norm, self.config.rms_norm_eps)),)


def _sizes(rows: int, fixed: Sequence[int] | None) -> list[int]:
    """Rows of each call that together hold `rows`: one for all, of at least two, or fixed sizes.

    Packed linears give the same bits to a row for any number of rows but one, so one row is padded to two.
    """
    return [max(rows, 2)] if fixed is None else tiles(rows, fixed)


def _pad(x: Tensor, rows: int) -> Tensor:
    """x with its first row repeated up to `rows` rows."""
    missing = rows - x.shape[0]
    return torch.cat((x, x[:1].expand(missing, *x.shape[1:]))) if missing else x


def _over(sizes: Sequence[int], call: Callable[..., tuple[Tensor, ...]], *rows: Tensor) -> tuple[Tensor, ...]:
    """`call` on that many rows of each tensor at a time."""
    if len(sizes) == 1:
        return call(*rows)
    parts = zip(*(torch.split(x, list(sizes)) for x in rows), strict=True)
    return tuple(map(torch.cat, zip(*(call(*part) for part in parts), strict=True)))


@dataclass(frozen=True, slots=True)
class _Taker:
    """Takes tensors by name, checked and cast."""

    weights: Mapping[str, Tensor]
    dtype: torch.dtype
    device: torch.device
    name: str

    def __call__(self, key: str, *shape: int) -> Tensor:
        try:
            found = self.weights[key]
        except KeyError:
            raise bad_model(self.name, f"tensor `{key}` is missing") from None
        if tuple(found.shape) != shape:
            raise bad_model(self.name, f"tensor `{key}` has shape {list(found.shape)}, expected {list(shape)}")
        return found.to(device=self.device, dtype=self.dtype)


def _layer(config: ModelConfig, take: _Taker, prefix: str, pack: bool) -> Layer:
    hidden, head_dim, ff = config.hidden_size, config.head_dim, config.intermediate_size
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim

    def stacked(sizes: Mapping[str, int], in_features: int, has_bias: bool) -> Linear:
        """Linears of one input, as one."""
        weights = [take(f"{prefix}{name}.weight", size, in_features) for name, size in sizes.items()]
        bias = [take(f"{prefix}{name}.bias", size) for name, size in sizes.items()] if has_bias else None
        return Linear(
            torch.cat(weights) if len(weights) > 1 else weights[0],
            None if bias is None else torch.cat(bias),
            pack=pack,
        )

    return Layer(
        attention_norm=take(f"{prefix}input_layernorm.weight", hidden),
        qkv=stacked(
            {"self_attn.q_proj": q_size, "self_attn.k_proj": kv_size, "self_attn.v_proj": kv_size},
            hidden,
            config.qkv_bias,
        ),
        q_norm=take(f"{prefix}self_attn.q_norm.weight", head_dim) if config.qk_norm else None,
        k_norm=take(f"{prefix}self_attn.k_norm.weight", head_dim) if config.qk_norm else None,
        output=stacked({"self_attn.o_proj": hidden}, q_size, config.output_bias),
        mlp_norm=take(f"{prefix}post_attention_layernorm.weight", hidden),
        gate_up=stacked({"mlp.gate_proj": ff, "mlp.up_proj": ff}, hidden, config.mlp_bias),
        down=stacked({"mlp.down_proj": hidden}, ff, config.mlp_bias),
    )
