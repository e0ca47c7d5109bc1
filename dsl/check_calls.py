"""Calls of plans: arguments and budgets."""

from __future__ import annotations

from collections.abc import Sequence

from anabranch.dsl import types
from anabranch.dsl.ast import Arg, Call, PlanDef
from anabranch.dsl.check_report import Report, quiet
from anabranch.dsl.diagnostics import Span, did_you_mean
from anabranch.dsl.options import limits
from anabranch.dsl.types import ANY, Type, show


def check_budget(report: Report, callee: PlanDef, around: int | None, span: Span) -> None:
    """Refuse a call of a plan whose budget is above the one `around` the call."""
    inner = quiet(lambda: limits(callee.options, kind="plan").budget, None)
    if around is not None and inner is not None and inner > around:
        report.error(
            "budget-above-parent",
            f"the plan `{callee.name}` has a budget of {inner}, and is called inside one of {around}",
            span,
            help=f"at most {around} can be spent here",
        )


def check_arguments(report: Report, call: Call, callee: PlanDef, arg_types: Sequence[Type], span: Span) -> None:
    """Check the arguments of `call`, whose types are `arg_types`, against the parameters of `callee`."""
    names = [param.name for param in callee.params]
    wanted = {
        param.name: quiet(lambda: types.of_bound(param.bound), ANY)  # noqa: B023 - called at once
        for param in callee.params
    }
    places = iter(names)
    given: set[str] = set()
    for arg, t in zip(call.args, arg_types, strict=True):
        name = arg.name if arg.name is not None else next(places, None)
        if name is None or name not in wanted:
            _stray_argument(report, callee, arg, name, names)
            continue
        if name in given:
            report.error("bad-call", f"`{name}` is given twice", arg.span)
        given.add(name)
        if not types.fits(t, wanted[name]):
            report.error(
                "argument-type",
                f"`{name}` of `{callee.name}` is {show(wanted[name])}, not {show(t)}",
                arg.value.span,
            )
    missing = [name for name in names if name not in given]
    if missing:
        listed = ", ".join(f"`{name}`" for name in missing)
        report.error(
            "bad-call",
            f"`{callee.name}` is called without {listed}",
            span,
            help=f"write `{callee.name}({', '.join(names)})`",
        )


def _stray_argument(report: Report, callee: PlanDef, arg: Arg, name: str | None, names: Sequence[str]) -> None:
    if name is None:
        message = f"`{callee.name}` takes {len(names)} argument{'s' if len(names) != 1 else ''}"
        report.error("bad-call", message, arg.span, help=f"write `{callee.name}({', '.join(names)})`")
    else:
        near = did_you_mean(name, names)
        report.error("bad-call", f"`{callee.name}` has no parameter `{name}`", arg.span, help=near)
