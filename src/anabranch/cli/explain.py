"""`anabranch explain`: what a plan may cost at most, before it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import typer

from anabranch.cli.inputs import read_some
from anabranch.cli.sources import chosen_plan, host_functions, read_program
from anabranch.cli.text import printable, write_json
from anabranch.compiler.cost import ModelShape
from anabranch.compiler.explain import explain
from anabranch.compiler.pipeline import compile_plan
from anabranch.compiler.scheduler import Machine

if TYPE_CHECKING:
    from anabranch.runtime.config import ModelConfig
    from anabranch.runtime.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of `explain`, as they were given."""

    plan: str | None
    inputs: tuple[str, ...]
    lanes: int
    pages: int | None
    page_size: int
    chunk: int
    model: str | None
    baseline: int | None
    functions: str | None
    as_json: bool


def explain_file(file: str, settings: Settings) -> None:
    """Print the worst case of a plan of `file`.

    Inputs may be left out: those count as what their bounds state. Raises PlanError if the plan, its inputs or the
    model are wrong, and `pool-too-small` or `context-too-long` where it could never run there.
    """
    program = read_program(file)
    chosen = chosen_plan(program, settings.plan)
    functions = host_functions(settings.functions)
    given = read_some(chosen, settings.inputs)
    if settings.model is None:
        compiled = compile_plan(program, chosen.name, functions=functions.keys())
        # Without a model nothing says how many pages its memory holds; the machine's own default stands.
        machine = Machine(settings.lanes, settings.pages or Machine().pages, settings.page_size, settings.chunk)
        bounds = compiled.bounds_on(machine, inputs=given)
        compiled.check_bounds(bounds, machine)
        found = explain(compiled, machine, inputs=given, baseline_tokens=settings.baseline)
    else:
        engine = _engine(settings.model, settings)
        compiled = engine.compile(program, chosen.name, tuple(functions))
        machine, sizes = engine.machine, engine.sizes
        compiled.check_values(given, sizes)
        bounds = compiled.bounds_on(machine, sizes, given)
        compiled.check_bounds(bounds, machine, engine.max_context)
        decoder = engine.model.decoder
        shape = model_shape(decoder.config, decoder.dtype.itemsize)
        found = explain(compiled, machine, sizes=sizes, inputs=given, baseline_tokens=settings.baseline, model=shape)
    for warning in compiled.warnings:
        typer.echo(printable(warning.render(program.source)), err=True)
    if settings.as_json:
        write_json(asdict(found))
    else:
        typer.echo(printable(found.text()))


def model_shape(config: ModelConfig, itemsize: int) -> ModelShape:
    """A decoder as the cost model sees it; `itemsize`: bytes of one weight, and of one number in the KV cache.

    Counted are the weights that each call reads and multiplies with: an embedding table that is not the LM head as
    well is left out, of which a call reads a row for each token.
    """
    hidden, head_dim = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    qkv = (q_size + 2 * kv_size) * (hidden + config.qkv_bias) + 2 * head_dim * config.qk_norm
    output = hidden * (q_size + config.output_bias)
    mlp = 3 * hidden * config.intermediate_size + (2 * config.intermediate_size + hidden) * config.mlp_bias
    norms = 2 * hidden
    num_parameters = config.num_layers * (qkv + output + mlp + norms) + hidden + config.vocab_size * hidden
    return ModelShape(num_parameters, num_parameters * itemsize, 2 * config.num_layers * kv_size * itemsize)


def _engine(model: str, settings: Settings) -> Engine:
    from anabranch.runtime.engine import Engine, EngineConfig
    from anabranch.runtime.models import load

    config = EngineConfig(
        lanes=settings.lanes, pages=settings.pages, page_size=settings.page_size, chunk=settings.chunk
    )
    return Engine(load(model), config)
