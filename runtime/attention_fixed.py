"""One step's attention such that a row's bits depend on the keys in its view and on nothing else.

The keys in a row's view, in order, are cut into parts of `PART` keys, counted from the first one; where the shift
changes a part ends early. So a part is known from the view alone: not from pages, not from where segments end, and not
from who else sees it. The row's own key ends its last part. Every part gives a state of its own, computed over exactly
`PART` keys (those that are missing or come later are masked), and the states are added in an order that is fixed by
the numbers of their parts. Parts that several rows see are read once for all of them, since the kernel's bits for a
query do not depend on the others beside it, once their number is padded (see `runtime/fixed_shapes.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.kernels.merge_states import fold_, sum_parts_, weigh_parts
from anabranch.kernels.rope import rotate
from anabranch.kernels.segment_attention import attend_parts
from anabranch.runtime.attention import Block
from anabranch.runtime.config import ModelConfig
from anabranch.runtime.fixed_shapes import PART, FixedShapes
from anabranch.runtime.pages import ALIGNMENT, KvStore, View
from anabranch.runtime.rope import rope_table

GROUP = 64
"""Parts whose states are held at once and added as a tree; the groups of a longer view are added one after another."""
QUERIES = 160
"""Most queries of one KV head in a call: below 192 the flash kernel takes 32 of them at a time."""
OWN_PARTS = 4
"""So many parts that one row alone sees are a call of their own; fewer are copied into one call for all such rows."""
COPIED_PARTS = 256
"""Parts copied at once, which bounds the memory that the copies take."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Keys:
    """Keys of a view, in order. slots: in the pool; positions: where they are seen, shift included. Both [num_keys]."""

    slots: Ints
    positions: Ints

    def __add__(self, other: _Keys) -> _Keys:
        return _Keys(
            np.concatenate((self.slots, other.slots)), np.concatenate((self.positions, other.positions))
        )  # fmt: skip

    def __getitem__(self, keys: slice) -> _Keys:
        return _Keys(self.slots[keys], self.positions[keys])

    def __len__(self) -> int:
        return len(self.slots)


_NONE = _Keys(np.empty(0, np.int64), np.empty(0, np.int64))


@dataclass(frozen=True, slots=True)
class _Parts:
    """Parts number first, first + 1 ... of a view, seen under one shift.

    slots, positions: [num_parts, PART]; a part that ends early repeats its first key
    lengths: [num_parts], keys of each
    """

    first: int
    shift: int
    slots: Ints
    positions: Ints
    lengths: Ints

    def __getitem__(self, parts: slice) -> _Parts:
        start = parts.start or 0
        return _Parts(
            self.first + start, self.shift, self.slots[parts], self.positions[parts], self.lengths[parts]
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.lengths)


def _cut(keys: _Keys, first: int, shift: int) -> _Parts:
    """All of `keys` in parts, of which the last may end early."""
    count = -(-len(keys) // PART)
    missing = count * PART - len(keys)
    lengths = np.full(count, PART, np.int64)
    slots, positions = keys.slots, keys.positions
    if missing:
        lengths[-1] -= missing
        # A slot of the part itself: whatever stands in a free slot may not be finite.
        start = (count - 1) * PART
        slots = np.concatenate((slots, np.full(missing, slots[start])))
        positions = np.concatenate((positions, np.full(missing, positions[start])))
    return _Parts(first, shift, slots.reshape(count, PART), positions.reshape(count, PART), lengths)


@dataclass(frozen=True, slots=True)
class _LinkParts:
    """What a link of a view adds: parts that end in it, and the keys at its end that make up no part yet.

    count: parts that end in this link or before it
    rest: fewer than PART keys, of shift 0
    """

    parts: tuple[_Parts, ...]
    count: int
    rest: _Keys


_NO_LINK = _LinkParts((), 0, _NONE)


def _link_parts(view: View | None) -> _LinkParts:
    """The parts of a link; kept on the link, which never changes."""
    if view is None:
        return _NO_LINK
    missing: list[View] = []
    link: View | None = view
    while link is not None and link.gather is None:
        missing.append(link)
        link = link.parent
    before = _NO_LINK if link is None else link.gather
    assert isinstance(before, _LinkParts)
    for link in reversed(missing):
        before = link.gather = _extend(before, link)
    return before


def _extend(before: _LinkParts, link: View) -> _LinkParts:
    runs: list[tuple[int, _Keys]] = [(0, before.rest)]
    for entry in link.entries:
        segment = entry.segment
        keys = _segment_keys(segment.pages, segment.pool.page_size, segment.length, segment.start + entry.shift)
        if runs[-1][0] == entry.shift:
            runs[-1] = (entry.shift, runs[-1][1] + keys)
        else:
            runs.append((entry.shift, keys))
    parts: list[_Parts] = []
    count = before.count
    rest = _NONE
    for place, (shift, keys) in enumerate(runs):
        if place == len(runs) - 1 and shift == 0:
            whole = len(keys) // PART * PART
            keys, rest = keys[:whole], keys[whole:]
        if len(keys):
            parts.append(_cut(keys, count, shift))
            count += len(parts[-1])
    return _LinkParts(tuple(parts), count, rest)


def _segment_keys(pages: Sequence[int], page_size: int, length: int, start: int) -> _Keys:
    used = np.asarray(pages[: -(-length // page_size)], np.int64)
    slots = (used[:, None] * page_size + np.arange(page_size)).reshape(-1)[:length]
    return _Keys(slots, np.arange(start, start + length))


@dataclass(frozen=True, slots=True)
class _Own:
    """A block in numbers.

    rows: of the step; count: parts of its view; parts: those that end after them, up to the last row's key
    first_length: keys in `parts` that the first row sees, itself included
    """

    links: tuple[_LinkParts, ...]
    rows: range
    count: int
    parts: _Parts
    first_length: int

    def last_part(self, row: int) -> int:
        """The part of its own that ends with the key of `row`."""
        return (self.first_length + row - self.rows.start - 1) // PART


@dataclass(slots=True)
class _Call:
    """Rows that see parts, all under one shift.

    rows: of the tile; numbers: of the parts in their group
    each: the row at a place sees the part at that place; else every row sees every part
    slots, positions: [num_parts, PART]; lengths: [num_parts], keys of each part
    seen: for each row, how many keys of the one part it sees; None where it sees all
    """

    rows: Ints
    numbers: Ints
    shift: int
    slots: Ints
    positions: Ints
    lengths: Ints
    each: bool = False
    seen: Ints | None = None
    row_positions: Ints = field(default_factory=lambda: _NONE.positions)
    row_index: slice | Tensor = field(default_factory=lambda: slice(0))
    places: tuple[slice | Tensor, slice, slice | Tensor] = (slice(0), slice(0), slice(0))
    keys: Tensor | int = 0
    mask: Tensor | None = None
    windows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(slots=True)
class _Group:
    """Parts of the rows of a tile. size: most that a row has; some: that every row has."""

    calls: list[_Call]
    size: int
    some: int


@dataclass(slots=True)
class _Tile:
    """Rows first..stop, worked on together; in `groups` their parts in order, GROUP at a time."""

    first: int
    stop: int
    groups: list[_Group]


class FixedAttention:
    """The `attend` callback of one step, as `StepAttention` is; a row's bits depend on the keys in its view alone."""

    def __init__(
        self,
        store: KvStore,
        config: ModelConfig,
        blocks: Sequence[Block],
        dtype: torch.dtype,
        shapes: FixedShapes,
    ) -> None:
        self._store = store
        self._config = config
        self._shapes = shapes
        self._dtype = dtype
        self._scale = config.head_dim**-0.5
        self._kv_heads, self._shared_by = config.num_kv_heads, config.num_heads // config.num_kv_heads
        # A key that is read in place lies like a copied one only where every slot begins at a multiple of ALIGNMENT.
        self._in_place = config.head_dim * dtype.itemsize % ALIGNMENT == 0
        owns: list[_Own] = []
        fed: list[_Keys] = [_NONE]
        for block in blocks:
            first = owns[-1].rows.stop if owns else 0
            view = _link_parts(block.view)
            segment = block.segment
            stop = block.first + block.count
            keys = _segment_keys(segment.pages, segment.pool.page_size, stop, segment.start)
            fed.append(keys[slice(block.first, stop)])
            links = tuple(_link_parts(link) for link in block.view.chain()) if block.view is not None else ()
            owns.append(
                _Own(
                    tuple(link for link in links if link.parts),
                    range(first, first + block.count),
                    view.count,
                    _cut(view.rest + keys, view.count, 0),
                    len(view.rest) + block.first + 1,
                )
            )
        self.num_rows = owns[-1].rows.stop if owns else 0
        self._row_positions = np.concatenate([keys.positions for keys in fed])
        self.positions = torch.from_numpy(self._row_positions)
        self._slots = torch.from_numpy(np.concatenate([keys.slots for keys in fed]))
        self._tiles = list(self._plan(owns))
        self._tables = {
            shift: rope_table(config.rope, config.head_dim, self.positions - shift, dtype)
            for shift in {0, *(call.shift for _, call in self._calls())}
        }
        largest = max((g.size * (t.stop - t.first) for t in self._tiles for g in t.groups), default=0)
        self._scratch = torch.empty(largest * config.num_heads * config.head_dim, dtype=dtype)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [num_rows, num_heads, head_dim]; k, v: [num_rows, num_kv_heads, head_dim], before rotation."""
        store_k, store_v = self._store.k[layer], self._store.v[layer]
        store_k.index_copy_(1, self._slots, rotate(k, *self._tables[0]).transpose(0, 1))
        store_v.index_copy_(1, self._slots, v.transpose(0, 1))
        window = self._config.sliding_window[layer] if self._config.sliding_window else None
        outs = [self._attend(tile, q, store_k, store_v, window) for tile in self._tiles]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def reads(self) -> list[list[tuple[int, int, int]]]:
        """For each row, the (first slot, how many, shift) of every run of keys that it attends to, in order."""
        found: list[dict[tuple[int, int], tuple[Ints, int]]] = [{} for _ in range(self.num_rows)]
        for (tile, group), call in self._calls():
            for place, row in enumerate(call.rows.tolist()):
                for part in [place] if call.each else range(len(call.numbers)):
                    length = call.lengths[part] if call.seen is None else call.seen[place]
                    number = int(call.numbers[part])
                    found[tile.first + row][group, number] = (call.slots[part, :length], call.shift)
        return [list(_runs(part for _, part in sorted(parts.items(), key=lambda item: item[0]))) for parts in found]

    # The plan.

    def _calls(self) -> Iterator[tuple[tuple[_Tile, int], _Call]]:
        """Every call, with its tile and the number of its group."""
        for tile in self._tiles:
            for number, group in enumerate(tile.groups):
                for call in group.calls:
                    yield (tile, number), call

    def _plan(self, owns: Sequence[_Own]) -> Iterator[_Tile]:
        num_tiles = -(-self.num_rows // max(1, QUERIES // self._shared_by))
        rows = -(-self.num_rows // num_tiles) if num_tiles else 0
        left = list(owns)
        for first in range(0, self.num_rows, max(1, rows)):
            stop = min(first + rows, self.num_rows)
            here = [own for own in left if own.rows.start < stop]
            yield self._plan_tile(here, first, stop)
            left = [own for own in left if own.rows.stop > stop]

    def _plan_tile(self, owns: Sequence[_Own], first: int, stop: int) -> _Tile:
        calls: list[list[_Call]] = []
        copied: list[list[tuple[int, int, Ints, Ints, int]]] = []
        counts: list[int] = []

        def share(parts: _Parts, rows: Ints, seen: Ints | None = None) -> None:
            """`rows` see `parts`, which may belong to several groups."""
            done = 0
            while done < len(parts):
                number, place = divmod(parts.first + done, GROUP)
                count = min(len(parts) - done, GROUP - place)
                some = slice(done, done + count)
                calls[number].append(
                    _Call(
                        rows,
                        np.arange(place, place + count),
                        parts.shift,
                        parts.slots[some],
                        parts.positions[some],
                        parts.lengths[some],
                        seen=seen,
                    )
                )
                done += count

        readers: dict[int, tuple[_LinkParts, list[int]]] = {}
        for own in owns:
            rows = range(max(first, own.rows.start), min(stop, own.rows.stop))
            counts.extend(own.count + own.last_part(row) + 1 for row in rows)
            for link in own.links:
                readers.setdefault(id(link), (link, []))[1].extend(rows)
        for _ in range(-(-max(counts) // GROUP)):
            calls.append([])
            copied.append([])
        for link, found in readers.values():
            seeing = np.asarray(found) - first
            for parts in link.parts:
                share(parts, seeing)
        for own in owns:
            rows = range(max(first, own.rows.start), min(stop, own.rows.stop))
            for low, high, some_rows, tail in _own_reads(own, rows):
                parts = own.parts[slice(low, high)]
                at = np.asarray(some_rows) - first
                if len(some_rows) > 1 or high - low >= OWN_PARTS:
                    start = own.first_length - own.rows.start - low * PART
                    share(parts, at, np.asarray(some_rows) + start if tail else None)
                    continue
                for part in range(high - low):
                    number, place = divmod(parts.first + part, GROUP)
                    # The last key of the last part is the row's own: later ones are of later rows.
                    length = own.first_length + some_rows[0] - own.rows.start - low * PART if tail else PART
                    copied[number].append((int(at[0]), place, parts.slots[part], parts.positions[part], length))
        for number, items in enumerate(copied):
            for start in range(0, len(items), COPIED_PARTS):
                places_of_rows, places, slots, positions, lengths = zip(
                    *items[start : start + COPIED_PARTS], strict=True
                )
                calls[number].append(
                    _Call(
                        np.asarray(places_of_rows),
                        np.asarray(places),
                        0,
                        np.stack(slots),
                        np.stack(positions),
                        np.asarray(lengths),
                        each=True,
                    )
                )
        for call in (call for group in calls for call in group):
            self._address(call, first)
        here = np.asarray(counts)
        return _Tile(
            first,
            stop,
            [
                _Group(group, *(int(f(np.clip(here - number * GROUP, 0, GROUP))) for f in (np.max, np.min)))
                for number, group in enumerate(calls)
            ],
        )

    def _address(self, call: _Call, first: int) -> None:
        """Where the call's keys lie, what it may not see, and where its states go."""
        call.row_positions = self._row_positions[call.rows + first]
        call.row_index = _index(call.rows)
        if call.each:
            call.places = (torch.from_numpy(call.numbers), slice(None), torch.from_numpy(call.rows))
        else:
            call.places = (_index(call.numbers), slice(None), call.row_index)
        slots = call.slots
        start = int(slots[0, 0])
        if (
            self._in_place
            and not call.each
            and (call.lengths == PART).all()
            and np.array_equal(slots.reshape(-1), np.arange(start, start + slots.size))
        ):
            call.keys = start
        else:
            call.keys = torch.from_numpy(np.ascontiguousarray(slots).reshape(-1))
        if call.seen is not None:
            hidden = np.arange(PART)[None, None, :] >= call.seen[None, :, None]
        elif (call.lengths < PART).any():
            hidden = np.arange(PART)[None, None, :] >= call.lengths[:, None, None]
        else:
            return
        call.mask = self._additive(hidden)

    def _additive(self, hidden: NDArray[np.bool_]) -> Tensor:
        """[num_parts, 1 or num_queries, PART] from [num_parts, 1 or num_rows, PART]: -inf where hidden, else 0."""
        mask = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(torch.from_numpy(hidden), float("-inf"))
        if mask.shape[1] == 1:
            return mask
        queries = mask.shape[1] * self._shared_by
        wide = torch.zeros(mask.shape[0], self._shapes.pad_queries(queries), PART, dtype=self._dtype)
        wide[:, :queries] = mask.repeat_interleave(self._shared_by, dim=1)
        return wide

    # The work.

    def _attend(self, tile: _Tile, q: Tensor, store_k: Tensor, store_v: Tensor, window: int | None) -> Tensor:
        rows = slice(tile.first, tile.stop)
        turned: dict[int, Tensor] = {}
        packed: dict[tuple[int, int], Tensor] = {}

        def queries(call: _Call) -> Tensor:
            if call.shift not in turned:
                cos, sin = self._tables[call.shift]
                turned[call.shift] = rotate(q[rows], cos[rows], sin[rows])
            key = (id(call.rows), call.shift)
            if key not in packed:
                packed[key] = self._pack(turned[call.shift][call.row_index], each=call.each)
            return packed[key]

        running: tuple[Tensor, Tensor, Tensor] | None = None
        for group in tile.groups:
            states = [self._run(call, queries(call), store_k, store_v, window) for call in group.calls]
            merged = self._merge(group, states, tile.stop - tile.first, clean=window is not None)
            if running is None:
                running = merged if len(tile.groups) == 1 else (merged[0], merged[1].clone(), merged[2].clone())
            else:
                fold_(*running, *merged)
        assert running is not None
        _, total, out = running
        return (out / total[..., None]).transpose(0, 1).reshape(-1, *q.shape[1:])

    def _pack(self, q: Tensor, *, each: bool) -> Tensor:
        """[num_rows, num_heads, head_dim] as [num_rows or 1, num_kv_heads, num_queries, head_dim], padded."""
        rows, _, dim = q.shape
        grouped = q.view(rows, self._kv_heads, self._shared_by, dim)
        if not each:
            grouped = grouped.transpose(0, 1).reshape(1, self._kv_heads, rows * self._shared_by, dim)
        count = grouped.shape[2]
        out = q.new_zeros(grouped.shape[0], self._kv_heads, self._shapes.pad_queries(count), dim)
        out[:, :, :count] = grouped
        return out

    def _run(
        self, call: _Call, q: Tensor, store_k: Tensor, store_v: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """States of a call: out [num_parts, num_kv_heads, num_rows, group, head_dim], without num_rows under `each`."""
        parts = len(call.numbers)
        mask, empty = (call.mask, None) if window is None else self._window(call, window)
        k, v = self._keys(call, store_k), self._keys(call, store_v)
        q = q.expand(parts, *q.shape[1:])
        out, lse = attend_parts(q, k, v, scale=self._scale, mask=mask)
        rows = () if call.each else (len(call.rows),)
        count = len(call.rows) * self._shared_by if rows else self._shared_by
        out = out[:, :, :count].reshape(parts, self._kv_heads, *rows, self._shared_by, q.shape[-1])
        lse = lse[:, :, :count].reshape(parts, self._kv_heads, *rows, self._shared_by)
        if empty is not None:
            lse = lse.masked_fill(empty, float("-inf"))
        return out, lse

    def _keys(self, call: _Call, store: Tensor) -> Tensor:
        """[num_parts, num_kv_heads, PART, head_dim]"""
        kv_heads, _, dim = store.shape
        parts = len(call.numbers)
        if isinstance(call.keys, int):
            strides = (PART * dim, store.stride(0), dim, 1)
            return store.as_strided((parts, kv_heads, PART, dim), strides, store.storage_offset() + call.keys * dim)
        return store.index_select(1, call.keys).view(kv_heads, parts, PART, dim).transpose(0, 1)

    def _merge(
        self, group: _Group, states: Sequence[tuple[Tensor, Tensor]], rows: int, *, clean: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(high, total, out) of every row: the sum of its parts relative to the largest, as `fold_` takes it."""
        shape = (group.size, self._kv_heads, rows, self._shared_by)
        lse = torch.full(shape, float("-inf"), dtype=self._dtype)
        for call, (_, part) in zip(group.calls, states, strict=True):
            lse[call.places] = part
        weight, high = weigh_parts(lse)
        dim = self._config.head_dim
        out = self._scratch[: lse.numel() * dim].view(*shape, dim)
        (out if clean else out[group.some :]).zero_()
        for call, (part, _) in zip(group.calls, states, strict=True):
            if isinstance(call.places[2], slice):
                torch.mul(part, weight[call.places][..., None], out=out[call.places])
            else:
                out[call.places] = part * weight[call.places][..., None]
        return high, sum_parts_(weight), sum_parts_(out)

    def _window(self, call: _Call, window: int) -> tuple[Tensor, Tensor]:
        """The additive mask under a sliding window, and which rows it hides the whole of a part from."""
        if window not in call.windows:
            own = call.row_positions
            if call.each:
                hidden = (own[:, None] - call.positions >= window)[:, None, :]
            else:
                hidden = own[None, :, None] - call.positions[:, None, :] >= window
            if call.seen is not None:
                hidden = hidden | (np.arange(PART)[None, None, :] >= call.seen[None, :, None])
            else:
                hidden = hidden | (np.arange(PART)[None, None, :] >= call.lengths[:, None, None])
            empty = torch.from_numpy(hidden.all(-1))
            call.windows[window] = (self._additive(hidden), empty[:, None] if call.each else empty[:, None, :, None])
        return call.windows[window]


def _own_reads(own: _Own, rows: range) -> Iterator[tuple[int, int, range, bool]]:
    """Which of its own parts `rows` of a block see: (first, stop, rows, whether the part ends with each row's key)."""
    lowest, highest = own.last_part(rows[0]), own.last_part(rows[-1])
    if lowest:
        yield 0, lowest, rows, False
    for part in range(lowest, highest + 1):
        after = own.rows.start + (part + 1) * PART - own.first_length + 1
        here = range(max(rows.start, after - PART), min(rows.stop, after))
        yield part, part + 1, here, True
        if here.stop < rows.stop:
            yield part, part + 1, range(here.stop, rows.stop), False


def _index(places: Ints) -> slice | Tensor:
    """A slice where the places are consecutive."""
    first = int(places[0])
    if np.array_equal(places, np.arange(first, first + len(places))):
        return slice(first, first + len(places))
    return torch.from_numpy(places)


def _runs(parts: Iterable[tuple[Ints, int]]) -> Iterator[tuple[int, int, int]]:
    """(first slot, how many, shift) of runs of neighbouring slots under one shift."""
    first = count = shift = 0
    for slots, under in parts:
        for slot in slots.tolist():
            if count and slot == first + count and under == shift:
                count += 1
                continue
            if count:
                yield first, count, shift
            first, count, shift = slot, 1, under
    if count:
        yield first, count, shift
