"""The commands and their options. A command's own module, and all it needs, is imported when it runs."""

from __future__ import annotations

import sys
from enum import StrEnum
from io import TextIOWrapper
from typing import Annotated

import typer

import anabranch
from anabranch.cli.errors import reporting


class Stage(StrEnum):
    """What `show` prints."""

    AST = "ast"
    GRAPH = "graph"
    SCHEDULE = "schedule"
    MLIR = "mlir"


class Dialect(StrEnum):
    """What `show --stage mlir` prints it in."""

    ANABRANCH = "anabranch"
    TORCH = "torch"
    LINALG = "linalg"
    STABLEHLO = "stablehlo"


class Dtype(StrEnum):
    """What a model computes in."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Preempt(StrEnum):
    """What becomes of a thread that must give up its pages."""

    SWAP = "swap"
    RECOMPUTE = "recompute"
    NEVER = "never"


class Format(StrEnum):
    """Whose traces `convert` reads and writes."""

    MULTIVERSE = "multiverse"
    THREADWEAVER = "threadweaver"
    APR = "apr"


class Template(StrEnum):
    """Which chat template stands around the turns."""

    RAW = "raw"


class Kind(StrEnum):
    """What `pack` labels: see `runtime/traces.py`."""

    DRAWN = "drawn"
    TRIMMED = "trimmed"
    RECORDED = "recorded"
    SCORED = "scored"


class Train(StrEnum):
    """Of which branches `pack` labels what was written."""

    OK = "ok"
    ALL = "all"


app = typer.Typer(
    name="anabranch",
    help="Fork / map / join reasoning plans over one shared KV cache.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
model_app = typer.Typer(help="Models.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(model_app, name="model")

File = Annotated[str, typer.Argument(metavar="FILE", help="A plan file.")]
Files = Annotated[list[str], typer.Argument(metavar="FILE...", help="Plan files.")]
Plan = Annotated[str | None, typer.Option("--plan", metavar="NAME", help="The plan of the file; the last by default.")]
Functions = Annotated[
    str | None,
    typer.Option("--functions", metavar="MODULE", help="Python module or .py file whose functions the plan may call."),
]
Model = Annotated[
    str, typer.Option("--model", metavar="MODEL", help="smollm2, random, a folder, a .gguf file, or ORG/NAME.")
]
MaybeModel = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="Check against this model too: its context and tokens.")
]
Input = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="K=V", help="An input; K=@FILE reads a file. May be given again for another."),
]
Lanes = Annotated[int, typer.Option("--lanes", min=1, max=4096, help="Branches that decode at once.")]
Pages = Annotated[int | None, typer.Option("--pages", min=1, max=1 << 24, help="KV pages; what 2 GiB hold by default.")]
PageSize = Annotated[int, typer.Option("--page-size", min=1, max=1024, help="Token slots in a page.")]
Chunk = Annotated[int, typer.Option("--chunk", min=1, max=65536, help="Most tokens prefilled in one step.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"anabranch {anabranch.__version__}")
        raise typer.Exit


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def check(file: Files, plan: Plan = None, model: MaybeModel = None, functions: Functions = None) -> None:
    """Find what is wrong with plans, without running them."""
    with reporting():
        from anabranch.cli.check import check_files

        check_files(file, plan, model, functions)


@app.command()
def fmt(
    file: Files,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 if a file would change.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Write nothing; show what would change.")] = False,
) -> None:
    """Rewrite plans in canonical form, comments kept."""
    with reporting():
        from anabranch.cli.fmt import format_files

        format_files(file, only_check=check, diff=diff)


@app.command()
def show(
    file: File,
    stage: Annotated[Stage, typer.Option("--stage", help="Which form of the plan.")] = Stage.GRAPH,
    plan: Plan = None,
    functions: Functions = None,
    dialect: Annotated[
        Dialect,
        typer.Option(
            "--dialect",
            help="With `--stage mlir`: anabranch for the plan and its schedule, another for a step of `--model`.",
        ),
    ] = Dialect.ANABRANCH,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="With `--stage mlir`: whose step is lowered."),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="With `--stage schedule`: one JSON document, which `verify` reads.")
    ] = False,
) -> None:
    """Print a plan's syntax, graph or schedule, or MLIR."""
    with reporting():
        from anabranch.cli.show import show_stage

        show_stage(file, stage.value, plan, functions, dialect=dialect.value, model=model, as_json=json)


@app.command()
def verify(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A schedule, as `run --schedule` writes it.")],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Of the run: hold pages and calls against their bounds too."),
    ] = None,
    template: Annotated[Template | None, typer.Option("--template", help="raw: the run used no chat template.")] = None,
    json: Json = False,
) -> None:
    """Replay a schedule without a model, and check each step of it."""
    with reporting():
        from anabranch.cli.verify import verify_file

        verify_file(file, model, template.value if template else None, as_json=json)


@app.command()
def explain(
    file: File,
    plan: Plan = None,
    input: Input = None,
    lanes: Lanes = 64,
    pages: Pages = None,
    page_size: PageSize = 16,
    chunk: Chunk = 512,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Count tokens as this model does, and hold its context against."),
    ] = None,
    baseline: Annotated[
        int | None,
        typer.Option("--baseline", metavar="TOKENS", min=1, help="Tokens of a sequential answer, to compare with."),
    ] = None,
    functions: Functions = None,
    json: Json = False,
) -> None:
    """Tell what a plan may cost at most, before it runs."""
    with reporting():
        from anabranch.cli.explain import Settings, explain_file

        settings = Settings(
            plan=plan,
            inputs=tuple(input or ()),
            lanes=lanes,
            pages=pages,
            page_size=page_size,
            chunk=chunk,
            model=model,
            baseline=baseline,
            functions=functions,
            as_json=json,
        )
        explain_file(file, settings)


@app.command()
def build(
    file: File,
    out: Annotated[str, typer.Option("-o", "--out", metavar="DIR", help="The folder to write.")],
    plan: Plan = None,
    model: Model = "smollm2",
    target: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="TARGET", help="Compile the kernels for sm_90, ... too. May be given again."),
    ] = None,
    page_size: PageSize = 16,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="So that it can be run with `--deterministic`.")
    ] = False,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="What to compute in.")] = Dtype.FLOAT32,
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="Where it will run.")] = "cpu",
    template: Annotated[
        Template | None, typer.Option("--template", help="raw: no chat template. The model's own by default.")
    ] = None,
    functions: Functions = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the build that is there.")] = False,
) -> None:
    """Write a plan and a model as a folder, which `run` takes as it is."""
    with reporting():
        from anabranch.cli.build import Settings, build_file

        settings = Settings(
            plan=plan,
            model=model,
            out=out,
            targets=tuple(target or ()),
            page_size=page_size,
            deterministic=deterministic,
            dtype=dtype.value,
            device=device,
            template="raw" if template else None,
            functions=functions,
            force=force,
        )
        build_file(file, settings)


@app.command()
def run(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A plan file, or a folder that `build` wrote.")],
    plan: Plan = None,
    input: Input = None,
    inputs: Annotated[
        str | None, typer.Option("--inputs", metavar="FILE", help="JSON Lines: one run for each line, in one batch.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the noise that tokens are drawn with.")] = 0,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same bits whatever runs beside; no clock decides a join.")
    ] = False,
    lanes: Lanes = 64,
    pages: Pages = None,
    page_size: PageSize = 16,
    chunk: Chunk = 512,
    preempt: Annotated[
        Preempt,
        typer.Option("--preempt", help="When pages run out: swap to host memory, recompute, or reserve worst cases."),
    ] = Preempt.SWAP,
    model: Model = "smollm2",
    dtype: Annotated[Dtype, typer.Option("--dtype", help="What to compute in.")] = Dtype.FLOAT32,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="DEVICE", help="cuda, cuda:N, or cpu to try a device's path without one."),
    ] = None,
    run_ahead: Annotated[
        int, typer.Option("--run-ahead", min=0, max=64, help="On a device: steps that run ahead of the host.")
    ] = 1,
    template: Annotated[
        Template | None, typer.Option("--template", help="raw: no chat template. The model's own by default.")
    ] = None,
    functions: Functions = None,
    journal: Annotated[
        str | None,
        typer.Option("--journal", metavar="FILE", help="Write a new journal, from which `resume` goes on when killed."),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", metavar="FILE", help="Write down what was done, for `verify`.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check what was done, as `verify` does.")] = False,
    json: Json = False,
) -> None:
    """Run a plan, showing its branches while they decode."""
    with reporting():
        from anabranch.cli.run import Settings, run_file

        settings = Settings(
            plan=plan,
            inputs=tuple(input or ()),
            inputs_file=inputs,
            seed=seed,
            deterministic=deterministic,
            lanes=lanes,
            pages=pages,
            page_size=page_size,
            chunk=chunk,
            preempt=preempt.value,
            model=model,
            dtype=dtype.value,
            device=device,
            run_ahead=run_ahead,
            template=template.value if template else None,
            functions=functions,
            journal=journal,
            schedule=schedule,
            verify=verify,
            as_json=json,
            given=frozenset(name for name in context.params if _is_given(context, name)),
        )
        run_file(file, settings)


@app.command()
def resume(
    journal: Annotated[str, typer.Argument(metavar="FILE", help="A journal that `run --journal` wrote.")],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Where the model is now; it must be the one of the journal."),
    ] = None,
    functions: Annotated[
        str | None,
        typer.Option("--functions", metavar="MODULE", help="Where the functions that the plan calls are now."),
    ] = None,
    json: Json = False,
) -> None:
    """Go on with a run that was killed, from its journal."""
    with reporting():
        from anabranch.cli.resume import resume_file

        resume_file(journal, model=model, functions=functions, as_json=json)


@app.command()
def convert(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A trace with `--from`, a plan with `--to`.")],
    from_: Annotated[
        Format | None, typer.Option("--from", help="Whose trace it is: a plan that replays it is written.")
    ] = None,
    to: Annotated[
        Format | None, typer.Option("--to", help="Whose trace to write: that which the plan was made from.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write it; stdout by default.")
    ] = None,
    plan: Plan = None,
) -> None:
    """Make a plan of a trace of another system, or the trace again of such a plan."""
    with reporting():
        if (from_ is None) == (to is None):
            raise typer.BadParameter("give one of --from and --to")
        from anabranch.cli.convert import export_file, import_file

        if from_ is not None:
            if plan is not None:
                raise typer.BadParameter("--plan chooses what --to writes")
            import_file(file, from_.value, output)
        elif to is not None:
            export_file(file, to.value, output, plan)


Traces = Annotated[
    list[str], typer.Argument(metavar="TRACES...", help="Journals of `run --journal`, or folders of them (*.jsonl).")
]


@app.command()
def pack(
    traces: Traces,
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="A new folder for the rows.")],
    length: Annotated[int, typer.Option("--length", min=1, max=1 << 24, help="Most tokens in a row.")] = 8192,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Where the model of the traces is now, for its tokenizer."),
    ] = None,
    train: Annotated[
        Train, typer.Option("--train", help="Train branches that ended ok in all they stand in, or all of them.")
    ] = Train.OK,
    without: Annotated[
        list[Kind] | None, typer.Option("--without", help="Do not train such tokens. May be given again for another.")
    ] = None,
    shifts: Annotated[
        bool, typer.Option("--shifts", help="Take traces with shifts, which position ids alone can't say.")
    ] = False,
    skip_long: Annotated[
        bool, typer.Option("--skip-long", help="Leave out traces that are longer than a row.")
    ] = False,
    json: Json = False,
) -> None:
    """Pack runs into rows to train a model on, with their masks, positions and labels."""
    with reporting():
        from anabranch.cli.traces import Settings, pack_traces

        settings = Settings(
            output=output,
            length=length,
            model=model,
            without=tuple(kind.value for kind in without or ()),
            train=train.value,
            shifts=shifts,
            skip_long=skip_long,
            as_json=json,
        )
        pack_traces(traces, settings)


@app.command()
def stats(traces: Traces, json: Json = False) -> None:
    """Tell how parallel runs were: how many forked, how wide and deep, and what their critical path was."""
    with reporting():
        from anabranch.cli.traces import show_stats

        show_stats(traces, as_json=json)


@model_app.callback()
def _model() -> None:
    # A callback makes `get` a command of its own, where typer would fold a lone command into its group.
    pass


@model_app.command("get")
def model_get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model: smollm2.")],
) -> None:
    """Fetch a model that has a name here, and convert it once."""
    with reporting():
        from anabranch.cli.model import get

        get(name)


def main() -> None:
    """Run the command line; ends the process."""
    for stream in (sys.stdout, sys.stderr):
        # Text of any script must reach a terminal of any encoding.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
