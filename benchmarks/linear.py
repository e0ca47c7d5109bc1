"""Time F.linear against a linear over packed weights on SmolLM2's shapes, and check the bits of a row.

    OMP_NUM_THREADS=1 python benchmarks/linear.py

Prints microseconds per call, the least of several runs, over as many distinct weights as the model has layers, so that
they come from memory as they do in a decode step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from anabranch.runtime.linear import Linear, has_packed_linear

ROWS = (1, 2, 8, 32, 64, 512)
# name: (out_features, in_features, layers)
SHAPES = {
    "qkv": (960, 576, 30),
    "output": (576, 576, 30),
    "gate_up": (3072, 576, 30),
    "down": (576, 1536, 30),
    "lm_head": (49152, 576, 1),
}
RUNS = 5


def least_us(call: Callable[[int], Tensor], layers: int) -> float:
    """Microseconds per call, over `layers` calls in a row."""
    best = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        for layer in range(layers):
            call(layer)
        best = min(best, (time.perf_counter() - start) / layers)
    return best * 1e6


def same_bits(linear: Linear, in_features: int) -> bool:
    """Whether the first and last row get the same bits for any number of rows from 2."""
    x = torch.randn(max(ROWS), in_features)
    first, last = linear(x[:2])[0], linear(x[-2:])[-1]
    return all(
        torch.equal(linear(x[:rows])[0], first) and torch.equal(linear(x[-rows:])[-1], last)
        for rows in (2, 3, 5, 7, 8, 16, 17, 31, 32, 33, 48, 63, 64, 65, 127, 128, 256, 511, 512)
    )


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.uname().machine}", end=", ")
    print(f"{torch.backends.cpu.get_cpu_capability()}, packed: {has_packed_linear()}")
    print(f"{'shape':<10}" + "".join(f"{rows:>16}" for rows in ROWS) + "  same bits from 2 rows")
    for name, (out_features, in_features, layers) in SHAPES.items():
        weights = [torch.randn(out_features, in_features) for _ in range(layers)]
        linears = [Linear(weight) for weight in weights]
        cells = []
        for rows in ROWS:
            x = torch.randn(rows, in_features)
            plain = least_us(lambda layer, x=x, w=weights: torch.nn.functional.linear(x, w[layer]), layers)
            packed = least_us(lambda layer, x=x, w=linears: w[layer](x), layers)
            cells.append(f"{plain:>8.0f}/{packed:<7.0f}")
        print(f"{name:<10}" + "".join(cells) + f"  {same_bits(linears[0], in_features)}")


if __name__ == "__main__":
    main()
