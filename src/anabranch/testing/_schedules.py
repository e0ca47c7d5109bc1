"""Recordings of simulated runs, as Hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st

from anabranch.compiler.recording import Recording
from anabranch.testing._machines import machines
from anabranch.testing._plan import Plan
from anabranch.testing._plans import plans
from anabranch.testing._traces import traces


@st.composite
def schedules(draw: st.DrawFn, drawn: st.SearchStrategy[Plan] | None = None, *, most: int = 2) -> Recording:
    """What an engine did with a few plans on some machine.

    drawn: what the plans are drawn from; `plans()` when None
    most: plans that run together, at most
    """
    from anabranch.testing._simulate import simulate

    source = plans() if drawn is None else drawn
    batch = draw(st.lists(source, min_size=1, max_size=most))
    scripts = [draw(traces()) for _ in batch]
    return simulate(batch, draw(machines(*batch)), scripts).recording
