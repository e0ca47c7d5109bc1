"""Write a build (`runtime/artefact.py`): whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

from anabranch.compiler.expressions import calls_in
from anabranch.compiler.graph import Graph, walk
from anabranch.compiler.graph_json import to_json
from anabranch.compiler.pipeline import Compiled
from anabranch.compiler.typed_json import to_table
from anabranch.dsl.diagnostics import Diagnostic, PlanError
from anabranch.dsl.printer import print_plan
from anabranch.kernels.aot_model import ModelShape, build_model_kernels
from anabranch.kernels.jit import HAS_TRITON
from anabranch.runtime.artefact import (
    GRAPH,
    MANIFEST,
    MODEL,
    PLAN,
    PROGRAMS,
    SCHEDULE,
    TOKENIZER,
    Manifest,
    ModelParts,
    is_build,
)
from anabranch.runtime.config import ModelConfig
from anabranch.runtime.device import decode_tile
from anabranch.runtime.model import Decoder
from anabranch.runtime.models import LoadedModel
from anabranch.runtime.step_graph import export_step, save

LANES = 64
"""Branches that decode at once, which the tile of decode attention is fitted to: an engine's default."""


def write_build(
    folder: Path,
    compiled: Compiled,
    model: LoadedModel,
    *,
    page_size: int = 16,
    deterministic: bool = False,
    template: Literal["raw"] | None = None,
    functions: Collection[str] = (),
    schedule: str | None = None,
    no_schedule: str = "",
    targets: Collection[str] = (),
    force: bool = False,
) -> Manifest:
    """Write a build of a compiled plan and a model to `folder`, which is there whole afterwards, or as it was.

    model: its decoder has plain weights (`load(..., device=...)`)
    deterministic: the programs keep a row's bits whatever rows are beside it
    template: as the model was loaded with; functions: names of the host's functions
    schedule: the static schedule as JSON, or None for the reason `no_schedule`
    targets: names of those whose kernels are compiled, where Triton is installed
    force: whether a build that is there already is replaced, once the new one is written
    Raises PlanError `unwritable-file`, ValueError for a decoder, page size or target that is not supported.
    """
    check_place(folder, force=force)
    if not isinstance(model.decoder, Decoder):
        raise ValueError(f"a {type(model.decoder).__name__} has no exported step: only `Decoder` has")
    tile = decode_tile(model.decoder.config, model.decoder.dtype, lanes=LANES, deterministic=deterministic)
    parts = _parts(model, page_size, tile, deterministic, template)
    place = Path(os.path.realpath(folder))
    scratch = place.parent / f".{place.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        scratch.mkdir()
        source = compiled.program.source
        _write_text(scratch / PLAN, source.text or print_plan(compiled.program))
        _write_text(scratch / GRAPH, to_json(compiled.graph))
        _write_text(scratch / MODEL, _dump(to_table(parts)))
        _write_text(scratch / TOKENIZER, _dump(model.tokenizer.spec))
        if schedule is not None:
            _write_text(scratch / SCHEDULE, schedule)
        for kind, name in PROGRAMS.items():
            program = export_step(model.decoder, kind, page_size=page_size, block_m=tile, deterministic=deterministic)
            save(program, scratch / name, fingerprint=model.fingerprint)
        missing = _write_kernels(scratch, model.decoder, parts, targets)
        manifest = Manifest(
            plan=compiled.graph.main,
            source=source.name,
            model=model.name,
            fingerprint=model.fingerprint,
            functions=tuple(sorted(_called(compiled.graph) & set(functions))),
            schedule=no_schedule if schedule is None else "",
            kernels=() if missing else tuple(targets),
            kernels_missing=missing,
            files={path.relative_to(scratch).as_posix(): _hashed(path) for path in _files(scratch)},
        )
        _write_text(scratch / MANIFEST, manifest.to_json())
        check_place(folder, force=force)
        _move(scratch, place)
    except OSError as error:
        where = f" (`{error.filename}`)" if error.filename else ""
        raise _unwritable(
            f"the build `{folder}` can't be written: {error.strerror or error}{where}", "nothing was left of it"
        ) from None
    finally:
        # After the rename there is nothing of that name.
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def check_place(folder: Path, *, force: bool) -> None:
    """Find out before long work whether a build could be written to `folder`. Raises PlanError `unwritable-file`."""
    place = Path(os.path.realpath(folder))
    if not place.parent.is_dir():
        raise _unwritable(f"`{folder}` can't be written: there is no directory `{place.parent}`", "make it first")
    if not os.access(place.parent, os.W_OK):
        raise _unwritable(f"`{folder}` can't be written: permission denied", "check the path and its permissions")
    if not place.exists():
        return
    if not place.is_dir():
        raise _unwritable(f"`{folder}` is there, and is no folder", "name another one")
    if not is_build(place) and any(place.iterdir()):
        # Nothing but a build is ever replaced: a slip in the name must not cost a home.
        raise _unwritable(f"`{folder}` is there, and holds something else than a build", "name another folder")
    if not force:
        raise _unwritable(f"`{folder}` is there already", "name another folder, or replace it with `--force`")


def _move(scratch: Path, place: Path) -> None:
    """Put the finished build in its place. What stands there is set aside, and comes back if that fails."""
    _sync(scratch)
    if not place.exists():
        scratch.rename(place)
        _sync(place.parent)
        return
    aside = place.parent / f".{place.name}-{uuid.uuid4().hex[:8]}-old"
    place.rename(aside)
    try:
        scratch.rename(place)
    except BaseException:
        aside.rename(place)
        raise
    _sync(place.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(folder: Path) -> None:
    """See to it that a folder's names are on the disk, where the platform can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _parts(
    model: LoadedModel, page_size: int, tile: int, deterministic: bool, template: Literal["raw"] | None
) -> ModelParts:
    tokenizer, decoder = model.tokenizer, model.decoder
    return ModelParts(
        name=model.name,
        fingerprint=model.fingerprint,
        config=decoder.config,
        # Of the types that the kernels have.
        dtype=cast(Literal["float32", "float16", "bfloat16"], str(decoder.dtype).removeprefix("torch.")),
        device=str(decoder.device),
        num_logits=decoder.num_logits,
        page_size=page_size,
        block_m=tile,
        deterministic=deterministic,
        bos_id=tokenizer.bos_id,
        eos_ids=tuple(sorted(tokenizer.eos_ids)),
        chat_template=tokenizer.chat_template,
        template_names=tokenizer.template_names,
        template=template,
    )


def _write_kernels(scratch: Path, decoder: Decoder, parts: ModelParts, targets: Collection[str]) -> str:
    """Write the kernels of each target, and an index that says how they are launched; returns why there are none."""
    if not targets:
        return "no target was named"
    if not HAS_TRITON:
        return "Triton is not installed: pip install 'anabranch[gpu]'"
    shape = _shape(decoder.config, decoder, parts)
    index: dict[str, list[Mapping[str, Any]]] = {name: [] for name in targets}
    with closing(build_model_kernels(shape, targets)) as kernels:
        for kernel in kernels:
            config, built, target = kernel.config, kernel.built, kernel.target
            name = f"{config.name}.{'hsaco' if target.backend == 'hip' else 'cubin'}"
            (scratch / "kernels" / target.name).mkdir(parents=True, exist_ok=True)
            _write_bytes(scratch / "kernels" / target.name / name, kernel.binary)
            index[target.name].append({
                "file": name, "kernel": config.fn.__name__, "signature": config.signature,
                "constants": config.constexprs, "num_warps": config.num_warps, "num_stages": config.num_stages,
                "shared_bytes": built.shared_bytes, "registers": built.registers,
            })  # fmt: skip
    for name, entries in index.items():
        found = {"triton": version("triton"), "kernels": sorted(entries, key=lambda entry: str(entry["file"]))}
        _write_text(scratch / "kernels" / name / "index.json", json.dumps(found, indent=1) + "\n")
    return ""


def _shape(config: ModelConfig, decoder: Decoder, parts: ModelParts) -> ModelShape:
    attended = config.num_heads * config.head_dim
    linears = (
        (config.hidden_size, config.qkv_bias),
        (attended, config.output_bias),
        (config.hidden_size, config.mlp_bias),
        (config.intermediate_size, config.mlp_bias),
        (config.hidden_size, False),
    )
    return ModelShape(
        dtype=decoder.dtype,
        head_dim=config.head_dim,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_logits=parts.num_logits,
        page_size=parts.page_size,
        block_m=parts.block_m,
        windows=tuple(sorted({bool(window) for window in config.sliding_window or (None,)})),
        qk_norm=config.qk_norm,
        linears=linears if parts.deterministic else (),
    )


def _called(graph: Graph) -> set[str]:
    """The functions that a graph's expressions call, the language's own among them."""
    found: set[str] = set()
    for plan in graph.plans.values():
        for region, place in walk(plan.region):
            found.update(call.function for call in calls_in(region.nodes[place]))
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hashed(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _dump(document: Any) -> str:
    return json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n"


def _write_text(path: Path, text: str) -> None:
    _write_bytes(path, text.encode("utf-8", "surrogatepass"))


def _write_bytes(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _unwritable(message: str, help: str) -> PlanError:
    return PlanError(Diagnostic("unwritable-file", message, help=help))
