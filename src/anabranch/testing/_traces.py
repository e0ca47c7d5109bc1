"""Traces as Hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st

from anabranch.testing._trace import Outcome, Trace

_outcomes = st.builds(
    Outcome,
    length=st.sampled_from([1, 0, 2, 3, 5, 9]),
    ending=st.sampled_from([*["max", "end_of_turn", "stop"] * 5, "failed"]),
    content=st.integers(0, 3),
)


def traces(*, cancels: bool = True, step_s: float | None = None) -> st.SearchStrategy[Trace]:
    """What a model might do: gens of every length that end in every way, slow steps, runs that are cancelled.

    cancels: whether runs may be cancelled as a whole
    step_s: how long a step takes; None for a few speeds, some of which make deadlines pass
    """
    return st.builds(
        Trace,
        outcomes=st.lists(_outcomes, min_size=1, max_size=5).map(tuple),
        step_s=st.sampled_from([0.0, 1.0, 0.3]) if step_s is None else st.just(step_s),
        cancel_at=_CANCELS if cancels else st.none(),
    )


# Most runs are left to end.
_CANCELS = st.sampled_from([*[None] * 20, 0, 1, 3, 7, 15])
