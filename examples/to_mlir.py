"""Write a plan and its schedule as MLIR, read them back, then run a model's step as machine code through torch-mlir.

python examples/to_mlir.py [MODEL] [FOLDER]      (needs `pip install 'anabranch[mlir]'`)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import anabranch
from anabranch.compiler.emit_mlir import dialect_text, from_mlir
from anabranch.compiler.mlir import jit, mlir_text
from anabranch.compiler.show import mlir_of
from anabranch.runtime.attention import Block
from anabranch.runtime.dense_step import DenseStep, dense_inputs, dense_weights, export_dense_step
from anabranch.runtime.pages import KvStore, PagePool, Segment


def main(model: str, folder: Path) -> None:
    """Write `anabranch.irdl.mlir` and `vote.mlir` to `folder`, and compare a prefill with torch."""
    program = anabranch.parse(anabranch.read_source(Path(__file__).with_name("vote.plan")))
    text = mlir_of(program)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "anabranch.irdl.mlir").write_text(dialect_text(), encoding="utf-8")
    (folder / "vote.mlir").write_text(text, encoding="utf-8")
    schedule, origin = from_mlir(text)
    print(f"read back: plan {origin.plan}, {schedule.calls} calls, {schedule.threads} threads")

    loaded = anabranch.load(model, device="cpu")
    decoder, config = loaded.decoder, loaded.decoder.config
    pool = PagePool(16, 16)
    store = KvStore(pool, config.num_layers, config.num_kv_heads, config.head_dim, decoder.dtype)
    weights = dense_weights(decoder)
    step = export_dense_step(decoder, weights, pool.num_pages * pool.page_size)
    print(f"the step in linalg: {len(mlir_text(step, 'linalg').splitlines())} lines")

    segment = Segment(pool, 0)
    ids = loaded.tokenizer.encode([("The capital of France is", True)])
    segment.append(ids)
    inputs = dense_inputs(decoder, [Block(None, segment, 0, len(ids))], ids, [len(ids) - 1])
    args = (*inputs.tensors(), store.k, store.v, weights)
    found, _, _ = jit(step)(*args)
    with torch.no_grad():
        expected, _, _ = DenseStep(decoder)(*args)
    print(f"largest difference of a logit from torch's: {float((found - expected).abs().max()):.1e}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2", Path(sys.argv[2] if len(sys.argv) > 2 else "."))
