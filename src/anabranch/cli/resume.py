"""`anabranch resume`: go on with a run from its journal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import typer

import anabranch
from anabranch.cli.errors import fail
from anabranch.cli.run import engine_for, exit_unless_ok, run_all, show_results, view_of
from anabranch.cli.sources import host_functions
from anabranch.cli.text import printable
from anabranch.dsl.diagnostics import Source
from anabranch.dsl.parse import parse
from anabranch.runtime.engine import Engine, EngineConfig, Run, RunResult
from anabranch.runtime.events import Event, RunEnded
from anabranch.runtime.interrupt import stop_on_interrupt
from anabranch.runtime.journal import Contents, Header, Journal
from anabranch.runtime.models import load
from anabranch.runtime.replay import LogEntry, Replay, finished_events


def resume_file(file: str, *, model: str | None, functions: str | None, as_json: bool) -> None:
    """Go on with the runs of the journal `file`, appending to it, and print what all of them came to.

    model, functions: where they are now, if not where they were

    Raises typer.Exit with code 1 unless every run ended ok, and PlanError if the journal can't be read or written, or
    is of another model or version.
    """
    journal, contents = Journal.open(file)
    with journal:
        header = contents.header
        if header.anabranch != anabranch.__version__:
            fail(
                "bad-journal",
                f"`{file}` was written by anabranch {header.anabranch}, and this is {anabranch.__version__}",
                f"install anabranch {header.anabranch}, or run the plan anew",
            )
        if contents.num_dropped:
            lines = "line is" if contents.num_dropped == 1 else "lines are"
            kept = 1 + sum(map(len, contents.entries))
            typer.echo(
                printable(
                    f"`{file}`: the last {contents.num_dropped} {lines} torn or changed; going on from line {kept}"
                ),
                err=True,
            )
        results: list[RunResult | None] = [_finished(entries) for entries in contents.entries]
        stopped = False
        if any(result is None for result in results):
            engine = _engine(file, header, model)
            stopped = _go_on(engine, journal, contents, results, functions, as_json)
    ended = [result for result in results if result is not None]
    show_results(ended, as_json=as_json, many=header.many)
    exit_unless_ok(ended, stopped=stopped)


def _finished(entries: Sequence[LogEntry]) -> RunResult | None:
    """What a run came to that the journal holds the end of."""
    over = bool(entries) and isinstance(entries[-1].event, RunEnded)
    return RunResult.of(finished_events(entries)) if over else None


def _engine(file: str, header: Header, model: str | None) -> Engine:
    loaded = load(
        model or header.model, dtype=getattr(torch, header.dtype), template=header.template, device=header.device
    )
    if loaded.fingerprint != header.fingerprint:
        fail(
            "bad-journal",
            f"`{file}` is of a model with the fingerprint {header.fingerprint}, and that of `{loaded.name}` is "
            f"{loaded.fingerprint}",
            f"`--model` takes the model that was `{header.model}`",
        )
    # The bits of a deterministic run are those of its number of threads.
    torch.set_num_threads(header.threads)
    return engine_for(
        loaded,
        EngineConfig(
            lanes=header.lanes,
            pages=header.pages,
            page_size=header.page_size,
            chunk=header.chunk,
            deterministic=header.deterministic,
            preempt=header.preempt,
        ),
    )


def _go_on(
    engine: Engine,
    journal: Journal,
    contents: Contents,
    results: list[RunResult | None],
    functions: str | None,
    as_json: bool,
) -> bool:
    """Fill in the results that are None. Returns whether ctrl-C stopped that."""
    header = contents.header
    host = host_functions(functions or header.functions)
    compiled = engine.compile(parse(Source(header.source, header.text)), header.plan, tuple(host))
    view = view_of(as_json, len(results))

    def listener(run: Run, event: Event) -> None:
        view.show(run.input_index, event)

    with stop_on_interrupt() as stopped:
        runs = [
            engine.submit(
                compiled,
                header.inputs[index],
                seed=header.seed,
                input_index=index,
                functions=host,
                listener=listener,
                log=journal.log(index),
                replay=Replay(contents.entries[index]),
            )
            for index, result in enumerate(results)
            if result is None
        ]
        journal.begin()
        run_all(engine, runs, view, stopped, journal)
    for run in runs:
        results[run.input_index] = run.result
    return stopped.is_set()
