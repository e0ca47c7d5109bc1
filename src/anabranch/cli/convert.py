"""`anabranch convert`: traces of other systems as plans, and back."""

from __future__ import annotations

import sys

import typer

from anabranch.cli.files import check_writable, write_whole
from anabranch.cli.sources import chosen_plan, read_program
from anabranch.cli.text import printable
from anabranch.dsl.dialects import export_trace, import_trace
from anabranch.dsl.parse import read_exactly


def import_file(file: str, dialect: str, output: str | None) -> None:
    """Write the plan that replays the trace in `file`, to `output` or to stdout. Raises PlanError."""
    _check(output)
    _write(import_trace(dialect, read_exactly(file)), output)


def export_file(file: str, dialect: str, output: str | None, plan: str | None) -> None:
    """Write the trace that a plan of `file` replays, to `output` or to stdout. Raises PlanError."""
    _check(output)
    program = read_program(file)
    _write(export_trace(dialect, program, chosen_plan(program, plan).name), output)


def _check(output: str | None) -> None:
    if output is not None:
        check_writable(output)


def _write(text: str, output: str | None) -> None:
    if output is not None:
        write_whole(output, text.encode())
    elif sys.stdout.isatty():
        # A trace may hold what steers a terminal.
        typer.echo(printable(text), nl=False)
    else:
        typer.echo(text.encode(), nl=False)
