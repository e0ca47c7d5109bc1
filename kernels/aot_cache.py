"""The figures of earlier builds, a file each, found by all that went into the build."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

from anabranch.kernels import aot_build
from anabranch.kernels.aot_build import Built, Target
from anabranch.kernels.shipped import Config


def _encode(built: Built) -> str:
    return json.dumps({each.name: getattr(built, each.name) for each in fields(Built) if each.name != "binary"})


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Cache:
    """A folder of figures. An entry that is torn or changed counts as missing, and is written anew."""

    directory: Path

    def key(self, config: Config, target: Target) -> str:
        """A hash of what a build depends on; neither the name nor what is expected is among it.

        Of sources these are what Triton itself knows a kernel by, which is its text, that of each function it calls and
        the constants they read; and the text of what reads a build.
        """
        import triton

        parts = (
            config.fn.cache_key,
            Path(aot_build.__file__).read_text(),
            sorted(config.signature.items()),
            sorted(config.constexprs.items()),
            config.num_warps,
            config.num_stages,
            triton.__version__,
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
