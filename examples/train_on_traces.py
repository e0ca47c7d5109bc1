"""Train on what runs wrote: journals, packed into rows, and a few gradient steps of a small model on them.

    python examples/train_on_traces.py [STEPS]

The runs are those of `vote.plan` on the random test model, so there is nothing to learn but which tokens it favours.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.data import DataLoader

from anabranch.runtime.training import PackedDataset, collate, loss, visibility

PLAN = Path(__file__).parent / "vote.plan"
WIDTH, NUM_HEADS = 64, 4


class Layer(nn.Module):
    """Attention under an explicit mask, at explicit positions, and a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, turn: Tensor, mask: Tensor) -> Tensor:
        """x: [batch, length, width], turn: [batch, 1, length, half] complex, mask: [batch, 1, length, length]"""
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, length, 3, NUM_HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k = (
            torch.view_as_real(torch.view_as_complex(z.reshape(*z.shape[:-1], -1, 2)) * turn).flatten(3) for z in (q, k)
        )
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.feed(self.norms[1](x))


class Model(nn.Module):
    """A decoder that takes positions and a mask as they come."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocab_size, bias=False)
        half = WIDTH // NUM_HEADS // 2
        self.register_buffer("frequencies", 10_000.0 ** -(torch.arange(half) / half))

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """ids, positions: [batch, length]; mask: [batch, length, length]. Returns [batch, length, vocab]."""
        angles = positions[:, None, :, None] * self.frequencies
        turn = torch.polar(torch.ones_like(angles), angles)
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, turn, mask[:, None])
        return self.head(self.norm(x))


def make_pack(folder: Path) -> Path:
    """Run a plan on a few inputs with a journal, and pack what the branches wrote."""
    inputs, journal, packed = folder / "inputs.jsonl", folder / "runs.jsonl", folder / "packed"
    # Runs of one prompt share it: of each question there are three, each with noise of its own.
    inputs.write_text(
        "".join(f'{{"problem": "What is {n // 3} + {n}?"}}\n' for n in (3, 3, 3, 6, 6, 6)), encoding="utf-8"
    )
    _anabranch("run", str(PLAN), "--model", "random", "--inputs", str(inputs), "--journal", str(journal))
    print(_anabranch("pack", str(journal), "-o", str(packed), "--length", "2048").split(": ", 1)[1], end="")
    print(_anabranch("stats", str(journal)), end="")
    return packed


def _anabranch(*command: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "anabranch", *command], capture_output=True, text=True, check=True
    ).stdout


def main(steps: int) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        dataset = PackedDataset(make_pack(Path(folder)))
        model = Model(dataset.manifest.vocab_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        batches = DataLoader(dataset, batch_size=1, collate_fn=collate, shuffle=True)
        step = 0
        while step < steps:
            for batch in batches:
                # On a GPU: `flex_attention` of torch, compiled, with `block_mask(batch)` in place of the dense mask.
                logits = model(batch["input_ids"], batch["position_ids"], visibility(batch))
                value = loss(logits, batch)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                step += 1
                print(f"step {step}: loss {value.item():.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
