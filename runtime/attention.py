"""One step's attention: which rows see which slots, grouped so that shared keys are read once.

Rows come in blocks, one for each thread that feeds tokens in this step. The links of the blocks' views are grouped by
the set of blocks that see them; a group seen by several rows is one call for all of them, short runs that one row alone
sees are padded into one call for all such rows, and every row's partial states are merged in the order of its view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from anabranch.kernels.merge_states import merge_states
from anabranch.kernels.rope import rotate
from anabranch.kernels.segment_attention import attend_causal, attend_shared, attend_tails
from anabranch.runtime.config import ModelConfig
from anabranch.runtime.pages import KvStore, Segment, View
from anabranch.runtime.rope import rope_table

# A run of this many tokens that one row alone sees is read in place; a shorter one is copied into the padded call. The
# figure is a choice, not yet measured.
OWN_CALL_TOKENS = 256
# A block of rows joins the padded call while rows x keys stay below this; above, it is a causal call of its own.
PADDED_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Block:
    """The rows that one thread feeds: tokens first..first+count of `segment`, which already owns their slots.

    owner: the thread's number, where that is known
    forks: see `Context`
    """

    view: View | None
    segment: Segment
    first: int
    count: int
    owner: int | None = None
    forks: tuple[View, ...] = ()


@dataclass(slots=True)
class _Slots:
    """Pool slots in order, as half-open runs, with the position of the first key of each."""

    runs: list[tuple[int, int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    length: int = 0

    def add(self, segment: Segment, length: int, shift: int) -> None:
        position = segment.start + shift
        for first, stop in segment.runs(length):
            if self.runs and self.runs[-1][1] == first and self.starts[-1] + self._last() == position:
                self.runs[-1] = (self.runs[-1][0], stop)
            else:
                self.runs.append((first, stop))
                self.starts.append(position)
            position += stop - first
            self.length += stop - first

    def extend(self, other: _Slots) -> None:
        self.runs.extend(other.runs)
        self.starts.extend(other.starts)
        self.length += other.length

    def index(self) -> np.ndarray:
        return np.concatenate([np.arange(a, b) for a, b in self.runs])

    def positions(self) -> np.ndarray:
        """Of each key, its shift included."""
        return np.concatenate([np.arange(s, s + b - a) for (a, b), s in zip(self.runs, self.starts, strict=True)])

    def _last(self) -> int:
        first, stop = self.runs[-1]
        return stop - first


@dataclass(slots=True)
class _Call:
    """One call: `rows` (extended row numbers) against slots. kind: shared, causal or tails (one slots a row)."""

    kind: str
    rows: Tensor
    slots: list[_Slots]
    parts: Tensor | None = None
    keys: slice | Tensor | None = None
    stride: tuple[int, int] | None = None
    mask: Tensor | None = None
    windows: dict[int, Tensor | None] = field(default_factory=dict)


class StepAttention:
    """The `attend` callback of one step: rotates, writes K and V, and attends.

    Rows are numbered over the blocks in order. An *extended* row is a row together with a shift: a query that sees
    keys under several shifts is rotated once for each.
    """

    def __init__(self, store: KvStore, config: ModelConfig, blocks: Sequence[Block], dtype: torch.dtype) -> None:
        self._store = store
        self._config = config
        self._scale = config.head_dim**-0.5
        self._dtype = dtype
        self._row_of: list[int] = []
        self._shift_of: list[int] = []
        self._extended: dict[tuple[int, int], int] = {}
        slots: list[int] = []
        positions: list[int] = []
        first_rows: list[int] = []
        for block in blocks:
            first_rows.append(len(slots))
            for index in range(block.first, block.first + block.count):
                slots.append(block.segment.slot(index))
                positions.append(block.segment.start + index)
        self.positions = torch.tensor(positions, dtype=torch.int64)
        self._slots = torch.tensor(slots, dtype=torch.int64)
        self._row_positions = np.asarray(positions, dtype=np.int64)
        self.num_rows = len(slots)
        for row in range(self.num_rows):
            self._extend(row, 0)
        self._calls: list[_Call] = []
        self._plan(blocks, first_rows)
        self._finish()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [num_rows, num_heads, head_dim]; k, v: [num_rows, num_kv_heads, head_dim], before rotation."""
        store_k, store_v = self._store.k[layer], self._store.v[layer]
        keys = rotate(k, self._cos[: self.num_rows], self._sin[: self.num_rows])
        store_k.index_copy_(1, self._slots, keys.transpose(0, 1))
        store_v.index_copy_(1, self._slots, v.transpose(0, 1))
        if self._rows is None:
            queries = rotate(q, self._cos, self._sin)
        else:
            queries = rotate(q[self._rows], self._cos, self._sin)
        window = self._config.sliding_window[layer] if self._config.sliding_window else None
        states = [self._run(call, queries, store_k, store_v, window) for call in self._calls]
        if self._num_parts == 1 and len(states) == 1 and self._calls[0].rows.numel() == self.num_rows:
            return states[0][0][self._order] if self._order is not None else states[0][0]
        if self._aligned:
            return merge_states(torch.stack([s[0] for s in states], 1), torch.stack([s[1] for s in states], 1))
        heads, dim = q.shape[1], q.shape[2]
        out = q.new_zeros(self.num_rows, self._num_parts, heads, dim)
        lse = q.new_full((self.num_rows, self._num_parts, heads), float("-inf"))
        for call, (part_out, part_lse) in zip(self._calls, states, strict=True):
            assert call.parts is not None
            rows = self._base[call.rows]
            out[rows, call.parts] = part_out
            lse[rows, call.parts] = part_lse
        return merge_states(out, lse)

    def reads(self) -> list[list[tuple[int, int, int]]]:
        """For each row, the (first slot, how many, shift) of every run of keys that it attends to."""
        found: list[list[tuple[int, int, int]]] = [[] for _ in range(self.num_rows)]
        for call in self._calls:
            for place, extended in enumerate(call.rows.tolist()):
                row, shift = self._row_of[extended], self._shift_of[extended]
                slots = call.slots[place] if call.kind == "tails" else call.slots[0]
                # In a causal call the rows are the newest keys: what comes after a row is hidden from it.
                left = slots.length - (len(call.rows) - 1 - place if call.kind == "causal" else 0)
                for first, stop in slots.runs:
                    if left > 0:
                        found[row].append((first, min(stop - first, left), shift))
                    left -= stop - first
        return found

    def _extend(self, row: int, shift: int) -> int:
        key = (row, shift)
        found = self._extended.get(key)
        if found is None:
            found = self._extended[key] = len(self._row_of)
            self._row_of.append(row)
            self._shift_of.append(shift)
        return found

    def _plan(self, blocks: Sequence[Block], first_rows: Sequence[int]) -> None:
        by_view: dict[int, tuple[View, list[int]]] = {}
        for number, block in enumerate(blocks):
            if block.view is not None:
                by_view.setdefault(id(block.view), (block.view, []))[1].append(number)
        readers: dict[int, tuple[View, list[int]]] = {}
        for view, numbers in by_view.values():
            for link in view.chain():
                if link.entries:
                    readers.setdefault(id(link), (link, []))[1].extend(numbers)
        groups: dict[tuple[int, ...], dict[int, _Slots]] = {}
        for link, numbers in sorted(readers.values(), key=lambda item: item[0].depth):
            by_shift = groups.setdefault(tuple(sorted(numbers)), {})
            for shift, slots in _link_slots(link).items():
                by_shift.setdefault(shift, _Slots()).extend(slots)
        tails: dict[int, _Slots] = {}
        for members, by_shift in groups.items():
            rows = [first_rows[n] + i for n in members for i in range(blocks[n].count)]
            for shift, slots in by_shift.items():
                extended = [self._extend(row, shift) for row in rows]
                if len(rows) > 1 or slots.length >= OWN_CALL_TOKENS:
                    self._calls.append(_Call("shared", torch.tensor(extended), [slots]))
                else:
                    tails.setdefault(extended[0], _Slots()).extend(slots)
        for number, block in enumerate(blocks):
            self._plan_own(block, first_rows[number], tails)
        buckets: dict[int, list[int]] = {}
        for extended_row, slots in tails.items():
            buckets.setdefault(max(6, (slots.length - 1).bit_length()), []).append(extended_row)
        for _, extended_rows in sorted(buckets.items()):
            self._calls.append(_Call("tails", torch.tensor(extended_rows), [tails[r] for r in extended_rows]))

    def _plan_own(self, block: Block, first_row: int, tails: dict[int, _Slots]) -> None:
        stop = block.first + block.count
        if block.count == 1 and stop >= OWN_CALL_TOKENS:
            slots = _Slots()
            slots.add(block.segment, stop, 0)
            if len(slots.runs) == 1:
                self._calls.append(_Call("shared", torch.tensor([first_row]), [slots]))
                return
        if block.count == 1 or block.count * stop <= PADDED_BLOCK:
            for offset in range(block.count):
                tails.setdefault(first_row + offset, _Slots()).add(block.segment, block.first + offset + 1, 0)
            return
        slots = _Slots()
        slots.add(block.segment, stop, 0)
        self._calls.append(_Call("causal", torch.arange(first_row, first_row + block.count), [slots]))

    def _finish(self) -> None:
        rows = torch.tensor(self._row_of, dtype=torch.int64)
        shifts = torch.tensor(self._shift_of, dtype=torch.int64)
        self._base = rows
        self._rows = rows if len(self._row_of) > self.num_rows else None
        positions = self.positions[rows] - shifts
        self._cos, self._sin = rope_table(self._config.rope, self._config.head_dim, positions, self._dtype)
        taken = torch.zeros(self.num_rows, dtype=torch.int64)
        for call in self._calls:
            base = rows[call.rows]
            call.parts = taken[base]
            # Rows of one call are distinct as (row, shift); a row under two shifts of one call takes two parts.
            seen: dict[int, int] = {}
            for place, row in enumerate(base.tolist()):
                call.parts[place] += seen.get(row, 0)
                seen[row] = seen.get(row, 0) + 1
            taken.index_add_(0, base, torch.ones_like(base))
            if call.kind == "tails":
                self._address_tails(call)
            else:
                call.keys = _address(call.slots[0])
        self._num_parts = int(taken.max()) if self.num_rows else 0
        self._order: Tensor | None = None
        # Every call covers every row, in order: its states are stacked as they come.
        in_order = torch.arange(self.num_rows)
        self._aligned = self._rows is None and all(torch.equal(call.rows, in_order) for call in self._calls)
        if self._num_parts == 1 and len(self._calls) == 1:
            order = rows[self._calls[0].rows]
            if order.tolist() != list(range(self.num_rows)):
                self._order = torch.argsort(order)

    def _address_tails(self, call: _Call) -> None:
        longest = max(s.length for s in call.slots)
        if len(call.slots) == 1 and len(call.slots[0].runs) == 1:
            call.keys = slice(*call.slots[0].runs[0])
            return
        lengths = np.asarray([s.length for s in call.slots])
        hidden = torch.from_numpy(np.arange(longest)[None, :] >= lengths[:, None])
        call.mask = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, float("-inf"))
        call.stride = self._even_stride(call.slots, longest)
        if call.stride is not None:
            return
        index = np.zeros((len(call.slots), longest), dtype=np.int64)
        for place, slots in enumerate(call.slots):
            filled = slots.index()
            index[place, : len(filled)] = filled
            # Padding reads a slot of the row's own: whatever stands in a free slot may not be finite.
            index[place, len(filled) :] = filled[0]
        call.keys = torch.from_numpy(index)

    def _even_stride(self, slots: Sequence[_Slots], longest: int) -> tuple[int, int] | None:
        """(first slot, slots between rows) where the rows' runs lie at even distances, as those of siblings often do.

        Such rows are read in place. What the shorter ones read past their end is masked, and finite: the pool begins as
        zeros and only finite values are written to it.
        """
        if any(len(s.runs) != 1 for s in slots):
            return None
        starts = [s.runs[0][0] for s in slots]
        step = starts[1] - starts[0] if len(starts) > 1 else longest
        if step < 1 or any(b - a != step for a, b in pairwise(starts)):
            return None
        if starts[-1] + longest > self._store.k[0].shape[1]:
            return None
        return starts[0], step

    def _run(
        self, call: _Call, queries: Tensor, store_k: Tensor, store_v: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor]:
        keys = call.keys
        all_rows = call.rows.numel() == queries.shape[0] and call.kind != "tails"
        q = queries if all_rows and call.rows[0] == 0 and self._rows is None else queries[call.rows]
        mask = self._window_mask(call, window) if window is not None else None
        if call.mask is not None:
            k, v = (self._tails(call, store) for store in (store_k, store_v))
            states = attend_tails(q, k, v, call.mask if mask is None else mask, scale=self._scale)
        elif call.kind == "causal":
            states = attend_causal(q, store_k[:, keys], store_v[:, keys], scale=self._scale, mask=mask)
        else:
            states = attend_shared(q, store_k[:, keys], store_v[:, keys], scale=self._scale, mask=mask)
        if mask is None:
            return states
        # A row for which the window hides every key of this call has no share in the merge.
        out, lse = states
        empty = torch.isneginf(mask).all(-1, keepdim=True)
        return out, lse.masked_fill(empty, float("-inf"))

    def _tails(self, call: _Call, store: Tensor) -> Tensor:
        """[num_rows, num_kv_heads, longest, head_dim] of a padded call."""
        if call.stride is None:
            return store[:, call.keys].transpose(0, 1)
        assert call.mask is not None
        first, step = call.stride
        kv_heads, _, dim = store.shape
        shape = (call.mask.shape[0], kv_heads, call.mask.shape[1], dim)
        return store.as_strided(shape, (step * dim, store.stride(0), dim, 1), store.storage_offset() + first * dim)

    def _window_mask(self, call: _Call, window: int) -> Tensor | None:
        """The additive mask under a sliding window, or None where it hides nothing."""
        if window in call.windows:
            return call.windows[window]
        rows = call.rows.numpy()
        own = self._row_positions[np.asarray(self._row_of)[rows]]
        if call.mask is not None:
            longest = call.mask.shape[1]
            positions = np.zeros((len(rows), longest), dtype=np.int64)
            for place, slots in enumerate(call.slots):
                positions[place, : slots.length] = slots.positions()
            hidden = own[:, None] - positions >= window
        else:
            hidden = own[:, None] - call.slots[0].positions()[None, :] >= window
        mask: Tensor | None = None
        if hidden.any():
            mask = torch.zeros(hidden.shape, dtype=self._dtype)
            mask.masked_fill_(torch.from_numpy(hidden), float("-inf"))
            if call.mask is not None:
                mask = mask + call.mask
        call.windows[window] = mask
        return mask


def _link_slots(link: View) -> dict[int, _Slots]:
    """The slots of a link's entries by shift; kept on the link, which never changes."""
    if link.gather is None:
        by_shift: dict[int, _Slots] = {}
        for entry in link.entries:
            by_shift.setdefault(entry.shift, _Slots()).add(entry.segment, entry.segment.length, entry.shift)
        link.gather = by_shift
    found = link.gather
    assert isinstance(found, dict)
    return found


def _address(slots: _Slots) -> slice | Tensor:
    """A slice where the slots are one run, else their indices."""
    if len(slots.runs) == 1:
        return slice(*slots.runs[0])
    return torch.from_numpy(slots.index())
