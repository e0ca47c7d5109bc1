"""The exported step against the step of an engine's device, on the same lists and pools."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

import anabranch
from anabranch.dsl.diagnostics import PlanError
from anabranch.runtime.attention import Block
from anabranch.runtime.device import Device
from anabranch.runtime.model import Decoder
from anabranch.runtime.pages import Entry, PagePool, Segment, View
from anabranch.runtime.random_model import random_config, random_weights
from anabranch.runtime.step_graph import (
    MANIFEST,
    Inputs,
    Kind,
    decode_inputs,
    export_step,
    load,
    prefill_inputs,
    save,
)
from anabranch.runtime.tokenizer import byte_tokenizer

PAGE_SIZE = 16


@cache
def decoder(variant: str = "plain") -> Decoder:
    """The random model with heads of a size that the kernels have. `odd` has QK norms, windows, biases, a tied head."""
    tokenizer = byte_tokenizer()
    config = replace(random_config(tokenizer), head_dim=64)
    weights = random_weights(config, tokenizer, 0)
    if variant == "odd":
        config = replace(config, qk_norm=True, qkv_bias=True, sliding_window=(24, None, 9), tied_embeddings=True)
        del weights["lm_head.weight"]
        generator = torch.Generator().manual_seed(1)
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}.self_attn."
            for name in ("q_norm", "k_norm"):
                weights[f"{prefix}{name}.weight"] = 1 + torch.rand(64, generator=generator)
            for name, heads in (("q", 4), ("k", 2), ("v", 2)):
                weights[f"{prefix}{name}_proj.bias"] = torch.rand(64 * heads, generator=generator)
    return Decoder(config, weights, pack=False, num_logits=config.vocab_size - 3)


@cache
def program(kind: Kind, variant: str = "plain") -> ExportedProgram:
    """Exported once for all tests."""
    return export_step(decoder(variant), kind)


@dataclass
class Thread:
    """A view and the open segment behind it."""

    view: View | None
    segment: Segment
    forks: tuple[View, ...] = ()

    def feed(self, token_ids: list[int]) -> Block:
        """Take the slots of more tokens; their rows."""
        first = self.segment.append(token_ids).start
        return Block(self.view, self.segment, first, len(token_ids), forks=self.forks)

    def write(self, device: Device, token_ids: list[int]) -> None:
        """Feed more tokens, and compute their keys and values."""
        block = self.feed(token_ids)
        device.step([block]).logits(token_ids, [0])

    def fork(self, device: Device, count: int, lengths: range) -> list[Thread]:
        """Seal, and go on in `count` branches, each with some tokens of its own."""
        self.segment.seal()
        end = self.segment.start + self.segment.length
        view = View(self.view, [Entry(self.segment)])
        branches = [Thread(view, Segment(self.segment.pool, end), (*self.forks, view)) for _ in range(count)]
        for number, (branch, length) in enumerate(zip(branches, lengths, strict=False)):
            if length:
                branch.write(device, [40 + number + index for index in range(length)])
        return branches


def new_device(variant: str = "plain") -> tuple[Device, PagePool]:
    """A device and its pool."""
    pool = PagePool(64, PAGE_SIZE)
    return Device(decoder(variant), pool, lanes=16, chunk=16, deterministic=False), pool


def stitched(view: View, branches: list[Thread], *, end_to_end: bool) -> Thread:
    """The parent goes on after a stitch of the branches: with their ends together, or laid end to end."""
    entries, shift, end = [], 0, branches[0].segment.start
    for branch in branches:
        branch.segment.seal()
        entries.append(Entry(branch.segment, shift))
        end = max(end, branch.segment.start + branch.segment.length + shift)
        shift += branch.segment.length if end_to_end else 0
    return Thread(View(view, entries), Segment(branches[0].segment.pool, end))


def steps(device: Device, pool: PagePool) -> Iterator[tuple[Kind, list[Block], list[int], list[int]]]:
    """Steps over a forked and a stitched view: kind, rows, tokens, and the rows whose logits are wanted."""
    root = Thread(None, Segment(pool, 0))
    yield "prefill", [root.feed([*range(30, 67)])], [*range(30, 67)], [36]
    yield "decode", [root.feed([7])], [7], [0]
    branches = root.fork(device, 3, range(5, 30, 9))
    yield "decode", [branch.feed([9 + i]) for i, branch in enumerate(branches)], [9, 10, 11], [0, 1, 2]
    late = branches[:2]
    blocks = [late[0].feed([*range(70, 75)]), late[1].feed([*range(80, 82)])]
    yield "prefill", blocks, [*range(70, 75), *range(80, 82)], [1, 4, 6]
    assert branches[0].view is not None
    ends = stitched(branches[0].view, branches, end_to_end=True)
    yield "decode", [ends.feed([12])], [12], [0]
    twigs = ends.fork(device, 7, range(7))
    for twig in twigs[:1]:
        twig.write(device, [13])
    yield "decode", [twig.feed([50 + i]) for i, twig in enumerate(twigs)], [*range(50, 57)], [*range(7)]
    assert twigs[0].view is not None
    joined = stitched(twigs[0].view, twigs[2:], end_to_end=False)
    yield "prefill", [joined.feed([*range(90, 99)])], [*range(90, 99)], [0, 8]
    pair = joined.fork(device, 2, range(3, 5))
    yield "decode", [branch.feed([5]) for branch in pair], [5, 5], [0, 1]


def inputs_of(device: Device, kind: Kind, blocks: list[Block], ids: list[int], wanted: list[int]) -> Inputs:
    return decode_inputs(device, blocks, ids) if kind == "decode" else prefill_inputs(device, blocks, ids, wanted)


def copied(value: Any) -> Any:
    return [x.clone() for x in value] if isinstance(value, list) else value.clone()


def pools(device: Device) -> list[Tensor]:
    return [*device.store.k, *device.store.v]


@pytest.mark.parametrize("variant", ["plain", "odd"])
def test_a_program_computes_the_device_s_step(variant: str) -> None:
    """Forked and stitched views, 1 to 37 rows: the same logits and the same pools, bit for bit."""
    modules = {kind: program(kind, variant).module() for kind in ("decode", "prefill")}
    device, pool = new_device(variant)
    seen = set()
    for kind, blocks, ids, wanted in steps(device, pool):
        given = inputs_of(device, kind, blocks, ids, wanted)
        before = copied(pools(device))
        found = modules[kind](**given)
        written = copied(pools(device))
        for kept, old in zip(pools(device), before, strict=True):
            kept.copy_(old)
        expected = device.step(blocks).logits(ids, wanted)
        assert torch.equal(found, expected)
        for kept, ours, old in zip(pools(device), written, before, strict=True):
            assert torch.equal(ours, kept) and not torch.equal(ours, old)
        seen.add((kind, len(ids)))
    assert seen == {
        ("decode", 1), ("decode", 2), ("decode", 3), ("decode", 7), ("prefill", 37), ("prefill", 7), ("prefill", 9)
    }  # fmt: skip


LOADER = """
import sys, torch
from anabranch.runtime.step_graph import load
folder, fingerprint = sys.argv[1:]
programs = {kind: load(f"{folder}/{kind}.pt2", fingerprint=fingerprint).module() for kind in ("decode", "prefill")}
found = []
for kind, inputs in torch.load(f"{folder}/inputs.pt"):
    found.append((programs[kind](**inputs), inputs["k"] + inputs["v"]))
torch.save(found, f"{folder}/found.pt")
"""


def test_a_fresh_process_runs_a_saved_program(tmp_path: Path) -> None:
    """Saved, and loaded where nothing was exported: the logits and pools of the device's own steps."""
    for kind in ("decode", "prefill"):
        save(program(kind), tmp_path / f"{kind}.pt2", fingerprint="f00d")
    device, pool = new_device()
    given, expected = [], []
    for kind, blocks, ids, wanted in steps(device, pool):
        inputs = {name: copied(x) for name, x in inputs_of(device, kind, blocks, ids, wanted).items()}
        given.append((kind, inputs))
        logits = device.step(blocks).logits(ids, wanted)
        expected.append((logits, copied(pools(device))))
    torch.save(given, tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-c", LOADER, str(tmp_path), "f00d"], check=True)
    found = torch.load(tmp_path / "found.pt")
    assert len(found) == len(expected) == 8
    for (logits, after), (our_logits, our_after) in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, our_logits, rtol=0, atol=1e-5)
        for kept, ours in zip(after, our_after, strict=True):
            torch.testing.assert_close(kept, ours, rtol=0, atol=1e-5)


def test_a_program_shows_the_ops() -> None:
    """Every layer appends, attends and merges by the registered ops, and a tied head is stored once."""
    targets = [str(node.target) for node in program("decode").graph.nodes]
    for op in ("rope_append", "segment_attention", "merge_states"):
        assert targets.count(f"anabranch.{op}.default") == 3, op
    assert [str(node.target) for node in program("prefill").graph.nodes].count("anabranch.segment_prefill.default") == 3
    assert "lm_head.weight" in program("decode").state_dict
    assert "lm_head.weight" not in program("decode", "odd").state_dict


def test_another_models_program_is_refused(tmp_path: Path) -> None:
    """Another fingerprint or version, a file without a manifest, damage, and no file: a PlanError that says which."""

    def refusal(path: Path, fingerprint: str = "f00d") -> tuple[str, str]:
        with pytest.raises(PlanError) as error:
            load(path, fingerprint=fingerprint)
        return error.value.diagnostics[0].code, error.value.diagnostics[0].message

    path = tmp_path / "decode.pt2"
    save(program("decode"), path, fingerprint="f00d")
    assert refusal(path, "beef") == (
        "bad-program",
        f"cannot use the program `{path}`: it is of the model f00d, not beef",
    )
    assert refusal(tmp_path / "none.pt2")[0] == "no-such-file"
    torch.export.save(program("decode"), str(tmp_path / "plain.pt2"))
    assert "no manifest" in refusal(tmp_path / "plain.pt2")[1]
    (tmp_path / "half.pt2").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "damaged" in refusal(tmp_path / "half.pt2")[1]
    for name, change in (("old", {"anabranch": "0.0.1"}), ("bad", {})):
        other = tmp_path / f"{name}.pt2"
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(other, "w") as copy:
            for entry in archive.namelist():
                data = archive.read(entry)
                if entry.endswith(MANIFEST):
                    data = json.dumps(json.loads(data) | change).encode()
                if name == "bad" and entry.endswith("model.json"):
                    data = data[: len(data) // 2]
                copy.writestr(entry, data)
    assert f"made by version 0.0.1, and this is {anabranch.__version__}" in refusal(tmp_path / "old.pt2")[1]
    assert refusal(tmp_path / "bad.pt2")[0] == "bad-program"


def test_what_has_no_program_is_refused_by_name() -> None:
    """Packed weights, a head size that the kernels do not have, several rows in a decoded block."""
    tokenizer = byte_tokenizer()
    config = random_config(tokenizer)
    weights = random_weights(config, tokenizer, 0)
    with pytest.raises(ValueError, match="head size of 16 is not supported"):
        export_step(Decoder(config, weights, pack=False), "decode")
    wide = replace(config, head_dim=64)
    with pytest.raises(ValueError, match="pack=False"):
        export_step(Decoder(wide, random_weights(wide, tokenizer, 0)), "decode")
    device, pool = new_device()
    thread = Thread(None, Segment(pool, 0))
    with pytest.raises(ValueError, match="blocks of one row"):
        decode_inputs(device, [thread.feed([1, 2])], [1, 2])


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_a_program() -> None:
    """`torch.compile` of a program gives its logits and writes the pools in place, for any number of rows."""
    module = program("decode").module()
    compiled = torch.compile(module, backend="inductor")
    device, pool = new_device()
    compared = 0
    for kind, blocks, ids, wanted in steps(device, pool):
        if kind == "prefill":
            device.step(blocks).logits(ids, wanted)
            continue
        given = inputs_of(device, kind, blocks, ids, wanted)
        before = copied(pools(device))
        found = compiled(**given)
        written = copied(pools(device))
        for kept, old in zip(pools(device), before, strict=True):
            kept.copy_(old)
        torch.testing.assert_close(found, module(**given), rtol=0, atol=1e-4)
        for kept, ours in zip(pools(device), written, strict=True):
            torch.testing.assert_close(ours, kept, rtol=0, atol=1e-4)
        compared += 1
    assert compared == 5
