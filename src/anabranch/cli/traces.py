"""`anabranch pack` and `anabranch stats`: what is made of the journals of runs that are over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import typer

from anabranch.cli.errors import fail
from anabranch.cli.text import printable, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of `pack`, as they were given."""

    output: str
    length: int
    model: str | None
    without: tuple[str, ...]
    train: Literal["ok", "all"]
    shifts: bool
    skip_long: bool
    as_json: bool


def pack_traces(paths: Sequence[str], settings: Settings) -> None:
    """Pack the runs of journals for training, and say what came of it.

    Raises PlanError as `pack` does, and `no-traces` for a folder without journals.
    """
    files = _journals(paths)
    from anabranch.runtime.pack_files import pack
    from anabranch.runtime.traces import KINDS, read_traces

    manifest = pack(
        read_traces(files),
        settings.output,
        length=settings.length,
        model=settings.model,
        kinds=[kind for kind in KINDS if kind not in settings.without],
        statuses=settings.train,
        shifts=settings.shifts,
        skip_long=settings.skip_long,
    )
    if settings.as_json:
        write_json(asdict(manifest))
        return
    left_out = "".join(
        f", {count} {what}"
        for count, what in (
            (manifest.unfinished, "not over"),
            (manifest.untrained, "with nothing to train on"),
            (manifest.too_long, "too long"),
        )
        if count
    )
    filled = manifest.tokens / (manifest.rows * manifest.length)
    typer.echo(
        printable(
            f"{settings.output}: {manifest.traces} traces{left_out}; {manifest.rows} rows of {manifest.length}, "
            f"{filled:.0%} full; {manifest.tokens} tokens, {manifest.targets} labels, {manifest.shared} tokens shared"
        )
    )


def show_stats(paths: Sequence[str], *, as_json: bool) -> None:
    """Print how parallel the runs of journals were. Raises PlanError as `read_traces` does, and `no-traces`."""
    files = _journals(paths)
    from anabranch.runtime.trace_stats import stats_of
    from anabranch.runtime.traces import read_traces

    report = stats_of(read_traces(files))
    if as_json:
        write_json(report)
    else:
        typer.echo("\n".join(f"{name:<22} {value}" for name, value in _lines(report)))


def _lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    def number(value: float | None) -> str:
        return (
            "-" if value is None else f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else f"{value}"
        )

    def spread(name: str) -> str:
        each = report[name]
        return (
            f"{each['sum']} (a trace: mean {number(each['mean'])}, median {number(each['median'])}, "
            f"90% up to {number(each['p90'])}, most {number(each['most'])})"
        )

    def distribution(name: str) -> str:
        each = report[name]
        shown = ", ".join(f"{value}: {count}" for value, count in list(each["counts"].items())[:12])
        more = ", ..." if len(each["counts"]) > 12 else ""
        return f"mean {number(each['mean'])}, most {number(each['most'])} ({shown}{more})" if shown else "-"

    statuses = ", ".join(f"{count} {status}" for status, count in report["status"].items())
    unfinished = f"; {report['unfinished']} not over" if report["unfinished"] else ""
    return [
        ("traces", f"{report['traces']} ({statuses}){unfinished}" if statuses else f"0{unfinished}"),
        ("activation ratio", f"{number(report['activation_ratio'])} ({report['forked']} forked)"),
        ("width", distribution("width")),
        ("depth", distribution("depth")),
        ("total tokens", spread("total_tokens")),
        ("critical path", spread("critical_path_tokens")),
        ("total / critical", number(report["parallelism_ratio"])),
        ("1 - critical / total", number(report["acceleration_ratio"])),
        ("stitched", f"{report['tokens_stitched']} tokens that a text join would have prefilled again"),
        ("prefilled again", f"{report['tokens_reprefilled']} tokens"),
    ]


def _journals(paths: Sequence[str]) -> list[str]:
    """Files as they are given, and of a folder those that end in `.jsonl`, by name."""
    files: list[str] = []
    for path in paths:
        if not Path(path).is_dir():
            files.append(path)
            continue
        found = sorted(str(each) for each in Path(path).glob("*.jsonl"))
        if not found:
            fail("no-traces", f"there is no journal in `{path}`", "`run --journal FILE.jsonl` writes them")
        files.extend(found)
    return files
