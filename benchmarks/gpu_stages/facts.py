"""What a stage ran on, and which code: findings of another card or other code are not gone on with."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent


def facts(device: str) -> dict[str, str]:
    """The card, its driver, versions, and the tree.

    Raises SystemExit where there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; `--device cpu --small` tries the script without one")
    card = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
    return {
        "card": card,
        "driver": _driver() if device == "cuda" else "",
        "torch": torch.__version__,
        "triton": _triton(),
        "commit": _commit(),
        "source": _source(),
    }


def _triton() -> str:
    if find_spec("triton") is None:
        return ""
    import triton

    return str(triton.__version__)


def _driver() -> str:
    """nvidia-smi's word; empty where there is none."""
    return _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]


def _commit() -> str:
    """Of the tree, with a plus where it was changed since; empty outside a repository."""
    commit = _ask("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    return commit + "+" * bool(_ask("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"))


def _ask(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _source() -> str:
    """A digest of the code that is measured and of what measures it."""
    digest = hashlib.sha256()
    parts = ("kernels/*.py", "runtime/*.py", "benchmarks/bytes.py", "benchmarks/gpu_stages/*.py")
    files = [file for part in parts for file in ROOT.glob(part)]
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
