"""The journal: a killed run goes on to the same end, and nothing that was done is done again or told otherwise."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law_runs import COMMON, EXAMPLES, engines, hold_against_reference, model
from test_engine import assert_idle
from typer.testing import CliRunner

import anabranch
from anabranch.cli.app import app
from anabranch.dsl.diagnostics import PlanError
from anabranch.dsl.parse import parse_text
from anabranch.runtime import journal as journals
from anabranch.runtime.engine import Engine, EngineConfig, RunResult
from anabranch.runtime.events import BranchEnded, BranchStarted, GenEnded, HostCalled, Joined, RunEnded
from anabranch.runtime.journal import Contents, Header, Journal, read_journal
from anabranch.runtime.models import LoadedModel, load
from anabranch.runtime.replay import LogEntry, Replay
from anabranch.testing import Plan, plans

ROOT = Path(__file__).parent.parent

# Every kind of entry: typed gens, stitches of one and of several, a text join, an early close, nested forks in a loop,
# a failure that is tried again, a reduce, a call of another plan.
PLAN = """
aid = plan(t: text(12)) { g = gen("#{t}:", max=3); return(g); }
p = plan(q: text(20)) {
  user("#{q}");
  a = fork(3) { w = gen(max=6); n = gen(" is ", type=int, max=3); return(n); } join(vote(n), stitch);
  b = fork(3) {
    loop(2) { y = fork(2) { g = gen("k", max=3); } join(all, stitch); v = gen("m", max=2); };
    return(y);
  } join(first(2), stitch);
  c = map(s: ["a", "b", "c"], retry=1) { u = gen("#{s}", max=3); need(len(u) > 2); } join(best(logprob), text);
  d = reduce(g: ["x", "y", "z"]) { m = gen("#{g}", max=2); };
  e = aid("z");
  z = gen("so", max=4);
  return([a, c, d, e, z]);
}
"""
FALLBACK = PLAN.replace('map(s: ["a", "b", "c"], retry=1)', 'map(s: ["a", "b", "c"], retry=1, fallback="none")')

FINISHED = ("ok", "failed", "truncated")


def go_on(engine: Engine, plan: Plan, seed: int, kept: Sequence[LogEntry] = ()) -> tuple[RunResult, list[LogEntry]]:
    """The run of a plan, from what is kept of it on; and what it logs."""
    log: list[LogEntry] = []
    run = engine.submit(
        plan.program,
        plan.inputs,
        seed=seed,
        functions=plan.functions,
        log=log.append,
        replay=Replay(kept) if kept else None,
    )
    engine.clock = lambda: float(engine.num_steps)
    while run.result is None:
        engine.step()
    return run.result, log


def finished(entries: Sequence[LogEntry]) -> dict[tuple[str, ...], BranchEnded]:
    """The branches that came to their own end, by path."""
    ends = (entry.event for entry in entries)
    return {end.path: end for end in ends if isinstance(end, BranchEnded) and end.path and end.status in FINISHED}


def test_a_run_goes_on_from_any_entry() -> None:
    """Cut anywhere, three times over: the value under `deterministic`, what had finished always, and the reference."""
    held: Counter[str] = Counter()

    @settings(COMMON, max_examples=max(10, EXAMPLES // 50))
    @given(st.data(), engines(), st.integers(0, 2**32), st.randoms(use_true_random=False))
    def law(data: st.DataObject, config: EngineConfig, seed: int, chance: random.Random) -> None:
        plan = data.draw(plans(deadlines=not config.deterministic))
        roomy = Engine(model(), replace(config, pages=4096))
        compiled = roomy.compile(plan.program, functions=tuple(plan.functions))
        least = compiled.bounds(roomy, plan.inputs).pages_depth_first
        config = replace(config, pages=least + (config.pages or 0))
        whole, kept = go_on(Engine(model(), config), plan, seed)
        for _ in range(3):
            del kept[chance.randrange(len(kept)) :]
            engine = Engine(model(), config)
            result, log = go_on(engine, plan, seed, kept)
            done = finished(kept)
            ends = {end.path: end for end in result.events if isinstance(end, BranchEnded)}
            assert {path: ends.get(path) for path in done} == done
            assert not {row.path for row in result.logits} & done.keys()
            hold_against_reference(plan, result)
            if config.deterministic:
                assert (result.value, result.status) == (whole.value, whole.status)
            assert_idle(engine)
            kept += log
            held.update(resumed=1, finished=len(done), replayed=int(result.counts["tokens_replayed"]))

    law()
    assert held["finished"] >= held["resumed"], held
    assert held["replayed"] >= held["resumed"], held


# --- killed


def header(text: str, **changed: Any) -> Header:
    """Of a run of `text` on the random model, as `run --journal` writes it."""
    fields: dict[str, Any] = {
        "anabranch": anabranch.__version__, "source": "a.plan", "text": text, "plan": parse_text(text).plans[-1].name,
        "inputs": ({"q": "why?"},), "many": False, "seed": 1, "deterministic": True, "lanes": 4, "pages": 512,
        "page_size": 4, "chunk": 64, "model": "random", "fingerprint": model().fingerprint, "preempt": "swap",
        "threads": 1, "dtype": "float32", "device": None, "template": None, "functions": None,
    }  # fmt: skip
    return Header(**{**fields, **changed})


def write_journal(path: str, head: Header, *, functions: Any = None, stop: Callable[[int], None] | None = None) -> None:
    """Run what `head` says, with a journal. stop: called before each step with its number."""
    engine = engine_of(head)
    with Journal.create(path) as journal:
        runs = [
            engine.submit(
                head.text, values, seed=head.seed, input_index=index, log=journal.log(index), functions=functions
            )
            for index, values in enumerate(head.inputs)
        ]
        journal.begin(head)
        steps = 0
        while any(run.result is None for run in runs):
            if stop is not None:
                stop(steps)
            engine.step()
            steps += 1
            journal.commit()


@cache
def narrow() -> LoadedModel:
    """The same model in the dtype that runs have by default, whose last bits depend on what is computed together."""
    torch.set_num_threads(1)
    return load("random", dtype=torch.float32)


def engine_of(head: Header) -> Engine:
    return Engine(
        narrow(),
        EngineConfig(
            lanes=head.lanes,
            pages=head.pages,
            page_size=head.page_size,
            chunk=head.chunk,
            deterministic=head.deterministic,
            preempt=head.preempt,
        ),
    )


def resume(path: str, *args: str) -> Any:
    """`anabranch resume`, in this process."""
    return CliRunner().invoke(app, ["resume", path, *args])


def resumed(path: str) -> dict[str, Any]:
    """The JSON document of `anabranch resume`."""
    result = resume(path, "--json")
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def killed_child(work: Callable[[], object], watch: Callable[[], bool] | None = None) -> None:
    """Do `work` in a child process, which must die of SIGKILL: its own, or ours once `watch` says so."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(1)
    if watch is not None:
        while not watch():
            assert not os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG), "it came to its end"
            os.sched_yield()
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), status
    assert os.WTERMSIG(status) == signal.SIGKILL, status


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not killed")


def kill_at_step(path: str, head: Header, step: int) -> None:
    killed_child(lambda: write_journal(path, head, stop=lambda number: die() if number == step else None))


def kill_in_a_write(path: str, head: Header, num_bytes: int) -> None:
    """The process dies when that many bytes of the journal are written, often in the middle of a line."""
    dies_in_a_write(lambda: write_journal(path, head), num_bytes)


def dies_in_a_write(work: Callable[[], object], num_bytes: int) -> None:
    write, left = os.write, num_bytes

    def written(descriptor: int, data: Any) -> int:
        nonlocal left
        if left < len(data):
            write(descriptor, bytes(data)[:left])
            die()
        left -= len(data)
        return write(descriptor, data)

    def do() -> None:
        journals.os.write = written  # type: ignore[attr-defined]
        work()

    killed_child(do)


def kill_from_outside(path: str, head: Header, num_bytes: int) -> None:
    """Another process kills it once the journal is that long, wherever it is then."""
    killed_child(
        lambda: (write_journal(path, head), signal.pause()),
        lambda: Path(path).exists() and Path(path).stat().st_size >= num_bytes,
    )


KILLS = (kill_at_step, kill_in_a_write, kill_from_outside)


def kills(folder: Path, head: Header, count: int, seed: int) -> list[tuple[Contents, Path]]:
    """Kill the run of `head` `count` times, each at another point; what each left."""
    chance = random.Random(seed)
    whole = folder / f"whole{seed}.jsonl"
    sizes: list[int] = []  # before each step
    write_journal(str(whole), head, stop=lambda step: sizes.append(whole.stat().st_size))
    first = len(whole.read_bytes().split(b"\n")[0]) + 1
    left: list[tuple[Contents, Path]] = []
    for number in range(count):
        path = folder / f"killed{seed}.{number}.jsonl"
        kill = KILLS[number % len(KILLS)]
        at = chance.randrange(len(sizes)) if kill is kill_at_step else chance.randrange(first, sizes[-1])
        kill(str(path), head, at)
        left.append((read_journal(str(path)), path))
    return left


def assert_goes_on(contents: Contents, path: Path, value: object = None) -> None:
    """`resume` gives `value`; it keeps what had finished, and decodes none of it again."""
    done = finished(contents.entries[0])
    document = resumed(str(path))
    if value is not None:
        assert document["value"] == value
    told = {tuple(branch["path"].split("/")): branch for branch in document["branches"]}
    for branch, end in done.items():
        found = told[branch]
        assert (found["status"], found["text"], found["value"], found["tokens"]) == (
            end.status,
            end.text,
            end.value,
            end.tokens,
        )
    assert document["counts"]["tokens_replayed"] >= sum(end.tokens for end in done.values())
    after = read_journal(str(path))
    assert after.entries[0][: len(contents.entries[0])] == contents.entries[0]
    drawn = {e.thread for e in after.entries[0][len(contents.entries[0]) :] if isinstance(e.event, GenEnded)}
    assert not drawn & done.keys()


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_a_killed_run_comes_to_the_same_value(tmp_path: Path, seed: int) -> None:
    """SIGKILL at 20 points of each of 5 runs, 100 in all, under `--deterministic`."""
    head = header(FALLBACK, seed=seed)
    engine = engine_of(head)
    (whole,) = engine.run(FALLBACK, head.inputs, seed=seed)
    assert whole.status == "ok", whole.reason
    left = kills(tmp_path, head, 20, seed)
    assert len({len(contents.entries[0]) for contents, _ in left}) >= 5
    for number, (contents, path) in enumerate(left):
        if number % 5 == 0:
            # Killed once more, while it goes on.
            dies_in_a_write(lambda path=path: resume(str(path)), 20 * number)
            contents = read_journal(str(path))
        assert_goes_on(contents, path, whole.value)
    # The journal of a run that is over gives it again.
    assert [resumed(str(path))["value"] for _, path in left[:2]] == [whole.value] * 2


def test_a_killed_run_keeps_what_had_finished(tmp_path: Path) -> None:
    """Where time may decide, another value can come out, and still every branch that had finished stays as it was."""
    head = header(FALLBACK, deterministic=False, lanes=2)
    for contents, path in kills(tmp_path, head, 20, 6):
        assert_goes_on(contents, path)


def test_the_command_line_is_killed(tmp_path: Path) -> None:
    """`run --journal`, killed by another process, and `resume`, each in a process of its own."""
    plan, path = tmp_path / "a.plan", tmp_path / "a.jsonl"
    text = """
    p = plan() {
      text("x");
      a = fork(2) { g = gen(max=8); return(g); } join(all);
      b = fork(1) { loop(40) { h = gen("k", max=4); }; return(1); } join(all);
      return([a, b]);
    }
    """
    plan.write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}

    def command(*args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "anabranch", *args],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    child = command("run", str(plan), "--model", "random", "--pages", "4096", "--journal", str(path))
    assert child.stderr is not None
    assert any(line.startswith("b[0]/") for line in child.stderr)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    before = finished(read_journal(str(path)).entries[0])
    assert set(before) == {("a[0]",), ("a[1]",)}
    child = command("resume", str(path), "--json")
    out, err = child.communicate()
    assert child.returncode == 0, err
    document = json.loads(out)
    assert document["value"] == [[before["a[0]",].value, before["a[1]",].value], [1]]
    assert document["counts"]["tokens_replayed"] >= 2


# --- damaged


SMALL = """
p = plan(q: text(20)) {
  user("#{q}");
  a = fork(2) { g = gen(max=4); return(g); } join(all, stitch);
  b = fork(2) { h = gen("k", max=3); y = seen(h); return(y); } join(first(1));
  return([a, b]);
}
"""


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Contents, object]:
    """A small journal that is whole, what it holds, and the run's value."""
    path = tmp_path / "small.jsonl"
    write_journal(str(path), header(SMALL, functions=str(host(tmp_path))), functions={"seen": str.upper})
    contents = read_journal(str(path))
    over = contents.entries[0][-1].event
    assert isinstance(over, RunEnded)
    return path, contents, over.value


def host(folder: Path) -> Path:
    """A module of host functions that notes each call in a file beside it."""
    path = folder / "host.py"
    path.write_text(
        f"def seen(text):\n    open({str(folder / 'calls')!r}, 'a').write('.')\n    return text.upper()\n",
        encoding="utf-8",
    )
    return path


def damaged(path: Path, data: bytes) -> Contents | None:
    """What is read of a journal of these bytes; None if it is refused."""
    path.write_bytes(data)
    try:
        return read_journal(str(path))
    except PlanError as error:
        assert error.code == "bad-journal", error
        return None


def assert_prefix(found: Contents | None, whole: Contents) -> None:
    """Nothing, or what stood at the beginning: never anything else."""
    if found is not None:
        assert found.header == whole.header
        assert found.entries[0] == whole.entries[0][: len(found.entries[0])]


def test_cut_at_every_byte(tmp_path: Path) -> None:
    """A journal that ends anywhere is read up to its last whole line, and refused without a whole first line."""
    path = tmp_path / "tiny.jsonl"
    write_journal(str(path), header('p = plan(q) { a = fork(2) { g = gen("k", max=1); } join(all); return(a); }'))
    whole = read_journal(str(path))
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    ends = [sum(map(len, lines[:n])) for n in range(1, len(lines) + 1)]
    for size in range(len(data)):
        found = damaged(path, data[:size])
        assert (found is None) == (size < ends[0])
        assert_prefix(found, whole)
        if found is not None:
            num_whole = sum(end <= size for end in ends)
            assert len(found.entries[0]) == num_whole - 1
            assert found.num_dropped == (size not in ends)


def test_every_prefix_goes_on(small: tuple[Path, Contents, object], tmp_path: Path) -> None:
    """From each line on, and from the middle of it, the value is the same, and a recorded call is not made again."""
    path, whole, value = small
    lines = path.read_bytes().splitlines(keepends=True)
    calls = tmp_path / "calls"
    total = sum(isinstance(entry.event, HostCalled) for entry in whole.entries[0])
    assert total
    for count in range(1, len(lines)):
        path.write_bytes(b"".join(lines[:count]) + lines[count][: len(lines[count]) // 2])
        called = sum(isinstance(entry.event, HostCalled) for entry in whole.entries[0][: count - 1])
        calls.write_text("")
        result = resume(str(path), "--json")
        assert result.exit_code == 0, result.stderr
        assert "the last 1 line is torn or changed" in result.stderr
        assert json.loads(result.stdout)["value"] == value
        assert len(calls.read_text()) <= total - called


def test_changed_bytes_are_found(small: tuple[Path, Contents, object]) -> None:
    """A byte that is another, gone or doubled anywhere: what comes before its line is all that is read."""
    path, whole, _ = small
    data = path.read_bytes()
    chance = random.Random(0)
    for _ in range(200):
        place = chance.randrange(len(data))
        other = bytes([chance.choice([b for b in range(256) if b != data[place]])])
        for new in (
            data[:place] + other + data[place + 1 :],
            data[:place] + data[place + 1 :],
            data[:place] + other + data[place:],
        ):
            found = damaged(path, new)
            assert_prefix(found, whole)
            before = data[:place].count(b"\n")
            assert found is None if before == 0 else found is not None and len(found.entries[0]) <= before


def test_moved_lines_are_found(small: tuple[Path, Contents, object], tmp_path: Path) -> None:
    """Lines that are swapped, doubled, left out, or from another journal of the very same run are not taken."""
    path, whole, _ = small
    lines = path.read_bytes().splitlines(keepends=True)
    other_path = tmp_path / "other.jsonl"
    write_journal(
        str(other_path),
        whole.header.__class__(**{**_fields(whole.header), "id": "0" * 16}),
        functions={"seen": str.upper},
    )
    other = other_path.read_bytes().splitlines(keepends=True)
    assert len(other) == len(lines)
    for at in range(1, len(lines) - 1):
        swapped = [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]]
        doubled = [*lines[: at + 1], *lines[at:]]
        left_out = [*lines[:at], *lines[at + 1 :]]
        spliced = [*lines[:at], *other[at:]]
        for new, good in ((swapped, at), (doubled, at + 1), (left_out, at), (spliced, at)):
            found = damaged(path, b"".join(new))
            assert found is not None
            assert_prefix(found, whole)
            assert len(found.entries[0]) == good - 1
            assert found.num_dropped == len(new) - good


def _fields(head: Header) -> dict[str, Any]:
    return {name: getattr(head, name) for name in Header.__slots__}


def test_what_is_no_journal_is_refused(small: tuple[Path, Contents, object], tmp_path: Path) -> None:
    """Each with a code that says what is wrong with it."""
    path, whole, _ = small
    assert damaged(path, b"") is None
    assert damaged(path, b"\n" * 9) is None
    assert damaged(path, b'["0123456789abcdef",{}]\n') is None
    for line in (
        b"[1]",
        b'{"format": "anabranch-journal"}',
        b'{"format":"anabranch-journal","version":2}',
        b"{" * 9000,
    ):
        assert damaged(path, _line("", line)) is None, line
    first = _line("", json.dumps({"format": "anabranch-journal", "version": 1, **_plain(whole.header)}).encode())
    assert damaged(path, first) is not None
    for wrong in (
        {"run": 1, "is": "started", "thread": []},
        {"run": 0, "is": "started", "thread": [1]},
        {"run": 0, "is": "begun", "thread": []},
        {"run": 0, "is": "started", "thread": [], "more": 1},
        {"run": 0, "is": "gen", "thread": [], "site": "g"},
        {"run": 0, "is": "joined", "thread": [], "site": "g", "ok": [-1], "winners": [], "value": 1},
        {
            "run": 0,
            "is": "ended",
            "thread": ["a[0]"],
            "status": "done",
            "text": "",
            "value": 1,
            "reason": "",
            "tokens": 1,
        },
        {"run": 0, "is": "run_ended", "thread": [], "status": "ok", "value": 1, "reason": "", "counts": {"steps": "x"}},
    ):
        second = _line(first[2:18].decode(), json.dumps(wrong).encode())
        assert damaged(path, first + second) is None, wrong
    for name, code in (("nowhere", "no-such-file"), (".", "unreadable-file")):
        with pytest.raises(PlanError) as caught:
            Journal.open(str(tmp_path / name))
        assert caught.value.code == code


def _line(before: str, text: bytes) -> bytes:
    return b'["%s",%s]\n' % (journals._chain(before, text).encode(), text)


def _plain(head: Header) -> dict[str, Any]:
    return {**_fields(head), "inputs": list(head.inputs)}


# --- the command line


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    """The run stops and says so; what was durable is, and the run goes on from it once there is room."""
    head = header(FALLBACK)
    (whole,) = engine_of(head).run(FALLBACK, head.inputs, seed=head.seed)
    for room in (1500, 4000, 9000):
        path = tmp_path / f"{room}.jsonl"
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
                write_journal(str(path), head)
            except PlanError as error:
                os.write(writer, error.code.encode())
            finally:
                os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        with os.fdopen(reader) as said:
            assert said.read() == "journal-write"
        assert_goes_on(read_journal(str(path)), path, whole.value)


def test_a_journal_is_never_written_over(tmp_path: Path) -> None:
    """`--journal` takes a new name; a plan that does not run leaves no file; two writers are told apart."""
    plan = tmp_path / "a.plan"
    plan.write_text('p = plan() { text("x"); g = gen(max=2); return(1); }', encoding="utf-8")
    path = tmp_path / "a.jsonl"
    args = ["run", str(plan), "--model", "random", "--pages", "64", "--journal", str(path)]
    wrong = CliRunner().invoke(app, [*args, "--plan", "nope"])
    assert "error[no-such-plan]" in wrong.stderr
    assert not path.exists()
    assert CliRunner().invoke(app, args).exit_code == 0
    written = path.read_bytes()
    again = CliRunner().invoke(app, args)
    assert (again.exit_code, "error[journal-exists]" in again.stderr) == (1, True)
    assert path.read_bytes() == written
    with Journal.open(str(path))[0]:
        assert "error[journal-busy]" in resume(str(path)).stderr
    assert resume(str(path)).stdout == "1\n"
    nowhere = CliRunner().invoke(app, [*args[:-1], str(tmp_path / "no" / "a.jsonl")])
    assert "error[journal-write]" in nowhere.stderr


def test_another_model_or_version_is_refused(tmp_path: Path) -> None:
    """A journal goes on under what wrote it alone, and is left as it was."""
    path = tmp_path / "a.jsonl"
    kill_at_step(str(path), header(FALLBACK), 9)
    written = path.read_bytes()
    result = resume(str(path), "--model", "random:1")
    assert (result.exit_code, "error[bad-journal]" in result.stderr) == (1, True)
    assert path.read_bytes() == written
    old = tmp_path / "old.jsonl"
    kill_at_step(str(old), header(FALLBACK, anabranch="0.0.1"), 9)
    assert "install anabranch 0.0.1" in resume(str(old)).stderr


def test_a_journal_of_another_plan_does_not_fit(small: tuple[Path, Contents, object]) -> None:
    """Entries that the plan does not come to are an error, not another value."""
    _, whole, _ = small
    entries = whole.entries[0]
    functions = {"seen": str.upper, "seen_not": str.upper}
    called = next(n for n, entry in enumerate(entries) if isinstance(entry.event, HostCalled))
    for text, cut in (
        (SMALL.replace("max=4", "max=1"), -2),
        (SMALL.replace("g = ", "i = ").replace("(g)", "(i)"), -2),
        (SMALL.replace("a = ", "c = ").replace("a,", "c,"), -2),
        (SMALL.replace("seen", "seen_not"), called + 1),
        (SMALL.replace("y = seen(h); return(y)", "y = 1; return(y)"), called + 1),
    ):
        engine = engine_of(whole.header)
        with pytest.raises(PlanError) as caught:
            run = engine.submit(text, whole.header.inputs[0], seed=1, replay=Replay(entries[:cut]), functions=functions)
            while run.result is None:
                engine.step()
        assert caught.value.code == "bad-journal"
        assert_idle(engine)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    """Ctrl-C leaves a journal without the branches that it cancelled, and `resume` gives the value."""
    head = header(FALLBACK)
    (whole,) = engine_of(head).run(FALLBACK, head.inputs, seed=head.seed)
    plan, path = tmp_path / "a.plan", tmp_path / "a.jsonl"
    plan.write_text(FALLBACK, encoding="utf-8")
    seen = threading.Event()

    class Stdin:
        pass

    def on_line(*args: object, **kwargs: object) -> None:
        if not seen.is_set():
            seen.set()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anabranch.cli.live.Lines.show", on_line)
        options = ["--lanes", "4", "--pages", "512", "--page-size", "4", "--chunk", "64", "--dtype", "float64"]
        result = CliRunner().invoke(
            app,
            [
                "run",
                str(plan),
                "--model",
                "random",
                "--input",
                "q=why?",
                "--seed",
                "1",
                "--deterministic",
                *options,
                "--journal",
                str(path),
            ],
        )
    assert result.exit_code == 1
    contents = read_journal(str(path))
    assert not any(isinstance(e.event, RunEnded) for e in contents.entries[0])
    assert_goes_on(contents, path, whole.value)


def test_a_batch_goes_on_with_what_is_not_over(tmp_path: Path) -> None:
    """Of several inputs those that were over are told from the journal, and the others run on."""
    head = header(FALLBACK, inputs=tuple({"q": q} for q in ("a", "b", "c")), many=True, lanes=2)
    results = engine_of(head).run(FALLBACK, head.inputs, seed=head.seed)
    path = tmp_path / "a.jsonl"
    write_journal(str(path), head)
    lines = path.read_bytes().splitlines(keepends=True)
    over = next(n for n, line in enumerate(lines) if b'"is":"run_ended"' in line)
    path.write_bytes(b"".join(lines[: over + 1]))
    contents = read_journal(str(path))
    first = next(n for n, entries in enumerate(contents.entries) if isinstance(entries[-1].event, RunEnded))
    documents: Any = resumed(str(path))
    assert [document["value"] for document in documents] == [result.value for result in results]
    assert [document["counts"]["tokens_replayed"] for document in documents] == [
        0 if n == first else sum(e.event.drawn for e in entries if isinstance(e.event, GenEnded))
        for n, entries in enumerate(contents.entries)
    ]
    assert documents[first]["counts"]["tokens_decoded"] == results[first].counts["tokens_decoded"]


# --- what a continuation takes


def test_what_had_ended_counts_first() -> None:
    """A branch that ended before the kill wins, though on one lane another would now end before it."""
    text = """
    p = plan() {
      text("x");
      a = fork() {
        slow = branch() { g = gen("k", max=60); return("slow"); };
        quick = branch() { h = gen("k", type=choice("a"), max=2); return("quick"); };
      } join(first(1), stitch);
      b = gen("m", max=2);
      return(a);
    }
    """
    plan = Plan.parse(text)
    config = EngineConfig(lanes=8, pages=512)
    whole, log = go_on(Engine(model(), config), plan, 3)
    assert whole.value == "quick"
    end = next(n for n, e in enumerate(log) if isinstance(e.event, BranchEnded) and e.event.status == "ok")
    engine = Engine(model(), replace(config, lanes=1))
    result, after = go_on(engine, plan, 3, log[: end + 1])
    assert result.value == "quick"
    assert not any(isinstance(e.event, BranchStarted) and e.thread == ("a[slow]",) for e in after)
    hold_against_reference(plan, result)


@pytest.mark.parametrize("lanes", [1, 8])
def test_a_passed_deadline_stays_passed(lanes: int) -> None:
    """The decision of a deadline is taken from the journal: its late branches are not decoded on."""
    text = """
    p = plan() {
      text("x");
      a = fork(deadline="5s") {
        one = branch() { g = gen("k", type=choice("a"), max=2); return(g); };
        two = branch() { loop(9) { g = gen("k", max=40); }; return("late"); };
      } join(all(min=1), stitch);
      b = fork(2) { h = gen("m", max=5); return(h); } join(all);
      return(b);
    }
    """
    plan = Plan.parse(text)
    config = EngineConfig(lanes=lanes, pages=512)

    def timed(kept: Sequence[LogEntry], step_s: float) -> tuple[RunResult, list[LogEntry]]:
        engine = Engine(model(), config)
        now = [0.0]
        engine.clock = lambda: now[0]
        log: list[LogEntry] = []
        run = engine.submit(plan.program, seed=4, log=log.append, replay=Replay(kept) if kept else None)
        while run.result is None:
            engine.step()
            now[0] += step_s
        assert_idle(engine)
        return run.result, log

    whole, log = timed([], 0.25)
    assert "late" in {branch.status for branch in whole.branches}
    closed = next(n for n, e in enumerate(log) if isinstance(e.event, Joined))
    for cut in range(closed + 1, len(log)):
        result, _ = timed(log[:cut], 0.0)
        assert result.value == whole.value
        assert result.counts["critical_path_tokens"] <= whole.counts["critical_path_tokens"]
        hold_against_reference(plan, result)


def test_what_no_branch_has_ended_after_is_kept_when_a_run_is_given_up(tmp_path: Path) -> None:
    """Ctrl-C leaves gens of branches that had not ended in the journal, which `commit` alone would not write yet."""
    path = tmp_path / "run.journal"
    head = header('p = plan() { x = fork(2) { a = gen("a", max=2); b = gen("b", max=60); }; }', inputs=({},))
    engine = engine_of(head)
    with Journal.create(str(path)) as journal:
        run = engine.submit(head.text, {}, log=journal.log(0))
        journal.begin(head)
        for _ in range(8):
            engine.step()
        journal.commit()
        before = read_journal(str(path)).entries[0]
        journal.commit(all_of_it=True)
        engine.cancel(run)
    after = read_journal(str(path)).entries[0]
    assert after[: len(before)] == before
    assert not any(isinstance(entry.event, GenEnded) for entry in before)
    assert sum(isinstance(entry.event, GenEnded) for entry in after) == 2
