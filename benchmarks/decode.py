"""Tokens per second over one shared prefix: this engine and transformers side by side, in one process.

    python benchmarks/decode.py [--widths 1 8 32] [--repeats 5] [--json FILE]

The work: SmolLM2-135M-Instruct in fp32, a prefix of 1,024 tokens (the start of this repository's LICENSE), and 64
tokens for each of 1, 8 and 32 branches, drawn at temperature 0.8 and top-p 0.95. Ours goes through `engine.run`, with
the draw and the tests for a stop text and the end of turn on every token. transformers gets its best: sdpa attention,
no stop tests at all, and a prefix that is prefilled once and expanded over the batch (`shared`); its plain batched
generate, which prefills every row, stands beside it (`plain`).

Two times are taken, the same way for both: from the start until every branch has its first token (prefill), and from
then until each has its 64th (decode, 63 tokens a branch). Repetitions are interleaved, so that what else the machine
does hits all alike. vLLM and llama.cpp take part where they are installed (LLAMA_GGUF names llama.cpp's file).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import anabranch
from anabranch.runtime import smollm2
from anabranch.runtime.engine import Run

PREFIX_TOKENS = 1024
NEW_TOKENS = 64
TEMPERATURE = 0.8
TOP_P = 0.95

PLAN = """
bench = plan(prefix: text(1024)) {{
  text("#{{prefix}}");
  notes = fork({width}) {{
    note = gen(max={tokens}, temperature={temperature}, top_p={top_p}, stop=["<|never|>"]);
    return(note);
  }} join(all, drop);
  return(len(notes));
}}
"""


@dataclass(frozen=True, slots=True)
class Timing:
    """One repetition. Seconds; `outside_share` is the part of the decode steps spent outside the model's forward."""

    prefill_s: float
    decode_s: float
    outside_share: float | None = None
    draw_share: float | None = None


class TimedEngine(anabranch.Engine):
    """An engine that notes what each of its steps took."""

    def __init__(self, model: anabranch.LoadedModel, config: anabranch.EngineConfig) -> None:
        super().__init__(model, config)
        self.steps: list[tuple[float, float, float, int]] = []
        """Seconds of the step, of the forward in it, of the draw in it, and tokens decoded until its end."""
        self._inside = [0.0, 0.0]
        self._forward = self._timed(0, self._forward)  # type: ignore[method-assign]
        self._draw = self._timed(1, self._draw)  # type: ignore[method-assign]

    def _timed(self, place: int, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args)
            finally:
                self._inside[place] += time.perf_counter() - started

        return timed

    def step(self) -> bool:
        """One step, timed."""
        runs: list[Run] = list(self._runs)
        self._inside[:] = [0.0, 0.0]
        started = time.perf_counter()
        more = super().step()
        elapsed = time.perf_counter() - started
        decoded = sum(run.counts["tokens_decoded"] for run in runs)
        self.steps.append((elapsed, *self._inside, decoded))
        return more


class Ours:
    """This engine."""

    name = "anabranch"

    def __init__(self, model: anabranch.LoadedModel, prefix: str) -> None:
        self._prefix = prefix
        config = anabranch.EngineConfig(lanes=64, prefix_cache=False, pool_bytes=1 << 29)
        self._engine = TimedEngine(model, config)
        self._plans: dict[int, anabranch.Compiled] = {}

    def measure(self, width: int) -> Timing:
        """One run of `engine.run`."""
        if width not in self._plans:
            text = PLAN.format(width=width, tokens=NEW_TOKENS, temperature=TEMPERATURE, top_p=TOP_P)
            self._plans[width] = self._engine.compile(anabranch.parse_text(text, "bench.plan"))
        self._engine.steps.clear()
        started = time.perf_counter()
        [result] = self._engine.run(self._plans[width], {"prefix": self._prefix})
        ended = time.perf_counter()
        counts = result.counts
        if counts["tokens_decoded"] != width * NEW_TOKENS or counts["tokens_prefilled"] != PREFIX_TOKENS:
            raise SystemExit(f"not the run that was meant: {result.status} {result.reason} {dict(counts)}")
        later = [step for step in self._engine.steps if step[3] > width]
        decode_s = sum(step[0] for step in later)
        forward_s = sum(step[1] for step in later)
        draw_s = sum(step[2] for step in later)
        return Timing(
            prefill_s=ended - started - decode_s,
            decode_s=decode_s,
            outside_share=1 - forward_s / decode_s,
            draw_share=draw_s / decode_s,
        )


class Transformers:
    """transformers' generate. `shared`: one prefill, its cache expanded over the batch."""

    def __init__(self, model: Any, prefix_ids: list[int], *, shared: bool) -> None:
        self.name = "transformers " + ("shared" if shared else "plain")
        self._model = model
        self._ids = torch.tensor([prefix_ids])
        self._shared = shared

    @torch.inference_mode()
    def measure(self, width: int) -> Timing:
        """One call of `generate`, and the prefill before it."""
        from transformers import DynamicCache

        ticks: list[float] = []

        def tick(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            ticks.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        torch.manual_seed(0)
        started = time.perf_counter()
        extra: dict[str, Any] = {}
        if self._shared:
            # All but the last token, which `generate` feeds itself to have logits to draw from.
            cache = DynamicCache(config=self._model.config)
            self._model(self._ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(width)
            extra["past_key_values"] = cache
        ids = self._ids.expand(width, -1)
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=0,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[tick],
            **extra,
        )
        if out.shape != (width, PREFIX_TOKENS + NEW_TOKENS) or len(ticks) != NEW_TOKENS:
            raise SystemExit(f"transformers made {tuple(out.shape)} tokens in {len(ticks)} steps")
        return Timing(prefill_s=ticks[0] - started, decode_s=ticks[-1] - ticks[0])


def vllm_timings(folder: Path, prefix_ids: list[int], widths: list[int], repeats: int) -> dict[int, list[Timing]]:
    """vLLM's offline engine: decode is a run of all tokens less a run of one, both on a cached prefix."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    engine = LLM(model=str(folder), dtype="float32", max_model_len=4096, enforce_eager=True, enable_prefix_caching=True)
    prompt = {"prompt_token_ids": prefix_ids}

    def run(width: int, tokens: int) -> float:
        params = SamplingParams(max_tokens=tokens, temperature=TEMPERATURE, top_p=TOP_P, ignore_eos=True)
        started = time.perf_counter()
        engine.generate([prompt] * width, params, use_tqdm=False)
        return time.perf_counter() - started

    found: dict[int, list[Timing]] = {}
    for width in widths:
        run(width, 2)
        for _ in range(repeats):
            first = run(width, 1)
            found.setdefault(width, []).append(Timing(first, run(width, NEW_TOKENS) - first))
    return found


def llama_cpp_timings(binary: str, gguf: str, widths: list[int]) -> dict[int, list[Timing]]:
    """llama-batched-bench with a shared prompt; its weights are what the file holds, Q4_1 for SmolLM2's."""
    npl = ",".join(map(str, widths))
    sizes = ["-c", "8192", "-npp", str(PREFIX_TOKENS), "-ntg", str(NEW_TOKENS), "-npl", npl]
    command = [binary, "-m", gguf, *sizes, "-pps", "-kvu", "-t", str(torch.get_num_threads())]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[int, list[Timing]] = {}
    # | PP | TG | B | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s | T s | S t/s |
    for row in re.findall(r"^\|((?: *[\d.]+ *\|){10})", out, re.MULTILINE):
        cells = [float(cell) for cell in row.strip("|").split("|")]
        # It decodes 64 tokens in T_TG; the others' decode time holds 63.
        found[int(cells[2])] = [Timing(cells[4], cells[6] * (NEW_TOKENS - 1) / NEW_TOKENS)]
    return found


def license_prefix(model: anabranch.LoadedModel) -> tuple[str, list[int]]:
    """The longest start of LICENSE that is `PREFIX_TOKENS` tokens, start token included, and its ids."""
    text = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")
    start = [] if model.tokenizer.bos_id is None else [model.tokenizer.bos_id]

    def ids_of(end: int) -> list[int]:
        return start + list(model.tokenizer.encode([(text[:end], False)]))

    # A longer text has fewer tokens now and then, by a few, so the end is looked for around where it must be.
    near = bisect_left(range(len(text)), PREFIX_TOKENS, key=lambda end: len(ids_of(end)))
    for end in range(near + 32, near - 32, -1):
        # A text gen after a trailing space would be offered that space, and the prefix be shorter by it.
        if not text[end - 1].isspace() and len(ids_of(end)) == PREFIX_TOKENS:
            return text[:end], ids_of(end)
    raise SystemExit("LICENSE has no start of that many tokens")


def report(found: dict[str, dict[int, list[Timing]]], widths: list[int]) -> None:
    """A Markdown table: tokens per second at the median and at best, and ours over theirs."""
    print(
        "| engine | branches | prefill s (median) | decode tokens/s (median) | decode tokens/s (best) | ours / this |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for width in widths:
        ours = statistics.median(t.decode_s for t in found[Ours.name][width])
        for name, timings in found.items():
            runs = timings.get(width, [])
            if not runs:
                continue
            tokens = width * (NEW_TOKENS - 1)
            median = statistics.median(t.decode_s for t in runs)
            best = min(t.decode_s for t in runs)
            prefill = statistics.median(t.prefill_s for t in runs)
            cells = f"{prefill:.3f} | {tokens / median:.1f} | {tokens / best:.1f} | {median / ours:.2f}"
            print(f"| {name} | {width} | {cells} |")
    print()
    print("| branches | outside the forward, share of a decode step (median) | of which the draw |")
    print("| ---: | ---: | ---: |")
    for width in widths:
        runs = found[Ours.name][width]
        outside = statistics.median(t.outside_share or 0.0 for t in runs)
        draw = statistics.median(t.draw_share or 0.0 for t in runs)
        print(f"| {width} | {outside:.1%} | {draw:.1%} |")


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """Measure, and print the tables of docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write every repetition's times here too")
    options = parser.parse_args()

    import transformers

    folder = smollm2.get_smollm2()
    model = anabranch.load("smollm2", template="raw")
    # No id is -1: the test for the end of turn is made on every token and never ends a branch.
    model.tokenizer.eos_ids = frozenset({-1})
    prefix, ids = license_prefix(model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    engines: list[Ours | Transformers] = [
        Ours(model, prefix),
        Transformers(theirs, ids, shared=True),
        Transformers(theirs, ids, shared=False),
    ]
    print(f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.repeats} repetitions")
    found: dict[str, dict[int, list[Timing]]] = {engine.name: {} for engine in engines}
    for width in options.widths:
        for engine in engines:
            engine.measure(width)  # the first call pays for memory and kernels, and is not counted
        for _ in range(options.repeats):
            for engine in engines:
                found[engine.name].setdefault(width, []).append(engine.measure(width))
    if importlib.util.find_spec("vllm") is not None:
        found["vllm"] = vllm_timings(folder, ids, options.widths, options.repeats)
    else:
        print("vllm: not installed")
    binary, gguf = shutil.which("llama-batched-bench"), os.environ.get("LLAMA_GGUF")
    if binary is not None and gguf is not None:
        found["llama.cpp"] = llama_cpp_timings(binary, gguf, options.widths)
    else:
        print("llama.cpp: not installed")
    print()
    report(found, options.widths)
    if options.json:
        plain = {name: {w: [asdict(t) for t in ts] for w, ts in by.items()} for name, by in found.items()}
        Path(options.json).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
