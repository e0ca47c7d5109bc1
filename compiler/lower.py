"""AST to graph: contexts are threaded through the statements, options are read, and plans that are called come along.

    { text("a"); x = gen(max=3); }   -->   region(%0) { %1 = write %0 "a"; %2 = decode %1 max=3 } -> %2

Nothing is decided here that a person might disagree with: equal branches written with a width are one arm with a
multiplicity because they are written so, and every other rewriting is a pass of `simplify`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from anabranch.compiler import graph
from anabranch.compiler.graph import Arm, Ctx, Graph, PlanGraph, Region
from anabranch.dsl import ast, options
from anabranch.dsl.check import Checked
from anabranch.dsl.scope import bound_name
from anabranch.dsl.sites import arm_prefix, sites


def lower(checked: Checked, name: str | None = None) -> Graph:
    """The graph of plan `name` (the last of the file when None) and of every plan that it can reach.

    Raises KeyError if the program has no such plan.
    """
    program = checked.program
    main = program.plan(name)
    plans: dict[str, PlanGraph] = {}
    waiting = [main.name]
    while waiting:
        called = waiting.pop()
        if called not in plans:
            lowering = _Lowering(checked, program.plan(called))
            plans[called] = lowering.plan()
            waiting.extend(lowering.calls)
    return Graph(main.name, plans)


class _Lowering:
    """Lowers one plan. `calls`: the plans that it calls."""

    def __init__(self, checked: Checked, plan: ast.PlanDef) -> None:
        self.checked = checked
        self.definition = plan
        self.calls: list[str] = []
        self._contexts = 0

    def plan(self) -> PlanGraph:
        plan = self.definition
        params = tuple(param.name for param in plan.params)
        return PlanGraph(
            name=plan.name,
            params=params,
            region=self._block(plan.body, _Scope(None, *params)),
            bounds=tuple(param.bound for param in plan.params),
            limits=options.limits(plan.options, kind="plan"),
            depth=options.plan_depth(plan),
            span=plan.span,
        )

    def _fresh(self) -> Ctx:
        self._contexts += 1
        return self._contexts - 1

    def _block(self, block: ast.Block, scope: _Scope, prefix: str = "") -> Region:
        """Lower a block; the names that it binds are added to `scope`."""
        entry = ctx = self._fresh()
        nodes: list[graph.Node] = []
        for place, (stmt, site) in enumerate(zip(block.stmts, sites(block, prefix), strict=True)):
            following = block.stmts[place + 1] if place + 1 < len(block.stmts) else None
            node = self._statement(stmt, ctx, site, place, following, scope)
            nodes.append(node)
            ctx = graph.after(node, ctx)
            name = bound_name(stmt)
            if name is not None:
                scope.names.add(name)
        return Region(entry, tuple(nodes), ctx)

    def _statement(
        self, stmt: ast.Stmt, src: Ctx, site: str, place: int, following: ast.Stmt | None, scope: _Scope
    ) -> graph.Node:
        match stmt:
            case ast.Write(role=role, value=value):
                hold = role == "text" and _continues(following)
                return graph.Write(src, self._fresh(), site, role, value, hold, stmt.span)
            case ast.Gen(name=name, prompt=prompt):
                spec = options.gen_spec(stmt, self.definition)
                return graph.Decode(src, self._fresh(), site, name, prompt, spec, stmt.span)
            case ast.Fork():
                return self._fork(stmt, src, site, scope)
            case ast.Branches(name=name):
                limits, join = options.limits(stmt.options, kind="branches"), options.join_spec(stmt.join)
                arms = tuple(self._arm(branch, scope) for branch in stmt.branches)
                return graph.Fork(src, self._fresh(), site, name, None, None, arms, join, limits, stmt.span)
            case ast.Map():
                return self._map(stmt, src, site, scope)
            case ast.Reduce(name=name, item=item, over=over):
                limits, by = options.limits(stmt.options, kind="reduce"), options.reduce_by(stmt.options)
                region = self._block(stmt.body, _Scope(scope, item))
                most = self.checked.most_of(stmt)
                return graph.Reduce(src, self._fresh(), site, name, item, over, most, by, region, limits, stmt.span)
            case ast.Loop(body=body, until=until):
                carried = tuple(dict.fromkeys(name for name in _bound_in(body) if name in scope))
                region = self._block(body, scope)
                rounds = options.loop_rounds(stmt)
                return graph.Loop(src, self._fresh(), site, rounds, region, until, carried, stmt.span)
            case ast.If():
                return self._cond(stmt, src, site, place, scope)
            case ast.Need(cond=cond):
                return graph.Need(site, cond, stmt.span)
            case ast.Return(value=value):
                return graph.Return(site, value, stmt.span)
            case ast.Let(name=name, value=value):
                return graph.Let(site, name, value, stmt.span)
            case ast.Call(name=name, plan=plan):
                self.calls.append(plan)
                args, limits = self._arguments(stmt), options.limits(stmt.options, kind="call")
                return graph.Call(src, self._fresh(), site, name, plan, args, limits, stmt.span)
            case ast.Expand(name=name, prompt=prompt):
                return graph.Expand(src, self._fresh(), site, name, prompt, stmt.span)
            case _:
                assert_never(stmt)

    def _fork(self, stmt: ast.Fork, src: Ctx, site: str, scope: _Scope) -> graph.Fork:
        limits, join = options.limits(stmt.options, kind="fork"), options.join_spec(stmt.join)
        region = self._block(stmt.body, _Scope(scope, stmt.index))
        expr = None if options.fork_width(stmt) is not None else stmt.width
        arms = (Arm(region, self.checked.most_of(stmt), span=stmt.span),)
        return graph.Fork(src, self._fresh(), site, stmt.name, stmt.index, expr, arms, join, limits, stmt.span)

    def _arm(self, branch: ast.Branch, scope: _Scope) -> Arm:
        region = self._block(branch.body, _Scope(scope))
        hold = branch.prompt is not None and _continues(branch.body.stmts[0] if branch.body.stmts else None)
        limits = options.limits(branch.options, kind="branch")
        return Arm(region, 1, branch.label, branch.prompt, hold, limits, branch.span)

    def _map(self, stmt: ast.Map, src: Ctx, site: str, scope: _Scope) -> graph.Map:
        limits, join = options.limits(stmt.options, kind="map"), options.join_spec(stmt.join)
        region = self._block(stmt.body, _Scope(scope, stmt.item, stmt.index))
        most = self.checked.most_of(stmt)
        return graph.Map(
            src, self._fresh(), site, stmt.name, stmt.index, stmt.item, stmt.over, most, region, join, limits, stmt.span
        )

    def _cond(self, stmt: ast.If, src: Ctx, site: str, place: int, scope: _Scope) -> graph.Cond:
        in_then, in_else = _Scope(scope), _Scope(scope)
        then = self._block(stmt.then, in_then, arm_prefix(site, place, orelse=False))
        orelse = None
        if stmt.orelse is not None:
            orelse = self._block(stmt.orelse, in_else, arm_prefix(site, place, orelse=True))
        scope.names |= in_then.names & in_else.names
        return graph.Cond(src, self._fresh(), site, stmt.cond, then, orelse, stmt.span)

    def _arguments(self, call: ast.Call) -> tuple[tuple[str, ast.Expr], ...]:
        places = iter([param.name for param in self.checked.program.plan(call.plan).params])
        return tuple((arg.name or next(places), arg.value) for arg in call.args)


class _Scope:
    """The names in scope in a block, with those of the blocks around it."""

    __slots__ = ("names", "outer")

    def __init__(self, outer: _Scope | None, *names: str | None) -> None:
        self.outer = outer
        self.names = {name for name in names if name is not None}

    def __contains__(self, name: str) -> bool:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return True
            scope = scope.outer
        return False


def _continues(stmt: ast.Stmt | None) -> bool:
    """Whether the statement is a `gen` without a prompt, which goes on from the text before it."""
    return isinstance(stmt, ast.Gen) and stmt.prompt is None


def _bound_in(block: ast.Block) -> Iterator[str]:
    """The names that a block binds in its own scope, in order, those of its `loop`s and `if`s included."""
    for stmt in block.stmts:
        name = bound_name(stmt)
        if name is not None:
            yield name
        match stmt:
            case ast.Loop(body=body):
                yield from _bound_in(body)
            case ast.If(then=then, orelse=orelse):
                yield from _bound_in(then)
                if orelse is not None:
                    yield from _bound_in(orelse)
            case _:
                pass
