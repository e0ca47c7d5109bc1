"""How near the scheduler comes to the best schedule, in calls of the model, without page pressure.

    python benchmarks/quality.py

Small plans are compared with the exact optimum, large ones with what no schedule can beat and with the bound that
docs/scheduler.md argues. Plans are drawn from fixed seeds, so the tables are the same on every machine. `foreseen`: the
scheduler's worst cases are the real lengths; `unforeseen`: gens stop early and the scheduler does not know when.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from forktrees import Branch, Figures, Fork, Item, Work, figures, measure, widest
from optimum import Unsolved, optimum

from anabranch.compiler.scheduler import Machine, Policy, Waiting

PAGES = 1 << 30
CHUNK = 512

Lengths: TypeAlias = Literal["equal", "uniform", "tail", "two"]
LENGTHS: tuple[Lengths, ...] = ("equal", "uniform", "tail", "two")
Shape: TypeAlias = Literal["flat", "nested", "stages", "reduce", "tree"]
SHAPES: dict[Shape, int] = {"flat": 8, "nested": 8, "stages": 2, "reduce": 1, "tree": 1}


@dataclass(slots=True)
class Author:
    """Writes random plans.

    foreseen: a gen's worst case is its length; else it is `longest`
    lengths: how long gens are; feeds: most rows before a gen
    """

    rng: random.Random
    foreseen: bool
    lengths: Lengths
    longest: int
    feeds: int

    def work(self) -> Work:
        rng, longest = self.rng, self.longest
        match self.lengths:
            case "equal":
                draw = longest
            case "uniform":
                draw = rng.randint(1, longest)
            case "tail":
                draw = min(longest, 1 + int(rng.expovariate(3 / longest)))
            case "two":
                draw = longest if rng.random() < 0.25 else max(1, longest // 8)
        return Work(rng.randint(0, self.feeds), draw, draw if self.foreseen else longest)

    def leaf(self) -> Branch:
        return Branch((self.work(),))

    def fork(self, width: int) -> Fork:
        return Fork(tuple(self.leaf() for _ in range(width)))

    def plan(self, shape: Shape, branches: int) -> Branch:
        """A plan of about `branches` branches."""
        match shape:
            case "flat":
                return Branch((self.work(), self.fork(branches), self.work()))
            case "nested":
                outer = max(2, math.isqrt(branches))
                mean = branches / outer
                inner = [self.fork(max(1, int(self.rng.expovariate(1 / mean)))) for _ in range(outer)]
                return Branch((self.work(), Fork(tuple(Branch((self.work(), f, self.work())) for f in inner))))
            case "stages":
                count = self.rng.randint(2, 5)
                return Branch(tuple(self.fork(max(2, branches // count)) for _ in range(count)))
            case "reduce":
                by = self.rng.randint(3, 8)
                levels = [branches]
                while levels[-1] > 1:
                    levels.append(-(-levels[-1] // by))
                return Branch(tuple(self.fork(width) for width in levels))
            case "tree":
                return self.tree(branches, 12)

    def tree(self, inside: int, most: int) -> Branch:
        """A branch with `inside` others in it, forks of at most `most`, some in a row and some in each other."""
        rng = self.rng
        items: list[Item] = [self.work()]
        while inside:
            part = inside if rng.random() < 0.5 else rng.randint(1, inside)
            inside -= part
            cuts = sorted(rng.sample(range(1, part), min(part, rng.randint(1, most)) - 1))
            sizes = [b - a for a, b in zip([0, *cuts], [*cuts, part], strict=True)]
            items.append(Fork(tuple(self.tree(size - 1, most) for size in sizes)))
            if rng.random() < 0.5:
                items.append(self.work())
        return Branch(tuple(items))


def small_plans(count: int, *, foreseen: bool, prefill: bool) -> Iterator[tuple[Branch, Machine]]:
    """Plans of 3 to 8 branches, on 2 to 4 lanes and at least one less than could be used.

    prefill: up to 8 rows before a gen, and a chunk of 4 to 8
    """
    rng = random.Random(f"small {foreseen} {prefill}")
    while count:
        author = Author(rng, foreseen, rng.choice(LENGTHS), rng.choice((8, 16, 32)), 8 if prefill else 0)
        plan = author.tree(rng.randint(3, 8), 8)
        most = min(4, widest(plan) - 1)
        if most >= 2:
            count -= 1
            yield plan, Machine(rng.randint(2, most), PAGES, chunk=rng.randint(4, 8) if prefill else CHUNK)


def large_plans(count: int, *, foreseen: bool) -> Iterator[tuple[Branch, Machine]]:
    """Plans of 9 to 3,000 branches whose width is 1.1 to 8 times the lanes."""
    rng = random.Random(f"large {foreseen}")
    for _ in range(count):
        [plan] = _large(rng, foreseen, 1, 3000)
        yield plan, Machine(_lanes(rng, widest(plan)), PAGES, chunk=CHUNK)


def batches(count: int, *, foreseen: bool) -> Iterator[tuple[list[Branch], Machine]]:
    """Two to twelve such plans at once, of all shapes."""
    rng = random.Random(f"batch {foreseen}")
    for _ in range(count):
        plans = _large(rng, foreseen, rng.randint(2, 12), 400)
        yield plans, Machine(_lanes(rng, sum(widest(plan) for plan in plans)), PAGES, chunk=CHUNK)


def _large(rng: random.Random, foreseen: bool, count: int, most: int) -> list[Branch]:
    author = Author(rng, foreseen, rng.choice(LENGTHS), rng.choice((16, 64, 256, 1000)), rng.choice((0, 0, 8, 40, 300)))
    shapes = rng.choices(list(SHAPES), list(SHAPES.values()), k=count)
    return [author.plan(shape, round(math.exp(rng.uniform(math.log(9), math.log(most))))) for shape in shapes]


def _lanes(rng: random.Random, width: int) -> int:
    return max(1, int(width / rng.uniform(1.1, 8)))


@dataclass(frozen=True, slots=True)
class Small:
    """A small plan. kept, handed: the optimum where lanes are kept and where they are handed over; solved: for sure."""

    calls: int
    kept: int
    handed: int
    solved: bool


def compare(plan: Branch, machine: Machine, most_states: int = 5_000) -> Small:
    """Measure a small plan and find both optima. One that was not found counts as the least that it may be."""
    calls = measure([plan], machine).calls
    solved = True
    try:
        handed = optimum([plan], machine, hand_over=True, upper=calls, most_states=most_states)
    except Unsolved as cut:
        handed, solved = cut.lower, False
    try:
        kept = optimum([plan], machine, hand_over=False, least=handed, upper=calls, most_states=most_states)
    except Unsolved as cut:
        kept, solved = cut.lower, False
    return Small(calls, kept, handed, solved)


@dataclass(frozen=True, slots=True)
class Stage:
    """A fork and what it took from its start until its join, or several plans opened at once."""

    calls: int
    of: Figures
    machine: Machine

    @property
    def work_binds(self) -> bool:
        return self.path < 1

    @property
    def ratio(self) -> float:
        """Calls over what no schedule can beat."""
        return self.calls / self.of.floor(self.machine)

    @property
    def beyond(self) -> float:
        """What it took beyond the floor, in longest branches."""
        return (self.calls - self.of.floor(self.machine)) / self.of.critical_path

    @property
    def excess(self) -> float:
        """What it took beyond max(critical path, work), in longest branches. The bound says that it is at most 1."""
        return (self.calls - max(self.of.critical_path, self.of.work(self.machine))) / self.of.critical_path

    @property
    def path(self) -> float:
        """Critical path over work."""
        return self.of.critical_path / self.of.work(self.machine)

    @property
    def load(self) -> float:
        """Width over lanes."""
        return self.of.width / self.machine.lanes


@dataclass(frozen=True, slots=True)
class Large:
    """A large plan. stages: each fork of its own thread; nothing else runs meanwhile."""

    calls: int
    of: Figures
    machine: Machine
    stages: tuple[Stage, ...]

    @property
    def longest_branch(self) -> int:
        """Calls on the longest chain of a branch."""
        return max(stage.of.critical_path for stage in self.stages)

    @property
    def limit(self) -> float:
        """The bound with the totals of the whole plan."""
        return max(self.of.critical_path, self.of.work(self.machine)) + self.longest_branch

    @property
    def floor(self) -> int:
        """No schedule takes fewer calls: what the plan's own thread does, one thing after another."""
        own = self.of.critical_path - sum(stage.of.critical_path for stage in self.stages)
        return own + sum(stage.of.floor(self.machine) for stage in self.stages)


def large(plan: Branch, machine: Machine) -> Large:
    """Measure a plan and its forks."""
    found = measure([plan], machine)
    forks = tuple(Stage(calls, figures(fork.branches, machine.chunk), machine) for fork, calls in found.stages)
    return Large(found.calls, figures([plan], machine.chunk), machine, forks)


class LongestFirst(Policy):
    """Who has run before, then the longest path, whichever plan it is of."""

    def rank(self, waiting: Waiting) -> tuple[int, ...]:
        return (not waiting.resumed, -waiting.path_tokens, waiting.plan, waiting.order, waiting.index)


def batch(plans: Sequence[Branch], machine: Machine, policy: Policy | None = None) -> Stage:
    """Several plans at once, each a branch."""
    return Stage(measure(plans, machine, policy).calls, figures(plans, machine.chunk), machine)


SPREAD = "min | median | p90 | p99 | max"


def spread(values: Sequence[float]) -> str:
    """The cells of `SPREAD`."""
    ordered = sorted(values)
    if not ordered:
        return " | | | | "
    return " | ".join(f"{ordered[max(0, math.ceil(s * len(ordered)) - 1)]:.3f}" for s in (0, 0.5, 0.9, 0.99, 1))


def share(flags: Sequence[bool]) -> str:
    return f"{sum(flags) / len(flags):.1%}" if flags else ""


def small_table(count: int) -> Iterator[str]:
    yield f"| plans | lengths | compared with | number | optimal | {SPREAD} |"
    yield "| --- | --- | --- |" + " ---: |" * 7
    cut = 0
    for prefill in (False, True):
        for foreseen in (True, False):
            found = [compare(*drawn) for drawn in small_plans(count, foreseen=foreseen, prefill=prefill)]
            cut += sum(not one.solved for one in found)
            for rule, best in (
                ("lanes kept", [s.kept for s in found]),
                ("lanes handed over", [s.handed for s in found]),
            ):
                ratios = [s.calls / b for s, b in zip(found, best, strict=True)]
                kind = "with prefill" if prefill else "decode only"
                lengths = "foreseen" if foreseen else "unforeseen"
                optimal = share([ratio == 1 for ratio in ratios])
                yield f"| {kind} | {lengths} | {rule} | {count} | {optimal} | {spread(ratios)} |"
    yield ""
    yield f"{cut} searches were cut off; those plans are compared with a lower bound instead."


def large_table(count: int) -> Iterator[str]:
    yield f"| what | lengths | binds | width / lanes | number | at the floor | {SPREAD} | {SPREAD} |"
    yield "| --- | --- | --- | --- |" + " ---: |" * 12
    total: list[Stage] = []
    plans: list[Large] = []
    for foreseen in (True, False):
        lengths = "foreseen" if foreseen else "unforeseen"
        singles = [large(*drawn) for drawn in large_plans(4 * count, foreseen=foreseen)]
        forks = [stage for plan in singles for stage in plan.stages]
        drawn = list(batches(count, foreseen=foreseen))
        first_come, longest_first = [batch(*one) for one in drawn], [batch(*one, LongestFirst()) for one in drawn]
        total += forks + first_come
        plans += singles
        path, work = [s for s in forks if not s.work_binds], [s for s in forks if s.work_binds]
        yield f"| forks | {lengths} | critical path | at most 1 | {row([s for s in path if s.load <= 1])} |"
        wide = [s for s in path if s.load > 1]
        yield f"| forks | {lengths} | critical path, by 2 or more | above 1 | {row([s for s in wide if s.path >= 2])} |"
        yield f"| forks | {lengths} | critical path, by less | above 1 | {row([s for s in wide if s.path < 2])} |"
        yield f"| forks | {lengths} | work | at most 2 | {row([s for s in work if s.load <= 2])} |"
        yield f"| forks | {lengths} | work | 2 to 4 | {row([s for s in work if 2 < s.load <= 4])} |"
        yield f"| forks | {lengths} | work | above 4 | {row([s for s in work if s.load > 4])} |"
        yield f"| batches | {lengths} | either | any | {row(first_come)} |"
        yield f"| batches, longest first | {lengths} | either | any | {row(longest_first)} |"
    bound = [s.work_binds and 1.1 <= s.load <= 8 for s in total]
    over = [plan for plan in plans if plan.calls > plan.limit]
    yield ""
    yield f"Work binds, at a width of 1.1 to 8 times the lanes, in {share(bound)} of {len(total)} forks and batches."
    yield f"The bound is exceeded by {sum(s.excess > 1 for s in total)} of them."
    yield f"The floor and a longest branch is exceeded by {sum(s.beyond > 1 for s in total)} of them."
    yield (
        f"With the totals of whole plans, {len(over)} of {len(plans)} exceed it; "
        f"{sum(plan.floor > plan.limit for plan in over)} of those whatever the schedule."
    )
    yield f"`steps_bound` is exceeded by {sum(p.calls > p.of.steps_bound(p.machine) for p in plans)} plans."


def row(found: Sequence[Stage]) -> str:
    floor = share([s.ratio == 1 for s in found])
    return f"{len(found)} | {floor} | {spread([s.ratio for s in found])} | {spread([s.beyond for s in found])}"


def main() -> None:
    print("Small plans: calls over the optimum\n")
    for line in small_table(400):
        print(line, flush=True)
    print("\nLarge plans: calls over the floor, and calls beyond the floor in longest branches\n")
    for line in large_table(150):
        print(line, flush=True)


if __name__ == "__main__":
    main()
