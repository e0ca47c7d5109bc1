"""Token counts that depend on sizes not known yet: `3 + 2 a + b`, with whole coefficients that are not negative.

A parameter's size is known once every call has been seen, and that of a name which a loop rebinds once the loop has
been; until then each is a symbol. Maxima are taken term by term, which never gives less than the true maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Symbol: TypeAlias = int

CAP = 2**40
"""No count grows past this, far beyond every context: a plan that squares a text in a loop stays cheap to refuse."""


@dataclass(frozen=True, slots=True)
class Amount:
    """`const` plus each symbol of `terms` times its coefficient."""

    const: int = 0
    terms: tuple[tuple[Symbol, int], ...] = ()

    def __add__(self, other: Amount | int) -> Amount:
        if isinstance(other, int):
            return Amount(min(self.const + other, CAP), self.terms)
        if not other.terms or not self.terms:
            return Amount(min(self.const + other.const, CAP), self.terms or other.terms)
        return Amount(min(self.const + other.const, CAP), _merge(self.terms, other.terms, lambda a, b: a + b))

    def times(self, count: int) -> Amount:
        """This many of it."""
        if count == 0:
            return ZERO
        return Amount(min(self.const * count, CAP), tuple((s, min(c * count, CAP)) for s, c in self.terms))

    def put(self, values: Mapping[Symbol, Amount]) -> Amount:
        """With the symbols of `values` replaced."""
        if not any(symbol in values for symbol, _ in self.terms):
            return self
        total = Amount(self.const)
        for symbol, count in self.terms:
            total += values[symbol].times(count) if symbol in values else Amount(0, ((symbol, count),))
        return total

    def value(self, of: Callable[[Symbol], int]) -> int:
        """The number that it comes to."""
        return min(self.const + sum(count * of(symbol) for symbol, count in self.terms), CAP)


ZERO = Amount()


def symbol(name: Symbol) -> Amount:
    """The amount that is this symbol."""
    return Amount(0, ((name, 1),))


def most(amounts: Sequence[Amount]) -> Amount:
    """At least each of `amounts`; zero where there are none."""
    found = ZERO
    for amount in amounts:
        if not amount.terms or not found.terms:
            found = Amount(max(found.const, amount.const), found.terms or amount.terms)
        else:
            found = Amount(max(found.const, amount.const), _merge(found.terms, amount.terms, max))
    return found


def after_rounds(
    start: Mapping[Symbol, Amount], step: Mapping[Symbol, Amount], rounds: int, *, tries: int = 32
) -> dict[Symbol, Amount]:
    """The most that each symbol holds in any of `rounds` rounds, the last one's result included.

    start: what each symbol holds at the first round
    step: what a round makes of it, in terms of the symbols

    Rounds are tried one by one until nothing grows. What still grows after `tries` of them is taken to go on at the
    rate of its last one, or to reach `CAP` where that rate is itself growing.
    """
    held = dict(start)
    growth: dict[Symbol, Amount] = {}
    for done in range(min(rounds, tries)):
        following = {name: most([held[name], step[name].put(held)]) for name in held}
        if following == held:
            return held
        before, growth = growth, {name: _difference(following[name], held[name]) for name in held}
        held = following
        if done == tries - 1 and rounds > tries:
            for name, rate in growth.items():
                steady = most([rate, before[name]]) == before[name]
                held[name] = held[name] + (rate.times(rounds - tries) if steady else rate.times(CAP))
    return held


def _difference(a: Amount, b: Amount) -> Amount:
    less = dict(b.terms)
    terms = tuple((name, count - less.get(name, 0)) for name, count in a.terms if count > less.get(name, 0))
    return Amount(a.const - b.const, terms)


def _merge(
    a: tuple[tuple[Symbol, int], ...], b: tuple[tuple[Symbol, int], ...], join: Callable[[int, int], int]
) -> tuple[tuple[Symbol, int], ...]:
    terms = dict(a)
    for name, count in b:
        terms[name] = min(join(terms[name], count), CAP) if name in terms else count
    return tuple(sorted(terms.items()))
