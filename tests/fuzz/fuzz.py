"""Fuzz one target under atheris: `python tests/fuzz/fuzz.py parse -max_total_time=60`. See docs/fuzzing.md.

Further arguments are libFuzzer's. Without a folder among them the committed corpus is read, and new inputs go to a
scratch folder, so that a run changes nothing in the repository; `tidy.py` picks what is worth keeping.
"""

from __future__ import annotations

import random
import sys
import tempfile

import atheris

MAX_LEN = 4096
"""The longest input, in bytes: nothing that is read has a rule that a longer one would reach."""

with atheris.instrument_imports(include=["anabranch"]):
    # What a target imports on first use must be instrumented too.
    from mutate import MUTATORS
    from targets import CORPUS, TARGETS

    from anabranch.runtime import constrain, generation, journal, tokenizer  # noqa: F401


def main(arguments: list[str]) -> None:
    """Never returns: libFuzzer ends the process, with 0 where it found nothing."""
    name, *options = arguments
    target, mutate = TARGETS[name], MUTATORS[name]

    def mutated(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        new = mutate(data, rng) if rng.randrange(4) else None
        return bytes(atheris.Mutate(data, max_size)) if new is None or len(new) > max_size else new

    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    if not any(not option.startswith("-") for option in options):
        options += [tempfile.mkdtemp(prefix=f"fuzz-{name}-"), str(folder)]
    limits = [f"-max_len={MAX_LEN}", "-timeout=25", "-rss_limit_mb=4096", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, *options], target, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
