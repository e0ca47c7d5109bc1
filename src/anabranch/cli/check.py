"""`anabranch check`: every error and warning of a plan, before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import typer

from anabranch.cli.errors import FAILED, report
from anabranch.cli.sources import chosen_plan, host_functions, read_program
from anabranch.cli.text import printable
from anabranch.dsl.check import Checked, check
from anabranch.dsl.diagnostics import PlanError

if TYPE_CHECKING:
    from anabranch.runtime.engine import Engine

_NEEDS_MODEL = (
    "whether prompts and the worst case fit a model's context and the pages, and each `max` the tokens of its type: "
    "that needs `--model`"
)


def check_files(files: Sequence[str], plan: str | None, model: str | None, functions: str | None) -> None:
    """Check each file; warnings and errors go to stderr, a line for each file that is right to stdout.

    plan: which plan's worst case is held against the model; the last of the file when None
    model: its context and tokens are taken into account; without one, what was skipped is said
    Raises typer.Exit with code 1 if a file has an error, and PlanError for a model or functions that cannot be had.
    """
    known = host_functions(functions).keys()
    engine = None if model is None else _engine(model)
    good = True
    for file in files:
        try:
            checked = _check_file(file, plan, known, engine)
        except PlanError as error:
            report(error)
            good = False
            continue
        _show(file, checked, [] if engine is not None else [_NEEDS_MODEL])
    if not good:
        raise typer.Exit(FAILED)


def _check_file(file: str, plan: str | None, functions: Collection[str], engine: Engine | None) -> Checked:
    program = read_program(file)
    chosen = chosen_plan(program, plan)
    if engine is None:
        return check(program, functions=functions)
    for plan_of_file in program.plans:
        # A plan's graph holds what it calls alone, and a `max` that is too small is wrong in any plan.
        if plan_of_file is not chosen:
            engine.compile(program, plan_of_file.name, tuple(functions))
    compiled = engine.compile(program, chosen.name, tuple(functions))
    compiled.check_bounds(compiled.bounds_on(engine.machine, engine.sizes), engine.machine, engine.max_context)
    return check(program, functions=functions, start_token=engine.tokenizer.bos_id is not None)


def _engine(model: str) -> Engine:
    # Only here is torch imported: without a model an answer takes a fifth of a second.
    from anabranch.runtime.engine import Engine
    from anabranch.runtime.models import load

    return Engine(load(model))


def _show(file: str, checked: Checked, skipped: Sequence[str]) -> None:
    for warning in checked.warnings:
        typer.echo(printable(warning.render(checked.program.source)), err=True)
    typer.echo(printable(f"{file}: ok"))
    for plan, tokens in checked.worst_tokens.items():
        typer.echo(f"  {plan}: at most {tokens:,} tokens decoded")
    for line in (*checked.skipped, *skipped):
        typer.echo(f"  skipped: {line}")
