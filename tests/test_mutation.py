"""The verifier can fail: every fault made by hand is found, and so are some that are drawn by machine."""

from __future__ import annotations

from functools import cache

import pytest
from mutation import battery, code, faults, steps
from mutation.__main__ import judge_edit, judge_steps, reasons
from mutation.battery import Outcome
from mutation.faults import Fault
from mutation.runner import Plant, run_forked

# Settings that the faults in recordings name, and a few more, so that all kinds of step are there.
MORE = ("pressed swap", "generated 3")


def plant() -> Plant:
    """The runs that show the faults in the code."""
    wanted = {fault.setting for fault in faults.in_code()}
    return Plant.build([setting for setting in battery.settings() if setting.name in wanted], units=())


@cache
def outcomes() -> dict[str, Outcome]:
    battery.warm()
    wanted = {fault.setting for fault in faults.on_recordings()}.union(MORE)
    found = {s.name: battery.perform(s) for s in battery.settings() if s.name in wanted}
    for outcome in found.values():
        battery.check(outcome)
    return found


@pytest.mark.parametrize("fault", faults.on_recordings(), ids=lambda fault: fault.name)
def test_a_fault_in_a_recording_is_found(fault: Fault) -> None:
    """The verifier names the rule that the fault breaks; without the fault it passes."""
    verdict = judge_edit(fault, outcomes()[fault.setting])
    assert verdict.by in fault.caught, verdict


def test_faults_in_the_code_are_found() -> None:
    """Each fault in the scheduler, the engine or the pool is found, by a check that it names."""
    found = faults.in_code()
    ready = plant()
    tasks = [lambda fault=fault: ready.judge_fault(fault) for fault in found]  # type: ignore[misc]
    verdicts = run_forked(tasks, jobs=1, time_limit_s=60, shown=lambda number, verdict: None)
    missed = [(fault.name, v) for fault, v in zip(found, verdicts, strict=True) if v.by not in fault.caught]
    assert not missed


def test_drawn_mutants_of_recordings_are_found() -> None:
    """Each of these is found, or is of a class of equivalents."""
    runs = list(outcomes().values())
    recordings = [outcome.recording for outcome in runs]
    mutants = steps.draw(recordings, 60, seed=1)
    for mutant, verdict in zip(mutants, judge_steps(runs, mutants), strict=True):
        assert verdict.by or steps.equivalent(mutant, recordings[mutant.source]), mutant.detail


def test_there_are_enough_faults_and_no_two_alike() -> None:
    """At least forty made by hand, each with a name and a check of its own."""
    found = [*faults.on_recordings(), *faults.in_code()]
    assert len(found) >= 40
    assert len({fault.name for fault in found}) == len(found)
    assert all(fault.caught and fault.breaks for fault in found)


def test_the_listed_survivors_are_in_the_code() -> None:
    """Every mutant that may live can still be made, and has a reason."""
    assert reasons().keys() <= {mutant.key for mutant in code.every()}
