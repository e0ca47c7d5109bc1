"""Segments and views of a replayed schedule: what a row must read, and what a page must hold.

A view is a chain of links, each with the segments that it adds. Links never change, so branches share their parent's,
and a link remembers its slots as runs for as long as no segment moves.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import TypeAlias

from anabranch.compiler.recording import Read
from anabranch.compiler.replay_rules import fault

# What stands between tokens in the text that is hashed; token ids are never negative.
_ENTRY, _POSITION = -1, -2


class Segment:
    """A run of tokens of one thread.

    holder: the thread that sees it besides its descendants: who wrote it, then who stitched it
    base: the view of its tokens, besides one another
    ids: tokens fed, in order; start: position of the first
    starts, spans: its slots as runs: index of the first token, and first slot, of each
    seen: ids that were fed at an index and taken back
    """

    __slots__ = (
        "_states", "base", "freed", "holder", "ids", "number", "page_size", "pages", "sealed", "seen", "shared",
        "spans", "start", "starts", "swapped",
    )  # fmt: skip

    def __init__(self, number: int, holder: int, base: View | None, start: int, page_size: int) -> None:
        self.number = number
        self.holder = holder
        self.base = base
        self.start = start
        self.page_size = page_size
        self.ids: list[int] = []
        self.pages: list[int] = []
        self.starts: list[int] = []
        self.spans: list[int] = []
        self.seen: dict[int, set[int]] = {}
        self.sealed = self.swapped = self.freed = self.shared = False
        self._states: list[tuple[int, blake2b]] = []

    @property
    def length(self) -> int:
        return len(self.ids)

    def num_needed(self) -> int:
        """Pages that its tokens take."""
        return -(-len(self.ids) // self.page_size)

    def add_page(self, page: int) -> None:
        if not self.pages or self.pages[-1] + 1 != page:
            self.starts.append(len(self.pages) * self.page_size)
            self.spans.append(page * self.page_size)
        self.pages.append(page)

    def set_pages(self, pages: Iterable[int]) -> None:
        self.pages, self.starts, self.spans = [], [], []
        for page in pages:
            self.add_page(page)

    def runs(self, length: int) -> Iterator[tuple[int, int]]:
        """(first slot, how many) of its first `length` tokens."""
        last = bisect_right(self.starts, length - 1) - 1
        for place in range(last):
            yield self.spans[place], self.starts[place + 1] - self.starts[place]
        if last >= 0:
            yield self.spans[last], length - self.starts[last]

    def take_back(self, count: int) -> list[int]:
        """Its last `count` tokens, which it loses."""
        length = len(self.ids) - count
        ids = self.ids[length:]
        del self.ids[length:]
        while self._states and self._states[-1][0] > length:
            self._states.pop()
        return ids

    def state(self, length: int) -> blake2b:
        """A hash of all that is seen after its first `length` tokens: ids, positions and shifts, in order.

        How tokens are cut into segments does not matter, as long as nothing is shifted.
        """
        if not self._states:
            state = blake2b(digest_size=16) if self.base is None else self.base.state().copy()
            if self.start != (0 if self.base is None else self.base.end):
                _add(state, (_POSITION, self.start))
            self._states.append((0, state))
        place = bisect_right(self._states, length, key=lambda known: known[0]) - 1
        at, state = self._states[place]
        if at != length:
            state = state.copy()
            _add(state, self.ids[at:length])
            self._states.insert(place + 1, (length, state))
        return state

    def __str__(self) -> str:
        return f"segment {self.number}"


class View:
    """One link: what `parent` sees, then `entries` as (segment, shift), none of them empty.

    end: the position after its last token, where that is plain; else None
    """

    __slots__ = ("_epoch", "_runs", "_state", "end", "entries", "parent")

    def __init__(self, parent: View | None, entries: Sequence[tuple[Segment, int]]) -> None:
        self.parent = parent
        self.entries = entries
        first, shift = entries[0]
        self.end = first.start + first.length if len(entries) == 1 and shift == 0 else None
        self._runs: tuple[Read, ...] = ()
        self._epoch = -1
        self._state: blake2b | None = None

    def runs(self, epoch: int) -> tuple[Read, ...]:
        """Its slots in order, neighbours merged. epoch: changes whenever a segment moves."""
        links: list[View] = []
        link: View | None = self
        while link is not None and link._epoch != epoch:
            links.append(link)
            link = link.parent
        if not links:
            return self._runs
        found = list(link._runs) if link is not None else []
        for known in reversed(links):
            for segment, shift in known.entries:
                if segment.swapped:
                    fault("swapped-back", f"{segment} is read while it is swapped out")
                extend_runs(found, segment, segment.length, shift)
        self._runs, self._epoch = tuple(found), epoch
        return self._runs

    def state(self) -> blake2b:
        """A hash of all that is seen."""
        links: list[View] = []
        link: View | None = self
        while link is not None and link._state is None:
            links.append(link)
            link = link.parent
        for known in reversed(links):
            known._state = known._hash()
        assert self._state is not None
        return self._state

    def _hash(self) -> blake2b:
        if self.end is not None and self.entries[0][0].base is self.parent:
            # The thread's own segment: its hash covers all before it.
            segment = self.entries[0][0]
            return segment.state(segment.length)
        state = blake2b(digest_size=16) if self.parent is None else self.parent.state().copy()
        for segment, shift in self.entries:
            _add(state, (_ENTRY, shift))
            state.update(segment.state(segment.length).digest())
        return state

    def segments(self) -> Iterator[tuple[Segment, int]]:
        """Its segments with their shifts, the last first."""
        link: View | None = self
        while link is not None:
            yield from reversed(link.entries)
            link = link.parent


def _add(state: blake2b, numbers: Iterable[int]) -> None:
    state.update(array("q", numbers).tobytes())


def extend_runs(runs: list[Read], segment: Segment, length: int, shift: int) -> None:
    """Append the first `length` slots of `segment`, neighbours merged."""
    for first, count in segment.runs(length):
        if runs:
            before, size, same = runs[-1]
            if same == shift and before + size == first:
                runs[-1] = (before, size + count, shift)
                continue
        runs.append((first, count, shift))


def merged(reads: Iterable[Read]) -> list[Read]:
    """Runs with neighbours merged. One of no slots, or of fewer, stays as it is: no view has such."""
    found: list[Read] = []
    for read in reads:
        first, count, shift = read
        if found and count > 0:
            before, size, same = found[-1]
            if same == shift and size > 0 and before + size == first:
                found[-1] = (before, size + count, shift)
                continue
        found.append(read)
    return found


Reads: TypeAlias = tuple[Read, ...]


def check_reads(reads: Reads, view: Reads, segment: Segment, index: int) -> list[Read] | None:
    """None if `reads` are the keys of `view` and those of `segment` up to `index`; else what they should be.

    view: merged runs
    """
    length = index + 1
    whole = len(view)
    # Most rows: the view's runs as they are, then one run of the open segment.
    if (
        len(reads) == whole + 1
        and len(segment.spans) == 1
        and reads[whole] == (segment.spans[0], length, 0)
        and reads[:whole] == view
    ):
        return None
    expected = list(view)
    extend_runs(expected, segment, length, 0)
    # A kernel may take keys in any order, and takes those of one shift together.
    return None if merged(reads) == expected or in_order(reads) == in_order(expected) else expected


def in_order(reads: Iterable[Read]) -> list[Read]:
    """Runs in order of their slots, neighbours merged."""
    return merged(sorted(reads))
