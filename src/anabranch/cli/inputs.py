"""`--input k=v`, `--input k=@file` and `--inputs FILE.jsonl`: the values a plan is given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import typer

from anabranch.cli.errors import fail
from anabranch.dsl.ast import PlanDef
from anabranch.dsl.diagnostics import did_you_mean
from anabranch.dsl.spec import Value
from anabranch.dsl.types import AnyType, Text, Type, input_mismatch, of_bound, show

_JSON_HELP: Final = 'write JSON, such as `xs=["a", "b"]` or `n=3`'


def read_inputs(plan: PlanDef, given: Sequence[str], file: str | None) -> list[dict[str, Value]]:
    """The inputs of each run of `plan`: one run without `file`, else one for each line of it.

    given: what stood after each `--input`; it holds for every run
    file: JSON Lines, an object on each line; its values go before those of `given`

    Raises typer.BadParameter for a `given` that is not `k=v`, and PlanError: unreadable-input, bad-input,
    unknown-input, missing-input.
    """
    types = {param.name: of_bound(param.bound) for param in plan.params}
    common = dict(_read_pair(text, types, plan) for text in given)
    runs = [common] if file is None else [{**common, **line} for line in _read_lines(file)]
    for number, values in enumerate(runs, 1):
        where = f" (line {number} of `{file}`)" if file is not None else ""
        _check_values(values, types, plan, where)
        _check_all_given(values, types, plan, where)
    return runs


def read_some(plan: PlanDef, given: Sequence[str]) -> dict[str, Value]:
    """The inputs in `given`, as `read_inputs` reads them; none need be there."""
    types = {param.name: of_bound(param.bound) for param in plan.params}
    values = dict(_read_pair(text, types, plan) for text in given)
    _check_values(values, types, plan, "")
    return values


def _read_pair(text: str, types: Mapping[str, Type], plan: PlanDef) -> tuple[str, Value]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"`{text}` is not `name=value` or `name=@file`", param_hint="--input")
    if name not in types:
        _unknown(name, types, plan, "")
    if value.startswith("@@"):
        value = value[1:]
    elif value.startswith("@"):
        # The shell's own rule for `$(cat file)`, but for one newline only: it ends the last line.
        value = _read_file(value[1:]).removesuffix("\n")
    _check_utf8(value, f"the input `{name}`")
    if isinstance(types[name], Text | AnyType):
        return name, value
    return name, _read_json(value, f"the input `{name}` takes {show(types[name])}")


def _read_lines(file: str) -> list[dict[str, Value]]:
    runs: list[dict[str, Value]] = []
    for number, line in enumerate(_read_file(file).split("\n"), 1):
        if not line.strip():
            continue
        value = _read_json(line, f"line {number} of `{file}`")
        if not isinstance(value, dict):
            fail("bad-input", f"line {number} of `{file}` is no JSON object", 'a line is `{"name": value, ...}`')
        runs.append(value)
    if not runs:
        fail("bad-input", f"`{file}` holds no inputs", 'a line is `{"name": value, ...}`')
    return runs


def _read_file(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        fail("unreadable-input", f"`{name}` is not UTF-8 at byte {error.start}", "save the file as UTF-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        fail("unreadable-input", f"`{name}` can't be read: {reason}", "check the path and its permissions")


def _read_json(text: str, what: str) -> Value:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else f"it is not JSON ({error})"
        fail("bad-input", f"{what}, and {reason}", _JSON_HELP)


def _no_constant(text: str) -> Value:
    raise ValueError(f"`{text}` is no number")


def _check_values(values: Mapping[str, Value], types: Mapping[str, Type], plan: PlanDef, where: str) -> None:
    for name, value in values.items():
        if name not in types:
            _unknown(name, types, plan, where)
        if reason := input_mismatch(value, types[name]):
            fail("bad-input", f"the input `{name}` takes {show(types[name])}, and {reason}{where}", _JSON_HELP)


def _check_all_given(values: Mapping[str, Value], types: Mapping[str, Type], plan: PlanDef, where: str) -> None:
    missing = [name for name in types if name not in values]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        options = " ".join(f"--input {name}=..." for name in missing)
        fail("missing-input", f"the plan `{plan.name}` needs {names}{where}", f"give {options}")


def _unknown(name: str, types: Mapping[str, Type], plan: PlanDef, where: str) -> None:
    known = ", ".join(f"`{param}`" for param in types) or "none"
    fail(
        "unknown-input",
        f"the plan `{plan.name}` has no input `{name}`{where}",
        did_you_mean(name, types) or f"its inputs: {known}",
    )


def _check_utf8(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        fail("bad-input", f"{what} is not UTF-8", "give it as `@file`, saved as UTF-8")
