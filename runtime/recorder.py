"""Writes down what an engine does, as a recorded schedule (see `compiler/recording.py` for its grammar)."""

from __future__ import annotations

from anabranch.compiler.recording import Recording, Source, Step
from anabranch.compiler.scheduler import Machine


class Recorder:
    """One recording, from an engine's first run to now. Give it to one engine, before that engine's first run.

    It keeps every step, so it grows with the run: about 200 bytes for each row fed and run of slots read.
    """

    def __init__(self) -> None:
        self.machine = Machine()
        self.deterministic = False
        self._runs: list[Source] = []
        self._steps: list[Step] = []
        self._broken = ""

    def attach(self, machine: Machine, *, deterministic: bool) -> None:
        """What the engine runs on. Raises ValueError if another engine has been recorded."""
        if self._runs or self._steps:
            raise ValueError("a recorder records one engine")
        self.machine = machine
        self.deterministic = deterministic

    def add_run(self, source: Source) -> int:
        """A run was submitted; returns its number."""
        self._runs.append(source)
        return len(self._runs) - 1

    def note(self, step: Step) -> None:
        """This happened."""
        self._steps.append(step)

    def give_up(self, reason: str) -> None:
        """A step broke, and the engine forgot its runs: what is written down does not end."""
        self._broken = self._broken or reason

    def recording(self) -> Recording:
        """What was written down. Raises RuntimeError if a step of the engine broke."""
        if self._broken:
            raise RuntimeError(f"the recording is not whole: {self._broken}")
        return Recording(self.machine, self.deterministic, tuple(self._runs), tuple(self._steps))
