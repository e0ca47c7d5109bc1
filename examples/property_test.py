"""A scheduling policy of one's own, tested against generated plans, models and machines.

    python examples/property_test.py

The policy has a planted bug, which Hypothesis finds and shrinks: see `Gang.holds_back`.
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.testing import Policy, Waiting, machines, plans, simulate, traces


class Gang(Policy):
    """Starts the branches of a fork together, so that they read the shared keys in the same steps."""

    def holds_back(self, waiting: Waiting, free_lanes: int) -> bool:
        # The bug: a fork that is wider than the machine waits for ever.
        return waiting.siblings > free_lanes


@settings(max_examples=300, deadline=None, derandomize=True, database=None, report_multiple_bugs=False)
@given(st.data())
def test_every_plan_ends_and_breaks_no_rule(data: st.DataObject) -> None:
    """Whatever the plan, the model's part in it and the machine: it ends, and the verifier finds no fault."""
    plan = data.draw(plans(), label="plan")
    machine = data.draw(machines(plan), label="machine")
    trace = data.draw(traces(), label="trace")
    simulate(plan, machine, trace, policy=Gang()).verify()


if __name__ == "__main__":
    test_every_plan_ends_and_breaks_no_rule()
