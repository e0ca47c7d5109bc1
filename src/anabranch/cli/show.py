"""`anabranch show`: a plan's syntax, graph or schedule as readable text."""

from __future__ import annotations

import typer

from anabranch.cli.sources import chosen_plan, host_functions, read_program
from anabranch.cli.text import printable
from anabranch.compiler.show import Stage, show
from anabranch.dsl.ast import Program


def show_stage(file: str, stage: Stage, plan: str | None, functions: str | None) -> None:
    """Print one form of a plan of `file`; the syntax of the whole file when no plan is named. Raises PlanError."""
    program = read_program(file)
    chosen = chosen_plan(program, plan)
    if stage == "ast" and plan is not None:
        program = Program((chosen,), program.source)
    text = show(program, stage, chosen.name, functions=host_functions(functions).keys())
    typer.echo(printable(text.rstrip("\n")))
