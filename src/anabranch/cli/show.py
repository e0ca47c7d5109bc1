"""`anabranch show`: a plan's syntax, graph or schedule as readable text."""

from __future__ import annotations

import typer

from anabranch.cli.sources import chosen_plan, host_functions, read_program
from anabranch.cli.text import printable
from anabranch.compiler.show import Stage, schedule_of, show
from anabranch.dsl.ast import Program


def show_stage(file: str, stage: Stage, plan: str | None, functions: str | None, *, as_json: bool) -> None:
    """Print one form of a plan of `file`; the syntax of the whole file when no plan is named.

    as_json: the schedule as one JSON document
    Raises PlanError, and typer.BadParameter where another stage than the schedule is wanted as JSON.
    """
    if as_json and stage != "schedule":
        raise typer.BadParameter("only `--stage schedule` is written as JSON", param_hint="--json")
    program = read_program(file)
    chosen = chosen_plan(program, plan)
    if as_json:
        known = tuple(sorted(host_functions(functions)))
        typer.echo(schedule_of(program, chosen.name, known).encode("utf-8", "surrogatepass"), nl=False)
        return
    if stage == "ast" and plan is not None:
        program = Program((chosen,), program.source)
    text = show(program, stage, chosen.name, functions=host_functions(functions).keys())
    typer.echo(printable(text.rstrip("\n")))
