"""The most tokens that a plan may decode, from what is written in it."""

from __future__ import annotations

from dataclasses import dataclass

CAP = 2**63 - 1
"""Where a count stops growing: recursion multiplies, and no device could decode so many."""


@dataclass(frozen=True, slots=True)
class Worst:
    """At most `fixed + calls * W` tokens, where W is the worst case of the plan's call of itself."""

    fixed: int = 0
    calls: int = 0

    def __add__(self, other: Worst) -> Worst:
        return Worst(min(CAP, self.fixed + other.fixed), min(CAP, self.calls + other.calls))

    def times(self, n: int) -> Worst:
        """Of `n` runs."""
        return Worst(min(CAP, self.fixed * n), min(CAP, self.calls * n))

    def either(self, other: Worst) -> Worst:
        """Of one of two arms: an upper bound of both."""
        return Worst(max(self.fixed, other.fixed), max(self.calls, other.calls))

    def within(self, budget: int) -> Worst:
        """Under a budget, which bounds the calls of itself too."""
        return Worst(budget if self.calls else min(self.fixed, budget))

    def total(self, depth: int) -> int:
        """The tokens where calls of itself nest at most `depth` deep."""
        total = self.fixed
        for _ in range(depth):
            total = min(CAP, self.fixed + self.calls * total)
        return total


NOTHING = Worst()


def reduce_groups(items: int, by: int) -> int:
    """How many times the body of a `reduce` runs for `items` items: groups of one pass through."""
    groups = 0
    while items > 1:
        full, rest = divmod(items, by)
        groups += full + (rest > 1)
        items = full + (rest > 0)
    return groups
