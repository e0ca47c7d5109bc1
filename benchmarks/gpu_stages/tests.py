"""The repository's tests: those of the executor on the device in fp32 and bf16, those of the ops as they are.

`tests/test_device.py` takes its device and type from ANABRANCH_DEVICE and ANABRANCH_DTYPE.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

from gpu_stages.log import Figures, Log

ROOT = Path(__file__).resolve().parent.parent.parent


def run(log: Log) -> None:
    """Each file in a process of its own."""
    if log.small:
        chosen = ["tests/test_device.py::test_what_the_kernels_do_not_support_is_refused_by_name"]
        log.case("executor, float32", partial(pytest, log, chosen, {"ANABRANCH_DEVICE": "cpu"}))
        return
    for dtype in ("float32", "bfloat16"):
        setting = {"ANABRANCH_DEVICE": log.device.type, "ANABRANCH_DTYPE": dtype}
        log.case(f"executor, {dtype}", partial(pytest, log, ["tests/test_device.py"], setting))
    for file in sorted((ROOT / "tests").glob("test_kernel_*.py")):
        # The interpreter's turn is on every commit; here the ops are registered and traced by this torch.
        chosen = [str(file.relative_to(ROOT)), "-k", "not in_the_interpreter"]
        log.case(file.stem, partial(pytest, log, chosen, {}))


def pytest(log: Log, chosen: list[str], setting: dict[str, str]) -> Figures:
    """What pytest counted."""
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *chosen],
            cwd=ROOT, env=os.environ | setting | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
            timeout=max(1.0, log.left_s()),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return {"error": f"did not end in {error.timeout:.0f} s"}
    counted = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout[-2000:])}
    figures: Figures = {"passed": 0, **counted}
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        figures["error"] = "; ".join(lines[:5]) or (done.stdout + done.stderr)[-500:]
    return figures
