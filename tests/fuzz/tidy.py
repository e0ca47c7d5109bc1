"""Pick the inputs worth keeping: `python tests/fuzz/tidy.py parse FOLDER...` rewrites `corpus/parse` from it and these.

Files named `found-*`, which once broke something, stay. Kept besides are a few small files that reach most pairs of
lines, one run after the other, that all of them together reach.
Needs no atheris: coverage is what `sys.settrace` sees.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from targets import CORPUS, ROOT, TARGETS

MAX_FILES = 48
MAX_BYTES = 700
"""Of one file: larger ones are passed over, for a person may have to read it."""

Arc = tuple[str, int, int]


def arcs(name: str, data: bytes) -> set[Arc]:
    """The pairs of lines of our own code, one run after the other, that an input reaches."""
    found: set[Arc] = set()
    last: dict[FrameType, int] = {}

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(str(ROOT)) or "/tests/" in file:
            return None
        found.add((file, last.get(frame, 0), frame.f_lineno))
        last[frame] = frame.f_lineno
        return trace

    sys.settrace(trace)
    try:
        TARGETS[name](data)
    finally:
        sys.settrace(None)
    return found


def main(name: str, folders: list[str]) -> None:
    """Rewrite the corpus of target `name` from what is in it and in `folders`."""
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {file.read_bytes() for place in (folder, *map(Path, folders)) for file in place.iterdir()}
    TARGETS[name](b"")  # so that no input is credited with what is imported on first use
    reached = {data: arcs(name, data) for data in sorted(inputs, key=lambda d: (len(d), d)) if len(data) <= MAX_BYTES}
    left = set().union(*reached.values())
    kept: list[bytes] = []
    while left and len(kept) < MAX_FILES:
        # For the same gain the smaller file; a tenth of the gain is worth a hundred bytes.
        best = max(reached, key=lambda data: len(reached[data] & left) / (100 + len(data)))
        if not reached[best] & left:
            break
        left -= reached[best]
        kept.append(best)
    for file in folder.iterdir():
        if not file.name.startswith("found-"):
            file.unlink()
    for data in kept:
        (folder / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
    print(f"{name}: kept {len(kept)} of {len(inputs)} inputs, {sum(map(len, kept)):,} bytes; {len(left)} arcs left out")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
