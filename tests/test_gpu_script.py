"""`benchmarks/gpu.py` on a CPU at tiny sizes: its stages run, go on where they were, and fail apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"
STAGES = ("build", "correct", "tests", "graphs", "bitwise", "sanitizer", "attention", "prefill", "step", "fork")


BLOCKER = """
import importlib.util, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {blocked} else found(name, *rest)
"""
"""As if some packages were not installed."""
ABORTS = """
import os, sys
if sys.orig_argv[-2:] == ["--worker", "correct"]:
    os.abort()
"""
"""As a fault of the driver ends a process."""


def script(out: Path, *options: str, site: str = "") -> tuple[int, str]:
    """The script's exit status and what it printed. site: run by every Python process at its start."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if site:
        folder = out.parent / "site"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(site)
        environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--out", str(out), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def found(out: Path, name: str) -> dict[str, Any]:
    content = json.loads((out / f"{name}.json").read_text())
    assert isinstance(content, dict)
    return content


def chosen(*names: str) -> list[str]:
    return [word for name in names for word in ("--stage", name)]


def test_it_lists_its_stages(tmp_path: Path) -> None:
    """Every stage of the documentation, in order, and each is told of there."""
    status, printed = script(tmp_path / "out", "--list")
    assert status == 0
    assert tuple(line.split()[0] for line in printed.splitlines()) == STAGES
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name in STAGES:
        assert f"| `{name}` |" in page


def test_stages_run_without_what_the_language_needs(tmp_path: Path) -> None:
    """With nothing but torch and Triton all but the repository's own tests run; targets stand beside their figures."""
    out = tmp_path / "out"
    names = ("correct", "tests", "graphs", "bitwise", "sanitizer", "attention", "prefill", "step", "fork")
    without = BLOCKER.format(
        blocked={"lark", "llguidance", "tokenizers", "safetensors", "gguf", "jinja2", "typer", "rich", "pytest"}
    )
    status, printed = script(out, *chosen(*names), site=without)
    assert status == 0, printed
    statuses = {name: found(out, name)["status"] for name in names}
    assert statuses == dict.fromkeys(names, "ok") | {"tests": "skipped", "sanitizer": "skipped"}
    assert found(out, "tests")["reason"] == "needs pytest, lark, llguidance, tokenizers, safetensors"
    summary = found(out, "summary")
    assert set(summary["stages"]) == set(names)
    assert {target["sense"] for target in summary["targets"]} == {"at least", "at most"}
    for target in summary["targets"]:
        assert target["name"] in printed
        assert target["met"] == (
            target["found"] >= target["limit"] if target["sense"] == "at least" else target["found"] <= target["limit"]
        )
    assert found(out, "graphs")["rows"]["bfloat16 deterministic"]["launches"] > 10
    assert found(out, "bitwise")["rows"]["decode, bfloat16"]["different"] == 0
    # What is done is not done again; what is known of a stage that was cut off is kept; findings of other code are not.
    before = found(out, "step")
    cut = found(out, "correct")
    [lost, *_] = cut["rows"]
    kept = cut["rows"] | {"kept": {"off": 0.125}}
    del kept[lost]
    (out / "correct.json").write_text(json.dumps(cut | {"rows": kept, "status": "running"}))
    old = found(out, "prefill")
    stale = {"settings": old["settings"] | {"source": "other"}, "rows": {"kept": {"off": 0.5}}}
    (out / "prefill.json").write_text(json.dumps(old | stale))
    status, printed = script(out, *chosen("step", "correct", "prefill"), site=without)
    assert status == 0, printed
    assert found(out, "step") == before
    assert found(out, "correct")["rows"] == cut["rows"] | {"kept": {"off": 0.125}}
    assert printed.count(f"  {lost}: ") == 1 and printed.count("  norm") == 1
    assert printed.count("is forgotten") == 1
    assert found(out, "prefill")["rows"].keys() == old["rows"].keys()


def test_a_stage_that_breaks_stops_no_other(tmp_path: Path) -> None:
    """A stage whose process dies is failed with a reason, the next one runs; out of time it says that it can go on."""
    out = tmp_path / "out"
    status, printed = script(out, *chosen("correct", "bitwise"), "--limit-s", "0", site=ABORTS)
    assert status == 1, printed
    assert found(out, "correct")["status"] == "failed"
    assert found(out, "correct")["reason"] == "its process ended with status -6"
    assert (found(out, "bitwise")["status"], found(out, "bitwise")["rows"]) == ("unfinished", {})
    assert "run it again, and it goes on from here" in printed


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    """The default device is a GPU; where there is none that is said, and nothing is run."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torch sees no GPU" in done.stderr
    assert not list(tmp_path.iterdir())
