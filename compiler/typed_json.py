"""Frozen records as a flat table that JSON holds, and back by their type hints: what these do not reach is not read.

    table  = [record+]                 the root first; a record stands before those inside it
    record = [name, field*]            the class's name, then its fields in order
    field  = number | text | truth value | null | [field*] | [[key, field]*] for a mapping | place of a record

A record that is a field is named by its place in the table, and each record is a field of exactly one other. So neither
writing nor reading recurses, whatever the depth, and a table of n entries makes n records and not 2**n. A `Span` is a
field of two numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, NoReturn, TypeAlias, Union, get_args, get_origin, get_type_hints

from anabranch.dsl.diagnostics import Span

Table: TypeAlias = list[list[Any]]
Refuse: TypeAlias = Callable[[str], Exception]
"""Makes the error for a table that is none, from a few words about what is wrong and where."""


def to_table(root: Any) -> Table:
    """The record `root` and all in it. Raises TypeError for a field that is not of its hint's kind."""
    found = [root]
    table: Table = []
    # `found` grows while it is read: what a record holds comes after it.
    for record in found:
        hints = _hints(record.__class__)
        table.append([type(record).__name__, *(_written(hints[n], getattr(record, n), found) for n in hints)])
    return table


def _written(hint: Any, value: Any, found: list[Any]) -> Any:
    if isinstance(value, Span):
        return [value.start, value.end]
    if is_dataclass(value):
        found.append(value)
        return len(found) - 1
    if isinstance(value, tuple):
        items = zip(_items(_of_kind(hint, tuple), len(value)), value, strict=True)
        return [_written(of, item, found) for of, item in items]
    if isinstance(value, Mapping):
        _, of = get_args(_of_kind(hint, Mapping))
        return [[key, _written(of, item, found)] for key, item in value.items()]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} has no place in a table")


def from_table(root: type, table: Any, refuse: Refuse, *, max_depth: int) -> Any:
    """The record of class `root` that `to_table` wrote.

    max_depth: how deep records may stand in one another
    Raises what `refuse` makes for anything else, however it was made.
    """
    return _Reader(root, refuse, max_depth).read(table)


@dataclass(slots=True)
class _Reader:
    """Reads a table from its end, so that what a record holds is there before it."""

    root: type
    refuse: Refuse
    max_depth: int
    built: dict[int, Any] = field(default_factory=dict)
    depths: dict[int, int] = field(default_factory=dict)
    deepest: int = 0
    where: str = ""

    def read(self, table: Any) -> Any:
        if not isinstance(table, list) or not table:
            raise self.refuse("its records must be a list, and not empty")
        classes = _reached(self.root)
        for place in reversed(range(len(table))):
            entry = table[place]
            name = entry[0] if isinstance(entry, list) and entry else None
            kind = classes.get(name) if isinstance(name, str) else None
            self.where = f"record {place}"
            if kind is None:
                self.wrong("it must be a list that begins with the name of a record")
            self.where += f" ({name})"
            self.deepest = 0
            record = self.record(kind, entry[1:], place)
            if self.deepest >= self.max_depth:
                self.wrong(f"more than {self.max_depth} records stand in one another")
            self.built[place], self.depths[place] = record, self.deepest + 1
        found = self.built.pop(0)
        self.where = "record 0"
        if type(found) is not self.root:
            self.wrong(f"it must be a {self.root.__name__}")
        if self.built:
            self.where = f"record {min(self.built)}"
            self.wrong("no record holds it")
        return found

    def record(self, kind: type, values: list[Any], place: int) -> Any:
        hints = _hints(kind)
        if len(values) != len(hints):
            self.wrong(f"it takes {len(hints)} fields, not {len(values)}")
        where = self.where
        read = {}
        for (name, hint), value in zip(hints.items(), values, strict=True):
            self.where = f"{where}, `{name}`"
            read[name] = self.value(hint, value, place)
        self.where = where
        try:
            return kind(**read)
        except ValueError as error:
            self.wrong(str(error))

    def value(self, hint: Any, value: Any, place: int) -> Any:
        """`value` as `hint` says."""
        origin = get_origin(hint)
        if origin in (Union, UnionType):
            return self.one_of(get_args(hint), value, place)
        if hint is Span:
            ends = self.items((int, int), value, place)
            return Span(*ends)
        if isinstance(hint, type) and is_dataclass(hint):
            return self.held((hint,), value, place)
        if origin is Literal:
            if not any(type(value) is type(known) and value == known for known in get_args(hint)):
                self.wrong(f"it must be one of {', '.join(map(repr, get_args(hint)))}")
            return value
        if origin is tuple:
            return tuple(self.items(_items(hint, len(value) if isinstance(value, list) else 0), value, place))
        if origin is not None and issubclass(origin, Mapping):
            return self.mapping(hint, value, place)
        if hint is float:
            # A whole number may stand where a float may.
            if type(value) not in (int, float) or not math.isfinite(value):
                self.wrong("it must be a number")
        elif hint not in (int, bool, str, type(None)):
            raise TypeError(f"{self.where}: fields of the kind {hint} are not read")
        elif type(value) is not hint:
            self.wrong(f"it must be {_NAMES[hint]}")
        return value

    def one_of(self, hints: tuple[Any, ...], value: Any, place: int) -> Any:
        """A value of a union: null, a record, or what is told by its own type."""
        if value is None and type(None) in hints:
            return None
        records = tuple(h for h in hints if isinstance(h, type) and is_dataclass(h))
        if records and type(value) is int:
            return self.held(records, value, place)
        plain = [h for h in hints if h not in records and h is not type(None)]
        if len(plain) == 1:
            return self.value(plain[0], value, place)
        if not plain:
            self.wrong("it must be the place of a record")
        raise TypeError(f"{self.where}: unions such as {hints} are not read")

    def held(self, kinds: tuple[type, ...], value: Any, place: int) -> Any:
        """The record at a place, which no other record holds."""
        if type(value) is not int or value not in self.built:
            self.wrong("it must be the place of a record further on that nothing else holds")
        record = self.built[value]
        if type(record) not in kinds:
            self.wrong(f"a {type(record).__name__} can't stand there")
        self.deepest = max(self.deepest, self.depths[value])
        del self.built[value]
        return record

    def items(self, hints: tuple[Any, ...], value: Any, place: int) -> list[Any]:
        if not isinstance(value, list) or len(value) != len(hints):
            self.wrong(f"it must be a list of {len(hints)}")
        return [self.value(hint, item, place) for hint, item in zip(hints, value, strict=True)]

    def mapping(self, hint: Any, value: Any, place: int) -> dict[str, Any]:
        _, of = get_args(hint)
        found: dict[str, Any] = {}
        for pair in value if isinstance(value, list) else [None]:
            if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str) or pair[0] in found:
                self.wrong("it must be a list of pairs, each with a name of its own")
            found[pair[0]] = self.value(of, pair[1], place)
        return found

    def wrong(self, what: str) -> NoReturn:
        raise self.refuse(f"{self.where}: {what}")


_NAMES: Mapping[Any, str] = {int: "a whole number", bool: "a truth value", str: "a text", type(None): "null"}


def _items(hint: Any, count: int) -> tuple[Any, ...]:
    """The hints of the items of a tuple of `count`."""
    args = get_args(hint)
    return args[:1] * count if args[-1] is Ellipsis else args


def _of_kind(hint: Any, kind: type) -> Any:
    """That part of a hint which is of an outer kind, a union's own or the hint itself."""
    for part in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        origin = get_origin(part)
        if origin is not None and issubclass(origin, kind):
            return part
    raise TypeError(f"a {kind.__name__} has no place where {hint} is wanted")


@cache
def _hints(kind: Any) -> Mapping[str, Any]:
    """The fields of a record, in order, and what each may hold."""
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


@cache
def _reached(root: type) -> Mapping[str, type]:
    """Every class of record that may stand in a `root`, by its name. Raises TypeError if two have one name."""
    found: dict[str, type] = {}
    waiting = [root]
    while waiting:
        kind = waiting.pop()
        if found.get(kind.__name__) is kind:
            continue
        if kind.__name__ in found:
            raise TypeError(f"two records are called {kind.__name__}")
        found[kind.__name__] = kind
        waiting.extend(inner for hint in _hints(kind).values() for inner in _records(hint))
    return found


def _records(hint: Any) -> Iterator[type]:
    """The classes of record in a hint."""
    if isinstance(hint, type) and is_dataclass(hint):
        if hint is not Span:
            yield hint
        return
    for part in get_args(hint):
        yield from _records(part)
