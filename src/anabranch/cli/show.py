"""`anabranch show`: a plan's syntax, graph or schedule as readable text."""

from __future__ import annotations

from typing import Literal, assert_never

import typer

from anabranch.cli.sources import chosen_plan, host_functions, read_program
from anabranch.cli.text import printable
from anabranch.dsl.ast import Program

Stage = Literal["ast", "graph", "schedule"]


def show_stage(file: str, stage: Stage, plan: str | None, functions: str | None) -> None:
    """Print one form of a plan of `file`; the syntax of the whole file when no plan is named. Raises PlanError."""
    program = read_program(file)
    chosen = chosen_plan(program, plan)
    known = host_functions(functions).keys()
    match stage:
        case "ast":
            from anabranch.dsl.printer import dump_ast

            text = dump_ast(program if plan is None else Program((chosen,), program.source))
        case "graph":
            from anabranch.compiler.graph_text import graph_text
            from anabranch.compiler.pipeline import compile_plan

            text = graph_text(compile_plan(program, chosen.name, functions=known).graph)
        case "schedule":
            from anabranch.compiler.pipeline import compile_plan
            from anabranch.compiler.record import record
            from anabranch.compiler.schedule import schedule_text
            from anabranch.compiler.scheduler import Machine

            text = schedule_text(record(compile_plan(program, chosen.name, functions=known).bounds_on(Machine())))
        case _:
            assert_never(stage)
    typer.echo(printable(text.rstrip("\n")))
