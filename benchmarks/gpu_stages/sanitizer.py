"""compute-sanitizer over the small cases of `correct`: reads and writes out of bounds, and races in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from gpu_stages.log import Figures, Log

SCRIPT = Path(__file__).resolve().parent.parent / "gpu.py"
USUAL = "/usr/local/cuda/bin/compute-sanitizer"


def run(log: Log) -> str | None:
    """Both tools, where there is one."""
    tool = shutil.which("compute-sanitizer") or shutil.which(USUAL)
    if tool is None or log.device.type != "cuda":
        return "needs compute-sanitizer and a GPU"
    for name in ("memcheck", "racecheck"):
        log.case(name, partial(sanitized, log, tool, name))
    return None


def sanitized(log: Log, tool: str, name: str) -> Figures:
    """One tool's verdict."""
    out = log.out / f"sanitizer-{name}"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        tool, "--tool", name, "--error-exitcode", "9", sys.executable, str(SCRIPT), "--worker", "correct", "--small",
        "--out", str(out), "--limit-s", str(log.left_s()),
    ]  # fmt: skip
    # Without torch's own cache each tensor is an allocation, whose bounds are known.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=max(1.0, log.left_s())
        )
    except subprocess.TimeoutExpired as error:
        return {"error": f"did not end in {error.timeout:.0f} s"}
    (out.parent / f"sanitizer-{name}.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    found = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", done.stdout + done.stderr)
    figures: Figures = {"errors": int(found[-1]) if found else -1, "status": done.returncode}
    if done.returncode or not found or figures["errors"]:
        figures["error"] = f"see {out.name}.txt"
    return figures
