"""What every graph must hold, as named rules. Run after lowering and after every pass.

    one-producer      a context is produced once in its plan: by a node, or as the entry of one region
    used-once         a node takes the context that stands just before it, and a region ends in the last one
    sites-unique      no two nodes of a region share a site
    bounds-present    every number that bounds the plan is there and is at least its least
    joins-possible    a join needs no more branches than there are, and stitches none that is fresh
    keys-bound        a join's key is bound on every path of every branch
    names-defined     an expression reads only names that are bound before it in its scope
    calls-resolve     a call names a plan of the graph and gives each of its parameters once
    calls-end         plans call each other without a cycle, but for a plan that permits itself a depth
    width-of-one-arm  a width that only the run knows belongs to a fork of one arm
    space-held        a held-back space stands before a decode without a prompt

A fault here is the compiler's, not the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from anabranch.compiler.graph import (
    Call,
    Cond,
    Decode,
    Expand,
    Fork,
    Graph,
    Let,
    Loop,
    Map,
    Need,
    Node,
    PlanGraph,
    Reduce,
    Region,
    Return,
    Write,
    after,
    callees_first,
    regions,
    walk,
)
from anabranch.compiler.graph_text import node_line
from anabranch.dsl.ast import Expr, names_in


@dataclass(frozen=True, slots=True)
class Fault:
    """What breaks a rule, and where: the region and the place of a node in it (None: the region as a whole)."""

    what: str
    region: Region
    place: int | None = None


class VerifyError(Exception):
    """The compiler broke one of its own rules. `rule` names it."""

    def __init__(self, rule: str, message: str) -> None:
        self.rule = rule
        super().__init__(message)


Rule: TypeAlias = Callable[[Graph, PlanGraph], Iterator[Fault]]


def verify_graph(graph: Graph, *, stage: str = "graph") -> Graph:
    """Check every rule and return `graph`. `stage` says in the error what was just done. Raises VerifyError."""
    if graph.main not in graph.plans:
        raise VerifyError("calls-resolve", f"after {stage}: the graph has no plan `{graph.main}`")
    for plan in graph.plans.values():
        for name, rule in RULES.items():
            for fault in rule(graph, plan):
                raise VerifyError(name, _report(name, stage, plan, fault))
    return graph


def _report(rule: str, stage: str, plan: PlanGraph, fault: Fault) -> str:
    lines = [f"after {stage}, rule {rule}: {fault.what} (plan `{plan.name}`)"]
    nodes = fault.region.nodes
    around = fault.place if fault.place is not None else 0
    lines.append(f"   region(%{fault.region.entry}) -> %{fault.region.exit}")
    for place in range(max(0, around - 2), min(len(nodes), around + 3)):
        mark = ">>" if place == fault.place else "  "
        lines.append(f"{mark}   {node_line(nodes[place])}")
    return "\n".join(lines)


def _walk(region: Region) -> Iterator[tuple[Region, int, Node]]:
    for current, place in walk(region):
        yield current, place, current.nodes[place]


def _all_regions(region: Region) -> Iterator[Region]:
    stack = [region]
    while stack:
        current = stack.pop()
        yield current
        for node in current.nodes:
            stack.extend(regions(node))


def _one_producer(graph: Graph, plan: PlanGraph) -> Iterator[Fault]:
    produced: set[int] = set()
    for region in _all_regions(plan.region):
        if region.entry in produced:
            yield Fault(f"%{region.entry} is produced twice", region)
        produced.add(region.entry)
        for place, node in enumerate(region.nodes):
            if not isinstance(node, Let | Need | Return):
                if node.dst in produced:
                    yield Fault(f"%{node.dst} is produced twice", region, place)
                produced.add(node.dst)


def _used_once(graph: Graph, plan: PlanGraph) -> Iterator[Fault]:
    for region in _all_regions(plan.region):
        ctx = region.entry
        for place, node in enumerate(region.nodes):
            if not isinstance(node, Let | Need | Return) and node.src != ctx:
                yield Fault(f"%{node.src} is taken where %{ctx} stands", region, place)
            ctx = after(node, ctx)
        if region.exit != ctx:
            yield Fault(f"the region ends in %{region.exit}, not in %{ctx}", region, len(region.nodes) - 1)


def _sites_unique(graph: Graph, plan: PlanGraph) -> Iterator[Fault]:
    for region in _all_regions(plan.region):
        seen: set[str] = set()
        for place, node in enumerate(region.nodes):
            if node.site in seen or not node.site:
                yield Fault(f"the site `{node.site}` is taken", region, place)
            seen.add(node.site)


def _bounds_present(graph: Graph, plan: PlanGraph) -> Iterator[Fault]:
    for region, place, node in _walk(plan.region):
        numbers: list[tuple[str, int | None, int]] = []
        match node:
            case Decode(spec=spec):
                numbers.append(("max", spec.max_tokens, 1))
            case Fork(arms=arms, limits=limits):
                numbers.append(("arms", len(arms), 1))
                numbers.append(("limit", limits.limit, 1))
                numbers.append(("budget", limits.budget, 1))
                for arm in arms:
                    numbers.append(("multiplicity", arm.multiplicity, 1))
                    numbers.append(("retry", arm.limits.retry, 0))
            case Map(most=most, limits=limits):
                numbers += [("most", most, 0), ("limit", limits.limit, 1), ("budget", limits.budget, 1)]
            case Reduce(most=most, by=by, limits=limits):
                numbers += [("most", most, 0), ("by", by, 2), ("limit", limits.limit, 1)]
            case Loop(rounds=rounds):
                numbers.append(("rounds", rounds, 1))
            case _:
                pass
        for name, number, least in numbers:
            if number is not None and number < least:
                yield Fault(f"{name} is {number}, and at least {least} is needed", region, place)


def _joins_possible(graph: Graph, plan: PlanGraph) -> Iterator[Fault]:
    for region, place, node in _walk(plan.region):
        match node:
            case Fork(arms=arms, join=join, limits=limits):
                width = sum(arm.multiplicity for arm in arms)
                fresh = limits.fresh or any(arm.limits.fresh for arm in arms)
            case Map(most=most, join=join, limits=limits):
                width, fresh = most, limits.fresh
            case _:
                continue
        if join.count is not None and join.count > width and not isinstance(node, Map):
            yield Fault(f"{join.kind} needs {join.count} of {width} branches", region, place)
        if join.context == "stitch" and fresh:
            yield Fault("a fresh branch is stitched", region, place)
        if join.kind in ("vote", "quorum", "best") and join.key is None:
            yield Fault(f"{join.kind} has no key", region, place)


def _keys_bound(graph: Graph, plan: PlanGraph) -> Iterator[Fault]:
    for region, place, node in _walk(plan.region):
        match node:
            case Fork(join=join):
                branches = [arm.region for arm in node.arms]
                given = {node.index}
            case Map(join=join):
                branches = [node.region]
                given = {node.index, node.item}
            case _:
                continue
        if join.key is None or (join.kind == "best" and join.key == "logprob"):
            continue
        for branch in branches:
            if join.key not in bound_always(branch) | given:
                yield Fault(f"`{join.key}` is not bound on every path of a branch", region, place)


def bound_always(region: Region) -> set[str]:
    """The names that a region binds in its own scope whichever path is taken."""
    names: set[str] = set()
    for node in region.nodes:
        match node:
            case Decode() | Fork() | Map() | Reduce() | Call() | Expand() | Let():
                if node.name is not None:
                    names.add(node.name)
            case Loop(region=body):
                names |= bound_always(body)
            case Cond(then=then, orelse=orelse):
                if orelse is not None:
                    names |= bound_always(then) & bound_always(orelse)
            case Write() | Need() | Return():
                pass
            case _:
                assert_never(node)
    return names


class _Names:
    """Names in scope, with those of the blocks around."""

    __slots__ = ("bound", "outer")

    def __init__(self, outer: _Names | None, *names: str | None) -> None:
        self.outer = outer
        self.bound = {name for name in names if name is not None}

    def __contains__(self, name: str) -> bool:
        scope: _Names | None = self
        while scope is not None:
            if name in scope.bound:
                return True
            scope = scope.outer
        return False


def _names_defined(graph: Graph, plan: PlanGraph) -> Iterator[Fault]:
    yield from _region_names(plan.region, _Names(None, *plan.params))


def _region_names(region: Region, names: _Names) -> Iterator[Fault]:
    for place, node in enumerate(region.nodes):
        for expr in _reads(node):
            for name in names_in(expr):
                if name not in names:
                    yield Fault(f"`{name}` is read and not bound", region, place)
        match node:
            case Fork(arms=arms, index=index):
                for arm in arms:
                    if arm.prompt is not None:
                        for name in names_in(arm.prompt):
                            if name not in names:
                                yield Fault(f"`{name}` is read and not bound", region, place)
                    yield from _region_names(arm.region, _Names(names, index))
            case Map(region=inner, item=item, index=index):
                yield from _region_names(inner, _Names(names, item, index))
            case Reduce(region=inner, item=item):
                yield from _region_names(inner, _Names(names, item))
            case Loop(region=inner, until=until):
                yield from _region_names(inner, names)
                for name in names_in(until) if until is not None else ():
                    if name not in names:
                        yield Fault(f"`{name}` is read by `until` and not bound", region, place)
            case Cond(then=then, orelse=orelse):
                in_then, in_else = _Names(names), _Names(names)
                yield from _region_names(then, in_then)
                if orelse is not None:
                    yield from _region_names(orelse, in_else)
                names.bound |= in_then.bound & in_else.bound
            case _:
                pass
        match node:
            case Decode() | Fork() | Map() | Reduce() | Call() | Expand() | Let():
                if node.name is not None:
                    names.bound.add(node.name)
            case _:
                pass


def _reads(node: Node) -> Iterator[Expr]:
    """The expressions that a node evaluates where it stands."""
    match node:
        case Write(value=value) | Let(value=value) | Return(value=value):
            yield value
        case Decode(prompt=prompt, spec=spec):
            if prompt is not None:
                yield prompt
            yield from spec.sampling.values()
            if spec.seed is not None:
                yield spec.seed
            if spec.recorded is not None:
                yield spec.recorded
        case Fork(width=width, limits=limits):
            if width is not None:
                yield width
            if limits.fallback is not None:
                yield limits.fallback
        case Map(over=over, limits=limits) | Reduce(over=over, limits=limits):
            yield over
            if limits.fallback is not None:
                yield limits.fallback
        case Cond(cond=cond) | Need(cond=cond):
            yield cond
        case Call(args=args, limits=limits):
            yield from (value for _, value in args)
            if limits.fallback is not None:
                yield limits.fallback
        case Expand(prompt=prompt):
            if prompt is not None:
                yield prompt
        case Loop():
            pass
        case _:
            assert_never(node)


def _calls_resolve(graph: Graph, plan: PlanGraph) -> Iterator[Fault]:
    for region, place, node in _walk(plan.region):
        if isinstance(node, Call):
            callee = graph.plans.get(node.plan)
            if callee is None:
                yield Fault(f"there is no plan `{node.plan}`", region, place)
                continue
            given = [name for name, _ in node.args]
            if len(set(given)) != len(given) or not set(given) <= set(callee.params):
                yield Fault(
                    f"the arguments of `{node.plan}` are {given}, its parameters {callee.params}", region, place
                )
    if plan.bounds and len(plan.bounds) != len(plan.params):
        yield Fault("parameters and their bounds differ in number", plan.region)


def _calls_end(graph: Graph, plan: PlanGraph) -> Iterator[Fault]:
    if plan.name != graph.main:
        return
    try:
        callees_first(graph)
    except ValueError as error:
        yield Fault(str(error), plan.region)


def _width_of_one_arm(graph: Graph, plan: PlanGraph) -> Iterator[Fault]:
    for region, place, node in _walk(plan.region):
        if isinstance(node, Fork) and node.width is not None and len(node.arms) != 1:
            yield Fault("a width that the run decides stands over several arms", region, place)


def _space_held(graph: Graph, plan: PlanGraph) -> Iterator[Fault]:
    def goes_on(region: Region, place: int) -> bool:
        following = region.nodes[place] if place < len(region.nodes) else None
        return isinstance(following, Decode) and following.prompt is None

    for region, place, node in _walk(plan.region):
        match node:
            case Write(hold_space=True) if not goes_on(region, place + 1):
                yield Fault("a space is held back and no decode goes on from it", region, place)
            case Fork(arms=arms):
                for arm in arms:
                    if arm.hold_space and not goes_on(arm.region, 0):
                        yield Fault("an arm holds back a space and no decode goes on from it", region, place)
            case _:
                pass


RULES: dict[str, Rule] = {
    "one-producer": _one_producer,
    "used-once": _used_once,
    "sites-unique": _sites_unique,
    "bounds-present": _bounds_present,
    "joins-possible": _joins_possible,
    "keys-bound": _keys_bound,
    "names-defined": _names_defined,
    "calls-resolve": _calls_resolve,
    "calls-end": _calls_end,
    "width-of-one-arm": _width_of_one_arm,
    "space-held": _space_held,
}
