"""Each stage of a plan on its way to a schedule, as text for a person."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeAlias, assert_never

from anabranch.compiler.graph_text import graph_text
from anabranch.compiler.pipeline import compile_plan
from anabranch.compiler.record import record
from anabranch.compiler.schedule import schedule_text
from anabranch.compiler.scheduler import Machine
from anabranch.compiler.sizes import Sizes
from anabranch.compiler.verify_schedule import verify_schedule
from anabranch.dsl.ast import Program
from anabranch.dsl.check import Target
from anabranch.dsl.diagnostics import PlanError
from anabranch.dsl.printer import dump_ast

Stage: TypeAlias = Literal["ast", "graph", "schedule"]


def show(
    program: Program,
    stage: Stage,
    name: str | None = None,
    *,
    functions: Collection[str] = (),
    target: Target | None = None,
    machine: Machine | None = None,
    sizes: Sizes | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> str:
    """The program at `stage`; all its plans for `ast`, and what plan `name` needs (the last when None) for the others.

    functions: names of the host's functions; target, machine, sizes, inputs: as for `compile_plan` and `Compiled`
    Raises PlanError (`pool-too-small` where `machine` cannot hold the plan, `schedule-too-large` for one of too many
    threads), and KeyError for an unknown name.
    """
    if stage == "ast":
        return dump_ast(program)
    compiled = compile_plan(program, name, functions=functions, target=target)
    match stage:
        case "graph":
            return graph_text(compiled.graph)
        case "schedule":
            on = machine or Machine()
            bounds = compiled.check_bounds(compiled.bounds_on(on, sizes, inputs), on)
            try:
                schedule = record(bounds)
            except PlanError as error:
                raise PlanError(error.diagnostics, program.source) from None
            return schedule_text(verify_schedule(schedule, bounds))
        case _:
            assert_never(stage)
