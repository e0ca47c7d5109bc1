"""What a model might do with a plan: how long each `gen` is, how it ends, and what cuts the run short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Ending: TypeAlias = Literal["max", "end_of_turn", "stop", "failed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one `gen` comes to.

    length: tokens that are drawn before it ends, where its `max` and its type let it
    ending: what the model does then: it goes on to `max`, ends its turn, writes the gen's first stop, or the gen breaks
    content: two gens of equal length and content write the same tokens, so branches can agree
    """

    length: int = 1
    ending: Ending = "max"
    content: int = 0

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ValueError(f"a length is at least 0, not {self.length}")


@dataclass(frozen=True, slots=True)
class Trace:
    """A script for the model of one run.

    outcomes: what gens come to. Which of them a gen takes depends on its thread's path and its own name alone, so the
        order in which things run changes nothing
    step_s: how long one step takes, in seconds of the plan's deadlines
    cancel_at: the step before which the whole run is cancelled; None for a run that is left to end
    """

    outcomes: tuple[Outcome, ...] = (Outcome(),)
    step_s: float = 0.0
    cancel_at: int | None = None

    def __post_init__(self) -> None:
        if not self.outcomes:
            raise ValueError("a trace has at least one outcome")
        if self.step_s < 0:
            raise ValueError(f"a step takes no less than 0 s, not {self.step_s}")
