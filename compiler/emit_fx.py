"""A plan as a `torch.fx.GraphModule`: its statements as ops over KV pools, its control flow as torch's own.

All threads of a region run together. A fork makes the branches of its region, which begin `lanes` at a time; each
statement of the region is then one node for all of them. What a plan decides, torch decides:

    if      cond, for each arm that somebody goes to
    loop    while_loop, until everybody is done
    fork    while_loop over its branches, `lanes` at a time; of a `reduce`, inside one over its levels
    prefill while_loop over chunks of rows
    gen     while_loop over tokens: a step of the model, the mask of the type's automaton, the draw, the stop test

Nodes have the names of the statements that they come from, and say where those stand. The ops are described in
`runtime/plan_ops.py`.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from anabranch.compiler.graph import Call, Cond, Decode, Fork, Let, Loop, Map, Need, Node, Reduce, Return, Write
from anabranch.compiler.pipeline import Compiled, draws
from anabranch.compiler.regions import Names
from anabranch.dsl.spec import ChoiceType


class Automaton(Protocol):
    """As `TypeTables` of `runtime/plan_tables.py`."""

    @property
    def next_state(self) -> Tensor: ...
    @property
    def distance(self) -> Tensor: ...
    @property
    def accepting(self) -> Tensor: ...
    @property
    def final(self) -> Tensor: ...


class Stops(Protocol):
    """As `StopTables`."""

    @property
    def next_state(self) -> Tensor: ...
    @property
    def hit(self) -> Tensor: ...


class Tables(Protocol):
    """As `GenTables`."""

    @property
    def typed(self) -> Automaton | None: ...
    @property
    def stops(self) -> Stops | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphOptions:
    """What a graph is made for.

    model: the name that its ops know the model by; num_logits: tokens that may be drawn; end_tokens: those that
        end a turn
    deterministic: whether the model's steps are made of calls of fixed sizes
    lanes: branches of a region that run together; chunk: most rows that are prefilled in one step
    pages, page_size: of the KV pools; pool_shape: of the keys of all layers, and of the values
    dtype: of the pools; logits_dtype: of logits; device: of both
    lane_ints: names of the columns that `open_lanes` gives
    most_drawn: tokens that a run may draw
    forced: whether tokens can be forced, and the logits come out
    source_name: of the plan's file, to show
    """

    model: str
    num_logits: int
    end_tokens: tuple[int, ...]
    deterministic: bool
    lanes: int
    chunk: int
    pages: int
    page_size: int
    pool_shape: tuple[int, ...]
    dtype: torch.dtype
    logits_dtype: torch.dtype
    device: torch.device
    lane_ints: tuple[str, ...]
    most_drawn: int
    forced: bool
    source_name: str


def emit(compiled: Compiled, names: Names, tables: Callable[[Decode], Tables], options: GraphOptions) -> fx.GraphModule:
    """The graph of a plan, called as `gm(inputs)`: inputs and result are uint8, as `pack_inputs` and `read_result` of
    `runtime/plan_ops.py` have them; with `options.forced` the result is (result, logits)."""
    return _Emitter(compiled, names, tables, options).emit()


class _Scope:
    """A graph that is being written: the plan's, or that of a body. What it needs from outside is passed in to it."""

    def __init__(self, outer: _Scope | None, carried: Sequence[str] = ()) -> None:
        self.outer = outer
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.trace: str | None = None if outer is None else outer.trace
        self.carried = [self.graph.placeholder(name) for name in carried]
        self.own: dict[str, fx.Node] = {}  # what others may ask for, made here
        self.captured: dict[str, fx.Node] = {}  # what was asked for, made outside

    def get(self, name: str) -> fx.Node:
        """A value by its name, here."""
        found = self.own.get(name) or self.captured.get(name)
        if found is None:
            if self.outer is None:
                raise KeyError(name)
            self.outer.get(name)
            first = next(iter(self.graph.nodes), None)
            with self.graph.inserting_before(first):
                found = self.captured[name] = self.graph.placeholder(name)
        return found

    def call(self, target: Any, *args: Any, name: str = "", **kwargs: Any) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name=name or None)
        if self.trace is not None:
            node.meta["stack_trace"] = self.trace
        return node

    def op(self, op: str, *args: Any, name: str = "") -> fx.Node:
        """One of this project's ops."""
        return self.call(getattr(torch.ops.anabranch, op).default, *args, name=name or op)

    def aten(self, op: str, *args: Any, name: str = "", **kwargs: Any) -> fx.Node:
        packet, _, overload = op.partition(".")
        return self.call(getattr(getattr(torch.ops.aten, packet), overload or "default"), *args, name=name, **kwargs)

    def part(self, of: fx.Node, index: int, name: str) -> fx.Node:
        return self.call(operator.getitem, of, index, name=name)

    def buffer(self, name: str, value: Tensor) -> None:
        """A tensor that the graph holds; in the plan's own scope."""
        scope = self
        while scope.outer is not None:
            scope = scope.outer
        if name not in scope.own:
            scope.root.register_buffer(name, value)
            first = next((node for node in scope.graph.nodes if node.op not in ("placeholder", "get_attr")), None)
            with scope.graph.inserting_before(first):
                scope.own[name] = scope.graph.get_attr(name)

    def module(self, name: str, module: nn.Module) -> str:
        """Hold a submodule under `name`, or one like it; returns the name."""
        free, number = name, 0
        while hasattr(self.root, free):
            if getattr(self.root, free) is module:
                return free
            number += 1
            free = f"{name}_{number}"
        setattr(self.root, free, module)
        return free

    def hold(self, name: str, module: nn.Module) -> fx.Node:
        """A submodule as an operand."""
        node = self.graph.get_attr(self.module(name, module))
        if self.trace is not None:
            node.meta["stack_trace"] = self.trace
        return node

    def finish(self, outputs: fx.Node | Sequence[fx.Node], captured: Sequence[str]) -> fx.GraphModule:
        """The body as a module, which takes what is carried and then `captured`, in that order."""
        nodes = [self.get(name) for name in captured]
        last: fx.Node | None = None
        for node in (*self.carried, *nodes):
            if last is None:
                first = next(iter(self.graph.nodes))
                if first is not node:
                    first.prepend(node)
            else:
                last.append(node)
            last = node
        self.graph.output(outputs if isinstance(outputs, fx.Node) else tuple(outputs))
        return fx.GraphModule(self.root, self.graph, "GraphModule")


@dataclass(frozen=True, slots=True)
class _Draw:
    """The graph of a draw. captured: names of what it takes after what is carried"""

    module: fx.GraphModule
    captured: Sequence[str]


class _Emitter:
    def __init__(
        self, compiled: Compiled, names: Names, tables: Callable[[Decode], Tables], options: GraphOptions
    ) -> None:
        self._compiled = compiled
        self._names = names
        self._tables = tables
        self._options = options
        self._main = next(iter(names.regions))
        self._bases: dict[str, str] = {}
        # `self` is what generated code calls the module.
        taken = {"self"}
        for name in names.nodes:
            plain = base = self._readable(name)
            number = 0
            while base in taken:
                number += 1
                base = f"{plain}_{number}"
            taken.add(base)
            self._bases[name] = base

    def emit(self) -> fx.GraphModule:
        options = self._options
        scope = _Scope(None)
        inputs = scope.graph.placeholder("inputs")
        program = self._compiled.program
        told = json.dumps(
            {
                "file": options.source_name,
                "source": program.source.text,
                "name": self._compiled.graph.main,
                "forced": options.forced,
            }
        )
        scope.buffer("plan", torch.frombuffer(bytearray(told.encode("utf-8", "surrogatepass")), dtype=torch.uint8))
        scope.buffer("end_tokens", torch.tensor(options.end_tokens, dtype=torch.int64, device=options.device))
        rows, traced = self._sizes()
        scope.own["state"] = scope.op(
            "begin", scope.get("plan"), inputs, options.model, options.deterministic, options.pages,
            options.page_size, rows, name="state",
        )  # fmt: skip
        dtype, logits = (str(kind).removeprefix("torch.") for kind in (options.dtype, options.logits_dtype))
        device = str(options.device)
        for name, shape, kind in (
            ("k_pool", options.pool_shape, dtype),
            ("v_pool", options.pool_shape, dtype),
            ("logits", (rows, options.num_logits), logits),
            *((("trace", (traced, options.num_logits), logits),) if options.forced else ()),
        ):
            scope.own[name] = scope.op("allocate", list(shape), kind, device, name=name)
        self._region(scope, self._main)
        scope.op("retire", scope.get("state"), self._main)
        result = scope.op("finish", scope.get("state"), name="result")
        scope.graph.output((result, scope.get("trace")) if options.forced else result)
        module = fx.GraphModule(scope.root, scope.graph, "PlanGraph")
        module.graph.lint()
        return module

    # Statements.

    def _region(self, scope: _Scope, region: str) -> None:
        for name in self._names.regions[region].nodes:
            outer = scope.trace
            scope.trace = self._where(name)
            self._node(scope, name, self._names.nodes[name].node)
            scope.trace = outer

    def _node(self, scope: _Scope, name: str, node: Node) -> None:
        state, base = scope.get("state"), self._base(name)
        match node:
            case Write():
                scope.op("write", state, name, name=base)
            case Let() | Need() | Return():
                scope.op("assign", state, name, name=base)
            case Cond():
                self._cond(scope, name, base)
            case Loop():
                [body] = self._names.nodes[name].inside
                scope.op("enter_loop", state, name, name=base)

                def round_of(inner: _Scope) -> None:
                    self._region(inner, body)
                    inner.op("until", inner.get("state"), name)

                self._while(scope, base, "looping", name, round_of)
            case Decode():
                scope.op("begin_gen", state, name, name=base)
                if node.spec.recorded is None:
                    self._prefill(scope, base, name)
                    if draws(node):
                        self._decode(scope, name, node, base)
                    elif isinstance(node.spec.type, ChoiceType):
                        self._while(scope, f"{base}_options", "scoring", name, partial(self._score, name))
            case Fork() | Map() | Call():
                scope.op("fork", state, name, name=base)
                self._prefill(scope, base, name)
                self._branches(scope, name, node, base)
            case Reduce():
                scope.op("fork", state, name, name=base)
                self._prefill(scope, base, name)
                self._while(scope, f"{base}_levels", "forking", name, lambda s: self._branches(s, name, node, base))
            case _:
                raise TypeError(f"{type(node).__name__} has no place in a graph")

    def _cond(self, scope: _Scope, name: str, base: str) -> None:
        both = scope.op("split", scope.get("state"), name, name=base)
        for place, (arm, region) in enumerate(zip(("then", "else"), self._names.nodes[name].inside, strict=False)):
            taken = scope.part(both, place, f"{base}_{arm}_taken")
            inner, skipped = _Scope(scope), _Scope(scope)
            inner.trace = scope.trace
            self._region(inner, region)
            done = [inner.aten("full", [], True, dtype=torch.bool)]
            captured = [*inner.captured]
            modules = [inner.finish(done, captured)]
            modules.append(skipped.finish([skipped.aten("full", [], False, dtype=torch.bool)], captured))
            held = [
                scope.hold(f"{base}_{arm}{part}", module)
                for part, module in zip(("", "_skipped"), modules, strict=True)
            ]
            operands = tuple(scope.get(captured_name) for captured_name in captured)
            ran = scope.call(torch.ops.higher_order.cond, taken, *held, operands, name=f"{base}_{arm}")
            scope.op("after", scope.get("state"), scope.part(ran, 0, f"{base}_{arm}_ran"))
        scope.op("merge", scope.get("state"), name, name=f"{base}_merged")

    def _while(self, scope: _Scope, base: str, question: str, name: str, body: Callable[[_Scope], object]) -> None:
        """`while question(state, name): body`, with a count of the rounds."""
        ask, inner = _Scope(scope, ("rounds",)), _Scope(scope, ("rounds",))
        go_on = ask.op(question, ask.get("state"), name)
        body(inner)
        rounds = inner.aten("add.Scalar", inner.carried[0], 1, name="next_round")
        captured = list(dict.fromkeys((*ask.captured, *inner.captured)))
        ask_module, body_module = ask.finish(go_on, captured), inner.finish([rounds], captured)
        held = [scope.hold(f"{base}_{part}", module) for part, module in (("cond", ask_module), ("body", body_module))]
        zero = scope.aten("full", [], 0, dtype=torch.int64, name=f"{base}_rounds")
        operands = tuple(scope.get(captured_name) for captured_name in captured)
        looped = scope.call(torch.ops.higher_order.while_loop, *held, (zero,), operands, name=f"{base}_loop")
        scope.op("after", scope.get("state"), scope.part(looped, 0, f"{base}_counted"))

    def _prefill(self, scope: _Scope, base: str, name: str) -> None:
        def chunk(inner: _Scope) -> None:
            state = inner.get("state")
            taken = inner.op("take", state, name, self._options.chunk, name="taken")
            blocks, tokens, wanted, into = (
                inner.part(taken, place, part) for place, part in enumerate(("blocks", "token_ids", "wanted", "into"))
            )
            logits = self._step(inner, blocks, tokens, wanted)
            inner.op("keep", inner.get("logits"), into, logits)
            inner.op("fed", state)

        self._while(scope, f"{base}_prefill", "unfed", name, chunk)

    def _step(self, scope: _Scope, blocks: fx.Node, tokens: fx.Node, wanted: fx.Node) -> fx.Node:
        pools = scope.get("k_pool"), scope.get("v_pool")
        return scope.op(
            "step", scope.get("state"), blocks, tokens, wanted, *pools, self._options.num_logits, name="step"
        )

    def _score(self, name: str, scope: _Scope) -> None:
        state = scope.get("state")
        taken = scope.op("take_option", state, name, name="option")
        blocks, tokens, before = (
            scope.part(taken, place, part) for place, part in enumerate(("blocks", "token_ids", "before"))
        )
        wanted = scope.aten("arange", scope.aten("sym_size.int", tokens, 0), name="wanted")
        logits = self._step(scope, blocks, tokens, wanted)
        scope.op("scored", state, name, before, scope.get("logits"), logits)

    def _branches(self, scope: _Scope, name: str, node: Fork | Map | Call | Reduce, base: str) -> None:
        stitches = self._stitches(node)
        for region in self._names.nodes[name].inside:
            branch = self._base(region)

            def run(inner: _Scope, region: str = region, branch: str = branch) -> None:
                state = inner.get("state")
                inner.op("admit", state, region, self._options.lanes)
                self._region(inner, region)
                if stitches:
                    inner.op("end", state, region)
                    self._prefill(inner, f"{branch}_end", region)
                inner.op("retire", state, region)

            self._while(scope, f"{branch}_branches", "pending", region, run)
        scope.op("join", scope.get("state"), name, name=f"{base}_join")
        if stitches or isinstance(node, Reduce):
            self._prefill(scope, f"{base}_join", name)

    # Drawing.

    def _decode(self, scope: _Scope, name: str, node: Decode, base: str) -> None:
        options, most = self._options, node.spec.max_tokens
        tables = self._tables(node)
        where = str(options.device)
        opened = scope.op("open_lanes", scope.get("state"), name, options.num_logits, most, where, name=f"{base}_lanes")
        ints, floats, seen, forced = (
            scope.part(opened, place, f"{base}_{part}")
            for place, part in enumerate(("ints", "floats", "seen", "forced"))
        )
        scope.own |= {f"{base}_ints": ints, f"{base}_floats": floats, f"{base}_forced": forced}
        draw = self._draw(scope, node, base, tables)
        column = partial(self._column, scope, ints)
        carried = {
            "active": scope.aten("gt.Scalar", column("left"), 0, name=f"{base}_active"),
            "tokens": scope.aten("full_like", forced, -1, name=f"{base}_tokens"),
            "logprobs": scope.aten("full_like", forced, 0, dtype=torch.float32, name=f"{base}_logprobs"),
            "type_state": column("state", name=f"{base}_type_state"),
            "stop_state": column("stop_state", name=f"{base}_stop_state"),
            "seen": seen,
        }
        # How many were drawn before.
        count = scope.aten("full", [], 0, dtype=torch.int64, device=options.device, name=f"{base}_count")
        first = self._drawn(scope, draw, base, count, column("logits"), carried)
        names = ("count", *carried)
        ask, body = _Scope(scope, names), _Scope(scope, names)
        go_on = ask.aten("any", ask.carried[1])
        outputs = self._next_token(body, draw, base, dict(zip(names, body.carried, strict=True)))
        captured = list(dict.fromkeys((*ask.captured, *body.captured)))
        held = [
            scope.hold(f"{base}_decode_{part}", module)
            for part, module in (
                ("cond", ask.finish(go_on, captured)),
                ("body", body.finish(outputs, captured)),
            )
        ]
        operands = tuple(scope.get(captured_name) for captured_name in captured)
        drawn = scope.call(torch.ops.higher_order.while_loop, *held, (count, *first), operands, name=f"{base}_decode")
        tokens, logprobs = scope.part(drawn, 2, f"{base}_drawn"), scope.part(drawn, 3, f"{base}_scores")
        scope.op("close_lanes", scope.get("state"), name, tokens, logprobs, name=f"{base}_value")
        if options.forced:
            scope.op("pack_trace", scope.get("state"), scope.get("trace"))

    def _next_token(self, scope: _Scope, draw: _Draw, base: str, carried: dict[str, fx.Node]) -> list[fx.Node]:
        """One round: feed the lanes that go on, and draw their next tokens."""
        ints = scope.get(f"{base}_ints")
        column = partial(self._column, scope, ints)
        count = carried.pop("count")
        lanes = self._lanes(scope, carried["active"])
        length = self._pick(scope, column("length"), lanes, name="length")
        place = scope.aten("add.Tensor", length, count, name="place")
        threads = self._pick(scope, column("thread"), lanes, name="threads")
        ones = scope.aten("full_like", place, 1)
        blocks = scope.aten("stack", [threads, place, ones], 1, name="blocks")
        latest = scope.aten("index_select", carried["tokens"], 1, scope.aten("unsqueeze", count, 0), name="latest")
        tokens = self._pick(scope, scope.aten("squeeze.dim", latest, 1), lanes, name="token_ids")
        wanted = scope.aten("arange", scope.aten("sym_size.int", lanes, 0), name="wanted")
        logits = self._step(scope, blocks, tokens, wanted)
        scope.op("keep", scope.get("logits"), self._pick(scope, column("row"), lanes, name="row"), logits)
        count = scope.aten("add.Scalar", count, 1, name="next_count")
        return [count, *self._drawn(scope, draw, base, count, column("row"), carried)]

    def _drawn(
        self, scope: _Scope, draw: _Draw, base: str, count: fx.Node, rows: fx.Node, carried: Mapping[str, fx.Node]
    ) -> list[fx.Node]:
        """Draw, by the graph that both the first draw and the others call."""
        target = scope.module(f"{base}_draw", draw.module)
        args = (count, rows, *carried.values(), *(scope.get(name) for name in draw.captured))
        called = scope.graph.create_node("call_module", target, args, {}, name=f"{base}_next")
        if scope.trace is not None:
            called.meta["stack_trace"] = scope.trace
        return [scope.part(called, place, part) for place, part in enumerate(carried)]

    def _draw(self, outer: _Scope, node: Decode, base: str, tables: Tables) -> _Draw:
        """The draw of every active lane, from its row of logits; what it changes is returned."""
        options = self._options
        carried = ("count", "rows", "active", "tokens", "logprobs", "type_state", "stop_state", "seen")
        scope = _Scope(outer, carried)
        count, rows, active, tokens, logprobs, type_state, stop_state, seen = scope.carried
        lanes = self._lanes(scope, active)
        ints, floats = scope.get(f"{base}_ints"), scope.get(f"{base}_floats")

        def own(column: str, name: str = "") -> fx.Node:
            return self._pick(scope, self._column(scope, ints, column), lanes, name=name or column)

        def option(place: int, name: str) -> fx.Node:
            return self._pick(scope, scope.aten("select.int", floats, 1, place), lanes, name=name)

        left = scope.aten("sub.Tensor", own("left"), count, name="left")
        logits = scope.aten(
            "index_select", scope.get("logits"), 0, self._pick(scope, rows, lanes, name="row"), name="row_logits"
        )
        mask = None
        if tables.typed is not None:
            for part in ("next_state", "distance", "accepting", "final"):
                outer.buffer(f"{base}_{part}", getattr(tables.typed, part).to(options.device))
            at = scope.aten("_to_copy", self._pick(scope, type_state, lanes), dtype=torch.int32)
            mask = scope.op(
                "automaton_mask", scope.get(f"{base}_next_state"), scope.get(f"{base}_distance"),
                scope.get(f"{base}_accepting"), at, scope.aten("_to_copy", left, dtype=torch.int32),
                scope.get("end_tokens"), name="mask",
            )  # fmt: skip
        penal = any(option in node.spec.sampling for option in ("repetition_penalty", "presence_penalty"))
        keys = scope.aten("stack", [own("key_0"), own("key_1")], 1, name="keys")
        index = scope.aten("add.Tensor", own("index"), count, name="index")
        drawn = scope.op(
            "draw", logits, option(0, "temperature"), own("top_k"), option(1, "top_p"), option(2, "min_p"), keys, index,
            mask, self._pick(scope, seen, lanes) if penal else None, option(3, "repetition") if penal else None,
            option(4, "presence") if penal else None,
            bool(node.spec.logprobs) or self._compiled.reads_logprobs, name="draw",
        )  # fmt: skip
        token, logprob = scope.part(drawn, 0, "token"), scope.part(drawn, 1, "logprob")
        if options.forced:
            scope.op("keep", scope.get("trace"), scope.aten("add.Tensor", own("trace"), count), logits)
            script = scope.aten("index_select", scope.get(f"{base}_forced"), 1, scope.aten("unsqueeze", count, 0))
            script = self._pick(scope, scope.aten("squeeze.dim", script, 1), lanes, name="script")
            token = scope.aten("where.self", scope.aten("ge.Scalar", script, 0), script, token, name="taken")
        able = scope.aten("ge.Scalar", token, 0, name="able")
        safe = scope.aten("clamp", token, 0, name="safe")
        ended = scope.aten(
            "any.dim",
            scope.aten("eq.Tensor", scope.aten("unsqueeze", safe, 1), scope.get("end_tokens")), 1, name="turn_ended",
        )  # fmt: skip
        ended = scope.aten("logical_or", ended, scope.aten("le.Scalar", left, 1), name="ended")
        if tables.typed is not None:
            moved = self._moved(scope, f"{base}_next_state", self._pick(scope, type_state, lanes), safe)
            final = scope.aten("index_select", scope.get(f"{base}_final"), 0, scope.aten("clamp", moved, 0))
            ended = scope.aten("logical_or", ended, final)
            type_state = scope.aten("index_put", type_state, [lanes], moved, name="next_type_state")
        if tables.stops is not None:
            outer.buffer(f"{base}_stop_moves", tables.stops.next_state.to(options.device))
            outer.buffer(f"{base}_stopped", tables.stops.hit.to(options.device))
            moved = self._moved(scope, f"{base}_stop_moves", self._pick(scope, stop_state, lanes), safe)
            hit = scope.aten("index_select", scope.get(f"{base}_stopped"), 0, moved, name="stopped")
            ended = scope.aten("logical_or", ended, hit)
            stop_state = scope.aten("index_put", stop_state, [lanes], moved, name="next_stop_state")
        column = scope.aten("add.Tensor", scope.aten("zeros_like", lanes), count, name="column")
        goes_on = scope.aten("logical_and", able, scope.aten("logical_not", ended), name="goes_on")
        outputs = [
            scope.aten("index_put", active, [lanes], goes_on, name="next_active"),
            scope.aten("index_put", tokens, [lanes, column], token, name="next_tokens"),
            scope.aten("index_put", logprobs, [lanes, column], logprob, name="next_logprobs"),
            scope.aten("clone", type_state) if type_state.op == "placeholder" else type_state,
            scope.aten("clone", stop_state) if stop_state.op == "placeholder" else stop_state,
            self._marked(scope, seen, lanes, safe) if penal else scope.aten("clone", seen),
        ]
        captured = [*scope.captured]
        return _Draw(scope.finish(outputs, captured), captured)

    def _marked(self, scope: _Scope, seen: fx.Node, lanes: fx.Node, token: fx.Node) -> fx.Node:
        """`seen` with the bit of each lane's token set."""
        word = scope.aten("floor_divide", token, scope.aten("full", [], 32, dtype=torch.int64), name="word")
        one = scope.aten("full_like", token, 1)
        bit = scope.aten("bitwise_left_shift.Tensor", one, scope.aten("remainder.Scalar", token, 32), name="bit")
        # Bit 31 is the sign.
        high = scope.aten("gt.Scalar", bit, 0x7FFFFFFF)
        bit = scope.aten("where.self", high, scope.aten("sub.Scalar", bit, 1 << 32), bit)
        bit = scope.aten("_to_copy", bit, dtype=torch.int32)
        old = scope.aten("index.Tensor", seen, [lanes, word])
        both = scope.aten("bitwise_or.Tensor", old, bit)
        return scope.aten("index_put", seen, [lanes, word], both, name="next_seen")

    def _moved(self, scope: _Scope, moves: str, state: fx.Node, token: fx.Node) -> fx.Node:
        """Where `token` leads from `state`."""
        at = scope.aten("clamp", state, 0)
        moved = scope.aten("index.Tensor", scope.get(moves), [at, token])
        return scope.aten("_to_copy", moved, dtype=torch.int64, name="moved")

    def _column(self, scope: _Scope, ints: fx.Node, column: str, name: str = "") -> fx.Node:
        return scope.aten("select.int", ints, 1, self._options.lane_ints.index(column), name=name or f"lane_{column}")

    def _lanes(self, scope: _Scope, active: fx.Node) -> fx.Node:
        """The numbers of the lanes that go on."""
        return scope.aten("squeeze.dim", scope.aten("nonzero", active), 1, name="lanes")

    def _pick(self, scope: _Scope, of: fx.Node, lanes: fx.Node, name: str = "") -> fx.Node:
        return scope.aten("index_select", of, 0, lanes, name=name)

    # Sizes and names.

    def _sizes(self) -> tuple[int, int]:
        """Rows of logits: threads that hold one at once, one more for each that may join, and those that ended in a
        stitch of their own, for their parent may go on from there. Rows of the trace: what a run may draw, and what the
        lanes of one gen might.
        """
        at_once = {self._main: 1}
        rows = 2
        for named in self._names.nodes.values():
            outer = at_once[named.region]
            for place, region in enumerate(named.inside):
                match named.node:
                    case Fork(arms=arms):
                        width = arms[place].multiplicity
                    case Map(most=most):
                        width = most
                    case Reduce(most=most, by=by):
                        width = -(-most // by)
                    case Call():
                        width = 1
                    case _:
                        at_once[region] = outer
                        continue
                at_once[region] = max(1, min(self._options.lanes, outer * width))
                rows += 2 * at_once[region]
                if self._stitches(named.node) and self._holds_stitch(region):
                    rows += outer * width
        lanes = [
            at_once[named.region] * named.node.spec.max_tokens
            for named in self._names.nodes.values()
            if isinstance(named.node, Decode)
        ]
        return rows, self._options.most_drawn + max(lanes, default=0) + 1

    def _stitches(self, node: Node) -> bool:
        return isinstance(node, Fork | Map) and node.join.context == "stitch"

    def _holds_stitch(self, region: str) -> bool:
        """Whether a thread of the region may stitch."""
        waiting = [region]
        while waiting:
            for name in self._names.regions[waiting.pop()].nodes:
                named = self._names.nodes[name]
                if self._stitches(named.node):
                    return True
                if isinstance(named.node, Cond | Loop):
                    waiting.extend(named.inside)
        return False

    def _base(self, name: str) -> str:
        """What the names of all that comes of a node begin with, which no two nodes share; of a region, as it is."""
        return self._bases.get(name) or self._readable(name)

    def _readable(self, name: str) -> str:
        """A name that nodes of the graph may have. Two parts of a plan may come to the same: `a_x`, and `x` in `a`."""
        own = name.removeprefix(self._main).lstrip("./") or name
        return re.sub(r"\W+", "_", own).strip("_")

    def _where(self, name: str) -> str:
        """Where a statement stands, as torch shows it."""
        source, span = self._compiled.program.source, self._names.nodes[name].node.span
        line, _ = source.position(span.start)
        code = source.text.splitlines()[line - 1].strip() if source.text else name
        plan = self._names.regions[self._names.nodes[name].region].plan
        return f'  File "{self._options.source_name}", line {line}, in {plan}\n    {code}\n'
