"""What happened in a run, in order. Reference, replay and display read these and nothing else.

    event = BranchStarted | TextDelta | GenEnded | HostCalled | Joined | BranchEnded | RunEnded

A path names a thread: `()` is the plan's own thread, and each component is `name[key]`: the name the statement binds
(or `fork3`, its kind and place among the statements of its block, from 0, where it binds none) with the branch's
index, or its label. A branch that is run again ends in `~1`, `~2` ... A call of another plan is a fork of one: `x[0]`.
A round of a loop adds a component, `loop3[0]`, to the path of what happens inside it, but is no thread of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from anabranch.dsl.spec import Value

if TYPE_CHECKING:
    from torch import Tensor

Path: TypeAlias = tuple[str, ...]
Status: TypeAlias = Literal["ok", "failed", "truncated", "cancelled", "late"]


@dataclass(frozen=True, slots=True)
class BranchStarted:
    """A thread was admitted. `label` is set for a named branch. `path` includes the loop rounds around it."""

    path: Path
    label: str | None = None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that a `gen` has made final since the last delta (never half a UTF-8 character)."""

    path: Path
    name: str | None
    text: str


@dataclass(frozen=True, slots=True)
class GenEnded:
    """A `gen` ended.

    path: of the thread, loop rounds included
    site: the gen's component name (the bound name, or `gen2`: kind and place in its block)
    ids: the token ids that stay in the context, in order
    drawn: how many tokens were sampled for it (at least len(ids) unless recorded)
    value: None if it failed
    end: why it ended
    logprobs: of each token in `ids`, natural log, unmasked, at temperature 1; empty when recorded
    """

    path: Path
    site: str
    name: str | None
    ids: tuple[int, ...]
    drawn: int
    text: str
    value: Value
    end: Literal["max", "stop", "end_of_turn", "complete", "recorded", "failed", "truncated", "cancelled"]
    logprobs: tuple[float, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class HostCalled:
    """A host function returned (or raised: then `error` is set). Calls of one thread come in order."""

    path: Path
    function: str
    value: Value
    error: str = ""


@dataclass(frozen=True, slots=True)
class Joined:
    """A fork, map or reduce group closed: the one place where time enters meaning.

    path: of the parent, loop rounds included
    site: the component name of the fork
    ok: indices of the branches that had ended ok when it closed, ascending
    winners: indices whose context goes on (`stitch`, `text`), ascending; empty under `drop`
    value: what came out; None where the join failed without a fallback (`failed` says why)
    """

    path: Path
    site: str
    ok: tuple[int, ...]
    winners: tuple[int, ...]
    value: Value
    failed: str = ""


@dataclass(frozen=True, slots=True)
class BranchEnded:
    """A thread ended. `tokens` counts what it decoded itself, without its branches."""

    path: Path
    status: Status
    text: str
    value: Value
    reason: str
    tokens: int
    label: str | None = None


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The plan's own thread ended: `status` and `value` as in its `BranchEnded`."""

    status: Status
    value: Value
    reason: str
    counts: dict[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class LogitsRow:
    """The logits a token was drawn from, kept under `trace_logits`. It is a trace beside the events, not one of them.

    path: of the thread, as in its `BranchStarted` (rounds of its own loops left out)
    index: how many tokens the thread had drawn before (its counter never restarts)
    logits: [vocab], the model's own, before penalties, mask and temperature
    token: the id that was drawn, also where it was trimmed later
    """

    path: Path
    index: int
    logits: Tensor
    token: int


Event: TypeAlias = BranchStarted | TextDelta | GenEnded | HostCalled | Joined | BranchEnded | RunEnded
