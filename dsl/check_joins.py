"""Joins: which value comes out of a fork, and whether its context can become what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.dsl import types
from anabranch.dsl.ast import Block, Expand, Gen, If, Join, Loop, Option
from anabranch.dsl.check_flow import stitches_several
from anabranch.dsl.check_keys import key_paths, show_gen
from anabranch.dsl.check_report import Report
from anabranch.dsl.diagnostics import NOWHERE, PlanError, Span
from anabranch.dsl.options import read_type
from anabranch.dsl.scope import Scope
from anabranch.dsl.spec import ChoiceType, JoinSpec
from anabranch.dsl.target import Target
from anabranch.dsl.types import ANY, ListOf, Record, Text, Type, show


@dataclass(slots=True)
class Arm:
    """A branch that was walked.

    scope: what it bound
    value: the type of what it yields
    given: what was bound for it, such as the item of a map
    span: what to show of it
    """

    body: Block
    scope: Scope
    value: Type
    given: frozenset[str]
    label: str | None
    span: Span
    fresh: bool


class JoinChecker:
    """Checks how forks and maps end."""

    def __init__(self, report: Report, target: Target) -> None:
        self._report = report
        self._target = target

    def value(self, what: str, join: Join | None, spec: JoinSpec, arms: Sequence[Arm], width: int, head: Span) -> Type:
        """The type of what comes out of the join of a `what`, of at most `width` branches. `head`: its first line."""
        span = head if join is None else join.span if join.value is None else join.value.span
        if spec.count is not None and spec.count > width > 0:
            shown = f"all(min={spec.count})" if spec.kind == "all" else f"{spec.kind}({spec.count})"
            self._report.error(
                "count-above-width",
                f"`{shown}` needs {spec.count} branches, and the {what} has at most {width}",
                span,
                help=f"ask for {width} or fewer",
            )
        if spec.context == "stitch":
            self._stitch(join, arms, width)
        return self._value(spec, join, arms, width, span)

    def _stitch(self, join: Join | None, arms: Sequence[Arm], width: int) -> None:
        context = join.context.span if join is not None and join.context is not None else NOWHERE
        fresh = next((arm for arm in arms if arm.fresh), None)
        if fresh is not None:
            self._report.error(
                "stitch-fresh",
                "a fresh branch cannot be stitched: it was written without the parent's context",
                context,
                help="join with `text`, or leave `fresh=true` out",
            )
        if not self._target.stitch_many and stitches_several(join, width):
            self._report.error(
                "stitch-many",
                f"`{self._target.name}` cannot stitch several branches into one context",
                context,
                help="join with `text`, or stitch a single winner: `first(1)`, `vote(x)`, `best(x)`",
            )

    def _value(self, spec: JoinSpec, join: Join | None, arms: Sequence[Arm], width: int, span: Span) -> Type:
        """The type of what comes out of the join."""
        if not arms:
            return ANY
        if spec.kind == "all":
            if arms[0].label is not None:
                return Record(tuple((arm.label or "", arm.value) for arm in arms))
            return ListOf(_merged(arms), width)
        if spec.kind in ("vote", "quorum"):
            key_type = self._key(spec, arms, span)
            if (
                isinstance(key_type, Text)
                and key_type.free
                and (join is None or join.value is None or join.value.by is None)
            ):
                self._report.warn(
                    "vote-on-text",
                    f"`{spec.kind}` on free text: two answers that mean the same are seldom equal",
                    span,
                    help=f"compare with `by=casefold` or `by=number`, or give `{spec.key}` a type such as `int`",
                )
            return key_type
        if spec.kind == "best" and spec.key != "logprob":
            key_type = self._key(spec, arms, span)
            if not types.is_number(key_type):
                self._report.error(
                    "best-key",
                    f"`best({spec.key})` compares numbers, and `{spec.key}` is {show(key_type)}",
                    span,
                    help="bind it with `gen(type=int)` or `gen(type=float)`, or use `best(logprob)`",
                )
        if spec.kind == "best" and spec.key == "logprob" and not any(_can_draw(arm.body) for arm in arms):
            self._report.warn(
                "best-without-draw",
                "`best(logprob)` compares tokens that a branch samples itself, and no branch samples any",
                span,
                help="write a `gen` in the branch that is sampled, or `best(x)` with a number `x`",
            )
        first = arms[0].value
        for arm in arms[1:]:
            if not types.comparable(first, arm.value):
                self._report.error(
                    "branch-types",
                    f"`{spec.kind}` picks among branches that return different types",
                    arm.span,
                    note=f"returns {show(arm.value)}, the first branch {show(first)}",
                    help="return one type from every branch",
                )
                return ANY
        value = _merged(arms)
        return ListOf(value, spec.count) if spec.kind == "first" and spec.count != 1 else value

    def _key(self, spec: JoinSpec, arms: Sequence[Arm], span: Span) -> Type:
        """The type of the join's key, which every branch must bind on every path."""
        key = spec.key or ""
        shown = f"quorum({spec.count}, {key})" if spec.kind == "quorum" else f"{spec.kind}({key})"
        found: Type | None = None
        paths = [key_paths(arm.body, key) for arm in arms]
        example = next((path.gen for path in paths if path.gen is not None), None)
        for arm, path in zip(arms, paths, strict=True):
            if key not in arm.given and not path.always:
                one_body = len(arms) == 1 and arm.label is None
                self._report.error(
                    "unbound-key",
                    f"`{shown}` needs `{key}` in every branch",
                    span if one_body else arm.span,
                    note=("the branch " if one_body else "")
                    + (f"does not bind `{key}` on every path" if path.sometimes else f"never binds `{key}`"),
                    help=f"bind `{key}` in every arm, and before every `return`"
                    if path.sometimes
                    else f"add `{show_gen(key, example)}`",
                )
                continue
            binding = arm.scope.names.get(key)
            t = ANY if binding is None else binding.type
            if binding is not None:
                binding.use()
            if found is None:
                found = t
            elif spec.by == "number" or types.comparable(found, t):
                found = types.merge(found, t)
            else:
                self._report.error(
                    "key-type",
                    f"`{shown}` compares values of different types",
                    arm.span,
                    note=f"binds `{key}` to {show(t)}, another branch to {show(found)}",
                    help=f"give `{key}` one type in every branch",
                )
                return ANY
        return ANY if found is None else found


def _can_draw(block: Block) -> bool:
    """Whether a branch with this body may sample tokens itself: those of forks and calls in it are not its own."""
    for stmt in block.stmts:
        match stmt:
            case Gen(options=options):
                written = {option.name: option for option in options}
                if "recorded" not in written and not ("type" in written and _is_scored(written["type"])):
                    return True
            case Loop(body=body):
                if _can_draw(body):
                    return True
            case If(then=then, orelse=orelse):
                if _can_draw(then) or (orelse is not None and _can_draw(orelse)):
                    return True
            case Expand():
                return True
            case _:
                pass
    return False


def _is_scored(option: Option) -> bool:
    """Whether `type=` is a choice whose options are scored; a type that is wrong is reported at its gen."""
    try:
        kind = read_type(option.value)
    except PlanError:
        return False
    return isinstance(kind, ChoiceType) and kind.by == "logprob"


def _merged(arms: Sequence[Arm]) -> Type:
    value = arms[0].value
    for arm in arms[1:]:
        value = types.merge(value, arm.value)
    return value
