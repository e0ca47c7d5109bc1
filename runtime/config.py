"""What a decoder looks like, read from a Hugging Face `config.json`.

Llama 2, 3 and 3.1, SmolLM2, Mistral, Qwen2 and Qwen3 are one decoder that differs in the fields of `ModelConfig`.
Whatever would change the result and is not one of those fields is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from anabranch.dsl.diagnostics import Diagnostic, PlanError, did_you_mean

RopeKind: TypeAlias = Literal["default", "linear", "llama3", "yarn", "given"]
# Those that a `config.json` may name.
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn")

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def bad_model(where: str | Path, reason: str, help: str = "") -> PlanError:
    """The error for a model that is broken or of a kind that is not supported. `where` names the file or folder."""
    return PlanError(Diagnostic("bad-model", f"cannot use the model `{where}`: {reason}", help=help))


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding.

    kind: how the frequencies are stretched beyond the context that the model was first trained on
    theta: base of the frequencies
    factor: how far they are stretched (`linear`, `llama3`, `yarn`)
    original_context: tokens of context before stretching (`llama3`, `yarn`)
    low_freq_factor, high_freq_factor: `llama3`: wavelengths of original_context / these bound the blend
    beta_fast, beta_slow: `yarn`: rotations over original_context that bound the ramp
    attention_factor: `yarn`: scale on both cos and sin, so attention logits are scaled by its square; 1 elsewhere
    truncate: `yarn`: whether the ramp's ends are rounded to whole dimensions
    frequencies: `given`: the frequencies themselves, [head_dim / 2], radians per position; 0 does not turn
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    frequencies: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The decoder's shape.

    head_dim: per head; need not be hidden_size / num_heads
    max_context: most positions the model was made for
    qkv_bias, output_bias, mlp_bias: which linears carry a bias
    qk_norm: an RMS norm over head_dim on each q and k head, before rotation
    sliding_window: per layer, None for full attention; with w, a query at position q sees keys at p > q - w
    tied_embeddings: the LM head is the embedding table
    bos_id: the id of the start token, None if unsaid (whether text starts with it is the tokenizer's matter)
    eos_ids: ids that end a text
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    rms_norm_eps: float
    rope: RopeConfig
    sliding_window: tuple[int | None, ...]
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @staticmethod
    def from_folder(folder: Path) -> ModelConfig:
        """Read `folder/config.json`. Raises PlanError `bad-model`."""
        path = folder / "config.json"
        return ModelConfig.from_hf(read_json(path), where=str(path))

    @staticmethod
    def from_hf(data: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read the mapping in a `config.json`. Raises PlanError `bad-model` naming what is not supported."""
        return _Reader(data, where).model()


def read_json(path: Path) -> Mapping[str, Any]:
    """The JSON object in `path`. Raises PlanError `bad-model` if it is missing, unreadable or no object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise bad_model(path, "there is no such file") from None
    except OSError as error:
        raise bad_model(path, error.strerror or str(error)) from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise bad_model(path, f"it is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise bad_model(path, "it does not hold a JSON object")
    return data


@dataclass(frozen=True)
class _Reader:
    data: Mapping[str, Any]
    where: str

    def refuse(self, reason: str, help: str = "") -> PlanError:
        return bad_model(self.where, reason, help)

    def integer(self, key: str, default: int | None = None, *, data: Mapping[str, Any] | None = None) -> int:
        value = (self.data if data is None else data).get(key)
        value = default if value is None else value
        if value is None:
            raise self.refuse(f"`{key}` is missing")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise self.refuse(f"`{key}` is {value!r}, not a positive integer")
        return value

    def number(self, key: str, default: float | None = None, *, data: Mapping[str, Any] | None = None) -> float:
        value = (self.data if data is None else data).get(key)
        value = default if value is None else value
        if value is None:
            raise self.refuse(f"`{key}` is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.refuse(f"`{key}` is {value!r}, not a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refuse(f"`{key}` is {value!r}, not true or false")
        return value

    def architecture(self) -> str:
        model_type = self.data.get("model_type")
        if not isinstance(model_type, str):
            raise self.refuse("`model_type` is missing")
        if model_type not in ARCHITECTURES:
            raise self.refuse(
                f"architecture `{model_type}` is not supported",
                did_you_mean(model_type, ARCHITECTURES) or f"supported are {', '.join(ARCHITECTURES)}",
            )
        named = self.data.get("architectures") or [ARCHITECTURES[model_type]]
        if ARCHITECTURES[model_type] not in named:
            raise self.refuse(f"it is a `{named[0]}`, not a `{ARCHITECTURES[model_type]}`")
        return model_type

    def refuse_unsupported(self) -> None:
        quantization = self.data.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "?") if isinstance(quantization, Mapping) else quantization
            raise self.refuse(
                f"quantisation `{method}` is not supported", "use the unquantised weights, or a GGUF file"
            )
        activation = self.data.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise self.refuse(f"activation `{activation}` is not supported, only `silu`")
        for key in ("partial_rotary_factor",):
            if self.data.get(key) not in (None, 1, 1.0):
                raise self.refuse(f"`{key}` {self.data[key]!r} is not supported")

    def model(self) -> ModelConfig:
        architecture = self.architecture()
        self.refuse_unsupported()
        hidden_size = self.integer("hidden_size")
        num_layers = self.integer("num_hidden_layers")
        num_heads = self.integer("num_attention_heads")
        # Defaults that transformers leaves out of a saved config differ by class.
        num_kv_heads = self.integer("num_key_value_heads", 8 if architecture == "mistral" else num_heads)
        head_dim = self.integer("head_dim", 128 if architecture == "qwen3" else max(1, hidden_size // num_heads))
        if num_heads % num_kv_heads:
            raise self.refuse(f"{num_heads} heads cannot share {num_kv_heads} key-value heads evenly")
        if head_dim % 2:
            raise self.refuse(f"head size {head_dim} is odd and cannot be rotated")
        max_context = self.integer("max_position_embeddings", 2048)
        attention_bias = self.flag("attention_bias", False) if architecture in ("llama", "qwen3") else False
        return ModelConfig(
            architecture=architecture,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=self.integer("intermediate_size"),
            vocab_size=self.integer("vocab_size"),
            max_context=max_context,
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            rope=self.rope(max_context),
            sliding_window=self.sliding_window(architecture, num_layers),
            tied_embeddings=self.flag("tie_word_embeddings", False),
            qkv_bias=attention_bias or architecture == "qwen2",
            output_bias=attention_bias,
            mlp_bias=self.flag("mlp_bias", False) if architecture == "llama" else False,
            qk_norm=architecture == "qwen3",
            bos_id=next(iter(self.ids("bos_token_id")), None),
            eos_ids=self.ids("eos_token_id"),
        )

    def ids(self, key: str) -> tuple[int, ...]:
        value = self.data.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise self.refuse(f"`{key}` is {value!r}, not a token id")
        return tuple(i for i in ids if i >= 0)

    def sliding_window(self, architecture: str, num_layers: int) -> tuple[int | None, ...]:
        none: tuple[None, ...] = (None,) * num_layers
        if architecture == "llama" or self.data.get("sliding_window") is None:
            return none
        window = self.integer("sliding_window")
        if architecture == "mistral":
            return (window,) * num_layers
        if not self.flag("use_sliding_window", False):
            return none
        kinds = self.data.get("layer_types")
        if kinds is not None:
            if not isinstance(kinds, list) or len(kinds) != num_layers:
                raise self.refuse(f"`layer_types` does not name {num_layers} layers")
            unknown = [k for k in kinds if k not in ("full_attention", "sliding_attention")]
            if unknown:
                raise self.refuse(f"layer type `{unknown[0]}` is not supported")
            return tuple(window if k == "sliding_attention" else None for k in kinds)
        first = self.data.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int):
            raise self.refuse(f"`max_window_layers` is {first!r}, not an integer")
        return tuple(window if i >= first else None for i in range(num_layers))

    def rope(self, max_context: int) -> RopeConfig:
        """transformers 5 writes `rope_parameters` (theta inside), earlier versions `rope_theta` and `rope_scaling`."""
        found = self.data.get("rope_parameters") or self.data.get("rope_scaling") or {}
        if not isinstance(found, Mapping):
            raise self.refuse(f"`rope_scaling` is {found!r}, not an object")
        data: Mapping[str, Any] = found
        if any(isinstance(value, Mapping) for value in data.values()):
            raise self.refuse("rotary settings that differ by layer are not supported")
        kind = data.get("rope_type", data.get("type", "default"))
        if kind not in ROPE_KINDS:
            raise self.refuse(f"rope type `{kind}` is not supported", f"supported are {', '.join(ROPE_KINDS)}")
        if data.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise self.refuse(f"`partial_rotary_factor` {data['partial_rotary_factor']!r} is not supported")
        theta = self.number("rope_theta", self.number("rope_theta", 10000.0), data=data)
        if theta <= 1:
            raise self.refuse(f"`rope_theta` is {theta}, not above 1")
        if kind == "default":
            return RopeConfig(theta=theta)
        factor = self.number("factor", data=data)
        if kind == "linear":
            return RopeConfig("linear", theta, factor)
        original = self.integer(
            "original_max_position_embeddings",
            self.integer("original_max_position_embeddings", max_context),
            data=data,
        )
        if kind == "llama3":
            low = self.number("low_freq_factor", data=data)
            high = self.number("high_freq_factor", data=data)
            if low >= high:
                raise self.refuse(f"`low_freq_factor` {low} is not below `high_freq_factor` {high}")
            return RopeConfig("llama3", theta, factor, original, low_freq_factor=low, high_freq_factor=high)
        truncate = data.get("truncate", True)
        if not isinstance(truncate, bool):
            raise self.refuse(f"`truncate` is {truncate!r}, not true or false")
        return RopeConfig(
            kind=cast(RopeKind, kind),
            theta=theta,
            factor=factor,
            original_context=original,
            beta_fast=self.number("beta_fast", 32.0, data=data),
            beta_slow=self.number("beta_slow", 1.0, data=data),
            attention_factor=self.yarn_attention_factor(data, factor),
            truncate=truncate,
        )

    def yarn_attention_factor(self, data: Mapping[str, Any], factor: float) -> float:
        """Peng et al. 2023, section 3.4; `mscale` and `mscale_all_dim` are DeepSeek's variation of it."""
        if data.get("attention_factor") is not None:
            return self.number("attention_factor", data=data)

        def mscale(weight: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

        if data.get("mscale") and data.get("mscale_all_dim"):
            return mscale(self.number("mscale", data=data)) / mscale(self.number("mscale_all_dim", data=data))
        return mscale(1.0)
