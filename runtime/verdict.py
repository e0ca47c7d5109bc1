"""What a join decides, as plain code: which value comes out, and whose context goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from anabranch.dsl.spec import JoinSpec, Value
from anabranch.dsl.values import is_number, vote_key


class Undecided(Exception):
    """Too few branches succeeded, or no value won. The message says which."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A branch that ended ok.

    names: what it had bound at its end
    tokens: decoded in it and in its own branches
    """

    index: int
    label: str | None
    value: Value
    names: Mapping[str, Value]
    tokens: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """winners: indices whose context goes on where the join keeps one, ascending."""

    value: Value
    winners: tuple[int, ...]


def decide(join: JoinSpec, ok: Sequence[Branch], width: int) -> Verdict:
    """The verdict over the branches that had ended ok when the join closed, in branch order, of `width` in all.

    A join closes as soon as it can, so more than `first` or `quorum` asked for are there only where ends are ordered by
    (tokens decoded, index) and not by time; the same order then says who came first. `best(logprob)` is not decided
    here: it needs the model.
    Raises Undecided.
    """
    match join.kind:
        case "all":
            needed = width if join.count is None else join.count
            if len(ok) < needed:
                raise Undecided(f"{len(ok)} of {width} branches are ok, {needed} are needed")
            return Verdict(_all(ok), _indices(ok))
        case "first":
            needed = join.count or 1
            if len(ok) < needed:
                raise Undecided(f"{len(ok)} of {width} branches are ok, {needed} are needed")
            came = sorted(_in_order_of_ends(ok)[:needed], key=lambda branch: branch.index)
            values = [branch.value for branch in came]
            return Verdict(values[0] if needed == 1 else values, _indices(came))
        case "vote":
            return _yield_key(join, _largest(_ballots(join, ok)))
        case "quorum":
            return _yield_key(join, _first_to_agree(join, ok))
        case "best":
            scored = [(score, branch) for branch in ok if (score := _score(join, branch)) is not None]
            if not scored:
                raise Undecided("no ok branch has a number")
            best = max(scored, key=lambda pair: pair[0])[1]
            return Verdict(best.value, (best.index,))
        case _:
            assert_never(join.kind)


def _indices(branches: Sequence[Branch]) -> tuple[int, ...]:
    return tuple(branch.index for branch in branches)


def _in_order_of_ends(branches: Sequence[Branch]) -> list[Branch]:
    return sorted(branches, key=lambda branch: (branch.tokens, branch.index))


def _all(ok: Sequence[Branch]) -> Value:
    """A record for named branches, else a list."""
    if ok and ok[0].label is not None:
        return {branch.label: branch.value for branch in ok}
    return [branch.value for branch in ok]


def _key(join: JoinSpec, branch: Branch) -> Value:
    return branch.names[join.key or ""]


def _yield_key(join: JoinSpec, voters: Sequence[Branch]) -> Verdict:
    winner = min(voters, key=lambda branch: branch.index)
    return Verdict(_key(join, winner), (winner.index,))


def _ballots(join: JoinSpec, branches: Sequence[Branch]) -> dict[object, list[Branch]]:
    """Who voted alike, in the order of `branches`."""
    groups: dict[object, list[Branch]] = {}
    for branch in branches:
        ballot = vote_key(_key(join, branch), join.by)
        if ballot is not None:
            groups.setdefault(ballot, []).append(branch)
    return groups


def _largest(groups: Mapping[object, list[Branch]]) -> list[Branch]:
    """The largest group; of equals the one with the lowest branch."""
    if not groups:
        raise Undecided("no branch cast a vote")
    return max(groups.values(), key=lambda voters: (len(voters), -min(voter.index for voter in voters)))


def _first_to_agree(join: JoinSpec, ok: Sequence[Branch]) -> list[Branch]:
    needed = join.count or 1
    agreed: dict[object, list[Branch]] = {}
    for branch in _in_order_of_ends(ok):
        ballot = vote_key(_key(join, branch), join.by)
        if ballot is not None:
            agreed.setdefault(ballot, []).append(branch)
            if len(agreed[ballot]) == needed:
                return agreed[ballot]
    raise Undecided(f"no {needed} branches agree")


def _score(join: JoinSpec, branch: Branch) -> float | None:
    value = _key(join, branch)
    return value if is_number(value) and not math.isnan(value) else None
