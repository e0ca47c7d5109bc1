"""How parallel runs were: how many forked, how wide and deep, and how much of their tokens lay on the critical path."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from anabranch.runtime.events import BranchStarted, Path, RunEnded
from anabranch.runtime.replay import branch_of, site_of
from anabranch.runtime.traces import Trace


@dataclass(frozen=True, slots=True)
class Shape:
    """What one run did.

    widths: of each fork, how many branches began, tries again not counted. A fork, map, level or call of which one
        branch began is none: nothing ran beside anything
    depth: most of these forks that a thread stood in
    total, critical: tokens that were decoded or recorded, and of these on the longest chain of dependencies
    stitched: that stitches took into a view, and a `text` join would have prefilled
    reprefilled: that the run had generated, and prefilled again
    """

    status: str
    widths: tuple[int, ...]
    depth: int
    total: int
    critical: int
    stitched: int
    reprefilled: int


def shape_of(trace: Trace) -> Shape:
    """Raises ValueError if the run is not over."""
    over = trace.entries[-1].event if trace.entries else None
    if not isinstance(over, RunEnded):
        raise ValueError(f"{trace.where} is not over")
    threads = [e.thread for e in trace.entries if isinstance(e.event, BranchStarted) and e.thread]
    branches: defaultdict[tuple[Path, str], set[str]] = defaultdict(set)
    for thread in threads:
        branches[_fork_of(thread)].add(branch_of(thread[-1]))
    widths = {fork: len(begun) for fork, begun in branches.items() if len(begun) > 1}
    forked = {thread for thread in threads if _fork_of(thread) in widths}
    depth = max((sum(thread[:n] in forked for n in range(1, len(thread) + 1)) for thread in forked), default=0)
    counts = over.counts
    return Shape(
        over.status,
        tuple(widths.values()),
        depth,
        int(counts.get("total_tokens", 0)),
        int(counts.get("critical_path_tokens", 0)),
        int(counts.get("tokens_stitched", 0)),
        int(counts.get("tokens_reprefilled", 0)),
    )


def _fork_of(thread: Path) -> tuple[Path, str]:
    return thread[:-1], site_of(branch_of(thread[-1]))


class TraceStats:
    """Figures over many traces, which are not kept."""

    def __init__(self) -> None:
        self.num_unfinished = 0
        self._statuses: Counter[str] = Counter()
        self._widths: Counter[int] = Counter()
        self._depths: Counter[int] = Counter()
        self._total, self._critical = array("q"), array("q")
        self._stitched = self._reprefilled = 0

    def add(self, trace: Trace) -> None:
        """Count a run; of one that is not over, only that there is one."""
        if not trace.over:
            self.num_unfinished += 1
            return
        shape = shape_of(trace)
        self._statuses[shape.status] += 1
        self._widths.update(shape.widths)
        self._depths[shape.depth] += 1
        self._total.append(shape.total)
        self._critical.append(shape.critical)
        self._stitched += shape.stitched
        self._reprefilled += shape.reprefilled

    def report(self) -> dict[str, Any]:
        """The figures, as `docs/training.md` lists them. A ratio of nothing is None."""
        num_traces = len(self._total)
        num_forked = num_traces - self._depths[0]
        total, critical = sum(self._total), sum(self._critical)
        return {
            "traces": num_traces,
            "unfinished": self.num_unfinished,
            "status": dict(sorted(self._statuses.items())),
            "forked": num_forked,
            "activation_ratio": _ratio(num_forked, num_traces),
            "width": _distribution(self._widths),
            "depth": _distribution(self._depths),
            "total_tokens": _spread(self._total),
            "critical_path_tokens": _spread(self._critical),
            "parallelism_ratio": _ratio(total, critical),
            "acceleration_ratio": None if not total else 1 - critical / total,
            "tokens_stitched": self._stitched,
            "tokens_reprefilled": self._reprefilled,
        }


def stats_of(traces: Iterable[Trace]) -> dict[str, Any]:
    """`TraceStats.report` of traces, which are taken one after another."""
    stats = TraceStats()
    for trace in traces:
        stats.add(trace)
    return stats.report()


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _distribution(counts: Mapping[int, int]) -> dict[str, Any]:
    """counts: of each value, how often it came."""
    found = {value: count for value, count in sorted(counts.items()) if count}
    number = sum(found.values())
    return {
        "count": number,
        "mean": _ratio(sum(value * count for value, count in found.items()), number),
        "most": max(found, default=None),
        "counts": found,
    }


def _spread(values: array[int]) -> dict[str, Any]:
    ordered = sorted(values)
    return {
        "sum": sum(ordered),
        "mean": _ratio(sum(ordered), len(ordered)),
        "median": ordered[(len(ordered) - 1) // 2] if ordered else None,
        "p90": ordered[(len(ordered) * 9 - 1) // 10] if ordered else None,
        "most": ordered[-1] if ordered else None,
    }
