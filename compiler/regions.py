"""Names for the regions and nodes of a plan, calls of other plans inlined.

    region = plan | node | node "." arm        solve, solve.answer, prove.p.algebra, solve.if3.then
    node   = region "/" site                   solve/answer, solve.answer/work

A region is where threads that run the same statements are found: a plan's own, the branches of a fork, the arms of an
`if`, the body of a loop. So a name stands for the same statement in every thread that comes to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from anabranch.compiler.graph import Call, Cond, Fork, Graph, Loop, Map, Node, Reduce, Region

MAX_NODES = 20_000
"""Calls are inlined, so a short text may hold very many statements."""


class TooManyNodes(ValueError):
    """The plan has more statements than `MAX_NODES` once its calls are inlined."""


@dataclass(frozen=True, slots=True)
class NamedRegion:
    """A region under its name. plan: whose statements they are; nodes: their names, in order"""

    region: Region
    plan: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NamedNode:
    """A node under its name. region: the name of the one that it stands in

    inside: the names of the regions in it, in order: the arms of a fork, `then` and `else`, a body, a called plan
    """

    node: Node
    region: str
    inside: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Names:
    """Every region and node that the main plan reaches, by name; the first region is the main plan's."""

    regions: Mapping[str, NamedRegion]
    nodes: Mapping[str, NamedNode]


def name_parts(graph: Graph) -> Names:
    """Name every region and node. No plan of `graph` may call itself.

    Raises TooManyNodes.
    """
    regions: dict[str, NamedRegion] = {}
    nodes: dict[str, NamedNode] = {}
    waiting = [(graph.main, graph.plans[graph.main].region, graph.main)]
    while waiting:
        name, region, plan = waiting.pop()
        named: list[str] = []
        for node in region.nodes:
            node_name = f"{name}/{node.site}"
            inside = _inside(graph, node, node_name.replace("/", "."), plan)
            waiting.extend(reversed(inside))
            nodes[node_name] = NamedNode(node, name, tuple(inner for inner, _, _ in inside))
            named.append(node_name)
            if len(nodes) > MAX_NODES:
                raise TooManyNodes(f"more than {MAX_NODES} statements, those of called plans counted at each call")
        regions[name] = NamedRegion(region, plan, tuple(named))
    return Names(regions, nodes)


def _inside(graph: Graph, node: Node, name: str, plan: str) -> list[tuple[str, Region, str]]:
    match node:
        case Fork(arms=(arm,)) if arm.label is None:
            return [(name, arm.region, plan)]
        case Fork(arms=arms):
            return [(f"{name}.{arm.label or place}", arm.region, plan) for place, arm in enumerate(arms)]
        case Map(region=region) | Reduce(region=region) | Loop(region=region):
            return [(name, region, plan)]
        case Cond(then=then, orelse=orelse):
            both = [(f"{name}.then", then, plan)]
            return both if orelse is None else [*both, (f"{name}.else", orelse, plan)]
        case Call(plan=called):
            return [(name, graph.plans[called].region, called)]
        case _:
            return []
