"""The fuzzers' corpus, and each input that once broke something, replayed without a fuzzer."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

from mutate import MUTATORS
from targets import CORPUS, TARGETS, Broken

MAX_CALLS = 200_000
"""Calls of Python functions that one small input may cost. Work is counted, since a clock depends on the machine."""

PLAIN = {
    "parse": b"a = plan() { }",
    "check": b"a = plan(q) { text(q); }",
    "schema": b"/a",
    "recording": b"{}",
    "journal": b"",
}
"""What is taken first, so that no input pays for what is made once."""

INPUTS = sorted(file for target in TARGETS for file in (CORPUS / target).iterdir())


def calls_made(target: str, data: bytes) -> int:
    """How many Python functions are called while `target` takes `data`."""
    TARGETS[target](PLAIN[target])
    count = 0

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        TARGETS[target](data)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("file", INPUTS, ids=[f"{file.parent.name}-{file.name}" for file in INPUTS])
def test_the_corpus_holds(file: Path) -> None:
    """What must hold of any input holds of this one, at a bounded cost."""
    assert calls_made(file.parent.name, file.read_bytes()) < MAX_CALLS


def test_the_corpus_is_small() -> None:
    """It is read by people and goes with the source: a few dozen files of a few hundred bytes for each target."""
    for target in TARGETS:
        sizes = [file.stat().st_size for file in (CORPUS / target).iterdir()]
        assert 2 <= len(sizes) <= 80, target
        assert max(sizes) <= 4096, target
    assert set(MUTATORS) == set(TARGETS) == set(PLAIN)


def test_a_broken_property_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A printer that loses a statement breaks the target `parse`."""
    import targets

    monkeypatch.setattr(targets, "print_plan", lambda program: "p = plan() { }")
    with pytest.raises(Broken, match="another program"):
        TARGETS["parse"](b'p = plan() { text("a"); }')
