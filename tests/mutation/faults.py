"""Faults made by hand: in correct recordings, and in the code while it runs.

Each says what it breaks and which check must find it. A fault in a recording is one that some careless scheduler could
commit; a fault in the code is one that a careless change could bring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anabranch.compiler import recording as rec
from anabranch.compiler.recording import Recording, Step
from anabranch.compiler.scheduler import Machine, Scheduler
from anabranch.runtime import attention, tasks
from anabranch.runtime.attention import StepAttention
from anabranch.runtime.context import Context, Row
from anabranch.runtime.engine import Engine
from anabranch.runtime.joins import JoinState
from anabranch.runtime.pages import Entry, KvStore, PagePool, PrefixCache, Segment, View
from anabranch.runtime.tasks import Task


@dataclass(frozen=True)
class Fault:
    """One fault. setting: the run of the battery that it is put into; caught: by which checks it may be.

    edit: changes a recording; patch: changes the code of this process
    """

    name: str
    breaks: str
    caught: tuple[str, ...]
    setting: str
    edit: Callable[[Recording], Recording] | None = None
    patch: Callable[[], None] | None = None


# --- where things are in a recording


def _find(steps: Sequence[Step], kind: type, holds: Callable[[Any], bool] = lambda step: True, start: int = 0) -> int:
    """The first step of a kind that `holds`, from `start` on."""
    for index in range(start, len(steps)):
        if isinstance(steps[index], kind) and holds(steps[index]):
            return index
    raise LookupError(f"no {kind.__name__} of this sort after step {start}")


def _last(steps: Sequence[Step], kind: type, holds: Callable[[Any], bool] = lambda step: True) -> int:
    return len(steps) - 1 - _find(steps[::-1], kind, holds)


def _cut(steps: Sequence[Step], *indices: int) -> tuple[Step, ...]:
    return tuple(step for index, step in enumerate(steps) if index not in indices)


def _put(steps: Sequence[Step], index: int, *new: Step) -> tuple[Step, ...]:
    return (*steps[:index], *new, *steps[index:])


def _move(steps: Sequence[Step], source: int, target: int) -> tuple[Step, ...]:
    """The step at `source` comes just before the one at `target`."""
    step = steps[source]
    return _put(_cut(steps, source), target - (source < target), step)


def _change(steps: Sequence[Step], index: int, **fields: Any) -> tuple[Step, ...]:
    return (*steps[:index], replace(steps[index], **fields), *steps[index + 1 :])  # type: ignore[type-var]


def _block(steps: Sequence[Step], index: int, place: int, **fields: Any) -> tuple[Step, ...]:
    """A block of the call at `index` changed."""
    call = steps[index]
    assert isinstance(call, rec.Call)
    blocks = list(call.blocks)
    blocks[place] = replace(blocks[place], **fields)
    return _change(steps, index, blocks=tuple(blocks))


def _place(call: Any, holds: Callable[[rec.Block], bool]) -> int | None:
    return next((place for place, block in enumerate(call.blocks) if holds(block)), None)


def _find_block(steps: Sequence[Step], holds: Callable[[rec.Block], bool], start: int = 0) -> tuple[int, int]:
    """The first block of a call that `holds`: (index of the call, place of the block)."""
    index = _find(steps, rec.Call, lambda call: _place(call, holds) is not None, start)
    place = _place(steps[index], holds)
    assert place is not None
    return index, place


def _edit(change: Callable[[tuple[Step, ...]], tuple[Step, ...]]) -> Callable[[Recording], Recording]:
    return lambda recording: replace(recording, steps=change(recording.steps))


def _on(machine: Callable[[Recording], Machine]) -> Callable[[Recording], Recording]:
    return lambda recording: replace(recording, machine=machine(recording))


def _calls(recording: Recording) -> Iterator[rec.Call]:
    return (step for step in recording.steps if isinstance(step, rec.Call))


def _text(old: str, new: str) -> Callable[[Recording], Recording]:
    """The plan permits less than what was done."""
    return lambda recording: replace(
        recording, runs=tuple(replace(run, text=run.text.replace(old, new)) for run in recording.runs)
    )


# --- faults in recordings


def _page_for_two(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    first = steps[_find(steps, rec.Page)].page  # type: ignore[union-attr]
    return _change(steps, _find(steps, rec.Page, start=40), page=first)


def _other_arm(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    at = _find(steps, rec.Arm)
    return _change(steps, at, place=1 - steps[at].place)  # type: ignore[union-attr]


def _one_winner_less(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    at = _several(steps)
    return _change(steps, at, winners=steps[at].winners[1:])  # type: ignore[union-attr]


def _stitched_winner(steps: tuple[Step, ...]) -> tuple[int, int]:
    """(index of a Stitch, the open segment's number of its first winner)"""
    at = _find(steps, rec.Stitch)
    stitch = steps[at]
    assert isinstance(stitch, rec.Stitch)
    opened = _find(steps, rec.Open, lambda step: step.thread == stitch.winners[0])
    segment = steps[opened]
    assert isinstance(segment, rec.Open)
    return at, segment.segment


def _free_of(steps: Sequence[Step], segment: int) -> int:
    return _find(steps, rec.Free, lambda step: step.segment == segment)


def _free_stitched(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    at, segment = _stitched_winner(steps)
    return _move(steps, _free_of(steps, segment), at + 1)


def _free_prefix(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    forked = _find(steps, rec.Begin, lambda step: step.parent == 0 and not step.fresh)
    return _move(steps, _free_of(steps, 0), forked + 1)


def _read_freed(recording: Recording) -> Recording:
    """A row reads a slot of a page that was given back."""
    steps, size = recording.steps, recording.machine.page_size
    for freed, step in enumerate(steps):
        if isinstance(step, rec.Free):
            pages = [s.page for s in steps[:freed] if isinstance(s, rec.Page) and s.segment == step.segment]
            index = _find(steps, rec.Call, lambda call: call.blocks, freed)
            owned, cached = _owned(steps[:index])
            if pages and pages[0] not in cached.union(*owned.values()):
                block = steps[index].blocks[0]  # type: ignore[union-attr]
                reads = (((pages[0] * size, 1, 0), *block.reads[0]), *block.reads[1:])
                return replace(recording, steps=_block(steps, index, 0, reads=reads))
    raise LookupError("no page stays free")


def _owned(steps: Sequence[Step]) -> tuple[dict[int, list[int]], set[int]]:
    """After these steps: (pages of each segment, pages of the cache)"""
    owned: dict[int, list[int]] = {}
    cached: set[int] = set()
    for step in steps:
        match step:
            case rec.Page(segment, page):
                owned.setdefault(segment, []).append(page)
            case rec.Free(segment) | rec.SwapOut(segment):
                owned.pop(segment, None)
            case rec.SwapIn(segment, pages) | rec.Adopt(segment, _, _, pages):
                owned[segment] = list(pages)
            case rec.Shrink(segment, count):
                del owned[segment][-count:]
            case rec.Cache(page):
                cached.add(page)
            case rec.Uncache(page):
                cached.discard(page)
            case _:
                pass
    return owned, cached


def _reads(change: Callable[[tuple[rec.Read, ...]], tuple[rec.Read, ...]]) -> Callable[[Recording], Recording]:
    """The last row of a block that reads a view changed."""

    def edit(steps: tuple[Step, ...]) -> tuple[Step, ...]:
        index, place = _find_block(steps, lambda block: len(block.reads[-1]) > 1 and block.reads[-1][-1][1] > 1)
        reads = steps[index].blocks[place].reads  # type: ignore[union-attr]
        return _block(steps, index, place, reads=(*reads[:-1], change(reads[-1])))

    return _edit(edit)


def _siblings(steps: tuple[Step, ...]) -> tuple[int, int, int]:
    """A call in which two branches of one fork feed rows, and the places of their blocks."""
    parents = {step.thread: (step.parent, step.fork) for step in steps if isinstance(step, rec.Begin)}
    for index, step in enumerate(steps):
        for one, block in enumerate(step.blocks if isinstance(step, rec.Call) else ()):
            for two in range(one):
                other = step.blocks[two]  # type: ignore[union-attr]
                known = parents[block.thread][0] is not None and parents[block.thread] == parents[other.thread]
                if known and len(block.reads) == len(other.reads) == 1 and block.first == other.first > 0:
                    return index, one, two
    raise LookupError("no siblings feed side by side")


def _wrong_sibling(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    index, one, two = _siblings(steps)
    call = steps[index]
    assert isinstance(call, rec.Call)
    return _block(steps, index, one, reads=call.blocks[two].reads)


def _swapped_pages(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The pages of two siblings' segments change places, in the pool and not in what is read."""
    index, one, two = _siblings(steps)
    call = steps[index]
    assert isinstance(call, rec.Call)
    segments = (call.blocks[one].segment, call.blocks[two].segment)
    pages = [_find(steps, rec.Page, lambda step, s=segment: step.segment == s) for segment in segments]
    first, second = (steps[at].page for at in pages)  # type: ignore[union-attr]
    return _change(_change(steps, pages[0], page=second), pages[1], page=first)


def _after_stitch(steps: tuple[Step, ...]) -> tuple[int, int, rec.Stitch]:
    at = _find(steps, rec.Stitch)
    stitch = steps[at]
    assert isinstance(stitch, rec.Stitch)
    index, place = _find_block(steps, lambda block: block.thread == stitch.thread, at)
    return index, place, stitch


def _one_too_far(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    index, place, stitch = _after_stitch(steps)
    opened = _find(steps, rec.Open, lambda step: step.thread == stitch.thread, _find(steps, rec.Stitch))
    block = steps[index].blocks[place]  # type: ignore[union-attr]
    steps = _block(steps, index, place, position=block.position + 1)
    return _change(steps, opened, start=steps[opened].start + 1)  # type: ignore[union-attr]


def _shifts(change: Callable[[int], int]) -> Callable[[Recording], Recording]:
    def edit(steps: tuple[Step, ...]) -> tuple[Step, ...]:
        index, place = _find_block(steps, lambda block: any(shift for _, _, shift in block.reads[-1]))
        reads = steps[index].blocks[place].reads  # type: ignore[union-attr]
        moved = tuple(tuple((a, n, change(shift) if shift else 0) for a, n, shift in row) for row in reads)
        return _block(steps, index, place, reads=moved)

    return _edit(edit)


def _several(steps: Sequence[Step]) -> int:
    return _find(steps, rec.Stitch, lambda step: len(step.winners) > 1)


def _reversed(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    at = _several(steps)
    return _change(steps, at, winners=steps[at].winners[::-1])  # type: ignore[union-attr]


def _joined_early(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    at = _find(steps, rec.Joined, lambda step: len(step.ok) > 1)
    return _change(_move(steps, at, _last(steps[:at], rec.End)), _last(steps[:at], rec.End), ok=steps[at].ok[:-1])  # type: ignore[union-attr]


def _loser_wins(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    at = _find(steps, rec.Joined, lambda step: step.winners and not step.failed)
    width = steps[_find(steps, rec.Forked, lambda step: step.thread == steps[at].thread)].width  # type: ignore[union-attr]
    ok = steps[at].ok  # type: ignore[union-attr]
    lost = next(index for index in range(width) if index not in ok)
    return _change(steps, at, ok=tuple(sorted((*ok[1:], lost))), winners=tuple(sorted((*ok[1:], lost))))


def _loser_runs_on(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    at = _find(steps, rec.End, lambda step: step.status == "cancelled")
    call = _find(steps, rec.Call, start=at)
    frees = at + 1
    while isinstance(steps[frees], rec.Free):
        frees += 1
    return (*steps[:at], *steps[frees : call + 1], *steps[at:frees], *steps[call + 1 :])


def _limit_passed(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The third branch of a fork with `limit=2` begins before one of the two has ended."""
    node = steps[_find(steps, rec.Forked)].node  # type: ignore[union-attr]
    begins = [index for index, step in enumerate(steps) if isinstance(step, rec.Begin) and step.fork == node]
    third = steps[begins[2]]
    assert isinstance(third, rec.Begin)
    at = _last(steps[: begins[2]], rec.End)
    return _move(steps, begins[2], at)


def _fed_twice(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    index, place = _find_block(steps, lambda block: block.first > 0 and len(block.reads) == 1)
    call = steps[index]
    assert isinstance(call, rec.Call)
    again = rec.Call((call.blocks[place].thread,), (call.blocks[place],))
    return _put(steps, index + 1, again)


def _not_fed(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    index, place = _find_block(steps, lambda block: block.first > 0 and len(block.reads) == 1)
    call = steps[index]
    assert isinstance(call, rec.Call)
    return _change(steps, index, blocks=(*call.blocks[:place], *call.blocks[place + 1 :]))


def _not_fed_again(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Calls that feed lost tokens again are left without them."""
    lost = steps[_find(steps, rec.Lose)].thread  # type: ignore[union-attr]
    at = _find(steps, rec.Lose)
    index, place = _find_block(steps, lambda block: block.thread == lost, at)
    call = steps[index]
    assert isinstance(call, rec.Call)
    return _change(steps, index, blocks=(*call.blocks[:place], *call.blocks[place + 1 :]))


def _taken_back(recording: Recording) -> Recording:
    """Swapped-in content lands in other pages than those that are read."""
    steps = recording.steps
    for at, step in enumerate(steps):
        if isinstance(step, rec.SwapIn):
            owned, cached = _owned(steps[:at])
            taken = cached.union(step.pages, *owned.values())
            later = {page.page for page in steps[at:] if isinstance(page, rec.Page)}
            free = next((page for page in range(recording.machine.pages) if page not in taken | later), None)
            if free is not None:
                return replace(recording, steps=_change(steps, at, pages=(*step.pages[:-1], free)))
    raise LookupError("no page is free")


def _onto_others(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    at = _find(steps, rec.SwapIn)
    owned, _ = _owned(steps[:at])
    other = next(pages[0] for pages in owned.values() if pages)
    return _change(steps, at, pages=(other, *steps[at].pages[1:]))  # type: ignore[union-attr]


def _other_prefix(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    at = _find(steps, rec.Adopt, lambda step: len(step.pages) > 1)
    pages = steps[at].pages  # type: ignore[union-attr]
    return _change(steps, at, pages=(pages[1], pages[0], *pages[2:]))


def _uncached(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    at = _find(steps, rec.Adopt)
    page = steps[at].pages[0]  # type: ignore[union-attr]
    return _cut(steps, _last(steps[:at], rec.Cache, lambda step: step.page == page))


def _cached_in_use(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The cache takes the page that a segment is still writing to."""
    index, place = _find_block(steps, lambda block: block.first % 4 == 3 and len(block.reads) == 1)
    block = steps[index].blocks[place]  # type: ignore[union-attr]
    page = block.reads[0][-1][0] // 4
    return _put(steps, index, rec.Cache(page))


def _drawn_early(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    at = _find(steps, rec.Token)
    return _move(steps, at, _last(steps[:at], rec.Call))


def _sibling_path(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    one = _find(steps, rec.Begin, lambda step: step.index == 1)
    parent = steps[one].parent  # type: ignore[union-attr]
    other = _find(steps, rec.Begin, lambda step: step.parent == parent and step.index == 0)
    return _change(steps, one, path=steps[other].path)  # type: ignore[union-attr]


def _begins_again(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """A branch that ended ok is run once more."""
    at = _find(steps, rec.End, lambda step: step.status == "ok")
    thread = steps[at].thread  # type: ignore[union-attr]
    begun = steps[_find(steps, rec.Begin, lambda step: step.thread == thread)]
    assert isinstance(begun, rec.Begin)
    number = sum(isinstance(step, rec.Begin) for step in steps[:at])
    return _put(steps, at + 1, replace(begun, thread=number, path=(*begun.path[:-1], begun.path[-1] + "~1")))


def _parent_draws(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """A thread takes a seat while it waits for its branches."""
    forked = _find(steps, rec.Forked)
    at = _find(steps, rec.Call, start=forked)
    return _change(steps, at, seats=(steps[forked].thread, *steps[at].seats))  # type: ignore[union-attr]


def _sealed_too_early(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """A segment is sealed before its last row, which takes no new page."""
    last: dict[int, tuple[int, rec.Block]] = {}
    for index, step in enumerate(steps):
        match step:
            case rec.Call(_, blocks):
                last.update((block.segment, (index, block)) for block in blocks)
            case rec.Seal(segment):
                call, block = last[segment]
                if len(block.reads) == 1 and block.first % 4:
                    return _put(_cut(steps, index), call, rec.Trim(block.thread, 1), step)
            case _:
                pass
    raise LookupError("each last row takes a page")


def _read_while_out(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    at = _find(steps, rec.SwapIn)
    segment = steps[at].segment  # type: ignore[union-attr]
    index, _ = _find_block(steps, lambda block: block.segment == segment, at)
    return _move(steps, at, index + 1)


def _half_page_cached(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The cache takes the last page of a sealed segment, which has room left."""
    fed: dict[int, int] = {}
    pages: dict[int, list[int]] = {}
    for index, step in enumerate(steps):
        match step:
            case rec.Page(segment, page):
                pages.setdefault(segment, []).append(page)
            case rec.Call(_, blocks):
                for block in blocks:
                    fed[block.segment] = block.first + len(block.reads)
            case rec.Seal(segment) if fed[segment] % 4:
                return _put(steps, index + 1, rec.Cache(pages[segment][-1]))
            case _:
                pass
    raise LookupError("every segment is full")


def _kind(old: str, new: str, several: bool = False) -> Callable[[Recording], Recording]:
    def edit(steps: tuple[Step, ...]) -> tuple[Step, ...]:
        index, place = _find_block(
            steps, lambda block: block.kinds[0][0] == old and (several or block.kinds == ((old, 1),))
        )
        kinds = steps[index].blocks[place].kinds  # type: ignore[union-attr]
        return _block(steps, index, place, kinds=((new, kinds[0][1]), *kinds[1:]))

    return _edit(edit)


def _after_end(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    at = _find(steps, rec.End, lambda step: step.thread > 0)
    thread = steps[at].thread  # type: ignore[union-attr]
    return _put(steps, at + 1, rec.Write(thread, (65,)))


def _not_in_order(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Under a deterministic engine a race reads another branch than the first in order."""
    at = _find(steps, rec.Joined, lambda step: step.winners)
    ok = steps[at].ok  # type: ignore[union-attr]
    ended = [
        next(begun.index for begun in steps if isinstance(begun, rec.Begin) and begun.thread == step.thread)
        for step in steps[:at]
        if isinstance(step, rec.End) and step.status == "ok"
    ]
    other = next(index for index in ended if index not in ok)
    return _change(steps, at, ok=(other,), winners=(other,))


def _idle_call(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    at = _last(steps, rec.Call)
    return _put(steps, at, rec.Call(steps[at].seats, ()))  # type: ignore[union-attr]


def _of_recordings() -> Iterator[Fault]:
    def fault(name: str, breaks: str, rules: str, setting: str, edit: Any) -> Fault:
        rules_ = tuple(f"verifier: {rule}" for rule in rules.split())
        change = (
            edit if not getattr(edit, "__code__", None) or edit.__code__.co_varnames[:1] != ("steps",) else _edit(edit)
        )
        return Fault(name, breaks, rules_, setting, edit=change)

    yield fault(
        "free a stitched segment", "a pin: the join's view names it", "free-when-unseen", "nested max", _free_stitched
    )
    yield fault(
        "free the shared prefix", "a pin: branches that run see it", "free-when-unseen", "nested max", _free_prefix
    )
    yield fault(
        "free twice",
        "a segment is freed once",
        "freed-once",
        "nested max",
        lambda r: replace(r, steps=(*r.steps, r.steps[_last(r.steps, rec.Free)])),
    )
    yield fault(
        "skip a free",
        "every page comes back",
        "all-freed",
        "nested max",
        lambda r: replace(r, steps=_cut(r.steps, _last(r.steps, rec.Free))),
    )
    yield fault(
        "drop a page",
        "tokens stand in pages",
        "pages-as-needed",
        "nested max",
        lambda r: replace(r, steps=_cut(r.steps, _find(r.steps, rec.Page, start=40))),
    )
    yield fault(
        "a page for two",
        "a page has one owner",
        "page-is-free",
        "nested max",
        _page_for_two,
    )
    yield fault(
        "a page that is not there",
        "the pool's size",
        "page-is-free",
        "nested max",
        lambda r: replace(r, steps=_change(r.steps, _find(r.steps, rec.Page), page=r.machine.pages)),
    )
    yield fault(
        "drop a seal",
        "what others see is sealed",
        "reads-its-view stitch-the-winners sealed-not-written",
        "nested max",
        lambda r: replace(r, steps=_cut(r.steps, _find(r.steps, rec.Seal, start=60))),
    )
    yield fault("write to a sealed segment", "sealed is sealed", "sealed-not-written", "nested max", _sealed_too_early)
    yield fault(
        "alias the wrong sibling", "a branch reads its sibling's slots", "reads-its-view", "nested max", _wrong_sibling
    )
    yield fault(
        "swap two branches' pages",
        "a segment's rows are read where they stand",
        "reads-its-view no-read-after-free",
        "nested max",
        _swapped_pages,
    )
    yield fault("one position too far after a stitch", "positions", "right-position", "nested max", _one_too_far)
    yield fault(
        "a shift forgotten", "end to end becomes side by side", "right-distance", "nested sum", _shifts(lambda shift: 0)
    )
    yield fault("a shift one off", "distances", "right-distance", "nested sum", _shifts(lambda shift: shift + 1))
    yield fault("stitch in the wrong order", "branch order", "stitch-the-winners", "nested sum", _reversed)
    yield fault(
        "forget to stitch",
        "the winners enter the view",
        "stitch-the-winners",
        "nested max",
        lambda r: replace(r, steps=_cut(r.steps, _find(r.steps, rec.Stitch))),
    )
    yield fault(
        "stitch a winner too few",
        "the winners enter the view",
        "stitch-the-winners",
        "nested max",
        _one_winner_less,
    )
    yield fault("read after free", "a slot of a page that was given back", "no-read-after-free", "control", _read_freed)
    yield fault(
        "read a slot not yet written",
        "a row sees what was fed",
        "no-read-after-free reads-its-view",
        "nested max",
        _reads(lambda row: (*row[:-1], (row[-1][0], row[-1][1] + 1, row[-1][2]))),
    )
    yield fault(
        "miss its own key",
        "a row sees itself",
        "reads-its-view",
        "nested max",
        _reads(lambda row: (*row[:-1], (row[-1][0], row[-1][1] - 1, row[-1][2]))),
    )
    yield fault(
        "miss the prefix", "a row sees all of its view", "reads-its-view", "nested max", _reads(lambda row: row[1:])
    )
    yield fault(
        "read a key twice", "each key counts once", "reads-its-view", "nested max", _reads(lambda row: (row[0], *row))
    )
    yield fault(
        "a lane too many",
        "lanes",
        "lanes",
        "nested max",
        _on(lambda r: replace(r.machine, lanes=max(len(call.seats) for call in _calls(r)) - 1)),
    )
    yield fault(
        "a row too many in a chunk",
        "the chunk",
        "chunk",
        "nested max",
        _on(lambda r: replace(r.machine, chunk=r.machine.chunk - 1)),
    )
    yield fault("a branch beyond `limit`", "limit=2", "limit-of-the-fork", "control", _limit_passed)
    yield fault("read a join early", "`all` waits for all", "joined-when-permitted", "nested max", _joined_early)
    yield fault("a loser wins", "winners ended ok", "winners-of-the-join stitch-the-winners", "race first", _loser_wins)
    yield fault("a loser runs on", "who loses is cancelled", "losers-stop", "race first", _loser_runs_on)
    yield fault(
        "the later wins",
        "the order of a deterministic race",
        "order-of-ends winners-of-the-join",
        "race in order",
        _not_in_order,
    )
    yield fault(
        "skip a node",
        "every statement is done",
        "in-order draws-of-the-gen waits-for-its-branches",
        "nested max",
        lambda r: replace(r, steps=_cut(r.steps, _find(r.steps, rec.Enter, lambda step: step.thread > 0))),
    )
    yield fault(
        "do a node twice",
        "every statement is done once",
        "in-order",
        "nested max",
        lambda r: replace(r, steps=_put(r.steps, _find(r.steps, rec.Enter), r.steps[_find(r.steps, rec.Enter)])),
    )
    yield fault(
        "skip a round",
        "rounds of a loop",
        "rounds-of-the-loop",
        "control",
        lambda r: replace(r, steps=_change(r.steps, _find(r.steps, rec.Round), number=1)),
    )
    yield fault(
        "take the other arm",
        "one arm of each condition",
        "in-order",
        "control",
        _other_arm,
    )
    yield fault("feed a token twice", "each token is fed once", "fed-in-order", "nested max", _fed_twice)
    yield fault(
        "do not feed a token",
        "each token is fed",
        "logits-at-hand fed-in-order pages-as-needed",
        "nested max",
        _not_fed,
    )
    yield fault(
        "do not feed lost tokens again",
        "recomputation",
        "lost-is-fed-again pages-as-needed",
        "pressed cache",
        _not_fed_again,
    )
    yield fault(
        "swap in to other pages",
        "what is read is where it was put",
        "reads-its-view no-read-after-free",
        "pressed pages",
        _taken_back,
    )
    yield fault("swap in onto others", "a page has one owner", "page-is-free", "pressed pages", _onto_others)
    yield fault(
        "read while swapped out",
        "what is out is not there",
        "sealed-not-written swapped-back",
        "pressed pages",
        _read_while_out,
    )
    yield fault(
        "adopt pages of another prefix",
        "the cache's pages hold the same tokens",
        "adopt-the-same",
        "cached",
        _other_prefix,
    )
    yield fault("adopt what is not cached", "the cache owns what it gives", "adopt-the-same", "cached", _uncached)
    yield fault(
        "cache a page that is being written",
        "shared pages are not written",
        "cache-whole-pages shared-not-written",
        "nested max",
        _cached_in_use,
    )
    yield fault("cache half a page", "whole pages alone", "cache-whole-pages", "nested max", _half_page_cached)
    yield fault(
        "draw before the logits are there", "logits", "logits-at-hand draw-has-a-seat", "nested max", _drawn_early
    )
    yield fault(
        "use a sibling's path", "the noise of a draw is its path's", "path-of-the-branch", "nested max", _sibling_path
    )
    yield fault("run a branch twice", "a branch runs once", "branch-once", "nested max", _begins_again)
    yield fault("go on before the join", "a thread waits for its branches", "lanes", "nested max", _parent_draws)
    yield fault("flush and go on", "a flush seals", "flush-then-seal", "nested max", _kind("decode", "flush"))
    yield fault("count a draw as text", "kinds of rows", "kind-of-row", "nested max", _kind("decode", "prefill"))
    yield fault("write after the end", "over is over", "over-is-over", "nested max", _after_end)
    yield fault(
        "never end",
        "every thread ends",
        "all-over",
        "nested max",
        lambda r: replace(r, steps=r.steps[: _last(r.steps, rec.End)]),
    )
    yield fault(
        "end in the middle",
        "the whole text is run",
        "ends-at-its-end",
        "nested max",
        _text(' then", max=4);', ' then", max=4); text("more");'),
    )
    yield fault("draw beyond `max`", "max=", "draws-of-the-gen", "nested max", _text("gen(max=4)", "gen(max=3)"))
    yield fault("spend beyond a budget", "budget=", "budget-kept", "budget", _text("budget=30", "budget=6"))
    yield fault("an idle call", "who holds a lane gets on", "seats-work draw-has-a-seat", "nested max", _idle_call)
    yield fault(
        "slower than the machine", "the bound on calls", "within-bounds", "generated 14",
        _on(lambda r: replace(r.machine, lanes=64, chunk=512, pages=4096)),
    )  # fmt: skip


# --- faults in the code


def _wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[], None]:
    """A patch: `make` gets what is there, and gives what takes its place."""
    return lambda: setattr(owner, name, make(owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)))


def _no_pin() -> None:
    def made(self: View, parent: View | None, entries: Sequence[Entry]) -> None:
        real(self, parent, entries)
        for entry in self.entries:
            entry.segment.ref_count -= 1

    def drop(self: View) -> None:
        for link in self.chain():
            for entry in link.entries if link.ref_count == 1 else ():
                entry.segment.ref_count += 1
        real_drop(self)

    real, real_drop = View.__init__, View.drop
    View.__init__, View.drop = made, drop  # type: ignore[method-assign]


def _dropped_early(real: Any) -> Any:
    def drop(self: Segment) -> None:
        if self.ref_count == 2:
            self.ref_count = 1
            real(self)
            self.ref_count = 1
        else:
            self.ref_count -= 1

    return drop


def _other_winners(real: Any) -> Any:
    def stitch(self: Task, state: Any, winners: list[Task]) -> Any:
        others = [task for task in state.finished.values() if task not in winners]
        yield from real(self, state, [*others[:1], *winners[1:]] if others else winners)

    return stitch


def _other_positions(real: Any) -> Any:
    def stitch(self: Task, state: Any, winners: list[Task]) -> Any:
        spec = state.join.spec
        state.join.spec = replace(spec, positions="max" if spec.positions == "sum" else "sum")
        yield from real(self, state, winners)
        state.join.spec = spec

    return stitch


def _alias_with(change: Callable[[list[Entry], int], tuple[list[Entry], int]]) -> Callable[[Any], Any]:
    def make(real: Any) -> Any:
        return lambda self, entries, position: real(self, *change(list(entries), position))

    return make


def _machine(**more: int) -> Callable[[], None]:
    """The scheduler takes the machine to be larger than it is."""

    def make(real: Any) -> Any:
        def new(self: Engine) -> Scheduler:
            scheduler: Scheduler = real(self)
            machine = scheduler.machine
            scheduler.machine = replace(machine, **{name: getattr(machine, name) + add for name, add in more.items()})
            return scheduler

        return new

    return _wrap(Engine, "_new_scheduler", make)


def _carried_all(real: Any) -> Any:
    def reserve(self: Scheduler, thread: Any) -> bool:
        if thread.group is not None:
            thread.group.carrier = None
        return bool(real(self, thread))

    return reserve


def _early(real: Any) -> Any:
    def decided(self: JoinState, soonest: Any) -> bool:
        if self.spec.kind == "all" and self.width > 1 and len(self.ended) == self.width - 1:
            self.close_now()
            return True
        return bool(real(self, soonest))

    return decided


def _keys_without_parent(real: Any) -> Any:
    def keys(self: PrefixCache, token_ids: Sequence[int]) -> Iterator[bytes]:
        size = self._pool.page_size
        for start in range(0, len(token_ids) - size + 1, size):
            yield repr(list(token_ids[start : start + size])).encode()

    return keys


def _restored_beside(real: Any) -> Any:
    def restore(self: KvStore, segment: Segment, saved: Any) -> None:
        # Keys and values moved together would be the same set of both, which attention cannot tell apart.
        real(self, segment, [(k.roll(1, 1), v) for k, v in saved])

    return restore


def _saved_nothing(real: Any) -> Any:
    return lambda self, segment: [(k * 0, v * 0) for k, v in real(self, segment)]


def _one_page_for_all(real: Any) -> Any:
    def allocate(self: PagePool, after: int | None = None, expect: int = 1) -> int:
        page: int = real(self, after, expect)
        if page % 5 == 4 and self.ref_count[page - 1]:
            return page - 1
        return page

    return allocate


def _released_late(real: Any) -> Any:
    def release(self: PagePool, pages: Sequence[int]) -> None:
        real(self, [page for page in pages if page % 7 != 3])

    return release


def _evicts_in_use(real: Any) -> Any:
    def evict(self: PrefixCache, count: int) -> None:
        for key in list(self._pages)[::-1][:count]:
            page = self._pages[key]
            while self._pool.ref_count[page] > 1:
                self._pool.release([page])
            self._forget(key)

    return evict


def _no_view(real: Any) -> Any:
    def make(self: Context, pool: PagePool, view: View | None, position: int, role: str | None) -> None:
        real(self, pool, view.parent if view is not None and view.parent is not None else view, position, role)

    return make


def _lost_one(real: Any) -> Any:
    def lose(self: Context) -> None:
        real(self)
        if len(self.unfed) > 1:
            del self.unfed[0]
            self.position -= 1

    return lose


def _worst_on_tie(real: Any) -> Any:
    def result(self: JoinState) -> Any:
        found = real(self)
        if self.spec.kind in ("vote", "best") and len(found.ok) > 1 and not found.failed:
            other = next(index for index in found.ok if index not in found.winners[:1])
            value = self.ended[other].value
            return replace(found, winners=(other,) if found.winners else (), value=value)
        return found

    return result


def _rows_of_others(real: Any) -> Any:
    return lambda self, attention, blocks, owners, tokens, wanted: real(
        self, attention, blocks, owners, tokens, wanted
    ).roll(1, 0)


def _planned(change: Callable[[StepAttention], None]) -> Callable[[Any], Any]:
    def make(real: Any) -> Any:
        def init(self: StepAttention, *args: Any) -> None:
            real(self, *args)
            change(self)

        return init

    return make


def _rotated(real: Any) -> Any:
    def finish(self: StepAttention) -> None:
        self.positions = self.positions + (self.positions > 5)
        real(self)

    return finish


def _slot_one_off(found: StepAttention) -> None:
    found._slots = (found._slots - 1).clamp(min=0)


def _own_key_missing(real: Any) -> Any:
    def add(self: Any, segment: Segment, length: int, shift: int) -> None:
        real(self, segment, length - 1 if length > 3 and not segment.sealed else length, shift)

    return add


def _shift_lost(real: Any) -> Any:
    def link_slots(link: View) -> Any:
        found = attention._Slots()
        for slots in real(link).values():
            found.extend(slots)
        return {0: found}

    return link_slots


def _never_sealed(real: Any) -> Any:
    def seal(self: Segment) -> None:
        self._settle()
        self.sealed = False

    return seal


def _unfed_forgotten(real: Any) -> Any:
    def run(self: Task, *args: Any, **options: Any) -> Any:
        walk = real(self, *args, **options)
        answer = None
        while True:
            try:
                request = walk.send(answer)
            except StopIteration as stop:
                return stop.value
            if isinstance(request, tasks.Feed):
                self.context.unfed.clear()
                answer = None
            else:
                answer = yield request

    return run


def _in_time(real: Any) -> Any:
    def made(self: JoinState, spec: Any, labels: Any, *, deterministic: bool) -> None:
        real(self, spec, labels, deterministic=False)

    return made


def _drawn_index(real: Any) -> Any:
    """The counter of a thread's draws starts anew at each gen."""

    def walk(self: Task, node: Any, held: bool) -> Any:
        self.drawn = 0
        return (yield from real(self, node, held))

    return walk


def _same_attempt(real: Any) -> Any:
    """A branch that is run again uses the noise of its first try."""
    return lambda seed, index, path: real(seed, index, tuple(part.partition("~")[0] for part in path))


def _no_path(real: Any) -> Any:
    return lambda seed, index, path: real(seed, index, ())


def _no_round(real: Any) -> Any:
    return lambda seed, index, path: real(seed, index, tuple(part for part in path if not part.startswith("loop")))


def _text_reversed(real: Any) -> Any:
    def join(self: Task, state: Any, result: Any) -> Any:
        if state.join.spec.context == "text":
            result = replace(result, winners=result.winners[::-1])
        return (yield from real(self, state, result))

    return join


def _flushes_nothing(real: Any) -> Any:
    """A stitch forgets the last token of each winner."""

    def stitch(self: Task, state: Any, winners: list[Task]) -> Any:
        for task in winners:
            self.run.forget(task.context)
        yield from real(self, state, winners)

    return stitch


def _only_of_themselves(real: Any) -> Any:
    """Nobody is cancelled."""

    def end(self: Engine, task: Task, status: Any, value: Any, reason: str) -> None:
        if status != "cancelled":
            real(self, task, status, value, reason)

    return end


def _without_limit(real: Any) -> Any:
    return lambda self, parent, children, **options: real(self, parent, children, **{**options, "limit": None})


def _no_shares(real: Any) -> Any:
    return lambda self, node, worst, limits: [None] * len(worst)


def _as_prefill(real: Any) -> Any:
    return lambda self, token_ids, row: real(self, token_ids, Row.PREFILL if row is Row.REPREFILL else row)


_SHOWN_BY = {
    "late": (
        "max and sum confused",
        "one position too far after a stitch (code)",
        "a stitch misses a segment",
        "a stitch flushes nothing",
        "logits of another row",
        "rotated one position off",
        "a row does not see itself",
        "written one slot off",
    ),
    "empty": (
        "stitch another branch",
        "a vote for another",
    ),
    "nested text": (
        "shifts dropped",
        "a shift is lost in the attention plan",
    ),
    "race pressed": (
        "a guest forks unpromoted",
        "a counter that starts anew",
        "losers go on",
    ),
    "pressed pages": (
        "every branch is carried",
        "swap in beside",
        "save nothing",
    ),
    "retry": (
        "`limit` ignored",
        "a seed without its attempt",
    ),
    "budget": ("a lane too many (code)",),
    "generated 7": ("budgets not shared out",),
    "generated 14": (
        "a view holds no segment",
        "a segment goes with its last reader but one",
        "a page given twice",
    ),
    "pressed cache": (
        "pages that are not there",
        "a lost token is not fed again",
        "the cache gives up pages in use",
    ),
    "cached tokens": ("cache keys without their parent",),
    "quorum": (
        "a branch does not see its parent's last segment",
        "text joined in reverse",
    ),
    "control": (
        "a seed without its round",
        "generated text counted as known",
    ),
    "generated 1": ("a race by time",),
}
"""Which run of the battery shows a fault in the code; any other is shown by `nested max`."""


def _of_code() -> Iterator[Fault]:
    shown_by = {name: setting for setting, names in _SHOWN_BY.items() for name in names}

    def fault(name: str, breaks: str, caught: str, patch: Callable[[], None]) -> Fault:
        names = {"reference", "noise", "law 2", "events", "ends", "crash", "limits", "all back"}
        checks = tuple(c.strip() if c.strip() in names else f"verifier: {c.strip()}" for c in caught.split(","))
        return Fault(name, breaks, checks, shown_by.get(name, "nested max"), patch=patch)

    yield fault("a view holds no segment", "the pin of every view", "free-when-unseen", _no_pin)
    yield fault(
        "a segment goes with its last reader but one",
        "the pin of a view",
        "free-when-unseen",
        _wrap(Segment, "drop", _dropped_early),
    )
    yield fault(
        "stitch another branch", "the winner's segments", "stitch-the-winners", _wrap(Task, "_stitch", _other_winners)
    )
    yield fault(
        "max and sum confused", "positions after a stitch", "right-position", _wrap(Task, "_stitch", _other_positions)
    )
    yield fault(
        "one position too far after a stitch (code)",
        "positions",
        "right-position",
        _wrap(Context, "alias", _alias_with(lambda entries, end: (entries, end + 1))),
    )
    yield fault(
        "shifts dropped",
        "end to end becomes side by side",
        "right-distance",
        _wrap(Context, "alias", _alias_with(lambda entries, end: ([Entry(e.segment) for e in entries], end))),
    )
    yield fault(
        "a stitch misses a segment",
        "the view of the parent",
        "reads-its-view, free-when-unseen",
        _wrap(Context, "alias", _alias_with(lambda entries, end: (entries[1:] or entries, end))),
    )
    yield fault(
        "a stitch flushes nothing",
        "the last token of a winner",
        "right-position, fed-in-order, reference, over-is-over",
        _wrap(Task, "_stitch", _flushes_nothing),
    )
    yield fault(
        "every branch is carried", "the reservation of a branch", "crash", _wrap(Scheduler, "_reserve", _carried_all)
    )
    yield fault(
        "a guest forks unpromoted",
        "the reservation of a fork",
        "crash, all back, limits",
        _wrap(Scheduler, "promote", lambda real: lambda self, thread: True),
    )
    yield fault("swap in beside", "bits in memory", "reference", _wrap(KvStore, "restore", _restored_beside))
    yield fault("save nothing", "bits in memory", "reference", _wrap(KvStore, "save", _saved_nothing))
    yield fault(
        "`limit` ignored",
        "limit=",
        "limit-of-the-fork",
        _wrap(Scheduler, "fork", _without_limit),
    )
    yield fault("a lane too many (code)", "lanes", "limits, lanes", _machine(lanes=1))
    yield fault("a row too many (code)", "the chunk", "chunk", _machine(chunk=1))
    yield fault("pages that are not there", "the pool's size", "crash, within-bounds", _machine(pages=8))
    yield fault(
        "a join is decided one branch early",
        "`all` waits for all",
        "joined-when-permitted",
        _wrap(JoinState, "decided", _early),
    )
    yield fault(
        "a race by time", "order under `deterministic`", "order-of-ends, law 2", _wrap(JoinState, "__init__", _in_time)
    )
    yield fault("a vote for another", "the value of a join", "reference", _wrap(JoinState, "result", _worst_on_tie))
    yield fault(
        "cache keys without their parent",
        "a page is what it saw",
        "adopt-the-same",
        _wrap(PrefixCache, "_keys", _keys_without_parent),
    )
    yield fault(
        "a page given twice",
        "a page has one owner",
        "page-is-free, all back",
        _wrap(PagePool, "allocate", _one_page_for_all),
    )
    yield fault("pages leak", "every page comes back", "all back, crash", _wrap(PagePool, "release", _released_late))
    yield fault(
        "the cache gives up pages in use",
        "a page has one owner",
        "page-is-free, all back, crash",
        _wrap(PrefixCache, "evict", _evicts_in_use),
    )
    yield fault(
        "a branch does not see its parent's last segment",
        "views",
        "reads-its-view",
        _wrap(Context, "__init__", _no_view),
    )
    yield fault(
        "a lost token is not fed again",
        "recomputation",
        "lost-is-fed-again, kind-of-row, fed-in-order, right-position",
        _wrap(Context, "lose", _lost_one),
    )
    yield fault(
        "nothing is sealed",
        "sealed is sealed",
        "sealed-not-written, cache-whole-pages, reads-its-view, stitch-the-winners",
        _wrap(Segment, "seal", _never_sealed),
    )
    yield fault(
        "a fork forgets the unfed token",
        "what a branch sees",
        "reads-its-view, fed-in-order, crash, right-position",
        _wrap(Task, "_run_branches", _unfed_forgotten),
    )
    yield fault(
        "logits of another row",
        "which logits a token is drawn from",
        "reference",
        _wrap(Engine, "_forward", _rows_of_others),
    )
    yield fault("rotated one position off", "bits in memory", "reference", _wrap(StepAttention, "_finish", _rotated))
    yield fault(
        "written one slot off", "bits in memory", "reference", _wrap(StepAttention, "__init__", _planned(_slot_one_off))
    )
    yield fault(
        "a row does not see itself",
        "the attention plan",
        "reads-its-view",
        _wrap(attention._Slots, "add", _own_key_missing),
    )
    yield fault(
        "a shift is lost in the attention plan",
        "distances",
        "right-distance",
        _wrap(attention, "_link_slots", _shift_lost),
    )
    yield fault(
        "a seed without its path",
        "the noise of a draw is its path's",
        "noise",
        _wrap(tasks, "draw_key", _no_path),
    )
    yield fault(
        "a seed without its round",
        "the noise of a draw is its path's",
        "noise, law 2",
        _wrap(tasks, "draw_key", _no_round),
    )
    yield fault(
        "a seed without its attempt",
        "the noise of a draw is its path's",
        "noise",
        _wrap(tasks, "draw_key", _same_attempt),
    )
    yield fault(
        "a counter that starts anew", "the noise of a draw", "noise, reference", _wrap(Task, "_draw", _drawn_index)
    )
    yield fault(
        "text joined in reverse",
        "branch order",
        "reference, events, winners-of-the-join",
        _wrap(Task, "_join", _text_reversed),
    )
    yield fault(
        "generated text counted as known",
        "the counts of a run",
        "law 2, kind-of-row",
        _wrap(Context, "push", _as_prefill),
    )
    yield fault(
        "budgets not shared out",
        "budget=",
        "budget-kept, law 2",
        _wrap(Task, "_shares", _no_shares),
    )
    yield fault(
        "losers go on", "who loses is cancelled", "crash, losers-stop, ends, joined-when-permitted",
        _wrap(Engine, "_end", _only_of_themselves),
    )  # fmt: skip


def on_recordings() -> list[Fault]:
    """Faults that are put into recordings."""
    return list(_of_recordings())


def in_code() -> list[Fault]:
    """Faults that are put into the scheduler, the engine and the pool while they run."""
    return list(_of_code())


__all__ = ["Fault", "in_code", "on_recordings"]
