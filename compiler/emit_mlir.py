"""A plan and its static schedule as MLIR text in a dialect of their own, and read back.

The dialect `anabranch` is written in IRDL (MLIR's language for dialects), so that any build of MLIR can load it, verify
what is written in it and print it. One operation stands for each record of `compiler/schedule.py` and each node of
`compiler/graph.py`; the definition is made from the records themselves:

    a field that is        is written as
    int, bool              an integer attribute
    Runs                   array<i64: first, count, first, count, ...>
    Ref                    #anabranch.ref<@plan, context>
    a tuple of records     a region with an operation for each
    a tuple of tuples      a region with a `sequence` for each, whose region has the operations

Every region ends with `omp.terminator`: MLIR wants a terminator there, IRDL cannot define one, and of those that MLIR
brings this is one that carries nothing and asks for no parent.
Writing needs nothing; reading needs torch-mlir, for its parser.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import cache
from typing import Any, Final, Literal, TypeAlias, get_args, get_origin, get_type_hints

from anabranch.compiler.graph import (
    Arm,
    Cond,
    Decode,
    Fork,
    Graph,
    Let,
    Loop,
    Map,
    Need,
    Node,
    Reduce,
    Region,
    Return,
    regions,
)
from anabranch.compiler.graph_text import expr_text, node_line
from anabranch.compiler.json_values import bad_schedule
from anabranch.compiler.mlir_bindings import bindings
from anabranch.compiler.recording import FORMAT, VERSION
from anabranch.compiler.schedule import Moved, Part, Ref, Runs, Schedule, Step
from anabranch.compiler.schedule_json import Origin, from_document
from anabranch.compiler.scheduler import Machine

Kind: TypeAlias = Literal["int", "bool", "runs", "ref", "refs", "records", "sequences"]

_BASE: Final[dict[Kind, str]] = {
    "int": "#builtin.integer",
    "bool": "#builtin.integer",
    "runs": "#builtin.dense_array",
    "refs": "#builtin.array",
}
# A `Decode` of the graph is a `gen` here, since a step of the schedule is called `decode`.
_NODES: Final = ("write", "gen", "call", "expand")
END: Final = "omp.terminator"
_NODES_WITH_REGION: Final = ("map", "reduce", "loop")
_STATEMENTS: Final = ("let", "need", "return")
_TOP: Final = ("source", "schedule")
_FIGURES: Final = ("calls", "pages_peak", "threads")
_REF: Final = re.compile(r"#anabranch\.ref<@([a-z_][a-z0-9_]*), (-?[0-9]+) : i64>")


def dialect_text() -> str:
    """The dialect's definition in IRDL, as `--irdl-file` of MLIR's tools and `irdl.load_dialects` take it."""
    string, integer, array = "#builtin.string", "#builtin.integer", "#builtin.array"
    node = {"context": integer, "text": string}
    machine = {field.name: integer for field in fields(Machine)}
    lines = [
        "irdl.dialect @anabranch {",
        "  irdl.type @context",
        "  irdl.attribute @ref {",
        '    %plan = irdl.base "#builtin.symbol_ref"',
        '    %context = irdl.base "#builtin.integer"',
        "    irdl.parameters(plan: %plan, context: %context)",
        "  }",
        *_operation("source", {"plan": string, "text": string, "inputs": string, "functions": array}),
        *_operation("plan", {"sym_name": string, "text": string}, [True]),
        *_operation("schedule", {"main": string, **machine, **dict.fromkeys(_FIGURES, integer)}, [False]),
        *_operation("sequence", {}, [False]),
    ]
    for name in _NODES:
        lines += _operation(name, node, is_node=True)
    for name in _NODES_WITH_REGION:
        lines += _operation(name, node, [True], is_node=True)
    lines += _operation("fork", node, [False], is_node=True)
    lines += _operation("arm", {"text": string}, [True])
    lines += _operation("cond", node, [True, True], is_node=True)
    for name in _STATEMENTS:
        lines += _operation(name, {"text": string})
    for record in _records():
        kinds = _kinds(record)
        attributes = {
            name: _BASE.get(kind, "ref") for name, kind in kinds.items() if kind not in ("records", "sequences")
        }
        lines += _operation(_name(record), attributes, [False] * (len(kinds) - len(attributes)))
    return "\n".join([*lines, "}", ""])


def to_mlir(schedule: Schedule, origin: Origin, graph: Graph) -> str:
    """The plans of `graph` and the schedule of its main one, as a module of the dialect.

    In a node's `text`, strings are shortened as in `graph_text`; `source` has the plan's text whole.
    """
    lines = ["module {", *_op("source", _source(origin), "  ")]
    for name in (graph.main, *(name for name in graph.plans if name != graph.main)):
        plan = graph.plans[name]
        bounds = plan.bounds or (None,) * len(plan.params)
        params = ", ".join(
            param if bound is None else f"{param}: {expr_text(bound)}"
            for param, bound in zip(plan.params, bounds, strict=True)
        )
        attributes = {"sym_name": _string(name), "text": _string(f"plan({params})")}
        lines += _op("plan", attributes, "  ", [(plan.region.entry, _region(plan.region, "    "))])
    attributes = {"main": _string(schedule.main)}
    attributes |= {field.name: _int(getattr(schedule.machine, field.name)) for field in fields(Machine)}
    attributes |= {name: _int(getattr(schedule, name)) for name in _FIGURES}
    steps = (line for step in schedule.steps for line in _record(step, "    "))
    return "\n".join([*lines, *_op("schedule", attributes, "  ", [(None, steps)]), "}", ""])


def from_mlir(text: str) -> tuple[Schedule, Origin]:
    """Read what `to_mlir` wrote, whoever printed it since; the plans in it are read from its `source` alone.

    Raises PlanError `bad-schedule` for anything else, saying what, and `no-mlir` without torch-mlir.
    """
    ir = bindings("ir")
    context = ir.Context()
    with context, ir.Location.unknown():
        bindings("dialects.irdl").load_dialects(ir.Module.parse(dialect_text()))
        try:
            module = ir.Module.parse(text)
        except ir.MLIRError as error:
            raise bad_schedule(f"it is no MLIR: {error}") from None
        found = {name: [op for op in module.body if op.operation.name == f"anabranch.{name}"] for name in _TOP}
        for name, ops in found.items():
            if len(ops) != 1:
                raise bad_schedule(f"it has {len(ops)} operations `anabranch.{name}`, and must have one")
        [source], [schedule] = (found[name] for name in _TOP)
        document: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "kind": "static",
            "machine": {field.name: _number(schedule, field.name) for field in fields(Machine)},
            "run": {
                "text": _text(source, "text"),
                "plan": _text(source, "plan"),
                "inputs": _inputs(source),
                "functions": [_decoded(item) for item in source.attributes["functions"]],
            },
            "main": _text(schedule, "main"),
            **{name: _number(schedule, name) for name in _FIGURES},
            "steps": [[op.name.removeprefix("anabranch."), *_listed(op)] for op in _inside(schedule, 0)],
        }
    return from_document(document)


def _operation(
    name: str, attributes: dict[str, str], takes_context: Iterable[bool] = (), *, is_node: bool = False
) -> Iterator[str]:
    """An operation's definition. takes_context: for each region, whether its block has a context as argument."""
    yield f"  irdl.operation @{name} {{"
    listed = list(takes_context)
    if is_node or any(listed):
        yield "    %context = irdl.base @anabranch::@context"
    # A constraint that two attributes shared would hold them to one value.
    for place, base in enumerate(attributes.values()):
        what = "@anabranch::@ref" if base == "ref" else f'"{base}"'
        yield f"    %a{place} = irdl.base {what}"
    for place, has_context in enumerate(listed):
        yield f"    %r{place} = irdl.region({'%context' if has_context else ''}) with size 1"
    if is_node:
        yield "    irdl.operands(before: %context)"
        yield "    irdl.results(after: %context)"
    if attributes:
        pairs = ", ".join(f'"{key}" = %a{place}' for place, key in enumerate(attributes))
        yield f"    irdl.attributes {{{pairs}}}"
    if listed:
        yield f"    irdl.regions({', '.join(f'region{place}: %r{place}' for place in range(len(listed)))})"
    yield "  }"


def _records() -> tuple[type, ...]:
    return (*get_args(Step), Part, Moved)


@cache
def _kinds(record: Any) -> dict[str, Kind]:
    return {name: _kind(hint) for name, hint in get_type_hints(record).items()}


def _kind(hint: Any) -> Kind:
    if hint is int:
        return "int"
    if hint is bool:
        return "bool"
    if hint == Runs:
        return "runs"
    if hint == Ref:
        return "ref"
    item = get_args(hint)[0]
    if item == Ref:
        return "refs"
    return "sequences" if get_origin(item) is tuple else "records"


def _name(record: type) -> str:
    return record.__name__.lower()


def _record(record: Any, indent: str) -> Iterator[str]:
    """A record of the schedule as an operation."""
    attributes: dict[str, str] = {}
    inner: list[tuple[None, Iterable[str]]] = []
    for name, kind in _kinds(record.__class__).items():
        value = getattr(record, name)
        match kind:
            case "records":
                inner.append((None, _all(value, indent + "  ")))
            case "sequences":
                inner.append((None, _sequences(value, indent + "  ")))
            case _:
                attributes[name] = _attribute(kind, value)
    yield from _op(_name(record.__class__), attributes, indent, inner)


def _all(records: Iterable[Any], indent: str) -> Iterator[str]:
    for record in records:
        yield from _record(record, indent)


def _sequences(sequences: Iterable[Iterable[Any]], indent: str) -> Iterator[str]:
    for records in sequences:
        yield from _op("sequence", {}, indent, [(None, _all(records, indent + "  "))])


def _attribute(kind: Kind, value: Any) -> str:
    match kind:
        case "bool":
            return "true" if value else "false"
        case "runs":
            return f"array<i64{': ' if value else ''}{', '.join(str(number) for run in value for number in run)}>"
        case "ref":
            return f"#anabranch.ref<@{value[0]}, {value[1]} : i64>"
        case "refs":
            return f"[{', '.join(_attribute('ref', ref) for ref in value)}]"
        case _:
            return _int(value)


def _region(region: Region, indent: str) -> Iterator[str]:
    """A region of a plan, an operation for each node."""
    for node in region.nodes:
        yield from _node(node, indent)


def _node(node: Node, indent: str) -> Iterator[str]:
    name = type(node).__name__.lower()
    line = node_line(node)
    match node:
        case Let() | Need() | Return():
            yield from _op(name, {"text": _string(line.removeprefix(f"{name} "))}, indent)
            return
        case Fork(arms=arms):
            inner: list[tuple[int | None, Iterable[str]]] = [
                (None, (line for arm in arms for line in _arm(arm, indent + "  ")))
            ]
        case Cond(then=then, orelse=None):
            # Without an else the context goes on as it is, which is what an empty region says.
            inner = [(then.entry, _region(then, indent + "  ")), (node.dst, ())]
        case Map() | Reduce() | Loop() | Cond():
            inner = [(inside.entry, _region(inside, indent + "  ")) for inside in regions(node)]
        case _:
            inner = []
    said = line.removeprefix(f"%{node.dst} = {name} %{node.src}").strip()
    if isinstance(node, Decode):
        name = "gen"
    attributes = {"context": _int(node.dst), "text": _string(said)}
    yield from _op(name, attributes, indent, inner, contexts=(node.src, node.dst))


def _arm(arm: Arm, indent: str) -> Iterator[str]:
    words = [arm.label or "", f"x{arm.multiplicity}", "" if arm.prompt is None else expr_text(arm.prompt)]
    attributes = {"text": _string(" ".join(word for word in words if word))}
    yield from _op("arm", attributes, indent, [(arm.region.entry, _region(arm.region, indent + "  "))])


def _op(
    name: str,
    attributes: dict[str, str],
    indent: str,
    inner: Iterable[tuple[int | None, Iterable[str]]] = (),
    *,
    contexts: tuple[int, int] | None = None,
) -> Iterator[str]:
    """An operation in MLIR's generic form. inner: its regions, each the context its block takes and its lines.

    contexts: what a node takes and makes
    """
    head = f'{indent}"anabranch.{name}"('
    kind = "() -> ()"
    if contexts is not None:
        head = f'{indent}%c{contexts[1]} = "anabranch.{name}"(%c{contexts[0]}'
        kind = "(!anabranch.context) -> !anabranch.context"
    listed = list(inner)
    tail = f" {{{', '.join(f'{key} = {value}' for key, value in attributes.items())}}}" if attributes else ""
    if not listed:
        yield f"{head}){tail} : {kind}"
        return
    opening = f"{head}) ("
    for context, lines in listed:
        yield opening + "{"
        if context is not None:
            yield f"{indent}^bb0(%c{context}: !anabranch.context):"
        yield from lines
        yield f'{indent}  "{END}"() : () -> ()'
        opening = f"{indent}}}, "
    yield f"{indent}}}){tail} : {kind}"


def _source(origin: Origin) -> dict[str, str]:
    return {
        "plan": _string(origin.plan),
        "text": _string(origin.text),
        "inputs": _string(json.dumps(dict(origin.inputs), ensure_ascii=True)),
        "functions": f"[{', '.join(map(_string, origin.functions))}]",
    }


def _int(value: int) -> str:
    return f"{value} : i64"


def _string(text: str) -> str:
    """A string attribute: printable ASCII as it is, any other byte of UTF-8 by two hexadecimal digits."""
    data = text.encode("utf-8", "surrogatepass")
    return '"' + "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\{b:02X}" for b in data) + '"'


def _listed(op: Any) -> list[Any]:
    """An operation's fields, as the JSON of schedules has them."""
    record = _by_name().get(op.name.removeprefix("anabranch."))
    if record is None:
        raise bad_schedule(f"`{op.name}` is no step")
    values: list[Any] = []
    region = 0
    for name, kind in _kinds(record).items():
        match kind:
            case "records":
                values.append(_inner(op, region, record, name))
                region += 1
            case "sequences":
                values.append([_inner(inside, 0, record, name) for inside in _inside(op, region)])
                region += 1
            case _:
                values.append(_value(kind, op.attributes[name], f"{op.name}.{name}"))
    return values


def _inner(op: Any, region: int, record: type, name: str) -> list[Any]:
    """The records of a region: steps begin with their name, since they are of several kinds."""
    hint = get_type_hints(record)[name]
    while get_origin(hint) is tuple:
        hint = get_args(hint)[0]
    is_step = hint == Step
    found = []
    for inside in _inside(op, region):
        name = inside.name.removeprefix("anabranch.")
        if not is_step and name != _name(hint):
            raise bad_schedule(f"`{inside.name}` stands where a `{_name(hint)}` must")
        found.append([name, *_listed(inside)] if is_step else _listed(inside))
    return found


@cache
def _by_name() -> dict[str, type]:
    return {_name(record): record for record in _records()}


def _inside(op: Any, region: int) -> Iterator[Any]:
    """The operations of a region, but for the one that ends it."""
    for inside in op.regions[region].blocks[0]:
        if inside.operation.name != END:
            yield inside.operation


def _value(kind: Kind, attribute: Any, where: str) -> Any:
    ir = bindings("ir")
    match kind:
        case "runs":
            if not isinstance(attribute, ir.DenseI64ArrayAttr) or len(attribute) % 2:
                raise bad_schedule(f"`{where}` must be an array of pairs of i64")
            numbers = list(attribute)
            return [numbers[place : place + 2] for place in range(0, len(numbers), 2)]
        case "ref":
            named = _REF.fullmatch(str(attribute))
            if named is None:
                raise bad_schedule(f"`{where}` must be `#anabranch.ref<@plan, context : i64>`, not `{attribute}`")
            return [named[1], int(named[2])]
        case "refs":
            return [_value("ref", item, where) for item in attribute]
        case _:
            # The JSON's own reader tells numbers from truth values.
            return attribute.value


def _number(op: Any, name: str) -> Any:
    return _value("int", op.attributes[name], f"{op.name}.{name}")


def _text(op: Any, name: str) -> str:
    return _decoded(op.attributes[name])


def _decoded(attribute: Any) -> str:
    try:
        return bytes(attribute.value_bytes).decode("utf-8", "surrogatepass")
    except (AttributeError, UnicodeDecodeError):
        raise bad_schedule(f"`{attribute}` is no text") from None


def _inputs(source: Any) -> Any:
    try:
        return json.loads(_text(source, "inputs"))
    except (ValueError, RecursionError) as error:
        raise bad_schedule(f"`source.inputs` is no JSON: {error}") from None
