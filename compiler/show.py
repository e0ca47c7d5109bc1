"""Each stage of a plan on its way to a schedule, as text for a person."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeAlias, assert_never

from anabranch.compiler.emit_mlir import to_mlir
from anabranch.compiler.graph_text import graph_text
from anabranch.compiler.pipeline import Compiled, compile_plan
from anabranch.compiler.record import record
from anabranch.compiler.schedule import Schedule, schedule_text
from anabranch.compiler.schedule_json import Origin, to_json
from anabranch.compiler.scheduler import Machine
from anabranch.compiler.sizes import Sizes
from anabranch.compiler.verify_schedule import verify_schedule
from anabranch.dsl.ast import Program
from anabranch.dsl.check import Target
from anabranch.dsl.diagnostics import PlanError
from anabranch.dsl.printer import dump_ast, print_plan

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
            return schedule_text(_recorded(compiled, machine or Machine(), sizes, inputs))
        case _:
            assert_never(stage)


def schedule_of(
    program: Program,
    name: str | None = None,
    functions: Collection[str] = (),
    *,
    machine: Machine | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> str:
    """The static schedule as JSON, in which text counts as its bytes; parameters and errors as for `show`."""
    compiled = compile_plan(program, name, functions=functions)
    schedule = _recorded(compiled, machine or Machine(), None, inputs)
    return to_json(schedule, _origin(program, compiled, functions, inputs))


def mlir_of(
    program: Program,
    name: str | None = None,
    functions: Collection[str] = (),
    *,
    machine: Machine | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> str:
    """The plan and its static schedule as MLIR, in which text counts as its bytes; errors as for `show`."""
    compiled = compile_plan(program, name, functions=functions)
    schedule = _recorded(compiled, machine or Machine(), None, inputs)
    return to_mlir(schedule, _origin(program, compiled, functions, inputs), compiled.graph)


def _origin(
    program: Program, compiled: Compiled, functions: Collection[str], inputs: Mapping[str, Any] | None
) -> Origin:
    text = program.source.text or print_plan(program)
    return Origin(text, compiled.graph.main, dict(inputs or {}), tuple(sorted(functions)))


def _recorded(compiled: Compiled, machine: Machine, sizes: Sizes | None, inputs: Mapping[str, Any] | None) -> Schedule:
    bounds = compiled.check_bounds(compiled.bounds_on(machine, sizes, inputs), machine)
    try:
        schedule = record(bounds)
    except PlanError as error:
        raise PlanError(error.diagnostics, compiled.program.source) from None
    return verify_schedule(schedule, bounds)
