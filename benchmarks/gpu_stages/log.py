"""What a stage found so far, written down case by case, so that a stage that is cut off goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

Figures: TypeAlias = dict[str, Any]


class OutOfTime(Exception):
    """The stage's limit is over."""


class Log:
    """One stage's findings.

    settings: what they depend on; findings under others are dropped
    limit_s: after which no further case is begun
    rows: the figures of each case by its name; targets: what was to be reached; failures: a line for each check that
        did not hold; headlines: figures for the summary
    """

    def __init__(
        self, stage: str, file: Path, settings: Mapping[str, Any], *, device: str, small: bool, limit_s: float
    ) -> None:
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.small = small
        self.rows: dict[str, Figures] = {}
        self.targets: dict[str, Figures] = {}
        self.failures: list[str] = []
        self.headlines: Figures = {}
        self.is_done = False
        self.out = file.parent
        self._stage = stage
        self._file = file
        self._settings = dict(settings)
        self._started = time.monotonic()
        self._limit_s = limit_s
        self._before_s = 0.0
        self._load()

    def begin(self) -> None:
        """The stage runs from here on."""
        self._write("running")

    def end(self, status: Literal["ok", "failed", "skipped", "unfinished"], reason: str) -> None:
        """How it went."""
        self._write(status, reason)

    def left_s(self) -> float:
        """Seconds until no further case is begun."""
        return self._limit_s - (time.monotonic() - self._started)

    def case(self, name: str, measure: Callable[[], Figures]) -> Figures:
        """The figures of a case, measured unless they are known; an `error` among them is a failure of the stage.

        Raises OutOfTime where it is unknown and the time is over.
        """
        if name not in self.rows:
            if self.left_s() <= 0:
                raise OutOfTime
            started = time.monotonic()
            figures = measure()
            took = time.monotonic() - started
            if "error" in figures:
                # Not kept: the next run tries it again.
                self.failures.append(f"{name}: {figures['error']}")
                print(f"  {name}: FAILED {figures}", flush=True)
                return figures
            self.rows[name] = figures
            self._write("running")
            shown = "  ".join(f"{key} {_short(value)}" for key, value in figures.items())
            print(f"  {name}: {shown}  ({took:.1f} s)", flush=True)
        return self.rows[name]

    def target(self, name: str, found: float, sense: Literal["at least", "at most"], limit: float) -> None:
        """A figure beside what it is to reach. Missing it is no failure of the stage."""
        met = found >= limit if sense == "at least" else found <= limit
        self.targets[name] = {"name": name, "found": found, "sense": sense, "limit": limit, "met": met}

    def _load(self) -> None:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if found.get("settings") != self._settings:
            print("  what was found before is of another card, size or code, and is forgotten", flush=True)
            return
        # The script writes a file without rows for a stage that came to nothing.
        self.rows = found.get("rows", {})
        self.targets = found.get("targets", {})
        self.headlines = found.get("headlines", {})
        self._before_s = found.get("elapsed_s", 0.0)
        self.is_done = found.get("status") == "ok"

    def _write(self, status: str, reason: str = "") -> None:
        content = {
            "stage": self._stage,
            "status": status,
            "reason": reason,
            "elapsed_s": round(self._before_s + time.monotonic() - self._started, 1),
            "settings": self._settings,
            "failures": self.failures,
            "targets": self.targets,
            "headlines": self.headlines,
            "rows": self.rows,
        }
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(self._file)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
