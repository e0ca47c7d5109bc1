"""When a join closes, which value comes out, and whose context goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from anabranch.dsl.spec import JoinSpec, Value
from anabranch.dsl.values import vote_key
from anabranch.runtime.events import Status


@dataclass(frozen=True, slots=True)
class Ended:
    """How a branch ended.

    names: what the branch bound, for the join's key
    logprob: mean log-probability per drawn token, for `best(logprob)`; None if it drew none
    tokens: decoded in the branch, and in those of its own branches that their joins found ok
    critical: tokens on the longest chain of dependencies up to its end
    """

    index: int
    status: Status
    value: Value = None
    reason: str = ""
    names: Mapping[str, Value] = field(default_factory=dict)
    logprob: float | None = None
    tokens: int = 0
    critical: int = 0


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
        # The ends that do not count yet, and those that do: each end is looked at once, however wide the fork.
        self._waiting: list[tuple[tuple[int, int], Ended]] = []
        self._counted: list[Ended] = []
        self._num_ok = 0
        self._voters: dict[Hashable, list[Ended]] = {}
        self._agreed: list[Ended] = []
        self._closed = False
        self._recalled: JoinResult | None = None

    @property
    def width(self) -> int:
        return len(self.labels)

    @property
    def closed(self) -> bool:
        return self._closed

    def offer(self, ended: Ended) -> None:
        """A branch ended."""
        if ended.index in self.ended:
            raise ValueError(f"branch {ended.index} ended twice")
        place = (ended.tokens, ended.index) if self.deterministic else (len(self.ended), 0)
        self.ended[ended.index] = ended
        heappush(self._waiting, (place, ended))

    def decided(self, soonest: Callable[[], tuple[int, int] | None]) -> bool:
        """Whether the join can close.

        soonest: the least (tokens decoded so far, index) of the branches that have not ended, or anything below it;
            None if all have
        """
        if self._closed:
            return True
        everyone = len(self.ended) == self.width
        if self.spec.kind in ("first", "quorum"):
            before = None if everyone or not self.deterministic else soonest()
            self._closed = self._closed or self._closes()
            # Where several become certain at once, the join closes at the first that decides it.
            while self._waiting and not self._closed and (before is None or self._waiting[0][0] < before):
                self._count(heappop(self._waiting)[1])
                self._closed = self._closes()
            return self._closed
        if everyone:
            self.close_now()
        return everyone

    def recall(self, result: JoinResult) -> None:
        """The join had closed before, with this result: it is taken as it was recorded."""
        self._recalled = result
        self._closed = True

    def close_now(self) -> None:
        """The join reads what has ended: all branches, or those that a deadline left."""
        while self._waiting:
            self._count(heappop(self._waiting)[1])
        self._closed = True

    def result(self) -> JoinResult:
        """What comes out, from the branches that counted when the join closed."""
        if self._recalled is not None:
            return self._recalled
        good = [e for e in self._counted if e.status == "ok"]
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
                needed = 1
                voters = max(
                    self._voters.values(), key=lambda found: (len(found), -min(v.index for v in found)), default=[]
                )
                if spec.kind == "quorum":
                    # The first to reach the count, not the largest in the end.
                    needed, voters = spec.count or 1, self._agreed
                if len(voters) < needed:
                    wanted = f"{needed} that agree on `{spec.key}`" if spec.kind == "quorum" else "one vote"
                    return self._fails(ok, f"`{spec.kind}` needs {wanted} of {self.width}")
                winner = min(v.index for v in voters)
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

    def _count(self, ended: Ended) -> None:
        self._counted.append(ended)
        if ended.status != "ok":
            return
        self._num_ok += 1
        name = self.spec.key or ""
        if self.spec.kind in ("vote", "quorum") and name in ended.names:
            key = vote_key(ended.names[name], self.spec.by)
            if key is not None:
                voters = self._voters.setdefault(key, [])
                voters.append(ended)
                if not self._agreed and len(voters) >= (self.spec.count or 1):
                    self._agreed = list(voters)

    def _closes(self) -> bool:
        left = self.width - len(self._counted)
        needed = self.spec.count or 1
        if self.spec.kind == "first":
            return self._num_ok >= needed or self._num_ok + left < needed
        most = max(map(len, self._voters.values()), default=0) if left < needed else needed
        return bool(self._agreed) or most + left < needed

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
        # Those that counted, and not those that chance to have ended: what is said must not depend on time either.
        counted = {ended.index: ended for ended in self._counted}
        for index in range(self.width):
            ended = counted.get(index)
            if ended is None or ended.status != "ok":
                status = "did not end" if ended is None else ended.status
                why = f": {ended.reason}" if ended is not None and ended.reason else ""
                reasons.append(f"{self.labels[index] or index} {status}{why}")
        # A fork of thousands would bury the point.
        shown = "; ".join(reasons[:8]) + (f"; and {len(reasons) - 8} more" if len(reasons) > 8 else "")
        return JoinResult(ok, (), None, f"{what}, and {len(ok)} were" + (f" ({shown})" if shown else ""))
