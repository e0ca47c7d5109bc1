"""What a plan can cost at most, known before it runs.

Every stretch of a thread has a `Cost`, relative to where it starts: stretches in a row add up, a loop multiplies in
closed form, a condition takes the larger of its arms number by number, and a fork puts its branches side by side. So
the work is linear in the text of the plan, whatever its widths, rounds and `max` are.

Two passes: `_Worst` finds what each region may decode if only its own budgets bind it; `_Costs` then finds the rest,
with the budgets of the plan divided as the engine divides them. docs/scheduler.md argues why each bound holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, assert_never

from anabranch.compiler.graph import (
    Arm,
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
    Node,
    PlanGraph,
    Reduce,
    Region,
    Return,
    Write,
    callees_first,
    regions,
)
from anabranch.compiler.graph import Need as NeedNode
from anabranch.compiler.profile import NO_PAGES, Profile, at_once_peak, depth_first_peak, kept_at_join, pages_of
from anabranch.compiler.scheduler import Child, Machine, Need
from anabranch.compiler.sizes import NOTHING, Fed, Feed, Measured, levels
from anabranch.dsl.spec import JoinSpec, Limits


@dataclass(frozen=True, slots=True)
class Cost:
    """The worst case of a stretch of a thread, its branches included.

    decoded: tokens sampled; forced: tokens of recorded gens
    prefilled: rows fed that were not sampled; reprefilled: those of them that the run had generated
    flushed: sampled tokens fed only because a segment seals; idle_feeds: feeds that no draw follows
    path: decoded and forced tokens on the longest chain of dependencies; steps: model calls on it
    pos, view: tokens by which the position, and the view, grow; high: the largest position reached
    *_fed: the same, were nothing decoded (where a budget binds, what is decoded is bounded on its own)
    high_fresh: the largest position of a branch that started from an empty view, which is absolute
    aliased: tokens that enter a view without being fed; per_view: how often the view at the start does
    width: branches that run at once; depth: how deep threads nest below this one; threads: how many there are
    segments: how many segments are written
    seals_first: it has a control point before anything is fed, which flushes a token left unfed
    ends_unfed: whether its last token is sampled and unfed; None where that is as it was at the start
    """

    decoded: int = 0
    forced: int = 0
    prefilled: int = 0
    reprefilled: int = 0
    flushed: int = 0
    idle_feeds: int = 0
    path: int = 0
    steps: int = 0
    overhead_steps: int = 0
    pos: int = 0
    pos_fed: int = 0
    view: int = 0
    view_fed: int = 0
    high: int = 0
    high_fed: int = 0
    high_fresh: int = 0
    aliased: int = 0
    per_view: int = 0
    width: int = 1
    depth: int = 0
    threads: int = 0
    segments: int = 0
    profile: Profile = NO_PAGES
    seals_first: bool = False
    ends_unfed: bool | None = None


NO_COST = Cost()


def in_a_row(costs: Sequence[Cost], page_size: int) -> Cost:
    """The cost of stretches one after another."""
    if len(costs) == 1:
        return costs[0]
    decoded = forced = prefilled = reprefilled = flushed = idle_feeds = path = steps = overhead = 0
    pos = pos_fed = view = view_fed = high = high_fed = high_fresh = aliased = per_view = 0
    width, depth, threads, segments = 1, 0, 0, 0
    profile, seals_first = NO_PAGES, False
    unfed: bool | None = None
    for c in costs:
        flush = 1 if c.seals_first and unfed else 0
        if c.seals_first and unfed is None:
            seals_first = True
        decoded += c.decoded
        forced += c.forced
        prefilled += c.prefilled
        reprefilled += c.reprefilled
        flushed += c.flushed + flush
        idle_feeds += c.idle_feeds
        path += c.path
        steps += c.steps + flush
        overhead += c.overhead_steps + flush
        high = max(high, pos + c.high)
        high_fed = max(high_fed, pos_fed + c.high_fed)
        high_fresh = max(high_fresh, c.high_fresh)
        aliased += c.aliased + c.per_view * view
        per_view += c.per_view
        pos += c.pos
        pos_fed += c.pos_fed
        view += c.view
        view_fed += c.view_fed
        width = max(width, c.width)
        depth = max(depth, c.depth)
        threads += c.threads
        segments += c.segments
        profile = profile.then(c.profile, page_size)
        unfed = unfed if c.ends_unfed is None else c.ends_unfed
    return Cost(
        decoded, forced, prefilled, reprefilled, flushed, idle_feeds, path, steps, overhead, pos, pos_fed, view,
        view_fed, high, high_fed, high_fresh, aliased, per_view, width, depth, threads, segments, profile, seals_first,
        unfed,
    )  # fmt: skip


def repeated(cost: Cost, rounds: int, page_size: int) -> Cost:
    """The cost of a stretch `rounds` times in a row."""
    flush = rounds - 1 if cost.seals_first and cost.ends_unfed else 0
    return Cost(
        decoded=cost.decoded * rounds,
        forced=cost.forced * rounds,
        prefilled=cost.prefilled * rounds,
        reprefilled=cost.reprefilled * rounds,
        flushed=cost.flushed * rounds + flush,
        idle_feeds=cost.idle_feeds * rounds,
        path=cost.path * rounds,
        steps=cost.steps * rounds + flush,
        overhead_steps=cost.overhead_steps * rounds + flush,
        pos=cost.pos * rounds,
        pos_fed=cost.pos_fed * rounds,
        view=cost.view * rounds,
        view_fed=cost.view_fed * rounds,
        high=cost.pos * (rounds - 1) + cost.high,
        high_fed=cost.pos_fed * (rounds - 1) + cost.high_fed,
        high_fresh=cost.high_fresh,
        aliased=cost.aliased * rounds + cost.per_view * cost.view * (rounds * (rounds - 1) // 2),
        per_view=cost.per_view * rounds,
        width=cost.width,
        depth=cost.depth,
        threads=cost.threads * rounds,
        segments=cost.segments * rounds,
        profile=cost.profile.times(rounds, page_size),
        seals_first=cost.seals_first,
        ends_unfed=cost.ends_unfed,
    )


def either(a: Cost, b: Cost) -> Cost:
    """At least the cost of each of two arms."""
    ends = {a.ends_unfed, b.ends_unfed}
    return Cost(
        **{name: max(getattr(a, name), getattr(b, name)) for name in _NUMBERS},
        profile=a.profile.either(b.profile),
        seals_first=a.seals_first or b.seals_first,
        ends_unfed=True if True in ends else None if None in ends else False,
    )


_NUMBERS = (
    "decoded", "forced", "prefilled", "reprefilled", "flushed", "idle_feeds", "path", "steps", "overhead_steps", "pos",
    "pos_fed", "view", "view_fed", "high", "high_fed", "high_fresh", "aliased", "per_view", "width", "depth", "threads",
    "segments",
)  # fmt: skip


def within(cost: Cost, budget: int | None, page_size: int) -> Cost:
    """The cost of a whole thread that may decode at most `budget` tokens."""
    if budget is None or cost.decoded <= budget:
        return cost
    pages = (cost.prefilled + budget) // page_size + cost.segments + 1
    profile = cost.profile
    peak, wide, kept = profile.highest(page_size), profile.widest(page_size), profile.total(page_size)
    if pages < wide:
        # The parts of the profile no longer matter: a thread is used by its peak and what it keeps.
        profile = Profile(0, True, min(peak, pages), pages, min(kept, pages), 0)
    return replace(
        cost,
        decoded=budget,
        path=min(cost.path, cost.forced + budget),
        steps=min(cost.steps, cost.overhead_steps + budget),
        pos=min(cost.pos, cost.pos_fed + budget),
        view=min(cost.view, cost.view_fed + budget),
        high=min(cost.high, cost.high_fed + budget),
        high_fresh=cost.high_fresh,
        profile=profile,
    )


KEPT_LOGITS = 64
"""Up to this many branches keep the logits of their last token until a join that one of them wins; in a wider fork the
winner's last token is fed once more, since a row of logits is as large as the vocabulary."""


@dataclass(frozen=True, slots=True)
class _Branches:
    """Equal branches of a fork: what one costs with its prompt, how many there are, and how they start.

    retry: how often a failed one is run again
    share: what one may decode, all its attempts together
    """

    cost: Cost
    count: int
    fresh: bool = False
    retry: int = 0
    share: int | None = None


def side_by_side(kinds: Sequence[_Branches], join: JoinSpec, joined: Feed, limit: int | None, machine: Machine) -> Cost:
    """The cost of a fork: its branches beside each other, and its join. What opens the turn before it is not in it."""
    size = machine.page_size
    width = sum(kind.count for kind in kinds)
    at_once = width if limit is None else min(limit, width)
    stitch = join.context == "stitch"
    needs = [(Need(k.cost.profile.highest(size), k.cost.profile.total(size) if stitch else 0), k.count) for k in kinds]
    wides = [(Need(k.cost.profile.widest(size), need.kept), k.count) for k, (need, _) in zip(kinds, needs, strict=True)]
    winners = _winners(join, width)
    together = at_once
    if not any(kind.cost.profile.sealed for kind in kinds):
        # Branches without control points hold a lane from their start to their end.
        together = min(at_once, machine.lanes)
    decoded = forced = prefilled = reprefilled = flushed = idle_feeds = aliased = per_view = threads = segments = 0
    for kind in kinds:
        c, runs = kind.cost, kind.count * (1 + kind.retry)
        decoded += kind.count * _least(c.decoded * (1 + kind.retry), kind.share)
        forced += c.forced * runs
        prefilled += c.prefilled * runs
        reprefilled += c.reprefilled * runs
        flushed += c.flushed * runs
        idle_feeds += (c.idle_feeds + stitch) * runs
        aliased += c.aliased * runs
        per_view += 0 if kind.fresh else (1 + c.per_view) * runs
        threads += (1 + c.threads) * kind.count
        segments += (1 + c.segments) * kind.count
    paths: list[tuple[int, int]] = []
    lasts: list[tuple[int, int]] = []
    for k in kinds:
        runs, drawn = 1 + k.retry, _least(k.cost.decoded * (1 + k.retry), k.share)
        paths.append((min(k.cost.path * runs, k.cost.forced * runs + drawn), k.count))
        lasts.append((min(k.cost.steps * runs, k.cost.overhead_steps * runs + drawn), k.count))
    path, steps = _limited(paths, at_once), _limited(lasts, at_once)
    overhead = _limited([(k.cost.overhead_steps * (1 + k.retry), k.count) for k in kinds], at_once)
    pos = pos_fed = view = view_fed = 0
    flushes = 0
    if stitch:
        views = [(k.cost.view, k.count) for k in kinds]
        view, view_fed = _largest(views, winners), _largest([(k.cost.view_fed, k.count) for k in kinds], winners)
        taken = winners if join.positions == "sum" else 1
        pos = _largest([(k.cost.pos, k.count) for k in kinds], taken)
        pos_fed = _largest([(k.cost.pos_fed, k.count) for k in kinds], taken)
        flushes = min(winners, sum(k.count for k in kinds if k.cost.ends_unfed))
        if winners == 1 and width > KEPT_LOGITS:
            flushes = 1
        aliased += view
    elif join.context == "text":
        pos = pos_fed = view = view_fed = joined.rows
    join_steps = pages_of(flushes, machine.chunk) + pages_of(joined.rows, machine.chunk)
    kept = kept_at_join(needs, winners) if stitch else 0
    tail = joined.rows if join.context == "text" else 0
    running = sorted(((k.cost.width, k.count) for k in kinds), reverse=True)
    return Cost(
        decoded=decoded,
        forced=forced,
        prefilled=prefilled + joined.rows,
        reprefilled=reprefilled + joined.generated,
        flushed=flushed + flushes,
        idle_feeds=idle_feeds + 1 + (1 if flushes else 0),
        path=path,
        steps=steps + join_steps,
        overhead_steps=overhead + join_steps,
        pos=pos,
        pos_fed=pos_fed,
        view=view,
        view_fed=view_fed,
        high=max([pos, *(k.cost.high for k in kinds if not k.fresh)]),
        high_fed=max([pos_fed, *(k.cost.high_fed for k in kinds if not k.fresh)]),
        high_fresh=max([0, *(k.cost.high_fresh for k in kinds), *(k.cost.high for k in kinds if k.fresh)]),
        aliased=aliased,
        per_view=per_view,
        width=max(1, _largest(running, at_once)),
        depth=1 + max((k.cost.depth for k in kinds), default=0) if width else 0,
        threads=threads,
        segments=segments + 1,
        profile=Profile(0, True, depth_first_peak(needs), at_once_peak(wides, together), kept, tail),
        seals_first=True,
        ends_unfed=False,
    )


def _winners(join: JoinSpec, width: int) -> int:
    """The most branches that a join stitches."""
    match join.kind:
        case "all":
            return width
        case "first":
            return min(join.count or 1, width)
        case "vote" | "best" | "quorum":
            return min(1, width)
        case _:
            assert_never(join.kind)


def _least(value: int, bound: int | None) -> int:
    return value if bound is None else min(value, bound)


def _limited(works: Sequence[tuple[int, int]], at_once: int) -> int:
    """How long branches take that run `at_once` at a time: at most (work - longest) / at_once + longest (Graham 1969).

    works: (length, how many). Where each is at most the longest, ceil(count / at_once) rounds of it are also enough.
    """
    count = sum(n for _, n in works)
    longest = max((length for length, n in works if n), default=0)
    if at_once >= count:
        return longest
    work = sum(length * n for length, n in works)
    return min((work - longest) // at_once + longest, -(-count // at_once) * longest)


def _largest(values: Sequence[tuple[int, int]], count: int) -> int:
    """The sum of the `count` largest of (value, how many)."""
    total = 0
    for value, have in sorted(values, reverse=True):
        taken = min(have, count)
        total += value * taken
        count -= taken
    return total


class Bounds:
    """The bounds of one graph, its main plan's and what the runtime asks of each region.

    Nodes and regions are those of `graph`, by identity. `depth` is how often the plan around a node has called itself
    so far; it is 0 everywhere but inside such calls.
    """

    def __init__(self, graph: Graph, measured: Measured, machine: Machine, *, start: int = 0) -> None:
        """start: tokens that a fresh call of a plan feeds before anything else."""
        self.graph = graph
        self.measured = measured
        self.machine = machine
        self._plans: dict[str, PlanBounds] = {}
        for name in callees_first(graph):
            self._plans[name] = PlanBounds(graph.plans[name], measured.plans[name], self._plans, machine, start)
        self._where = {key: plan for plan in self._plans.values() for key in plan.index.owners}
        main = self._plans[graph.main]
        self.cost = main.thread(0)

    # --- figures of the plan

    @property
    def total_tokens(self) -> int:
        """Tokens decoded, those of recorded gens included."""
        return self.cost.decoded + self.cost.forced

    @property
    def critical_path_tokens(self) -> int:
        """Decoded and forced tokens on the longest chain of dependencies."""
        return self.cost.path

    @property
    def pages_depth_first(self) -> int:
        """The least pool that always suffices: branches one after another, in the best order."""
        return self.cost.profile.highest(self.machine.page_size)

    @property
    def pages_full_width(self) -> int:
        """Pages with everything alive at once."""
        return self.cost.profile.widest(self.machine.page_size)

    @property
    def largest_position(self) -> int:
        """Tokens of context that the longest thread needs."""
        return max(self.cost.high, self.cost.high_fresh)

    @property
    def budget_binds(self) -> bool:
        """Whether some thread's worst case is cut short by a budget."""
        return any(plan.budget_binds for plan in self._plans.values())

    def pages_bound(self, machine: Machine) -> int:
        """Pages that a run never exceeds on `machine`: admission keeps it within the pool."""
        return min(self.pages_full_width, machine.pages)

    def steps_bound(self, machine: Machine) -> int:
        """Model calls that a run never exceeds on `machine`, without page pressure or waits for the host."""
        return steps_bound([self], machine)

    # --- what the runtime asks

    def root(self) -> Child:
        """The plan's own thread, to be opened."""
        return Child(Need(self.pages_depth_first), self.cost.path)

    def children(self, node: Fork | Map | Reduce | Call, count: int, depth: int = 0) -> Sequence[Child]:
        """The first `count` branches of `node`, to be started.

        Raises ValueError if the node can have no such number of branches.
        """
        plan = self._plan(node)
        tail = plan.path_after(node, depth)
        match node:
            case Fork(arms=arms):
                stitch = node.join.context == "stitch"
                found: list[Child] = []
                for arm in arms:
                    if len(found) < count:
                        child = plan.child(arm.region, depth, stitch, tail)
                        found.extend([child] * min(arm.multiplicity, count - len(found)))
                if len(found) < count:
                    raise ValueError(f"`{node.site}` has no {count} branches")
                return found
            case Map(most=most, region=region):
                if count > most:
                    raise ValueError(f"`{node.site}` has at most {most} branches, not {count}")
                return [plan.child(region, depth, node.join.context == "stitch", tail)] * count
            case Reduce(region=region):
                return [plan.child(region, depth, False, tail)] * count
            case Call(plan=name):
                callee = self._plans[name]
                below = depth + 1 if callee is plan else 0
                if below > callee.deepest:
                    raise ValueError(f"`{name}` calls itself deeper than {callee.deepest}")
                return [callee.child(callee.plan.region, below, False, tail)] * count

    def tokens(self, region: Region, depth: int = 0) -> int:
        """What a thread that runs `region` may decode, if only the budgets inside it bind it."""
        return self._plan(region).worst_of_region(region, depth)

    def rest(self, node: Node, depth: int = 0) -> int:
        """What the thread of `node` may still decode after it: in its own block and after the blocks around it, but
        not in further rounds of a loop. A budget keeps this back from the branches of `node`."""
        return self._plan(node).worst_after(node, depth)

    def path(self, node: Node, depth: int = 0) -> int:
        """Tokens on the longest chain from the start of `node` to the end of the plan that holds it."""
        plan = self._plan(node)
        return plan.cost_of(node, depth).path + plan.path_after(node, depth)

    def feed(self, node: Node) -> Feed:
        """The known tokens that `node` feeds at most; what is longer must fail its branch."""
        return NOTHING if isinstance(node, _CONTEXTLESS) else self._plan(node).fed.at.get(node.dst, NOTHING)

    def start_of(self, region: Region) -> Feed:
        """The known tokens that a branch of this region feeds before its first node."""
        return self._plan(region).fed.starts.get(region.entry, NOTHING)

    def first_past(self, context: int) -> Node | None:
        """The first node in order of the text whose worst case reaches past `context` tokens, if any does."""
        if self.largest_position <= context:
            return None
        return self._plans[self.graph.main].first_past(context)

    def plan_bounds(self, name: str) -> PlanBounds:
        """The figures of one plan of the graph. Raises KeyError."""
        return self._plans[name]

    def _plan(self, part: Node | Region) -> PlanBounds:
        found = self._where.get(id(part))
        if found is None:
            raise ValueError("this is no part of the graph that was bounded")
        return found


def steps_bound(plans: Sequence[Bounds], machine: Machine) -> int:
    """Model calls for several plans in one batch, without page pressure or waits for the host.

    Every step either fills the lanes, or fills the prefill chunk, or moves every chain of dependencies on.
    """
    rows = sum(b.cost.decoded + b.cost.idle_feeds + b.cost.flushed for b in plans)
    fed = sum(b.cost.prefilled + b.cost.idle_feeds + b.cost.flushed for b in plans)
    longest = max((b.cost.steps for b in plans), default=0)
    return rows // machine.lanes + fed // machine.chunk + longest


_CONTEXTLESS = (Let, NeedNode, Return)


class _Index:
    """Where each node and region of a plan stands.

    owners: by identity of a node or region, the region that holds the node, or the node that holds the region (None:
        it is the plan's own)
    place: by identity of a node, its place in its region
    makers: by a context, the node that makes it
    calls_itself: identities of the nodes and regions with a call of the plan itself inside
    """

    def __init__(self, plan: PlanGraph) -> None:
        self.owners: dict[int, Node | Region | None] = {id(plan.region): None}
        self.place: dict[int, int] = {}
        self.makers: dict[Ctx, Node] = {}
        self.calls_itself: set[int] = set()
        stack = [plan.region]
        while stack:
            region = stack.pop()
            for place, node in enumerate(region.nodes):
                self.owners[id(node)] = region
                self.place[id(node)] = place
                if not isinstance(node, _CONTEXTLESS):
                    self.makers[node.dst] = node
                for inner in regions(node):
                    self.owners[id(inner)] = node
                    stack.append(inner)
                if isinstance(node, Call) and node.plan == plan.name:
                    part: Node | Region | None = node
                    while part is not None and id(part) not in self.calls_itself:
                        self.calls_itself.add(id(part))
                        part = self.owners[id(part)]


@dataclass(slots=True)
class _Decoded:
    """What nodes (by the context they make) and regions (by their entry) may decode, own budgets included."""

    nodes: dict[Ctx, int]
    regions: dict[Ctx, int]


@dataclass(slots=True)
class _Costed:
    """Costs of nodes by the context they make, of loop bodies and arms of conditions by their entry, and of threads."""

    nodes: dict[Ctx, Cost]
    stretches: dict[Ctx, Cost]
    threads: dict[Ctx, Cost]


class PlanBounds:
    """One plan's figures at each depth of its calls of itself."""

    def __init__(
        self, plan: PlanGraph, fed: Fed, plans: Mapping[str, PlanBounds], machine: Machine, start: int
    ) -> None:
        self.plan = plan
        self.fed = fed
        self.plans = plans
        self.machine = machine
        self.start = start
        self.index = _Index(plan)
        self.budget_binds = False
        self.deepest = plan.depth if id(plan.region) in self.index.calls_itself else 0
        self._worst: list[_Decoded] = [_Decoded({}, {}) for _ in range(self.deepest + 1)]
        self._costs: list[_Costed] = [_Costed({}, {}, {}) for _ in range(self.deepest + 1)]
        self._tails: dict[tuple[int, int, str], list[int]] = {}
        # The deepest call first: each stands on the one below it.
        for depth in range(self.deepest, -1, -1):
            self._decoded(plan.region, depth)
            self._thread(plan.region, depth, plan.limits.budget)

    def node_at(self, ctx: Ctx) -> Node | None:
        """The node that makes context `ctx`, if one does."""
        return self.index.makers.get(ctx)

    def thread(self, depth: int) -> Cost:
        """The plan's own thread."""
        return self._costs[self._at(self.plan.region, depth)].threads[self.plan.region.entry]

    def worst_of_region(self, region: Region, depth: int) -> int:
        """What a thread that runs `region` may decode."""
        return self._worst[self._at(region, depth)].regions[region.entry]

    def child(self, region: Region, depth: int, stitch: bool, tail: int) -> Child:
        cost = self._costs[self._at(region, depth)].threads[region.entry]
        size = self.machine.page_size
        kept = cost.profile.total(size) if stitch else 0
        return Child(Need(cost.profile.highest(size), kept), cost.path + tail)

    def pages_a_round(self, loop: Loop, depth: int) -> int:
        """Pages that each further round of a loop with a control point in it adds for good."""
        profile = self._stretch(loop.region, depth, None).profile
        return profile.mid + pages_of(profile.tail + profile.head, self.machine.page_size) if profile.sealed else 0

    def cost_of(self, node: Node, depth: int) -> Cost:
        return NO_COST if isinstance(node, _CONTEXTLESS) else self._costs[self._at(node, depth)].nodes[node.dst]

    def worst_after(self, node: Node, depth: int) -> int:
        return self._after(node, depth, "worst")

    def path_after(self, node: Node, depth: int) -> int:
        return self._after(node, depth, "path")

    def _after(self, node: Node, depth: int, what: Literal["worst", "path"]) -> int:
        """What follows `node` in its thread; for a path also what follows the fork that the thread belongs to."""
        total = 0
        part: Node | None = node
        while part is not None:
            region = self.index.owners[id(part)]
            assert isinstance(region, Region)
            total += self._suffix(region, depth, what)[self.index.place[id(part)] + 1]
            owner = self.index.owners[id(region)]
            if isinstance(owner, Region):
                raise TypeError("a region stands in a node")
            if what == "worst" and not isinstance(owner, Loop | Cond):
                return total
            if what == "path" and isinstance(owner, Loop):
                total += (owner.rounds - 1) * self._suffix(region, depth, what)[0]
            part = owner
        return total

    def _suffix(self, region: Region, depth: int, what: Literal["worst", "path"]) -> list[int]:
        """For each place of a region, the sum of what its nodes from there on come to."""
        found = self._tails.get((id(region), depth, what))
        if found is None:
            found = [0]
            for node in reversed(region.nodes):
                each = self.cost_of(node, depth).path if what == "path" else self._worst_of(node, depth)
                found.append(found[-1] + each)
            found.reverse()
            self._tails[id(region), depth, what] = found
        return found

    def _at(self, part: Node | Region, depth: int) -> int:
        """What does not call the plan itself costs the same at every depth, and is kept with the deepest."""
        return depth if id(part) in self.index.calls_itself else self.deepest

    # --- what may be decoded

    def _worst_of(self, node: Node, depth: int) -> int:
        return 0 if isinstance(node, _CONTEXTLESS) else self._worst[self._at(node, depth)].nodes[node.dst]

    def _decoded(self, region: Region, depth: int) -> int:
        at = self._at(region, depth)
        found = self._worst[at].regions.get(region.entry)
        if found is None:
            found = self._worst[at].regions[region.entry] = sum(self._node_decoded(n, depth) for n in region.nodes)
        return found

    def _node_decoded(self, node: Node, depth: int) -> int:
        if isinstance(node, _CONTEXTLESS):
            return 0
        nodes = self._worst[self._at(node, depth)].nodes
        found = nodes.get(node.dst)
        if found is None:
            found = nodes[node.dst] = self._new_decoded(node, depth)
        return found

    def _new_decoded(self, node: Node, depth: int) -> int:
        match node:
            case Decode():
                return self.fed.at.get(node.dst, NOTHING).drawn
            case Fork(arms=arms, limits=limits):
                return _least(
                    sum(self._arm_decoded(arm, limits, depth) * arm.multiplicity for arm in arms), limits.budget
                )
            case Map(region=region, most=most, limits=limits):
                return _least(self._decoded(region, depth) * (1 + limits.retry) * most, limits.budget)
            case Reduce(region=region, limits=limits):
                groups = sum(reduce_groups(node.most, node.by))
                # The budget of a reduce is that of each of its levels.
                total = self._decoded(region, depth) * (1 + limits.retry) * groups
                return total if limits.budget is None else min(total, limits.budget * levels(node.most, node.by))
            case Loop(region=region, rounds=rounds):
                return self._decoded(region, depth) * rounds
            case Cond(then=then, orelse=orelse):
                return max(self._decoded(then, depth), 0 if orelse is None else self._decoded(orelse, depth))
            case Call(limits=limits):
                called = self._callee(node, depth)
                if called is None:
                    return 0
                plan, below = called
                one = _least(plan.worst_of_region(plan.plan.region, below), plan.plan.limits.budget)
                return _least(one * (1 + limits.retry), limits.budget)
            case Write() | Expand() | Let() | NeedNode() | Return():
                return 0
            case _:
                assert_never(node)

    def _arm_decoded(self, arm: Arm, limits: Limits, depth: int) -> int:
        one = self._decoded(arm.region, depth) * (1 + max(arm.limits.retry, limits.retry))
        return _least(one, arm.limits.budget)

    def _callee(self, node: Call, depth: int) -> tuple[PlanBounds, int] | None:
        """The plan that is called, and its depth; None where a call would be too deep, and fails."""
        if node.plan != self.plan.name:
            return self.plans[node.plan], 0
        return (self, depth + 1) if depth < self.deepest else None

    # --- costs

    def _thread(self, region: Region, depth: int, budget: int | None) -> Cost:
        """The cost of a thread that runs `region` with what starts it, within `budget`."""
        at = self._at(region, depth)
        found = self._costs[at].threads.get(region.entry)
        if found is None:
            if budget is not None and self._decoded(region, depth) <= budget:
                budget = None
            start = self.fed.starts.get(region.entry, NOTHING)
            row = [
                replace(self._known(start), steps=0, overhead_steps=0),
                *self._row(region, depth, budget, start.rows),
            ]
            cost = within(in_a_row(row, self.machine.page_size), budget, self.machine.page_size)
            self.budget_binds = self.budget_binds or budget is not None
            found = self._costs[at].threads[region.entry] = cost
        return found

    def _stretch(self, region: Region, depth: int, budget: int | None) -> Cost:
        at = self._at(region, depth)
        found = self._costs[at].stretches.get(region.entry)
        if found is None:
            found = in_a_row(self._row(region, depth, budget), self.machine.page_size)
            self._costs[at].stretches[region.entry] = found
        return found

    def _row(self, region: Region, depth: int, budget: int | None, waiting: int = 0) -> list[Cost]:
        """The costs of a region's nodes. Known tokens wait (`waiting` of them at the start) until a draw or a control
        point has them fed, in one go."""
        found: list[Cost] = []
        for node in region.nodes:
            if isinstance(node, _CONTEXTLESS):
                continue
            nodes = self._costs[self._at(node, depth)].nodes
            cost = nodes.get(node.dst)
            if isinstance(node, Write):
                rows = self.fed.at.get(node.dst, NOTHING)
                cost = replace(self._known(rows), steps=0, overhead_steps=0)
                waiting += rows.rows
            elif isinstance(node, Decode):
                cost = self._gen(self.fed.at.get(node.dst, NOTHING), budget, waiting)
                waiting = 0
            elif waiting:
                found.append(self._fed(waiting))
                waiting = 0
            if cost is None:
                cost = self._cost(node, depth, budget)
            nodes[node.dst] = cost
            found.append(cost)
        if waiting:
            found.append(self._fed(waiting))
        return found

    def _fed(self, rows: int) -> Cost:
        """The calls that feed rows whose tokens are counted elsewhere."""
        steps = pages_of(rows, self.machine.chunk)
        return Cost(steps=steps, overhead_steps=steps)

    def _known(self, feed: Feed) -> Cost:
        """The cost of known tokens that are fed at once."""
        if not feed.rows:
            return NO_COST
        rows, steps = feed.rows, pages_of(feed.rows, self.machine.chunk)
        return Cost(
            prefilled=rows,
            reprefilled=feed.generated,
            steps=steps,
            overhead_steps=steps,
            pos=rows,
            pos_fed=rows,
            view=rows,
            view_fed=rows,
            high=rows,
            high_fed=rows,
            profile=Profile(rows),
            ends_unfed=False,
        )

    def _cost(self, node: Node, depth: int, budget: int | None) -> Cost:
        size = self.machine.page_size
        match node:
            case Fork() | Map() | Call():
                kinds, join = self._branches(node, depth, self._left(node, depth, budget))
                return self._opened(
                    node, side_by_side(kinds, join, self._joined(node), node.limits.limit, self.machine)
                )
            case Reduce():
                return self._opened(node, self._reduce(node, depth, self._left(node, depth, budget)))
            case Loop(region=region, rounds=rounds):
                return repeated(self._stretch(region, depth, budget), rounds, size)
            case Cond(then=then, orelse=orelse):
                other = NO_COST if orelse is None else self._stretch(orelse, depth, budget)
                return either(self._stretch(then, depth, budget), other)
            case Expand():
                raise ValueError("`expand` has no bound")
            case Write() | Decode() | Let() | NeedNode() | Return():
                raise TypeError("statements without branches are costed in a row")
            case _:
                assert_never(node)

    def _gen(self, feed: Feed, budget: int | None, waiting: int) -> Cost:
        """The cost of a gen before which `waiting` known tokens wait to be fed."""
        drawn = _least(feed.drawn, budget)
        known = pages_of(feed.rows + waiting, self.machine.chunk)
        # Each option is fed alone, so that it is a feed, and a part of a chunk.
        options = feed.options + feed.aside // self.machine.chunk
        # The first token is drawn by the step that feeds the last known row.
        steps = known + drawn - 1 if known and drawn else known + drawn
        grown = feed.rows + drawn
        return Cost(
            decoded=drawn,
            forced=feed.forced,
            prefilled=feed.rows + feed.aside,
            reprefilled=feed.generated,
            idle_feeds=feed.options + 1 if feed.options else 0,
            path=drawn + feed.forced,
            steps=steps + options,
            overhead_steps=known + options,
            pos=grown,
            pos_fed=feed.rows,
            view=grown,
            view_fed=feed.rows,
            high=grown,
            high_fed=feed.rows,
            profile=Profile(grown),
            ends_unfed=drawn > 0,
        )

    def _opened(self, node: Fork | Map | Reduce | Call, cost: Cost) -> Cost:
        """With what opens the assistant's turn before the branches start."""
        opening = self.fed.at.get(node.dst, NOTHING)
        if not opening.rows:
            return cost
        # It may be open already, after a condition: then a token left unfed before it is flushed.
        return replace(in_a_row([self._known(opening), cost], self.machine.page_size), seals_first=True)

    def _joined(self, node: Node) -> Feed:
        return NOTHING if isinstance(node, _CONTEXTLESS) else self.fed.joined.get(node.dst, NOTHING)

    def _left(self, node: Fork | Map | Reduce | Call, depth: int, budget: int | None) -> int | None:
        """What all branches of `node` together may decode, at most."""
        left = None if budget is None else max(0, budget - self.worst_after(node, depth))
        own = node.limits.budget
        return own if left is None else _least(left, own)

    def _branches(self, node: Fork | Map | Call, depth: int, left: int | None) -> tuple[list[_Branches], JoinSpec]:
        match node:
            case Fork(arms=arms, limits=limits):
                worst = [self._arm_decoded(arm, limits, depth) for arm in arms]
                width = sum(arm.multiplicity for arm in arms)
                share = _share(left, sum(w * arm.multiplicity for w, arm in zip(worst, arms, strict=True)), width)
                if share is not None and node.width is not None:
                    share = left
                kinds = [self._kind(a.region, a.multiplicity, limits, a.limits, share, depth) for a in arms]
                return kinds, node.join
            case Map(region=region, most=most, limits=limits):
                worst_one = self._decoded(region, depth) * (1 + limits.retry)
                # Fewer items have larger shares, up to all that is left for a single one.
                share = left if _share(left, worst_one * most, most) is not None else None
                return [self._kind(region, most, limits, limits, share, depth)], node.join
            case Call(limits=limits):
                called = self._callee(node, depth)
                if called is None:
                    return [], _DROPPED
                plan, below = called
                called_cost = plan.thread(below)
                cost = within(called_cost, left, self.machine.page_size)
                self.budget_binds = self.budget_binds or cost is not called_cost
                if limits.fresh:
                    cost = in_a_row([self._known(Feed(self.start)), cost], self.machine.page_size)
                return [_Branches(cost, 1, limits.fresh, limits.retry, left)], _DROPPED
            case _:
                assert_never(node)

    def _kind(
        self, region: Region, count: int, limits: Limits, own: Limits, share: int | None, depth: int
    ) -> _Branches:
        if own is not limits and own.budget is not None:
            share = _least(own.budget, share)
        fresh, retry = limits.fresh or own.fresh, max(limits.retry, own.retry)
        return _Branches(self._thread(region, depth, share), count, fresh, retry, share)

    def _reduce(self, node: Reduce, depth: int, left: int | None) -> Cost:
        """Level by level, each a fork whose branches are its groups of two or more."""
        levels_of = [
            side_by_side(
                [self._kind(node.region, groups, node.limits, node.limits, left, depth)],
                _DROPPED,
                NOTHING,
                node.limits.limit,
                self.machine,
            )
            for groups in reduce_groups(node.most, node.by)
        ]
        return in_a_row(levels_of, self.machine.page_size)

    # --- where it goes too far

    def first_past(self, context: int) -> Node | None:
        return self._past(self.plan.region, 0, 0, context)

    def _past(self, region: Region, depth: int, pos: int, context: int) -> Node | None:
        pos += self.fed.starts.get(region.entry, NOTHING).rows
        for node in region.nodes:
            if isinstance(node, _CONTEXTLESS):
                continue
            cost = self.cost_of(node, depth)
            if pos + cost.high > context or cost.high_fresh > context:
                return self._past_inside(node, depth, pos, context) or node
            pos += cost.pos
        return None

    def _past_inside(self, node: Node, depth: int, pos: int, context: int) -> Node | None:
        match node:
            case Fork(arms=arms, limits=limits):
                inner = [(arm.region, limits.fresh or arm.limits.fresh) for arm in arms]
            case Map(region=region, limits=limits) | Reduce(region=region, limits=limits):
                inner = [(region, limits.fresh)]
            case Loop(region=region, rounds=rounds):
                pos += (rounds - 1) * self._stretch(region, depth, None).pos
                inner = [(region, False)]
            case Cond(then=then, orelse=orelse):
                inner = [(region, False) for region in (then, orelse) if region is not None]
            case Call():
                called = self._callee(node, depth)
                if called is None:
                    return None
                plan, below = called
                return plan._past(plan.plan.region, below, 0 if node.limits.fresh else pos, context)
            case _:
                return None
        for region, fresh in inner:
            found = self._past(region, depth, 0 if fresh else pos, context)
            if found is not None:
                return found
        return None


_DROPPED = JoinSpec("first", 1)


def _share(left: int | None, worst: int, width: int) -> int | None:
    """What each branch may decode where all together may decode `left`: None where the worst case fits."""
    return None if left is None or worst <= left else left // max(1, width)


def reduce_groups(count: int, by: int) -> list[int]:
    """For each level of a reduce, how many groups of two or more it has. A group of one passes through."""
    found: list[int] = []
    while count > 1:
        found.append(count // by + (1 if count % by >= 2 else 0))
        count = -(-count // by)
    return found
