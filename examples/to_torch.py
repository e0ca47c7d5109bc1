"""A plan as a torch graph: compile it, print it, export it, load it and run it, beside the engine.

    python examples/to_torch.py [MODEL]

MODEL is what `anabranch run --model` takes; the random test model by default.
"""

import sys
import tempfile
from pathlib import Path

import torch

import anabranch
from anabranch.runtime.plan_ops import pack_inputs, read_result

PLAN = Path(__file__).parent / "vote.plan"


def main() -> None:
    model = anabranch.load(sys.argv[1] if len(sys.argv) > 1 else "random")
    compiled = anabranch.compile(anabranch.read_source(PLAN))
    graph = compiled.to_fx(model)
    print(graph.print_readable(print_output=False).partition("    class ")[0])

    question = {"problem": "How many legs does a spider have?"}
    inputs = pack_inputs(question, seed=1)
    with torch.no_grad():
        here = read_result(graph(inputs))
        program = torch.export.export(graph, (inputs,), dynamic_shapes=({0: torch.export.Dim("bytes")},), strict=False)
        with tempfile.TemporaryDirectory() as folder:
            torch.export.save(program, f"{folder}/vote.pt2")
            # Elsewhere: import anabranch.runtime.plan_ops, and `attach` the model first.
            loaded = torch.export.load(f"{folder}/vote.pt2")
            there = read_result(loaded.module()(inputs))

    engine = anabranch.Engine(model, anabranch.EngineConfig(deterministic=True))
    [expected] = engine.run(compiled, question, seed=1)
    print("graph:   ", ascii(here.value))
    print("exported:", ascii(there.value))
    print("engine:  ", ascii(expected.value))
    if not here.value == there.value == expected.value:
        raise SystemExit("they disagree")


if __name__ == "__main__":
    main()
