"""Generated plans through scheduler and verifier, part 2 of 4."""

from schedule_runs import hold_schedules


def test_every_schedule_ends_and_breaks_no_rule() -> None:
    """On any machine down to one lane and the least pool, under odd policies, with cancellations and deadlines."""
    hold_schedules(2)
