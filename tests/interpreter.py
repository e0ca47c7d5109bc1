"""Triton's interpreter is a property of the process: a test file that needs it runs itself again in one that has it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the subprocess of test_in_the_interpreter")
"""Marks a test that needs the interpreter."""
starts_interpreter = pytest.mark.skipif(
    INTERPRETED or find_spec("triton") is None, reason="is the interpreter, or Triton is not installed"
)
"""Marks the test that runs the others there."""


def run_in_interpreter(file: str) -> str:
    """Run the tests of `file` in the interpreter, all of which must pass; returns what pytest printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    return done.stdout
