"""A plan as a graph for one model: what can be in one, and of what sizes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from anabranch.compiler.emit_fx import GraphOptions, emit
from anabranch.compiler.graph import Call, Expand, Node, walk
from anabranch.compiler.pipeline import Compiled
from anabranch.compiler.regions import TooManyNodes
from anabranch.dsl.diagnostics import Diagnostic, PlanError, Source
from anabranch.dsl.printer import print_plan
from anabranch.runtime.engine import EngineConfig, machine_of
from anabranch.runtime.models import LoadedModel
from anabranch.runtime.plan_ops import attach, host_calls, plan_of
from anabranch.runtime.plan_run import LANE_INTS


def plan_graph(
    compiled: Compiled,
    model: LoadedModel,
    *,
    lanes: int = 64,
    chunk: int = 512,
    pages: int | None = None,
    page_size: int = 16,
    pool_bytes: int = 2 << 30,
    deterministic: bool = True,
    forced: bool = False,
) -> GraphModule:
    """The graph of a plan, which runs as `gm(pack_inputs(inputs))`.

    lanes: branches of a region that run together; chunk: most rows that are prefilled in one step
    pages, page_size: of the KV pools; None takes as many pages as `pool_bytes` holds
    deterministic: the bits of an engine that is `deterministic`; else those of one that is not, within rounding
    forced: tokens can be forced, and the graph gives (result, logits)
    Raises PlanError: `not-in-graph` for what needs the host or the compiler while it runs, `wall-clock` for a deadline,
    `not-deterministic` where this machine's calls do not keep a row's bits.
    """
    _refuse(compiled)
    key = attach(model)
    given = compiled.program.source
    source = Source(given.name, given.text or print_plan(compiled.program))
    decoder = model.decoder
    shape = decoder.config
    if deterministic and decoder.packed:
        decoder.fixed_shapes()
    try:
        found, names, tables = plan_of(key, source, compiled.graph.main)
    except TooManyNodes as error:
        main = compiled.graph.plans[compiled.graph.main]
        raise PlanError(
            Diagnostic("not-in-graph", f"the plan has {error}", main.span, help="call fewer plans from plans"),
            compiled.program.source,
        ) from None
    config = EngineConfig(lanes=lanes, chunk=chunk, pages=pages, page_size=page_size, pool_bytes=pool_bytes)
    machine = machine_of(decoder, config)
    pages = machine.pages
    pool: tuple[int, ...] = (shape.num_layers, shape.num_kv_heads, pages * page_size, shape.head_dim)
    if not decoder.packed:
        pool = (shape.num_layers, pages, shape.num_kv_heads, page_size, shape.head_dim)
    options = GraphOptions(
        model=key, num_logits=decoder.num_logits, end_tokens=tuple(sorted(model.tokenizer.eos_ids)),
        deterministic=deterministic, lanes=lanes, chunk=chunk, pages=pages, page_size=page_size, pool_shape=pool,
        dtype=decoder.dtype, logits_dtype=decoder.dtype if decoder.packed else torch.float32, device=decoder.device,
        lane_ints=LANE_INTS, most_drawn=found.bounds_on(machine).total_tokens,
        forced=forced, source_name=compiled.program.source.name,
    )  # fmt: skip
    return emit(found, names, lambda node: tables[id(node)], options)


def _refuse(compiled: Compiled) -> None:
    """Raises PlanError for what a graph cannot hold."""
    found: list[Diagnostic] = []
    for name, plan in compiled.graph.plans.items():
        for region, place in walk(plan.region):
            node = region.nodes[place]
            reason = _reason(name, node)
            if reason is not None:
                what, help = reason
                found.append(Diagnostic("not-in-graph", what, node.span, help=help))
            for span, function in host_calls(node):
                found.append(
                    Diagnostic(
                        "not-in-graph",
                        f"`{function}` is a function of the host, which a graph does not call",
                        span,
                        help="run the plan with the engine, or give the graph what it would say as an input",
                    )
                )
    if found:
        raise PlanError(found, compiled.program.source)


def _reason(plan: str, node: Node) -> tuple[str, str] | None:
    """Why a statement cannot be in a graph, and what to do."""
    engine = "run the plan with the engine"
    match node:
        case Expand():
            return "`expand` compiles what the model writes while the plan runs, and a graph is whole before", engine
        case Call(plan=called) if called == plan:
            return (
                f"`{plan}` calls itself, and how deep depends on what it reads",
                f"{engine}, or write the levels as plans of their own",
            )
        case _:
            return None
