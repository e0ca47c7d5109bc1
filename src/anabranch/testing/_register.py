"""The entry point by which Hypothesis knows the types of this package, as `st.from_type(Plan)`."""

from __future__ import annotations

from hypothesis import strategies as st


def register() -> None:
    """Called when Hypothesis is imported, so it imports the types and nothing that makes values of them."""
    try:
        from anabranch.compiler.recording import Recording
        from anabranch.compiler.scheduler import Machine
        from anabranch.testing._plan import Plan
        from anabranch.testing._trace import Trace
    except ImportError:
        # An installation with something missing says so where it is used; others still have their Hypothesis.
        return
    st.register_type_strategy(Plan, _plans)
    st.register_type_strategy(Trace, _traces)
    st.register_type_strategy(Machine, _machines)
    st.register_type_strategy(Recording, _schedules)


def _plans(_: type) -> st.SearchStrategy[object]:
    from anabranch.testing import plans

    return plans()


def _traces(_: type) -> st.SearchStrategy[object]:
    from anabranch.testing import traces

    return traces()


def _machines(_: type) -> st.SearchStrategy[object]:
    from anabranch.testing import machines

    return machines()


def _schedules(_: type) -> st.SearchStrategy[object]:
    from anabranch.testing import schedules

    return schedules()
