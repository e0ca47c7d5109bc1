"""Models by name: the embedded SmolLM2, a Hugging Face folder, a GGUF file, the hub, and the random test model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from anabranch.dsl.diagnostics import Diagnostic, PlanError, did_you_mean
from anabranch.runtime import smollm2
from anabranch.runtime.chat import Chat, RawChat, read_chat
from anabranch.runtime.config import ModelConfig, bad_model
from anabranch.runtime.model import Decoder, DecoderLike
from anabranch.runtime.random_model import random_config, random_weights
from anabranch.runtime.tokenizer import Tokenizer, byte_tokenizer
from anabranch.runtime.weights import GgufFile, SafetensorsFolder

if TYPE_CHECKING:
    from anabranch.compiler.pipeline import Compiled

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("model*.safetensors", "model.safetensors.index.json", "*config.json", "tokenizer.json", "*.jinja")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    fingerprint: hex digits that differ between models; weights of a folder are sampled, not read whole
    """

    decoder: DecoderLike
    tokenizer: Tokenizer
    chat: Chat
    name: str
    fingerprint: str

    def plan_graph(self, compiled: Compiled, **options: Any) -> GraphModule:
        """See `Compiled.to_fx`."""
        from anabranch.runtime.plan_graph import plan_graph

        return plan_graph(compiled, self, **options)


@dataclass(frozen=True, slots=True)
class LoadedText:
    """What a model makes of text, without its weights: enough to lay out a run of it again.

    fingerprint: that of the whole model, as in `LoadedModel`
    """

    tokenizer: Tokenizer
    chat: Chat
    name: str
    fingerprint: str


def load(
    name: str, *, dtype: torch.dtype = torch.float32, template: str | None = None, device: str | None = None
) -> LoadedModel:
    """Load a model by the name that `--model` takes.

    name: `smollm2`; `random` or `random:SEED`; a folder in Hugging Face's layout; a `.gguf` file; or `ORG/NAME`
    dtype: what to compute in: torch.float32 or torch.float64; on a device torch.float32, torch.float16, torch.bfloat16
    template: None for the model's own chat template, `raw` for none
    device: `cuda` or `cuda:N`, where an engine runs it by the kernels; `cpu` does the same by their torch definitions,
        slowly, to try it; None for the engine's own way on a CPU
    Raises PlanError `no-model` (there is none of that name here), `bad-model` (broken or not supported),
    `bad-template`, or `bad-device` (there is no such device here, or none was named for a dtype that needs one).
    """
    place = _Place(dtype, None if device is None else find_device(device))
    if device is None and dtype not in (torch.float32, torch.float64):
        raise PlanError(
            Diagnostic("bad-device", f"{dtype} needs a device's kernels", help="`--device cuda`, or `--dtype float32`")
        )
    _check_template(template)
    where = _find(name)
    if isinstance(where, int):
        return _load_random(name, where, place, template)
    return (_load_folder if where.is_dir() else _load_gguf)(where, name, place, template)


def load_text(name: str, *, template: str | None = None) -> LoadedText:
    """What `load` would load, less the weights, of which nothing is read but samples for the fingerprint.

    Raises PlanError `no-model`, `bad-model`, `bad-template`.
    """
    _check_template(template)
    where = _find(name)
    if isinstance(where, int):
        tokenizer = byte_tokenizer()
        identity = _random_identity(where, random_config(tokenizer))
    elif where.is_dir():
        tokenizer, identity = Tokenizer.from_folder(where), _folder_identity(where)
    else:
        tokenizer, identity = Tokenizer.from_gguf(GgufFile(where)), _sample(where)
    return LoadedText(tokenizer, _chat(tokenizer, name, template), name, _fingerprint(identity))


def _check_template(template: str | None) -> None:
    if template not in (None, "raw"):
        raise PlanError(Diagnostic("bad-template", f"there is no chat template `{template}`", help="`--template raw`"))


def _find(name: str) -> int | Path:
    """The folder or `.gguf` file of a model, fetched if need be, or the seed of the random one. Raises PlanError."""
    if name == "random" or name.startswith("random:"):
        seed = name.partition(":")[2] or "0"
        if not re.fullmatch(r"[0-9]{1,9}", seed):
            raise PlanError(Diagnostic("no-model", f"`{seed}` is no seed for the random model", help="`random:SEED`"))
        return int(seed)
    if name == "smollm2":
        return smollm2.folder()
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise bad_model(name, "it is a file, not a folder or a `.gguf` file")
    if _HUB_NAME.fullmatch(name):
        return _fetch_from_hub(name)
    raise PlanError(
        Diagnostic(
            "no-model",
            f"there is no model `{name}`",
            help=did_you_mean(name, ("smollm2", "random")) or "`smollm2`, `random`, a folder, or `ORG/NAME`",
        )
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a decoder goes. device: None for the engine's own way on a CPU."""

    dtype: torch.dtype
    device: torch.device | None

    def decoder(self, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer, name: str) -> Decoder:
        where = torch.device("cpu") if self.device is None else self.device
        try:
            return Decoder(
                config,
                weights,
                dtype=self.dtype,
                device=str(where),
                name=name,
                pack=self.device is None,
                num_logits=tokenizer.vocab_size,
            )
        except torch.OutOfMemoryError:
            raise PlanError(
                Diagnostic("bad-device", f"the model does not fit the memory of {where}", help="`--dtype bfloat16`")
            ) from None


def find_device(name: str) -> torch.device:
    """The device called `name`, `cpu` or `cuda` or `cuda:N`. Raises PlanError `bad-device` where it is not here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu":
        return device
    if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    raise PlanError(
        Diagnostic(
            "bad-device", f"there is no device `{name}` here", help="`cuda` needs an NVIDIA or AMD GPU and torch for it"
        )
    )


def _load_random(name: str, seed: int, place: _Place, template: str | None) -> LoadedModel:
    tokenizer = byte_tokenizer()
    config = random_config(tokenizer)
    decoder = place.decoder(config, random_weights(config, tokenizer, seed), tokenizer, name)
    return _loaded(decoder, tokenizer, name, template, _random_identity(seed, config))


def _load_folder(folder: Path, name: str, place: _Place, template: str | None) -> LoadedModel:
    config = ModelConfig.from_folder(folder)
    tokenizer = Tokenizer.from_folder(folder)
    decoder = place.decoder(config, SafetensorsFolder(folder), tokenizer, str(folder))
    return _loaded(decoder, tokenizer, name, template, _folder_identity(folder))


def _load_gguf(path: Path, name: str, place: _Place, template: str | None) -> LoadedModel:
    file = GgufFile(path)
    tokenizer = Tokenizer.from_gguf(file)
    decoder = place.decoder(file.config, file, tokenizer, name)
    return _loaded(decoder, tokenizer, name, template, _sample(path))


def _loaded(decoder: Decoder, tokenizer: Tokenizer, name: str, template: str | None, identity: bytes) -> LoadedModel:
    if tokenizer.vocab_size > decoder.config.vocab_size:
        raise bad_model(
            name, f"its tokenizer has {tokenizer.vocab_size} tokens, its decoder only {decoder.config.vocab_size}"
        )
    return LoadedModel(decoder, tokenizer, _chat(tokenizer, name, template), name, _fingerprint(identity))


def _chat(tokenizer: Tokenizer, name: str, template: str | None) -> Chat:
    return RawChat() if template == "raw" else read_chat(tokenizer, name)


def _random_identity(seed: int, config: ModelConfig) -> bytes:
    return f"random {seed} {config}".encode()


def _folder_identity(folder: Path) -> bytes:
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", ".jinja", ".safetensors")]
    return b"".join(map(_sample, files))


def _fingerprint(identity: bytes) -> str:
    return hashlib.sha256(identity).hexdigest()[:16]


def _sample(path: Path) -> bytes:
    """A digest of a file's name, size, and 64 pieces of at most 64 KiB spread over it: small files are read whole."""
    piece = 1 << 16
    digest = hashlib.sha256(path.name.encode())
    with path.open("rb") as file:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        for start in range(0, size, max(piece, size // 63)):
            file.seek(start)
            digest.update(file.read(piece))
    return digest.digest()


def _fetch_from_hub(name: str) -> Path:
    if find_spec("huggingface_hub") is None:
        raise PlanError(
            Diagnostic(
                "no-model",
                f"there is no folder `{name}`, and fetching a model needs the `hub` extra",
                help="pip install 'anabranch[hub]'",
            )
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the hub's errors share no base class with those of the HTTP library below it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PlanError(
            Diagnostic(
                "no-model", f"cannot fetch `{name}` from the hub: {reason}", help="check the name and the network"
            )
        ) from None
