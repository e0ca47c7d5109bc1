"""Any causal model of transformers as an engine's decoder, through transformers' attention registry.

The model runs as it is, but for its attention, which calls the engine's. It is run with every position 0, where a
rotary embedding turns nothing: queries and keys arrive unrotated, and the engine rotates them itself by the model's own
frequencies, once for each shift that a row sees keys under. How the model pairs the numbers of a head, and what else
this rests on, is tried on a few tokens when the model is loaded; what does not hold is refused by name.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import tempfile
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.dsl.diagnostics import Diagnostic, PlanError
from anabranch.kernels.rope import rope_table, rotate
from anabranch.runtime.chat import RawChat, read_chat
from anabranch.runtime.config import ModelConfig, RopeConfig, bad_model
from anabranch.runtime.fixed_shapes import FixedShapes, not_deterministic
from anabranch.runtime.model import Attend
from anabranch.runtime.models import LoadedModel
from anabranch.runtime.tokenizer import Tokenizer

NAME = "anabranch"
"""The attention implementation that is registered with transformers."""

# What an attention may be given beside queries, keys and values that the engine's does not do.
_REFUSED = {
    "softcap": "a cap on its attention scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias on its attention scores",
}
_PROBED_POSITION = 3


@dataclass(frozen=True, slots=True)
class _Call:
    """What one layer gave its attention. q, k, v: [num_tokens, heads, head_dim]."""

    q: Tensor
    k: Tensor
    v: Tensor
    scaling: float
    options: Mapping[str, Any]
    is_causal: bool


_Attention = Callable[[int, _Call], Tensor]
_current: ContextVar[_Attention] = ContextVar("attention")


def load_hf(
    model: Any,
    tokenizer: Tokenizer | str | Path | Any = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    template: str | None = None,
) -> LoadedModel:
    """A Hugging Face causal model, ready for `Engine`.

    model: a folder or a hub name for `AutoModelForCausalLM`, or a loaded model, whose attention implementation is set
        to ours and whose weights are converted and moved in place
    tokenizer: a fast tokenizer of transformers, a folder with a `tokenizer.json`, or a `Tokenizer`; None for that of
        the model's folder
    dtype: as in `load`
    device: None for the engine's own attention on a CPU; `cpu` or `cuda` for the ops of `kernels/`
    template: None for the model's own chat template, `raw` for none
    Raises PlanError: no-model if transformers or the model is not there; bad-model naming what of the model is not
    supported. Raises ValueError if a loaded model comes without a tokenizer.
    """
    if find_spec("transformers") is None:
        raise PlanError(
            Diagnostic("no-model", "transformers is not installed", help="pip install 'anabranch[transformers]'")
        )
    name = str(model) if isinstance(model, str | Path) else type(model).__name__
    if isinstance(model, str | Path):
        from transformers import AutoModelForCausalLM

        tokenizer = model if tokenizer is None else tokenizer
        try:
            model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise bad_model(name, f"transformers cannot load it: {str(error).strip().partition(chr(10))[0]}") from error
    if tokenizer is None:
        raise ValueError("a loaded model needs its tokenizer")
    found = _tokenizer(tokenizer)
    decoder = HfDecoder(model, dtype=dtype, device=device, name=name, num_logits=found.vocab_size)
    if found.vocab_size > decoder.config.vocab_size:
        raise bad_model(
            name, f"its tokenizer has {found.vocab_size} tokens, its decoder only {decoder.config.vocab_size}"
        )
    chat = RawChat() if template == "raw" else read_chat(found, name)
    return LoadedModel(decoder, found, chat, name, _fingerprint(model))


class HfDecoder:
    """A causal model of transformers as `DecoderLike`.

    model: a PreTrainedModel with a language model's head; set to our attention, converted and moved in place
    packed: as in `DecoderLike`; True without `device`
    Raises PlanError `bad-model` naming the feature that is not supported.
    """

    def __init__(
        self,
        model: Any,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | None = None,
        name: str = "model",
        num_logits: int | None = None,
    ) -> None:
        self.dtype = dtype
        self.device = torch.device("cpu" if device is None else device)
        self.packed = device is None
        if self.packed and dtype not in (torch.float32, torch.float64):
            raise bad_model(name, f"{dtype} needs a device's kernels", "`device=`, or float32")
        _register(model, name)
        self._model = model.to(device=self.device, dtype=dtype).eval()
        self._takes_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        found = _probe(model, name)
        self.config, self._order, self._scales = found.config, found.order.to(self.device), found.scales
        vocab = self.config.vocab_size
        self.num_logits = vocab if num_logits is None else min(num_logits, vocab)

    @torch.no_grad()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        logit_rows: Tensor,
        shapes: FixedShapes | None = None,
    ) -> Tensor:
        """As `Decoder.forward`; there are no fixed shapes."""
        if shapes is not None:
            raise ValueError("a decoder of transformers has no fixed shapes")
        # Whatever row stands for none.
        rows = logit_rows if len(logit_rows) else logit_rows.new_zeros(1)
        logits = _run(self._model, token_ids, 0, partial(self._attend, attend), rows if self._takes_rows else None)
        logits = logits if self._takes_rows else logits.index_select(0, rows)
        return logits[: len(logit_rows), : self.num_logits]

    def fixed_shapes(self) -> FixedShapes:
        """Raises PlanError `not-deterministic`: how transformers computes a row is not ours to fix."""
        raise not_deterministic("a model of transformers does not promise a row the same bits beside other rows")

    def _attend(self, attend: Attend, layer: int, call: _Call) -> Tensor:
        q = call.q[..., self._order] * self._scales[layer]
        return attend(layer, q.contiguous(), call.k[..., self._order].contiguous(), call.v.contiguous())


@dataclass(frozen=True, slots=True)
class _Probed:
    """What a try of the model told. order: the numbers of a head, so that rotary pairs are head_dim / 2 apart.

    scales: of each layer, on its queries, so that scores scaled by head_dim ** -0.5 are the model's
    """

    config: ModelConfig
    order: Tensor
    scales: tuple[float, ...]


def _register(model: Any, name: str) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention_forward)
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, KeyError, AttributeError) as error:
        raise bad_model(name, "its attention cannot be chosen from transformers' registry") from error


def _attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface. query: [1, num_heads, num_tokens, head_dim]; returns [1, num_tokens, ...]."""
    try:
        attend = _current.get()
    except LookupError:
        raise RuntimeError(
            "this model attends by an engine of Anabranch: call `set_attn_implementation` to use it otherwise"
        ) from None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    call = _Call(q, k, v, scale, options, bool(getattr(module, "is_causal", True)))
    return attend(int(module.layer_idx), call)[None], None


def _run(model: Any, ids: Tensor, position: int, attend: _Attention, rows: Tensor | None) -> Tensor:
    """Logits [num_tokens or len(rows), vocab] with every token at one position."""
    options = {} if rows is None else {"logits_to_keep": rows}
    token = _current.set(attend)
    try:
        out = model(input_ids=ids[None], position_ids=torch.full_like(ids, position)[None], use_cache=False, **options)
    finally:
        _current.reset(token)
    logits: Tensor = out.logits[0]
    return logits


@torch.no_grad()
def _probe(model: Any, name: str) -> _Probed:
    """Try the model on a few tokens whose attention gives nothing, and read off what the engine must know."""
    shape = model.config.get_text_config()

    def refuse(feature: str) -> PlanError:
        return bad_model(name, f"it has {feature}, which the engine does not do")

    def run(ids: Tensor, position: int) -> tuple[dict[int, _Call], Tensor]:
        calls: dict[int, _Call] = {}

        def attend(layer: int, call: _Call) -> Tensor:
            if layer in calls:
                raise refuse(f"a layer {layer} that attends more than once")
            calls[layer] = call
            return torch.zeros_like(call.q)

        return calls, _run(model, ids, position, attend, None)

    if getattr(shape, "is_encoder_decoder", False):
        raise refuse("an encoder")
    kinds = {str(kind) for kind in getattr(shape, "layer_types", None) or ()}
    if kinds - {"full_attention", "sliding_attention"}:
        raise refuse(f"layers of the kind {', '.join(sorted(kinds - {'full_attention', 'sliding_attention'}))}")
    ids = torch.arange(min(8, shape.vocab_size), device=model.device)
    try:
        calls, logits = run(ids, 0)
    except TypeError as error:
        raise bad_model(name, f"its forward does not take token ids and positions: {error}") from error
    if sorted(calls) != list(range(shape.num_hidden_layers)):
        raise refuse(f"{shape.num_hidden_layers - len(calls)} layers that do not attend through transformers' registry")
    _check_calls(calls, refuse)
    _, mirrored = run(ids.flip(0), 0)
    if not _close(mirrored.flip(0), logits):
        raise refuse("layers other than attention in which tokens meet (a recurrence or a convolution)")
    turned, moved = run(ids, _PROBED_POSITION)
    if not _close(moved, logits):
        raise refuse("positions that are embedded and not rotary")
    frequencies, order = _rotary(model, calls, turned, refuse)
    first = calls[0]
    windows = tuple(calls[i].options.get("sliding_window") for i in range(len(calls)))
    declared = getattr(shape, "layer_types", None) or [None] * len(calls)
    if any((kind == "sliding_attention") and window is None for kind, window in zip(declared, windows, strict=True)):
        raise refuse("a sliding window that its attention is not told of")
    heads, head_dim = first.q.shape[1:]
    config = ModelConfig(
        architecture=str(shape.model_type),
        hidden_size=shape.hidden_size,
        num_layers=len(calls),
        num_heads=heads,
        num_kv_heads=first.k.shape[1],
        head_dim=head_dim,
        intermediate_size=int(getattr(shape, "intermediate_size", None) or 0),
        vocab_size=logits.shape[1],
        max_context=shape.max_position_embeddings,
        # The decoder's own matter, as are its biases and whether its head is tied.
        rms_norm_eps=0.0,
        rope=RopeConfig(kind="given", frequencies=frequencies),
        sliding_window=windows,
    )
    scales = tuple(calls[i].scaling * math.sqrt(head_dim) for i in range(len(calls)))
    return _Probed(config, order, scales)


def _check_calls(calls: Mapping[int, _Call], refuse: Callable[[str], PlanError]) -> None:
    """Every layer attends as the engine does, and all of them alike."""
    first = calls[0]
    for number, call in calls.items():
        for option, feature in _REFUSED.items():
            if call.options.get(option) is not None:
                raise refuse(feature)
        if not call.is_causal:
            raise refuse(f"a layer {number} that is not causal")
        if call.v.shape != call.k.shape or call.k.shape[2] != call.q.shape[2] or call.q.shape[2] % 2:
            raise refuse(f"keys of {call.k.shape[2]} and values of {call.v.shape[2]} numbers a head")
        if call.q.shape != first.q.shape or call.k.shape != first.k.shape:
            raise refuse("layers with different numbers of heads")


def _rotary(
    model: Any, calls: Mapping[int, _Call], turned: Mapping[int, _Call], refuse: Callable[[str], PlanError]
) -> tuple[tuple[float, ...], Tensor]:
    """The frequencies of a head's pairs, and the order of its numbers that puts pairs head_dim / 2 apart.

    calls, turned: at position 0 and at `_PROBED_POSITION`, of the same inputs: each layer must be turned alike.
    """
    tables = {tuple(m.inv_freq.float().tolist()) for m in model.modules() if isinstance(_inv_freq(m), Tensor)}
    kinds = {
        str(getattr(module, "rope_type", "default")) for module in model.modules() if _inv_freq(module) is not None
    }
    if kinds & {"dynamic", "longrope"}:
        raise refuse(f"rotary frequencies that depend on the text's length (`{min(kinds & {'dynamic', 'longrope'})}`)")
    if len(tables) != 1:
        raise refuse("no rotary embedding" if not tables else "different rotary frequencies in its layers")
    [table] = tables
    head_dim = calls[0].q.shape[2]
    if 2 * len(table) > head_dim:
        raise refuse("a rotary embedding that is wider than a head")
    frequencies = (*table, *[0.0] * (head_dim // 2 - len(table)))
    position = torch.tensor([_PROBED_POSITION], device=calls[0].q.device)
    cos, sin = rope_table(torch.tensor(frequencies, device=position.device), position, 1.0, calls[0].q.dtype)
    for order in _orders(len(table), head_dim):
        if all(
            _close(rotate(before[..., order], cos, sin), after[..., order])
            for layer, call in calls.items()
            for before, after in ((call.q, turned[layer].q), (call.k, turned[layer].k))
        ):
            return frequencies, order
    raise refuse("a rotary embedding of another kind, or layers without one")


def _orders(pairs: int, head_dim: int) -> list[Tensor]:
    """The layouts of a head whose first 2 * pairs numbers turn: halves beside one another, and neighbours."""
    still = list(range(2 * pairs, head_dim))
    half = len(still) // 2
    turning = ((range(pairs), range(pairs, 2 * pairs)), (range(0, 2 * pairs, 2), range(1, 2 * pairs, 2)))
    return [torch.tensor([*low, *still[:half], *high, *still[half:]]) for low, high in turning]


def _inv_freq(module: Any) -> Tensor | None:
    found = getattr(module, "inv_freq", None)
    return found if isinstance(found, Tensor) else None


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, which in 16 bits is coarse."""
    tolerance = 1e-4 if a.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def _tokenizer(given: Any) -> Tokenizer:
    if isinstance(given, Tokenizer):
        return given
    if isinstance(given, str | Path):
        return Tokenizer.from_folder(Path(given))
    with tempfile.TemporaryDirectory() as folder:
        given.save_pretrained(folder)
        try:
            return Tokenizer.from_folder(Path(folder))
        except PlanError as error:
            reason = error.diagnostics[0].message.partition(": ")[2]
            raise bad_model(type(given).__name__, reason) from None


def _fingerprint(model: Any) -> str:
    """Hex digits that differ between models: of the configuration, and of at most 4096 numbers of each tensor."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)]
        digest.update(f"{name} {list(tensor.shape)}".encode() + sample.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
