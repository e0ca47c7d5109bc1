"""Schedules as files: static ones as JSON, hostile JSON of both kinds, and the commands that write and verify them."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from anabranch.cli.app import app
from anabranch.compiler import schedule_json
from anabranch.compiler.pipeline import compile_plan
from anabranch.compiler.record import record
from anabranch.compiler.recording import from_json as recording_from_json
from anabranch.compiler.schedule import Schedule
from anabranch.compiler.schedule_json import Origin, from_json, to_json, verify_static
from anabranch.compiler.scheduler import Machine
from anabranch.compiler.verify_graph import VerifyError
from anabranch.compiler.verify_recording import ScheduleFault, verify_recording
from anabranch.dsl.diagnostics import PlanError
from anabranch.dsl.parse import parse_text

PLAN = """sub = plan(n: int, depth=2) { g = gen("s", max=2); if (n > 0) { t = sub(n - 1); }; return(g); }
main = plan(xs: list(4)) {
  user("a");
  x = fork(3) { b = gen(max=20); c = fork(2) { d = gen("e", max=2); } join(all, stitch); } join(all, stitch(sum));
  loop(3) {
    f = gen("k", max=2);
    if (f == "z") { text("q"); } else { g = fork(2) { h = gen(max=3); }; };
  } until(f == "b");
  z = reduce(i: xs, by=2) { m = gen("m", max=1); return(m); };
  s = sub(1, fresh=true);
}"""
SMALL = """main = plan(q) {
  user("#{q}");
  a = fork(2) { n = gen("It is ", type=int, max=4); return(n); } join(vote(n), stitch);
  loop(2) { b = gen("x", max=3); } until(b == "k");
  return(a);
}"""


def static(machine: Machine | None = None) -> tuple[Schedule, Origin]:
    compiled = compile_plan(parse_text(PLAN))
    return record(compiled.bounds_on(machine or Machine(lanes=2))), Origin(PLAN, "main", {})


def cli(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that a run of `SMALL` wrote."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "small.plan").write_text(SMALL, encoding="utf-8")
    file = folder / "run.json"
    result = cli("run", str(folder / "small.plan"), "--model", "random", "--input", "q=é?", "--schedule", str(file))
    assert result.exit_code == 0, result.stderr
    return file


# --- static schedules


@pytest.mark.parametrize("lanes", [1, 2, 64])
def test_a_static_schedule_survives_json(lanes: int) -> None:
    """Written and read again it is the same, and its plan bears it out."""
    schedule, origin = static(Machine(lanes=lanes, page_size=4, chunk=3))
    again, of = from_json(to_json(schedule, origin))
    assert (again, of) == (schedule, origin)
    assert verify_static(again, of) == schedule


def test_a_wrong_static_schedule_is_refused() -> None:
    """A step left out breaks a rule; another plan's text, or a node that it has not, is no schedule of it."""
    schedule, origin = static()
    document = json.loads(to_json(schedule, origin))
    for at in range(len(document["steps"])):
        less = copy.deepcopy(document)
        del less["steps"][at]
        with pytest.raises((VerifyError, PlanError)) as raised:
            verify_static(*schedule_json.from_document(less))
        if isinstance(raised.value, PlanError):
            assert raised.value.diagnostics[0].code == "bad-schedule"
    for text in (SMALL, "main = plan() { }"):
        with pytest.raises((VerifyError, PlanError)):
            verify_static(schedule, Origin(text, "main", {}))
    with pytest.raises(PlanError, match="no plan `side`"):
        verify_static(schedule, Origin(PLAN, "side", {}))
    with pytest.raises(PlanError, match="its plan is `sub`"):
        verify_static(schedule, Origin(PLAN, "sub", {}))


# --- hostile JSON

HOSTILE: list[Any] = [None, True, -1, 1 << 62, 1 << 70, 0.5, "x", "", [], [[]], {}, {"a": 1}, [1], ["call"], [[[[1]]]]]


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a document, as (container, key)."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(items):
        yield document, key
        if isinstance(value, dict | list):
            yield from places(value)


@pytest.mark.parametrize("kind", ["static", "recorded"])
def test_hostile_json_is_told_apart(kind: str, recorded: Path) -> None:
    """Any value at any place of a file: a clear error, or a schedule that holds; never another exception."""
    text = to_json(*static()) if kind == "static" else recorded.read_text(encoding="utf-8")
    document = json.loads(text)
    document["steps"] = document["steps"][:60]
    codes = set()
    for count, (container, key) in enumerate(places(document)):
        before = container[key]
        for value in (HOSTILE[count % len(HOSTILE)], HOSTILE[(count + 7) % len(HOSTILE)]):
            container[key] = value
            try:
                if kind == "static":
                    verify_static(*schedule_json.from_document(document))
                else:
                    verify_recording(recording_from_json(json.dumps(document)))
            except PlanError as error:
                codes.add(error.diagnostics[0].code)
            except (ScheduleFault, VerifyError):
                codes.add("schedule-fault")
        container[key] = before
    assert {"bad-schedule", "schedule-fault"} <= codes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ('{"format":"anabranch-schedule","version":1e400}', "only version 1"),
        ("9" * 5000, "it is no JSON"),
        ("\ud800", "it is no JSON"),
        ("[]", 'it has no `"format"'),
        ('{"format":"anabranch-schedule","version":2,"kind":"recorded"}', "only version 1"),
        ('{"format":"anabranch-schedule","version":1,"kind":"recorded"}', "its fields must be"),
    ],
)
def test_what_is_no_schedule(text: str, said: str, tmp_path: Path) -> None:
    """Other files are refused, with the reason and what writes a schedule."""
    file = tmp_path / "x.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    result = cli("verify", str(file))
    assert result.exit_code == 1
    assert "error[bad-schedule]" in result.stderr and said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_static_file_that_would_take_for_ever(tmp_path: Path) -> None:
    """Runs of threads as long as numbers go, and steps nested past the stack, are refused and not gone through."""
    document = json.loads(to_json(*static()))
    huge = copy.deepcopy(document)
    huge["steps"].append(["free", [[0, (1 << 63) - 1]]])
    with pytest.raises(PlanError, match="name more than"):
        schedule_json.from_document(huge)
    deep: list[Any] = []
    for _ in range(20_000):
        deep = [["repeat", ["main", 1], 1, deep, []]]
    with pytest.raises(PlanError, match="nested too deep"):
        schedule_json.from_document({**document, "steps": deep})


# --- the commands


def test_a_run_is_written_and_verified(recorded: Path) -> None:
    """What `run --schedule` wrote, `verify` reads; with the model, pages and calls are held against their bounds."""
    result = cli("verify", str(recorded))
    assert (result.exit_code, result.stderr) == (0, "")
    assert "verified: 1 runs, 3 threads" in result.stdout
    report = json.loads(cli("verify", str(recorded), "--json", "--model", "random").stdout)
    assert (report["verified"], report["kind"], report["threads"], report["swaps"]) == (True, "recorded", 3, 0)
    assert [item.name for item in recorded.parent.iterdir() if item.name.startswith(".")] == []


def test_a_run_verifies_itself(recorded: Path) -> None:
    """`run --verify` says so on stderr and leaves stdout to the value."""
    plan = str(recorded.parent / "small.plan")
    plain = cli("run", plan, "--model", "random", "--input", "q=é?")
    result = cli("run", plan, "--model", "random", "--input", "q=é?", "--verify")
    assert (result.exit_code, result.stdout) == (0, plain.stdout)
    assert "verified: 1 runs" in result.stderr


def test_a_fault_is_told(recorded: Path, tmp_path: Path) -> None:
    """A changed file gives the rule, the steps around, and exit code 1; as JSON too."""
    text = recorded.read_text(encoding="utf-8")
    lines = text.splitlines()
    at = next(at for at, line in enumerate(lines) if line.startswith('["free"'))
    file = tmp_path / "changed.json"
    file.write_text("\n".join([*lines[:at], lines[at], *lines[at:]]), encoding="utf-8")
    result = cli("verify", str(file))
    assert result.exit_code == 1
    assert "error[schedule-fault]: rule `freed-once` is broken at step" in result.stderr
    assert ">" in result.stderr and "docs/schedules.md" in result.stderr
    told = json.loads(cli("verify", str(file), "--json").stdout)
    assert (told["verified"], told["rule"]) == (False, "freed-once")
    assert isinstance(told["step"], int)


def test_show_writes_what_verify_reads(recorded: Path, tmp_path: Path) -> None:
    """The static schedule as JSON, by `show` and `verify`; other stages have no JSON."""
    plan = str(recorded.parent / "small.plan")
    shown = cli("show", plan, "--stage", "schedule", "--json")
    assert shown.exit_code == 0
    file = tmp_path / "static.json"
    file.write_text(shown.stdout, encoding="utf-8")
    result = cli("verify", str(file))
    assert (result.exit_code, "verified:" in result.stdout) == (0, True)
    assert json.loads(cli("verify", str(file), "--json").stdout)["kind"] == "static"
    file.write_text(shown.stdout.replace('"calls":', '"calls":1'), encoding="utf-8")
    assert "error[schedule-fault]" in cli("verify", str(file)).stderr
    assert cli("show", plan, "--json").exit_code == 2


def test_a_schedule_that_cannot_be_written(recorded: Path, tmp_path: Path) -> None:
    """It is told before the run where that can be known; a full disk leaves the value printed and no half file."""
    plan = str(recorded.parent / "small.plan")
    run = ("run", plan, "--model", "random", "--input", "q=é?", "--schedule")
    for file in (str(tmp_path / "nowhere" / "x.json"), str(tmp_path)):
        result = cli(*run, file)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "error[unwritable-file]" in result.stderr
    if os.path.exists("/dev/full"):
        result = cli(*run, "/dev/full")
        assert result.exit_code == 1
        assert result.stdout and "No space left on device" in result.stderr


@pytest.mark.parametrize(("name", "code"), [("nowhere.json", "no-such-file"), (".", "is-a-directory")])
def test_a_file_that_cannot_be_read(name: str, code: str, tmp_path: Path) -> None:
    """The same errors as for plans."""
    result = cli("verify", str(tmp_path / name))
    assert (result.exit_code, f"error[{code}]" in result.stderr) == (1, True)
