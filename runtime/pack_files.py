"""A pack: rows to train on as files, which appear whole or not at all.

    DIR/manifest.json       what the rows are, and which files they are in
    DIR/00000.safetensors   and so on

A file holds the arrays of its rows, one after another, as `PackedRow` has them, all int32: `ids`, `positions`, `labels`
and `weights` [num_tokens]; `starts` [num_segments]; `spans` [num_spans, 4]. Where each row begins in them is in
`row_tokens`, `row_segments` and `row_spans`, int64 [num_rows + 1].
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

import anabranch
from anabranch.dsl.diagnostics import Diagnostic, PlanError
from anabranch.runtime.models import LoadedModel, LoadedText, load_text
from anabranch.runtime.packing import IGNORED, PackedRow, Packer
from anabranch.runtime.tokenizer import Tokenizer
from anabranch.runtime.traces import KINDS, Kind, Trace, example_of

FORMAT: Final = "anabranch-pack"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
# What is kept in memory of rows that are closed, 16 bytes a token: large enough that a pack has few files.
SHARD_TOKENS: Final = 1 << 22


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of a pack."""

    file: str
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a pack is.

    anabranch: the version that made it
    model, fingerprint: of the traces; tokenizer: hex digits that differ between tokenizers
    length: most tokens in a row; rows, tokens: how many there are
    targets: labels, counted once for each run that wrote them; echoes: tokens that are there for a second label
    shared: tokens of traces that stand in a row for more than one of them, each time but the first
    shifts: some tokens see keys at another distance than their positions say
    kinds, statuses: what is labelled, as `example_of` takes it
    traces: that are packed; unfinished, untrained, too_long: that are not, since they were not over, held nothing to
        be trained on, or were longer than a row
    """

    anabranch: str
    model: str
    fingerprint: str
    tokenizer: str
    vocab_size: int
    length: int
    rows: int
    tokens: int
    targets: int
    echoes: int
    shared: int
    shifts: bool
    kinds: tuple[Kind, ...]
    statuses: Literal["ok", "all"]
    traces: int
    unfinished: int
    untrained: int
    too_long: int
    shards: tuple[Shard, ...]


def pack(
    traces: Iterable[Trace],
    folder: str | Path,
    *,
    length: int,
    model: str | LoadedText | LoadedModel | None = None,
    kinds: Iterable[Kind] = KINDS,
    statuses: Literal["ok", "all"] = "ok",
    shifts: bool = False,
    skip_long: bool = False,
    open_rows: int = 16,
) -> Manifest:
    """Pack traces into rows of at most `length` tokens, in files in `folder`, which must not be there.

    Traces are taken as they come, and rows written as they are full: in memory are `open_rows` rows and one file.
    model: of the traces, or where it is now; None for what the first of them names
    kinds, statuses: what is labelled, as `example_of` takes it
    shifts: take traces with shifts too: then positions do not tell distances, the spans' shifts do
    skip_long: leave out traces that are longer than a row
    Raises PlanError: bad-trace, trace-shifts, trace-too-long, no-traces, pack-exists, unwritable-file, and what
    `read_traces` and `load_text` raise; nothing is left in `folder` then. Raises ValueError for an unknown kind.
    """
    wanted = tuple(kind for kind in KINDS if kind in set(kinds))
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"unknown kinds {sorted(unknown)}; they are {', '.join(KINDS)}")
    packer = Packer(length, open_rows=open_rows)
    texts = _Texts(model)
    counts = dict.fromkeys(("traces", "unfinished", "untrained", "too_long", "targets"), 0)
    has_shifts = False
    with _Writer(Path(folder)) as writer:
        for trace in traces:
            if not trace.over:
                counts["unfinished"] += 1
                continue
            example = example_of(trace, texts.of(trace), kinds=wanted, statuses=statuses)
            if not example.targets:
                counts["untrained"] += 1
                continue
            if example.has_shifts and not shifts:
                _refuse(
                    "trace-shifts",
                    f"{trace.where} has shifts: after a `stitch(sum)` some of its tokens see others at another "
                    "distance than that of their positions, which position ids alone can't say",
                    "`--shifts` packs it, for a model that takes the shift of each span; or use `stitch(max)`",
                )
            try:
                closed = packer.add(example)
            except ValueError as error:
                if not skip_long:
                    _refuse(
                        "trace-too-long",
                        f"{trace.where} is longer than a row: {error}",
                        "raise `--length`, or leave such traces out with `--skip-long`",
                    )
                counts["too_long"] += 1
                continue
            for row in closed:
                writer.add(row)
            counts["traces"] += 1
            counts["targets"] += len(example.targets)
            has_shifts = has_shifts or example.has_shifts
        for row in packer.finish():
            writer.add(row)
        if not counts["traces"]:
            left_out = ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in _LEFT_OUT if counts[name])
            _refuse(
                "no-traces",
                f"there is nothing to train on: {left_out or 'no traces'}",
                "`run --journal` writes traces; `--train all` takes runs that did not end ok too",
            )
        text = texts.first
        manifest = Manifest(
            anabranch=anabranch.__version__,
            model=text.name,
            fingerprint=text.fingerprint,
            tokenizer=_digest(text.tokenizer),
            vocab_size=text.tokenizer.vocab_size,
            length=length,
            rows=writer.num_rows,
            tokens=writer.num_tokens,
            echoes=packer.num_echoes,
            shared=packer.num_shared,
            shifts=has_shifts,
            kinds=wanted,
            statuses=statuses,
            shards=writer.finish_shards(),
            **counts,
        )
        writer.publish(manifest)
    return manifest


_LEFT_OUT: Final = ("unfinished", "untrained", "too_long")


def read_manifest(folder: str | Path) -> Manifest:
    """What the pack in `folder` is. Raises PlanError: no-such-file, bad-pack."""
    try:
        document = json.loads((Path(folder) / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        _refuse("no-such-file", f"there is no pack in `{folder}`", "`anabranch pack TRACES -o DIR` makes one")
    except (OSError, ValueError, RecursionError) as error:
        bad_pack(folder, f"its {MANIFEST} can't be read: {error}")
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        bad_pack(folder, f'its {MANIFEST} has no `"format": "{FORMAT}"`')
    if (version := document.pop("version", None)) != VERSION:
        bad_pack(folder, f"it is of version {version}, and this is version {VERSION}")
    try:
        shards = tuple(Shard(**shard) for shard in document.pop("shards"))
        document["kinds"] = tuple(document["kinds"])
        manifest = Manifest(**document, shards=shards)
        types = {"int": int, "str": str, "bool": bool}
        records: list[Manifest | Shard] = [manifest, *shards]
        for record in records:
            for each in fields(record):
                kind = types.get(str(each.type))
                if kind is not None and type(getattr(record, each.name)) is not kind:
                    raise TypeError(f"`{each.name}`")
        if any(os.path.basename(shard.file) != shard.file for shard in shards):
            raise ValueError("a file outside its folder")
        if sum(shard.rows for shard in shards) != manifest.rows or min(shard.rows for shard in shards) < 1:
            raise ValueError("its files' rows do not add up")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        bad_pack(folder, f"its {MANIFEST} is not right: {error}")
    return manifest


class ShardReader:
    """The rows of one file, which is mapped into memory: a row is read when it is asked for."""

    def __init__(self, folder: str | Path, shard: Shard) -> None:
        """Raises PlanError: no-such-file, bad-pack."""
        self._where = os.path.join(folder, shard.file)
        try:
            file: Any = safe_open(self._where, framework="numpy")
            self._bounds = {name: file.get_tensor(name) for name in _ARRAYS}
            self._slices = {name: file.get_slice(name) for names in _ARRAYS.values() for name in names}
            sizes = {name: part.get_shape() for name, part in self._slices.items()}
        except FileNotFoundError:
            _refuse("no-such-file", f"there is no file `{self._where}`", "the pack is not whole; make it again")
        except (OSError, SafetensorError) as error:
            bad_pack(self._where, str(error))
        for bound, names in _ARRAYS.items():
            at = self._bounds[bound]
            if at.shape != (shard.rows + 1,) or at[0] != 0 or (np.diff(at) < 0).any():
                bad_pack(self._where, f"`{bound}` is not right")
            for name in names:
                if sizes[name] != [int(at[-1]), 4][: 1 + (name == "spans")]:
                    bad_pack(self._where, f"`{name}` has another size than `{bound}` says")

    def row(self, number: int) -> PackedRow:
        """Raises PlanError `bad-pack`."""
        arrays = {}
        for bound, names in _ARRAYS.items():
            first, end = (int(at) for at in self._bounds[bound][number : number + 2])
            for name in names:
                if first == end:  # safetensors slices no nothing
                    arrays[name] = np.zeros((0, 4)[: 1 + (name == "spans")], np.int32)
                    continue
                part = self._slices[name][first:end]
                if part.dtype != np.int32:
                    bad_pack(self._where, f"`{name}` holds {part.dtype}")
                arrays[name] = part
        row = PackedRow(**arrays)
        if fault := _fault(row):
            bad_pack(self._where, f"row {number} is not right: {fault}")
        return row


_ARRAYS: Final = {
    "row_tokens": ("ids", "positions", "labels", "weights"),
    "row_segments": ("starts",),
    "row_spans": ("spans",),
}


def _fault(row: PackedRow) -> str:
    """What would let a token see itself from ahead, or what is not there; empty for none."""
    starts, spans = row.starts, row.spans
    if not row.num_tokens or not len(starts) or starts[0] != 0:
        return "no segment begins it"
    if (np.diff(starts) < 1).any() or starts[-1] >= row.num_tokens:
        return "its segments do not follow each other"
    if len(spans):
        segment, first, end = spans[:, 0], spans[:, 1], spans[:, 2]
        if segment.min() < 0 or segment.max() >= len(starts) or first.min() < 0 or (first >= end).any():
            return "its spans are of no tokens"
        if (end > starts[segment]).any():
            return "a span is seen before it is there"
    if ((row.labels == IGNORED) != (row.weights == 0)).any() or row.weights.min() < 0:
        return "a label has no weight"
    return ""


def bad_pack(where: str | Path, what: str) -> NoReturn:
    """Raises PlanError."""
    _refuse("bad-pack", f"`{where}` is no pack of rows: {what}", "make it again with `anabranch pack`")


class _Texts:
    """The tokenizer and chat of the traces, by template."""

    def __init__(self, model: str | LoadedText | LoadedModel | None) -> None:
        self._model = model
        self._by_template: dict[str | None, LoadedText | LoadedModel] = {}

    @property
    def first(self) -> LoadedText | LoadedModel:
        return next(iter(self._by_template.values()))

    def of(self, trace: Trace) -> LoadedText | LoadedModel:
        template = trace.header.template
        if template not in self._by_template:
            if self._by_template and self._model is None:
                name = self.first.name
            else:
                name = self._model if isinstance(self._model, str) else trace.header.model
            loaded = self._model
            if loaded is None or isinstance(loaded, str):
                loaded = load_text(name, template=template)
            self._by_template[template] = loaded
        return self._by_template[template]


class _Writer:
    """Files in a folder of another name, which gets its own when all is written. Leaving it before removes them."""

    def __init__(self, folder: Path) -> None:
        self.num_rows = 0
        self.num_tokens = 0
        self._folder = folder
        self._scratch: Path | None = None
        self._rows: list[PackedRow] = []
        self._held = 0
        self._shards: list[Shard] = []

    def __enter__(self) -> _Writer:
        if os.path.lexists(self._folder):
            _refuse(
                "pack-exists", f"`{self._folder}` exists already", "a pack takes a new name; nothing is written over"
            )
        try:
            parent = self._folder.absolute().parent
            self._scratch = Path(tempfile.mkdtemp(prefix=f".{self._folder.name}-", dir=parent))
        except OSError as error:
            self._cannot(error)
        return self

    def __exit__(self, *_: object) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def add(self, row: PackedRow) -> None:
        self.num_rows += 1
        self.num_tokens += row.num_tokens
        self._rows.append(row)
        self._held += row.num_tokens
        if self._held >= SHARD_TOKENS:
            self._flush()

    def finish_shards(self) -> tuple[Shard, ...]:
        self._flush()
        return tuple(self._shards)

    def publish(self, manifest: Manifest) -> None:
        document = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
        self._write(MANIFEST, json.dumps(document, indent=1).encode() + b"\n")
        assert self._scratch is not None
        try:
            mask = os.umask(0)  # it can be read only by setting it
            os.umask(mask)
            os.chmod(self._scratch, 0o777 & ~mask)
            if os.path.lexists(self._folder):  # or an empty folder would be written over
                raise FileExistsError(f"`{self._folder}` exists now")
            os.rename(self._scratch, self._folder)
        except OSError as error:
            self._cannot(error)
        self._scratch = None

    def _flush(self) -> None:
        if not self._rows:
            return
        file = f"{len(self._shards):05}.safetensors"
        self._write(file, save(_arrays(self._rows)))
        self._shards.append(Shard(file, len(self._rows), self._held))
        self._rows, self._held = [], 0

    def _write(self, name: str, content: bytes) -> None:
        assert self._scratch is not None
        try:
            with open(self._scratch / name, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._cannot(error)

    def _cannot(self, error: OSError) -> NoReturn:
        _refuse(
            "unwritable-file",
            f"the pack `{self._folder}` can't be written: {error.strerror or error}",
            "nothing is left of it; make room or choose another place",
        )


def _arrays(rows: Sequence[PackedRow]) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for bound, names in _ARRAYS.items():
        sizes = [len(getattr(row, names[0])) for row in rows]
        arrays[bound] = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
        for name in names:
            arrays[name] = np.concatenate([getattr(row, name) for row in rows])
    return arrays


def _digest(tokenizer: Tokenizer) -> str:
    """Of all that decides which ids a text has."""
    identity = [tokenizer.spec, tokenizer.bos_id, sorted(tokenizer.eos_ids)]
    return blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()


def _refuse(code: str, message: str, help: str) -> NoReturn:
    raise PlanError(Diagnostic(code, message, help=help)) from None
