"""How threads of a replayed schedule walk their plan's graph: nodes, rounds, arms and forks.

What only values decide is taken as it is: which arm of a condition, how many rounds of a loop with `until`, how wide a
fork under `upto` is.
"""

from __future__ import annotations

from anabranch.compiler.graph import (
    Call,
    Cond,
    Decode,
    Fork,
    Graph,
    Let,
    Loop,
    Map,
    Need,
    Node,
    Reduce,
    Return,
    Write,
)
from anabranch.compiler.replay_rules import fault
from anabranch.compiler.replay_threads import GENERATED, KNOWN, LITERAL, Branches, Frame, Thread
from anabranch.compiler.schedule import Ref
from anabranch.dsl.ast import Expr, Str
from anabranch.dsl.spec import ChoiceType


def enter(thread: Thread, ref: Ref) -> None:
    """The thread comes to a node."""
    if thread.expects:
        fault("in-order", f"{thread} comes to {ref} where {thread.expects} must come")
    _leave_node(thread)
    if ref[0] != thread.plan.name:
        fault("in-order", f"{thread} runs `{thread.plan.name}` and comes to a node of `{ref[0]}`")
    while True:
        frame = thread.frames[-1]
        node = _next_node(frame)
        if node is not None:
            break
        _leave_region(thread, f"comes to {ref}")
    if isinstance(node, Return):
        fault("in-order", f"{thread} comes to {ref} after a `return`")
    if isinstance(node, Let | Need) or node.dst != ref[1]:
        fault("in-order", f"{thread} comes to {ref}, and `{node.site}` is next")
    frame.place += 1
    thread.node, thread.forked = node, None
    thread.drawn = 0
    thread.wrote = False
    match node:
        case Loop():
            thread.expects = "a round"
        case Cond():
            thread.expects = "an arm"
        case Reduce():
            thread.reduced = None
        case _:
            pass


def begin_round(thread: Thread, ref: Ref, number: int) -> None:
    """The thread begins a round of a loop."""
    if thread.expects == "a round":
        node = thread.node
        if not isinstance(node, Loop) or ref != (thread.plan.name, node.dst) or number != 0:
            fault("rounds-of-the-loop", f"{thread} begins round {number} of {ref} where the first of another must come")
        frame = Frame(node.region, node)
        frame.number = 0
        thread.frames.append(frame)
        thread.expects = ""
        return
    if thread.expects:
        fault("rounds-of-the-loop", f"{thread} begins a round where {thread.expects} must come")
    _leave_node(thread)
    while thread.frames[-1].owner is not None and _next_node(thread.frames[-1]) is None:
        frame = thread.frames[-1]
        if isinstance(frame.owner, Loop) and ref == (thread.plan.name, frame.owner.dst):
            if number != frame.number + 1 or number >= frame.owner.rounds:
                fault(
                    "rounds-of-the-loop",
                    f"{thread} begins round {number} after round {frame.number}, and there are {frame.owner.rounds}",
                )
            frame.number, frame.place, thread.node = number, 0, None
            return
        _leave_region(thread, f"begins a round of {ref}")
    fault("rounds-of-the-loop", f"{thread} begins a round of {ref}, and stands at no end of its body")


def take_arm(thread: Thread, ref: Ref, place: int) -> None:
    """The thread takes an arm of the condition that it came to."""
    node = thread.node
    if thread.expects != "an arm" or not isinstance(node, Cond) or ref != (thread.plan.name, node.dst):
        fault("in-order", f"{thread} takes an arm of {ref}, which it did not just come to")
    arm = {0: node.then, 1: node.orelse}.get(place)
    if arm is None and (place != -1 or node.orelse is not None):
        fault("in-order", f"{ref} has no arm {place}")
    if arm is not None:
        thread.frames.append(Frame(arm, node))
    thread.expects, thread.node = "", None


def at_end(thread: Thread) -> bool:
    """Whether the thread stands at a `return` or at the end of its region."""
    if thread.expects or not _may_leave_node(thread):
        return False
    for frame in reversed(thread.frames):
        node = _next_node(frame)
        if node is not None:
            return isinstance(node, Return)
        if isinstance(frame.owner, Loop) and not _may_leave_loop(frame):
            return False
    return True


def _next_node(frame: Frame) -> Node | None:
    nodes = frame.region.nodes
    while frame.place < len(nodes):
        node = nodes[frame.place]
        if not isinstance(node, Let | Need):
            return node
        frame.place += 1
    return None


def _leave_region(thread: Thread, what: str) -> None:
    frame = thread.frames[-1]
    if frame.owner is None:
        fault("in-order", f"{thread} {what} after the end of its text")
    if isinstance(frame.owner, Loop) and not _may_leave_loop(frame):
        fault("rounds-of-the-loop", f"{thread} {what} after {frame.number + 1} of {frame.owner.rounds} rounds")
    thread.frames.pop()


def _may_leave_loop(frame: Frame) -> bool:
    owner = frame.owner
    return not isinstance(owner, Loop) or owner.until is not None or frame.number + 1 == owner.rounds


def check_cause(thread: Thread, status: str) -> None:
    """What ran out, or was late, had a budget, or a deadline, around it."""
    if status not in ("truncated", "late"):
        return
    around: Thread | None = thread
    while around is not None:
        limits = [around.plan.limits]
        if around.fork is not None:
            limits += [around.fork.limits, around.fork.arm(around.index)[2]]
        if any((one.budget if status == "truncated" else one.deadline_s) is not None for one in limits):
            return
        around = around.parent
    fault("ends-for-a-cause", f"{thread} ends {status}, and nothing around it has a limit of that kind")


def check_wrote(thread: Thread) -> None:
    """A text that the plan holds, and of which more than a space held back is there, takes a token or more."""
    node = thread.node
    if not isinstance(node, Write) or node.role != "text" or not isinstance(node.value, Str) or thread.wrote:
        return
    literal = sum(len(part) for part in node.value.parts if isinstance(part, str))
    if literal > node.hold_space:
        fault("in-order", f"{thread} goes on from the text `{node.site}` without having written it")


def _leave_node(thread: Thread) -> None:
    check_drew(thread)
    check_wrote(thread)
    if not _may_leave_node(thread):
        site = thread.node.site if thread.node is not None else ""
        fault("waits-for-its-branches", f"{thread} goes on from `{site}` before it has done with its branches")


def _may_leave_node(thread: Thread) -> bool:
    node = thread.node
    match node:
        case Fork() | Map() | Call():
            return thread.forked is not None and thread.forked.closed
        case Reduce(most=most):
            # Of one item, or none left to merge, it forks no more; a level that failed may have a fallback.
            if thread.reduced is None:
                return True
            failed = thread.forked is not None and thread.forked.closed and not thread.reduced
            return failed or 1 in thread.reduced or most < 1
        case _:
            return True


def may_draw(thread: Thread) -> int:
    """How many tokens the thread may still draw at its node."""
    node = thread.node
    return node.spec.max_tokens - thread.drawn if isinstance(node, Decode) and _samples(node) else 0


def kind_of_text(thread: Thread) -> int:
    """What is known of tokens that the thread writes now."""
    match thread.node:
        case Write(value=value):
            return LITERAL if _is_literal(value) else KNOWN
        case Decode(prompt=prompt, spec=spec):
            return LITERAL if _is_literal(prompt) and _is_literal(spec.recorded) else KNOWN
        case Fork() | Map():
            # Before the fork the assistant's turn may be opened; after the join the text of branches is appended.
            return LITERAL if thread.forked is None else GENERATED
        case _:
            return KNOWN


def _is_literal(value: Expr | None) -> bool:
    return value is None or (isinstance(value, Str) and all(isinstance(part, str) for part in value.parts))


def check_drew(thread: Thread) -> None:
    """A gen that samples ends by a token that it drew: the last one, a stop, or the end of the turn."""
    node = thread.node
    if isinstance(node, Decode) and _samples(node) and not thread.drawn:
        fault("draws-of-the-gen", f"{thread} goes on from `{node.site}` without having drawn a token")


def _samples(node: Decode) -> bool:
    is_scored = isinstance(node.spec.type, ChoiceType) and node.spec.type.by == "logprob"
    return node.spec.recorded is None and not is_scored


# --- forks


def fork(thread: Thread, ref: Ref, width: int) -> None:
    """The thread waits for branches."""
    node = thread.node
    if not isinstance(node, Fork | Map | Reduce | Call) or ref != (thread.plan.name, node.dst):
        fault("waits-for-its-branches", f"{thread} forks at {ref}, which it did not just come to")
    before = 0
    if thread.forked is not None and thread.forked.node is node:
        if not isinstance(node, Reduce) or not thread.forked.closed:
            fault("waits-for-its-branches", f"{thread} forks twice at {ref}")
        before = thread.forked.before + thread.forked.width
    match node:
        case Fork(arms=arms, width=dynamic):
            most = sum(arm.multiplicity for arm in arms)
            least = most if dynamic is None else 0
        case Map(most=most):
            least = 0
        case Call():
            least = most = 1
        case Reduce(most=items):
            left = merges(width, node.by, thread.reduced, items)
            if width < 1 or not left:
                fault("waits-for-its-branches", f"a level of `{node.site}` cannot merge {width} groups here")
            thread.reduced = left
            least, most = 1, width
    if not least <= width <= most:
        fault("waits-for-its-branches", f"`{node.site}` has {least} to {most} branches, and {thread} waits for {width}")
    thread.forked = Branches(node, ref, width, before)


def merges(width: int, by: int, items: frozenset[int] | None, most: int) -> frozenset[int]:
    """How many items there can be after a level of a `reduce` that merged `width` groups.

    items: how many there could be before it; None for any up to `most`
    """
    # The last group may be a single item, which is not merged.
    found = set()
    for groups, low, high in ((width, (width - 1) * by + 2, width * by), (width + 1, width * by + 1, width * by + 1)):
        if low <= most if items is None else any(low <= count <= high for count in items):
            found.add(groups)
    return frozenset(found)


def begin_branch(
    graph: Graph, number: int, parent: Thread, ref: Ref, index: int, path: tuple[str, ...], fresh: bool
) -> Thread:
    """A branch, or a further attempt of one, of the fork that `parent` waits at."""
    branches = parent.forked
    if parent.status is not None or branches is None or branches.closed or branches.ref != ref:
        fault("branch-once", f"thread {number} begins at {ref}, and {parent} does not wait there")
    first = branches.before if isinstance(branches.node, Reduce) else 0
    if not 0 <= index < branches.width:
        fault("branch-once", f"thread {number} is branch {index} of {branches.width}")
    region, label, limits = branches.arm(index)
    before = branches.last.get(index)
    attempt = 0
    if before is not None:
        attempt = before.attempt + 1
        if before.status != "failed" or attempt > branches.retry(index):
            fault("branch-once", f"branch {index} of {ref} begins again after it ended {before.status}")
    key = str(first + index) if label is None else label
    expected = (*parent.here, f"{branches.node.site}[{key}]" + (f"~{attempt}" if attempt else ""))
    if path != expected:
        fault("path-of-the-branch", f"thread {number} has the path {path}, and branch {index} of {ref} {expected}")
    if fresh != (branches.limits.fresh or limits.fresh):
        fault("branch-once", f"thread {number} is {'' if fresh else 'not '}fresh, and its branch is otherwise")
    plan, depth = parent.plan, parent.depth
    if region is None:
        assert isinstance(branches.node, Call)
        plan = graph.plans[branches.node.plan]
        region = plan.region
        depth = depth + 1 if plan is parent.plan else 0
        if depth > plan.depth:
            fault("branch-once", f"`{plan.name}` calls itself {depth} times, and permits {plan.depth}")
    branches.live += 1
    if branches.limits.limit is not None and branches.live > branches.limits.limit:
        fault(
            "limit-of-the-fork",
            f"{branches.live} branches of {ref} run at once, and `limit` is {branches.limits.limit}",
        )
    thread = Thread(number, parent.run, path, plan, region)
    thread.parent, thread.fork, thread.index, thread.attempt = parent, branches, index, attempt
    thread.fresh, thread.depth = fresh, depth
    thread.path_tokens = parent.path_tokens if before is None else before.path_tokens
    branches.last[index] = thread
    parent.live += 1
    return thread


def end_branch(thread: Thread) -> None:
    """Account for a thread that has just ended in the fork that it is a branch of."""
    branches, parent = thread.fork, thread.parent
    budget = thread.plan.limits.budget if thread.parent is None or thread.plan is not thread.parent.plan else None
    if isinstance(branches.node if branches else None, Call):
        budget = thread.plan.limits.budget
    if budget is not None and thread.decoded > budget:
        fault("budget-kept", f"{thread} drew {thread.decoded} tokens, and `{thread.plan.name}` permits {budget}")
    if branches is None or parent is None:
        return
    branches.live -= 1
    parent.live -= 1
    branches.decoded += thread.decoded
    parent.decoded += thread.decoded
    spent = branches.spent.get(thread.index, 0) + thread.decoded
    branches.spent[thread.index] = spent
    branches.ranks[thread.index] = branches.ranks.get(thread.index, 0) + thread.rank
    own = branches.arm(thread.index)[2].budget
    if own is not None and spent > own:
        fault("budget-kept", f"branch {thread.index} of {branches.ref} drew {spent} tokens, and may draw {own}")
    whole = branches.limits.budget
    if whole is not None and branches.decoded > whole:
        fault("budget-kept", f"the branches of {branches.ref} drew {branches.decoded} tokens, and may draw {whole}")
