"""Plan files and host functions, read for a command."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from anabranch.cli.errors import fail
from anabranch.dsl.ast import PlanDef, Program
from anabranch.dsl.diagnostics import Diagnostic, PlanError, did_you_mean
from anabranch.dsl.parse import parse, read_source

_FUNCTION: Final = re.compile(r"[a-z][a-z0-9_]*")


def read_program(file: str) -> Program:
    """The program in `file`. Raises PlanError."""
    return parse(read_source(file))


def chosen_plan(program: Program, name: str | None) -> PlanDef:
    """The plan called `name`, or the last one. Raises PlanError `no-such-plan`."""
    try:
        return program.plan(name)
    except KeyError:
        known = [plan.name for plan in program.plans]
        raise PlanError(
            Diagnostic(
                "no-such-plan",
                f"there is no plan `{name}` in this file",
                help=did_you_mean(name or "", known) or "it has " + ", ".join(f"`{plan}`" for plan in known),
            ),
            program.source,
        ) from None


def host_functions(module: str | None) -> dict[str, Callable[..., Any]]:
    """The public functions of a Python module, given by its dotted name or as a `.py` file; none for None.

    They are those that `__all__` lists, or else those defined there whose name begins with a letter.
    Raises PlanError `bad-functions`: there is no such module, or it fails when imported, or holds no function.
    """
    if module is None:
        return {}
    loaded = _import(module)
    listed = getattr(loaded, "__all__", None)
    found: dict[str, Callable[..., Any]] = {}
    for name, value in vars(loaded).items():
        is_own = inspect.isfunction(value) and value.__module__ == loaded.__name__
        if (name in listed if listed is not None else is_own) and callable(value) and _FUNCTION.fullmatch(name):
            found[name] = value
    if not found:
        fail("bad-functions", f"`{module}` defines no function", "a host function is a public function of the module")
    return found


def _import(module: str) -> ModuleType:
    try:
        if module.endswith(".py"):
            return _import_file(Path(module))
        # As `python -m` does: a module beside the plan is what a user means.
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the module is the user's, and may raise anything, SystemExit too
        said = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
        fail("bad-functions", f"cannot import `{module}`: {reason}", "`--functions` takes a module or a `.py` file")


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"`{path}` is no Python file")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
