"""Export of SmolLM2's step, and a step four ways, side by side.

    OMP_NUM_THREADS=1 python benchmarks/export.py [--rows 1 8 32] [--chunk 64] [--prefix 1024] [--repeats 5]

The steps, in fp32: `--rows` branches over one prefix that decode a token each, and a chunk of prefill after the prefix.
`engine` is what `Engine` runs on a CPU: packed linears, and attention by torch's flash operation, planning included.
The other three run the torch definitions of the kernels, as `load(..., device="cpu")` does, and are given lists planned
before: `device` is `DeviceForward` as it stands, `program` the exported step, `inductor` that compiled by
`torch.compile`, with weights frozen and packed. Repetitions are interleaved; the least time of each is shown, in
milliseconds, and its ratio to `engine`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor.config as inductor
from decode import license_prefix, processor
from torch import Tensor
from torch.export import ExportedProgram

import anabranch
from anabranch.runtime.attention import Block, StepAttention
from anabranch.runtime.device import Device
from anabranch.runtime.model import Decoder
from anabranch.runtime.pages import Entry, KvStore, PagePool, Segment, View
from anabranch.runtime.step_graph import Kind, decode_inputs, export_step, load, prefill_inputs, save

OWN_TOKENS = 20
PAGE_SIZE = 16


def fork(
    ids: list[int], width: int, chunk: int, decoder: Decoder, device: Device, pool: PagePool
) -> tuple[KvStore, list[Block]]:
    """The next `chunk` rows of each of `width` branches behind the prefix `ids`, all of whose keys are written."""
    config = decoder.config
    store = KvStore(pool, config.num_layers, config.num_kv_heads, config.head_dim, torch.float32)
    root = Segment(pool, 0)
    root.append(ids)
    engine_step(decoder, store, [Block(None, root, 0, len(ids))], torch.tensor(ids), [])
    root.seal()
    view = View(None, [Entry(root)])
    written, next_rows = [], []
    for number in range(width):
        segment = Segment(pool, len(ids))
        # Branches are not as long as one another.
        segment.append(ids[number : number + OWN_TOKENS + number % 5])
        written.append(Block(view, segment, 0, segment.length, forks=(view,)))
        first = segment.append([0] * chunk).start
        next_rows.append(Block(view, segment, first, chunk, forks=(view,)))
    own = [token for block in written for token in block.segment.ids[: block.count]]
    engine_step(decoder, store, written, torch.tensor(own), [])
    for paged, flat in zip((*device.store.k, *device.store.v), (*store.k, *store.v), strict=True):
        paged.copy_(flat.unflatten(1, (-1, PAGE_SIZE)).transpose(0, 1))
    return store, next_rows


def seconds(call: Callable[[], object]) -> float:
    """That a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def engine_step(decoder: Decoder, store: KvStore, blocks: list[Block], ids: Tensor, wanted: list[int]) -> Tensor:
    """As `Engine` does a step."""
    attend = StepAttention(store, decoder.config, blocks, decoder.dtype)
    return decoder.forward(ids, attend.positions, attend, torch.tensor(wanted))


def export(decoder: Decoder, kind: Kind, folder: Path, fingerprint: str) -> ExportedProgram:
    """Export, save and load a program, and print how long each took."""
    path = folder / f"{kind}.pt2"
    started = time.perf_counter()
    program = export_step(decoder, kind, page_size=PAGE_SIZE)
    exported = time.perf_counter() - started
    saved = seconds(lambda: save(program, path, fingerprint=fingerprint))
    started = time.perf_counter()
    found = load(path, fingerprint=fingerprint)
    loaded = time.perf_counter() - started
    print(f"| {kind} | {exported:.1f} | {saved:.1f} | {loaded:.1f} | {path.stat().st_size / 1e6:.0f} |")
    return found


@torch.no_grad()
def main() -> None:
    """Measure, and print the tables of docs/torch.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    packed = anabranch.load("smollm2", template="raw").decoder
    plain = anabranch.load("smollm2", template="raw", device="cpu")
    _, ids = license_prefix(plain)
    prefix = ids[: options.prefix]
    print(f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| program | export, s | save, s | load, s | file, MB |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        kinds: tuple[Kind, Kind] = ("decode", "prefill")
        programs = {kind: export(plain.decoder, kind, Path(folder), plain.fingerprint) for kind in kinds}
    print(f"\nprefix of {options.prefix} tokens, the best of {options.repeats}; ms a step, and times `engine`\n")
    print("| step | engine | device | program | inductor | first call, s |\n| --- | --- | --- | --- | --- | --- |")
    modules = {kind: program.module() for kind, program in programs.items()}
    # Graphs of their own, since freezing takes the weights out of a module.
    graphs = {kind: torch.compile(program.module(), backend="inductor") for kind, program in programs.items()}
    steps: list[tuple[Kind, int, int]] = [("decode", width, 1) for width in options.rows]
    for kind, width, chunk in [*steps, ("prefill", 1, options.chunk)]:
        rows = width * chunk
        pool = PagePool(options.prefix // PAGE_SIZE + 4 * width + chunk // PAGE_SIZE + 8, PAGE_SIZE)
        device = Device(plain.decoder, pool, lanes=max(options.rows), chunk=16, deterministic=False)
        store, blocks = fork(prefix, width, chunk, packed, device, pool)
        ids = torch.tensor(prefix[:rows])
        wanted = list(range(rows)) if kind == "decode" else [rows - 1]
        if kind == "decode":
            given = decode_inputs(device, blocks, ids.tolist())
        else:
            given = prefill_inputs(device, blocks, ids.tolist(), wanted)
        step, module, graph = device.step(blocks), modules[kind], graphs[kind]
        with inductor.patch(freezing=True):
            started = time.perf_counter()
            found = graph(**given)
            first = time.perf_counter() - started
        torch.testing.assert_close(found, step.logits(ids.tolist(), wanted), rtol=0, atol=1e-3)
        ways: tuple[Callable[[], object], ...] = (
            lambda store=store, blocks=blocks, ids=ids, wanted=wanted: engine_step(packed, store, blocks, ids, wanted),
            lambda step=step, ids=ids, wanted=wanted: step.logits(ids.tolist(), wanted),
            lambda module=module, given=given: module(**given),
            lambda graph=graph, given=given: graph(**given),
        )
        times = [[seconds(way) for way in ways] for _ in range(options.repeats)]
        best = [1e3 * min(column) for column in zip(*times, strict=True)]
        cells = [f"{best[0]:.0f}", *(f"{ms:.0f} ({ms / best[0]:.1f})" for ms in best[1:])]
        print(f"| {kind} {rows} | {' | '.join(cells)} | {first:.0f} |", flush=True)


if __name__ == "__main__":
    main()
