"""An engine's steps through exported programs: a decoder that is two programs, and the device that calls them.

`step_graph.export_step` makes the programs. One decodes rows and one prefills blocks, so a step that does both is two
calls, where the layers of a `Device` take all rows at once. Where rows of one thread need both, those that come first
are called first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from anabranch.runtime.attention import Block
from anabranch.runtime.config import ModelConfig
from anabranch.runtime.device import (
    Device,
    DeviceLists,
    DeviceStep,
    PrefillLists,
    Reads,
    decode_rows,
    numbered,
    parts_of,
    places,
    runs_read,
)
from anabranch.runtime.drawing import upload
from anabranch.runtime.fixed_shapes import FixedShapes, not_deterministic
from anabranch.runtime.model import DecoderLike


@dataclass(frozen=True, slots=True)
class ProgramDecoder:
    """What an engine needs of a model, as two programs. It is a `DecoderLike` whose attention is inside.

    config, dtype, device, num_logits: as in `DecoderLike`
    page_size, block_m, deterministic: what the programs were exported with
    run_decode, run_prefill: the programs, called with the arguments of `DecodeStep` and `PrefillStep` by name
    """

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    num_logits: int
    page_size: int
    block_m: int
    deterministic: bool
    run_decode: Callable[..., Tensor]
    run_prefill: Callable[..., Tensor]
    packed: bool = False

    def forward(self, *_: object, **__: object) -> NoReturn:
        """Raises TypeError: attention is inside the programs, and can't be the caller's."""
        raise TypeError("a decoder of programs does not call attention back: an engine runs it on a `ProgramDevice`")

    def fixed_shapes(self) -> FixedShapes:
        """Raises PlanError `not-deterministic`: programs keep a row's bits by their linears, not by sizes of calls."""
        raise not_deterministic("a program has no sizes of calls to choose from")


class ProgramDevice(Device):
    """The device side of an engine whose model is programs.

    Raises ValueError as `Device` does, and where pages are not of the programs' size, and PlanError
    `not-deterministic` for programs that were not exported for that.
    """

    def bind(self, decoder: DecoderLike, lanes: int) -> None:
        """Take the decoder's programs, and the tile that is in them."""
        if not isinstance(decoder, ProgramDecoder):
            raise TypeError(f"a `ProgramDevice` runs a `ProgramDecoder`, not {type(decoder).__name__}")
        if decoder.page_size != self.page_size:
            raise ValueError(f"the programs work on pages of {decoder.page_size} tokens, not {self.page_size}")
        if self.deterministic and not decoder.deterministic:
            raise not_deterministic("the programs were exported without it")
        self.decoder = decoder
        self.block_m = decoder.block_m

    def step(self, blocks: Sequence[Block]) -> DeviceStep:
        """The rows of `blocks`, whose slots the segments hold already."""
        return ProgramStep(self, blocks)

    @torch.no_grad()
    def decode(
        self, token_ids: Tensor, positions: Tensor, slots: Tensor, lists: DeviceLists, lengths: Tensor, num_parts: int
    ) -> Tensor:
        """As `Device.decode`, by one call of the program."""
        rows = token_ids.shape[0]
        return self.decoder.run_decode(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            k=self.store.k,
            v=self.store.v,
            tasks=lists.tasks,
            num_tasks=lists.num_tasks,
            task_rows=lists.task_rows,
            task_pages=lists.task_pages,
            page_start=lists.page_start,
            segment_length=lengths,
            row_parts_indptr=lists.indptr[: rows + 1],
            row_parts=lists.row_parts[:num_parts],
        )

    @torch.no_grad()
    def prefill(
        self, token_ids: Tensor, positions: Tensor, slots: Tensor, lists: PrefillLists, wanted: Sequence[int]
    ) -> Tensor:
        """Feed blocks of rows: fp32 [len(wanted), num_logits] of the rows `wanted`, of which there is at least one."""
        return self.decoder.run_prefill(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            logit_rows=upload(torch.tensor(wanted, dtype=torch.int64), self.device),
            k=self.store.k,
            v=self.store.v,
            blocks=lists.blocks,
            num_blocks=lists.num_blocks,
            spans=lists.spans,
            task_pages=lists.task_pages,
            page_start=lists.page_start,
        )


@dataclass(slots=True)
class _Call:
    """Rows of a step that one call of a program feeds: blocks, each with the number of its first row in the step."""

    decodes: bool
    blocks: list[tuple[int, Block]]

    def rows(self) -> list[int]:
        """The numbers of its rows in the step, in its own order."""
        return [first + offset for first, block in self.blocks for offset in range(block.count)]


class ProgramStep:
    """One step's rows, as calls of the programs. Which rows decode is as in `StepOnDevice`."""

    def __init__(self, device: ProgramDevice, blocks: Sequence[Block]) -> None:
        self._device = device
        self._calls = _calls(blocks, by_origin=device.deterministic)
        self.num_rows = sum(block.count for block in blocks)

    def logits(self, tokens: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """fp32 [len(wanted), num_logits] of the rows `wanted`."""
        device = self._device
        found = torch.empty(len(wanted), device.decoder.num_logits, dtype=torch.float32, device=device.device)
        for call in self._calls:
            rows = call.rows()
            own = {row: number for number, row in enumerate(rows)}
            # Where this call's rows stand among the wanted ones, and which of its own they are.
            into = [number for number, row in enumerate(wanted) if row in own]
            of = [own[wanted[number]] for number in into]
            logits = self._run(call, [tokens[row] for row in rows], of)
            if into:
                found.index_copy_(0, upload(torch.tensor(into), device.device), logits)
        return found

    def _run(self, call: _Call, tokens: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """The logits of the `wanted` rows of a call."""
        device = self._device
        blocks = [block for _, block in call.blocks]
        ids = upload(torch.tensor(tokens, dtype=torch.int64), device.device)
        slots, positions = places(blocks, device.device)
        if not call.decodes:
            lists = PrefillLists(list(numbered(blocks)), device.page_size, device.device)
            # A program gives the logits of some row; where none is wanted they are dropped.
            return device.prefill(ids, positions, slots, lists, wanted or [0])[: len(wanted)]
        lengths = upload(torch.tensor(_lengths(blocks), dtype=torch.int32), device.device)
        logits = [
            device.decode(ids[part], positions[part], slots[part], planned, lengths[part], _num_parts(planned))
            for part, planned in device.lists_for(decode_rows(blocks))
        ]
        return torch.cat(logits).index_select(0, upload(torch.tensor(wanted, dtype=torch.int64), device.device))

    def reads(self) -> Reads:
        """What each row reads, from the lists that the programs are given."""
        device = self._device
        found: Reads = [[] for _ in range(self.num_rows)]
        for call in self._calls:
            if not call.decodes:
                PrefillLists(call.blocks, device.page_size, device.device).reads(found, device.page_size)
                continue
            rows, blocks = call.rows(), [block for _, block in call.blocks]
            for part, lists in device.lists_for(decode_rows(blocks)):
                read = runs_read(lists, _lengths(blocks[part]), device.page_size)
                for row, runs in zip(rows[part], read, strict=True):
                    found[row] = runs
        return found


def _calls(blocks: Sequence[Block], *, by_origin: bool) -> list[_Call]:
    """The calls of a step in order: prefill at even places, decode at odd ones, each part of a block after its last."""
    calls: dict[int, _Call] = {}
    for first_row, block in numbered(blocks):
        place = 0
        for part, decodes in parts_of(block, by_origin=by_origin):
            place += place % 2 != decodes
            call = calls.setdefault(place, _Call(decodes, []))
            call.blocks.append((first_row + part.first - block.first, part))
    return [calls[place] for place in sorted(calls)]


def _lengths(blocks: Sequence[Block]) -> list[int]:
    """Tokens of the open segment of each decoding row, its own included."""
    return [block.first + 1 for block in blocks]


def _num_parts(lists: DeviceLists) -> int:
    return max(1, lists.planned.parts)
