"""The key of a thread's random numbers. The draw itself is `kernels/sample.py`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def draw_key(seed: int, input_index: int, path: Sequence[str]) -> tuple[int, int]:
    """The Philox key of one thread: (low 32 bits, high 32 bits) of the first 64 bits of BLAKE2b.

    seed: the plan's, or the gen's own
    input_index: which of the run's inputs, from 0
    path: as in `runtime/events.py`, loop rounds and retries included

    The components are joined by U+001F, which no path holds, so two different threads never hash the same text.
    """
    text = f"{seed}\x1f{input_index}\x1f" + "\x1f".join(path)
    key = int.from_bytes(hashlib.blake2b(text.encode()).digest()[:8], "little")
    return key & 0xFFFFFFFF, key >> 32
