"""Passes from graph to graph that keep the meaning: the same tokens in the same views, the same draws, the same events.

Writes are never merged, since each statement is encoded alone; and a fork, map or loop never goes away, even of width
zero or of one round, since it names a place in paths, opens the assistant's turn and is told in events.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from anabranch.compiler.graph import (
    Arm,
    Cond,
    Ctx,
    Fork,
    Graph,
    Let,
    Loop,
    Map,
    Need,
    Node,
    Reduce,
    Region,
    Return,
    after,
)
from anabranch.dsl import ast
from anabranch.dsl.diagnostics import Span
from anabranch.dsl.spec import Value
from anabranch.dsl.values import EvaluationError, evaluate


def fold_constants(graph: Graph) -> Graph:
    """Work out what needs no run.

    let x = (2 + 3)   -->   let x = 5
    """

    def fold_node(node: Node) -> Node:
        match node:
            case Let(value=value) | Return(value=value):
                return replace(node, value=_folded(value))
            case Cond(cond=cond) | Need(cond=cond):
                return replace(node, cond=_folded(cond))
            case Fork(width=width) if width is not None:
                return replace(node, width=_folded(width))
            case Loop(until=until) if until is not None:
                return replace(node, until=_folded(until))
            case _:
                return node

    return _each_region(graph, lambda region: replace(region, nodes=tuple(map(fold_node, region.nodes))))


def drop_dead_arms(graph: Graph) -> Graph:
    """Put the arm that a constant condition takes in the place of the condition.

    %2 = cond %1 true then(%3) { %4 = write %3 "a" }   -->   %2 = write %1 "a"
    """
    return _each_region(graph, _without_dead_arms)


def drop_unreached(graph: Graph) -> Graph:
    """Drop what stands after a `return`, but for names that a join might read.

    return x; %2 = write %1 "a"   -->   return x
    """

    def drop(region: Region) -> Region:
        ctx = region.entry
        for place, node in enumerate(region.nodes):
            ctx = after(node, ctx)
            if _always_returns(node):
                return Region(region.entry, region.nodes[: place + 1], ctx)
        return region

    return _each_region(graph, drop)


def merge_arms(graph: Graph) -> Graph:
    """Make one arm of equal unlabelled ones in a row; branch indices stay as they were.

    arm { %3 = decode %2 max=9 } arm { %5 = decode %4 max=9 }   -->   arm x2 { %3 = decode %2 max=9 }
    """

    def merge(node: Node) -> Node:
        if not isinstance(node, Fork) or len(node.arms) == 1 or node.width is not None:
            return node
        arms: list[Arm] = []
        last: Hashable = None
        for arm in node.arms:
            shape = _shape(replace(arm, multiplicity=1))
            if arms and arm.label is None and shape == last:
                arms[-1] = replace(arms[-1], multiplicity=arms[-1].multiplicity + arm.multiplicity)
            else:
                arms.append(arm)
            last = shape
        return node if len(arms) == len(node.arms) else replace(node, arms=tuple(arms))

    return _each_region(graph, lambda region: replace(region, nodes=tuple(map(merge, region.nodes))))


def _each_region(graph: Graph, change: Callable[[Region], Region]) -> Graph:
    """`change` every region, those inside a region before it."""

    def walk(region: Region) -> Region:
        return change(replace(region, nodes=tuple(map(inside, region.nodes))))

    def inside(node: Node) -> Node:
        match node:
            case Fork(arms=arms):
                return replace(node, arms=tuple(replace(arm, region=walk(arm.region)) for arm in arms))
            case Map(region=region) | Reduce(region=region) | Loop(region=region):
                return replace(node, region=walk(region))
            case Cond(then=then, orelse=orelse):
                return replace(node, then=walk(then), orelse=None if orelse is None else walk(orelse))
            case _:
                return node

    plans = {name: replace(plan, region=walk(plan.region)) for name, plan in graph.plans.items()}
    return Graph(graph.main, plans)


def _folded(expr: ast.Expr) -> ast.Expr:
    """`expr` as a literal if it reads no name, calls no function of the host and has a value."""
    if not isinstance(expr, ast.Unary | ast.Binary | ast.Index | ast.Apply) or ast.names_in(expr):
        return expr
    try:
        return _literal(evaluate(expr, {}, _no_host), expr.span)
    except EvaluationError:
        # It fails when it is run, and says so then.
        return expr


def _no_host(function: str, args: list[Value]) -> Value:
    raise EvaluationError(f"`{function}` is the host's")


def _literal(value: Value, span: Span) -> ast.Expr:
    match value:
        case bool():
            return ast.Bool(value, span)
        case int():
            return ast.Int(value, span)
        case float():
            return ast.Float(value, span)
        case str():
            return ast.Str((value,) if value else (), span)
        case list():
            return ast.List(tuple(_literal(item, span) for item in value), span)
        case _:
            raise EvaluationError("no literal stands for this value")


def _without_dead_arms(region: Region) -> Region:
    sites = {node.site for node in region.nodes}
    nodes: list[Node] = []
    ctx = region.entry
    changed = False
    for node in region.nodes:
        taken: Region | None = None
        dead = isinstance(node, Cond) and isinstance(node.cond, ast.Bool)
        if isinstance(node, Cond) and isinstance(node.cond, ast.Bool):
            taken = node.then if node.cond.value else node.orelse
            inner = {each.site for each in taken.nodes} if taken is not None else set()
            # A name of the arm may be bound again after it, where the arm's own is not visible.
            dead = not inner & sites
        if dead:
            changed = True
            for each in taken.nodes if taken is not None else ():
                nodes.append(_moved(each, ctx))
                ctx = after(nodes[-1], ctx)
                sites.add(each.site)
        else:
            nodes.append(_moved(node, ctx))
            ctx = after(nodes[-1], ctx)
    return Region(region.entry, tuple(nodes), ctx) if changed else region


def _moved(node: Node, src: Ctx) -> Node:
    """`node` where the context is `src`."""
    if isinstance(node, Let | Need | Return) or node.src == src:
        return node
    return replace(node, src=src)


def _always_returns(node: Node) -> bool:
    match node:
        case Return():
            return True
        case Cond(then=then, orelse=Region() as orelse):
            return all(any(map(_always_returns, region.nodes)) for region in (then, orelse))
        case Loop(region=region):
            return any(map(_always_returns, region.nodes))
        case _:
            return False


def _shape(part: Any) -> Hashable:
    """What equal arms share: everything but where they stand in the text and which contexts they thread."""
    match part:
        case Span():
            return None
        case tuple() | list():
            return tuple(_shape(each) for each in part)
        case dict():
            return tuple((name, _shape(each)) for name, each in part.items())
        case _ if is_dataclass(part):
            skipped = ("src", "dst", "entry", "exit", "span")
            return type(part), *(_shape(getattr(part, f.name)) for f in fields(part) if f.name not in skipped)
        case _:
            return part  # type: ignore[no-any-return]
