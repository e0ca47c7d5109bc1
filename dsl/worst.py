"""The most that a plan may do, from what is written in it: tokens decoded, and statements carried out."""

from __future__ import annotations

from dataclasses import dataclass

CAP = 2**63 - 1
"""Where a count stops growing: recursion multiplies, and no device could decode so many."""

MAX_DECODED = 2**31 - 1
"""The most tokens that a plan may decode: no budget can be larger, since a device counts tokens in int32."""

MAX_STATEMENTS = 10**8
"""The most statements that a plan may carry out, branches and rounds counted: a hundred for each branch of the widest
fork, and minutes of the interpreter's own time. Without it three nested loops of a million rounds would never end, and
decode nothing that a budget could stop."""


@dataclass(frozen=True, slots=True)
class Worst:
    """At most `fixed + calls * W` tokens, where W is the worst case of the plan's call of itself.

    statements, own_calls: the same of statements, which no budget bounds
    """

    fixed: int = 0
    calls: int = 0
    statements: int = 0
    own_calls: int = 0

    def __add__(self, other: Worst) -> Worst:
        return Worst(
            min(CAP, self.fixed + other.fixed),
            min(CAP, self.calls + other.calls),
            min(CAP, self.statements + other.statements),
            min(CAP, self.own_calls + other.own_calls),
        )

    def times(self, n: int) -> Worst:
        """Of `n` runs."""
        return Worst(
            min(CAP, self.fixed * n),
            min(CAP, self.calls * n),
            min(CAP, self.statements * n),
            min(CAP, self.own_calls * n),
        )

    def either(self, other: Worst) -> Worst:
        """Of one of two arms: an upper bound of both."""
        return Worst(
            max(self.fixed, other.fixed),
            max(self.calls, other.calls),
            max(self.statements, other.statements),
            max(self.own_calls, other.own_calls),
        )

    def within(self, budget: int) -> Worst:
        """Under a budget, which bounds the calls of itself too."""
        fixed = budget if self.calls else min(self.fixed, budget)
        return Worst(fixed, 0, self.statements, self.own_calls)

    def total(self, depth: int) -> int:
        """The tokens where calls of itself nest at most `depth` deep."""
        return _nested(self.fixed, self.calls, depth)

    def total_statements(self, depth: int) -> int:
        """The statements where calls of itself nest at most `depth` deep."""
        return _nested(self.statements, self.own_calls, depth)


def _nested(fixed: int, calls: int, depth: int) -> int:
    total = fixed
    for _ in range(depth):
        total = min(CAP, fixed + calls * total)
    return total


NOTHING = Worst()
ONE_STATEMENT = Worst(statements=1)


def reduce_groups(items: int, by: int) -> int:
    """How many times the body of a `reduce` runs for `items` items: groups of one pass through."""
    groups = 0
    while items > 1:
        full, rest = divmod(items, by)
        groups += full + (rest > 1)
        items = full + (rest > 0)
    return groups
