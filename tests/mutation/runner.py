"""Runs mutants, each in a forked child that has everything loaded, and says what caught them."""

from __future__ import annotations

import io
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from types import FrameType

import test_engine
import test_engine_limits
import test_journal
import test_pages
import test_preemption
import test_scheduler
from _pytest.outcomes import Failed

from mutation import battery
from mutation.battery import Caught, Outcome, Setting, Told
from mutation.code import CodeMutant, install
from mutation.faults import Fault

# A child may take so much memory beyond what its parent had: what a run of the battery takes is a tenth of it.
_MEMORY = 1 << 30
# Wall time is a backstop for a child that waits: processor time is what limits it.
_WALL = 8

UNIT_CHECKS: tuple[Callable[[], None], ...] = (
    test_scheduler.test_lanes_are_kept_and_handed_over,
    test_scheduler.test_limit_holds_below_the_lanes,
    test_scheduler.test_a_tight_pool_runs_branches_one_after_another,
    test_scheduler.test_the_tight_order_is_descending_peak_less_kept,
    test_scheduler.test_the_longest_path_starts_first,
    test_scheduler.test_prefill_is_cut_to_the_chunk_and_runs_beside_decode,
    test_scheduler.test_a_branch_gives_back_what_was_reserved_for_it,
    test_scheduler.test_what_has_run_goes_first_and_then_the_longest_path,
    test_scheduler.test_a_policy_sees_what_waits,
    test_scheduler.test_it_tells_whether_anything_waits,
    test_scheduler.test_misuse_is_refused,
    test_preemption.test_a_guest_holds_nothing_but_what_can_be_taken,
    test_pages.test_a_segment_grows_in_one_run_beside_a_sibling,
    test_pages.test_pages_kept_for_growth_are_given_up_when_nothing_else_is_left,
    test_pages.test_trim_gives_whole_pages_back,
    test_pages.test_sealed_segments_refuse_writes,
    test_pages.test_freeing_twice_is_seen,
    test_pages.test_a_view_holds_its_parents,
    test_pages.test_a_chain_begins_at_the_root,
    test_pages.test_gained_entries_stop_at_the_base,
    test_pages.test_cache_gives_whole_pages_and_lets_go_when_room_is_short,
    test_pages.test_what_was_used_last_is_kept_longest,
    test_preemption.test_an_earlier_plan_is_not_overtaken_for_ever,
    test_preemption.test_only_guests_are_preempted,
    test_preemption.test_a_swap_brings_the_same_bits_back,
    test_preemption.test_guests_fill_lanes_that_reservations_leave_empty,
    test_journal.test_what_had_ended_counts_first,
    test_engine.test_a_stitch_prefills_nothing,
    test_engine.test_a_second_run_starts_from_cached_pages,
    test_engine_limits.test_a_batch_keeps_within_its_bounds,
    test_engine_limits.test_a_plan_without_a_fork_is_cached_too,
    test_engine_limits.test_a_broken_step_does_not_poison_the_engine,
)
"""Tests of the suite that say more of the scheduler and the pool than the battery does, and are quick."""


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant. by: the checker that caught it, or "" for none; where: at which setting or test."""

    by: str
    where: str = ""
    detail: str = ""
    seconds: float = 0.0

    @property
    def checker(self) -> str:
        """One of a few: a column of the table."""
        return self.by.partition(":")[0]


@dataclass(frozen=True)
class Ready:
    """A setting that was run once without a fault. covers: code that it ran; seconds: that it took."""

    setting: Setting
    told: tuple[Told, ...] | None
    covers: frozenset[tuple[str, str]]
    seconds: float


@dataclass
class Plant:
    """What children are forked from."""

    ready: list[Ready] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    units: tuple[Callable[[], None], ...] = UNIT_CHECKS

    @staticmethod
    def build(settings: Sequence[Setting], units: Sequence[Callable[[], None]] = UNIT_CHECKS) -> Plant:
        """Run everything once as it is: it must pass, and what it covers is noted."""
        battery.warm()
        plant = Plant(units=tuple(units))
        for setting in settings:
            started = time.process_time()
            outcome = battery.perform(setting)
            battery.check(outcome)
            told = tuple(battery.tell(battery.perform(battery.calm(setting)))) if setting.told else None
            if told is not None:
                battery.check_told(outcome, told)
            seconds = time.process_time() - started
            with _Covered() as covered:
                battery.check_empty(battery.perform(setting).engine)
            plant.ready.append(Ready(setting, told, frozenset(covered.found), seconds))
            plant.outcomes.append(outcome)
        for unit in plant.units:
            unit()
        return plant

    def judge(self, mutant: CodeMutant) -> Verdict:
        """In a child: put the mutant in its place and run the battery until something catches it."""
        install(mutant)
        return self.judge_running({(mutant.module, mutant.function)})

    def judge_fault(self, fault: Fault) -> Verdict:
        """In a child: the same for a fault made by hand, in the run that shows it."""
        assert fault.patch is not None
        fault.patch()
        return self.judge_running(None, only=fault.setting)

    def judge_running(self, functions: set[tuple[str, str]] | None, only: str = "") -> Verdict:
        """Run what runs `functions`, until a check fails. What does not run them cannot be changed by them."""
        for ready in sorted(self.ready, key=lambda ready: ready.seconds):
            if (functions is None or functions & ready.covers) and only in ("", ready.setting.name):
                try:
                    outcome = battery.perform(ready.setting)
                    battery.check(outcome)
                    if ready.told is not None:
                        battery.check_told(outcome, ready.told)
                except Caught as caught:
                    return Verdict(caught.checker, ready.setting.name, caught.detail)
                except Exception as error:
                    return Verdict("crash", ready.setting.name, f"{type(error).__name__}: {error}".partition("\n")[0])
        for unit in self.units:
            try:
                with redirect_stdout(io.StringIO()):
                    unit()
            except (Exception, Failed) as error:
                return Verdict("unit test", unit.__name__, f"{type(error).__name__}: {error}".partition("\n")[0])
        return Verdict("")


class _Covered:
    """Which functions of the house are called meanwhile, as (module, qualified name)."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()

    def __enter__(self) -> _Covered:
        sys.setprofile(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _called(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            module = frame.f_globals.get("__name__", "")
            if module.startswith("anabranch."):
                self.found.add((module.removeprefix("anabranch."), frame.f_code.co_qualname))


@dataclass
class _Child:
    number: int
    pid: int
    pipe: int
    started: float
    said: bytes = b""


def run_forked(
    tasks: Sequence[Callable[[], Verdict]], *, jobs: int, time_limit_s: int, shown: Callable[[int, Verdict], None]
) -> list[Verdict]:
    """Each task in a child of its own, `jobs` at once.

    time_limit_s: processor time of each; a child that takes more is "timeout"
    shown: is told each verdict as it comes
    """
    verdicts: list[Verdict | None] = [None] * len(tasks)
    running: dict[int, _Child] = {}
    waiting = iter(enumerate(tasks))
    while True:
        while len(running) < jobs and (upcoming := next(waiting, None)) is not None:
            child = _fork(*upcoming, time_limit_s)
            running[child.pipe] = child
        if not running:
            break
        readable, _, _ = select.select(list(running), [], [], 0.5)
        for pipe in readable:
            child = running[pipe]
            part = os.read(pipe, 65536)
            child.said += part
            if not part:
                del running[pipe]
                verdicts[child.number] = verdict = _reap(child)
                shown(child.number, verdict)
        for child in running.values():
            if time.monotonic() - child.started > _WALL * time_limit_s:
                os.kill(child.pid, signal.SIGKILL)
    return [verdict for verdict in verdicts if verdict is not None]


def _fork(number: int, task: Callable[[], Verdict], time_limit_s: int) -> _Child:
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(writing)
        return _Child(number, pid, reading, time.monotonic())
    try:
        os.close(reading)
        _limit(time_limit_s)
        try:
            verdict = task()
        except BaseException as error:
            verdict = Verdict("crash", "", f"{type(error).__name__}: {error}")
        taken = time.process_time()
        said = json.dumps([verdict.by, verdict.where, verdict.detail[:300], taken]).encode()
        while said:
            said = said[os.write(writing, said) :]
    finally:
        os._exit(0)


def _limit(time_limit_s: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (time_limit_s, time_limit_s + 1))
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, size + _MEMORY))
    # What a mutant prints or warns of is of no interest.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def _reap(child: _Child) -> Verdict:
    os.close(child.pipe)
    _, status = os.waitpid(child.pid, 0)
    if child.said:
        by, where, detail, taken = json.loads(child.said)
        return Verdict(by, where, detail, taken)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return Verdict("timeout", "", "out of processor time", time.monotonic() - child.started)
    return Verdict("crash", "", f"the process ended with status {status}")
