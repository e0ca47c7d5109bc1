"""`anabranch show --stage mlir`: a plan and its schedule, or a model's step, as MLIR."""

from __future__ import annotations

from typing import Literal

import typer

from anabranch.cli.errors import fail
from anabranch.cli.sources import chosen_plan, host_functions, read_program
from anabranch.cli.text import printable
from anabranch.compiler.show import mlir_of

Dialect = Literal["anabranch", "torch", "linalg", "stablehlo"]

NUM_SLOTS = 4096
"""Of the KV pool that the printed step works on: 256 pages of 16."""


def show_mlir(
    file: str, plan: str | None, functions: str | None, dialect: Dialect, model: str | None, *, as_json: bool
) -> None:
    """Print a plan of `file` and its static schedule in the dialect `anabranch`, or the step of `model` in another.

    The plan is compiled in either case. Raises PlanError (`no-mlir`, `not-lowered`, `no-model` where a step is wanted
    and no model named, and those of a plan that is wrong), and typer.BadParameter for `--json`.
    """
    if as_json:
        raise typer.BadParameter("only `--stage schedule` is written as JSON", param_hint="--json")
    program = read_program(file)
    chosen = chosen_plan(program, plan)
    text = mlir_of(program, chosen.name, tuple(sorted(host_functions(functions))))
    if dialect != "anabranch":
        if model is None:
            fail(
                "no-model", f"a step in the dialect {dialect} is a model's, and no model is named", "`--model smollm2`"
            )
        text = _step(model, dialect)
    typer.echo(printable(text.rstrip("\n")))


def _step(model: str, dialect: Literal["torch", "linalg", "stablehlo"]) -> str:
    from anabranch.compiler.mlir import mlir_text
    from anabranch.compiler.mlir_bindings import bindings
    from anabranch.runtime.dense_step import dense_weights, export_dense_step
    from anabranch.runtime.models import load

    bindings("fx")
    decoder = load(model, device="cpu").decoder
    return mlir_text(export_dense_step(decoder, dense_weights(decoder), NUM_SLOTS), dialect)
