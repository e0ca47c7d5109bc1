"""What a journal costs: tokens per second with one and without, interleaved, and the time spent in writing it.

    python benchmarks/journal.py [--model smollm2] [--branches 32] [--tokens 64] [--repeats 5] [--folder .]

The work: branches that each draw up to `--tokens` tokens, and end their turn where the model does, so that they end in
different steps; every one of those steps writes and fsyncs. The journal is made in `--folder`: what an fsync costs is a
property of the disk under it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import anabranch
from anabranch.runtime.journal import Header, Journal

PLAN = """
bench = plan() {{
  user("Tell a short story.");
  notes = fork({branches}) {{ note = gen(max={tokens}); return(note); }} join(all, drop);
  return(len(notes));
}}
"""


@dataclass(frozen=True, slots=True)
class Timing:
    """One repetition."""

    seconds: float
    tokens: int
    commit_s: float = 0.0
    num_commits: int = 0
    num_bytes: int = 0


def run_once(engine: anabranch.Engine, text: str, seed: int, header: Header | None, path: Path) -> Timing:
    """Run the plan, with a journal at `path` if there is a header for it."""
    journal = None if header is None else Journal.create(str(path))
    started = time.perf_counter()
    commit_s, num_commits, size = 0.0, 0, 0
    run = engine.submit(text, seed=seed, log=None if journal is None else journal.log(0))
    if journal is not None and header is not None:
        journal.begin(header)
    while run.result is None:
        engine.step()
        if journal is not None:
            before = time.perf_counter()
            journal.commit()
            commit_s += time.perf_counter() - before
            now = path.stat().st_size
            num_commits, size = num_commits + (now > size), now
    seconds = time.perf_counter() - started
    if journal is not None:
        journal.close()
        path.unlink()
    return Timing(seconds, int(run.result.counts["tokens_decoded"]), commit_s, num_commits, size)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--branches", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=".")
    options = parser.parse_args()
    model = anabranch.load(options.model)
    config = anabranch.EngineConfig(lanes=options.branches, pages=options.branches * (options.tokens // 16 + 2) + 64)
    engine = anabranch.Engine(model, config)
    text = PLAN.format(branches=options.branches, tokens=options.tokens)
    header = Header(
        anabranch=anabranch.__version__, source="bench.plan", text=text, plan="bench", inputs=({},), many=False, seed=0,
        deterministic=False, lanes=config.lanes, pages=config.pages, page_size=config.page_size, chunk=config.chunk,
        preempt=config.preempt, model=options.model, fingerprint=model.fingerprint, dtype="float32", template=None,
        functions=None,
    )  # fmt: skip
    plain: list[Timing] = []
    kept: list[Timing] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for seed in range(options.repeats + 1):
            # The first warms up.
            pair = [run_once(engine, text, seed, head, Path(folder) / "a.jsonl") for head in (None, header)]
            if seed:
                plain.append(pair[0])
                kept.append(pair[1])
    speeds = [statistics.median(t.tokens / t.seconds for t in timings) for timings in (plain, kept)]
    commits, commit_s = sum(t.num_commits for t in kept), sum(t.commit_s for t in kept)
    print(f"{options.model}: {options.branches} branches of at most {options.tokens} tokens, {len(kept)} repetitions")
    print(f"without a journal    {speeds[0]:.1f} tokens/s (median)")
    print(f"with a journal       {speeds[1]:.1f} tokens/s (median)")
    print(f"in commits           {commit_s / sum(t.seconds for t in kept):.2%} of the time")
    print(f"commits              {commits / len(kept):.1f} a run, {1000 * commit_s / commits:.2f} ms each")
    print(f"size                 {sum(t.num_bytes for t in kept) / sum(t.tokens for t in kept):.1f} bytes a token")


if __name__ == "__main__":
    main()
