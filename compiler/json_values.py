"""Records to JSON and back by their type hints: how the schedule files are written and read.

A record is a list of its fields in order. Where a union of records may stand, the list begins with the record's name in
lower case (`swap_out` for `SwapOut`). At the top of a file a record is an object. Tuples are lists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from anabranch.dsl.diagnostics import Diagnostic, PlanError


def bad_schedule(what: str) -> PlanError:
    return PlanError(
        Diagnostic("bad-schedule", f"this is no schedule: {what}", help="`anabranch run --schedule FILE` writes one")
    )


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def load(text: str | bytes) -> Any:
    """Parsed JSON. Raises PlanError `bad-schedule`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad_schedule(f"it is no JSON: {error}") from None


def as_object(record: Any) -> dict[str, Any]:
    """A record as an object."""
    return {name: _plain(hint, getattr(record, name)) for name, hint in _hints(record.__class__).items()}


def as_tagged(record: Any) -> list[Any]:
    """A record as a list that begins with its name."""
    return [_tag(type(record)), *_fields(record)]


def from_object(kind: type, value: Any, where: str) -> Any:
    """The record that `as_object` wrote. Raises PlanError `bad-schedule`, which says `where`."""
    hints = _hints(kind)
    if not isinstance(value, dict) or set(value) != set(hints):
        raise bad_schedule(f"`{where}` must have the fields {', '.join(hints)}")
    return _built(kind, {name: _value(hint, value[name], f"{where}.{name}") for name, hint in hints.items()}, where)


def from_tagged(kinds: Any, value: Any, where: str) -> Any:
    """The record that `as_tagged` wrote, of the union `kinds`. Raises PlanError `bad-schedule`."""
    known = _by_tag(kinds)
    if not isinstance(value, list) or not value or not isinstance(value[0], str) or value[0] not in known:
        raise bad_schedule(f"`{where}` must be a list that begins with the name of a step")
    return _listed(known[value[0]], value[1:], f"{where} ({value[0]})")


def _plain(hint: Any, value: Any) -> Any:
    if isinstance(value, tuple):
        args = get_args(hint)
        if args[-1] is Ellipsis:
            return [_plain(args[0], item) for item in value]
        return [_plain(arg, item) for arg, item in zip(args, value, strict=True)]
    if is_dataclass(value):
        return as_tagged(value) if _is_union(hint) else _fields(value)
    return dict(value) if isinstance(value, Mapping) else value


def _fields(record: Any) -> list[Any]:
    return [_plain(hint, getattr(record, name)) for name, hint in _hints(record.__class__).items()]


def _listed(kind: type, items: Any, where: str) -> Any:
    hints = _hints(kind)
    if not isinstance(items, list):
        raise bad_schedule(f"`{where}` must be a list")
    if len(items) != len(hints):
        raise bad_schedule(f"`{where}` takes {len(hints)} fields ({', '.join(hints)}), not {len(items)}")
    pairs = zip(hints.items(), items, strict=True)
    return _built(kind, {name: _value(hint, item, f"{where}.{name}") for (name, hint), item in pairs}, where)


def _built(kind: type, values: dict[str, Any], where: str) -> Any:
    try:
        return kind(**values)
    except ValueError as error:
        raise bad_schedule(f"`{where}`: {error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` says. Integers are below 2**63, so that no arithmetic on them is slow."""
    if hint is int:
        if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
            raise bad_schedule(f"`{where}` must be a whole number")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise bad_schedule(f"`{where}` must be a list")
        args = get_args(hint)
        if args[-1] is Ellipsis:
            return tuple(_value(args[0], item, where) for item in value)
        if len(value) != len(args):
            raise bad_schedule(f"`{where}` must be a list of {len(args)}")
        return tuple(_value(arg, item, where) for arg, item in zip(args, value, strict=True))
    if _is_union(hint):
        kinds = [arg for arg in get_args(hint) if arg is not type(None)]
        if len(kinds) > 1:
            return from_tagged(hint, value, where)
        return None if value is None else _value(kinds[0], value, where)
    if is_dataclass(hint) and isinstance(hint, type):
        return _listed(hint, value, where)
    if hint in (bool, str):
        if not isinstance(value, hint):
            raise bad_schedule(f"`{where}` must be a {'truth value' if hint is bool else 'text'}")
        return value
    if not isinstance(value, dict):
        raise bad_schedule(f"`{where}` must be an object")
    return value


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _tag(kind: type) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in kind.__name__).lstrip("_")


@cache
def _by_tag(kinds: Any) -> dict[str, type]:
    return {_tag(kind): kind for kind in get_args(kinds)}


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
