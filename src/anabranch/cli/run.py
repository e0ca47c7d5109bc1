"""`anabranch run`: run a plan on one input or many, and show it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event as Flag
from typing import Any, Literal

import torch
import typer

import anabranch
from anabranch.cli.errors import FAILED, fail
from anabranch.cli.files import check_writable, write_whole
from anabranch.cli.inputs import read_inputs
from anabranch.cli.live import Lines, LiveTree, Silent, View
from anabranch.cli.sources import chosen_plan, host_functions, read_program
from anabranch.cli.text import printable, write_json
from anabranch.cli.verify import fault_of
from anabranch.cli.verify import summary as summary_of_schedule
from anabranch.compiler.pipeline import Compiled
from anabranch.compiler.recording import Recording, to_json
from anabranch.compiler.verify_recording import ScheduleFault, verify_recording
from anabranch.dsl.diagnostics import Source
from anabranch.dsl.spec import Value
from anabranch.dsl.values import render
from anabranch.runtime.artefact import is_build
from anabranch.runtime.engine import Engine, EngineConfig, Run, RunResult
from anabranch.runtime.events import BranchStarted, Event
from anabranch.runtime.interrupt import stop_on_interrupt
from anabranch.runtime.journal import Header, Journal
from anabranch.runtime.models import LoadedModel, load
from anabranch.runtime.recorder import Recorder


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of `run`, as they were given."""

    plan: str | None
    inputs: tuple[str, ...]
    inputs_file: str | None
    seed: int
    deterministic: bool
    lanes: int
    pages: int | None
    page_size: int
    chunk: int
    preempt: Literal["swap", "recompute", "never"]
    model: str
    dtype: str
    device: str | None
    run_ahead: int
    template: str | None
    functions: str | None
    journal: str | None
    schedule: str | None
    verify: bool
    as_json: bool
    given: frozenset[str]
    """Names of the options that stand on the command line."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to run, read from a plan's file or from a build."""

    compiled: Compiled
    name: str
    inputs: list[dict[str, Value]]
    functions: Mapping[str, Callable[..., Any]]
    engine: Engine


def run_file(file: str, settings: Settings) -> None:
    """Run a plan of `file`, or the one that the build in the folder `file` holds, and print what it came to.

    Raises typer.Exit with code 1 unless every run ended ok, and PlanError if the plan, its inputs or the model are
    wrong, or its journal can't be written, or the build can't be used.
    """
    if is_build(Path(file)):
        from anabranch.cli.build import refuse_unfit

        refuse_unfit(file, settings.given)
    with nullcontext() if settings.journal is None else Journal.create(settings.journal) as journal:
        _run(file, settings, journal)


def _run(file: str, settings: Settings, journal: Journal | None) -> None:
    recorder = Recorder() if settings.verify or settings.schedule is not None else None
    plan = (_read_build if is_build(Path(file)) else _read_plan)(file, settings, recorder)
    engine, given, source = plan.engine, plan.inputs, plan.compiled.program.source
    for warning in plan.compiled.warnings:
        typer.echo(printable(warning.render(source)), err=True)
    view = view_of(settings.as_json, len(given))

    def listener(run: Run, event: Event) -> None:
        view.show(run.input_index, event)

    with stop_on_interrupt() as stopped:
        runs = [
            engine.submit(
                plan.compiled,
                values,
                seed=settings.seed,
                input_index=index,
                functions=plan.functions,
                listener=listener,
                log=None if journal is None else journal.log(index),
            )
            for index, values in enumerate(given)
        ]
        if journal is not None:
            journal.begin(_header(settings, source, plan.name, given, engine.model.fingerprint))
        run_all(engine, runs, view, stopped, journal)
    results = [run.result for run in runs if run.result is not None]
    show_results(results, as_json=settings.as_json, many=settings.inputs_file is not None)
    if recorder is not None:
        _keep(recorder.recording(), settings, engine)
    exit_unless_ok(results, stopped=stopped.is_set())


def _read_plan(file: str, settings: Settings, recorder: Recorder | None) -> _Plan:
    program = read_program(file)
    plan = chosen_plan(program, settings.plan)
    functions = host_functions(settings.functions)
    given = read_inputs(plan, settings.inputs, settings.inputs_file)
    if settings.schedule is not None:
        check_writable(settings.schedule)
    model = load(
        settings.model, dtype=getattr(torch, settings.dtype), template=settings.template, device=settings.device
    )
    engine = engine_for(model, _config(settings, settings.page_size), recorder)
    return _Plan(engine.compile(program, plan.name, tuple(functions)), plan.name, given, functions, engine)


def _read_build(folder: str, settings: Settings, recorder: Recorder | None) -> _Plan:
    from anabranch.cli.build import head_of, read_build

    functions = host_functions(settings.functions)
    build = read_build(folder, deterministic=settings.deterministic, functions=functions)
    plan = head_of(build)
    given = read_inputs(plan, settings.inputs, settings.inputs_file)
    if settings.schedule is not None:
        check_writable(settings.schedule)
    model = build.model(raw=settings.template == "raw")
    engine = engine_for(model, _config(settings, build.parts.page_size), recorder)
    return _Plan(build.compiled, plan.name, given, functions, engine)


def _config(settings: Settings, page_size: int) -> EngineConfig:
    return EngineConfig(
        lanes=settings.lanes,
        pages=settings.pages,
        page_size=page_size,
        chunk=settings.chunk,
        deterministic=settings.deterministic,
        preempt=settings.preempt,
        run_ahead=settings.run_ahead,
    )


def engine_for(model: LoadedModel, config: EngineConfig, recorder: Recorder | None = None) -> Engine:
    """An engine. Raises PlanError `bad-device` where the kernels do not support the model or the sizes."""
    try:
        return Engine(model, config, recorder=recorder)
    except ValueError as error:
        fail("bad-device", str(error), "without `--device` it runs on the CPU")


def run_all(engine: Engine, runs: Sequence[Run], view: View, stopped: Flag, journal: Journal | None) -> None:
    """Step until every run is over or `stopped` is set; what runs then is cancelled, and the journal not told of it.

    What a step has brought is durable before the next one.
    """
    try:
        while any(run.result is None for run in runs) and not stopped.is_set():
            engine.step()
            if journal is not None:
                journal.commit()
        if journal is not None:
            journal.commit(all_of_it=True)
        for run in runs:
            engine.cancel(run)
    finally:
        view.close()


def show_results(results: Sequence[RunResult], *, as_json: bool, many: bool) -> None:
    """Print what runs came to. many: with `--json`, as a list whatever their number."""
    if as_json:
        documents = [result_document(result) for result in results]
        write_json(documents if many else documents[0])
    else:
        _print(results)


def exit_unless_ok(results: Sequence[RunResult], *, stopped: bool) -> None:
    """Raises typer.Exit with code 1 unless every run ended ok. stopped: by ctrl-C, which is said."""
    if stopped:
        typer.echo("interrupted: this is what was finished", err=True)
    if stopped or any(result.status != "ok" for result in results):
        raise typer.Exit(FAILED)


def _header(
    settings: Settings, source: Source, plan: str, given: Sequence[Mapping[str, Value]], fingerprint: str
) -> Header:
    return Header(
        anabranch=anabranch.__version__,
        source=source.name,
        text=source.text,
        plan=plan,
        inputs=tuple(given),
        many=settings.inputs_file is not None,
        seed=settings.seed,
        deterministic=settings.deterministic,
        lanes=settings.lanes,
        pages=settings.pages,
        page_size=settings.page_size,
        chunk=settings.chunk,
        preempt=settings.preempt,
        threads=torch.get_num_threads(),
        model=_absolute(settings.model),
        fingerprint=fingerprint,
        dtype=settings.dtype,
        device=settings.device,
        template=settings.template,
        functions=None if settings.functions is None else _absolute(settings.functions),
    )


def _absolute(name: str) -> str:
    """A name that may be of a file: it is then to be found from any folder."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _keep(recording: Recording, settings: Settings, engine: Engine) -> None:
    """Write the recorded schedule, and verify it, as the settings say. Raises PlanError."""
    if settings.schedule is not None:
        write_whole(settings.schedule, to_json(recording).encode("utf-8", "surrogatepass"))
    if settings.verify:
        try:
            report = verify_recording(recording, sizes=engine.sizes)
        except ScheduleFault as fault:
            fault_of(fault)
        else:
            typer.echo(summary_of_schedule(report), err=True)


def result_document(result: RunResult) -> dict[str, Any]:
    """A run as the JSON object that `--json` prints; branches in the order they began."""
    began = (event.path for event in result.events if isinstance(event, BranchStarted))
    place = {"/".join(path): index for index, path in enumerate(began)}
    return {
        "value": result.value,
        "status": result.status,
        "reason": result.reason,
        "branches": [
            {
                "path": branch.path,
                "label": branch.label,
                "status": branch.status,
                "text": branch.text,
                "reason": branch.reason,
                "tokens": branch.tokens,
                "value": branch.value,
            }
            for branch in sorted(result.branches, key=lambda branch: place[branch.path])
        ],
        "counts": dict(result.counts),
    }


def _print(results: Sequence[RunResult]) -> None:
    """Values on stdout, in the order of the inputs; how each run went on stderr."""
    for index, result in enumerate(results):
        lead = f"#{index} " if len(results) > 1 else ""
        if result.status == "ok":
            # A pipe gets the very text; a terminal must not obey what a model wrote.
            text = render(result.value)
            typer.echo(printable(text) if sys.stdout.isatty() else text.encode(errors="replace"))
        else:
            typer.echo(printable(f"{lead}error[run-{result.status}]: {result.reason}"), err=True)
        typer.echo(lead + summary(result), err=True)


def summary(result: RunResult) -> str:
    """The counts of a run in one line."""
    counts = result.counts
    replayed = f" and {counts['tokens_replayed']} taken from the journal" if counts["tokens_replayed"] else ""
    elapsed = counts["elapsed_s"]
    speed = f" ({counts['tokens_decoded'] / elapsed:.1f} tokens/s)" if elapsed > 0 else ""
    return (
        f"{result.status}: {len(result.branches)} branches, {counts['tokens_decoded']} tokens decoded{replayed}, "
        f"{counts['critical_path_tokens']} on the critical path, {counts['tokens_prefilled']} prefilled, "
        f"{counts['tokens_aliased']} aliased, {counts['tokens_reprefilled']} prefilled again, "
        f"{counts['pages_peak']} pages, {elapsed:.1f} s{speed}"
    )


def view_of(as_json: bool, num_inputs: int) -> View:
    if sys.stderr.isatty():
        from rich.console import Console

        return LiveTree(Console(stderr=True))
    return Silent() if as_json else Lines(num_inputs)
