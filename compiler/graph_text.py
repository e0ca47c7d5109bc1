"""The graph as text for a person, one line a node: `%3 = decode %2 "Answer: " max=12 int  # ans`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import assert_never

from anabranch.compiler.graph import (
    Arm,
    Call,
    Cond,
    Decode,
    Expand,
    Fork,
    Graph,
    Let,
    Loop,
    Map,
    Need,
    Node,
    PlanGraph,
    Reduce,
    Region,
    Return,
    Write,
)
from anabranch.dsl import ast, options
from anabranch.dsl.spec import GenSpec, JoinSpec, Limits

LONGEST = 72  # characters of a string that are shown; a graph is read for its shape


def graph_text(graph: Graph) -> str:
    """Every plan of the graph, the main one first."""
    names = [graph.main, *(name for name in graph.plans if name != graph.main)]
    return "\n".join(line for name in names for line in plan_lines(graph.plans[name]))


def plan_lines(plan: PlanGraph) -> Iterator[str]:
    """A plan's lines."""
    params = ", ".join(
        name if bound is None else f"{name}: {expr_text(bound)}"
        for name, bound in zip(plan.params, plan.bounds or [None] * len(plan.params), strict=True)
    )
    options_text = _words(("depth", plan.depth or None), *_limits(plan.limits))
    yield f"{plan.name} = plan({params}) {options_text}".rstrip() + f" region(%{plan.region.entry}) {{"
    yield from _region_lines(plan.region, "  ")
    yield "}"


def node_line(node: Node) -> str:
    """A node's own line, without the regions inside it."""
    match node:
        case Write():
            held = " hold-space" if node.hold_space else ""
            return f"%{node.dst} = write %{node.src} {node.role} {expr_text(node.value)}{held}"
        case Decode():
            prompt = "" if node.prompt is None else " " + expr_text(node.prompt)
            return f"%{node.dst} = decode %{node.src}{prompt} {_gen(node.spec)}{_bound(node.name)}"
        case Fork():
            width = "" if node.width is None else f" width={expr_text(node.width)}"
            index = "" if node.index is None else f" index={node.index}"
            return f"%{node.dst} = fork %{node.src}{width}{index}{_tail(node.join, node.limits)}{_bound(node.name)}"
        case Map():
            item = node.item if node.index is None else f"{node.index}, {node.item}"
            over = f"{item}: {expr_text(node.over)} most={node.most}"
            return f"%{node.dst} = map %{node.src} {over}{_tail(node.join, node.limits)}{_bound(node.name)}"
        case Reduce():
            over = f"{node.item}: {expr_text(node.over)} most={node.most} by={node.by}"
            return f"%{node.dst} = reduce %{node.src} {over}{_spaced(_words(*_limits(node.limits)))}{_bound(node.name)}"
        case Loop():
            until = "" if node.until is None else f" until {expr_text(node.until)}"
            carried = f" carries {', '.join(node.carried)}" if node.carried else ""
            return f"%{node.dst} = loop %{node.src} rounds={node.rounds}{until}{carried}"
        case Cond():
            return f"%{node.dst} = cond %{node.src} {expr_text(node.cond)}"
        case Call():
            args = ", ".join(f"{name}={expr_text(value)}" for name, value in node.args)
            return (
                f"%{node.dst} = call %{node.src} {node.plan}({args})"
                f"{_spaced(_words(*_limits(node.limits)))}{_bound(node.name)}"
            )
        case Expand():
            prompt = "" if node.prompt is None else " " + expr_text(node.prompt)
            return f"%{node.dst} = expand %{node.src}{prompt}{_bound(node.name)}"
        case Let():
            return f"let {node.name} = {expr_text(node.value)}"
        case Need():
            return f"need {expr_text(node.cond)}"
        case Return():
            return f"return {expr_text(node.value)}"
        case _:
            assert_never(node)


def expr_text(expr: ast.Expr) -> str:
    """An expression on one line, long strings shortened."""
    match expr:
        case ast.Name(id=name):
            return name
        case ast.Int(value=value) | ast.Float(value=value):
            return repr(value)
        case ast.Bool(value=value):
            return "true" if value else "false"
        case ast.Str(parts=parts):
            text = "".join(
                part.replace("#{", "##{") if isinstance(part, str) else f"#{{{expr_text(part)}}}" for part in parts
            )
            return json.dumps(text if len(text) <= LONGEST else text[: LONGEST - 3] + "...", ensure_ascii=False)
        case ast.List(items=items):
            return f"[{', '.join(map(expr_text, items))}]"
        case ast.Unary(op=op, operand=operand):
            return f"{op}{expr_text(operand)}"
        case ast.Binary(op=op, left=left, right=right):
            return f"({expr_text(left)} {op} {expr_text(right)})"
        case ast.Field(value=value, name=name):
            return f"{expr_text(value)}.{name}"
        case ast.Index(value=value, index=index):
            return f"{expr_text(value)}[{expr_text(index)}]"
        case ast.Apply(function=function, args=args):
            shown = (expr_text(arg.value) if arg.name is None else f"{arg.name}={expr_text(arg.value)}" for arg in args)
            return f"{function}({', '.join(shown)})"
        case _:
            assert_never(expr)


def _region_lines(region: Region, indent: str) -> Iterator[str]:
    for node in region.nodes:
        match node:
            case Fork(arms=arms):
                yield f"{indent}{node_line(node)} {{"
                for arm in arms:
                    yield f"{indent}  {_arm(arm)} {{"
                    yield from _region_lines(arm.region, indent + "    ")
                    yield f"{indent}  }}"
                yield f"{indent}}}"
            case Map(region=inner) | Reduce(region=inner) | Loop(region=inner):
                yield f"{indent}{node_line(node)} region(%{inner.entry}) {{"
                yield from _region_lines(inner, indent + "  ")
                yield f"{indent}}}"
            case Cond(then=then, orelse=orelse):
                yield f"{indent}{node_line(node)} then(%{then.entry}) {{"
                yield from _region_lines(then, indent + "  ")
                if orelse is not None:
                    yield f"{indent}}} else(%{orelse.entry}) {{"
                    yield from _region_lines(orelse, indent + "  ")
                yield f"{indent}}}"
            case _:
                yield f"{indent}{node_line(node)}"


def _arm(arm: Arm) -> str:
    label = "" if arm.label is None else f" {arm.label}"
    prompt = "" if arm.prompt is None else " " + expr_text(arm.prompt)
    held = " hold-space" if arm.hold_space else ""
    times = f" x{arm.multiplicity}" if arm.multiplicity != 1 else ""
    return f"arm{label}{times}{prompt}{held}{_spaced(_words(*_limits(arm.limits)))} region(%{arm.region.entry})"


def _gen(spec: GenSpec) -> str:
    sampling = ((name, expr_text(value)) for name, value in spec.sampling.items())
    recorded = None if spec.recorded is None else expr_text(spec.recorded)
    words = _words(
        ("max", spec.max_tokens),
        *sampling,
        ("stop", json.dumps(list(spec.stop), ensure_ascii=False) if spec.stop else None),
        ("seed", None if spec.seed is None else expr_text(spec.seed)),
        ("logprobs", spec.logprobs or None),
        ("recorded", recorded),
    )
    return f"{words} {options.show_type(spec.type)}"


def _tail(join: JoinSpec, limits: Limits) -> str:
    args = ", ".join(str(arg) for arg in (join.count, join.key) if arg is not None)
    by = f" by={join.by}" if join.by != "exact" else ""
    value = f"{join.kind}({args})" if args else join.kind
    context = "stitch(sum)" if join.context == "stitch" and join.positions == "sum" else join.context
    return f" join={value},{context}{by}{_spaced(_words(*_limits(limits)))}"


def _limits(limits: Limits) -> Iterable[tuple[str, object]]:
    return (
        ("limit", limits.limit),
        ("upto", limits.upto),
        ("budget", limits.budget),
        ("deadline_s", limits.deadline_s),
        ("fallback", None if limits.fallback is None else expr_text(limits.fallback)),
        ("fresh", "true" if limits.fresh else None),
        ("retry", limits.retry or None),
    )


def _words(*pairs: tuple[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in pairs if value is not None)


def _spaced(words: str) -> str:
    return f" {words}" if words else ""


def _bound(name: str | None) -> str:
    return "" if name is None else f"  # {name}"
