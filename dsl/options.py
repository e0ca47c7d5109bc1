"""Options as written, read into the records of `spec`.

Every reader is pure and raises `PlanError`; one that reads several options collects what is wrong with each
of them first, so that a statement with three mistakes is told of all three.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from anabranch.dsl.ast import (
    Apply,
    Arg,
    Binary,
    Bool,
    Expr,
    Float,
    Fork,
    Gen,
    Int,
    Join,
    JoinContext,
    List,
    Loop,
    Name,
    Option,
    PlanDef,
    Str,
    Unary,
)
from anabranch.dsl.diagnostics import Diagnostic, PlanError, Span, did_you_mean
from anabranch.dsl.patterns import check_regex, check_schema
from anabranch.dsl.spec import (
    SAMPLING,
    BoolType,
    ChoiceType,
    FloatType,
    GenSpec,
    GenType,
    IntType,
    JoinSpec,
    JsonType,
    Limits,
    LinesType,
    RegexType,
    TextType,
)

# Caps on what a plan may write. Each is far above use and far below what would overflow a counter of the layers
# below: token counts are held in int32 on the device, and a width is also a number of rows.
MAX_TOKENS = 2**31 - 1
MAX_WIDTH = 10**6
MAX_ROUNDS = 10**6
MAX_DEPTH = 100
MAX_RETRY = 100
MAX_LOGPROBS = 20
MAX_SEED = 2**64 - 1
MAX_STOPS = 64
MAX_DEADLINE_S = 10.0**7

_GEN = ("type", "max", "stop", *SAMPLING, "logprobs", "seed", "recorded")
_FORK = ("limit", "upto", "budget", "deadline", "fallback", "fresh", "retry")

TAKES: dict[str, tuple[str, ...]] = {
    "gen": _GEN,
    "fork": _FORK,
    "branches": tuple(name for name in _FORK if name != "upto"),
    "map": _FORK,
    "reduce": ("by", *_FORK),
    "branch": ("budget", "fresh", "retry"),
    "call": ("budget", "deadline", "fallback", "fresh", "retry"),
    "plan": ("max", *SAMPLING, "budget", "depth"),
    "expand": ("max", "depth", "budget", "show_plan"),
}
"""The options of each kind of statement; `branches` is a fork of named branches."""

_TYPES = ("text", "int", "float", "bool", "lines", "choice", "regex", "json")

T = TypeVar("T")


def gen_spec(gen: Gen, plan: PlanDef) -> GenSpec:
    """The options of `gen`; `max` and the sampling options are inherited from `plan` where unwritten.

    Raises PlanError: unknown-option, repeated-option, missing-max, not-constant, option-type, option-range,
    unknown-type, bad-choice, bad-lines, bad-regex, bad-schema, max-too-small, stop-on-type, bad-recorded.
    """
    found: list[Diagnostic] = []
    written = _written(gen.options, "gen", found)
    inherited = {o.name: o for o in plan.options if o.name == "max" or o.name in SAMPLING}

    gen_type: GenType = TextType()
    if "type" in written:
        gen_type = _read(found, lambda: read_type(written["type"].value), gen_type)

    max_tokens = 1
    limit = written.get("max") or inherited.get("max")
    if limit is None:
        found.append(
            Diagnostic(
                "missing-max",
                "this `gen` has no `max`",
                gen.span,
                "its length has no bound",
                "write `gen(max=200)`, or give the plan a `max` that its gens inherit",
            )
        )
    elif "max" in written or _is_valid(lambda: _int(limit, 1, MAX_TOKENS)):
        # A plan's own wrong `max` is told once, at the plan, and not again at each gen.
        before = len(found)
        max_tokens = _read(found, lambda: _int(limit, 1, MAX_TOKENS), 1)
        needs = least_tokens(gen_type)
        if len(found) == before and max_tokens < needs:
            found.append(
                Diagnostic(
                    "max-too-small",
                    f"`max={max_tokens}` is too short for `{show_type(gen_type)}`, which takes at least {needs} tokens",
                    limit.span,
                    help=f"write `max={needs}` or more",
                )
            )

    stop: tuple[str, ...] = ()
    if "stop" in written:
        option = written["stop"]
        stop = _read(found, lambda: _stop(option), ())
        if not isinstance(gen_type, TextType):
            found.append(
                Diagnostic(
                    "stop-on-type",
                    f"`stop` has no meaning for `{show_type(gen_type)}`, which ends when its value is complete",
                    option.span,
                    help="remove `stop`, or the type",
                )
            )

    sampling: dict[str, Expr] = {}
    for name in SAMPLING:
        if name in written:
            _read(found, lambda o=written[name]: check_sampling(o), None)  # type: ignore[misc]
            sampling[name] = written[name].value
        elif name in inherited:
            sampling[name] = inherited[name].value

    logprobs = 0
    if "logprobs" in written:
        logprobs = _read(found, lambda: _int(written["logprobs"], 0, MAX_LOGPROBS), 0)
    if "seed" in written and is_constant(written["seed"].value):
        _read(found, lambda: _int(written["seed"], 0, MAX_SEED), 0)
    if "recorded" in written:
        _read(found, lambda: _check_recorded(written["recorded"]), None)
    if found:
        raise PlanError(found)
    return GenSpec(
        type=gen_type,
        max_tokens=max_tokens,
        stop=stop,
        sampling=sampling,
        seed=written["seed"].value if "seed" in written else None,
        logprobs=logprobs,
        recorded=written["recorded"].value if "recorded" in written else None,
    )


def join_spec(join: Join | None) -> JoinSpec:
    """How a fork ends; what is not written is `all`, `drop`.

    Raises PlanError: not-constant, option-type, option-range.
    """
    if join is None:
        return JoinSpec()
    context = join.context or JoinContext("drop")
    if join.value is None:
        return JoinSpec(context=context.kind, positions=context.positions)
    value = join.value
    count = None
    if value.count is not None:
        what = "`min`" if value.kind == "all" else f"the count of `{value.kind}`"
        count = bounded_int(value.count, 1, MAX_WIDTH, what)
    return JoinSpec(
        kind=value.kind,
        count=count,
        key=value.key,
        by=value.by or "exact",
        context=context.kind,
        positions=context.positions,
    )


def limits(options: Sequence[Option], *, kind: str) -> Limits:
    """The options that bound a statement. `kind` is a key of `TAKES`, which says which options it takes at all.

    Raises PlanError: unknown-option, repeated-option, not-constant, option-type, option-range.
    """
    found: list[Diagnostic] = []
    written = _written(options, kind, found)

    def number(name: str, least: int, most: int) -> int | None:
        return _read(found, lambda: _int(written[name], least, most), None) if name in written else None

    limit = number("limit", 1, MAX_WIDTH)
    upto = number("upto", 1, MAX_WIDTH)
    budget = number("budget", 1, MAX_TOKENS)
    retry = number("retry", 0, MAX_RETRY) or 0
    deadline_s = None
    if "deadline" in written:
        deadline_s = _read(found, lambda: _seconds(written["deadline"]), None)
    fresh = False
    if "fresh" in written:
        fresh = _read(found, lambda: _bool(written["fresh"]), False)
    if kind == "plan":
        number("max", 1, MAX_TOKENS)
        number("depth", 1, MAX_DEPTH)
        for name in SAMPLING:
            if name in written:
                _read(found, lambda o=written[name]: check_sampling(o), None)  # type: ignore[misc]
    if kind == "reduce" and "by" in written:
        _read(found, lambda: reduce_by(options), 2)
    if found:
        raise PlanError(found)
    return Limits(
        limit=limit,
        upto=upto,
        budget=budget,
        deadline_s=deadline_s,
        fallback=written["fallback"].value if "fallback" in written else None,
        fresh=fresh,
        retry=retry,
    )


def reduce_by(options: Sequence[Option]) -> int:
    """How many items a `reduce` merges at a time: `by`, 2 where unwritten.

    Raises PlanError: reduce-by (fewer than 2 would never end), not-constant, option-type, option-range.
    """
    option = _last(options, "by")
    if option is None:
        return 2
    by = const_int(option.value)
    if by < 2:
        raise PlanError(
            Diagnostic(
                "reduce-by",
                f"`reduce` by {by} would never get down to one value",
                option.span,
                help="write `by=2` or more",
            )
        )
    return bounded_int(option.value, 2, MAX_WIDTH, "`by`")


def plan_depth(plan: PlanDef) -> int:
    """How deep a plan's calls of itself may nest: its `depth`, 0 where unwritten."""
    option = _last(plan.options, "depth")
    return 0 if option is None else _int(option, 1, MAX_DEPTH)


def loop_rounds(loop: Loop) -> int:
    """The most rounds of a loop, at least 1. Raises PlanError: not-constant, option-type, option-range."""
    return bounded_int(loop.count, 1, MAX_ROUNDS, "the number of rounds")


def fork_width(fork: Fork) -> int | None:
    """The width of a fork where it is a constant, else None: then only the run knows it, and `upto` bounds it."""
    return bounded_int(fork.width, 1, MAX_WIDTH, "the width of a fork") if is_constant(fork.width) else None


def const_int(expr: Expr) -> int:
    """The whole number that `expr` is: literals, signs and arithmetic of literals.

    Raises PlanError: not-constant, option-type, option-range.
    """
    return _whole(expr, "this")


def bounded_int(expr: Expr, least: int, most: int, what: str) -> int:
    """A constant whole number within [least, most]; `what` names it in the error."""
    value = _whole(expr, what)
    if value < least:
        raise PlanError(Diagnostic("option-range", f"{what} is at least {least}, not {_digits(value)}", expr.span))
    if value > most:
        raise PlanError(Diagnostic("option-range", f"{what} is at most {most}, not {_digits(value)}", expr.span))
    return value


def is_constant(expr: Expr) -> bool:
    """Whether `expr` is made of number and bool literals, signs and arithmetic alone."""
    stack = [expr]
    while stack:
        match stack.pop():
            case Int() | Float() | Bool():
                pass
            case Unary(operand=operand):
                stack.append(operand)
            case Binary(op=op, left=left, right=right) if op in ("+", "-", "*", "/"):
                stack.append(left)
                stack.append(right)
            case _:
                return False
    return True


def literal(expr: Expr) -> str | None:
    """The text of a string without interpolations; None for anything else."""
    if not isinstance(expr, Str):
        return None
    if any(not isinstance(part, str) for part in expr.parts):
        return None
    return "".join(part for part in expr.parts if isinstance(part, str))


def read_type(expr: Expr) -> GenType:
    """The value of `type=`. Raises PlanError: unknown-type, bad-choice, bad-lines, bad-regex, bad-schema, ..."""
    match expr:
        case Name(id=name):
            args: tuple[Arg, ...] | None = None
        case Apply(function=name, args=args):
            pass
        case _:
            text = literal(expr)
            hint = f"write `type={text}`, without quotes" if text in _TYPES else f"the types are {_names(_TYPES)}"
            raise PlanError(Diagnostic("unknown-type", "this is no type", expr.span, help=hint))
    if name not in _TYPES:
        raise PlanError(
            Diagnostic(
                "unknown-type",
                f"there is no type `{name}`",
                expr.span,
                help=did_you_mean(name, _TYPES) or f"the types are {_names(_TYPES)}",
            )
        )
    plain: dict[str, GenType] = {"text": TextType(), "int": IntType(), "float": FloatType(), "bool": BoolType()}
    if name in plain:
        if args is not None:
            raise PlanError(
                Diagnostic(
                    "bad-type",
                    f"the type `{name}` takes no arguments",
                    expr.span,
                    help=f"write `type={name}`; `max` bounds its length",
                )
            )
        return plain[name]
    if args is None:
        example = {
            "lines": "lines(1, 5)",
            "choice": 'choice("yes", "no")',
            "regex": 'regex("[0-9]+")',
            "json": 'json("{}")',
        }[name]
        raise PlanError(
            Diagnostic("bad-type", f"the type `{name}` takes arguments", expr.span, help=f"write `type={example}`")
        )
    readers: dict[str, Callable[[tuple[Arg, ...], Span], GenType]] = {
        "lines": _lines,
        "choice": _choice,
        "regex": _regex,
        "json": _json,
    }
    return readers[name](args, expr.span)


def show_type(gen_type: GenType) -> str:
    """The type as a person would write it, shortened."""
    match gen_type:
        case TextType():
            return "text"
        case IntType():
            return "int"
        case FloatType():
            return "float"
        case BoolType():
            return "bool"
        case LinesType(least=least, most=most):
            return f"lines({least}, {most})"
        case ChoiceType():
            return "choice(...)"
        case RegexType():
            return "regex(...)"
        case JsonType():
            return "json(...)"


def least_tokens(gen_type: GenType) -> int:
    """The fewest tokens that a value may take, as far as that is known without a tokenizer.

    One for any value; for `lines(a, _)` one for each line and one for each newline between them. The compiler
    asks the model's tokenizer for the exact figure.
    """
    return 2 * gen_type.least - 1 if isinstance(gen_type, LinesType) else 1


def check_sampling(option: Option) -> None:
    """Refuse a sampling option whose constant value is out of range; what is no constant is left to the run."""
    if isinstance(option.value, Str | List):
        raise PlanError(_wrong(option.value, f"`{option.name}`", "a number"))
    if not is_constant(option.value):
        return
    if option.name == "top_k":
        _int(option, 0, MAX_TOKENS)
        return
    value = _number(option.value, f"`{option.name}`")
    good, rule = {
        "temperature": (value >= 0, "is 0 or more"),
        "top_p": (0 < value <= 1, "is above 0 and at most 1"),
        "min_p": (0 <= value <= 1, "is from 0 to 1"),
        "repetition_penalty": (value > 0, "is above 0"),
        "presence_penalty": (True, ""),
    }[option.name]
    if not good:
        raise PlanError(Diagnostic("option-range", f"`{option.name}` {rule}, not {value:g}", option.span))


def parse_seconds(text: str) -> float | None:
    """Seconds of "20s", "500ms", "2m" or "1h"; None for any other text."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h)", text.strip())
    if found is None:
        return None
    return float(found[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}[found[2]]


# --- one option


def _written(options: Sequence[Option], kind: str, found: list[Diagnostic]) -> dict[str, Option]:
    """The options by name; those the statement does not take, and repeated ones, are told in `found`."""
    takes = TAKES[kind]
    shown = "fork" if kind == "branches" else kind
    by_name: dict[str, Option] = {}
    for option in options:
        if option.name not in takes:
            near = did_you_mean(option.name, takes)
            if option.name == "upto" and kind == "branches":
                near = "the width of named branches is known;"
            what = "a call of a plan" if shown == "call" else f"`{shown}`"
            found.append(
                Diagnostic(
                    "unknown-option",
                    f"{what} has no option `{option.name}`",
                    option.span,
                    help=f"{near + ' ' if near else ''}it takes {_names(takes)}",
                )
            )
        elif option.name in by_name:
            found.append(Diagnostic("repeated-option", f"`{option.name}` is written twice", option.span))
        else:
            by_name[option.name] = option
    return by_name


def _last(options: Sequence[Option], name: str) -> Option | None:
    return next((o for o in options if o.name == name), None)


def _read(found: list[Diagnostic], read: Callable[[], T], otherwise: T) -> T:
    try:
        return read()
    except PlanError as error:
        found.extend(error.diagnostics)
        return otherwise


def _is_valid(read: Callable[[], object]) -> bool:
    try:
        read()
    except PlanError:
        return False
    return True


def _int(option: Option, least: int, most: int) -> int:
    return bounded_int(option.value, least, most, f"`{option.name}`")


def _bool(option: Option) -> bool:
    if not isinstance(option.value, Bool):
        raise PlanError(_wrong(option.value, f"`{option.name}`", "`true` or `false`"))
    return option.value.value


def _seconds(option: Option) -> float:
    text = literal(option.value)
    if text is not None:
        seconds = parse_seconds(text)
        if seconds is None:
            raise PlanError(
                Diagnostic(
                    "option-type",
                    f"`deadline` cannot be read from {_quote(text)}",
                    option.span,
                    help='write seconds as `"20s"`, `"500ms"`, `"2m"` or as a plain number',
                )
            )
    else:
        seconds = _number(option.value, "`deadline`")
    if not 0 < seconds <= MAX_DEADLINE_S:
        raise PlanError(
            Diagnostic("option-range", f"`deadline` is above 0 and at most {MAX_DEADLINE_S:.0f} seconds", option.span)
        )
    return seconds


def _stop(option: Option) -> tuple[str, ...]:
    items = option.value.items if isinstance(option.value, List) else (option.value,)
    stops = []
    for item in items:
        text = literal(item)
        if text is None:
            raise PlanError(_wrong(item, "`stop`", "a string without interpolation, or a list of them"))
        if text == "":
            raise PlanError(Diagnostic("option-range", "an empty `stop` would end every `gen` at once", item.span))
        stops.append(text)
    if not stops or len(stops) > MAX_STOPS:
        raise PlanError(
            Diagnostic("option-range", f"`stop` takes 1 to {MAX_STOPS} strings, not {len(stops)}", option.span)
        )
    return tuple(dict.fromkeys(stops))


def _check_recorded(option: Option) -> None:
    match option.value:
        case Apply(function="ids", args=args):
            for arg in args:
                if arg.name is not None:
                    raise PlanError(
                        Diagnostic("bad-recorded", "`ids` takes token ids alone", arg.span, help="write `ids(1, 2, 3)`")
                    )
                bounded_int(arg.value, 0, MAX_TOKENS, "a token id")
        case Int() | Float() | Bool() as value:
            raise PlanError(
                Diagnostic(
                    "bad-recorded",
                    f"`recorded` is not {_kind(value)}",
                    option.span,
                    help="write a string, a list of strings, or `ids(1, 2, 3)`",
                )
            )
        case _:
            pass


# --- types


def _positional(args: tuple[Arg, ...], name: str) -> list[Expr]:
    for arg in args:
        if arg.name is not None:
            raise PlanError(Diagnostic("bad-type", f"the type `{name}` has no option `{arg.name}`", arg.span))
    return [arg.value for arg in args]


def _one_literal(args: tuple[Arg, ...], name: str, span: Span, example: str) -> str:
    values = _positional(args, name)
    text = literal(values[0]) if len(values) == 1 else None
    if text is None:
        raise PlanError(
            Diagnostic(
                "bad-type",
                f"the type `{name}` takes one string without interpolation",
                span,
                help=f"write `type={example}`",
            )
        )
    return text


def _lines(args: tuple[Arg, ...], span: Span) -> LinesType:
    values = _positional(args, "lines")
    if len(values) != 2:
        raise PlanError(
            Diagnostic("bad-lines", "`lines` takes the fewest and the most lines", span, help="write `lines(1, 5)`")
        )
    least = bounded_int(values[0], 1, MAX_WIDTH, "the fewest lines")
    most = bounded_int(values[1], 1, MAX_WIDTH, "the most lines")
    if most < least:
        raise PlanError(
            Diagnostic(
                "bad-lines",
                f"`lines({least}, {most})` is at most {most} lines but at least {least}",
                span,
                help=f"write `lines({most}, {least})`",
            )
        )
    return LinesType(least, most)


def _choice(args: tuple[Arg, ...], span: Span) -> ChoiceType:
    found: list[Diagnostic] = []
    options: dict[str, None] = {}
    by: str | None = None
    for arg in args:
        text = literal(arg.value)
        if arg.name == "by":
            by = text
            if by not in ("sample", "logprob"):
                found.append(
                    Diagnostic(
                        "bad-choice",
                        '`by` of a choice is `"sample"` or `"logprob"`',
                        arg.span,
                        help='write `by="logprob"` to score the options instead of sampling',
                    )
                )
        elif arg.name is not None:
            found.append(
                Diagnostic(
                    "bad-choice",
                    f"`choice` has no option `{arg.name}`",
                    arg.span,
                    help=did_you_mean(arg.name, ["by"]) or "it takes strings and `by`",
                )
            )
        elif text is None:
            found.append(
                Diagnostic("bad-choice", "an option of a choice is a string without interpolation", arg.value.span)
            )
        elif text == "":
            found.append(Diagnostic("bad-choice", "an option of a choice is empty", arg.value.span))
        elif text in options:
            found.append(Diagnostic("bad-choice", f"the option {_quote(text)} is repeated", arg.value.span))
        else:
            options[text] = None
    if not options and not found:
        found.append(Diagnostic("bad-choice", "`choice` has no options", span, help='write `choice("yes", "no")`'))
    if found:
        raise PlanError(found)
    return ChoiceType(tuple(options), "logprob" if by == "logprob" else "sample")


def _regex(args: tuple[Arg, ...], span: Span) -> RegexType:
    pattern = _one_literal(args, "regex", span, 'regex("[0-9]+")')
    reason = check_regex(pattern)
    if reason:
        raise PlanError(
            Diagnostic(
                "bad-regex",
                f"the pattern cannot be used: {reason}",
                args[0].value.span,
                help="patterns are Rust's: no look-around, no back-references, no `\\b`",
            )
        )
    return RegexType(pattern)


def _json(args: tuple[Arg, ...], span: Span) -> JsonType:
    schema = _one_literal(args, "json", span, 'json(\'{"type": "object"}\')')
    reason = check_schema(schema)
    if reason:
        raise PlanError(Diagnostic("bad-schema", f"the schema cannot be used: {reason}", args[0].value.span))
    return JsonType(schema)


# --- constants


def _whole(expr: Expr, what: str) -> int:
    value = constant(expr, what)
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanError(_wrong(expr, what, "a whole number"))
    return value


def _number(expr: Expr, what: str) -> float:
    value = constant(expr, what)
    if isinstance(value, bool):
        raise PlanError(_wrong(expr, what, "a number"))
    return float(value)


def constant(expr: Expr, what: str = "this") -> int | float | bool:
    """The value of an expression of number and bool literals; `what` names it in an error.

    Raises PlanError: not-constant, option-type, option-range.
    """
    if not is_constant(expr):
        if isinstance(expr, Str | List):
            raise PlanError(_wrong(expr, what, "a number"))
        raise PlanError(
            Diagnostic(
                "not-constant",
                f"{what} must be known before the plan runs",
                expr.span,
                help="write a number, or arithmetic of numbers",
            )
        )
    # The left spine of `1 + 1 + 1 ...` may be long, so it is walked and not recursed into.
    spine: list[Binary] = []
    node = expr
    while isinstance(node, Binary):
        spine.append(node)
        node = node.left
    value = _leaf(node, what)
    for binary in reversed(spine):
        value = _arithmetic(binary, value, constant(binary.right, what), what)
    return value


def _leaf(expr: Expr, what: str) -> int | float | bool:
    signs: list[Unary] = []
    while isinstance(expr, Unary):
        signs.append(expr)
        expr = expr.operand
    if isinstance(expr, Binary):
        value = constant(expr, what)
    else:
        value = _bare(expr)
        if abs(value) > 2**64:
            raise PlanError(Diagnostic("option-range", f"{what} is too large", expr.span))
    for sign in reversed(signs):
        if (sign.op == "!") != isinstance(value, bool):
            raise PlanError(
                _wrong(sign.operand, f"the operand of `{sign.op}`", "a number" if sign.op == "-" else "a bool")
            )
        value = not value if sign.op == "!" else -value
    return value


def _bare(expr: Expr) -> int | float | bool:
    if isinstance(expr, Int | Float | Bool):
        return expr.value
    raise TypeError(f"not a literal: {expr}")


def _arithmetic(expr: Binary, a: int | float, b: int | float, what: str) -> int | float:
    if isinstance(a, bool) or isinstance(b, bool):
        raise PlanError(_wrong(expr, f"an operand of `{expr.op}`", "a number"))
    try:
        value = {"+": a + b, "-": a - b, "*": a * b}[expr.op] if expr.op != "/" else a / b
    except ZeroDivisionError:
        raise PlanError(Diagnostic("option-range", f"{what} divides by zero", expr.span)) from None
    except OverflowError:
        value = math.inf
    if not math.isfinite(value) or abs(value) > 2**64:
        # Also keeps a product of many literals from growing without end.
        raise PlanError(Diagnostic("option-range", f"{what} is too large", expr.span))
    return value


def _wrong(expr: Expr, what: str, wanted: str) -> Diagnostic:
    return Diagnostic("option-type", f"{what} is {wanted}, not {_kind(expr)}", expr.span)


def _kind(expr: Expr) -> str:
    match expr:
        case Str():
            return "a string"
        case List():
            return "a list"
        case Bool():
            return "a bool"
        case Float():
            return "a fraction"
        case Int():
            return "a number"
        case _:
            return "this"


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _quote(text: str) -> str:
    text = text if len(text) <= 40 else text[:37] + "..."
    return f"`{json.dumps(text, ensure_ascii=False)}`"


def _digits(value: int) -> str:
    return str(value) if abs(value) < 10**20 else "a number of more than 20 digits"
