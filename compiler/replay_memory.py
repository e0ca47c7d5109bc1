"""The pages and segments of a replayed schedule: who owns what, and what stands where."""

from __future__ import annotations

from collections.abc import Sequence

from anabranch.compiler.recording import Kinds, Read
from anabranch.compiler.replay_rules import fault
from anabranch.compiler.replay_threads import DRAWN, GENERATED, LITERAL, LOST, Thread
from anabranch.compiler.replay_views import Segment, View, check_reads, in_order, merged
from anabranch.compiler.scheduler import Machine

# A fault names so many runs of slots at most.
_SHOWN = 6


class Memory:
    """peak: most pages in use at once, without those that the prefix cache alone owns.

    owners: the segments that own a page, each with its place there
    cached: the pages of the prefix cache, each with a hash of what is seen after its last token
    epoch: how often segments have moved
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.segments: list[Segment] = []
        self.owners: dict[int, list[tuple[Segment, int]]] = {}
        self.cached: dict[int, bytes] = {}
        self.peak = self.num_open = self.swaps = self.recomputed = self.epoch = 0

    # --- segments

    def segment(self, number: int) -> Segment:
        if not 0 <= number < len(self.segments):
            fault("known-names", f"there is no segment {number}")
        segment = self.segments[number]
        if segment.freed:
            fault("freed-once", f"{segment} was freed")
        return segment

    def open(self, number: int, thread: Thread, start: int) -> None:
        if thread.segment is not None:
            fault("sealed-not-written", f"{thread} opens segment {number} while {thread.segment} is open")
        if start != thread.fed:
            fault("right-position", f"segment {number} starts at {start}, and {thread} stands at {thread.fed}")
        thread.segment = self._new(number, thread, start)

    def seal(self, number: int, thread: Thread) -> None:
        """`thread` holds the segment open."""
        segment = self.segment(number)
        self._written_by(segment, thread)
        if len(segment.pages) != segment.num_needed():
            fault("pages-as-needed", f"{segment} has {len(segment.pages)} pages for {segment.length} tokens")
        if thread.unfed.size:
            fault("fed-in-order", f"{segment} is sealed, and {thread} has yet to feed {thread.unfed.size} tokens")
        if thread.must_go_on and (thread.status is None or thread.pinned):
            fault("flush-then-seal", f"the last token of {thread} was not flushed, and {segment} is sealed after it")
        segment.sealed = True
        thread.segment, thread.must_seal = None, False
        self._gain(thread, [(segment, 0)])

    def free(self, number: int, thread: Thread) -> None:
        """`thread` is the segment's holder."""
        segment = self.segment(number)
        if segment.length and thread.sees():
            fault("free-when-unseen", f"{segment} is freed while {thread}, or a branch or join of it, sees it")
        if not segment.swapped and len(segment.pages) != segment.num_needed():
            fault("pages-as-needed", f"{segment} is freed with {len(segment.pages)} pages for {segment.length} tokens")
        if thread.segment is segment:
            thread.segment = None
        self._release(segment, segment.pages)
        segment.freed = True
        segment.set_pages(())
        self.num_open -= 1

    def stitch(self, thread: Thread, winners: Sequence[Thread], positions: str) -> None:
        """The winners' own segments enter the view of `thread`, laid side by side or end to end."""
        start = thread.position
        gained: list[tuple[Segment, int]] = []
        logits: int | None = None
        for winner in winners:
            if winner.unfed.size or (winner.segment is not None and winner.segment.length):
                fault("stitch-the-winners", f"{winner} is stitched before its last tokens are fed and sealed")
            shift = thread.position - start if positions == "sum" else 0
            gained += [(segment, inner + shift) for segment, inner in winner.gained]
            logits = winner.logits_at
            thread.position = max(thread.position, winner.position + shift)
            winner.pinned = False
        for segment, _ in gained:
            segment.holder = thread.number
        self._gain(thread, gained)
        if winners:
            thread.logits_at = logits if len(winners) == 1 else None

    def adopt(self, number: int, thread: Thread, ids: tuple[int, ...], pages: tuple[int, ...]) -> None:
        if thread.segment is not None:
            fault("adopt-the-same", f"{thread} adopts pages while {thread.segment} is open")
        size = self.machine.page_size
        if len(ids) != len(pages) * size or len(set(pages)) != len(pages) or not pages:
            fault("adopt-the-same", f"{len(pages)} pages of {size} are adopted for {len(ids)} tokens")
        if not thread.unfed.begins_with(ids):
            fault("adopt-the-same", f"the adopted tokens are not those that {thread} was to feed")
        segment = self._new(number, thread, thread.fed)
        segment.ids.extend(ids)
        for place, page in enumerate(pages):
            if page not in self.cached:
                fault("adopt-the-same", f"page {page} is adopted, and the prefix cache has it not")
            if self.cached[page] != segment.state((place + 1) * size).digest():
                fault("adopt-the-same", f"page {page} holds other tokens, or tokens that saw others")
            self.owners.setdefault(page, []).append((segment, place))
            segment.add_page(page)
        segment.sealed = segment.shared = True
        for _ in thread.unfed.take(len(ids)):
            pass
        self._gain(thread, [(segment, 0)])
        self._count()

    def trim(self, thread: Thread, count: int) -> None:
        """The thread's last tokens are taken back."""
        if count < 1:
            fault("fed-in-order", f"{thread} takes back {count} tokens")
        unfed = min(count, thread.unfed.size)
        fed = count - unfed
        segment = thread.segment
        if fed and (segment is None or fed > segment.length or thread.lost):
            have = segment.length if segment is not None else 0
            fault("fed-in-order", f"{thread} takes back {fed} fed tokens, and its open segment has {have}")
        thread.unfed.drop(unfed)
        thread.lost = min(thread.lost, thread.unfed.size)
        if fed and segment is not None:
            taken = segment.take_back(fed)
            for index, token in enumerate(taken, segment.length):
                segment.seen.setdefault(index, set()).add(token)
        thread.position -= count
        thread.must_go_on = False

    def lose(self, thread: Thread) -> None:
        """The thread's open segment is emptied, its pages go back, and its tokens are to be fed again."""
        segment = thread.segment
        if segment is None or not segment.length or segment.swapped:
            fault("lost-is-fed-again", f"{thread} loses a segment that it has not, or that is empty or swapped out")
        ids = segment.take_back(segment.length)
        self._release(segment, segment.pages)
        segment.set_pages(())
        thread.unfed.push_front(LOST, ids)
        thread.lost += len(ids)
        thread.logits_at = None

    # --- pages

    def page(self, number: int, page: int) -> None:
        segment = self.segment(number)
        if segment.sealed or segment.swapped:
            fault(
                "sealed-not-written", f"{segment} gets a page, and is {'sealed' if segment.sealed else 'swapped out'}"
            )
        self._take(page, segment, len(segment.pages))
        segment.add_page(page)
        self._count()

    def shrink(self, number: int, count: int) -> None:
        segment = self.segment(number)
        keep = len(segment.pages) - count
        if count < 1 or segment.sealed or segment.swapped or keep != segment.num_needed():
            fault("pages-as-needed", f"{segment} gives back {count} of {len(segment.pages)} pages")
        self._release(segment, segment.pages[keep:])
        segment.set_pages(segment.pages[:keep])

    def swap_out(self, number: int) -> None:
        segment = self.segment(number)
        if segment.swapped or segment.shared or any(page in self.cached for page in segment.pages):
            fault("swapped-back", f"{segment} is swapped out, and is so already or has pages that others own")
        self._release(segment, segment.pages)
        segment.swapped = True
        segment.set_pages(())
        self.epoch += 1
        self.swaps += 1

    def swap_in(self, number: int, pages: tuple[int, ...]) -> None:
        segment = self.segment(number)
        if not segment.swapped or len(pages) != segment.num_needed():
            fault("swapped-back", f"{segment} comes back to {len(pages)} pages, and has {segment.length} tokens")
        segment.swapped = False
        for place, page in enumerate(pages):
            self._take(page, segment, place)
        segment.set_pages(pages)
        self.epoch += 1
        self._count()

    def cache(self, page: int) -> None:
        owners = self.owners.get(page)
        if page in self.cached or not owners:
            fault("cache-whole-pages", f"the prefix cache takes page {page}, which it has or no segment owns")
        segment, place = owners[0]
        length = (place + 1) * self.machine.page_size
        if length > segment.length:
            fault("cache-whole-pages", f"the prefix cache takes page {page} of {segment}, which is not full")
        self.cached[page] = segment.state(length).digest()

    def uncache(self, page: int) -> None:
        if self.cached.pop(page, None) is None:
            fault("cache-whole-pages", f"the prefix cache lets go of page {page}, which it has not")

    # --- rows

    def feed(
        self, thread: Thread, number: int, first: int, position: int, kinds: Kinds, reads: Sequence[tuple[Read, ...]]
    ) -> None:
        """Rows of a call: the thread's next tokens, at the next slots of its open segment, each reading its view."""
        segment = self.segment(number)
        self._written_by(segment, thread)
        if segment.swapped:
            fault("sealed-not-written", f"{segment} is written while it is swapped out")
        if first != segment.length:
            fault("fed-in-order", f"rows are written to {segment} from {first} on, and it has {segment.length} tokens")
        if position != segment.start + first or position != thread.fed:
            fault("right-position", f"a row of {thread} stands at {position}, and its token at {thread.fed}")
        count = len(reads)
        if not 0 < count <= thread.unfed.size or any(many < 1 for _, many in kinds):
            fault("fed-in-order", f"{thread} feeds {count} rows and has {thread.unfed.size} tokens to feed")
        if sum(many for _, many in kinds) != count:
            fault("kind-of-row", f"{count} rows of {thread} have kinds for {sum(many for _, many in kinds)}")
        self._check_kinds(thread, segment, kinds, count)
        if len(segment.pages) != segment.num_needed():
            fault("pages-as-needed", f"{segment} has {len(segment.pages)} pages for {segment.length} tokens")
        size = self.machine.page_size
        for page in segment.pages[first // size :]:
            if page in self.cached or len(self.owners[page]) > 1:
                fault("shared-not-written", f"page {page} of {segment} is written, and others own it too")
        view = thread.view.runs(self.epoch) if thread.view is not None else ()
        for index, row in enumerate(reads, first):
            expected = check_reads(row, view, segment, index)
            if expected is not None:
                self._wrong_reads(f"row {index} of {segment}", merged(row), expected)
        thread.logits_at = None if thread.unfed.size else thread.position

    def _check_kinds(self, thread: Thread, segment: Segment, kinds: Kinds, count: int) -> None:
        """Take the thread's next tokens into the segment, each under its kind."""
        rows = iter(kinds)
        kind, left = "", 0
        for what, ids in thread.unfed.take(count):
            at = 0
            while at < len(ids):
                if not left:
                    kind, left = next(rows)
                if thread.must_seal:
                    fault("flush-then-seal", f"{thread} feeds on after a flushed token")
                part = ids[at : at + left]
                at, left = at + len(part), left - len(part)
                self._check_kind(thread, segment, what, kind, part)
                segment.ids.extend(part)

    def _check_kind(self, thread: Thread, segment: Segment, what: int, kind: str, ids: Sequence[int]) -> None:
        thread.must_seal = kind == "flush"
        thread.must_go_on = kind == "decode"
        if what == DRAWN:
            good = kind == "decode" or (kind == "flush" and len(ids) == 1)
        elif what == LOST:
            good = kind == "recompute"
            thread.lost -= len(ids)
        elif kind == "recompute":
            seen = (segment.seen.get(index, ()) for index in range(segment.length, segment.length + len(ids)))
            good = all(token in before for token, before in zip(ids, seen, strict=True))
        else:
            good = (kind == "prefill" and what != GENERATED) or (kind == "reprefill" and what != LITERAL)
        if not good:
            stood = ("literal", "known", "generated", "drawn", "lost")[what]
            fault("kind-of-row", f"{len(ids)} {stood} tokens of {thread} are fed as `{kind}`")
        self.recomputed += len(ids) if kind == "recompute" else 0

    def _wrong_reads(self, row: str, found: list[Read], expected: list[Read]) -> None:
        for first, count, _ in found:
            if count < 0 or not self._hold(first, count):
                fault("no-read-after-free", f"{row} reads {count} slots from {first} on, which hold no token")
        said = f"{row} reads {_shown(found)}, and must read {_shown(expected)}"
        plain = [in_order((first, count, 0) for first, count, _ in reads) for reads in (found, expected)]
        fault("right-distance" if plain[0] == plain[1] else "reads-its-view", said)

    def _hold(self, first: int, count: int) -> bool:
        """Whether all these slots hold tokens."""
        size = self.machine.page_size
        if first < 0 or count > (len(self.owners) + len(self.cached)) * size:
            return False
        for page in range(first // size, -(-(first + count) // size)):
            if page in self.cached:
                continue
            if page not in self.owners:
                return False
            segment, place = self.owners[page][0]
            end = min(first + count, (page + 1) * size)
            if place * size + end - page * size > segment.length:
                return False
        return True

    def _written_by(self, segment: Segment, thread: Thread) -> None:
        if segment.sealed or thread.segment is not segment:
            fault(
                "sealed-not-written", f"{thread} writes {segment}, which is {'sealed' if segment.sealed else 'not its'}"
            )

    # --- ownership

    def _new(self, number: int, thread: Thread, start: int) -> Segment:
        if number != len(self.segments):
            fault("known-names", f"segment {number} comes where segment {len(self.segments)} must come")
        segment = Segment(number, thread.number, thread.view, start, self.machine.page_size)
        self.segments.append(segment)
        self.num_open += 1
        return segment

    def _gain(self, thread: Thread, entries: Sequence[tuple[Segment, int]]) -> None:
        entries = [entry for entry in entries if entry[0].length]
        if entries:
            thread.view = View(thread.view, entries)
            thread.gained.extend(entries)

    def _take(self, page: int, segment: Segment, place: int) -> None:
        if not 0 <= page < self.machine.pages:
            fault("page-is-free", f"there is no page {page}; the machine has {self.machine.pages}")
        if page in self.owners or page in self.cached:
            fault("page-is-free", f"{segment} gets page {page}, which is not free")
        self.owners[page] = [(segment, place)]

    def _release(self, segment: Segment, pages: Sequence[int]) -> None:
        for page in pages:
            left = [owner for owner in self.owners[page] if owner[0] is not segment]
            if left:
                self.owners[page] = left
            else:
                del self.owners[page]

    def _count(self) -> None:
        self.peak = max(self.peak, len(self.owners))


def _shown(reads: Sequence[Read]) -> str:
    """Runs of slots for a person."""
    parts = [f"{first}..{first + count - 1}" + (f" shifted {shift}" if shift else "") for first, count, shift in reads]
    more = len(parts) - _SHOWN
    return ", ".join(parts[-_SHOWN:]) + (f" and {more} runs before" if more > 0 else "")
