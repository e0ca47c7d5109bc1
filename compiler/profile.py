"""How many pages a thread holds as it goes, in the worst case.

A thread writes into one open segment. A control point (fork, map, reduce, call) seals it, so its last page may stay
part empty, and what the thread writes next goes into a new segment. A stretch of a thread is therefore

    Profile(head, sealed, peak, wide, mid, tail)

head: tokens that it adds to the segment open at its start, up to its first control point
sealed: whether it has a control point at all; without one only `head` counts
peak, wide: pages above the sealed head at the worst moment, children one after another or all at once
mid: pages above the sealed head that stay for good: inner segments, and what stitches brought
tail: tokens in the segment that is open at its end

Stretches in a row are `then`, a loop is `times` in closed form, the arms of a condition are `either`. Sealing early
never takes fewer pages, which makes `either` an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.compiler.scheduler import Need


def pages_of(tokens: int, page_size: int) -> int:
    """Pages of one segment."""
    return -(-tokens // page_size)


@dataclass(frozen=True, slots=True)
class Profile:
    """See the module."""

    head: int = 0
    sealed: bool = False
    peak: int = 0
    wide: int = 0
    mid: int = 0
    tail: int = 0

    def then(self, following: Profile, page_size: int) -> Profile:
        """This stretch, and then that one."""
        if not self.sealed:
            if not following.sealed:
                return Profile(self.head + following.head)
            return Profile(
                self.head + following.head, True, following.peak, following.wide, following.mid, following.tail
            )
        if not following.sealed:
            return Profile(self.head, True, self.peak, self.wide, self.mid, self.tail + following.head)
        before = self.mid + pages_of(self.tail + following.head, page_size)
        return Profile(
            self.head,
            True,
            max(self.peak, before + following.peak),
            max(self.wide, before + following.wide),
            before + following.mid,
            following.tail,
        )

    def times(self, rounds: int, page_size: int) -> Profile:
        """This stretch `rounds` times in a row."""
        if not self.sealed:
            return Profile(self.head * rounds)
        gained = (rounds - 1) * (self.mid + pages_of(self.tail + self.head, page_size))
        return Profile(self.head, True, gained + self.peak, gained + self.wide, gained + self.mid, self.tail)

    def either(self, other: Profile) -> Profile:
        """This stretch or that one."""
        sealed = self.sealed or other.sealed
        return Profile(
            max(self.head, other.head),
            sealed,
            max(self.peak, other.peak),
            max(self.wide, other.wide),
            max(self.mid, other.mid),
            max(self.tail, other.tail),
        )

    def total(self, page_size: int) -> int:
        """Pages of the stretch, as a whole thread, at its end."""
        head = pages_of(self.head, page_size)
        return head + self.mid + pages_of(self.tail, page_size) if self.sealed else head

    def highest(self, page_size: int) -> int:
        """Pages of the stretch, as a whole thread, at its worst moment, children one after another."""
        return max(self.total(page_size), pages_of(self.head, page_size) + self.peak)

    def widest(self, page_size: int) -> int:
        """The same with all children at once."""
        return max(self.total(page_size), pages_of(self.head, page_size) + self.wide)


NO_PAGES = Profile()


def depth_first_peak(children: Sequence[tuple[Need, int]]) -> int:
    """The least pages with which branches can run one after another, in the best order.

    children: what each needs, and how many of its kind there are

    The order is by descending (peak - kept): what a branch gives back at its end it must not give back in vain.
    Source: Liu 1986, "On the storage requirement in the out-of-core multifrontal method"; Sethi and Ullman 1970 is
    the case of equal kept.
    """
    held = highest = 0
    for need, count in sorted(children, key=lambda child: child[0].kept - child[0].peak):
        if count:
            # Of equal branches the last stands on the kept pages of all the others.
            highest = max(highest, held + (count - 1) * need.kept + need.peak)
            held += count * need.kept
    return highest


def at_once_peak(children: Sequence[tuple[Need, int]], at_once: int | None) -> int:
    """Pages of all branches together, where `at_once` (None: all) run and the others have ended or not begun."""
    kept = sum(need.kept * count for need, count in children)
    left = sum(count for _, count in children) if at_once is None else at_once
    for need, count in sorted(children, key=lambda child: child[0].kept - child[0].peak):
        running = min(count, left)
        kept += running * (need.peak - need.kept)
        left -= running
    return kept


def kept_at_join(children: Sequence[tuple[Need, int]], winners: int | None) -> int:
    """Pages that stay after a join which stitches `winners` branches (None: all)."""
    left = sum(count for _, count in children) if winners is None else winners
    stays = 0
    for need, count in sorted(children, key=lambda child: -child[0].kept):
        taken = min(count, left)
        stays += taken * need.kept
        left -= taken
    return stays
