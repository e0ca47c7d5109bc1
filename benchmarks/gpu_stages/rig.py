"""A random-weight model with the wave executor, driven without an engine: nothing but torch and Triton is needed.

A `Lane` is one thread that draws: its view, its open segment, its last token. `Rig.step` gives every lane its next
token as an engine would ask for it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anabranch.runtime.attention import Block
from anabranch.runtime.config import ModelConfig, RopeConfig
from anabranch.runtime.device import Device
from anabranch.runtime.graphs import Graphs, Launch, Outputs
from anabranch.runtime.model import Decoder
from anabranch.runtime.pages import Entry, PagePool, Segment, View
from anabranch.runtime.tasks import Draw
from anabranch.runtime.waves import Drawn, LaneStep, Waves

PAGE_SIZE = 16


def shape(
    *, layers: int, hidden: int, heads: tuple[int, int], head_dim: int, ff: int, vocab: int, context: int,
    qk_norm: bool = False,
) -> ModelConfig:  # fmt: skip
    """A decoder of these sizes. heads: query, KV."""
    return ModelConfig(
        architecture="qwen3" if qk_norm else "llama", hidden_size=hidden, num_layers=layers, num_heads=heads[0],
        num_kv_heads=heads[1], head_dim=head_dim, intermediate_size=ff, vocab_size=vocab, max_context=context,
        rms_norm_eps=1e-6, rope=RopeConfig(theta=500000.0), sliding_window=(None,) * layers, qk_norm=qk_norm,
    )  # fmt: skip


CONTEXT = 1 << 16
SHAPE_8B = shape(layers=32, hidden=4096, heads=(32, 8), head_dim=128, ff=14336, vocab=128256, context=CONTEXT)
SHAPE_06B = shape(
    layers=28, hidden=1024, heads=(16, 8), head_dim=128, ff=3072, vocab=151936, context=CONTEXT, qk_norm=True
)
SHAPE_SMALL = shape(layers=2, hidden=128, heads=(8, 2), head_dim=64, ff=192, vocab=517, context=1 << 12, qk_norm=True)
SHAPE_TINY = shape(layers=1, hidden=64, heads=(4, 2), head_dim=64, ff=96, vocab=131, context=1 << 12)


class RandomWeights(Mapping[str, Tensor]):
    """Made on the device when they are taken, the same each time; scaled so that activations keep their size."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        hidden, ff, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
        q, kv = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self._shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (config.vocab_size, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (config.vocab_size, hidden),
        }
        for number in range(config.num_layers):
            prefix = f"model.layers.{number}."
            self._shapes |= {
                f"{prefix}input_layernorm.weight": (hidden,),
                f"{prefix}post_attention_layernorm.weight": (hidden,),
                f"{prefix}self_attn.q_proj.weight": (q, hidden),
                f"{prefix}self_attn.k_proj.weight": (kv, hidden),
                f"{prefix}self_attn.v_proj.weight": (kv, hidden),
                f"{prefix}self_attn.o_proj.weight": (hidden, q),
                f"{prefix}self_attn.q_norm.weight": (head_dim,),
                f"{prefix}self_attn.k_norm.weight": (head_dim,),
                f"{prefix}mlp.gate_proj.weight": (ff, hidden),
                f"{prefix}mlp.up_proj.weight": (ff, hidden),
                f"{prefix}mlp.down_proj.weight": (hidden, ff),
            }
        self._numbers = {name: number for number, name in enumerate(self._shapes)}

    def __getitem__(self, name: str) -> Tensor:
        wanted = self._shapes[name]
        if len(wanted) == 1:
            return torch.ones(wanted, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(self._numbers[name])
        made = torch.randn(wanted, dtype=self._dtype, device=self._device, generator=generator)
        # Logits are spread, so that a draw seldom hangs on a rounding; the table's rows are of unit entries.
        gain = {"lm_head.weight": 3.0, "model.embed_tokens.weight": wanted[1] ** 0.5}.get(name, 1.0)
        return made.mul_(gain * wanted[1] ** -0.5)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What a step reads of the weights: all, but of the embedding table only its rows."""
    hidden, ff = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * ff
    return (config.num_layers * layer + config.vocab_size * hidden) * dtype.itemsize


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """K and V of one token in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def decoder(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    """With random weights."""
    where = str(device) if device.type == "cuda" else "cpu"
    return Decoder(config, RandomWeights(config, dtype, device), dtype=dtype, device=where, pack=False)


@dataclass
class Text:
    """Stands for a `Generation` of plain text: a seat asks it for these alone."""

    left: int
    constraint: None = None


@dataclass
class Lane:
    """One thread. token: drawn, and not fed yet; drawn: so many in all; logits: what the last was drawn from.

    forks: as a `Block` has them
    """

    view: View | None
    forks: tuple[View, ...]
    segment: Segment
    token: int
    draw: Draw
    drawn: int = 0
    tokens: list[int] = field(default_factory=list)
    logits: Tensor | None = None


class Rig:
    """A model on a device with a pool of its own.

    lanes: most of them; pages: of the pool
    """

    def __init__(
        self, model: Decoder, *, lanes: int, pages: int, deterministic: bool = False, run_ahead: int = 1,
        chunk: int = 512, page_size: int = PAGE_SIZE,
    ) -> None:  # fmt: skip
        self.pool = PagePool(pages, page_size)
        self.device = Device(model, self.pool, lanes=lanes, chunk=chunk, deterministic=deterministic)
        self.chunk = chunk
        self.waves = Waves(
            self.device, lanes=lanes, vocab_size=model.config.vocab_size, end_tokens=(), run_ahead=run_ahead,
            num_free=lambda: self.pool.num_free, keeps_reads=False,
        )  # fmt: skip
        self._num_lanes = 0

    def fill(self, seed: int = 0) -> None:
        """Random keys and values everywhere: for timings, which do not depend on them."""
        generator = torch.Generator(self.device.device).manual_seed(seed)
        for pool in (*self.device.store.k, *self.device.store.v):
            pool.normal_(generator=generator)

    def written(self, tokens: int, view: View | None = None) -> View:
        """A sealed segment of so many tokens behind `view`, without computing them."""
        segment = Segment(self.pool, 0 if view is None else view.total_tokens, expect=-(-tokens // self.pool.page_size))
        segment.append([0] * tokens)
        segment.seal()
        return View(view, [Entry(segment)])

    @torch.no_grad()
    def feed(self, segment: Segment, tokens: Sequence[int], view: View | None = None) -> Tensor:
        """Prefill `tokens` in chunks; returns the logits of the last."""
        logits = torch.empty(0)
        for first in range(0, len(tokens), self.chunk):
            part = tokens[first : first + self.chunk]
            at = segment.append(part)
            step = self.device.step([Block(view, segment, at.start, len(part))])
            logits = step.logits(part, [len(part) - 1])
        return logits[0]

    def lane(self, view: View | None, token: int, *, forks: tuple[View, ...] = (), start: int | None = None) -> Lane:
        """A thread that goes on behind `view` with `token`, and draws without end.

        start: its first position; where it is not told the view's tokens stand one after another
        """
        if start is None:
            start = 0 if view is None else view.total_tokens
        segment = Segment(self.pool, start)
        parameters: dict[str, float] = {
            "temperature": 0.8, "top_k": 0, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
        }  # fmt: skip
        self._num_lanes += 1
        text: Any = Text(1 << 20)
        node: Any = None
        return Lane(view, forks, segment, token, Draw(node, text, (self._num_lanes, 77), parameters, False))

    def step(self, lanes: Sequence[Lane]) -> list[Drawn]:
        """The next token of each lane."""
        wanted = []
        for lane in lanes:
            at = lane.segment.append([lane.token], [True])
            block = Block(lane.view, lane.segment, at.start, 1, forks=lane.forks)
            wanted.append(LaneStep(lane.draw, block, lane.token, lane.drawn, ()))
        found = self.waves.step(wanted)
        if found is None:
            raise RuntimeError("the lanes do not fit the lists of a wave")
        for lane, drawn in zip(lanes, found, strict=True):
            if drawn.token < 0:
                raise RuntimeError("a draw from logits that are not finite")
            lane.token, lane.logits = drawn.token, drawn.logits
            lane.tokens.append(drawn.token)
            lane.drawn += 1
        return found

    def reserve(self, lanes: Sequence[Lane], tokens: int) -> None:
        """Pages for so many more tokens of each."""
        for lane in lanes:
            lane.segment.reserve(lane.segment.length + tokens)

    @property
    def graphs(self) -> Graphs:
        """The executor's own."""
        return self.waves._graphs

    @graphs.setter
    def graphs(self, other: Graphs) -> None:
        self.waves._graphs = other


class Eager(Graphs):
    """Launches that are never captured."""

    def prepare(self, *args: Any, **options: Any) -> bool:
        return False

    @torch.no_grad()
    def run(self, launch: Launch, count: int, typed: bool, penal: bool) -> Outputs:
        return launch(count, typed, penal)


class Watched(Graphs):
    """Another's launches.

    tell: called before each begins; captured_bytes: what the card holds more of for the graphs
    """

    def __init__(self, of: Graphs, tell: Callable[[], None] = lambda: None) -> None:
        self.captured_bytes = 0
        self._of = of
        self._tell = tell
        self._last: Callable[[], Outputs] | None = None

    @property
    def num_graphs(self) -> int:
        """How many were captured."""
        return self._of.num_captured

    def prepare(self, *args: Any, **options: Any) -> bool:
        before = reserved()
        done = self._of.prepare(*args, **options)
        self.captured_bytes += reserved() - before
        return done

    def run(self, launch: Launch, count: int, typed: bool, penal: bool) -> Outputs:
        self._tell()
        self._last = partial(self._of.run, launch, count, typed, penal)
        return self._last()

    def again(self) -> None:
        """The last launch once more, of which nobody is told."""
        if self._last is None:
            raise RuntimeError("nothing was launched")
        self._last()

    def forget(self) -> None:
        self._of.forget()


def reserved() -> int:
    """Bytes of the card that torch holds."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0


def release() -> None:
    """Give back what rigs that are gone held: an executor and its graphs hold one another."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
