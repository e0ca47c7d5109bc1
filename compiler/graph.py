"""The graph: a plan as structured regions, with contexts threaded as single-use values.

    graph  = Graph(PlanGraph+)
    plan   = PlanGraph(name, params, options, region)
    region = Region(entry: ctx, node*, exit: ctx)
    node   = Write(ctx -> ctx, role, value)
           | Decode(ctx -> ctx, prompt?, GenSpec)
           | Fork(ctx -> ctx, arm+, JoinSpec, Limits)         width known at compile time, or an expression under `upto`
           | Map(ctx -> ctx, over, region, JoinSpec, Limits)
           | Reduce(ctx -> ctx, over, by, region, Limits)
           | Loop(ctx -> ctx, rounds, region, until?)
           | Cond(ctx -> ctx, cond, region, region?)
           | Call(ctx -> ctx, plan, arg*, Limits)
           | Expand(ctx -> ctx, prompt?)
           | Let(name, value) | Need(cond) | Return(value)
    arm    = Arm(label?, prompt?, region, multiplicity, Limits)

A context is produced once and used once, except that a `Fork`, `Map`, `Reduce` or `Call` hands its own to every
branch. Identical branches are one arm with a multiplicity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from anabranch.dsl.ast import Expr
from anabranch.dsl.diagnostics import NOWHERE, Span
from anabranch.dsl.spec import GenSpec, JoinSpec, Limits

Ctx: TypeAlias = int


@dataclass(frozen=True, slots=True)
class Write:
    """Known tokens. `hold_space`: the next node is a `Decode` without a prompt, so one trailing space is held back."""

    src: Ctx
    dst: Ctx
    site: str
    role: Literal["text", "user", "system", "assistant"]
    value: Expr
    hold_space: bool = False
    span: Span = NOWHERE


@dataclass(frozen=True, slots=True)
class Decode:
    """A `gen`: its prompt (if any) is prefilled, then at most `spec.max_tokens` tokens are drawn."""

    src: Ctx
    dst: Ctx
    site: str
    name: str | None
    prompt: Expr | None
    spec: GenSpec
    span: Span = NOWHERE


@dataclass(frozen=True, slots=True)
class Arm:
    """`multiplicity` equal branches. Branch indices run over the arms of a fork in order.

    hold_space: the branch goes on with a `Decode` without a prompt, so one trailing space of `prompt` is held back
    """

    region: Region
    multiplicity: int = 1
    label: str | None = None
    prompt: Expr | None = None
    hold_space: bool = False
    limits: Limits = field(default_factory=Limits)
    span: Span = NOWHERE


@dataclass(frozen=True, slots=True)
class Fork:
    """`width`: None where the arms say it; else an int expression, at most the sole arm's multiplicity."""

    src: Ctx
    dst: Ctx
    site: str
    name: str | None
    index: str | None
    width: Expr | None
    arms: tuple[Arm, ...]
    join: JoinSpec
    limits: Limits
    span: Span = NOWHERE


@dataclass(frozen=True, slots=True)
class Map:
    """One branch per item of `over`, of which there are at most `most` (from a type's bound or `upto`)."""

    src: Ctx
    dst: Ctx
    site: str
    name: str | None
    index: str | None
    item: str
    over: Expr
    most: int
    region: Region
    join: JoinSpec
    limits: Limits
    span: Span = NOWHERE


@dataclass(frozen=True, slots=True)
class Reduce:
    """Groups of `by` items, level by level, until one value is left. A group of one passes through undecoded."""

    src: Ctx
    dst: Ctx
    site: str
    name: str | None
    item: str
    over: Expr
    most: int
    by: int
    region: Region
    limits: Limits
    span: Span = NOWHERE


@dataclass(frozen=True, slots=True)
class Loop:
    """`region` runs at most `rounds` times, until `until` holds after a round. `carried`: outer names it rebinds."""

    src: Ctx
    dst: Ctx
    site: str
    rounds: int
    region: Region
    until: Expr | None
    carried: tuple[str, ...] = ()
    span: Span = NOWHERE


@dataclass(frozen=True, slots=True)
class Cond:
    src: Ctx
    dst: Ctx
    site: str
    cond: Expr
    then: Region
    orelse: Region | None
    span: Span = NOWHERE


@dataclass(frozen=True, slots=True)
class Call:
    """Another plan of the graph (or this one again), as a fork of one with `drop`."""

    src: Ctx
    dst: Ctx
    site: str
    name: str | None
    plan: str
    args: tuple[tuple[str, Expr], ...]
    limits: Limits
    span: Span = NOWHERE


@dataclass(frozen=True, slots=True)
class Expand:
    src: Ctx
    dst: Ctx
    site: str
    name: str | None
    prompt: Expr | None
    span: Span = NOWHERE


@dataclass(frozen=True, slots=True)
class Let:
    site: str
    name: str
    value: Expr
    span: Span = NOWHERE


@dataclass(frozen=True, slots=True)
class Need:
    site: str
    cond: Expr
    span: Span = NOWHERE


@dataclass(frozen=True, slots=True)
class Return:
    site: str
    value: Expr
    span: Span = NOWHERE


Node: TypeAlias = Write | Decode | Fork | Map | Reduce | Loop | Cond | Call | Expand | Let | Need | Return


def after(node: Node, ctx: Ctx) -> Ctx:
    """The context after `node`, which stands where the context is `ctx`."""
    match node:
        case Let() | Need() | Return():
            return ctx
        case _:
            return node.dst


@dataclass(frozen=True, slots=True)
class Region:
    entry: Ctx
    nodes: tuple[Node, ...]
    exit: Ctx


@dataclass(frozen=True, slots=True)
class PlanGraph:
    """`limits.budget` is the plan's budget; `depth` the self-calls it permits (0 for none).

    bounds: of each parameter, what it states about itself (`text(2000)`, `list(16)`, `int`), or None
    """

    name: str
    params: tuple[str, ...]
    region: Region
    bounds: tuple[Expr | None, ...] = ()
    limits: Limits = field(default_factory=Limits)
    depth: int = 0
    span: Span = NOWHERE


@dataclass(frozen=True, slots=True)
class Graph:
    """Every plan that `main` can reach, `main` included."""

    main: str
    plans: Mapping[str, PlanGraph]


def regions(node: Node) -> tuple[Region, ...]:
    """The regions inside a node, in order of the text."""
    match node:
        case Fork(arms=arms):
            return tuple(arm.region for arm in arms)
        case Map(region=region) | Reduce(region=region) | Loop(region=region):
            return (region,)
        case Cond(then=then, orelse=None):
            return (then,)
        case Cond(then=then, orelse=Region() as orelse):
            return (then, orelse)
        case _:
            return ()


def walk(region: Region) -> Iterator[tuple[Region, int]]:
    """Every node of a region and of those inside it, as (region, place)."""
    stack = [region]
    while stack:
        current = stack.pop()
        for place, node in enumerate(current.nodes):
            yield current, place
            stack.extend(regions(node))


def callees_first(graph: Graph) -> list[str]:
    """The plans of `graph`, each after those that it calls. Raises ValueError if plans call each other in a circle,
    or one calls itself that permits no depth."""
    calls: dict[str, list[str]] = {}
    for name, plan in graph.plans.items():
        called = dict.fromkeys(
            node.plan for region, place in walk(plan.region) if isinstance(node := region.nodes[place], Call)
        )
        if name in called and plan.depth < 1:
            raise ValueError(f"`{name}` calls itself and permits no depth")
        calls[name] = [other for other in called if other != name and other in graph.plans]
    order: list[str] = []
    state: dict[str, Literal["open", "done"]] = {}
    for start in graph.plans:
        stack = [start]
        while stack:
            name = stack[-1]
            if state.get(name) is None:
                state[name] = "open"
                for other in reversed(calls[name]):
                    if state.get(other) == "open":
                        raise ValueError(f"`{name}` and `{other}` call each other")
                    if other not in state:
                        stack.append(other)
            else:
                stack.pop()
                if state[name] == "open":
                    state[name] = "done"
                    order.append(name)
    return order
