"""Anabranch: fork / map / join reasoning plans over one shared KV cache.

    model = anabranch.load("smollm2")
    engine = anabranch.Engine(model)
    program = anabranch.parse(anabranch.read_source("vote.plan"))
    [result] = engine.run(program, {"problem": "How many legs does a spider have?"})

Everything public is named here and imported on first use, so `import anabranch` costs nothing and reading or checking
a plan never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from anabranch.compiler.pipeline import Compiled, compile, compile_plan
    from anabranch.dsl.check import Checked, check
    from anabranch.dsl.diagnostics import Diagnostic, PlanError
    from anabranch.dsl.parse import parse, parse_text, read_source
    from anabranch.dsl.printer import print_plan
    from anabranch.runtime.engine import Engine, EngineConfig, Interrupted, RunResult, StreamEvent
    from anabranch.runtime.models import LoadedModel, load

__version__ = "0.1.0"

__all__ = [
    "Checked",
    "Compiled",
    "Diagnostic",
    "Engine",
    "EngineConfig",
    "Interrupted",
    "LoadedModel",
    "PlanError",
    "RunResult",
    "StreamEvent",
    "__version__",
    "check",
    "compile",
    "compile_plan",
    "load",
    "parse",
    "parse_text",
    "print_plan",
    "read_source",
]

_HOMES: Final = {
    "anabranch.compiler.pipeline": ("Compiled", "compile", "compile_plan"),
    "anabranch.dsl.check": ("Checked", "check"),
    "anabranch.dsl.diagnostics": ("Diagnostic", "PlanError"),
    "anabranch.dsl.parse": ("parse", "parse_text", "read_source"),
    "anabranch.dsl.printer": ("print_plan",),
    "anabranch.runtime.engine": ("Engine", "EngineConfig", "Interrupted", "RunResult", "StreamEvent"),
    "anabranch.runtime.models": ("LoadedModel", "load"),
}
_HOME: Final = {name: module for module, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # else a type checker would accept any name

    def __getattr__(name: str) -> object:
        module = _HOME.get(name)
        if module is None:
            raise AttributeError(f"module `anabranch` has no attribute `{name}`")
        value = getattr(importlib.import_module(module), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
