"""`anabranch verify`: hold a schedule, recorded or static, against the plan that it carries."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from anabranch.cli.errors import fail
from anabranch.cli.text import printable, write_json
from anabranch.compiler import recording, schedule_json
from anabranch.compiler.json_values import bad_schedule, load
from anabranch.compiler.verify_graph import VerifyError
from anabranch.compiler.verify_recording import Report, ScheduleFault, verify_recording

if TYPE_CHECKING:
    from anabranch.compiler.sizes import Sizes

_MOST_BYTES: Final = 1 << 29
_HELP: Final = "docs/schedules.md explains the rules; the fault is the schedule's, not the plan's"


def verify_file(file: str, model: str | None, template: str | None, *, as_json: bool) -> None:
    """Verify the schedule in `file`, and say what it holds.

    model, template: count known text as this model does, so that pages and calls are held against their bounds too
    Raises PlanError: the file cannot be read, `bad-schedule`, or `schedule-fault` where a rule is broken.
    """
    document = load(_read(file))
    sizes = None if model is None else _sizes(model, template)
    kind = document.get("kind") if isinstance(document, dict) else None
    try:
        found, said = _static(document, sizes) if kind == "static" else _recorded(document, sizes)
    except (ScheduleFault, VerifyError) as fault:
        if as_json:
            step = fault.step_index if isinstance(fault, ScheduleFault) else None
            write_json({"verified": False, "kind": kind, "rule": fault.rule, "step": step, "message": str(fault)})
        fail("schedule-fault", str(fault), _HELP)
    if as_json:
        write_json({"verified": True, "kind": kind, **found})
    else:
        typer.echo(printable(f"{file}: {said}"))


def fault_of(error: ScheduleFault) -> None:
    """Report a fault of a run that verified itself. Raises PlanError `schedule-fault`."""
    fail("schedule-fault", str(error), _HELP)


def summary(report: Report) -> str:
    """A verified recording in one line."""
    rows = ", ".join(f"{count} {kind}" for kind, count in report.rows.items()) or "none"
    swaps = f", {report.swaps} swaps" if report.swaps else ""
    return (
        f"verified: {report.runs} runs, {report.threads} threads, {report.segments} segments, {report.calls} calls, "
        f"rows {rows}, {report.tokens_drawn} tokens drawn, {report.pages_peak} pages at most{swaps}"
    )


def _recorded(document: Any, sizes: Sizes | None) -> tuple[dict[str, Any], str]:
    report = verify_recording(recording.from_document(document), sizes=sizes)
    return asdict(report), summary(report)


def _static(document: Any, sizes: Sizes | None) -> tuple[dict[str, Any], str]:
    schedule, origin = schedule_json.from_document(document)
    schedule_json.verify_static(schedule, origin, sizes=sizes)
    figures = {"calls": schedule.calls, "threads": schedule.threads, "pages_peak": schedule.pages_peak}
    said = f"verified: {schedule.calls} calls, {schedule.threads} threads, {schedule.pages_peak} pages at most"
    return figures, said


def _read(file: str) -> bytes:
    path = Path(file)
    if path.is_dir():
        fail("is-a-directory", f"`{file}` is a directory", "name a file that `anabranch run --schedule` wrote")
    try:
        with open(path, "rb") as source:
            content = source.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        fail("no-such-file", f"there is no file `{file}`", "check the path")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        fail("unreadable-file", f"`{file}` can't be read: {reason}", "check the path and its permissions")
    if len(content) > _MOST_BYTES:
        raise bad_schedule(f"`{file}` is larger than {_MOST_BYTES >> 20} MiB")
    return content


def _sizes(model: str, template: str | None) -> Sizes:
    # Only here is torch imported.
    from anabranch.runtime.engine import Engine
    from anabranch.runtime.models import load as load_model

    return Engine(load_model(model, template=template)).sizes
