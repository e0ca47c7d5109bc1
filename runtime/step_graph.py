"""The model's step as a `torch.export` program over the custom ops: a decode step, or a chunk of prefill.

A program holds the weights and the rotary factors, and takes everything else: the rows, the KV pools, which it writes
to in place, and the lists that say who sees what. So it knows no views or plans, and one program serves them all.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from anabranch import __version__
from anabranch.dsl.diagnostics import Diagnostic, PlanError
from anabranch.kernels.merge_states import merge_parts
from anabranch.kernels.rope_append import rope_append
from anabranch.kernels.segment_attention import MAX_PAGES, TASK_FIELDS, segment_attention
from anabranch.kernels.segment_prefill import BLOCK_FIELDS, SPAN_FIELDS, segment_prefill
from anabranch.runtime.attention import Block
from anabranch.runtime.config import ModelConfig
from anabranch.runtime.device import (
    Device,
    PrefillLists,
    check_supported,
    decode_rows,
    numbered,
    places,
    rotary_factors,
    windows,
)
from anabranch.runtime.device_forward import Attend, DeviceForward, HeadNorms
from anabranch.runtime.linear import Linear
from anabranch.runtime.model import Decoder, Layer

Kind: TypeAlias = Literal["decode", "prefill"]
Inputs: TypeAlias = dict[str, Any]
"""Arguments of a program by name: tensors, and a list of pools for each of `k` and `v`."""

FORMAT = 1
MANIFEST = "anabranch.json"
"""The file inside a `.pt2` that says what made it."""


def export_step(
    decoder: Decoder, kind: Kind, *, page_size: int = 16, block_m: int = 64, deterministic: bool = False
) -> ExportedProgram:
    """A step of the model as a program.

    decoder: with plain weights (`pack=False`)
    kind: `decode` for `DecodeStep`, whose rows see their views by tasks; `prefill` for `PrefillStep`
    page_size: of the pools
    block_m: rows x query heads a tile of decode attention, as in `segment_attention`; a task of the lists holds at most
        block_m // (num_heads / num_kv_heads) rows
    deterministic: every linear is `fixed_linear`, so that a row's bits do not depend on how many rows there are
    Arguments are those of the `forward` of either. Rows, wanted rows, pages of the pools, tasks, blocks, spans and the
    entries of every list are dynamic, each at least 1; the layers, heads, page size and tile are not. `row_parts` has
    as many entries as there are partial states.
    Raises ValueError for a decoder or page size that the kernels do not support, or whose weights are packed.
    """
    check_supported(decoder, page_size)
    config = decoder.config
    rows, pages, entries = Dim("rows", min=1), Dim("pages", min=1, max=MAX_PAGES), Dim("entries", min=1)
    pools = [{0: pages}] * config.num_layers
    # Sizes of an example are not those of any other list, and none is 1, which would be taken for a constant.
    example = _rows(config, decoder, page_size)
    dynamic: dict[str, Any] = {name: {0: rows} for name in ("token_ids", "positions", "slots")}
    dynamic |= {"k": pools, "v": pools, "task_pages": {0: entries}, "page_start": {0: entries}}
    step: nn.Module
    if kind == "decode":
        step = DecodeStep(decoder, block_m, fixed=deterministic)
        example |= _ints(
            decoder, tasks=(5, TASK_FIELDS), num_tasks=(1,), task_rows=(7,), task_pages=(6,), page_start=(6,)
        )
        example |= _ints(decoder, segment_length=(3,), row_parts_indptr=(4,), row_parts=(9,))
        dynamic |= {"tasks": {0: Dim("tasks", min=1)}, "num_tasks": None, "task_rows": {0: Dim("task_rows", min=1)}}
        dynamic |= {
            "segment_length": {0: rows},
            "row_parts_indptr": {0: rows + 1},
            "row_parts": {0: Dim("parts", min=1)},
        }
    else:
        step = PrefillStep(decoder, fixed=deterministic)
        example |= _ints(decoder, blocks=(5, BLOCK_FIELDS), num_blocks=(1,), spans=(7, SPAN_FIELDS))
        example |= _ints(decoder, task_pages=(6,), page_start=(6,))
        example["logit_rows"] = torch.zeros(2, dtype=torch.int64, device=decoder.device)
        dynamic |= {"blocks": {0: Dim("blocks", min=1)}, "num_blocks": None, "spans": {0: Dim("spans", min=1)}}
        dynamic |= {"logit_rows": {0: Dim("wanted", min=1)}}
    with torch.no_grad():
        return torch.export.export(step, (), example, dynamic_shapes=dynamic, strict=False)


class _Step(nn.Module):
    """The weights of a decoder, by the names that a program shows."""

    cos: Tensor
    sin: Tensor
    embedding: Tensor
    final_norm: Tensor

    def __init__(self, decoder: Decoder, *, fixed: bool = False) -> None:
        super().__init__()
        self.config = decoder.config
        self.fixed = fixed
        self.scale = decoder.config.head_dim**-0.5
        self.windows = windows(decoder.config)
        self.num_logits = decoder.num_logits
        cos, sin = rotary_factors(decoder.config, decoder.device)
        head = decoder.lm_head.weight
        # A head that is the embedding is stored once; one that is part of a tensor is copied: files hold whole ones.
        tied = head.data_ptr() == decoder.embedding.data_ptr()
        whole = head.untyped_storage().nbytes() == head.nbytes
        self.lm_head = None if tied else _LinearWeights(Linear(head if whole else head.clone(), pack=False))
        self.layers = nn.ModuleList(_LayerWeights(layer) for layer in decoder.layers)
        for name, of in (
            ("cos", cos),
            ("sin", sin),
            ("embedding", decoder.embedding),
            ("final_norm", decoder.final_norm),
        ):
            self.register_buffer(name, of)

    def run(self, token_ids: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None) -> Tensor:
        """The layers, with attention by `attend`: fp32 [num_rows or len(rows), num_logits]."""
        layers = tuple(cast(_LayerWeights, layer).layer() for layer in self.layers)
        head = Linear(self.embedding[: self.num_logits], pack=False) if self.lm_head is None else self.lm_head.linear()
        weights = _Weights(self.config, self.embedding, layers, self.final_norm, head)
        return DeviceForward(weights, fixed=self.fixed)(token_ids, positions, attend, rows)

    def append(
        self, norms: HeadNorms, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor,
        k_pool: Tensor, v_pool: Tensor,
    ) -> Tensor:  # fmt: skip
        """Write a layer's keys and values; returns the queries as attention takes them."""
        return rope_append(
            q, k, v, positions, slots, self.cos, self.sin, k_pool, v_pool,
            q_norm=norms.q_norm, k_norm=norms.k_norm, eps=self.config.rms_norm_eps,
        )  # fmt: skip


class DecodeStep(_Step):
    """One token of each row, which sees its view by the tasks of `segment_attention`."""

    def __init__(self, decoder: Decoder, block_m: int, *, fixed: bool = False) -> None:
        super().__init__(decoder, fixed=fixed)
        self.block_m = block_m

    def forward(
        self, token_ids: Tensor, positions: Tensor, slots: Tensor, k: Sequence[Tensor], v: Sequence[Tensor],
        tasks: Tensor, num_tasks: Tensor, task_rows: Tensor, task_pages: Tensor, page_start: Tensor,
        segment_length: Tensor, row_parts_indptr: Tensor, row_parts: Tensor,
    ) -> Tensor:  # fmt: skip
        """token_ids: [num_rows], int64; positions: [num_rows], int32; slots: [num_rows], int64, -1 to write nothing

        k, v: a pool for each layer, [num_pages, num_kv_heads, page_size, head_dim], of the weights' dtype; written to
        tasks .. page_start: as in `segment_attention`; segment_length: [num_rows], int32
        row_parts_indptr: [num_rows + 1], row_parts, as in `merge_parts`: each partial state is named by one entry
        Returns logits, fp32 [num_rows, num_logits].
        """
        # Said before anything else, so that tracing knows it, and one row is no case of its own.
        if row_parts_indptr.shape[0] != token_ids.shape[0] + 1:
            raise ValueError(f"row_parts_indptr has {row_parts_indptr.shape[0]} entries, not num_rows + 1")

        def attend(number: int, norms: HeadNorms, q: Tensor, new_k: Tensor, new_v: Tensor) -> Tensor:
            q = self.append(norms, q, new_k, new_v, positions, slots, k[number], v[number])
            out, lse = segment_attention(
                q, positions, k[number], v[number], self.cos, self.sin, tasks, num_tasks, task_rows, task_pages,
                page_start, segment_length, num_parts=row_parts.shape[0], scale=self.scale,
                window=self.windows[number], block_m=self.block_m,
            )  # fmt: skip
            return merge_parts(out, lse, row_parts_indptr, row_parts, q.dtype)[0]

        return self.run(token_ids, positions, attend, None)


class PrefillStep(_Step):
    """Blocks of rows, each against its own view by `segment_prefill`."""

    def forward(
        self, token_ids: Tensor, positions: Tensor, slots: Tensor, logit_rows: Tensor, k: Sequence[Tensor],
        v: Sequence[Tensor], blocks: Tensor, num_blocks: Tensor, spans: Tensor, task_pages: Tensor, page_start: Tensor,
    ) -> Tensor:  # fmt: skip
        """token_ids, positions, slots, k, v: as in `DecodeStep`; each row is in one block

        logit_rows: [num_wanted], int64: the rows whose logits are wanted
        blocks .. page_start: as in `segment_prefill`
        Returns logits, fp32 [num_wanted, num_logits].
        """

        def attend(number: int, norms: HeadNorms, q: Tensor, new_k: Tensor, new_v: Tensor) -> Tensor:
            q = self.append(norms, q, new_k, new_v, positions, slots, k[number], v[number])
            out, _ = segment_prefill(
                q, positions, k[number], v[number], self.cos, self.sin, blocks, num_blocks, spans, task_pages,
                page_start, scale=self.scale, window=self.windows[number],
            )  # fmt: skip
            return out

        return self.run(token_ids, positions, attend, logit_rows)


def decode_inputs(device: Device, blocks: Sequence[Block], token_ids: Sequence[int]) -> Inputs:
    """The arguments of a `decode` program for rows of an engine's device; the pools are the device's own.

    blocks: one row each, whose slot the segment holds already
    Raises ValueError for a block of several rows, and for rows that do not fit one set of lists.
    """
    if any(block.count != 1 for block in blocks):
        raise ValueError("a decode step has blocks of one row")
    groups = device.lists_for(decode_rows(blocks))
    if len(groups) != 1:
        raise ValueError(f"{len(blocks)} rows do not fit one set of lists: feed fewer at a time")
    [(_, lists)] = groups
    planned = lists.planned
    lengths = [block.first + 1 for block in blocks]
    return _row_inputs(device, blocks, token_ids) | {
        "tasks": lists.tasks[: planned.tasks],
        "num_tasks": lists.num_tasks,
        "task_rows": lists.task_rows[: planned.task_rows],
        "task_pages": lists.task_pages[: planned.pages],
        "page_start": lists.page_start[: planned.pages],
        "segment_length": torch.tensor(lengths, dtype=torch.int32, device=device.device),
        "row_parts_indptr": lists.indptr[: len(blocks) + 1],
        "row_parts": lists.row_parts[: planned.parts],
    }


def prefill_inputs(device: Device, blocks: Sequence[Block], token_ids: Sequence[int], wanted: Sequence[int]) -> Inputs:
    """The arguments of a `prefill` program for rows of an engine's device; the pools are the device's own.

    blocks: rows whose slots the segments hold already; wanted: the rows whose logits are wanted
    """
    lists = PrefillLists(list(numbered(blocks)), device.page_size, device.device)
    return _row_inputs(device, blocks, token_ids) | {
        "logit_rows": torch.tensor(wanted, dtype=torch.int64, device=device.device),
        "blocks": lists.blocks,
        "num_blocks": lists.num_blocks,
        "spans": lists.spans,
        "task_pages": lists.task_pages,
        "page_start": lists.page_start,
    }


def save(program: ExportedProgram, path: str | Path, *, fingerprint: str) -> None:
    """Write a program, weights and all, as a `.pt2` file, and see to it that it is on the disk.

    fingerprint: of the model, as in `LoadedModel`
    Raises OSError if it can't be written; the file is then cut off.
    """
    manifest = {"format": FORMAT, "anabranch": __version__, "torch": torch.__version__, "fingerprint": fingerprint}
    with _Out(io.FileIO(path, "w")) as file:
        try:
            torch.export.save(program, file, extra_files={MANIFEST: json.dumps(manifest)})
        except RuntimeError:
            if file.failed is not None:
                raise file.failed from None
            raise
        file.flush()
        os.fsync(file.fileno())


def load(path: str | Path, *, fingerprint: str) -> ExportedProgram:
    """Read what `save` wrote. A `.pt2` file can hold pickled objects: load only what you trust.

    fingerprint: of the model that the program must be of
    Raises PlanError: no-such-file; bad-program if the file is damaged or something else, or was made of another model
    or by another version of Anabranch.
    """
    path = Path(path)
    if not path.is_file():
        raise PlanError(Diagnostic("no-such-file", f"there is no file `{path}`", help="check the path"))
    _check_manifest(path, fingerprint)
    try:
        return torch.export.load(str(path))
    except (RuntimeError, ValueError, KeyError, AttributeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise _bad_program(path, f"torch {torch.__version__} cannot load it: {reason}") from error


def _check_manifest(path: Path, fingerprint: str) -> None:
    """Raise PlanError unless the file says that it is a program of this model and version."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(f"/extra/{MANIFEST}")]
            manifest = json.loads(archive.read(names[0])) if names else None
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise _bad_program(path, f"it is damaged, or no `.pt2` file ({error})") from error
    if not isinstance(manifest, Mapping) or manifest.get("format") != FORMAT:
        raise _bad_program(path, "it holds no manifest of a step")
    if manifest.get("anabranch") != __version__:
        raise _bad_program(path, f"it was made by version {manifest.get('anabranch')}, and this is {__version__}")
    if manifest.get("fingerprint") != fingerprint:
        raise _bad_program(path, f"it is of the model {manifest.get('fingerprint')}, not {fingerprint}")


def _bad_program(path: Path, reason: str) -> PlanError:
    return PlanError(
        Diagnostic("bad-program", f"cannot use the program `{path}`: {reason}", help="export the model's step again")
    )


class _Out(io.BufferedWriter):
    """A file that keeps why it could not be written: torch's writer tells it in text alone."""

    failed: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


@dataclass(frozen=True, slots=True)
class _Weights:
    """A decoder as `DeviceForward` reads it."""

    config: ModelConfig
    embedding: Tensor
    layers: tuple[Layer, ...]
    final_norm: Tensor
    lm_head: Linear


class _LinearWeights(nn.Module):
    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight)
        self.register_buffer("bias", linear.bias)

    def linear(self) -> Linear:
        return Linear(self.weight, self.bias, pack=False)


class _LayerWeights(nn.Module):
    attention_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    mlp_norm: Tensor

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        for name in ("attention_norm", "q_norm", "k_norm", "mlp_norm"):
            self.register_buffer(name, getattr(layer, name))
        self.qkv, self.output = _LinearWeights(layer.qkv), _LinearWeights(layer.output)
        self.gate_up, self.down = _LinearWeights(layer.gate_up), _LinearWeights(layer.down)

    def layer(self) -> Layer:
        return Layer(
            attention_norm=self.attention_norm,
            qkv=self.qkv.linear(),
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            output=self.output.linear(),
            mlp_norm=self.mlp_norm,
            gate_up=self.gate_up.linear(),
            down=self.down.linear(),
        )


def _rows(config: ModelConfig, decoder: Decoder, page_size: int) -> Inputs:
    """Rows and pools of an example."""
    shape = (4, config.num_kv_heads, page_size, config.head_dim)
    pools = [[torch.zeros(shape, dtype=decoder.dtype, device=decoder.device) for _ in decoder.layers] for _ in "kv"]
    ids = torch.zeros(3, dtype=torch.int64, device=decoder.device)
    return {"token_ids": ids, "slots": ids.clone(), "k": pools[0], "v": pools[1]} | _ints(decoder, positions=(3,))


def _ints(decoder: Decoder, **shapes: tuple[int, ...]) -> Inputs:
    return {name: torch.zeros(shape, dtype=torch.int32, device=decoder.device) for name, shape in shapes.items()}


def _row_inputs(device: Device, blocks: Sequence[Block], token_ids: Sequence[int]) -> Inputs:
    slots, positions = places(blocks, device.device)
    ids = torch.tensor(token_ids, dtype=torch.int64, device=device.device)
    return {"token_ids": ids, "positions": positions, "slots": slots, "k": device.store.k, "v": device.store.v}
