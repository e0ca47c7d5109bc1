"""Run a plan on a decoder of your own: any `nn.Module` whose layers call back for attention.

python examples/own_model.py

The model has random weights and a tokenizer of bytes, so it writes nonsense.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import anabranch
from anabranch.runtime.chat import RawChat
from anabranch.runtime.config import ModelConfig, RopeConfig
from anabranch.runtime.fixed_shapes import FixedShapes, not_deterministic
from anabranch.runtime.model import Attend
from anabranch.runtime.models import LoadedModel
from anabranch.runtime.tokenizer import byte_tokenizer

PLAN = """
go = plan() {
  text("Once upon a time");
  ideas = fork(3) { idea = gen(max=12, temperature=0.9); return(idea); } join(all, stitch(sum));
  end = gen(" so ", max=8);
  return([ideas, end]);
}
"""


class OwnDecoder(nn.Module):
    """Two layers with layer norms, GELU, and one linear for queries, keys and values.

    packed: True for the engine's own attention on a CPU, False for the ops `rope_append`, `segment_attention`,
        `merge_states` and `segment_prefill`
    """

    def __init__(self, vocab_size: int, *, packed: bool) -> None:
        super().__init__()
        self.config = ModelConfig(
            architecture="own", hidden_size=128, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64,
            intermediate_size=256, vocab_size=vocab_size, max_context=4096, rms_norm_eps=0.0,
            rope=RopeConfig(theta=100.0), sliding_window=(None, None),
        )  # fmt: skip
        self.dtype, self.device, self.packed = torch.float32, torch.device("cpu"), packed
        self.num_logits = vocab_size
        self.embedding = nn.Embedding(vocab_size, 128)
        self.norms = nn.ModuleList(nn.LayerNorm(128) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(128, 4 * 64) for _ in range(2))
        self.output = nn.ModuleList(nn.Linear(2 * 64, 128) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)) for _ in range(2))
        self.head = nn.Linear(128, vocab_size)

    @torch.no_grad()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        logit_rows: Tensor,
        shapes: FixedShapes | None = None,
    ) -> Tensor:
        """Rows of any threads at once; they meet in `attend` alone, which rotates, caches and attends."""
        x = self.embedding(token_ids)
        for number in range(2):
            normed = self.norms[number](x)
            q, k, v = self.qkv[number](normed).view(len(x), 4, 64).split((2, 1, 1), dim=1)
            x = x + self.output[number](attend(number, q, k, v).flatten(1)) + self.mlp[number](normed)
        logits: Tensor = self.head(x[logit_rows])
        return logits

    def fixed_shapes(self) -> FixedShapes:
        """Needed under `deterministic`, which this model does not promise."""
        raise not_deterministic("this model does not promise a row the same bits beside other rows")


def main() -> None:
    """The same plan with either attention: the same tokens."""
    tokenizer = byte_tokenizer()
    for packed in (True, False):
        torch.manual_seed(0)
        decoder = OwnDecoder(tokenizer.vocab_size, packed=packed)
        model = LoadedModel(decoder, tokenizer, RawChat(), "own", fingerprint="0")
        [result] = anabranch.Engine(model, anabranch.EngineConfig(pages=64)).run(PLAN, seed=1)
        print("engine" if packed else "ops", result.status, result.value)


if __name__ == "__main__":
    main()
