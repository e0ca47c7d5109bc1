"""The ops of a plan graph: what its nodes call, besides torch's own.

    run      begin  finish
    text     write  assign  split  merge  enter_loop  looping  until
    feeding  unfed  take  step  keep  fed
    drawing  begin_gen  open_lanes  draw  close_lanes
    choices  scoring  take_option  scored
    forks    fork  forking  pending  admit  end  retire  join

All but `step`, `keep` and `draw` are host work on text, or on who is where. `state` is a handle, int64 [1]: what the
threads of the run have read and written stands beside it on the host, as of torch's script objects, and ops that change
that say that they write to it. KV pools and logits are tensors of the graph, and so is what a loop of drawing needs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from anabranch.compiler.expressions import calls_in
from anabranch.compiler.graph import Decode, walk
from anabranch.compiler.pipeline import Compiled, compile_plan, draws, holds_space
from anabranch.compiler.regions import Names, name_parts
from anabranch.compiler.scheduler import Machine
from anabranch.dsl.check_expr import BUILTINS
from anabranch.dsl.diagnostics import Diagnostic, PlanError, Source, Span
from anabranch.dsl.options import show_type
from anabranch.dsl.parse import parse
from anabranch.dsl.spec import Value
from anabranch.dsl.target import Target
from anabranch.dsl.values import EvaluationError, checked
from anabranch.kernels.sample import logprob
from anabranch.kernels.sample_device import draw_or_refuse, sample
from anabranch.runtime.chat import Role
from anabranch.runtime.constrain import Constraints
from anabranch.runtime.engine import RunResult
from anabranch.runtime.events import BranchEnded, BranchStarted, Event, GenEnded, Joined, LogitsRow, Path, RunEnded
from anabranch.runtime.models import LoadedModel
from anabranch.runtime.pages import aligned_zeros
from anabranch.runtime.plan_run import LANE_FLOATS, LANE_INTS, Host, PlanRun
from anabranch.runtime.plan_tables import GenTables, HostPaced, gen_tables

PACKED_DIMS = 4
"""Of the pools of the CPU's own step, [layer, head, slot, dim]; the kernels' are [layer, page, head, slot, dim]."""
MOST_RUNS = 256
"""Runs that are kept open at once: one that an error cut short is let go when so many newer ones have begun."""


@dataclass(slots=True)
class _Attached:
    """A model that graphs know by the name that `attach` gives."""

    model: LoadedModel
    constraints: Constraints
    hosts: dict[bool, Host] = field(default_factory=dict)
    plans: dict[tuple[str, str, str], tuple[Compiled, Names, dict[int, GenTables]]] = field(default_factory=dict)

    def host(self, deterministic: bool) -> Host:
        if deterministic not in self.hosts:
            self.hosts[deterministic] = Host(self.model, self.constraints, deterministic=deterministic)
        return self.hosts[deterministic]

    def plan(self, source: Source, name: str) -> tuple[Compiled, Names, dict[int, GenTables]]:
        """A plan, compiled, with its names and the tables of its gens by the identity of their nodes."""
        key = source.name, source.text, name
        if key not in self.plans:
            start_token = self.model.tokenizer.bos_id is not None
            target = Target(self.model.name, deterministic=True)
            program = parse(source)
            # They may be called where passes have found that nobody comes.
            functions = sorted({function for _, function in host_calls(program)})
            compiled = compile_plan(program, name, functions=functions, target=target, start_token=start_token)
            names = name_parts(compiled.graph)
            self.plans[key] = compiled, names, tables_of(compiled, self.constraints, self.model)
        return self.plans[key]


_MODELS: dict[str, _Attached] = {}
_RUNS: OrderedDict[int, PlanRun] = OrderedDict()
_numbers = itertools.count(1)


def attach(model: LoadedModel) -> str:
    """Make a model known to the graphs that were made for it, loaded ones too; returns the name that they have for it.

    Of one name are models of the same weights, dtype, kind of device, way to attend, and chat template.
    """
    decoder, chat = model.decoder, model.chat
    roles: tuple[Role, ...] = ("user", "system", "assistant")
    pieces = [
        chat.turn(role, [("#", False)], first=first, open=is_open)
        for role in roles
        for first in (False, True)
        for is_open in (False, True)
    ]
    told = (str(decoder.dtype), decoder.device.type, decoder.packed, pieces, chat.open_assistant(first=False))
    key = f"{model.fingerprint}-{hashlib.blake2b(repr(told).encode(), digest_size=4).hexdigest()}"
    known = _MODELS.get(key)
    if known is None or known.model is not model:
        _MODELS[key] = _Attached(model, Constraints(model.tokenizer))
    return key


def plan_of(key: str, source: Source, name: str) -> tuple[Compiled, Names, dict[int, GenTables]]:
    """A plan compiled for the attached model `key`, with the names of its parts and the tables of its gens.

    Raises PlanError, and TooManyNodes.
    """
    return _MODELS[key].plan(source, name)


def host_calls(part: object) -> list[tuple[Span, str]]:
    """The calls of host functions in a node's expressions, those of its regions left out, or in a whole program."""
    return [(call.span, call.function) for call in calls_in(part) if call.function not in (*BUILTINS, "ids")]


def tables_of(compiled: Compiled, constraints: Constraints, model: LoadedModel) -> dict[int, GenTables]:
    """The tables of every gen that draws, by the identity of its node.

    Raises PlanError `not-in-graph` for a type whose tokens only the host can tell.
    """
    found: dict[int, GenTables] = {}
    wrong: list[Diagnostic] = []
    for plan in compiled.graph.plans.values():
        for region, place in walk(plan.region):
            node = region.nodes[place]
            if isinstance(node, Decode) and draws(node):
                held, vocab = holds_space(region, place), model.decoder.num_logits
                try:
                    found[id(node)] = gen_tables(node.spec, constraints, held, vocab)
                except HostPaced as error:
                    wrong.append(
                        Diagnostic(
                            "not-in-graph",
                            f"`{show_type(node.spec.type)}` is paced by the host, and a graph cannot hold it: {error}",
                            node.span,
                            help="run the plan with the engine, or take a regular type (`int`, `choice`, `lines` ...)",
                        )
                    )
    if wrong:
        raise PlanError(wrong, compiled.program.source)
    return found


def state_op(name: str, *, writes: Sequence[str] = ("state",)) -> Callable[[Callable[..., Any]], Any]:
    """Register `anabranch::name`, which writes to what `writes` names. A run that breaks in it is let go."""

    def register(fn: Callable[..., Any]) -> Any:
        takes_state = next(iter(signature(fn).parameters)) == "state"

        @wraps(fn)
        def guarded(*args: Any, **options: Any) -> Any:
            try:
                return fn(*args, **options)
            except BaseException:
                if takes_state:
                    _RUNS.pop(int(args[0]), None)
                raise

        return torch.library.custom_op(f"anabranch::{name}", mutates_args=tuple(writes))(guarded)

    return register


def fake_of(op: Any) -> Callable[[Callable[..., Any]], Any]:
    """Register what `op` gives, but for its content."""
    register: Callable[[Callable[..., Any]], Any] = op.register_fake
    return register


# The run.


@state_op("begin", writes=())
def begin(
    plan: Tensor, inputs: Tensor, model: str, deterministic: bool, pages: int, page_size: int, logit_rows: int
) -> Tensor:
    """A run begins; returns its handle.

    plan: uint8, JSON: {file, source, name, forced}; inputs: uint8, as `pack_inputs` gives them
    """
    attached = _MODELS.get(model)
    if attached is None:
        raise ValueError(f"no model {model} is attached: call `attach(anabranch.load(...))` with that model first")
    told, given = _json(plan), _given(inputs)
    host = attached.host(deterministic)
    compiled, names, tables = attached.plan(Source(told["file"], told["source"]), told["name"])
    compiled.check_inputs(given["inputs"], host.sizes)
    machine = Machine(host.config.lanes, pages, page_size, host.config.chunk)
    bounds = compiled.bounds_on(machine, host.sizes, given["inputs"])
    past = bounds.first_past(host.max_context)
    if past is not None:
        compiled.check_bounds(bounds, machine, host.max_context)
    forced = {tuple(path): ids for path, ids in given["forced"]}
    if forced and not told["forced"]:
        raise ValueError("tokens are forced on a graph that was made without `forced=True`")
    vocab = host.model.decoder.num_logits
    if wrong := [token for ids in forced.values() for token in ids if not 0 <= token < vocab]:
        raise ValueError(f"the forced token {wrong[0]} is outside the vocabulary of {vocab}")
    run = PlanRun(
        host, compiled, names, lambda node: tables[id(node)], bounds, given["inputs"], seed=given["seed"],
        input_index=given["input_index"], forced=forced, pages=pages, page_size=page_size,
        logit_rows=logit_rows,
    )  # fmt: skip
    number = next(_numbers)
    _RUNS[number] = run
    while len(_RUNS) > MOST_RUNS:
        _RUNS.popitem(last=False)
    return torch.tensor([number], dtype=torch.int64)


@fake_of(begin)
def _(
    plan: Tensor, inputs: Tensor, model: str, deterministic: bool, pages: int, page_size: int, logit_rows: int
) -> Tensor:
    return torch.empty(1, dtype=torch.int64)


@state_op("finish")
def finish(state: Tensor) -> Tensor:
    """The run's events as JSON, uint8 [num_bytes]; the run is let go. `read_result` reads it."""
    run = _run(state)
    run.finish()
    del _RUNS[int(state)]
    events = [{"is": type(event).__name__} | asdict(event) for event in run.run.events]
    return _bytes({"events": events, "traced": run.traced})


finish.register_fake(lambda state: torch.empty(_size(), dtype=torch.uint8))


@state_op("allocate", writes=())
def allocate(shape: Sequence[int], dtype: str, device: str) -> Tensor:
    """Zeros, which on a CPU the system hands out page by page as they are first written."""
    kind: torch.dtype = getattr(torch, dtype)
    if device != "cpu" or kind not in (torch.float32, torch.float64):
        return torch.zeros(tuple(shape), dtype=kind, device=device)
    return aligned_zeros(tuple(shape), kind)


allocate.register_fake(lambda shape, dtype, device: torch.empty(shape, dtype=getattr(torch, dtype), device=device))


# Text.


def _on_node(name: str) -> Any:
    """Register `anabranch::name(state, node)`, a method of `PlanRun` without an answer."""

    @state_op(name)
    def op(state: Tensor, node: str) -> None:
        getattr(_run(state), name)(node)

    op.register_fake(lambda state, node: None)
    return op


write, assign, merge, enter_loop, until, join, end, retire = map(
    _on_node, ("write", "assign", "merge", "enter_loop", "until", "join", "end", "retire")
)


def _begins(name: str) -> Any:
    """Register `anabranch::name(state, node)`: everybody in the region comes to a statement that has to wait."""

    @state_op(name)
    def op(state: Tensor, node: str) -> None:
        _run(state).begin(node)

    op.register_fake(lambda state, node: None)
    return op


begin_gen, fork = map(_begins, ("begin_gen", "fork"))


def _asks(name: str) -> Any:
    """Register `anabranch::name(state, node) -> bool []`, a question to `PlanRun`."""

    @state_op(name, writes=())
    def op(state: Tensor, node: str) -> Tensor:
        return torch.tensor(getattr(_run(state), name)(node))

    op.register_fake(lambda state, node: torch.empty((), dtype=torch.bool))
    return op


looping, unfed, scoring, forking, pending = map(_asks, ("looping", "unfed", "scoring", "forking", "pending"))


@state_op("split")
def split(state: Tensor, node: str) -> tuple[Tensor, Tensor]:
    """`if`: whether anybody goes to the first arm, and to the second; bool [] each"""
    first, second = _run(state).split(node)
    return torch.tensor(first), torch.tensor(second)


split.register_fake(lambda state, node: (torch.empty((), dtype=torch.bool), torch.empty((), dtype=torch.bool)))


@state_op("admit")
def admit(state: Tensor, region: str, lanes: int) -> None:
    """The next branches of a region begin, at most `lanes` together."""
    _run(state).admit(region, lanes)


admit.register_fake(lambda state, region, lanes: None)


@state_op("after")
def after(state: Tensor, done: Tensor) -> None:
    """What gave `done` is over. A loop whose body only writes to what it is given has no other reader, and torch drops
    what nobody reads."""


after.register_fake(lambda state, done: None)


# Feeding.


@state_op("take")
def take(state: Tensor, node: str, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows to feed, at most `chunk`: blocks int64 [num_blocks, 3], token ids [num_rows], wanted rows [num_wanted], and
    the rows of the table that their logits go to [num_wanted]."""
    blocks, tokens, wanted, into = _run(state).take(node, chunk)
    return _ints(blocks, 3), _ints(tokens), _ints(wanted), _ints(into)


@fake_of(take)
def _(state: Tensor, node: str, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    blocks, rows, wanted = _size(), _size(), _size()
    return _fake(blocks, 3), _fake(rows), _fake(wanted), _fake(wanted)


@state_op("step", writes=("k", "v"))
def step(
    state: Tensor, blocks: Tensor, token_ids: Tensor, wanted: Tensor, k: Tensor, v: Tensor, num_logits: int
) -> Tensor:
    """One call of the model.

    blocks: int64 [num_blocks, 3]: a thread, the place of the first token in its segment, and how many
    token_ids: int64 [num_rows]; wanted: int64 [num_wanted], the rows whose logits are wanted
    k, v: every layer's pool, which the rows are written to; as `KvStore` or `PagedStore` have them, stacked
    Returns logits [num_wanted, num_logits]: of the pools' dtype by the CPU's own step, else fp32.
    """
    run = _run(state)
    return run.step(run.blocks(blocks.tolist()), token_ids, wanted, k, v)


@fake_of(step)
def _(
    state: Tensor, blocks: Tensor, token_ids: Tensor, wanted: Tensor, k: Tensor, v: Tensor, num_logits: int
) -> Tensor:
    return k.new_empty(wanted.shape[0], num_logits, dtype=k.dtype if k.dim() == PACKED_DIMS else torch.float32)


@state_op("keep", writes=("table",))
def keep(table: Tensor, into: Tensor, logits: Tensor) -> None:
    """table[into] = logits. table: [num_rows, num_logits]; into: int64 [n]; logits: [n, num_logits]"""
    table.index_copy_(0, into.to(table.device), logits.to(table.dtype))


keep.register_fake(lambda table, into, logits: None)


@state_op("fed")
def fed(state: Tensor) -> None:
    """What `take` gave is fed: threads that waited for it go on."""
    _run(state).fed()


fed.register_fake(lambda state: None)


# Drawing.


@state_op("open_lanes")
def open_lanes(
    state: Tensor, node: str, num_logits: int, most: int, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The threads that draw at a gen, a row each, with KV slots for all that they may draw.

    Returns ints int64 [n, len(LANE_INTS)], floats fp32 [n, len(LANE_FLOATS)], seen int32 [n, ceil(vocab/32)] (bits of
    the tokens that penalties apply to), forced int64 [n, max] (tokens to take, -1 to draw).
    """
    lanes = _run(state).open_lanes(node)
    return lanes.ints.to(device), lanes.floats.to(device), lanes.seen.to(device), lanes.forced.to(device)


@fake_of(open_lanes)
def _(state: Tensor, node: str, num_logits: int, most: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, words = _size(), -(-num_logits // 32)
    return (
        torch.empty(n, len(LANE_INTS), dtype=torch.int64, device=device),
        torch.empty(n, len(LANE_FLOATS), dtype=torch.float32, device=device),
        torch.empty(n, words, dtype=torch.int32, device=device),
        torch.empty(n, most, dtype=torch.int64, device=device),
    )


@state_op("close_lanes")
def close_lanes(state: Tensor, node: str, tokens: Tensor, logprobs: Tensor) -> None:
    """What the lanes drew, [n, max] each; the values of the gens are read from it."""
    _run(state).close_lanes(node, tokens.tolist(), logprobs.tolist())


close_lanes.register_fake(lambda state, node, tokens, logprobs: None)


@state_op("pack_trace", writes=("state", "trace"))
def pack_trace(state: Tensor, trace: Tensor) -> None:
    """The rows of logits that the last lanes were drawn from are put side by side."""
    _run(state).pack_trace(trace)


pack_trace.register_fake(lambda state, trace: None)


@torch.library.custom_op("anabranch::draw", mutates_args=())
def draw(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor, index: Tensor,
    mask: Tensor | None, seen: Tensor | None, repetition: Tensor | None, presence: Tensor | None, wants_logprobs: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sample` of `kernels/sample_device.py`, by the host's own draw on a CPU; arguments are the same.

    logits: [n, vocab] of any dtype; wants_logprobs: else the log-probabilities are 0 on a CPU, where they cost time
    """
    logits = logits.float()
    if not len(logits):
        return logits.new_empty(0, dtype=torch.int64), logits.new_empty(0)
    if logits.device.type != "cpu":
        drawn: tuple[Tensor, Tensor] = sample(
            logits, temperature, top_k, top_p, min_p, keys, index, mask, seen, repetition, presence
        )
        return drawn
    tokens = draw_or_refuse(logits, temperature, top_k, top_p, min_p, keys, index, mask, seen, repetition, presence)
    logs = logprob(logits, tokens.clamp(min=0)) if wants_logprobs else torch.zeros(len(logits), dtype=torch.float32)
    return tokens, logs


@fake_of(draw)
def _(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor, index: Tensor,
    mask: Tensor | None, seen: Tensor | None, repetition: Tensor | None, presence: Tensor | None, wants_logprobs: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n = logits.shape[0]
    return logits.new_empty(n, dtype=torch.int64), logits.new_empty(n, dtype=torch.float32)


# Choices that are scored.


@state_op("take_option")
def take_option(state: Tensor, node: str) -> tuple[Tensor, Tensor, Tensor]:
    """The next option of each thread that scores: blocks and token ids as of `take`, and the row of the table that
    holds the logits before each block, int64 [num_blocks]."""
    blocks, tokens, before = _run(state).take_option(node)
    return _ints(blocks, 3), _ints(tokens), _ints(before)


@fake_of(take_option)
def _(state: Tensor, node: str) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _size()
    return _fake(blocks, 3), _fake(_size()), _fake(blocks)


@state_op("scored")
def scored(state: Tensor, node: str, before: Tensor, table: Tensor, logits: Tensor) -> None:
    """The options were fed. before: as `take_option` gave; table: of logits; logits: of every row of the options"""
    _run(state).scored(node, before.tolist(), table, logits)


scored.register_fake(lambda state, node, before, table, logits: None)


# What goes in and comes out.


def pack_inputs(
    inputs: Mapping[str, Value],
    *,
    seed: int = 0,
    input_index: int = 0,
    forced: Mapping[Path, Sequence[int]] | None = None,
) -> Tensor:
    """What a plan graph is called with, uint8 [num_bytes].

    inputs, seed, input_index: as of `Engine.run`
    forced: tokens that threads, by their paths, take instead of drawing; of a graph that was made to be forced
    Raises ValueError for what is no value of the language.
    """
    try:
        values = {name: checked(value, f"the input `{name}`") for name, value in inputs.items()}
    except EvaluationError as error:
        raise ValueError(error.reason) from None
    document = {
        "inputs": values, "seed": seed, "input_index": input_index,
        "forced": [[list(path), list(ids)] for path, ids in (forced or {}).items()],
    }  # fmt: skip
    return _bytes(document)


def read_result(result: Tensor, trace: Tensor | None = None) -> RunResult:
    """What a plan graph gave, as the engine gives it.

    result: uint8 [num_bytes]; trace: the logits that tokens were drawn from, of a graph that keeps them
    """
    document = _json(result)
    rows = [] if trace is None else document["traced"]
    logits = [LogitsRow(tuple(path), index, trace[row], token) for path, index, token, row in rows]  # type: ignore[index]
    return RunResult.of([_event(told) for told in document["events"]], logits)


_EVENTS: Mapping[str, type[Any]] = {
    kind.__name__: kind for kind in (BranchEnded, BranchStarted, GenEnded, Joined, RunEnded)
}
_TUPLES = ("path", "ids", "ok", "winners", "logprobs")


def _event(told: Mapping[str, Any]) -> Event:
    fields = {name: tuple(value) if name in _TUPLES else value for name, value in told.items() if name != "is"}
    event: Event = _EVENTS[told["is"]](**fields)
    return event


def _run(state: Tensor) -> PlanRun:
    run = _RUNS.get(int(state))
    if run is None:
        raise ValueError("the run of this state is over, or was let go")
    return run


def _bytes(document: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(document).encode("utf-8", "surrogatepass")), dtype=torch.uint8)


def _json(data: Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes().decode("utf-8", "surrogatepass"))


def _given(inputs: Tensor) -> Mapping[str, Any]:
    """What `pack_inputs` packed. Raises ValueError for anything else."""
    try:
        given = _json(inputs) if inputs.dtype == torch.uint8 else None
    except ValueError:
        given = None
    if not isinstance(given, dict) or given.keys() != {"inputs", "seed", "input_index", "forced"}:
        raise ValueError("a plan graph is called with what `pack_inputs` gives")
    return given


def _ints(values: Sequence[Any], columns: int | None = None) -> Tensor:
    found = torch.tensor(values, dtype=torch.int64)
    return found if columns is None else found.view(-1, columns)


def _fake(*shape: Any) -> Tensor:
    return torch.empty(shape, dtype=torch.int64)


def _size() -> Any:
    """A length that only the run knows."""
    return torch.library.get_ctx().new_dynamic_size()
