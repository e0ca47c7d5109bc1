"""`python -m mutation`: make faults, and see that each is found. Exits with 1 if one lives without a known reason."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mutation import battery, code, faults, steps
from mutation.battery import Caught, Outcome
from mutation.faults import Fault
from mutation.runner import Plant, Verdict, run_forked
from mutation.steps import StepMutant

SURVIVORS = Path(__file__).parent / "survivors.toml"
CHECKERS = ("schema", "verifier", "reference", "law 2", "noise", "events", "all back", "limits", "ends", "crash",
            "timeout", "unit test")  # fmt: skip


@dataclass
class Tally:
    """A line of the table. lived: those that no check found and that have no known reason."""

    name: str
    total: int = 0
    by: Counter[str] = field(default_factory=Counter)
    equivalent: int = 0
    lived: list[str] = field(default_factory=list)

    @property
    def killed(self) -> int:
        return sum(self.by.values())

    def add(self, verdict: Verdict, key: str, reason: str) -> None:
        self.total += 1
        if verdict.by:
            self.by[verdict.checker] += 1
        elif reason:
            self.equivalent += 1
        else:
            self.lived.append(key)


def judge_steps(outcomes: Sequence[Outcome], mutants: Sequence[StepMutant]) -> list[Verdict]:
    """Each mutant of a recording against the schema, the verifier, the run's events and the reference's layout."""
    reports = [
        [
            battery.hold_against_reference(found.setting, *run)
            for run in zip(found.jobs, found.results, found.compiled, strict=True)
        ]
        if found.setting.reference
        else []
        for found in outcomes
    ]
    verdicts = []
    for mutant in mutants:
        outcome = outcomes[mutant.source]
        try:
            changed = battery.read_back(mutant.of(outcome.recording))
            battery.check_recording(changed, outcome)
            for run, report in enumerate(reports[mutant.source]):
                battery.check_written(changed, run, report)
        except Caught as caught:
            verdicts.append(Verdict(caught.checker, "", caught.detail))
        except Exception as error:
            # The verifier must say which rule is broken, whatever it is given.
            raise RuntimeError(f"the checks broke on {mutant.detail} at step {mutant.index}") from error
        else:
            verdicts.append(Verdict(""))
    return verdicts


def judge_edit(fault: Fault, outcome: Outcome) -> Verdict:
    """A fault made by hand in a recording, before the verifier."""
    assert fault.edit is not None
    try:
        battery.check_recording(battery.read_back(fault.edit(outcome.recording)), outcome)
    except Caught as caught:
        return Verdict(caught.checker, fault.setting, caught.detail)
    return Verdict("")


def reasons() -> dict[str, str]:
    """Why each mutant of the code that may live is no fault, by its key."""
    with SURVIVORS.open("rb") as file:
        listed = tomllib.load(file)["survivor"]
    found = {entry["key"]: entry["why"].strip() for entry in listed}
    if len(found) != len(listed) or not all(found.values()):
        raise ValueError(f"{SURVIVORS.name} lists a mutant twice, or one without a reason")
    return found


def table(tallies: Sequence[Tally]) -> list[str]:
    """The kill rates as Markdown: of those that are no equivalents."""
    shown = [checker for checker in CHECKERS if any(tally.by[checker] for tally in tallies)]
    lines = [f"| faults | made | {' | '.join(shown)} | equivalent | lived | killed |"]
    lines.append("| --- |" + " ---: |" * (len(shown) + 4))
    for tally in tallies:
        real = tally.total - tally.equivalent
        rate = f"{100 * tally.killed / real:.1f}%" if real else "-"
        cells = [str(tally.by[checker] or "") for checker in shown]
        cells += [str(tally.equivalent or ""), str(len(tally.lived) or ""), rate]
        lines.append(f"| {tally.name} | {tally.total} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mutation", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="children at once")
    parser.add_argument("--seed", type=int, default=0, help="which mutants are drawn")
    parser.add_argument("--mutants", type=int, default=500, help="how many: half of recordings, half of the code")
    parser.add_argument("--time-limit", type=int, default=20, help="seconds of processor time for each mutant")
    parser.add_argument("--only", default="", help="run the code mutants whose key holds this text, and nothing else")
    parser.add_argument("--log", type=Path, help="write what became of each mutant to this file")
    parser.add_argument("--redraw", type=int, default=0, help="draw so many plans of the battery anew, and stop")
    options = parser.parse_args()
    if options.redraw:
        battery.redraw(options.redraw)
        return 0
    return run(options)


def run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    plant = Plant.build(battery.settings())
    outcomes = {outcome.setting.name: outcome for outcome in plant.outcomes}
    known = reasons()
    tallies: list[Tally] = []
    log: list[str] = []
    met: set[str] = set()
    print(f"{len(plant.ready)} runs of the battery pass as they are ({time.monotonic() - started:.0f} s)", flush=True)

    mutants = code.draw(options.mutants - options.mutants // 2, options.seed)
    if options.only:
        mutants = [mutant for mutant in code.every() if options.only in mutant.key]
    else:
        by_hand = Tally("by hand, in recordings")
        tallies.append(by_hand)
        for fault in faults.on_recordings():
            verdict = judge_edit(fault, outcomes[fault.setting])
            by_hand.add(verdict if verdict.by in fault.caught else Verdict(""), fault.name, "")
            log.append(f"{fault.name}: {verdict.by or 'LIVED'}: {verdict.detail}")
        in_code = faults.in_code()
        by_hand = Tally("by hand, in the code")
        tallies.append(by_hand)
        verdicts = run_forked(
            [lambda fault=fault: plant.judge_fault(fault) for fault in in_code],  # type: ignore[misc]
            jobs=options.jobs,
            time_limit_s=2 * options.time_limit,
            shown=lambda number, verdict: None,
        )
        for fault, verdict in zip(in_code, verdicts, strict=True):
            by_hand.add(verdict if verdict.by in fault.caught else Verdict(""), fault.name, "")
            log.append(f"{fault.name}: {verdict.by or 'LIVED'}: {verdict.detail}")
        tallies += _steps(plant, options, log)

    def shown(number: int, verdict: Verdict) -> None:
        done[0] += 1
        if done[0] % 50 == 0:
            print(f"{done[0]} of {len(mutants)} mutants of the code ({time.monotonic() - started:.0f} s)", flush=True)

    done = [0]
    verdicts = run_forked(
        [lambda mutant=mutant: plant.judge(mutant) for mutant in mutants],  # type: ignore[misc]
        jobs=options.jobs,
        time_limit_s=options.time_limit,
        shown=shown,
    )
    by_module = {module: Tally(f"drawn, in {module.replace('.', '/')}.py") for module in code.SCOPE}
    for mutant, verdict in zip(mutants, verdicts, strict=True):
        by_module[mutant.module].add(verdict, mutant.key, known.get(mutant.key, ""))
        met.add(mutant.key)
        if verdict.by and mutant.key in known:
            print(f"listed as a survivor, and found by `{verdict.by}`: {mutant.key}")
        log.append(f"{mutant.key} (line {mutant.line}): {verdict.by or 'LIVED'} in {verdict.where}: {verdict.detail}")
    tallies += [tally for tally in by_module.values() if tally.total]
    gone = known.keys() - {mutant.key for mutant in code.every()}
    for key in sorted(gone):
        print(f"listed as a survivor, and no longer in the code: {key}")

    if options.log is not None:
        options.log.write_text("\n".join(log) + "\n", encoding="utf-8")
    total = Tally("all")
    for tally in tallies:
        total.total += tally.total
        total.equivalent += tally.equivalent
        total.by += tally.by
        total.lived += tally.lived
    print("\n".join(["", *table([*tallies, total]), ""]))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    print(f"{time.monotonic() - started:.0f} s on {machine}; --seed {options.seed} --mutants {options.mutants}")
    for key in total.lived:
        print(f"lived: {key}")
    if total.lived:
        print("a fault that lives needs a check that finds it, or a reason in tests/mutation/survivors.toml")
    return 1 if total.lived or gone else 0


def _steps(plant: Plant, options: argparse.Namespace, log: list[str]) -> list[Tally]:
    """The mutants of recordings, by operator."""
    outcomes = [outcome for outcome in plant.outcomes if outcome.setting.reference]
    recordings = [outcome.recording for outcome in outcomes]
    mutants = steps.draw(recordings, options.mutants // 2, options.seed)
    verdicts = judge_steps(outcomes, mutants)
    tallies = {name: Tally(f"drawn, in recordings: {name}") for name in ("field", "drop", "double", "swap")}
    classes: Counter[str] = Counter()
    for mutant, verdict in zip(mutants, verdicts, strict=True):
        kind = "" if verdict.by else steps.equivalent(mutant, recordings[mutant.source])
        classes[kind] += not verdict.by
        key = f"{outcomes[mutant.source].setting.name}, step {mutant.index}: {mutant.detail}"
        tallies[mutant.operator].add(verdict, key, kind)
        log.append(f"{key}: {verdict.by or 'LIVED'} {kind}: {verdict.detail}")
    for kind, count in classes.items():
        if kind:
            print(f"equivalent in recordings, `{kind}` ({count}): {steps.EQUIVALENT[kind]}")
    return list(tallies.values())


if __name__ == "__main__":
    sys.exit(main())
