"""The page pool, segments and views.

A segment is a run of tokens written by one thread between control points. It owns whole pages and a length, so a fork
seals the parent's segment and a child starts a new one: nothing is ever copied on write, and forking costs no device
work. A view is a chain of sealed pieces; contexts that share a prefix share the very same links of the chain, which is
what attention groups rows by.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from anabranch.compiler import recording
from anabranch.runtime.recorder import Recorder


class PagePool:
    """Pages of token slots, counted by reference.

    num_pages, page_size: pages, and token slots in each
    A page is free, or held by some count of owners (segments, and the prefix cache). `allocate` prefers the page after
    a given one, so that a segment grows in place and is a slice, not a gather.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.ref_count = [0] * num_pages
        self._hinted = bytearray(num_pages)
        self._cursor = 0
        self._cached = bytearray(num_pages)
        self.used = 0
        self.idle = 0
        self.peak = 0
        self.num_segments = 0
        self.recorder: Recorder | None = None
        self.cache = PrefixCache(self)

    def allocate(self, after: int | None = None, expect: int = 1) -> int:
        """One free page, with a count of one.

        after: the page to follow, if it is free
        expect: pages that this segment may come to need; a run of that many is looked for, and the rest of it is left
            to this segment as long as other room remains
        Raises RuntimeError when every page is held: admission should have kept that from happening.
        """
        page = self._find(after, expect)
        if page is None:
            self.cache.evict(1)
            page = self._find(None, 1)
        if page is None:
            raise RuntimeError(f"all {self.num_pages} pages are held")
        self.ref_count[page] = 1
        self._hinted[page] = 0
        self.used += 1
        self.peak = max(self.peak, self.used - self.idle)
        return page

    def share(self, pages: Iterable[int]) -> None:
        """One more owner for each page."""
        for page in pages:
            if self.ref_count[page] == 0:
                raise RuntimeError(f"page {page} is free and cannot be shared")
            if self._cached[page] and self.ref_count[page] == 1:
                self.idle -= 1
            self.ref_count[page] += 1
        self.peak = max(self.peak, self.used - self.idle)

    def release(self, pages: Iterable[int]) -> None:
        """One owner less for each page; a page without owners is free."""
        for page in pages:
            count = self.ref_count[page]
            if count == 0:
                raise RuntimeError(f"page {page} is freed twice")
            self.ref_count[page] = count - 1
            if count == 1:
                self.used -= 1
            elif count == 2 and self._cached[page]:
                self.idle += 1

    def mark_cached(self, page: int, cached: bool) -> None:
        """`page` is (no longer) held by the prefix cache; a page that the cache alone holds is idle, not in use.

        Call it while the cache holds its reference and, when marking, somebody else holds one too.
        """
        if self.ref_count[page] == 1:
            self.idle += 1 if cached else -1
        self._cached[page] = cached
        if self.recorder is not None:
            self.recorder.note(recording.Cache(page) if cached else recording.Uncache(page))

    def unhint(self, first: int, last: int) -> None:
        """The pages first..last (exclusive) are no longer kept for a segment that could have grown into them."""
        for page in range(first, min(last, self.num_pages)):
            self._hinted[page] = 0

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return self.num_pages - self.used

    def _find(self, after: int | None, expect: int) -> int | None:
        if after is not None and after + 1 < self.num_pages and self.ref_count[after + 1] == 0:
            return after + 1
        if self.used == self.num_pages:
            return None
        start = self._run(expect) if expect > 1 else None
        if start is not None:
            for page in range(start, start + expect):
                self._hinted[page] = 1
            self._cursor = start + expect
            return start
        for hinted in (0, 1):
            for offset in range(self.num_pages):
                page = (self._cursor + offset) % self.num_pages
                if self.ref_count[page] == 0 and (hinted or not self._hinted[page]):
                    self._cursor = page + 1
                    return page
        return None

    def _run(self, length: int) -> int | None:
        run = 0
        # One lap from the cursor, and on past the seam by as much as a run that straddles it may need.
        for offset in range(self.num_pages + length):
            page = (self._cursor + offset) % self.num_pages
            if page == 0:
                run = 0
            if self.ref_count[page] or self._hinted[page]:
                run = 0
                continue
            run += 1
            if run == length:
                return page - length + 1
        return None


class Segment:
    """Append-only tokens of one thread, from position `start` on; `length` counts those whose K and V are written."""

    __slots__ = (
        "epoch", "expect", "ids", "length", "number", "pages", "pool", "reach", "ref_count", "sampled", "sealed",
        "start", "swapped",
    )  # fmt: skip

    def __init__(self, pool: PagePool, start: int, *, expect: int = 1, pages: Sequence[int] = ()) -> None:
        self.pool = pool
        self.number = pool.num_segments
        pool.num_segments += 1
        self.start = start
        self.pages: list[int] = list(pages)
        self.length = 0
        self.sealed = False
        self.ref_count = 1
        self.expect = expect
        self.reach = 0
        self.epoch = 0  # raised when what was written is no longer there: whoever wrote ahead must begin anew
        self.ids: list[int] = []
        self.sampled = bytearray()  # beside `ids`: 1 where the token was drawn
        # What KvStore.save gave, while the pages are somebody else's.
        self.swapped: Saved | None = None

    def append(self, token_ids: Sequence[int], sampled: Sequence[bool] | None = None) -> range:
        """Take slots for `token_ids`; returns their indices in the segment. The caller writes K and V there.

        sampled: which of them were drawn; none by default
        """
        if self.sealed:
            raise RuntimeError("a sealed segment is never written")
        first, held = self.length, self.num_pages
        self.length += len(token_ids)
        self.ids.extend(token_ids)
        self.sampled.extend(bytes(len(token_ids)) if sampled is None else map(int, sampled))
        self.reserve(self.length)
        for page in self.pages[held : self.num_pages]:
            self._note(recording.Page(self.number, page))
        return range(first, self.length)

    @property
    def num_pages(self) -> int:
        """How many of `pages` hold tokens; the others were reserved."""
        return -(-self.length // self.pool.page_size)

    def reserve(self, tokens: int) -> None:
        """Hold pages for `tokens` in all. What is not used goes back when the segment is trimmed or sealed."""
        while len(self.pages) * self.pool.page_size < tokens:
            if self.pages:
                self.pages.append(self.pool.allocate(self.pages[-1]))
            else:
                self.pages.append(self.pool.allocate(None, self.expect))
                self.reach = self.pages[0] + self.expect

    def trim(self, length: int) -> None:
        """Forget tokens from `length` on. Pages that are left empty go back."""
        if self.sealed:
            raise RuntimeError("a sealed segment is never trimmed")
        if length > self.length:
            raise ValueError(f"cannot trim {self.length} tokens to {length}")
        held = self.num_pages
        self.epoch += 1
        self.length = length
        del self.ids[length:], self.sampled[length:]
        if held > self.num_pages:
            self._note(recording.Shrink(self.number, held - self.num_pages))
        self._shed()

    def seal(self) -> None:
        """No more tokens; pages kept for growth are given up."""
        self.sealed = True
        self._note(recording.Seal(self.number))
        self._settle()
        self._shed()

    def drop(self) -> None:
        """One reader less; the last one gives the pages back."""
        if self.ref_count == 0:
            raise RuntimeError("a segment is dropped twice")
        self.ref_count -= 1
        if self.ref_count == 0:
            self._settle()
            self._note(recording.Free(self.number))
            self.pool.release(self.pages)
            self.pages = []

    def swap_out(self, store: Store) -> None:
        """The content goes to host memory, and the pages go back."""
        if self.sealed or self.swapped is not None or not self.pages:
            raise RuntimeError("only an open segment that holds pages is swapped out")
        self._settle()
        self.epoch += 1
        self.swapped = store.save(self)
        self._note(recording.SwapOut(self.number))
        self.pool.release(self.pages)
        self.pages = []

    def swap_in(self, store: Store) -> None:
        """The content comes back, bit for bit, into pages that may be others."""
        if self.swapped is None:
            raise RuntimeError("a segment that was not swapped out is swapped in")
        count = -(-self.length // self.pool.page_size)
        for _ in range(count):
            self.pages.append(self.pool.allocate(self.pages[-1] if self.pages else None, count))
        self._note(recording.SwapIn(self.number, tuple(self.pages)))
        store.restore(self, self.swapped)
        self.swapped = None

    def empty(self) -> list[int]:
        """Forget every token; returns their ids. The pages go back."""
        if self.sealed:
            raise RuntimeError("a sealed segment is never emptied")
        ids, self.ids, self.sampled = self.ids, [], bytearray()
        self.epoch += 1
        self._settle()
        self.length = 0
        self.pool.release(self.pages)
        self.pages = []
        return ids

    def slot(self, index: int) -> int:
        """The pool slot of token `index`."""
        size = self.pool.page_size
        return self.pages[index // size] * size + index % size

    def runs(self, length: int | None = None) -> Iterator[tuple[int, int]]:
        """Half-open ranges of pool slots that hold tokens 0..length, in order; neighbours are merged."""
        left = self.length if length is None else length
        size = self.pool.page_size
        first = stop = -1
        for page in self.pages:
            if left <= 0:
                break
            count = min(size, left)
            left -= count
            if page * size == stop:
                stop += count
                continue
            if stop >= 0:
                yield first, stop
            first, stop = page * size, page * size + count
        if stop >= 0:
            yield first, stop

    def _note(self, step: recording.Step) -> None:
        if self.pool.recorder is not None:
            self.pool.recorder.note(step)

    def _shed(self) -> None:
        """Give back the pages that hold nothing."""
        keep = self.num_pages
        if len(self.pages) > keep:
            self.pool.release(self.pages[keep:])
            del self.pages[keep:]

    def _settle(self) -> None:
        if self.reach:
            self.pool.unhint(self.reach - self.expect, self.reach)
            self.reach = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """A sealed segment as a view sees it. shift: added to the positions of its keys."""

    segment: Segment
    shift: int = 0


class View:
    """One link of the chain of what a thread may attend to: `parent`'s entries, then its own, in order.

    A link holds a reference on each of its segments and on its parent; the last owner to `drop` it gives them back.
    """

    __slots__ = ("depth", "entries", "gather", "num_tokens", "parent", "ref_count", "total_tokens")

    def __init__(self, parent: View | None, entries: Sequence[Entry]) -> None:
        self.parent = parent
        self.entries = tuple(e for e in entries if e.segment.length)
        self.num_tokens = sum(e.segment.length for e in self.entries)
        self.total_tokens: int = self.num_tokens + (parent.total_tokens if parent else 0)
        self.depth: int = parent.depth + 1 if parent else 0
        self.ref_count = 1
        # Device-side addresses, filled by the attention planner: a link never changes once made.
        self.gather: object = None
        if parent is not None:
            parent.ref_count += 1
        for entry in self.entries:
            entry.segment.ref_count += 1

    def hold(self) -> View:
        """One more owner."""
        self.ref_count += 1
        return self

    def drop(self) -> None:
        """One owner less; the last one lets go of the segments, and of the parent in turn."""
        link: View | None = self
        while link is not None:
            if link.ref_count == 0:
                raise RuntimeError("a view is dropped twice")
            link.ref_count -= 1
            if link.ref_count:
                return
            for entry in link.entries:
                entry.segment.drop()
            link = link.parent

    def chain(self) -> list[View]:
        """The links from the root to this one."""
        links: list[View] = []
        link: View | None = self
        while link is not None:
            links.append(link)
            link = link.parent
        links.reverse()
        return links

    def gained_since(self, base: View | None) -> list[Entry]:
        """The entries of the links between `base` (exclusive) and this one, in order."""
        links: list[View] = []
        link: View | None = self
        while link is not None and link is not base:
            links.append(link)
            link = link.parent
        return [entry for one in reversed(links) for entry in one.entries]


class PrefixCache:
    """Sealed full pages of root prefixes, by a hash chain of their tokens; least recently used first to go.

    A chain's key covers the tokens and positions from the root on; model and dtype are the pool's own. Results never
    depend on it.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: OrderedDict[bytes, int] = OrderedDict()

    def match(self, token_ids: Sequence[int]) -> list[int]:
        """The pages that hold the longest known run of whole pages at the start of `token_ids`, each shared once."""
        pages: list[int] = []
        keys: list[bytes] = []
        for key in self._keys(token_ids):
            page = self._pages.get(key)
            if page is None:
                break
            keys.append(key)
            pages.append(page)
        self._touch(keys)
        self._pool.share(pages)
        return pages

    def insert(self, token_ids: Sequence[int], pages: Sequence[int]) -> None:
        """Index the whole pages among `pages`, which hold `token_ids` from the root on."""
        keys: list[bytes] = []
        for key, page in zip(self._keys(token_ids), pages, strict=False):
            keys.append(key)
            if key not in self._pages:
                self._pool.share([page])
                self._pool.mark_cached(page, True)
                self._pages[key] = page
        self._touch(keys)

    def evict(self, count: int) -> None:
        """Let go of up to `count` pages that nobody else holds."""
        counts = self._pool.ref_count
        idle = [key for key, page in self._pages.items() if counts[page] == 1][:count]
        for key in idle:
            self._forget(key)

    def clear(self) -> None:
        """Let go of everything."""
        for key in list(self._pages):
            self._forget(key)

    def _forget(self, key: bytes) -> None:
        page = self._pages.pop(key)
        self._pool.mark_cached(page, False)
        self._pool.release([page])

    def _touch(self, keys: Sequence[bytes]) -> None:
        # The end of a chain is older than its root: without its root a chain is of no use.
        for key in reversed(keys):
            self._pages.move_to_end(key)

    def _keys(self, token_ids: Sequence[int]) -> Iterator[bytes]:
        size = self._pool.page_size
        key = b""
        for start in range(0, len(token_ids) - size + 1, size):
            page = torch.tensor(token_ids[start : start + size], dtype=torch.int64).numpy().tobytes()
            key = hashlib.blake2b(key + page, digest_size=16).digest()
            yield key


Saved: TypeAlias = list[tuple[Tensor, Tensor]]
"""Keys and values of a segment's tokens, layer by layer: each [num_kv_heads, num_tokens, head_dim]."""


class Store(Protocol):
    """The keys and values behind the pool's slots."""

    def save(self, segment: Segment) -> Saved:
        """A copy of what `segment` holds, in host memory."""
        ...

    def restore(self, segment: Segment, saved: Saved) -> None:
        """Write what `save` gave to the slots that `segment` has now."""
        ...


class KvStore:
    """The keys and values behind the pool's slots, one pair of tensors a layer.

    Logically a page is [kv_head, slot, head_dim]; in memory the KV head comes first, so that a run of consecutive pages
    is, per head, one contiguous block: k[layer] and v[layer] are [num_kv_heads, num_pages * page_size, head_dim].
    """

    def __init__(self, pool: PagePool, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        shape = (num_kv_heads, pool.num_pages * pool.page_size, head_dim)
        self.k: list[Tensor] = [aligned_zeros(shape, dtype) for _ in range(num_layers)]
        self.v: list[Tensor] = [aligned_zeros(shape, dtype) for _ in range(num_layers)]

    @classmethod
    def over(cls, k: list[Tensor], v: list[Tensor]) -> KvStore:
        """A store in memory of the caller's: k[layer], v[layer] as above."""
        store = cls.__new__(cls)
        store.k, store.v = k, v
        return store

    def save(self, segment: Segment) -> Saved:
        """A copy of what `segment` holds, in host memory."""
        slots = self._slots(segment)
        return [(k[:, slots], v[:, slots]) for k, v in zip(self.k, self.v, strict=True)]

    def restore(self, segment: Segment, saved: Saved) -> None:
        """Write what `save` gave to the slots that `segment` has now."""
        slots = self._slots(segment)
        for k, v, (saved_k, saved_v) in zip(self.k, self.v, saved, strict=True):
            k[:, slots] = saved_k
            v[:, slots] = saved_v

    def _slots(self, segment: Segment) -> Tensor:
        return torch.cat([torch.arange(first, stop) for first, stop in segment.runs()])


ALIGNMENT = 64
"""Bytes. Memory of torch's own begins at multiples of it, and so does a store: where a key lies changes no bit then."""


def aligned_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that begin at a multiple of `ALIGNMENT`, untouched until they are written. dtype: fp32 or fp64"""
    # numpy's zeros come untouched from the operating system, page by page as they are first written; torch's are
    # written at once, which costs a default pool 2 GiB and most of a second.
    plain: np.dtype[Any] = np.dtype({torch.float32: "f4", torch.float64: "f8"}[dtype])
    size = math.prod(shape) * plain.itemsize
    raw = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return torch.from_numpy(raw[first : first + size].view(plain).reshape(shape))
