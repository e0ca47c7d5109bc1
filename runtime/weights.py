"""Checkpoints as mappings from Hugging Face names to tensors: safetensors folders and GGUF files.

A mapping reads one tensor at a time, so a caller that casts and packs each in turn holds one copy of the model.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anabranch.runtime.config import ModelConfig, bad_model, read_json

# The stored types that are read; all of them widen to fp32 or fp64 exactly.
_DTYPES = ("F64", "F32", "F16", "BF16")


class SafetensorsFolder(Mapping[str, Tensor]):
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises PlanError `bad-model` with the file and the reason: missing, cut off, or of a type that is not supported.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self._file_of = self._read_index(folder, index)
        else:
            path = folder / "model.safetensors"
            if not path.is_file():
                raise bad_model(
                    folder, "it has no `model.safetensors` or `model.safetensors.index.json`", _other_formats(folder)
                )
            self._file_of = {}
            self._open_files = {path: _open(path)}
            self._file_of.update(dict.fromkeys(self._open_files[path].keys(), path))

    def _read_index(self, folder: Path, index: Path) -> dict[str, Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, Mapping) or not all(isinstance(v, str) for v in weight_map.values()):
            raise bad_model(index, "`weight_map` does not map tensors to files")
        outside = next((v for v in weight_map.values() if Path(v).name != v), None)
        if outside is not None:
            raise bad_model(index, f"shard `{outside}` is not a file beside it")
        self._open_files = {path: _open(path) for path in sorted({folder / v for v in weight_map.values()})}
        names = {path: frozenset(file.keys()) for path, file in self._open_files.items()}
        file_of = {str(key): folder / v for key, v in weight_map.items()}
        for key, path in file_of.items():
            if key not in names[path]:
                raise bad_model(path, f"tensor `{key}`, which the index places there, is missing")
        return file_of

    def __getitem__(self, key: str) -> Tensor:
        path = self._file_of[key]
        file = self._open_files[path]
        try:
            dtype = file.get_slice(key).get_dtype()
            if dtype not in _DTYPES:
                raise bad_model(path, f"tensor `{key}` is stored as {dtype}, which is not supported")
            tensor: Tensor = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise bad_model(path, f"tensor `{key}` cannot be read ({error})") from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise bad_model(path, "there is no such file") from None
    except (SafetensorError, OSError) as error:
        raise bad_model(path, f"it is cut off or no safetensors file ({error})") from None


def _other_formats(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        return "pickled weights are not read; save the model with `safe_serialization=True`"
    return ""


# llama.cpp's names, with the layer's number taken out.
_HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<stem>[a-z_]+)\.(?P<kind>weight|bias)")


class GgufFile(Mapping[str, Tensor]):
    """A GGUF file: its tensors dequantised to fp32, its metadata, and the shape they state.

    Raises PlanError `bad-model` with the path and the reason.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        import gguf

        try:
            self._reader = gguf.GGUFReader(path)
        except FileNotFoundError:
            raise bad_model(path, "there is no such file") from None
        except (OSError, ValueError, KeyError, IndexError, OverflowError, struct.error) as error:
            raise bad_model(path, f"it is cut off or no GGUF file ({error})") from None
        self._tensors: dict[str, Any] = {}
        for tensor in self._reader.tensors:
            self._tensors[self._hf_name(tensor.name)] = tensor

    def _hf_name(self, name: str) -> str:
        found = _GGUF_NAME.fullmatch(name)
        if found is None or found["stem"] not in _HF_NAMES:
            raise bad_model(self.path, f"tensor `{name}` is not supported")
        stem = _HF_NAMES[found["stem"]]
        prefix = "" if found["layer"] is None else f"model.layers.{int(found['layer'])}."
        return f"{prefix}{stem}.{found['kind']}"

    def metadata(self, key: str) -> Any:
        """The value of a metadata field as plain Python; None where there is none."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    @cached_property
    def config(self) -> ModelConfig:
        """The decoder's shape. Raises PlanError `bad-model` naming what is not supported."""
        arch = self.metadata("general.architecture")

        def of(key: str) -> Any:
            return self.metadata(f"{arch}.{key}")

        scaling = of("rope.scaling.type")
        theta = of("rope.freq_base")
        rope: dict[str, Any] = {"rope_type": "default"}
        if scaling not in (None, "none"):
            rope = {
                "rope_type": scaling,
                "factor": of("rope.scaling.factor"),
                "attention_factor": of("rope.scaling.attn_factor"),
                "original_max_position_embeddings": of("rope.scaling.original_context_length"),
            }
        head_dim = of("attention.key_length") or of("rope.dimension_count")
        if of("rope.dimension_count") not in (None, head_dim):
            raise bad_model(self.path, "heads that are rotated in part are not supported")
        eps = of("attention.layer_norm_rms_epsilon")
        fields = {
            "model_type": arch,
            "hidden_size": of("embedding_length"),
            "num_hidden_layers": of("block_count"),
            "num_attention_heads": of("attention.head_count"),
            "num_key_value_heads": of("attention.head_count_kv"),
            "head_dim": head_dim,
            "intermediate_size": of("feed_forward_length"),
            "vocab_size": of("vocab_size") or len(self.metadata("tokenizer.ggml.tokens") or ()),
            "max_position_embeddings": of("context_length"),
            # Stored as fp32; the decimal that was meant is the shortest one that rounds to it.
            "rms_norm_eps": None if eps is None else float(f"{eps:.6g}"),
            "rope_parameters": rope,
            "rope_theta": theta,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "attention_bias": "model.layers.0.self_attn.o_proj.bias" in self._tensors,
            "mlp_bias": "model.layers.0.mlp.down_proj.bias" in self._tensors,
            "bos_token_id": self.metadata("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata("tokenizer.ggml.eos_token_id"),
        }
        return ModelConfig.from_hf({k: v for k, v in fields.items() if v is not None}, where=str(self.path))

    def __getitem__(self, key: str) -> Tensor:
        import gguf

        tensor = self._tensors[key]
        try:
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32", copy=True))
        except (NotImplementedError, ValueError, KeyError) as error:
            raise bad_model(self.path, f"tensor `{tensor.name}` cannot be dequantised ({error})") from None
        if self.config.architecture == "llama":
            if ".q_proj." in key:
                return _unpermute(values, self.config.num_heads)
            if ".k_proj." in key:
                return _unpermute(values, self.config.num_kv_heads)
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """llama.cpp stores a `llama` head's rotary pairs side by side; here they are half a head apart.

    weight: [num_heads * head_dim, ...]
    """
    pairs = weight.reshape(num_heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
