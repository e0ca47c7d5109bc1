"""`anabranch show`: a plan's syntax, graph or schedule as readable text, and MLIR."""

from __future__ import annotations

from typing import Literal, TypeAlias

import typer

from anabranch.cli.errors import fail
from anabranch.cli.sources import chosen_plan, host_functions, read_program
from anabranch.cli.text import printable
from anabranch.compiler.show import Stage, mlir_of, schedule_of, show
from anabranch.dsl.ast import Program

Dialect: TypeAlias = Literal["anabranch", "torch", "linalg", "stablehlo"]

NUM_SLOTS = 4096
"""Of the KV pool that a printed step works on: 256 pages of 16."""


def show_stage(
    file: str,
    stage: Stage | Literal["mlir"],
    plan: str | None,
    functions: str | None,
    *,
    dialect: Dialect,
    model: str | None,
    as_json: bool,
) -> None:
    """Print one form of a plan of `file`; the syntax of the whole file when no plan is named.

    dialect: at the stage `mlir`: `anabranch` for the plan and its schedule, else the step of `model` in that dialect
    as_json: the schedule as one JSON document
    Raises PlanError (of the plan; `no-model`, `no-mlir`, `not-lowered` where a step is wanted), and typer.BadParameter
    where another stage than the schedule is wanted as JSON.
    """
    if as_json and stage != "schedule":
        raise typer.BadParameter("only `--stage schedule` is written as JSON", param_hint="--json")
    program = read_program(file)
    chosen = chosen_plan(program, plan)
    known = tuple(sorted(host_functions(functions)))
    if as_json:
        typer.echo(schedule_of(program, chosen.name, known).encode("utf-8", "surrogatepass"), nl=False)
        return
    if stage == "mlir":
        text = mlir_of(program, chosen.name, known)
        if dialect != "anabranch":
            text = _step(model, dialect)
    else:
        if stage == "ast" and plan is not None:
            program = Program((chosen,), program.source)
        text = show(program, stage, chosen.name, functions=known)
    typer.echo(printable(text.rstrip("\n")))


def _step(model: str | None, dialect: Literal["torch", "linalg", "stablehlo"]) -> str:
    """A model's step, whose numbers of rows, keys and shifts are open."""
    from anabranch.compiler.mlir import mlir_text
    from anabranch.compiler.mlir_bindings import bindings
    from anabranch.runtime.dense_step import dense_weights, export_dense_step
    from anabranch.runtime.model import Decoder
    from anabranch.runtime.models import load

    if model is None:
        fail("no-model", f"a step in the dialect {dialect} is a model's, and none is named", "`--model smollm2`")
    # A missing extra is told before a model is loaded.
    bindings("fx")
    decoder = load(model, device="cpu").decoder
    # Of what `load` gives; a decoder of another kind has no such step.
    assert isinstance(decoder, Decoder)
    return mlir_text(export_dense_step(decoder, dense_weights(decoder), NUM_SLOTS), dialect)
