"""The most that a plan may do, from what is written in it: tokens decoded, and statements carried out."""

from __future__ import annotations

from dataclasses import dataclass, replace

CAP = 2**63 - 1
"""Where a count stops growing: recursion multiplies, and no device could decode so many."""

MAX_DECODED = 2**31 - 1
"""The most tokens that a plan may decode: no budget can be larger, since a device counts tokens in int32."""

MAX_STATEMENTS = 10**8
"""The most statements that a plan may carry out, branches and rounds counted: a hundred for each branch of the widest
fork, and minutes of the interpreter's own time. Without it three nested loops of a million rounds would never end, and
decode nothing that a budget could stop."""


MAX_NESTED = 256
"""How deep branches, loops, arms and calls may nest, those of called plans included. Whoever walks a run or a schedule
recurses a few of Python's 1,000 frames for each, and a branch's path names all that are around it."""


@dataclass(frozen=True, slots=True)
class Worst:
    """At most `fixed + calls * W` tokens, where W is the worst case of the plan's call of itself.

    statements, own_calls: the same of statements, which no budget bounds
    nested, to_itself: how deep blocks and calls nest; how deep a call of the plan itself stands, 0 where there is none
    """

    fixed: int = 0
    calls: int = 0
    statements: int = 0
    own_calls: int = 0
    nested: int = 0
    to_itself: int = 0

    def __add__(self, other: Worst) -> Worst:
        return Worst(
            min(CAP, self.fixed + other.fixed),
            min(CAP, self.calls + other.calls),
            min(CAP, self.statements + other.statements),
            min(CAP, self.own_calls + other.own_calls),
            max(self.nested, other.nested),
            max(self.to_itself, other.to_itself),
        )

    def times(self, n: int) -> Worst:
        """Of `n` runs."""
        return replace(
            self,
            fixed=min(CAP, self.fixed * n),
            calls=min(CAP, self.calls * n),
            statements=min(CAP, self.statements * n),
            own_calls=min(CAP, self.own_calls * n),
        )

    def either(self, other: Worst) -> Worst:
        """Of one of two arms: an upper bound of both."""
        return Worst(*(max(getattr(self, name), getattr(other, name)) for name in self.__slots__))

    def inside(self) -> Worst:
        """Of a block in which this stands, entered once."""
        to_itself = self.to_itself + 1 if self.to_itself else 0
        return replace(
            self, statements=min(CAP, self.statements + 1), nested=min(CAP, self.nested + 1), to_itself=to_itself
        )

    def within(self, budget: int) -> Worst:
        """Under a budget, which bounds the calls of itself too."""
        return replace(self, fixed=budget if self.calls else min(self.fixed, budget), calls=0)

    def total(self, depth: int) -> int:
        """The tokens where calls of itself nest at most `depth` deep."""
        return _recursed(self.fixed, self.calls, depth)

    def total_statements(self, depth: int) -> int:
        """The statements where calls of itself nest at most `depth` deep."""
        return _recursed(self.statements, self.own_calls, depth)

    def total_nested(self, depth: int) -> int:
        """How deep blocks and calls nest where calls of itself nest at most `depth` deep."""
        return min(CAP, self.to_itself * depth + self.nested)


def _recursed(fixed: int, calls: int, depth: int) -> int:
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
