"""`anabranch check`: every error and warning of a plan, before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import typer

from anabranch.cli.errors import FAILED, report
from anabranch.cli.sources import chosen_plan, host_functions, read_program
from anabranch.cli.text import printable
from anabranch.dsl.check import Checked, check
from anabranch.dsl.diagnostics import PlanError


def check_files(files: Sequence[str], plan: str | None, model: str | None, functions: str | None) -> None:
    """Check each file; warnings and errors go to stderr, a line for each file that is right to stdout.

    Raises typer.Exit with code 1 if a file has an error, and PlanError for a model or functions that cannot be had.
    """
    known = host_functions(functions).keys()
    start_token = None if model is None else _start_token(model)
    good = True
    for file in files:
        try:
            checked = _check_file(file, plan, known, start_token)
        except PlanError as error:
            report(error)
            good = False
            continue
        _show(file, checked)
    if not good:
        raise typer.Exit(FAILED)


def _check_file(file: str, plan: str | None, functions: Collection[str], start_token: bool | None) -> Checked:
    program = read_program(file)
    if plan is not None:
        chosen_plan(program, plan)
    return check(program, functions=functions, start_token=start_token)


def _start_token(model: str) -> bool:
    """Whether the model's empty view begins with a token."""
    # Only here is torch imported: without a model an answer takes a fifth of a second.
    from anabranch.runtime.models import load

    return load(model).tokenizer.bos_id is not None


def _show(file: str, checked: Checked) -> None:
    for warning in checked.warnings:
        typer.echo(printable(warning.render(checked.program.source)), err=True)
    typer.echo(printable(f"{file}: ok"))
    for plan, tokens in checked.worst_tokens.items():
        typer.echo(f"  {plan}: at most {tokens:,} tokens decoded")
    for line in checked.skipped:
        typer.echo(f"  skipped: {line}")
