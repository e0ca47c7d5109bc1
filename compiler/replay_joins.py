"""When a replayed join may be read, and what it may yield.

Which branches a vote, a quorum or `best` agrees on is for values to say, and is taken as it is.
"""

from __future__ import annotations

from itertools import pairwise

from anabranch.compiler.graph import Reduce
from anabranch.compiler.replay_rules import fault
from anabranch.compiler.replay_threads import Branches, Thread
from anabranch.compiler.schedule import Ref


def join(thread: Thread, ref: Ref, ok: tuple[int, ...], winners: tuple[int, ...], failed: bool, ordered: bool) -> None:
    """The thread reads a join. ordered: branches count in order of (tokens decoded, index)."""
    branches = thread.forked
    if branches is None or branches.closed or branches.ref != ref:
        fault("waits-for-its-branches", f"{thread} reads the join of {ref}, where it does not wait")
    _check_ok(branches, ok, ordered)
    _check_closed(branches, len(ok))
    if ordered and branches.join.kind in ("first", "quorum"):
        _check_passed(branches, ok)
    _check_verdict(branches, ok, failed)
    _check_winners(branches, ok, winners, failed, ordered)
    branches.closed = True
    thread.rank += sum(branches.ranks[index] for index in ok)
    longest = max((last.path_tokens for last in branches.last.values()), default=0)
    thread.path_tokens = max(thread.path_tokens, longest)
    chosen = set(winners)
    for index, last in branches.last.items():
        if index not in chosen or not branches.stitches:
            last.pinned = False
    if branches.stitches:
        thread.stitching = tuple(branches.last[index] for index in winners)
    if failed and isinstance(branches.node, Reduce):
        thread.reduced = frozenset()


def _check_ok(branches: Branches, ok: tuple[int, ...], ordered: bool) -> None:
    if any(a >= b for a, b in pairwise(ok)):
        fault("winners-of-the-join", f"the branches {ok} of {branches.ref} do not ascend")
    ended = {index for index, last in branches.last.items() if last.status == "ok"}
    read = set(ok)
    if not read <= ended:
        fault("winners-of-the-join", f"branches {sorted(read - ended)} of {branches.ref} are read, and did not end ok")
    if read == ended:
        return
    if branches.join.kind not in ("first", "quorum"):
        fault("winners-of-the-join", f"branches {sorted(ended - read)} of {branches.ref} ended ok, and are not read")
    last_read = max((_order(branches, index, ordered) for index in read), default=(-1, -1))
    left = min(ended - read, key=lambda index: _order(branches, index, ordered))
    if _order(branches, left, ordered) < last_read:
        fault("order-of-ends", f"branches {ok} of {branches.ref} are read, and branch {left} ended before")


def _check_passed(branches: Branches, ok: tuple[int, ...]) -> None:
    """What ended without an order of its own must have been past the last branch that was read, or it might have come
    before it."""
    last_read = max((_order(branches, index, True) for index in ok), default=(-1, -1))
    for index in range(branches.width):
        last = branches.last.get(index)
        if last is not None and last.status not in (None, "cancelled"):
            continue
        so_far = branches.ranks.get(index, 0) + (last.rank if last is not None and last.status is None else 0)
        if (so_far, index) < last_read:
            fault(
                "order-of-ends",
                f"the join of {branches.ref} reads {ok}, and branch {index} could yet have ended before them",
            )


def _order(branches: Branches, index: int, ordered: bool) -> tuple[int, int]:
    if ordered:
        return branches.ranks.get(index, 0), index
    # Those that ended after the same call have no order.
    return branches.last[index].ended_at, 0


def _check_closed(branches: Branches, num_ok: int) -> None:
    """Whether the join may be read now. Branches that lose may have been cancelled for it already."""
    join, ref = branches.join, branches.ref
    running, lost, late = 0, 0, 0
    for index, last in branches.last.items():
        if last.status is None:
            running += 1
        elif last.status == "failed" and last.attempt < branches.retry(index):
            continue
        elif last.status in ("failed", "truncated", "late"):
            lost += 1
            late += last.status == "late"
    has_deadline = branches.limits.deadline_s is not None
    if late and not has_deadline:
        fault("joined-when-permitted", f"branches of {ref} ended late, which has no deadline")
    # Those that run, have yet to start, or were cancelled.
    rest = branches.width - num_ok - lost
    if rest == 0 or (has_deadline and not running):
        return
    match join.kind:
        case "first":
            done = num_ok >= (join.count or 0) or num_ok + rest < (join.count or 0)
        case "quorum":
            done = num_ok >= (join.count or 0) or min(num_ok, 1) + rest < (join.count or 0)
        case _:
            done = False
    if not done:
        fault(
            "joined-when-permitted", f"the join of {ref} is read while {rest} of {branches.width} branches are not over"
        )


def _check_verdict(branches: Branches, ok: tuple[int, ...], failed: bool) -> None:
    join = branches.join
    match join.kind:
        case "all":
            needs = branches.width if join.count is None else join.count
        case "first" | "quorum":
            needs = join.count or 0
        case _:
            needs = 1
    if not failed and len(ok) < needs:
        fault("joined-when-permitted", f"the join of {branches.ref} needs {needs} branches and yields of {len(ok)}")
    by_values = join.kind in ("quorum", "best") or (join.kind == "vote" and join.by == "number")
    if failed and len(ok) >= needs and not by_values:
        fault("joined-when-permitted", f"the join of {branches.ref} needs {needs} branches and fails with {len(ok)}")


def _check_winners(
    branches: Branches, ok: tuple[int, ...], winners: tuple[int, ...], failed: bool, ordered: bool
) -> None:
    join = branches.join
    if failed or join.context == "drop":
        expected: int | None = 0
    elif join.kind == "first":
        expected = join.count
    elif join.kind == "all" or join.context == "text":
        expected = len(ok)
    else:
        expected = 1
    ascending = all(a < b for a, b in pairwise(winners))
    if len(winners) != expected or not ascending or not set(winners) <= set(ok):
        fault(
            "winners-of-the-join",
            f"the winners of {branches.ref} are {winners}, and must be {expected} of {ok} in ascending order",
        )
    left = set(ok) - set(winners)
    if join.kind == "first" and winners and left:
        last = max(_order(branches, index, ordered) for index in winners)
        if min(_order(branches, index, ordered) for index in left) < last:
            fault("winners-of-the-join", f"the winners of {branches.ref} are {winners} of {ok}, and others came before")
