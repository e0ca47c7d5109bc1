"""`anabranch build`: a plan and a model as a folder that runs without either; and how `run` reads one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import typer

from anabranch.cli.errors import fail
from anabranch.cli.sources import chosen_plan, host_functions, read_program
from anabranch.cli.text import printable
from anabranch.compiler.show import schedule_of
from anabranch.dsl.ast import Block, Param, PlanDef, Program
from anabranch.dsl.diagnostics import PlanError, did_you_mean
from anabranch.kernels.aot import TARGETS
from anabranch.runtime.artefact import Build, open_build
from anabranch.runtime.artefact_write import check_place, write_build
from anabranch.runtime.engine import Engine, EngineConfig, machine_of
from anabranch.runtime.models import load


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of `build`, as they were given."""

    plan: str | None
    model: str
    out: str
    targets: tuple[str, ...]
    page_size: int
    deterministic: bool
    dtype: str
    device: str
    template: Literal["raw"] | None
    functions: str | None
    force: bool


def build_file(file: str, settings: Settings) -> None:
    """Build a plan of `file` and print what was written.

    Raises PlanError if the plan or the model is wrong, or the folder can't be written; typer.BadParameter for a target
    that there is none of.
    """
    known = [target.name for target in TARGETS]
    for name in settings.targets:
        if name not in known:
            raise typer.BadParameter(
                f"there is no target `{name}`: {did_you_mean(name, known) or ', '.join(known)}", param_hint="--target"
            )
    program = read_program(file)
    plan = chosen_plan(program, settings.plan)
    functions = tuple(host_functions(settings.functions))
    folder = Path(settings.out)
    check_place(folder, force=settings.force)
    model = load(
        settings.model, dtype=getattr(torch, settings.dtype), template=settings.template, device=settings.device
    )
    config = EngineConfig(page_size=settings.page_size, deterministic=settings.deterministic)
    machine = machine_of(model.decoder, config)
    try:
        # Nothing is decoded, and a pool of the machine's size would be filled with zeros.
        engine = Engine(model, replace(config, pages=1))
    except ValueError as error:
        fail("bad-device", str(error), "docs/kernels.md has what the kernels support")
    compiled = engine.compile(program, plan.name, functions)
    compiled.check_bounds(compiled.bounds_on(machine, engine.sizes), machine, engine.max_context)
    for warning in compiled.warnings:
        typer.echo(printable(warning.render(program.source)), err=True)
    schedule, no_schedule = _schedule(program, plan.name, functions)
    manifest = write_build(
        folder,
        compiled,
        model,
        page_size=settings.page_size,
        deterministic=settings.deterministic,
        template=settings.template,
        functions=functions,
        schedule=schedule,
        no_schedule=no_schedule,
        targets=tuple(dict.fromkeys(settings.targets)),
        force=settings.force,
    )
    if settings.targets and manifest.kernels_missing:
        typer.echo(f"no kernels were built: {manifest.kernels_missing}", err=True)
    if no_schedule:
        typer.echo(printable(f"there is no static schedule: {no_schedule}"), err=True)
    size = sum(size for size, _ in manifest.files.values())
    typer.echo(printable(f"{settings.out}: plan `{manifest.plan}`, {len(manifest.files) + 1} files, {size:,} bytes"))


def _schedule(program: Program, plan: str, functions: tuple[str, ...]) -> tuple[str | None, str]:
    """The static schedule as JSON, or None and why there is none: only a run's own bounds are needed to run."""
    try:
        return schedule_of(program, plan, functions), ""
    except PlanError as error:
        return None, error.diagnostics[0].message


UNFIT: Mapping[str, str] = {
    "plan": "it runs the plan that it was built for",
    "model": "its model is in it",
    "dtype": "its programs compute in the type that they were built for",
    "device": "its programs run where they were built for",
    "page_size": "its programs work on pages of the size that they were built for",
    "journal": "`resume` compiles a plan, which a build does without: run the plan's file",
}
"""Options of `run` that a build can't take, and why."""


def refuse_unfit(file: str, given: frozenset[str]) -> None:
    """Raise PlanError `bad-build` if an option was given that a build can't take, by its name."""
    for name in sorted(given & UNFIT.keys()):
        option = "--" + name.replace("_", "-")
        fail(
            "bad-build", f"`{file}` is a build, which does not take `{option}`: {UNFIT[name]}", f"leave out `{option}`"
        )


def read_build(file: str, *, deterministic: bool, functions: Mapping[str, Callable[..., Any]]) -> Build:
    """The build in a folder, checked. Raises PlanError: bad-build, bad-functions, not-deterministic."""
    build = open_build(Path(file))
    missing = [name for name in build.manifest.functions if name not in functions]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        fail(
            "bad-functions",
            f"the plan of `{file}` calls {names}, which `--functions` does not give",
            "`--functions MODULE` names the module that defines them",
        )
    if deterministic and not build.parts.deterministic:
        fail(
            "not-deterministic",
            f"the programs of `{file}` were not built for it",
            "build it with `--deterministic`, or run without",
        )
    return build


def head_of(build: Build) -> PlanDef:
    """The name and parameters of a build's plan, as inputs are read for them."""
    graph = build.compiled.graph
    plan = graph.plans[graph.main]
    bounds = plan.bounds or (None,) * len(plan.params)
    params = tuple(Param(name, bound) for name, bound in zip(plan.params, bounds, strict=True))
    return PlanDef(plan.name, params, (), Block(()), plan.span)
