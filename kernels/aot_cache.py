"""The figures of earlier builds, a file each, found by all that went into the build."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import tempfile
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anabranch.kernels.aot_build import Built, Target
from anabranch.kernels.shipped import Config

_HERE = Path(__file__).parent
_PACKAGE = "anabranch.kernels."


def _imported(source: bytes) -> set[Path]:
    """The files of this folder that a module's text imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    stems = {name.removeprefix(_PACKAGE).split(".")[0] for name in names if name.startswith(_PACKAGE)}
    return {path for stem in stems if (path := _HERE / f"{stem}.py").is_file()}


def sources_digest(fn: Any) -> str:
    """Of the text of a kernel's module, of the modules of this folder that it needs, and of what reads the builds."""
    root = inspect.getsourcefile(getattr(fn, "fn", fn))
    if root is None:
        raise ValueError(f"`{fn.__name__}` has no source file")
    todo = {Path(root), _HERE / "aot_build.py"}
    texts: dict[Path, bytes] = {}
    while todo:
        path = todo.pop()
        texts[path] = path.read_bytes()
        todo |= _imported(texts[path]) - texts.keys()
    digest = hashlib.sha256()
    for path in sorted(texts, key=lambda path: path.name):
        digest.update(f"{path.name} {len(texts[path])}\n".encode() + texts[path])
    return digest.hexdigest()


def _encode(built: Built) -> str:
    return json.dumps({each.name: getattr(built, each.name) for each in fields(Built) if each.name != "binary"})


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Cache:
    """A folder of figures. An entry that is torn or changed counts as missing, and is written anew."""

    directory: Path
    _digests: dict[Any, str] = field(default_factory=dict)

    def key(self, config: Config, target: Target) -> str:
        """A hash of what a build depends on; neither the name nor what is expected is among it."""
        if config.fn not in self._digests:
            self._digests[config.fn] = sources_digest(config.fn)
        parts = (
            self._digests[config.fn],
            config.fn.__name__,
            sorted(config.signature.items()),
            sorted(config.constexprs.items()),
            config.num_warps,
            config.num_stages,
            version("triton"),
            (target.backend, target.arch, target.warp_size),
        )
        return _sum(repr(parts))

    def get(self, key: str) -> Built | None:
        """What was put under `key`, without its binary."""
        try:
            entry = json.loads((self.directory / f"{key}.json").read_bytes())
            if entry["key"] != key or entry["sum"] != _sum(entry["built"]):
                return None
            return Built(**json.loads(entry["built"]), binary=None)
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def put(self, key: str, built: Built) -> Built:
        """Keep `built`, whole or not at all; returns it without its binary."""
        self.directory.mkdir(parents=True, exist_ok=True)
        text = _encode(built)
        handle, name = tempfile.mkstemp(dir=self.directory, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"key": key, "sum": _sum(text), "built": text}, file)
            os.replace(name, self.directory / f"{key}.json")
        except BaseException:
            os.unlink(name)
            raise
        return replace(built, binary=None)
