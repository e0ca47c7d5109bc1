"""What `--deterministic` costs: the same run with and without it, in turn, in one process.

    OMP_NUM_THREADS=1 python benchmarks/deterministic.py [--widths 1 8 32] [--cut 0] [--tokens 64] [--repeats 3]

The work is that of benchmarks/decode.py: SmolLM2-135M-Instruct in fp32 and a prefix of 1,024 tokens. `--cut` leaves out
so many characters at its end, so that its last part is not a whole one and each branch reads its own copy of it.
Seconds are of processor time with one thread of torch, so that what else the machine does counts for little.
"""

from __future__ import annotations

import argparse
import time

import torch
from decode import PLAN, TEMPERATURE, TOP_P, license_prefix, processor

import anabranch
from anabranch.runtime.fixed_shapes import find_fixed_shapes


def measure(engine: anabranch.Engine, plan: anabranch.Compiled, prefix: str, width: int) -> tuple[float, float]:
    """Seconds of processor time until every branch has its first token, and from then to the end."""
    run = engine.submit(plan, {"prefix": prefix})
    before = after = 0.0
    while run.result is None:
        started = time.process_time()
        engine.step()
        elapsed = time.process_time() - started
        if run.counts["tokens_decoded"] > width:
            after += elapsed
        else:
            before += elapsed
    if run.result.status != "ok":
        raise SystemExit(f"not the run that was meant: {run.result.reason}")
    return before, after


def main() -> None:
    """Measure, and print the table of docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--cut", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    torch.set_num_threads(1)
    model = anabranch.load("smollm2", template="raw")
    # No id is -1: the test for the end of turn is made on every token and never ends a branch.
    model.tokenizer.eos_ids = frozenset({-1})
    prefix, ids = license_prefix(model)
    if options.cut:
        prefix = prefix[: -options.cut].rstrip()
        ids = list(model.tokenizer.encode([(prefix, False)], start=True))
    started = time.process_time()
    find_fixed_shapes(model.decoder)
    print(f"{processor()}, torch {torch.__version__}, one thread, {options.repeats} repetitions, the best of each")
    print(f"prefix of {len(ids)} tokens, {options.tokens} tokens a branch; ", end="")
    print(f"the sizes that agree were found in {time.process_time() - started:.2f} s\n")
    config = {"lanes": 64, "prefix_cache": False, "pool_bytes": 1 << 29}
    engines = [anabranch.Engine(model, anabranch.EngineConfig(**config, deterministic=on)) for on in (False, True)]
    print("| branches | prefill s | deterministic | decode tokens/s | deterministic | cost |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for width in options.widths:
        text = PLAN.format(width=width, tokens=options.tokens, temperature=TEMPERATURE, top_p=TOP_P)
        plans = [engine.compile(text) for engine in engines]
        times: list[list[tuple[float, float]]] = [[], []]
        for _ in range(options.repeats):
            for place, engine in enumerate(engines):
                times[place].append(measure(engine, plans[place], prefix, width))
        (plain, plain_decode), (fixed, fixed_decode) = (tuple(map(min, zip(*found, strict=True))) for found in times)
        tokens = width * (options.tokens - 1)
        print(
            f"| {width} | {plain:.3f} | {fixed:.3f} | {tokens / plain_decode:.1f} | {tokens / fixed_decode:.1f} "
            f"| {fixed_decode / plain_decode:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
