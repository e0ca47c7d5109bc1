"""How many known tokens each statement of a graph feeds in the worst case.

Literal text is counted by a `Sizes`. What is interpolated counts as the most that its value may take: a generated
one its `max` plus 8 (its text is encoded again, beside other text, and may split otherwise), a parameter what its
bound states or what was given for it. A value that turns out longer fails its branch when it is written, so that a
bound computed from these figures is never exceeded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias, assert_never

from anabranch.compiler.amounts import ZERO, Amount, Symbol, after_rounds, most, symbol
from anabranch.compiler.graph import (
    Call,
    Cond,
    Ctx,
    Decode,
    Expand,
    Fork,
    Graph,
    Let,
    Loop,
    Map,
    Need,
    PlanGraph,
    Reduce,
    Region,
    Return,
    Write,
    callees_first,
    regions,
    walk,
)
from anabranch.dsl import ast
from anabranch.dsl.diagnostics import PlanError
from anabranch.dsl.spec import ChoiceType, FloatType, IntType, JoinSpec, Limits
from anabranch.dsl.types import MAX_PARTS
from anabranch.dsl.values import MAX_NESTING, MAX_TEXT, EvaluationError, render

Role: TypeAlias = Literal["user", "system", "assistant"]

AGAIN = 8  # tokens that a generated value may take more when it is encoded again
NUMBER = 24  # tokens of a computed number: every float's repr, and ints below 10**24
KNOWN = 1_000  # values in a list that is worked out here; `[x, x]` over and over doubles, and larger ones are counted
HOST = 512  # tokens of what a host function returns: it states no bound, and a plan must have one
BOOL = 5  # tokens of `false`, byte by byte


Piece: TypeAlias = tuple[str, bool]
"""A text, and whether it stands in the plan's own words: special tokens are split in those alone."""


class Sizes(Protocol):
    """How many tokens known text takes.

    exact: whether counts come from the model's tokenizer; else they are upper bounds
    start: tokens fed in an empty view before anything else
    opener: tokens that open the assistant's turn
    closer: tokens that close it before another turn
    """

    @property
    def exact(self) -> bool: ...
    @property
    def start(self) -> int: ...
    @property
    def opener(self) -> int: ...
    @property
    def closer(self) -> int: ...
    def tokens(self, pieces: Sequence[Piece]) -> int:
        """Tokens of a statement's text, encoded in one call."""
        ...

    def turn(self, role: Role) -> int:
        """Tokens of a whole turn of `role` beside those of its content."""
        ...


@dataclass(frozen=True, slots=True)
class ByteSizes:
    """Without a model: no tokenizer makes more tokens of a text than it has UTF-8 bytes. Turns are plain lines."""

    exact: bool = False
    start: int = 1
    opener: int = 0
    closer: int = 0

    def tokens(self, pieces: Sequence[Piece]) -> int:
        return sum(len(text.encode("utf-8", "surrogatepass")) for text, _ in pieces)

    def turn(self, role: Role) -> int:
        return 1


class Encoder(Protocol):
    """A tokenizer. `bos_id`: the token that an empty view begins with, if any."""

    @property
    def bos_id(self) -> int | None: ...
    def encode(self, pieces: Sequence[Piece]) -> Sequence[int]: ...


class Turns(Protocol):
    """A model's chat pieces: a whole turn, and what opens the assistant's."""

    def turn(self, role: Role, content: Sequence[Piece], *, first: bool, open: bool) -> list[Piece]: ...
    def open_assistant(self, *, first: bool) -> list[Piece]: ...


class ModelSizes:
    """What a model's tokenizer and chat pieces make of text. Counts are remembered, so a model keeps one of these."""

    exact = True

    def __init__(self, tokenizer: Encoder, chat: Turns) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._turns: dict[Role, int] = {}
        self.start = 0 if tokenizer.bos_id is None else 1
        self.opener = self.tokens(chat.open_assistant(first=False))
        self.closer = 0
        for first in (False, True):
            closed, still_open = (self._around("user", first=first, is_open=is_open) for is_open in (False, True))
            self.closer = max(self.closer, still_open - closed)

    def tokens(self, pieces: Sequence[Piece]) -> int:
        return len(self._tokenizer.encode(pieces)) if pieces else 0

    def turn(self, role: Role) -> int:
        found = self._turns.get(role)
        if found is None:
            # Beside its content the turn's own words may split otherwise, by a token on either side.
            found = self._turns[role] = 2 + max(
                self._around(role, first=first, is_open=False) for first in (False, True)
            )
        return found

    def _around(self, role: Role, *, first: bool, is_open: bool) -> int:
        try:
            return self.tokens(self._chat.turn(role, [], first=first, open=is_open))
        except PlanError:
            # The template has no such turn in this place; a plan that writes it there fails when it does.
            return 0


@dataclass(frozen=True, slots=True)
class Feed:
    """Tokens that a node feeds and draws at most.

    rows: known tokens that enter the context
    generated: those of `rows` that stand for generated text
    forced: those of `rows` that stand where tokens would be drawn: a recorded gen's
    aside, options: known tokens that are fed and taken back: those of a choice's options, which are scored one by one
    drawn: tokens that are sampled
    """

    rows: int = 0
    generated: int = 0
    forced: int = 0
    aside: int = 0
    options: int = 0
    drawn: int = 0


NOTHING = Feed()


@dataclass(frozen=True, slots=True)
class Fed:
    """What each node of one plan feeds.

    at: by the context that a node makes: what it feeds where it stands (a fork: what opens the assistant's turn)
    joined: by the context that a fork or map makes: what a `text` join feeds
    starts: by the entry of a branch's region: its prompt, and the start token of an empty view
    """

    at: dict[Ctx, Feed] = field(default_factory=dict)
    joined: dict[Ctx, Feed] = field(default_factory=dict)
    starts: dict[Ctx, Feed] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measured:
    """The sizes of a graph. `unbounded`: parameters of the main plan that state no bound and were not given."""

    plans: Mapping[str, Fed]
    exact: bool
    unbounded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Value:
    """A value's worst case.

    tokens: where it is interpolated
    generated: those of them that came out of the model
    item, fields: of a list's item, a record's fields, where they are known; else they count as the whole
    number: it is an int or a float
    known: the value itself, in a tuple of one
    """

    tokens: Amount
    generated: Amount = ZERO
    item: _Value | None = None
    fields: Mapping[str, _Value] | None = None
    number: bool = False
    known: tuple[Any, ...] = ()
    parts: int = field(init=False, compare=False, repr=False, default=1)
    nesting: int = field(init=False, compare=False, repr=False, default=0)

    def __post_init__(self) -> None:
        inner = [] if self.item is None else [self.item]
        if self.fields is not None:
            inner += self.fields.values()
        parts = 1 + sum(value.parts for value in inner)
        nesting = 1 + max((value.nesting for value in inner), default=-1)
        if parts > MAX_PARTS or nesting > MAX_NESTING:
            # A few lines can make a value of more parts than could be gone through: what is inside counts as the whole.
            object.__setattr__(self, "item", None)
            object.__setattr__(self, "fields", None)
            parts, nesting = 1, 0
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "nesting", nesting)

    def again(self) -> Amount:
        """Tokens that count as fed again where the whole value is interpolated: all of them if any came out of the
        model."""
        return ZERO if self.generated == ZERO else self.tokens

    def made(self) -> _Value:
        """The same as what a fork, map, reduce or call yields, which counts as generated whatever it holds."""
        return _Value(
            self.tokens,
            self.tokens,
            None if self.item is None else self.item.made(),
            None if self.fields is None else {name: value.made() for name, value in self.fields.items()},
            self.number,
        )

    def put(self, values: Mapping[Symbol, Amount]) -> _Value:
        """With the symbols of `values` replaced."""
        return _Value(
            self.tokens.put(values),
            self.generated.put(values),
            None if self.item is None else self.item.put(values),
            None if self.fields is None else {name: value.put(values) for name, value in self.fields.items()},
            self.number,
            self.known,
        )


_NUMBER = _Value(Amount(NUMBER), number=True)
_BOOL = _Value(Amount(BOOL))
_NONE = _Value(ZERO)

# What role the context may stand in: nothing written yet, a closed turn, the assistant's open turn.
_EMPTY, _CLOSED, _OPEN = 1, 2, 4


def measure(graph: Graph, sizes: Sizes, inputs: Mapping[str, Any] | None = None) -> Measured:
    """Measure every plan of `graph`.

    inputs: values given for parameters of the main plan; those not given count as their stated bounds, and as
        nothing where they state none
    """
    table = _Table()
    walks: dict[str, _Walk] = {}
    order = callees_first(graph)
    for name in order:
        walks[name] = _Walk(graph.plans[name], sizes, table, walks, (inputs or {}) if name == graph.main else None)
        walks[name].run()
    # Callers first, so that a symbol's value never waits on a long chain of others.
    fed = {name: walks[name].fed() for name in reversed(order)}
    return Measured(fed, sizes.exact, tuple(walks[graph.main].unbounded))


class _Table:
    """What every symbol stands for: at least each of the amounts told."""

    def __init__(self) -> None:
        self._told: list[list[Amount]] = []
        self._values: dict[Symbol, int] = {}

    def fresh(self) -> Symbol:
        self._told.append([])
        return len(self._told) - 1

    def tell(self, name: Symbol, amount: Amount) -> None:
        self._told[name].append(amount)

    def value(self, name: Symbol) -> int:
        found = self._values.get(name)
        if found is None:
            found = self._values[name] = max((amount.value(self.value) for amount in self._told[name]), default=0)
        return found


class _Scope:
    """Names and their values. A block writes into its own scope; what it rebinds outside, its node merges upward."""

    __slots__ = ("names", "outer")

    def __init__(self, outer: _Scope | None, names: dict[str, _Value] | None = None) -> None:
        self.outer = outer
        self.names = {} if names is None else names

    def get(self, name: str) -> _Value:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        return _NONE

    def __contains__(self, name: str) -> bool:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return True
            scope = scope.outer
        return False


@dataclass(slots=True)
class _Flow:
    """Where a thread stands.

    role: the roles that its context may be in
    written: tokens of the text that it wrote so far
    ended: a `return` has been passed on every path
    returns: what it may return
    """

    role: int
    written: Amount = ZERO
    ended: bool = False
    returns: list[_Value] = field(default_factory=list)


class _Walk:
    """Measures one plan. `returned`: what a call of it yields, in terms of its parameters' symbols."""

    def __init__(
        self,
        plan: PlanGraph,
        sizes: Sizes,
        table: _Table,
        walks: Mapping[str, _Walk],
        inputs: Mapping[str, Any] | None,
    ) -> None:
        self.plan = plan
        self.sizes = sizes
        self.table = table
        self.walks = walks
        self.inputs = inputs
        self.unbounded: list[str] = []
        self.params: dict[str, Symbol] = {name: table.fresh() for name in plan.params}
        self.returned = _NONE
        self._texts: dict[tuple[Piece, ...], int] = {}
        self._at: list[tuple[Ctx, Amount, Amount, Amount, list[int], int]] = []
        self._joined: list[tuple[Ctx, Amount]] = []
        self._starts: list[tuple[Ctx, Amount, Amount]] = []
        self._recursive = any(
            isinstance(node := region.nodes[place], Call) and node.plan == plan.name
            for region, place in walk(plan.region)
        )
        self._own_calls: dict[str, list[Amount]] = {name: [] for name in plan.params}
        self._own_return = table.fresh()

    def run(self) -> None:
        plan = self.plan
        inner = {name: self.table.fresh() for name in plan.params} if self._recursive else self.params
        scope = _Scope(None)
        for place, name in enumerate(plan.params):
            bound = plan.bounds[place] if plan.bounds else None
            scope.names[name] = self._param(name, bound, self.params[name], inner[name])
        self._starts.append((plan.region.entry, Amount(self.sizes.start if self.inputs is not None else 0), ZERO))
        # A callee goes on from its caller's context, whatever role that is in.
        flow = _Flow(_EMPTY if self.inputs is not None else _EMPTY | _CLOSED | _OPEN)
        self._region(plan.region, scope, flow)
        self.returned = self._yielded(flow)
        if self._recursive:
            start = {inner[name]: symbol(self.params[name]) for name in plan.params}
            step = {inner[name]: most(self._own_calls[name]) for name in plan.params}
            start[self._own_return], step[self._own_return] = ZERO, self.returned.tokens
            held = after_rounds(start, step, 2 * plan.depth + 2)
            for sym, amount in held.items():
                self.table.tell(sym, amount)
            self.returned = self.returned.put(held)

    def fed(self) -> Fed:
        """What the nodes feed, in numbers."""
        value = self.table.value
        for name in self.params.values():
            value(name)
        found = Fed()
        for ctx, rows, generated, forced, scored, drawn in self._at:
            found.at[ctx] = Feed(
                rows.value(value), generated.value(value), forced.value(value), sum(scored), len(scored), drawn
            )
        for ctx, rows in self._joined:
            tokens = rows.value(value)
            found.joined[ctx] = Feed(tokens, tokens)
        for ctx, rows, generated in self._starts:
            found.starts[ctx] = Feed(rows.value(value), generated.value(value))
        return found

    def _param(self, name: str, bound: ast.Expr | None, outer: Symbol, inner: Symbol) -> _Value:
        stated = self._stated(bound)
        if self.inputs is None:
            # What a caller passes counts as it is, unless the parameter says that it takes no more.
            if stated is not None:
                self.table.tell(outer, stated.tokens)
                return stated
            return _Value(symbol(inner), symbol(inner))
        if name in self.inputs:
            given = self._known(self.inputs[name])
            self.table.tell(outer, given.tokens)
            return _Value(symbol(inner)) if self._recursive else given
        if stated is None:
            self.unbounded.append(name)
            return _Value(symbol(inner))
        self.table.tell(outer, stated.tokens)
        return stated

    def _stated(self, bound: ast.Expr | None) -> _Value | None:
        match bound:
            case ast.Name(id="int" | "float"):
                return _NUMBER
            case ast.Name(id="bool"):
                return _BOOL
            case ast.Apply(function="text", args=(ast.Arg(value=ast.Int(value=tokens)),)):
                return _Value(Amount(tokens))
            case ast.Apply(function="list", args=(ast.Arg(value=ast.Int(value=items)), ast.Arg(value=inner))):
                item = self._stated(inner)
                return None if item is None else self._list_of(item, items)
            case _:
                return None

    # --- regions

    def _region(self, region: Region, scope: _Scope, flow: _Flow) -> None:
        for node in region.nodes:
            match node:
                case Write():
                    self._write(node, scope, flow)
                case Decode():
                    self._decode(node, scope, flow)
                case Fork():
                    self._fork(node, scope, flow)
                case Map():
                    self._map(node, scope, flow)
                case Reduce():
                    self._reduce(node, scope, flow)
                case Loop():
                    self._loop(node, scope, flow)
                case Cond():
                    self._cond(node, scope, flow)
                case Call():
                    self._call(node, scope, flow)
                case Expand():
                    raise ValueError("the size of what `expand` writes is not known")
                case Let(name=name, value=value):
                    scope.names[name] = self._value(value, scope)
                case Need():
                    pass
                case Return(value=value):
                    flow.returns.append(self._value(value, scope))
                    flow.ended = True
                case _:
                    assert_never(node)

    def _write(self, node: Write, scope: _Scope, flow: _Flow) -> None:
        text = self._said(node.value, scope)
        if node.role == "text":
            around = self._opened(flow)
        else:
            around = Amount(self.sizes.turn(node.role) + (self.sizes.closer if flow.role & _OPEN else 0))
            flow.role = _CLOSED
        self._feed(node.dst, around + text.tokens, _again(node.value, text))
        flow.written += text.tokens

    def _decode(self, node: Decode, scope: _Scope, flow: _Flow) -> None:
        spec = node.spec
        prompt = _NONE if node.prompt is None else self._said(node.prompt, scope)
        tokens = Amount(spec.max_tokens)
        forced, scored, drawn = ZERO, list[int](), spec.max_tokens
        # Where a stop cuts a token in two, the part before it is encoded again.
        mended = AGAIN if spec.stop else 0
        if spec.recorded is not None:
            tokens = forced = self._recorded(spec.recorded, scope)
            drawn = 0
        elif isinstance(spec.type, ChoiceType) and spec.type.by == "logprob":
            scored = [self._text(option) for option in spec.type.options]
            tokens, drawn = Amount(max(scored)), 0
        kept = tokens if not drawn else Amount(mended)
        rows = self._opened(flow) + prompt.tokens + kept
        generated = ZERO if node.prompt is None else _again(node.prompt, prompt)
        self._at.append((node.dst, rows, generated, forced, scored, drawn))
        flow.written += prompt.tokens + tokens
        if node.name is not None:
            value = tokens + AGAIN
            number = isinstance(spec.type, IntType | FloatType)
            scope.names[node.name] = _Value(value, value, number=number)

    def _recorded(self, expr: ast.Expr, scope: _Scope) -> Amount:
        if isinstance(expr, ast.Apply) and expr.function == "ids":
            return Amount(sum(len(arg.value.items) if isinstance(arg.value, ast.List) else 1 for arg in expr.args))
        return self._value(expr, scope).tokens

    def _fork(self, node: Fork, scope: _Scope, flow: _Flow) -> None:
        self._feed(node.dst, self._opened(flow))
        width = sum(arm.multiplicity for arm in node.arms)
        labels = [arm.label for arm in node.arms]
        yields: list[_Value] = []
        keys: list[_Value] = []
        written: list[tuple[Amount, int]] = []
        for arm in node.arms:
            names = {node.index: _Value(Amount(len(str(width))), number=True)} if node.index else {}
            fresh = arm.limits.fresh or node.limits.fresh
            value, key, own = self._branch(arm.region, _Scope(scope, names), flow, fresh, node.join.key, arm.prompt)
            yields.append(value)
            keys.append(key)
            written.append((own, arm.multiplicity))
        joined = self._join_value(node.join, yields, labels, keys, width, node.limits, scope)
        self._join(node.dst, node.name, node.join, joined, written, scope, flow)

    def _map(self, node: Map, scope: _Scope, flow: _Flow) -> None:
        self._feed(node.dst, self._opened(flow))
        over = self._value(node.over, scope)
        names = {node.item: over.item or replace(over, known=())}
        if node.index:
            names[node.index] = _Value(Amount(len(str(node.most))), number=True)
        inner = _Scope(scope, names)
        value, key, own = self._branch(node.region, inner, flow, node.limits.fresh, node.join.key)
        joined = self._join_value(node.join, [value], [None], [key], node.most, node.limits, scope)
        self._join(node.dst, node.name, node.join, joined, [(own, node.most)], scope, flow)

    def _reduce(self, node: Reduce, scope: _Scope, flow: _Flow) -> None:
        self._feed(node.dst, self._opened(flow))
        over = self._value(node.over, scope)
        item = over.item or replace(over, known=())
        # A group's size is a symbol: what a merge yields is an item of the next level.
        name = self.table.fresh()
        group = self._list_of(_Value(symbol(name), symbol(name)), node.by)
        value, _, _ = self._branch(node.region, _Scope(scope, {node.item: group}), flow, node.limits.fresh, None)
        held = after_rounds({name: item.tokens}, {name: value.tokens}, levels(node.most, node.by))
        self.table.tell(name, held[name])
        if node.name is not None:
            merged = _either(replace(item, known=()), value.put(held))
            scope.names[node.name] = self._or_fallback(merged, node.limits, scope)

    def _loop(self, node: Loop, scope: _Scope, flow: _Flow) -> None:
        inner = _Scope(scope)
        carried: dict[str, Symbol] = {}
        start: dict[Symbol, Amount] = {}
        for name in node.carried:
            before = scope.get(name)
            carried[name] = self.table.fresh()
            start[carried[name]] = before.tokens
            inner.names[name] = _Value(symbol(carried[name]), symbol(carried[name]), number=before.number)
        inside = _Flow(flow.role | (_CLOSED | _OPEN if _turns(node.region) else _OPEN), returns=flow.returns)
        self._region(node.region, inner, inside)
        step = {held: inner.get(name).tokens for name, held in carried.items()}
        held = after_rounds(start, step, node.rounds)
        for sym, amount in held.items():
            self.table.tell(sym, amount)
        for name, value in inner.names.items():
            scope.names[name] = value.put(held)
        flow.role = inside.role
        flow.written += inside.written.put(held).times(node.rounds)
        flow.ended = flow.ended or inside.ended

    def _cond(self, node: Cond, scope: _Scope, flow: _Flow) -> None:
        arms: list[tuple[_Scope, _Flow]] = []
        for region in (node.then, node.orelse):
            inner, inside = _Scope(scope), _Flow(flow.role, returns=flow.returns)
            if region is not None:
                self._region(region, inner, inside)
            arms.append((inner, inside))
        (in_then, then), (in_else, orelse) = arms
        for name in {**in_then.names, **in_else.names}:
            if name in scope or (name in in_then.names and name in in_else.names):
                scope.names[name] = _either(in_then.get(name), in_else.get(name))
        flow.role = then.role | orelse.role
        flow.written += most([then.written, orelse.written])
        flow.ended = flow.ended or (then.ended and orelse.ended)

    def _call(self, node: Call, scope: _Scope, flow: _Flow) -> None:
        self._feed(node.dst, self._opened(flow))
        args = {name: self._value(value, scope) for name, value in node.args}
        if node.plan == self.plan.name:
            for name, value in args.items():
                self._own_calls[name].append(value.tokens)
            value = _Value(symbol(self._own_return), symbol(self._own_return))
        else:
            callee = self.walks[node.plan]
            for name, arg in args.items():
                self.table.tell(callee.params[name], arg.tokens)
            given = {sym: args[name].tokens if name in args else ZERO for name, sym in callee.params.items()}
            value = callee.returned.put(given)
        if node.name is not None:
            scope.names[node.name] = self._or_fallback(value, node.limits, scope)

    # --- branches and joins

    def _branch(
        self,
        region: Region,
        scope: _Scope,
        parent: _Flow,
        fresh: bool,
        key: str | None,
        written: ast.Expr | None = None,
    ) -> tuple[_Value, _Value, Amount]:
        """Walk a branch; returns what it yields, the join's key in it, and the tokens of its own text."""
        prompt = _NONE if written is None else self._said(written, scope)
        generated = ZERO if written is None else _again(written, prompt)
        flow = _Flow(_EMPTY if fresh else parent.role, prompt.tokens)
        self._starts.append((region.entry, prompt.tokens + (self.sizes.start if fresh else 0), generated))
        self._region(region, scope, flow)
        found = scope.get(key) if key is not None else _NONE
        return self._yielded(flow), found, flow.written

    def _yielded(self, flow: _Flow) -> _Value:
        own = flow.written + AGAIN
        return _union(flow.returns if flow.ended else [*flow.returns, _Value(own, own)])

    def _join(
        self,
        dst: Ctx,
        name: str | None,
        join: JoinSpec,
        value: _Value,
        written: Sequence[tuple[Amount, int]],
        scope: _Scope,
        flow: _Flow,
    ) -> None:
        if join.context == "text":
            total = ZERO
            for own, count in written:
                total += (own + AGAIN).times(count)
            self._joined.append((dst, total))
            flow.written += total
        elif join.context == "stitch":
            total = ZERO
            for own, count in written:
                total += own.times(count)
            # One winner is never longer than all the branches together.
            flow.written += total if join.kind in ("all", "first") else most([own for own, _ in written])
        if name is not None:
            scope.names[name] = value

    def _join_value(
        self,
        join: JoinSpec,
        yields: Sequence[_Value],
        labels: Sequence[str | None],
        keys: Sequence[_Value],
        width: int,
        limits: Limits,
        scope: _Scope,
    ) -> _Value:
        match join.kind:
            case "all" if labels and all(label is not None for label in labels):
                value = self._record({str(label): each for label, each in zip(labels, yields, strict=True)})
            case "all":
                value = self._list_of(_union(yields), width)
            case "first":
                count = min(join.count or 1, width)
                value = _union(yields) if count == 1 else self._list_of(_union(yields), count)
            case "best":
                value = _union(yields)
            case "vote" | "quorum":
                value = _union(keys)
            case _:
                assert_never(join.kind)
        return self._or_fallback(value, limits, scope)

    def _or_fallback(self, value: _Value, limits: Limits, scope: _Scope) -> _Value:
        if limits.fallback is not None:
            value = _either(value, self._value(limits.fallback, scope))
        return value.made()

    # --- values

    def _value(self, expr: ast.Expr, scope: _Scope) -> _Value:
        match expr:
            case ast.Name(id=name):
                return scope.get(name)
            case ast.Int(value=value) | ast.Float(value=value) | ast.Bool(value=value):
                return self._known(value)
            case ast.Str(parts=parts):
                return self._string(parts, scope, is_said=False)
            case ast.List(items=items):
                values = [self._value(item, scope) for item in items]
                tokens, generated = _sum(values)
                items_known = tuple(v.known[0] for v in values if v.known)
                known = (items_known,) if len(items_known) == len(values) and _is_small(items_known) else ()
                between = max(0, len(values) - 1)
                return _Value(tokens + between, generated, _union(values) if values else None, known=known)
            case ast.Unary(op="!"):
                return _BOOL
            case ast.Unary():
                return _NUMBER
            case ast.Binary(op="+"):
                return self._total([self._value(term, scope) for term in _terms(expr)])
            case ast.Binary(op="-" | "*" | "/"):
                return _NUMBER
            case ast.Binary():
                return _BOOL
            case ast.Field(value=inner, name=name):
                record = self._value(inner, scope)
                if record.known and isinstance(record.known[0], Mapping) and name in record.known[0]:
                    return self._known(record.known[0][name])
                field_value = record.fields.get(name) if record.fields is not None else None
                return field_value or replace(record, known=(), number=False)
            case ast.Index(value=inner, index=index):
                items_of, at = self._value(inner, scope), self._value(index, scope)
                if items_of.known and at.known:
                    try:
                        return self._known(items_of.known[0][at.known[0]])
                    except (IndexError, KeyError, TypeError):
                        return _NONE
                return items_of.item or replace(items_of, known=(), number=False)
            case ast.Apply(function=function, args=args):
                return self._apply(function, args, scope)
            case _:
                assert_never(expr)

    def _apply(self, function: str, args: Sequence[ast.Arg], scope: _Scope) -> _Value:
        match function:
            case "len":
                return _NUMBER
            case "in" | "matches":
                return _BOOL
            case "lines" if args:
                return replace(self._value(args[0].value, scope), known=(), number=False)
            case _:
                return _Value(Amount(HOST))

    def _said(self, expr: ast.Expr, scope: _Scope) -> _Value:
        """What a statement writes: the text in a string of its own, and that alone, may form special tokens."""
        if isinstance(expr, ast.Str):
            return self._string(expr.parts, scope, is_said=True)
        return self._value(expr, scope)

    def _total(self, terms: Sequence[_Value]) -> _Value:
        """What a `+` of all of them comes to."""
        if any(term.number for term in terms):
            return _NUMBER
        texts = [term.known[0] for term in terms if term.known and isinstance(term.known[0], str)]
        if len(texts) == len(terms) and sum(map(len, texts)) <= MAX_TEXT:
            # Counted as a whole: two texts side by side may take a token more than each by itself.
            return self._known("".join(texts))
        return _Value(*_sum(terms))

    def _string(self, parts: Sequence[str | ast.Expr], scope: _Scope, *, is_said: bool) -> _Value:
        values = [part if isinstance(part, str) else self._value(part, scope) for part in parts]
        pieces = _known_pieces(values, is_said)
        if pieces is not None:
            return _Value(Amount(self._count(pieces)), known=("".join(text for text, _ in pieces),))
        inner = [value for value in values if isinstance(value, _Value)]
        tokens, _ = _sum(inner)
        generated = ZERO
        for value in inner:
            generated += value.again()
        texts = [self._count(((value, is_said),)) for value in values if isinstance(value, str)]
        return _Value(tokens + sum(texts), generated)

    def _known(self, value: Any) -> _Value:
        item = None
        if isinstance(value, list | tuple):
            item = replace(_union([self._known(each) for each in value]), known=()) if value else _NONE
        number = isinstance(value, int | float) and not isinstance(value, bool)
        try:
            tokens = Amount(self._count(((render(value), False),)))
        except EvaluationError:
            # Too large to be written: a branch that tries fails before it feeds anything. Its items may be small.
            tokens = ZERO
        return _Value(tokens, ZERO, item, number=number, known=(value,))

    def _list_of(self, item: _Value, count: int) -> _Value:
        return _Value(
            item.tokens.times(count) + max(0, count - 1), item.generated.times(count), replace(item, known=())
        )

    def _record(self, fields: Mapping[str, _Value]) -> _Value:
        tokens, generated = _sum(list(fields.values()))
        names = sum(self._text(f"{name}: ") for name in fields) + max(0, len(fields) - 1)
        return _Value(tokens + names, generated, fields=fields)

    def _text(self, text: str) -> int:
        return self._count(((text, True),))

    def _count(self, pieces: tuple[Piece, ...]) -> int:
        found = self._texts.get(pieces)
        if found is None:
            found = self._texts[pieces] = self.sizes.tokens(pieces)
        return found

    def _opened(self, flow: _Flow) -> Amount:
        """What opens the assistant's turn here, if a turn has just closed."""
        if not flow.role & _CLOSED:
            return ZERO
        flow.role = flow.role & ~_CLOSED | _OPEN
        return Amount(self.sizes.opener)

    def _feed(self, dst: Ctx, rows: Amount, generated: Amount = ZERO) -> None:
        self._at.append((dst, rows, generated, ZERO, [], 0))


def _terms(expr: ast.Expr) -> list[ast.Expr]:
    """The terms of a sum, in order, sums in brackets taken apart."""
    terms: list[ast.Expr] = []
    waiting = [expr]
    while waiting:
        match waiting.pop():
            case ast.Binary(op="+", left=left, right=right):
                waiting += [right, left]
            case term:
                terms.append(term)
    return terms


def _known_pieces(values: Sequence[str | _Value], is_said: bool) -> tuple[Piece, ...] | None:
    """The text of a string's parts; None if some part is not known, or the whole is too large to be written."""
    pieces: list[Piece] = []
    length = 0
    for value in values:
        if isinstance(value, str):
            pieces.append((value, is_said))
        elif value.known:
            try:
                pieces.append((render(value.known[0]), False))
            except EvaluationError:
                return None
        else:
            return None
        length += len(pieces[-1][0])
        if length > MAX_TEXT:
            return None
    return tuple(pieces)


def _is_small(values: Sequence[Any]) -> bool:
    """Whether there are at most `KNOWN` values in `values`, with those inside them."""
    waiting, seen = [values], 0
    while waiting:
        inside = waiting.pop()
        seen += len(inside)
        if seen > KNOWN:
            return False
        waiting.extend(value for value in inside if isinstance(value, tuple | list))
    return True


def levels(count: int, by: int) -> int:
    """How many levels a reduce of `count` items has, `by` at a time."""
    found = 0
    while count > 1:
        count = -(-count // by)
        found += 1
    return found


def _turns(region: Region) -> bool:
    """Whether the thread that runs `region` may write a whole turn in it."""
    stack = [region]
    while stack:
        for node in stack.pop().nodes:
            match node:
                case Write(role="user" | "system" | "assistant"):
                    return True
                case Loop() | Cond():
                    stack.extend(regions(node))
                case _:
                    pass
    return False


def _again(expr: ast.Expr, value: _Value) -> Amount:
    """Tokens of a statement that count as fed again: of a string those of its parts, of anything else the whole."""
    return value.generated if isinstance(expr, ast.Str) else value.again()


def _sum(values: Sequence[_Value]) -> tuple[Amount, Amount]:
    tokens, generated = ZERO, ZERO
    for value in values:
        tokens += value.tokens
        generated += value.generated
    return tokens, generated


def _union(values: Sequence[_Value]) -> _Value:
    if not values:
        return _NONE
    found = values[0]
    for value in values[1:]:
        found = _either(found, value)
    return found


def _either(a: _Value, b: _Value) -> _Value:
    """What holds of a value that is one of the two."""
    if a is b or a == b:
        return a
    fields = None
    if a.fields is not None and b.fields is not None:
        fields = {name: _either(value, b.fields[name]) for name, value in a.fields.items() if name in b.fields}
    return _Value(
        most([a.tokens, b.tokens]),
        most([a.generated, b.generated]),
        _either(a.item, b.item) if a.item is not None and b.item is not None else None,
        fields,
        a.number and b.number,
    )
