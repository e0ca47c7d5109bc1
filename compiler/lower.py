"""AST to graph: contexts are threaded through the statements, options are read, and plans that are called come along.

    { text("a"); x = gen(max=3); }   -->   region(%0) { %1 = write %0 "a"; %2 = decode %1 max=3 } -> %2

Nothing is decided here that a person might disagree with: equal branches written with a width are one arm with a
multiplicity because they are written so, and every other rewriting is a pass of `simplify`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import assert_never

from anabranch.compiler import graph, lengths
from anabranch.compiler.graph import Arm, Ctx, Graph, PlanGraph, Region
from anabranch.compiler.lengths import ListOf, Shape
from anabranch.dsl import ast, options
from anabranch.dsl.diagnostics import Diagnostic, PlanError
from anabranch.dsl.sites import arm_prefix, bound_name, sites
from anabranch.dsl.spec import JoinSpec, Limits


def lower(program: ast.Program, name: str | None = None) -> Graph:
    """The graph of plan `name` (the last of the file when None) and of every plan that it can reach.

    `program` must have passed the checker. Raises KeyError if it has no such plan, and PlanError
    (`unbounded-width`) for a fork, map or reduce whose width nothing bounds.
    """
    main = program.plan(name)
    reached = _reached(program, main)
    plans: dict[str, PlanGraph] = {}
    returns: dict[str, Shape] = {}
    # Plans stand before their callers in the file, so that the shape of what a call returns is known.
    for plan in program.plans:
        if plan.name in reached:
            lowering = _Lowering(program, plan, returns)
            plans[plan.name] = lowering.plan()
            returns[plan.name] = lowering.returned
    return Graph(main.name, plans)


def _reached(program: ast.Program, main: ast.PlanDef) -> set[str]:
    reached = {main.name}
    waiting = [main.body]
    while waiting:
        for stmt in waiting.pop().stmts:
            match stmt:
                case ast.Call(plan=name) if name not in reached:
                    reached.add(name)
                    waiting.append(program.plan(name).body)
                case _:
                    waiting.extend(_blocks(stmt))
    return reached


def _blocks(stmt: ast.Stmt) -> Iterator[ast.Block]:
    match stmt:
        case ast.Fork(body=body) | ast.Map(body=body) | ast.Reduce(body=body) | ast.Loop(body=body):
            yield body
        case ast.Branches(branches=branches):
            yield from (branch.body for branch in branches)
        case ast.If(then=then, orelse=orelse):
            yield then
            if orelse is not None:
                yield orelse
        case _:
            pass


class _Scope(Mapping[str, Shape]):
    """The names in scope in a block, with those of the blocks around it, and the shape of each."""

    __slots__ = ("names", "outer")

    def __init__(self, outer: _Scope | None, names: Mapping[str, Shape] | None = None) -> None:
        self.outer = outer
        self.names: dict[str, Shape] = dict(names or {})

    def __getitem__(self, name: str) -> Shape:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        yield from self.names
        if self.outer is not None:
            yield from (name for name in self.outer if name not in self.names)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def rebind(self, name: str, shape: Shape) -> None:
        """Give a name that an outer block binds, or else a new one, this shape."""
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                scope.names[name] = shape
                return
            scope = scope.outer
        self.names[name] = shape


class _Lowering:
    """Lowers one plan. `returned`: the shape of what it returns, once it is lowered."""

    def __init__(self, program: ast.Program, plan: ast.PlanDef, returns: Mapping[str, Shape]) -> None:
        self.program = program
        self.definition = plan
        self.callees = returns
        self.returned: Shape = None
        self._contexts = 0

    def plan(self) -> PlanGraph:
        plan = self.definition
        scope = _Scope(None, {param.name: lengths.of_param(param.bound) for param in plan.params})
        region, self.returned = self._thread(plan.body, scope)
        return PlanGraph(
            name=plan.name,
            params=tuple(param.name for param in plan.params),
            region=region,
            bounds=tuple(param.bound for param in plan.params),
            limits=options.limits(plan.options, kind="plan"),
            depth=options.plan_depth(plan),
            span=plan.span,
        )

    def _fresh(self) -> Ctx:
        self._contexts += 1
        return self._contexts - 1

    def _thread(self, block: ast.Block, scope: _Scope) -> tuple[Region, Shape]:
        """The region of a thread, and the shape of what it returns."""
        returned: list[Shape] = []
        region = self._block(block, scope, returned)
        return region, lengths.union(returned)

    def _block(self, block: ast.Block, scope: _Scope, returned: list[Shape], prefix: str = "") -> Region:
        """Lower a block; the names that it binds are added to `scope`."""
        entry = ctx = self._fresh()
        nodes: list[graph.Node] = []
        for place, (stmt, site) in enumerate(zip(block.stmts, sites(block, prefix), strict=True)):
            following = block.stmts[place + 1] if place + 1 < len(block.stmts) else None
            shape: Shape = None
            node: graph.Node
            match stmt:
                case ast.Write(role=role, value=value):
                    hold = role == "text" and _continues(following)
                    node = graph.Write(ctx, self._fresh(), site, role, value, hold, stmt.span)
                case ast.Gen(name=name, prompt=prompt):
                    spec = options.gen_spec(stmt, self.definition)
                    node = graph.Decode(ctx, self._fresh(), site, name, prompt, spec, stmt.span)
                    shape = lengths.of_gen(spec.type)
                case ast.Fork():
                    node, shape = self._fork(stmt, ctx, site, scope)
                case ast.Branches():
                    node, shape = self._branches(stmt, ctx, site, scope)
                case ast.Map():
                    node, shape = self._map(stmt, ctx, site, scope)
                case ast.Reduce():
                    node, shape = self._reduce(stmt, ctx, site, scope)
                case ast.Loop():
                    node = self._loop(stmt, ctx, site, scope, returned)
                case ast.If():
                    node = self._cond(stmt, ctx, site, place, scope, returned)
                case ast.Need(cond=cond):
                    node = graph.Need(site, cond, stmt.span)
                case ast.Return(value=value):
                    node = graph.Return(site, value, stmt.span)
                    returned.append(lengths.of_expr(value, scope))
                case ast.Let(name=name, value=value):
                    node, shape = graph.Let(site, name, value, stmt.span), lengths.of_expr(value, scope)
                case ast.Call(name=name, plan=plan):
                    limits = options.limits(stmt.options, kind="call")
                    args = self._arguments(stmt)
                    node = graph.Call(ctx, self._fresh(), site, name, plan, args, limits, stmt.span)
                    shape = self.callees.get(plan)
                case ast.Expand(name=name, prompt=prompt):
                    node = graph.Expand(ctx, self._fresh(), site, name, prompt, stmt.span)
                case _:
                    assert_never(stmt)
            nodes.append(node)
            ctx = graph.after(node, ctx)
            bound = bound_name(stmt)
            if bound is not None:
                scope.rebind(bound, shape)
        return Region(entry, tuple(nodes), ctx)

    def _fork(self, stmt: ast.Fork, src: Ctx, site: str, scope: _Scope) -> tuple[graph.Fork, Shape]:
        limits, join = options.limits(stmt.options, kind="fork"), options.join_spec(stmt.join)
        inner = _Scope(scope, {stmt.index: None} if stmt.index else None)
        region, returned = self._thread(stmt.body, inner)
        width = options.fork_width(stmt)
        expr = stmt.width if width is None else None
        most = _bounded(limits.upto, "fork", stmt) if width is None else width
        arms = (Arm(region, most, span=stmt.span),)
        node = graph.Fork(src, self._fresh(), site, stmt.name, stmt.index, expr, arms, join, limits, stmt.span)
        return node, _joined(join, {None: returned}, [inner], most, limits, scope)

    def _branches(self, stmt: ast.Branches, src: Ctx, site: str, scope: _Scope) -> tuple[graph.Fork, Shape]:
        limits, join = options.limits(stmt.options, kind="branches"), options.join_spec(stmt.join)
        arms: list[Arm] = []
        scopes: list[_Scope] = []
        returned: dict[str | None, list[Shape]] = {}
        for branch in stmt.branches:
            inner = _Scope(scope)
            region, shape = self._thread(branch.body, inner)
            hold = _continues(branch.body.stmts[0] if branch.body.stmts else None)
            own = options.limits(branch.options, kind="branch")
            arms.append(Arm(region, 1, branch.label, branch.prompt, hold, own, branch.span))
            scopes.append(inner)
            returned.setdefault(branch.label, []).append(shape)
        by_label = {label: lengths.union(found) for label, found in returned.items()}
        node = graph.Fork(src, self._fresh(), site, stmt.name, None, None, tuple(arms), join, limits, stmt.span)
        return node, _joined(join, by_label, scopes, len(arms), limits, scope)

    def _map(self, stmt: ast.Map, src: Ctx, site: str, scope: _Scope) -> tuple[graph.Map, Shape]:
        limits, join = options.limits(stmt.options, kind="map"), options.join_spec(stmt.join)
        over = lengths.of_expr(stmt.over, scope)
        inner = _Scope(scope, {stmt.item: over.item if isinstance(over, ListOf) else None})
        if stmt.index:
            inner.names[stmt.index] = None
        region, returned = self._thread(stmt.body, inner)
        most = _bounded(lengths.most_items(over, limits.upto), "map", stmt)
        node = graph.Map(
            src, self._fresh(), site, stmt.name, stmt.index, stmt.item, stmt.over, most, region, join, limits, stmt.span
        )
        return node, _joined(join, {None: returned}, [inner], most, limits, scope)

    def _reduce(self, stmt: ast.Reduce, src: Ctx, site: str, scope: _Scope) -> tuple[graph.Reduce, Shape]:
        limits, by = options.limits(stmt.options, kind="reduce"), options.reduce_by(stmt.options)
        over = lengths.of_expr(stmt.over, scope)
        item = over.item if isinstance(over, ListOf) else None
        region, returned = self._thread(stmt.body, _Scope(scope, {stmt.item: ListOf(by, item)}))
        most = _bounded(lengths.most_items(over, limits.upto), "reduce", stmt)
        node = graph.Reduce(
            src, self._fresh(), site, stmt.name, stmt.item, stmt.over, most, by, region, limits, stmt.span
        )
        return node, lengths.union([item, returned])

    def _loop(self, stmt: ast.Loop, src: Ctx, site: str, scope: _Scope, returned: list[Shape]) -> graph.Loop:
        carried = tuple(dict.fromkeys(name for name in _bound_in(stmt.body) if name in scope))
        for name in carried:
            # From the second round on the name may hold what the body gives it; only a `gen` is looked up ahead.
            scope.rebind(name, lengths.union([scope[name], *self._gens_of(stmt.body, name)]))
        region = self._block(stmt.body, scope, returned)
        return graph.Loop(src, self._fresh(), site, options.loop_rounds(stmt), region, stmt.until, carried, stmt.span)

    def _gens_of(self, block: ast.Block, name: str) -> Iterator[Shape]:
        for stmt in block.stmts:
            if isinstance(stmt, ast.Gen) and stmt.name == name:
                yield lengths.of_gen(options.gen_spec(stmt, self.definition).type)
            elif bound_name(stmt) == name:
                yield None
            elif isinstance(stmt, ast.Loop | ast.If):
                for inner in _blocks(stmt):
                    yield from self._gens_of(inner, name)

    def _cond(self, stmt: ast.If, src: Ctx, site: str, place: int, scope: _Scope, returned: list[Shape]) -> graph.Cond:
        in_then, in_else = _Scope(scope), _Scope(scope)
        then = self._block(stmt.then, in_then, returned, arm_prefix(site, place, orelse=False))
        orelse = None
        if stmt.orelse is not None:
            orelse = self._block(stmt.orelse, in_else, returned, arm_prefix(site, place, orelse=True))
        for name, shape in in_then.names.items():
            if name in in_else.names:
                scope.names[name] = lengths.union([shape, in_else.names[name]])
        return graph.Cond(src, self._fresh(), site, stmt.cond, then, orelse, stmt.span)

    def _arguments(self, call: ast.Call) -> tuple[tuple[str, ast.Expr], ...]:
        places = iter([param.name for param in self.program.plan(call.plan).params])
        return tuple((arg.name or next(places), arg.value) for arg in call.args)


def _joined(
    join: JoinSpec,
    returned: Mapping[str | None, Shape],
    scopes: list[_Scope],
    width: int,
    limits: Limits,
    outer: _Scope,
) -> Shape:
    """The shape of a join's value, or of its fallback."""
    key: Shape = None
    if join.key is not None and join.kind in ("vote", "quorum"):
        key = lengths.union(scope.get(join.key) for scope in scopes)
    shape = lengths.of_join(join, returned, key, width)
    return shape if limits.fallback is None else lengths.union([shape, lengths.of_expr(limits.fallback, outer)])


def _bounded(most: int | None, kind: str, stmt: ast.Fork | ast.Map | ast.Reduce) -> int:
    if most is None:
        raise PlanError(
            Diagnostic(
                "unbounded-width",
                f"nothing says how wide this `{kind}` can be",
                stmt.span,
                help="write `upto=`, the most there can be",
            )
        )
    return most


def _continues(stmt: ast.Stmt | None) -> bool:
    """Whether the statement is a `gen` without a prompt, which goes on from the text before it."""
    return isinstance(stmt, ast.Gen) and stmt.prompt is None


def _bound_in(block: ast.Block) -> Iterator[str]:
    """The names that a block binds in its own scope, in order, those of its `loop`s and `if`s included."""
    for stmt in block.stmts:
        name = bound_name(stmt)
        if name is not None:
            yield name
        if isinstance(stmt, ast.Loop | ast.If):
            for inner in _blocks(stmt):
                yield from _bound_in(inner)
