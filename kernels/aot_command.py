"""`python -m anabranch.kernels.aot`: build, check, print."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

from anabranch.kernels.aot import MODULES, TARGETS, Built, problems, shipped_configs
from anabranch.kernels.aot_cache import Cache
from anabranch.kernels.aot_cover import LIMIT, Job, cover, dtype, every, kernel
from anabranch.kernels.aot_workers import build_each
from anabranch.kernels.jit import HAS_TRITON

Done: TypeAlias = list[tuple[Job, Built | str]]

COLUMNS = f"{'configuration':<48} {'target':<7} {'registers':>9} {'spills':>6} {'shared KiB':>10}  matrix"


def line(job: Job, result: Built | str) -> str:
    """One build as a line of the table that is printed."""
    config, target = job
    if isinstance(result, str):
        return f"{config.name:<48} {target.name:<7} failed"
    figures = f"{result.registers:>9} {result.spills:>6} {result.shared_bytes / 1024:>10.1f}"
    return f"{config.name:<48} {target.name:<7} {figures}  {result.matrix}"


def findings(job: Job, result: Built | str) -> list[str]:
    """What is wrong with one build."""
    config, target = job
    if isinstance(result, str):
        return [f"`{config.name}` for {target.name}: {result}"]
    return problems(config, target, result)


def results(jobs: Sequence[Job], cache: Cache, modules: Sequence[str], num_workers: int) -> Generator[Built | str]:
    """Of each job, in order, once those before it are known too. Jobs that differ in name alone are one build."""
    keys = [cache.key(config, target) for config, target in jobs]
    known: dict[str, Built | str] = {key: built for key in set(keys) if (built := cache.get(key)) is not None}
    missing: dict[str, Job] = {}
    for key, job in zip(keys, jobs, strict=True):
        if key not in known:
            missing.setdefault(key, job)
    with closing(build_each(missing.values(), modules, num_workers)) as builds:
        for key in keys:
            while key not in known:
                job, result = next(builds)
                got = cache.key(*job)
                known[got] = result if isinstance(result, str) else cache.put(got, result)
            yield known[key]


def grouped(done: Done) -> str:
    """A Markdown table: a line for each kernel, type and head size, with the worst of its configurations."""
    groups: dict[tuple[str, str, str], list[tuple[Job, Built | str]]] = {}
    for (config, target), result in done:
        head_dim = str(config.constexprs.get("HEAD_DIM", ""))
        groups.setdefault((kernel(config), dtype(config), head_dim), []).append(((config, target), result))
    names = [target.name for target in TARGETS]
    lines = ["| " + " | ".join(("kernel", "type", "head size", "configurations", *names)) + " |"]
    lines.append("| " + " | ".join(["---"] * (4 + len(names))) + " |")
    for group, members in groups.items():
        configs = {job[0].name for job, _ in members}
        cells = [_cell([result for job, result in members if job[1].name == name]) for name in names]
        lines.append("| " + " | ".join((*group, str(len(configs)), *cells)) + " |")
    return "\n".join(lines)


def _cell(group: Sequence[Built | str]) -> str:
    """Worst registers, worst shared memory and all classes of one target's builds."""
    if not group:
        return ""
    built = [result for result in group if isinstance(result, Built)]
    parts = []
    if built:
        classes = ", ".join(sorted({each.matrix for each in built}))
        shared = max(each.shared_bytes for each in built) / 1024
        parts.append(f"{max(each.registers for each in built)} / {shared:.0f} / {classes}")
        if scalar := max(each.scalar_spills for each in built):
            parts.append(f"{scalar} scalar")
    if spilling := sum(each.spills > 0 for each in built):
        parts.append(f"**{spilling} spill**")
    if len(built) < len(group):
        parts.append(f"**{len(group) - len(built)} failed**")
    return "; ".join(parts)


def document(done: Done, num_problems: int) -> str:
    """The page that records a run."""
    import triton

    return f"""# Ahead-of-time builds

`make kernels-full` wrote this page: every configuration that is shipped, built for each target with Triton
{triton.__version__}: {len(done)} builds, {num_problems} problems. A problem is a spill, shared memory above the chip's
limit, or another matrix instruction than expected; see [kernels](kernels.md#ahead-of-time-builds). Nothing here ran on
a GPU.

A line is one kernel, type and head size, over all its page sizes, tiles and so on. A cell is the most registers of a
thread (AMD: vector registers), the most shared memory of a block in KiB, and the classes of matrix instruction: fp32
has none on NVIDIA's chips, since its products are exact. *scalar*: the most scalar registers that are kept in lanes of
vector registers, which are no memory.

{grouped(done)}
"""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="python -m anabranch.kernels.aot", description="Build and check the kernels.")
    parser.add_argument("--full", action="store_true", help=f"every configuration, not {LIMIT} that stand for all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="worker processes, one a core by default")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table there too, as a Markdown page")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("build/kernels"),
        metavar="DIR",
        help="earlier figures, build/kernels by default",
    )
    chosen = parser.parse_args(argv)
    if chosen.jobs < 1:
        parser.error("`--jobs` must be at least 1")
    if chosen.table is not None and not chosen.table.parent.is_dir():
        parser.error(f"`--table`: there is no folder `{chosen.table.parent}`")
    return chosen


def main(argv: Sequence[str] | None = None, modules: Sequence[str] = MODULES) -> int:
    """Exit status: 1 if there is a problem, 2 if nothing could be built, 130 after Ctrl-C."""
    chosen = arguments(argv)
    if not HAS_TRITON:
        print("error: Triton is not installed; `pip install 'anabranch[gpu]'`", file=sys.stderr)
        return 2
    configs = shipped_configs(modules)
    jobs = every(configs) if chosen.full else cover(configs)
    done: Done = []
    found: list[str] = []
    print(COLUMNS, flush=True)
    try:
        with closing(results(jobs, Cache(chosen.cache), modules, chosen.jobs)) as each:
            for job, result in zip(jobs, each, strict=True):
                print(line(job, result), flush=True)
                done.append((job, result))
                found += findings(job, result)
    except KeyboardInterrupt:
        print("interrupted; what was built is kept", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in found:
        print(f"problem: {problem}")
    print(f"{len(jobs)} builds, {len(found)} problems")
    if chosen.table is not None:
        chosen.table.write_text(document(done, len(found)))
    return 1 if found else 0
