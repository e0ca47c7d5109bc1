"""Binding names: what a new one may clash with."""

from __future__ import annotations

from anabranch.dsl.check_report import Report
from anabranch.dsl.diagnostics import Span
from anabranch.dsl.scope import RESERVED, Binding, Scope
from anabranch.dsl.types import AnyType, ListOf, Type, bounded, show


def define(report: Report, name: str, t: Type, span: Span, scope: Scope) -> Binding:
    """Bind `name` in `scope`; what that clashes with goes to `report`, and the name is bound all the same."""
    binding = Binding(name, bounded(t), span)
    if name in RESERVED:
        report.error("reserved-word", f"`{name}` is a word of the language and names nothing else", span)
        scope.names[name] = binding
        return binding
    match scope.clash(name):
        case None:
            pass
        case "twice", before:
            report.error(
                "bound-twice",
                f"`{name}` is already bound",
                span,
                note=_first(report, before),
                help="a name is bound once; only the body of a `loop` may bind a name of its surroundings again",
            )
        case "shadow", before:
            report.error(
                "shadowed-name",
                f"`{name}` is already bound outside this branch",
                span,
                note=_first(report, before),
                help="a branch cannot change a name of its parent; use another name",
            )
        case _, before:
            _rebind(report, before, binding, span)
    scope.names[name] = binding
    return binding


def _rebind(report: Report, before: Binding, binding: Binding, span: Span) -> None:
    binding.used = True  # the next round, and what follows the loop, may read it
    old, new = before.type, binding.type
    if old != new and not (isinstance(old, AnyType) or isinstance(new, AnyType)):
        report.error(
            "rebound-type",
            f"a loop may bind `{binding.name}` again with the same type: it was {show(old)}, and is {show(new)}",
            span,
            note=_first(report, before),
        )
    elif (
        isinstance(old, ListOf)
        and isinstance(new, ListOf)
        and old.most is not None
        and (new.most is None or new.most > old.most)
    ):
        # What an earlier statement of the body was told of the list must hold in every round.
        most = "any number of" if new.most is None else f"up to {new.most}"
        report.error(
            "rebound-type",
            f"`{binding.name}` holds at most {old.most} items before the loop and {most} in it",
            span,
            note=_first(report, before),
            help="give it the same bound at both places",
        )


def _first(report: Report, binding: Binding) -> str:
    line = report.line(binding.span)
    return f"first bound{line}" if line else ""
