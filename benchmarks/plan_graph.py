"""A plan as a torch graph beside the engine: what a step of decoding costs each, and what a graph costs to make.

    OMP_NUM_THREADS=1 python benchmarks/plan_graph.py [--widths 1 8 32] [--tokens 24] [--repeats 5] [--deterministic]

Each run is a plan on SmolLM2 in fp32 whose `--widths` branches decode `--tokens` tokens from a shared prompt of 1,024
(the start of LICENSE). A step is the time from one call of the model to the next, with all that lies between: planning,
drawing, stop tests, text. Runs of the two sides are interleaved, and the median of all their steps is shown. `make` is
`to_fx`, `export` is `torch.export` of the graph.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from decode import license_prefix, processor

import anabranch
from anabranch.runtime.plan_ops import pack_inputs, read_result
from anabranch.runtime.plan_run import PlanRun

PLAN = """
bench = plan(prompt) {
  text("#{prompt}");
  x = fork(WIDTH) { y = gen(" Number", max=TOKENS, temperature=0); return(len(y)); };
  return(x);
}
"""


class Clock:
    """When each call of the model began whose rows all decode."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.calls: list[float] = []

    def called(self, rows: int) -> None:
        self.calls.append(time.perf_counter() if rows == self.rows else -1.0)

    def steps(self) -> list[float]:
        """Seconds from one such call to the next."""
        return [later - call for call, later in pairwise(self.calls) if call > 0 and later > 0]


class TimedEngine(anabranch.Engine):
    clock_of_steps: Clock

    def _forward(self, attention: Any, blocks: Any, owners: Any, tokens: Any, wanted: Any) -> Any:
        self.clock_of_steps.called(len(tokens))
        return super()._forward(attention, blocks, owners, tokens, wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--deterministic", action="store_true")
    given = parser.parse_args()
    model = anabranch.load("smollm2")
    prompt, _ = license_prefix(model)
    print(f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)\n")
    print("| branches | engine, ms a step | graph, ms a step | ratio | make, s | export, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    step_of_graph = PlanRun.step
    with torch.no_grad():
        for width in given.widths:
            text = PLAN.replace("WIDTH", str(width)).replace("TOKENS", str(given.tokens))
            engine = TimedEngine(model, anabranch.EngineConfig(deterministic=given.deterministic))
            start = time.perf_counter()
            graph = anabranch.compile(text).to_fx(model, deterministic=given.deterministic)
            make_s = time.perf_counter() - start
            inputs = pack_inputs({"prompt": prompt})
            start = time.perf_counter()
            torch.export.export(graph, (inputs,), dynamic_shapes=({0: torch.export.Dim("bytes", min=2)},), strict=False)
            export_s = time.perf_counter() - start
            found: dict[str, list[float]] = {"engine": [], "graph": []}
            for _ in range(given.repeats):
                engine.clock_of_steps = of_engine = Clock(width)
                expected = engine.run(text, {"prompt": prompt})[0].value
                of_graph = Clock(width)

                def step(run: Any, blocks: Any, *args: Any, clock: Clock = of_graph) -> Any:
                    clock.called(len(blocks) if all(block.count == 1 for block in blocks) else 0)
                    return step_of_graph(run, blocks, *args)

                PlanRun.step = step  # type: ignore[method-assign]
                value = read_result(graph(inputs)).value
                if value != expected:
                    raise SystemExit(f"they disagree: {value}, {expected}")
                found["engine"] += of_engine.steps()
                found["graph"] += of_graph.steps()
            of_step = {side: statistics.median(steps) for side, steps in found.items()}
            print(
                f"| {width} | {of_step['engine'] * 1e3:.1f} | {of_step['graph'] * 1e3:.1f} | "
                f"{of_step['graph'] / of_step['engine']:.3f} | {make_s:.2f} | {export_s:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
