"""What a plan will cost at most, told before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anabranch.compiler.cost import CPU, SMOLLM2, Chip, ModelShape, predict_seconds
from anabranch.compiler.pipeline import Compiled
from anabranch.compiler.record import MAX_THREADS, record
from anabranch.compiler.scheduler import Machine
from anabranch.compiler.sizes import Sizes
from anabranch.compiler.verify_schedule import verify_schedule
from anabranch.dsl.diagnostics import PlanError


@dataclass(frozen=True, slots=True)
class Explanation:
    """The worst case of a plan on a machine.

    plan: its name
    total_tokens, critical_path_tokens: decoded tokens in all, and on the longest chain of dependencies
    parallelism_ratio: total / critical, as Multiverse reports it
    acceleration_ratio: 1 - critical / total, which ThreadWeaver rewards
    token_latency_speedup: baseline / critical, as ThreadWeaver reports it, where a sequential baseline is given
    tokens_prefilled: rows fed that are not sampled; tokens_reprefilled: those of them that the run had generated, by
        `text` joins and by interpolation
    tokens_aliased: tokens that enter a view without being fed, over all forks and joins
    tokens_flushed: drawn tokens fed only because a segment seals
    lanes: branches that run at once; depth: how deep threads nest; threads: how many there are
    largest_position: tokens of context that the longest thread needs
    pages_depth_first: the least pool that always suffices; pages_full_width: with everything alive at once
    steps_bound: model calls that a run never exceeds, without page pressure or waits for the host
    scheduled_steps, scheduled_pages: of the static schedule: estimates; None where the pool is too small for it, or it
        would have too many threads to be written out
    predicted_s: of that schedule, from the cost model of `chip`: an estimate
    assumed_shape: the model whose shape `predicted_s` is for where none is known; empty where it is the model's own
    exact_sizes: text was counted with the model's tokenizer; else by bytes, which is an upper bound
    unbounded: parameters that state no bound and were not given, which count as empty
    """

    plan: str
    machine: Machine
    total_tokens: int
    critical_path_tokens: int
    parallelism_ratio: float
    acceleration_ratio: float
    token_latency_speedup: float | None
    tokens_prefilled: int
    tokens_reprefilled: int
    tokens_aliased: int
    tokens_flushed: int
    lanes: int
    depth: int
    threads: int
    largest_position: int
    pages_depth_first: int
    pages_full_width: int
    steps_bound: int
    scheduled_steps: int | None
    scheduled_pages: int | None
    predicted_s: float | None
    chip: str
    assumed_shape: str
    exact_sizes: bool
    unbounded: tuple[str, ...]

    def text(self) -> str:
        """The explanation for a person."""
        machine = self.machine
        rows: list[tuple[str, str, str]] = [
            ("total tokens", f"{self.total_tokens:,}", "decoded, at most"),
            ("critical path", f"{self.critical_path_tokens:,}", "tokens on the longest chain, at most"),
            ("parallelism ratio", f"{self.parallelism_ratio:.2f}", "total / critical"),
            ("acceleration ratio", f"{self.acceleration_ratio:.2f}", "1 - critical / total"),
        ]
        if self.token_latency_speedup is not None:
            rows.append(("token latency speedup", f"{self.token_latency_speedup:.2f}", "sequential / critical"))
        rows += [
            ("prefilled", f"{self.tokens_prefilled:,}", "tokens fed that are not sampled"),
            ("re-prefilled", f"{self.tokens_reprefilled:,}", "of them, text that the plan itself generated"),
            ("aliased", f"{self.tokens_aliased:,}", "tokens that branches and joins see without feeding them"),
            ("flushed", f"{self.tokens_flushed:,}", "tokens fed only to seal a segment"),
            ("context", f"{self.largest_position:,}", "tokens, in the longest thread"),
            ("lanes", f"{self.lanes:,}", f"branches at once; the machine has {machine.lanes}"),
            ("threads", f"{self.threads:,}", f"branches in all, {self.depth} deep"),
            ("pages, depth first", f"{self.pages_depth_first:,}", f"the least pool; the machine has {machine.pages:,}"),
            ("pages, full width", f"{self.pages_full_width:,}", f"of {machine.page_size} tokens, all alive at once"),
            ("steps", f"{self.steps_bound:,}", "model calls, at most"),
        ]
        if self.scheduled_steps is not None and self.predicted_s is not None:
            shape = f" with {self.assumed_shape}'s shape" if self.assumed_shape else ""
            rows += [
                ("scheduled steps", f"{self.scheduled_steps:,}", "of the static schedule, an estimate"),
                (
                    "predicted time",
                    f"{self.predicted_s:,.1f} s",
                    f"of that schedule{shape} on {self.chip}, an estimate",
                ),
            ]
        names = max(len(name) for name, _, _ in rows)
        values = max(len(value) for _, value, _ in rows)
        lines = [f"{self.plan}: worst case"]
        lines += [f"  {name:<{names}}  {value:>{values}}  {what}" for name, value, what in rows]
        if self.scheduled_steps is None and self.pages_depth_first <= machine.pages:
            lines.append(
                f"note: more than {MAX_THREADS:,} threads, so no schedule is written out and no time predicted"
            )
        if not self.exact_sizes:
            lines.append("note: no model is known, so text counts as its bytes, which is at least its tokens")
        if self.unbounded:
            names_of = ", ".join(f"`{name}`" for name in self.unbounded)
            lines.append(f"note: {names_of} counts as empty: give it, or state its bound, as in `plan(q: text(2000))`")
        return "\n".join(lines)


def explain(
    compiled: Compiled,
    machine: Machine,
    *,
    sizes: Sizes | None = None,
    inputs: Mapping[str, Any] | None = None,
    baseline_tokens: int | None = None,
    model: ModelShape | None = None,
    chip: Chip = CPU,
) -> Explanation:
    """Explain a compiled plan on `machine`.

    sizes: how text becomes tokens; bytes are counted when None
    inputs: parameters that are known
    baseline_tokens: what a sequential answer took, for the token latency speedup
    model: its shape, for the predicted time; SmolLM2's when None, and then the explanation says so
    """
    bounds = compiled.bounds_on(machine, sizes, inputs)
    cost = bounds.cost
    total, critical = bounds.total_tokens, bounds.critical_path_tokens
    schedule = None
    if bounds.pages_depth_first <= machine.pages:
        try:
            schedule = verify_schedule(record(bounds), bounds)
        except PlanError:
            schedule = None  # more threads than are written out; the bounds above hold all the same
    return Explanation(
        plan=bounds.graph.main,
        machine=machine,
        total_tokens=total,
        critical_path_tokens=critical,
        parallelism_ratio=total / critical if critical else 1.0,
        acceleration_ratio=1 - critical / total if total else 0.0,
        token_latency_speedup=baseline_tokens / critical if baseline_tokens is not None and critical else None,
        tokens_prefilled=cost.prefilled,
        tokens_reprefilled=cost.reprefilled,
        tokens_aliased=cost.aliased,
        tokens_flushed=cost.flushed,
        lanes=min(cost.width, machine.lanes),
        depth=cost.depth,
        threads=cost.threads,
        largest_position=bounds.largest_position,
        pages_depth_first=bounds.pages_depth_first,
        pages_full_width=bounds.pages_full_width,
        steps_bound=bounds.steps_bound(machine),
        scheduled_steps=None if schedule is None else schedule.calls,
        scheduled_pages=None if schedule is None else schedule.pages_peak,
        predicted_s=None if schedule is None else predict_seconds(schedule, model or SMOLLM2, chip),
        chip=chip.name,
        assumed_shape="SmolLM2" if model is None else "",
        exact_sizes=bounds.measured.exact,
        unbounded=bounds.measured.unbounded,
    )
