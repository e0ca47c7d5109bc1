"""A step of the decoder as a plain function of tensors: no views, no pages, no writing in place.

`DenseStep` takes the KV pool and gives it back, and attends by gathering the step's keys and masking what a row does
not see. It is what `compiler/mlir.py` lowers: every operation is plain aten. `dense_inputs` is the host's part, which
turns views into indices and masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from anabranch.runtime.attention import Block
from anabranch.runtime.model import Decoder
from anabranch.runtime.rope import rope_table


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a step is told of its rows. R rows, K keys that any of them sees, S shifts, W windows of the model's layers.

    R, K, S and N are at least two, since torch exports a program with open sizes for those alone: a lone row is there
    twice, a lone key and shift have a masked one beside them.

    token_ids: [R]; slots: [R], where their keys and values go; positions: [R]; all int64
    shifted: [S, R], int64, positions less each shift
    keys: [K], int64, slots in the order of the views, each once
    mask: [W, S, R, K], of the decoder's dtype: 0 where a row sees a key under a shift, -inf elsewhere
    wanted: [N], int64, rows whose logits are wanted
    num_wanted: how many of `wanted` were asked for; the others fill it up
    """

    token_ids: Tensor
    positions: Tensor
    shifted: Tensor
    slots: Tensor
    keys: Tensor
    mask: Tensor
    wanted: Tensor
    num_wanted: int

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order in which `DenseStep` takes them."""
        return (self.token_ids, self.positions, self.shifted, self.slots, self.keys, self.mask, self.wanted)


def dense_inputs(
    decoder: Decoder, blocks: Sequence[Block], token_ids: Sequence[int], wanted: Sequence[int]
) -> StepInputs:
    """The inputs of a step over `blocks`, whose slots the segments hold already.

    token_ids: one for each row, in the order of the blocks
    Raises ValueError for another number of ids, and for none.
    """
    slots: list[int] = []
    positions: list[int] = []
    seen: list[list[tuple[int, int, int]]] = []
    for block in blocks:
        before = [] if block.view is None else [entry for link in block.view.chain() for entry in link.entries]
        above = [
            (entry.segment.slot(index), entry.segment.start + index, entry.shift)
            for entry in before
            for index in range(entry.segment.length)
        ]
        segment = block.segment
        own = [(segment.slot(index), segment.start + index, 0) for index in range(block.first + block.count)]
        for index in range(block.first, block.first + block.count):
            slots.append(segment.slot(index))
            positions.append(segment.start + index)
            seen.append(above + own[: index + 1])
    if not slots or len(token_ids) != len(slots):
        raise ValueError(f"{len(token_ids)} token ids for {len(slots)} rows")
    if len(slots) == 1:
        slots, positions, seen, token_ids = slots * 2, positions * 2, seen * 2, [*token_ids] * 2
    column: dict[int, int] = {}
    plane: dict[int, int] = {0: 0}
    for row in seen:
        for slot, _, shift in row:
            column.setdefault(slot, len(column))
            plane.setdefault(shift, len(plane))
    windows = _windows(decoder)
    keys, shifts = [*column], [*plane]
    keys += keys if len(keys) < 2 else []
    shifts += [0] if len(shifts) < 2 else []
    mask = torch.full((len(windows), len(shifts), len(slots), len(keys)), float("-inf"), dtype=decoder.dtype)
    for number, row in enumerate(seen):
        for slot, position, shift in row:
            distance = positions[number] - position - shift
            for place, window in enumerate(windows):
                if window is None or distance < window:
                    mask[place, plane[shift], number, column[slot]] = 0
    at = torch.tensor(positions, dtype=torch.int64)
    # A row that sees nothing under a shift may come out below 0 there; any position will do, since all is masked.
    shifted = (at[None, :] - torch.tensor(shifts)[:, None]).clamp(min=0)
    return StepInputs(
        torch.tensor(list(token_ids), dtype=torch.int64),
        at,
        shifted,
        torch.tensor(slots, dtype=torch.int64),
        torch.tensor(keys, dtype=torch.int64),
        mask,
        torch.tensor([*wanted, *[0] * (2 - len(wanted))], dtype=torch.int64),
        len(wanted),
    )


def dense_weights(decoder: Decoder) -> dict[str, Tensor]:
    """The weights that `DenseStep` takes, by name; linears are [in_features, out_features], as a product reads them.

    `cos` and `sin` are the rotary tables, [max_context, head_dim].
    Raises ValueError for a decoder whose weights are packed for a CPU.
    """
    config = decoder.config
    every = torch.arange(config.max_context, dtype=torch.int64)
    cos, sin = rope_table(config.rope, config.head_dim, every, decoder.dtype)
    found = {"cos": cos, "sin": sin, "embedding": decoder.embedding}
    for number, layer in enumerate(decoder.layers):
        for name in ("attention_norm", "q_norm", "k_norm", "mlp_norm"):
            norm = getattr(layer, name)
            if norm is not None:
                found[f"{number}.{name}"] = norm
        for name in ("qkv", "output", "gate_up", "down"):
            linear = getattr(layer, name)
            found[f"{number}.{name}"] = linear.weight.T.contiguous()
            if linear.bias is not None:
                found[f"{number}.{name}.bias"] = linear.bias
    return found | {"final_norm": decoder.final_norm, "lm_head": decoder.lm_head.weight.T.contiguous()}


class DenseStep(torch.nn.Module):
    """Token ids to logits, with the KV pool passed through. It holds no weights: they are arguments."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.config = decoder.config
        windows = _windows(decoder)
        layers = decoder.config.sliding_window or (None,) * decoder.config.num_layers
        self.window_of = [windows.index(window) for window in layers]

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        shifted: Tensor,
        slots: Tensor,
        keys: Tensor,
        mask: Tensor,
        wanted: Tensor,
        k_pool: list[Tensor],
        v_pool: list[Tensor],
        weights: dict[str, Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The first arguments are those of `StepInputs`.

        k_pool, v_pool: for each layer [num_kv_heads, num_slots, head_dim], as `KvStore` has them
        weights: of `dense_weights`
        Returns logits [N, num_logits], and the pools with the rows' keys and values written.
        """
        config, eps = self.config, self.config.rms_norm_eps
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        cos, sin = weights["cos"], weights["sin"]
        own_cos, own_sin = cos[positions][:, None], sin[positions][:, None]
        turned_cos, turned_sin = cos[shifted][:, :, None], sin[shifted][:, :, None]
        k_out: list[Tensor] = []
        v_out: list[Tensor] = []
        hidden = torch.nn.functional.embedding(token_ids, weights["embedding"])
        for i in range(config.num_layers):
            qkv = _linear(_rms_norm(hidden, weights[f"{i}.attention_norm"], eps), weights, f"{i}.qkv")
            q = qkv[:, :q_size].reshape(-1, config.num_heads, config.head_dim)
            k = qkv[:, q_size : q_size + kv_size].reshape(-1, config.num_kv_heads, config.head_dim)
            v = qkv[:, q_size + kv_size :].reshape(-1, config.num_kv_heads, config.head_dim)
            if config.qk_norm:
                q, k = _rms_norm(q, weights[f"{i}.q_norm"], eps), _rms_norm(k, weights[f"{i}.k_norm"], eps)
            k_out.append(torch.index_copy(k_pool[i], 1, slots, _rotate(k, own_cos, own_sin).transpose(0, 1)))
            v_out.append(torch.index_copy(v_pool[i], 1, slots, v.transpose(0, 1)))
            attended = self._attend(
                _rotate(q[None], turned_cos, turned_sin),
                torch.index_select(k_out[i], 1, keys),
                torch.index_select(v_out[i], 1, keys),
                mask[self.window_of[i]],
            )
            hidden = hidden + _linear(attended, weights, f"{i}.output")
            gate_up = _linear(_rms_norm(hidden, weights[f"{i}.mlp_norm"], eps), weights, f"{i}.gate_up")
            gate, up = gate_up[:, : config.intermediate_size], gate_up[:, config.intermediate_size :]
            hidden = hidden + _linear(gate * torch.sigmoid(gate) * up, weights, f"{i}.down")
        rows = torch.index_select(hidden, 0, wanted)
        return _linear(_rms_norm(rows, weights["final_norm"], eps), weights, "lm_head"), k_out, v_out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """One softmax over every (shift, key) that a row sees.

        q: [S, R, num_heads, head_dim]; k, v: [num_kv_heads, K, head_dim]; mask: [S, R, K]
        Returns [R, num_heads * head_dim].
        """
        heads, head_dim = self.config.num_kv_heads, self.config.head_dim
        group = self.config.num_heads // heads
        shifts, rows, keys = mask.shape
        # torch-mlir splits and joins dimensions of unknown size only where each of the reshaped groups has one of them.
        turned = (
            q.reshape(shifts, rows, heads, group, head_dim)
            .permute(2, 0, 1, 3, 4)
            .reshape(heads * shifts, rows * group, head_dim)
        )
        each = k.transpose(1, 2)[:, None].expand(heads, shifts, head_dim, keys).reshape(heads * shifts, head_dim, keys)
        scores = torch.bmm(turned, each).reshape(heads, shifts, rows * group, keys)
        scores = scores.reshape(heads, shifts, rows, group, keys) * head_dim**-0.5 + mask[None, :, :, None]
        shares = torch.exp(scores - scores.amax((1, 4), keepdim=True))
        shares = (shares / shares.sum((1, 4), keepdim=True)).sum(1)
        out = torch.bmm(shares.reshape(heads, rows * group, keys), v).reshape(heads, rows, group * head_dim)
        return out.transpose(0, 1).reshape(rows, heads * group * head_dim)


def export_dense_step(decoder: Decoder, weights: dict[str, Tensor], num_slots: int) -> ExportedProgram:
    """`DenseStep` as an exported program, whose numbers of rows, keys, shifts and wanted rows may change.

    weights: of `dense_weights`
    num_slots: of the KV pool
    """
    config, dtype = decoder.config, decoder.dtype
    rows, keys, shifts, wanted = Dim("rows"), Dim("keys"), Dim("shifts"), Dim("wanted")
    # Distinct sizes above 1: a size of 1 would be taken for a constant, and equal ones for one and the same.
    example = (
        *(torch.zeros(sizes, dtype=torch.int64) for sizes in ((3,), (3,), (2, 3))),
        torch.arange(3),
        torch.zeros(5, dtype=torch.int64),
        torch.zeros(len(_windows(decoder)), 2, 3, 5, dtype=dtype),
        torch.zeros(4, dtype=torch.int64),
    )
    # Tensors of their own: one that is given twice is exported as one input, and the other places are not read.
    pools = [
        [torch.empty(config.num_kv_heads, num_slots, config.head_dim, dtype=dtype) for _ in range(config.num_layers)]
        for _ in range(2)
    ]
    dynamic: tuple[object, ...] = (
        {0: rows}, {0: rows}, {0: shifts, 1: rows}, {0: rows}, {0: keys}, {1: shifts, 2: rows, 3: keys}, {0: wanted},
        [{}] * config.num_layers, [{}] * config.num_layers, {name: {} for name in weights},
    )  # fmt: skip
    return torch.export.export(DenseStep(decoder), (*example, *pools, weights), dynamic_shapes=dynamic, strict=False)


def _windows(decoder: Decoder) -> list[int | None]:
    """The windows of the layers, each once."""
    layers = decoder.config.sliding_window or (None,) * decoder.config.num_layers
    return list(dict.fromkeys(layers))


def _linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    out = x @ weights[name]
    bias = weights.get(f"{name}.bias")
    return out if bias is None else out + bias


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `kernels.rope.rotate`, for any leading dimensions that the tables broadcast to."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin
