"""A build: a folder that holds a compiled plan and a model's steps, ready to run. This is what reads one.

    plan.plan       the text of the plan, as it was
    graph.json      its compiled graph (`compiler/graph_json.py`)
    schedule.json   its static schedule, where it has one (`compiler/schedule_json.py`)
    model.json      the model's shape, its tokenizer's facts, and what its programs were exported with
    tokenizer.json  the tokenizer
    decode.pt2, prefill.pt2   the model's steps, weights and all (`runtime/step_graph.py`)
    kernels/TARGET/           machine code of the kernels, with an index
    manifest.json   versions, and the size and sha256 of every other file

Nothing is opened before its size and hash are as the manifest says. That guards against damage and mix-ups, and not
against somebody who writes a manifest of his own: a `.pt2` file can hold pickled objects.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram

from anabranch import __version__
from anabranch.compiler.graph_json import bad_build, from_json
from anabranch.compiler.pipeline import Compiled, from_graph
from anabranch.compiler.typed_json import from_table
from anabranch.compiler.verify_graph import VerifyError
from anabranch.dsl.diagnostics import Source
from anabranch.kernels.segment_attention import BLOCK_ROWS
from anabranch.runtime.chat import RawChat, read_chat
from anabranch.runtime.config import ModelConfig
from anabranch.runtime.models import LoadedModel, find_device
from anabranch.runtime.programs import ProgramDecoder
from anabranch.runtime.step_graph import Kind, load
from anabranch.runtime.tokenizer import Tokenizer

FORMAT: Final = "anabranch-build"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
PLAN, GRAPH, SCHEDULE = "plan.plan", "graph.json", "schedule.json"
MODEL, TOKENIZER = "model.json", "tokenizer.json"
PROGRAMS: Final[Mapping[Kind, str]] = {"decode": "decode.pt2", "prefill": "prefill.pt2"}
NEEDED: Final = (PLAN, GRAPH, MODEL, TOKENIZER, *PROGRAMS.values())

_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", re.ASCII)
"""Of a file in the folder, from there; it leads nowhere else."""

_MOST_BYTES = 1 << 24
"""Of a manifest: far more than one of every kernel for every target takes."""


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What running needs of a model beside its programs and the JSON of its tokenizer.

    dtype: as torch names it, without `torch.`
    page_size, block_m, deterministic: what the programs were exported with
    bos_id .. template_names: as in `Tokenizer`
    template: `raw` where the plan was built for no chat template
    """

    name: str
    fingerprint: str
    config: ModelConfig
    dtype: Literal["float32", "float16", "bfloat16"]
    device: str
    num_logits: int
    page_size: int
    block_m: int
    deterministic: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]
    chat_template: str | None
    template_names: Mapping[str, str]
    template: Literal["raw"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a build says of itself.

    plan: which plan of its file it runs; source: the name of that file
    functions: names of the host functions that the plan calls
    schedule: "" where there is a static one, else why there is none
    kernels: the targets whose machine code is there; kernels_missing: "", or why there is none
    files: size in bytes and sha256 of each file, by its path in the folder
    """

    plan: str
    source: str
    model: str
    fingerprint: str
    functions: tuple[str, ...]
    schedule: str
    kernels: tuple[str, ...]
    kernels_missing: str
    files: Mapping[str, tuple[int, str]]
    anabranch: str = __version__
    torch: str = str(torch.__version__)
    python: str = platform.python_version()

    def to_json(self) -> str:
        """The manifest as the one text that holds it, its own hash included."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "anabranch": self.anabranch,
            "torch": self.torch,
            "python": self.python,
            "plan": self.plan,
            "source": self.source,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "functions": list(self.functions),
            "schedule": self.schedule,
            "kernels": list(self.kernels),
            "kernels_missing": self.kernels_missing,
            "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(self.files.items())},
        }
        return _sealed(document)


def _sealed(document: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    return json.dumps({**document, "sha256": digest}, indent=1) + "\n"


def is_build(folder: Path) -> bool:
    """Whether a folder is, or was, a build: its manifest is of this format, of whatever version."""
    try:
        path = folder / MANIFEST
        if path.stat().st_size > _MOST_BYTES:
            return False
        document = json.loads(path.read_bytes())
        return isinstance(document, dict) and document.get("format") == FORMAT
    except (OSError, ValueError, RecursionError):
        return False


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a build, for this version. Raises PlanError `bad-build`."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise bad_build(f"`{path}` is larger than any manifest")
        text = path.read_bytes().decode()
        document = json.loads(text)
    except FileNotFoundError:
        raise bad_build(f"there is no `{path}`") from None
    except OSError as error:
        raise bad_build(f"`{path}` can't be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise bad_build(f"`{path}` is damaged ({error})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise bad_build(f"`{path}` is no manifest of a build")
    for what, is_now in (("version", VERSION), ("anabranch", __version__), ("torch", str(torch.__version__))):
        if document.get(what) != is_now:
            name = "the build's format" if what == "version" else what
            raise bad_build(f"it was built with version {document.get(what)} of {name}, and this is {is_now}")
    sealed = {name: value for name, value in document.items() if name != "sha256"}
    if _sealed(sealed) != text:
        raise bad_build(f"`{path}` was changed after it was written")
    try:
        return _manifest(sealed)
    except (KeyError, TypeError, AttributeError):
        raise bad_build(f"`{path}` lacks what a manifest says") from None


def _manifest(document: Mapping[str, Any]) -> Manifest:
    """Raises KeyError, TypeError or AttributeError for what is no manifest."""
    files: dict[str, tuple[int, str]] = {}
    for name, entry in document["files"].items():
        if _NAME.fullmatch(name) is None or name == MANIFEST:
            raise TypeError(f"`{name}` is no path in the folder")
        files[name] = _typed(int, entry["bytes"]), _typed(str, entry["sha256"])
    texts = {name: _typed(str, document[name]) for name in ("plan", "source", "model", "fingerprint", "schedule")}
    return Manifest(
        **texts,
        functions=tuple(_typed(str, name) for name in document["functions"]),
        kernels=tuple(_typed(str, name) for name in document["kernels"]),
        kernels_missing=_typed(str, document["kernels_missing"]),
        files=files,
        python=_typed(str, document["python"]),
    )


def _typed(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


@dataclass(frozen=True, slots=True)
class Build:
    """A build whose files are as its manifest says.

    compiled: the plan; nothing was parsed for it, and no pass ran
    parts: of the model
    """

    folder: Path
    manifest: Manifest
    compiled: Compiled
    parts: ModelParts
    tokenizer: Tokenizer

    def model(self, *, raw: bool = False) -> LoadedModel:
        """The model, whose decoder is the build's programs; they are loaded now, which takes as long as reading them.

        raw: without a chat template, also where the build has one
        Raises PlanError: bad-program, bad-template, and bad-device where it was built for one that is not here.
        """
        parts, device = self.parts, find_device(self.parts.device)
        steps = _programs(self.folder, self.manifest.fingerprint)
        decoder = ProgramDecoder(
            config=parts.config,
            dtype=getattr(torch, parts.dtype),
            device=device,
            num_logits=parts.num_logits,
            page_size=parts.page_size,
            block_m=parts.block_m,
            deterministic=parts.deterministic,
            run_decode=steps["decode"].module(),
            run_prefill=steps["prefill"].module(),
        )
        chat = RawChat() if raw or parts.template == "raw" else read_chat(self.tokenizer, parts.name)
        return LoadedModel(decoder, self.tokenizer, chat, parts.name, parts.fingerprint)


def open_build(folder: Path) -> Build:
    """Check every file of a build, and read its plan. The programs are checked, and not loaded yet.

    Raises PlanError: bad-build where a version, a size or a hash is not as it must be, or a file is missing or holds
    something else; bad-model for a tokenizer that can't be used.
    """
    manifest = read_manifest(folder)
    for name in NEEDED:
        if name not in manifest.files:
            raise bad_build(f"`{folder / MANIFEST}` names no `{name}`")
    kept = {name: _checked(folder, name, manifest) for name in manifest.files}
    text = kept[PLAN].decode(errors="replace")
    try:
        compiled = from_graph(from_json(kept[GRAPH]), Source(manifest.source, text))
    except VerifyError as error:
        raise bad_build(f"`{GRAPH}` breaks a rule of graphs ({str(error).partition(chr(10))[0]})") from None
    if compiled.graph.main != manifest.plan:
        raise bad_build(f"`{GRAPH}` is of the plan `{compiled.graph.main}`, not `{manifest.plan}`")
    parts = cast(ModelParts, from_table(ModelParts, _json(MODEL, kept[MODEL]), _refuse_model, max_depth=4))
    _check_parts(parts)
    if parts.fingerprint != manifest.fingerprint:
        raise bad_build(f"`{MODEL}` is of the model {parts.fingerprint}, not {manifest.fingerprint}")
    spec = _json(TOKENIZER, kept[TOKENIZER])
    if not isinstance(spec, dict):
        raise bad_build(f"`{TOKENIZER}` holds no tokenizer")
    tokenizer = Tokenizer(
        spec,
        eos_ids=parts.eos_ids,
        bos_id=parts.bos_id,
        chat_template=parts.chat_template,
        template_names=parts.template_names,
        where=str(folder / TOKENIZER),
    )
    return Build(folder, manifest, compiled, parts, tokenizer)


def _check_parts(parts: ModelParts) -> None:
    """Raise PlanError `bad-build` for a shape that no decoder has."""
    config = parts.config
    counts = {name: getattr(config, name) for name in _COUNTS} | {"num_logits": parts.num_logits}
    for name, count in counts.items():
        if not 0 < count < 1 << 31:
            raise bad_build(f"in `{MODEL}`, `{name}` is {count}")
    if config.num_heads % config.num_kv_heads or parts.num_logits > config.vocab_size:
        raise bad_build(f"in `{MODEL}`, the heads or the vocabulary do not agree")
    if len(config.sliding_window) not in (0, config.num_layers) or parts.block_m not in BLOCK_ROWS:
        raise bad_build(f"in `{MODEL}`, the windows or the tile can't be")
    ids = parts.eos_ids if parts.bos_id is None else (*parts.eos_ids, parts.bos_id)
    if any(not 0 <= token < config.vocab_size for token in ids):
        raise bad_build(f"in `{MODEL}`, a token is not in the vocabulary")


_COUNTS: Final = (
    "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size",
    "max_context",
)  # fmt: skip


def _checked(folder: Path, name: str, manifest: Manifest) -> bytes:
    """What a file holds, if it is small enough to be kept; else nothing. Raises PlanError `bad-build`."""
    size, digest = manifest.files[name]
    path = folder / name
    try:
        found = path.stat().st_size
        if found != size:
            raise bad_build(f"`{path}` has {found} bytes, and the manifest says {size}")
        if name in PROGRAMS.values():
            with path.open("rb") as file:
                is_same, content = hashlib.file_digest(file, "sha256").hexdigest() == digest, b""
        else:
            content = path.read_bytes()
            is_same = hashlib.sha256(content).hexdigest() == digest
    except FileNotFoundError:
        raise bad_build(f"`{path}` is missing") from None
    except OSError as error:
        raise bad_build(f"`{path}` can't be read: {error.strerror or error}") from None
    if not is_same:
        raise bad_build(f"`{path}` was changed: its sha256 is not the manifest's")
    return content


def _json(name: str, content: bytes) -> Any:
    try:
        return json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise bad_build(f"`{name}` is no JSON ({error})") from None


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"`{text}` is no number")


def _refuse_model(what: str) -> Exception:
    return bad_build(f"in `{MODEL}`, {what}")


def _programs(folder: Path, fingerprint: str) -> Mapping[Kind, ExportedProgram]:
    """Both programs, which hold each weight once: on the disk each has its own."""
    decode, prefill = (load(folder / name, fingerprint=fingerprint) for name in PROGRAMS.values())
    ours = decode.state_dict
    for name, weight in prefill.state_dict.items():
        if name in ours and _same(ours[name], weight):
            prefill.state_dict[name] = ours[name]
    return {"decode": decode, "prefill": prefill}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.device == b.device and torch.equal(a, b)
