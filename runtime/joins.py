"""When a join closes, which value comes out, and whose context goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from anabranch.dsl.spec import JoinSpec, Value
from anabranch.dsl.values import vote_key
from anabranch.runtime.events import Status


@dataclass(frozen=True, slots=True)
class Ended:
    """How a branch ended.

    names: what the branch bound, for the join's key
    logprob: mean log-probability per drawn token, for `best(logprob)`; None if it drew none
    tokens: decoded in the branch, its own branches included
    """

    index: int
    status: Status
    value: Value = None
    reason: str = ""
    names: Mapping[str, Value] = field(default_factory=dict)
    logprob: float | None = None
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class JoinResult:
    """ok: indices that had ended ok; winners: whose context goes on; failed: why there is no value, or ""."""

    ok: tuple[int, ...]
    winners: tuple[int, ...]
    value: Value
    failed: str = ""


class JoinState:
    """The ends of one fork's branches, as they come in.

    Where time would decide (`first`, `quorum`), branches count in the order of their ends; with `deterministic`, in the
    order of (tokens decoded in the branch, index), and one counts only once no running branch could still come before.
    """

    def __init__(self, spec: JoinSpec, labels: Sequence[str | None], *, deterministic: bool) -> None:
        self.spec = spec
        self.labels = labels
        self.deterministic = deterministic
        self.ended: dict[int, Ended] = {}
        self._order: list[int] = []
        self._closed_by: list[Ended] = []

    @property
    def width(self) -> int:
        return len(self.labels)

    def offer(self, ended: Ended) -> None:
        """A branch ended."""
        if ended.index in self.ended:
            raise ValueError(f"branch {ended.index} ended twice")
        self.ended[ended.index] = ended
        self._order.append(ended.index)

    def decided(self, running: Callable[[], Sequence[tuple[int, int]]]) -> bool:
        """Whether the join can close. running: (tokens decoded so far, index) of each branch that has not ended."""
        if self.spec.kind not in ("first", "quorum"):
            self._closed_by = self._counted([])
            return len(self.ended) == self.width
        counted = self._counted(running() if self.deterministic else [])
        # Where several become certain at once, the join closes at the first that decides it.
        for count in range(len(counted) + 1):
            if self._closes(counted[:count]):
                self._closed_by = counted[:count]
                return True
        return False

    def close_now(self) -> None:
        """A deadline passed: the join reads what has ended."""
        self._closed_by = self._counted([])

    def result(self) -> JoinResult:
        """What comes out, from the branches that counted when the join closed."""
        good = [e for e in self._closed_by if e.status == "ok"]
        ok = tuple(sorted(e.index for e in good))
        spec = self.spec
        winners: tuple[int, ...]
        value: Value
        match spec.kind:
            case "all":
                needed = self.width if spec.count is None else spec.count
                if len(good) < needed:
                    return self._fails(ok, f"`all` needs {needed} ok of {self.width}")
                winners, value = ok, self._collect(ok)
            case "first":
                needed = spec.count or 1
                if len(good) < needed:
                    return self._fails(ok, f"`first({needed})` needs {needed} ok of {self.width}")
                winners = tuple(sorted(e.index for e in good[:needed]))
                value = self.ended[winners[0]].value if needed == 1 else [self.ended[i].value for i in winners]
            case "vote" | "quorum":
                tally = self._tally(good)
                most = max(tally.values(), key=lambda voters: (len(voters), -min(v.index for v in voters)), default=[])
                needed = (spec.count or 1) if spec.kind == "quorum" else 1
                if spec.kind == "quorum":
                    # The first to reach the count, not the largest in the end.
                    most = next((voters for voters in tally.values() if len(voters) >= needed), [])
                if len(most) < needed:
                    wanted = f"{needed} that agree on `{spec.key}`" if spec.kind == "quorum" else "one vote"
                    return self._fails(ok, f"`{spec.kind}` needs {wanted} of {self.width}")
                winner = min(v.index for v in most)
                winners, value = (winner,), self.ended[winner].names[spec.key or ""]
            case "best":
                scored = [(s, -e.index) for e in good if (s := self._score(e)) is not None]
                if not scored:
                    return self._fails(ok, f"`best({spec.key})` needs one ok branch with a number")
                winner = -max(scored)[1]
                winners, value = (winner,), self.ended[winner].value
        if spec.context == "drop":
            winners = ()
        elif spec.context == "text" and spec.kind != "first":
            winners = ok
        return JoinResult(ok, winners, value)

    def _closes(self, counted: Sequence[Ended]) -> bool:
        left = self.width - len(counted)
        needed = self.spec.count or 1
        if self.spec.kind == "first":
            have = sum(e.status == "ok" for e in counted)
        else:
            have = max((len(voters) for voters in self._tally(counted).values()), default=0)
        return have >= needed or have + left < needed

    def _counted(self, running: Sequence[tuple[int, int]]) -> list[Ended]:
        ends = [self.ended[i] for i in self._order]
        if not self.deterministic:
            return ends
        ends.sort(key=lambda e: (e.tokens, e.index))
        if running:
            soonest = min(running)
            ends = [e for e in ends if (e.tokens, e.index) < soonest]
        return ends

    def _tally(self, ends: Sequence[Ended]) -> dict[Hashable, list[Ended]]:
        tally: dict[Hashable, list[Ended]] = {}
        key_name = self.spec.key or ""
        for ended in ends:
            if ended.status == "ok" and key_name in ended.names:
                key = vote_key(ended.names[key_name], self.spec.by)
                if key is not None:
                    tally.setdefault(key, []).append(ended)
        if self.spec.kind == "quorum":
            needed = self.spec.count or 1
            # In the order in which each value reached the count; dicts keep it.
            reached = sorted(
                (item for item in tally.items() if len(item[1]) >= needed),
                key=lambda item: ends.index(item[1][needed - 1]),
            )
            return dict(reached) or tally
        return tally

    def _score(self, ended: Ended) -> float | None:
        if self.spec.key == "logprob":
            return ended.logprob
        value = ended.names.get(self.spec.key or "")
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            return None
        return value

    def _collect(self, ok: Sequence[int]) -> Value:
        if self.labels and all(label is not None for label in self.labels):
            return {str(self.labels[i]): self.ended[i].value for i in ok}
        return [self.ended[i].value for i in ok]

    def _fails(self, ok: tuple[int, ...], what: str) -> JoinResult:
        reasons: list[str] = []
        for index in range(self.width):
            ended = self.ended.get(index)
            if ended is None or ended.status != "ok":
                status = "did not end" if ended is None else ended.status
                why = f": {ended.reason}" if ended is not None and ended.reason else ""
                reasons.append(f"{self.labels[index] or index} {status}{why}")
        # A fork of thousands would bury the point.
        shown = "; ".join(reasons[:8]) + (f"; and {len(reasons) - 8} more" if len(reasons) > 8 else "")
        return JoinResult(ok, (), None, f"{what}, and {len(ok)} were" + (f" ({shown})" if shown else ""))
