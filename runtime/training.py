"""Packed runs for training: a torch dataset, masks for its rows, and their loss.

    dataset = PackedDataset("packed")                                # made by `anabranch pack`
    for batch in DataLoader(dataset, batch_size=2, collate_fn=collate):
        mask = block_mask(batch)                                     # or visibility(batch), for dense attention
        logits = model(batch["input_ids"], batch["position_ids"], mask)
        loss(logits, batch).backward()

`docs/training.md` tells what is in a row, and what of a run is trained.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from anabranch.runtime.pack_files import Manifest, ShardReader, pack, read_manifest
from anabranch.runtime.packing import IGNORED, PackedRow
from anabranch.runtime.traces import KINDS, Trace, read_traces

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Batch: TypeAlias = Mapping[str, Tensor]


class PackedDataset(Dataset[dict[str, Tensor]]):
    """The rows of a pack, each padded to `length` tokens.

    An item has, all int64 but `weights`:
    input_ids, position_ids: [length]; 0 in the padding
    labels: [length]; what the logits of a token are to predict, which need not be the token that stands next in the
        row; -100 where there is nothing to predict
    weights: [length], fp32; in how many runs a label was written, 0 where there is none
    segment_ids: [length]; ascending from 0, -1 in the padding
    spans: [num_spans, 4]; (segment, first token, end, shift), as in `PackedRow`

    Files are mapped into memory when a row of theirs is first asked for, in each process anew.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises PlanError: no-such-file, bad-pack."""
        self.folder = str(folder)
        self.manifest: Manifest = read_manifest(folder)
        self._ends = list(accumulate(shard.rows for shard in self.manifest.shards))
        self._readers: dict[int, ShardReader] = {}

    @property
    def length(self) -> int:
        return self.manifest.length

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Raises IndexError; PlanError: no-such-file, bad-pack."""
        return tensors_of(self.row(index), self.length)

    def row(self, index: int) -> PackedRow:
        """A row as it is on disk, without padding. Raises as `__getitem__`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        shard = bisect_right(self._ends, index)
        if shard not in self._readers:
            self._readers[shard] = ShardReader(self.folder, self.manifest.shards[shard])
        return self._readers[shard].row(index - (self._ends[shard - 1] if shard else 0))

    def __getstate__(self) -> dict[str, Any]:
        # A mapping is of one process.
        return {**self.__dict__, "_readers": {}}


def tensors_of(row: PackedRow, length: int) -> dict[str, Tensor]:
    """A row as an item of `PackedDataset`, padded to `length` tokens, which are at least its own."""

    def padded(values: Tensor, padding: int) -> Tensor:
        return torch.nn.functional.pad(values, (0, length - len(values)), value=padding)

    starts = torch.from_numpy(row.starts).long()
    sizes = torch.diff(starts, append=torch.tensor([row.num_tokens]))
    return {
        "input_ids": padded(torch.from_numpy(row.ids).long(), 0),
        "position_ids": padded(torch.from_numpy(row.positions).long(), 0),
        "labels": padded(torch.from_numpy(row.labels).long(), IGNORED),
        "weights": padded(torch.from_numpy(row.weights).float(), 0),
        "segment_ids": padded(torch.repeat_interleave(torch.arange(len(starts)), sizes), -1),
        "spans": torch.from_numpy(row.spans).long(),
    }


def collate(rows: Sequence[Batch]) -> dict[str, Tensor]:
    """Items as one batch, [batch, ...] each, the `spans` filled up with empty ones: a `DataLoader`'s `collate_fn`."""
    most = max(len(row["spans"]) for row in rows)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "spans"}
    batch["spans"] = torch.stack(
        [torch.nn.functional.pad(row["spans"], (0, 0, 0, most - len(row["spans"]))) for row in rows]
    )
    return batch


def visibility(batch: Batch, *, window: int | None = None) -> Tensor:
    """[batch, length, length], bool: [b, q, k] is whether token q sees token k, as dense attention takes it.

    window: of a layer with a sliding window: keys at that distance or farther are not seen
    A token of the padding sees itself alone.
    """
    segments = batch["segment_ids"]
    place = torch.arange(segments.shape[1], device=segments.device)
    own = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, :, None] & (place[:, None] >= place)
    seen = torch.take_along_dim(_seen(batch), (segments + 1)[:, :, None], dim=1) | own
    if window is not None:
        positions = batch["position_ids"]
        seen &= positions[:, :, None] - positions[:, None, :] - shifts(batch) < window
    return seen | (place[:, None] == place)


def shifts(batch: Batch) -> Tensor:
    """[batch, length, length], int64: q sees k at distance position q - position k - shift; 0 where unseen."""
    segments, spans = batch["segment_ids"], batch["spans"]
    num_rows, length = segments.shape
    table = torch.zeros(num_rows, int(segments.max()) + 2, length, dtype=torch.int64, device=segments.device)
    for row, segment, first, end, shift in _each_span(spans[:, :, 3] != 0, spans):
        table[row, segment + 1, first:end] = shift
    return torch.take_along_dim(table, (segments + 1)[:, :, None], dim=1)


def block_mask(batch: Batch, *, window: int | None = None, block_size: int = 128) -> BlockMask:
    """What `visibility` says, for FlexAttention: [batch, any number of heads, length, length], on the batch's device.

    Raises ValueError for a batch with shifts, which FlexAttention with position ids would see at wrong distances.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    if bool(batch["spans"][:, :, 3].any()):
        raise ValueError("a mask and position ids do not say shifts: use `visibility` and `shifts`")
    segments, positions = batch["segment_ids"], batch["position_ids"]
    seen = _seen(batch)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (segments[b, q] == segments[b, k]) & (segments[b, q] >= 0) & (q >= k)
        visible = seen[b, segments[b, q] + 1, k] | own
        if window is not None:
            visible = visible & (positions[b, q] - positions[b, k] < window)
        return visible | (q == k)

    num_rows, length = segments.shape
    return create_block_mask(sees, num_rows, None, length, length, device=str(segments.device), BLOCK_SIZE=block_size)


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """The mean negative log-likelihood of a label, each as often as it was written; a scalar.

    logits: [batch, length, vocab], of each token, not moved by one: a row's labels are of its own tokens
    """
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    each = torch.nn.functional.cross_entropy(wide, batch["labels"].flatten(), ignore_index=IGNORED, reduction="none")
    weights = batch["weights"].flatten()
    return (each * weights).sum() / weights.sum()


def _seen(batch: Batch) -> Tensor:
    """[batch, 1 + num_segments, length], bool: what the spans of a segment hold; none for the padding, first."""
    segments, spans = batch["segment_ids"], batch["spans"]
    num_rows, length = segments.shape
    edges = torch.zeros(num_rows, int(segments.max()) + 2, length + 1, dtype=torch.int8, device=segments.device)
    row = torch.arange(num_rows, device=segments.device)[:, None].expand_as(spans[:, :, 0])
    one = torch.ones_like(row, dtype=torch.int8)
    edges.index_put_((row, spans[:, :, 0] + 1, spans[:, :, 1]), one, accumulate=True)
    edges.index_put_((row, spans[:, :, 0] + 1, spans[:, :, 2]), -one, accumulate=True)
    return edges.cumsum(dim=2, dtype=torch.int8)[:, :, :length] > 0


def _each_span(wanted: Tensor, spans: Tensor) -> list[list[int]]:
    """(row, segment, first, end, shift) of each span that is wanted. wanted: [batch, num_spans], bool"""
    rows = wanted.nonzero()
    return torch.cat([rows[:, :1], spans[wanted]], dim=1).tolist()


__all__ = [
    "IGNORED",
    "KINDS",
    "Manifest",
    "PackedDataset",
    "PackedRow",
    "Trace",
    "block_mask",
    "collate",
    "loss",
    "pack",
    "read_manifest",
    "read_traces",
    "shifts",
    "tensors_of",
    "visibility",
]
