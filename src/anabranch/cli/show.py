"""`anabranch show`: a plan's syntax, graph or schedule as readable text."""

from __future__ import annotations

from typing import Literal

import typer

from anabranch.cli.sources import chosen_plan, host_functions, read_program
from anabranch.cli.text import printable
from anabranch.dsl.ast import Program
from anabranch.dsl.check import check

Stage = Literal["ast", "graph", "schedule"]


def show_stage(file: str, stage: Stage, plan: str | None, functions: str | None) -> None:
    """Print one form of a plan of `file` (of all its syntax, when no plan is named). Raises PlanError."""
    program = read_program(file)
    chosen = chosen_plan(program, plan)
    known = host_functions(functions).keys()
    typer.echo(printable(_text(program if plan is None else Program((chosen,), program.source), program, chosen.name)))
