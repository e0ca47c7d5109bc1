"""Which builds stand for all: few enough for every commit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, Final, TypeAlias

from anabranch.kernels.aot import TARGETS, Target
from anabranch.kernels.shipped import Config

LIMIT: Final = 60
"""Builds in all: half a minute to a minute on 2 cores."""

Job: TypeAlias = tuple[Config, Target]
Pair: TypeAlias = tuple[tuple[str, Any], tuple[str, Any]]

# Beside these, as many other pairs are covered as the limit leaves room for.
REQUIRED: Final = (
    frozenset(("kernel", "target")),
    frozenset(("dtype", "head_dim")),
    frozenset(("dtype", "page_size")),
    frozenset(("head_dim", "page_size")),
)


def kernel(config: Config) -> str:
    """The name of its kernel."""
    return str(config.fn.__name__).removesuffix("_kernel")


def dtype(config: Config) -> str:
    """What the kernel's tensors hold: its 16-bit type, if it has one."""
    kinds = config.signature.values()
    return next((name for name in ("fp16", "bf16", "fp32") if f"*{name}" in kinds), "none")


def axes(job: Job) -> dict[str, Any]:
    """Where a build stands on each axis that it has."""
    config, target = job
    found: dict[str, Any] = {"kernel": kernel(config), "target": target.name, "dtype": dtype(config)}
    for axis in ("head_dim", "page_size", "block_m"):
        if axis.upper() in config.constexprs:
            found[axis] = config.constexprs[axis.upper()]
    return found


def pairs(job: Job) -> set[Pair]:
    """Each two places of a build."""
    return set(combinations(sorted(axes(job).items()), 2))


def required(pair: Pair) -> bool:
    """Whether a cover must have it."""
    return frozenset(axis for axis, _ in pair) in REQUIRED


def every(configs: Iterable[Config], targets: Sequence[Target] = TARGETS) -> list[Job]:
    """Each configuration for each target."""
    return [(config, target) for config in configs for target in targets]


def cover(configs: Iterable[Config], targets: Sequence[Target] = TARGETS, limit: int = LIMIT) -> list[Job]:
    """At most `limit` builds that have every required pair that there is, and then as many other pairs as they can.

    Greedy: next comes the build with the most new required pairs, then with the most new ones; the first of equals. The
    same configurations always give the same builds, in the order of `every`.
    Raises ValueError if the limit is too small.
    """
    jobs = every(configs, targets)
    pairs_of = [pairs(job) for job in jobs]
    left = set().union(*pairs_of)
    chosen: set[int] = set()
    while left and len(chosen) < limit:
        new = [had & left for had in pairs_of]
        best = max(range(len(jobs)), key=lambda at: (sum(map(required, new[at])), len(new[at])))
        chosen.add(best)
        left -= new[best]
    if any(map(required, left)):
        raise ValueError(
            f"{limit} builds cannot cover every kernel and target: {sum(map(required, left))} pairs are left"
        )
    return [jobs[at] for at in sorted(chosen)]
