"""Milliseconds per step of the draw, at 49,152 tokens.

Logits are normal with a deviation of 5.4 and one token at the mean plus 18, which is how SmolLM2's looked on prose: a
quarter of the vocabulary is then within reach of the noise. `python benchmarks/sample.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from anabranch.kernels.sample import draw, logprob

VOCAB = 49_152
ROWS = (1, 8, 32, 64)
SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 50": {"top_k": 50},
    "min_p 0.05": {"min_p": 0.05},
    "0.7, top_k 40, top_p 0.9": {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
}


def milliseconds(work: Callable[[], object], repeats: int = 15) -> float:
    """The median of `repeats` runs, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2] * 1e3


def main() -> None:
    torch.manual_seed(0)
    logits = torch.randn(max(ROWS), VOCAB) * 5.4
    logits[:, 100] = 18.0
    print(f"{'ms per step':26}" + "".join(f"{n:>8}" for n in ROWS))
    for name, written in SETTINGS.items():
        chosen = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0} | written
        row = []
        for n in ROWS:
            arguments = {k: torch.full((n,), v) for k, v in chosen.items() if k != "top_k"}
            arguments["top_k"] = torch.full((n,), int(chosen["top_k"]))
            arguments["keys"], arguments["index"] = torch.randint(0, 1 << 32, (n, 2)), torch.arange(n)
            part = logits[:n]
            row.append(milliseconds(lambda part=part, arguments=arguments: draw(part, **arguments)))
        print(f"{name:26}" + "".join(f"{ms:8.2f}" for ms in row))
    row = [milliseconds(lambda n=n: logprob(logits[:n], torch.arange(n))) for n in ROWS]
    print(f"{'logprob':26}" + "".join(f"{ms:8.2f}" for ms in row))


if __name__ == "__main__":
    main()
