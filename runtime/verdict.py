"""What a join decides, as plain code: which value comes out, and whose context goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from anabranch.dsl.spec import JoinSpec, Value


class Undecided(Exception):
    """Too few branches succeeded, or no value won. The message says which."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A branch that ended ok.

    names: what it had bound at its end
    logprobs: of every token it drew itself, in order
    """

    index: int
    label: str | None
    value: Value
    names: Mapping[str, Value]
    logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class Verdict:
    """winners: indices whose context goes on where the join keeps one, ascending."""

    value: Value
    winners: tuple[int, ...]


def decide(join: JoinSpec, ok: Sequence[Branch], width: int) -> Verdict:
    """The verdict over the branches that had ended ok when the join closed, in branch order, of `width` in all.

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
            chosen = [branch.value for branch in ok]
            return Verdict(chosen[0] if needed == 1 else chosen, _indices(ok))
        case "vote":
            voters, _ = _most_common(join, ok)
            return Verdict(_key(join, voters[0]), (voters[0].index,))
        case "quorum":
            voters, count = _most_common(join, ok)
            if count < (join.count or 1):
                raise Undecided(f"{count} branches agree, {join.count} are needed")
            return Verdict(_key(join, voters[0]), (voters[0].index,))
        case "best":
            if not ok:
                raise Undecided("no branch is ok")
            scores = [_score(join, branch) for branch in ok]
            best = ok[scores.index(max(scores))]
            return Verdict(best.value, (best.index,))
        case _:
            assert_never(join.kind)


def _indices(branches: Sequence[Branch]) -> tuple[int, ...]:
    return tuple(branch.index for branch in branches)


def _all(ok: Sequence[Branch]) -> Value:
    """A record for named branches, else a list."""
    if ok and ok[0].label is not None:
        return {branch.label: branch.value for branch in ok}
    return [branch.value for branch in ok]


def _key(join: JoinSpec, branch: Branch) -> Value:
    return branch.names[join.key or ""]


def _most_common(join: JoinSpec, ok: Sequence[Branch]) -> tuple[list[Branch], int]:
    """The branches that hold the most common key, and how many they are; among equals the one seen first."""
    groups: dict[Hashable, list[Branch]] = {}
    for branch in ok:
        ballot = _ballot(join, _key(join, branch))
        if ballot is not None:
            groups.setdefault(ballot, []).append(branch)
    if not groups:
        raise Undecided("no branch cast a vote")
    winner = max(groups.values(), key=len)
    return winner, len(winner)


def _ballot(join: JoinSpec, value: Value) -> Hashable | None:
    """What is counted: equal ballots are equal votes; None is no vote."""
    match join.by:
        case "exact":
            return _freeze(value)
        case "casefold":
            return _freeze(value.casefold() if isinstance(value, str) else value)
        case "number":
            return _number(value)
        case _:
            assert_never(join.by)


def _number(value: Value) -> float | int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return None if isinstance(value, float) and math.isnan(value) else value
    if isinstance(value, str):
        text = value.strip()
        for read in (int, float):
            try:
                number: float | int = read(text)
            except ValueError:
                continue
            return None if math.isnan(number) else number
    return None


def _freeze(value: Value) -> Hashable:
    """A hashable stand-in that is equal where the values are; a bool is no number."""
    if isinstance(value, list):
        return ("list", tuple(_freeze(item) for item in value))
    if isinstance(value, dict):
        return ("record", frozenset((name, _freeze(item)) for name, item in value.items()))
    if isinstance(value, bool):
        return ("bool", value)
    return value  # type: ignore[no-any-return]


def _score(join: JoinSpec, branch: Branch) -> float:
    if join.key == "logprob":
        return math.fsum(branch.logprobs) / len(branch.logprobs) if branch.logprobs else -math.inf
    return float(_key(join, branch))
