"""The checker: everything about a plan that can be wrong before it runs, told in one go.

It walks each plan once, with the names in scope, their types, and what may be decoded at most; `check_flow` walks it
again for what depends on the path (chat roles, and whether a `gen` has something to continue).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from anabranch.dsl import types
from anabranch.dsl.ast import (
    Apply,
    Block,
    Branches,
    Call,
    Expand,
    Fork,
    Gen,
    If,
    Join,
    Let,
    List,
    Loop,
    Map,
    Need,
    Option,
    PlanDef,
    Program,
    Reduce,
    Return,
    Stmt,
    Str,
    Write,
)
from anabranch.dsl.check_calls import check_arguments, check_budget
from anabranch.dsl.check_expr import ExprChecker
from anabranch.dsl.check_flow import Flow
from anabranch.dsl.check_joins import Arm, JoinChecker
from anabranch.dsl.check_names import define
from anabranch.dsl.check_report import Report, TooManyErrors, quiet
from anabranch.dsl.diagnostics import Diagnostic, PlanError, Span, did_you_mean
from anabranch.dsl.options import (
    MAX_WIDTH,
    fork_width,
    gen_spec,
    is_constant,
    join_spec,
    limits,
    loop_rounds,
    plan_depth,
    read_type,
    reduce_by,
)
from anabranch.dsl.scope import RESERVED, Binding, PlanNames, Scope, bound_name
from anabranch.dsl.spec import SAMPLING, JoinSpec, Limits, TextType
from anabranch.dsl.target import Target
from anabranch.dsl.types import ANY, BOOL, INT, TEXT, AnyType, ListOf, Type, show
from anabranch.dsl.worst import MAX_DECODED, MAX_NESTED, MAX_STATEMENTS, NOTHING, ONE_STATEMENT, Worst, reduce_groups

__all__ = ["Checked", "Target", "check"]


@dataclass(frozen=True, slots=True)
class Checked:
    """A program without errors, and what the checker learned.

    program: as given
    warnings: in order of the text
    skipped: what could not be checked, and why, each a line
    value_types: plan name -> the type of its value
    params: plan name -> the types of its parameters, in order
    most: id(stmt) -> the most branches of a fork or map, or items of a reduce. The ids are those of `program`'s
        statements, which live as long as this does
    worst_tokens: plan name -> the most tokens that it may decode, budgets and calls included
    """

    program: Program
    warnings: tuple[Diagnostic, ...]
    skipped: tuple[str, ...]
    value_types: Mapping[str, Type]
    params: Mapping[str, tuple[Type, ...]]
    most: Mapping[int, int]
    worst_tokens: Mapping[str, int]

    def most_of(self, stmt: Fork | Branches | Map | Reduce) -> int:
        """The most branches of `stmt`, or items of a reduce. Raises KeyError if it is no statement of the program."""
        return self.most[id(stmt)]


def check(
    program: Program,
    *,
    functions: Collection[str] = (),
    target: Target | None = None,
    start_token: bool | None = None,
) -> Checked:
    """Check every plan of `program`.

    functions: names of the host functions that the caller has registered
    target: where it is to run; our own engine when None
    start_token: whether the model's empty view begins with a token; None where no model is known

    Raises PlanError with every error found (at most `MAX_ERRORS`), in order of the text.
    """
    checker = _Checker(program, frozenset(functions), target or Target(), start_token)
    try:
        checker.run()
    except TooManyErrors:
        pass
    report = checker.report
    if report.errors:
        raise PlanError(sorted(report.errors, key=_place), program.source)
    return Checked(
        program=program,
        warnings=tuple(sorted(report.warnings, key=_place)),
        skipped=tuple(checker.skipped),
        value_types=checker.value_types,
        params=checker.params,
        most=checker.most,
        worst_tokens=checker.worst_tokens,
    )


@dataclass(slots=True)
class _Thread:
    """The body being walked. `budget`: the nearest around it; `returns`: types of its returns so far."""

    budget: int | None
    returns: list[Type]


class _Checker:
    def __init__(self, program: Program, functions: frozenset[str], target: Target, start_token: bool | None) -> None:
        self.program = program
        self.functions = functions
        self.target = target
        self.start_token = start_token
        self.report = Report(program.source)
        self.skipped: list[str] = []
        self.value_types: dict[str, Type] = {}
        self.params: dict[str, tuple[Type, ...]] = {}
        self.most: dict[int, int] = {}
        self.worst_tokens: dict[str, int] = {}
        self._called: dict[str, Worst] = {}
        self._plans = {plan.name: plan for plan in reversed(program.plans)}
        self._plan_names = frozenset(self._plans)
        self._others = self._plan_names | functions
        self._exprs = ExprChecker(self.report.add, self._undefined, self._plan_names, functions)
        self._join_checker = JoinChecker(self.report, target)
        self._returns: dict[int, bool] = {}
        # Of the plan being walked:
        self._plan = program.plans[0] if program.plans else PlanDef("", (), (), Block(()))
        self._depth = 0
        self._names: PlanNames | None = None
        self._threads: list[_Thread] = []
        self._joins: list[tuple[Binding | None, Span, str]] = []

    def _undefined(self, name: str, scope: Scope, span: Span) -> Diagnostic:
        if self._names is None:
            self._names = PlanNames(self._plan, self.program.source)
        return self._names.explain(name, scope, span, self._others)

    def run(self) -> None:
        seen: dict[str, PlanDef] = {}
        for plan in self.program.plans:
            name_span = self.report.name_span(plan.span, plan.name)
            if plan.name in seen:
                self.report.error(
                    "bound-twice", f"there are two plans `{plan.name}`", name_span, help="rename one of them"
                )
            elif plan.name in RESERVED:
                self.report.error("reserved-word", f"`{plan.name}` is a word of the language", name_span)
            elif plan.name in self.functions:
                self.report.error(
                    "shadowed-name", f"the plan `{plan.name}` would hide the host function of that name", name_span
                )
            self._run_plan(plan)
            seen[plan.name] = plan
        flow = Flow(self.program, self.most, self.start_token)
        for diagnostic in flow.run():
            self.report.add(diagnostic)
        if flow.asked_start_token:
            self.skipped.append("whether every `gen` without a prompt has a token to continue: that needs a model")

    def _run_plan(self, plan: PlanDef) -> None:
        self._plan, self._names, self._joins = plan, None, []
        options = self.report.read(lambda: limits(plan.options, kind="plan"), Limits())
        self._depth = quiet(lambda: plan_depth(plan), 1)
        scope = Scope(None, "thread")
        for option in plan.options:
            if option.name in SAMPLING:
                self._sampling(option, scope)
        param_types = []
        for param in plan.params:
            bound = param.bound
            t = self.report.read(lambda: types.of_bound(bound), ANY)  # noqa: B023 - called at once
            define(self.report, param.name, t, self.report.name_span(param.span, param.name), scope)
            param_types.append(t)
        self.params[plan.name] = tuple(param_types)
        value, worst = self._thread(plan.body, scope, options.budget)
        total = worst.total(self._depth)
        if options.budget is not None:
            self._budget_below(plan.options, options.budget, total)
            total = min(total, options.budget)
        self._plan_size(plan, total, worst.total_statements(self._depth), worst.total_nested(self._depth))
        self.worst_tokens.setdefault(plan.name, total if total <= MAX_DECODED else 0)
        self.value_types.setdefault(plan.name, value)
        for binding, span, what in self._joins:
            if binding is None or not binding.used:
                name = f"`{binding.name}`" if binding is not None else "its value"
                self.report.warn(
                    "unused-join",
                    f"this {what} has no effect: {name} is never used, and its context is dropped",
                    span,
                    help="use the value, join with `text` or `stitch`, or remove it",
                )

    def _plan_size(self, plan: PlanDef, tokens: int, statements: int, nested: int) -> None:
        """Refuse a plan whose worst case no machine would come to the end of; callers of such a plan are not told."""
        found = ""
        if tokens > MAX_DECODED:
            found = f"may decode {_count(tokens)} tokens, and at most {MAX_DECODED:,} are allowed"
            help = "lower its widths, rounds or `max`, or give it a `budget`"
        elif statements > MAX_STATEMENTS:
            found = f"may carry out {_count(statements)} statements, and at most {MAX_STATEMENTS:,} are allowed"
            help = "lower its widths, rounds, depth or retries: those of nested statements multiply"
        elif nested > MAX_NESTED:
            found = f"may nest {_count(nested)} blocks and calls deep, and at most {MAX_NESTED:,} are allowed"
            help = "lower its `depth`, or let fewer plans call one another"
        if found:
            span = self.report.name_span(plan.span, plan.name)
            self.report.error("plan-too-large", f"the plan `{plan.name}` {found}", span, help=help)
            statements = nested = 0
        # One more deep than the plan: the call.
        self._called.setdefault(plan.name, Worst(statements=statements, nested=nested + 1))

    def _thread(self, body: Block, scope: Scope, budget: int | None) -> tuple[Type, Worst]:
        """Walk the body of a plan or branch: the type of its value, and the most it decodes."""
        self._threads.append(_Thread(budget, []))
        worst = self._block(body, scope)
        returns = self._threads.pop().returns
        if not self._always_returns(body):
            returns.append(TEXT)
        value = returns[0]
        for other in returns[1:]:
            value = types.merge(value, other)
        return types.bounded(value), worst

    def _block(self, block: Block, scope: Scope) -> Worst:
        worst = NOTHING
        over = told = False
        for stmt in block.stmts:
            if over and not told:
                self.report.warn(
                    "unreachable", "this is never reached: a `return` comes before it", self.report.head(stmt.span)
                )
                told = True
            worst += ONE_STATEMENT + self._statement(stmt, scope)
            over = over or self._ends(stmt)
        return worst

    def _always_returns(self, block: Block) -> bool:
        known = self._returns.get(id(block))
        if known is None:
            known = self._returns[id(block)] = any(self._ends(stmt) for stmt in block.stmts)
        return known

    def _ends(self, stmt: Stmt) -> bool:
        """Whether the thread never goes on after the statement."""
        match stmt:
            case Return():
                return True
            case If(then=then, orelse=orelse):
                return orelse is not None and self._always_returns(then) and self._always_returns(orelse)
            case Loop(body=body):
                return self._always_returns(body)
            case _:
                return False

    def _statement(self, stmt: Stmt, scope: Scope) -> Worst:
        match stmt:
            case Write(value=value):
                self._exprs.infer(value, scope)
                return NOTHING
            case Gen():
                return self._gen(stmt, scope)
            case Fork():
                return self._fork(stmt, scope)
            case Branches():
                return self._branches(stmt, scope)
            case Map():
                return self._map(stmt, scope)
            case Reduce():
                return self._reduce(stmt, scope)
            case Loop():
                return self._loop(stmt, scope)
            case If():
                return self._if(stmt, scope)
            case Need(cond=cond):
                self._exprs.want(cond, scope, BOOL, "what `need` asks for")
                return NOTHING
            case Return(value=value):
                self._threads[-1].returns.append(self._exprs.infer(value, scope))
                return NOTHING
            case Let(name=name, value=value):
                t = self._exprs.infer(value, scope)
                define(self.report, name, t, self.report.name_span(stmt.span, name), scope)
                return NOTHING
            case Call():
                return self._call(stmt, scope)
            case Expand():
                return self._expand(stmt, scope)
            case _:
                assert_never(stmt)

    def _bind(self, stmt: Stmt, t: Type, scope: Scope) -> Binding | None:
        name = bound_name(stmt)
        return None if name is None else define(self.report, name, t, self.report.name_span(stmt.span, name), scope)

    def _gen(self, gen: Gen, scope: Scope) -> Worst:
        if gen.prompt is not None:
            self._exprs.infer(gen.prompt, scope)
        for option in gen.options:
            match option.name:
                case "seed" if not is_constant(option.value):
                    self._exprs.want(option.value, scope, INT, "`seed`")
                case "recorded":
                    self._recorded(option, scope)
                case name if name in SAMPLING:
                    self._sampling(option, scope)
                case _:
                    pass
        spec = self.report.read(lambda: gen_spec(gen, self._plan), None)
        if spec is None:
            written = next((o for o in gen.options if o.name == "type"), None)
            gen_type = TextType() if written is None else quiet(lambda: read_type(written.value), None)
            self._bind(gen, ANY if gen_type is None else types.of_gen(gen_type), scope)
            return NOTHING
        self._bind(gen, types.of_gen(spec.type), scope)
        return Worst(spec.max_tokens if spec.recorded is None else 0)

    def _sampling(self, option: Option, scope: Scope) -> None:
        # A constant is ranged where the options are read, which also tells of a string or list.
        if is_constant(option.value) or isinstance(option.value, Str | List):
            return
        t = self._exprs.infer(option.value, scope)
        if not types.is_number(t):
            self.report.error("wrong-operand", f"`{option.name}` is a number, not {show(t)}", option.value.span)

    def _recorded(self, option: Option, scope: Scope) -> None:
        if isinstance(option.value, Apply) and option.value.function == "ids":
            return
        t = self._exprs.infer(option.value, scope)
        if not (types.fits(t, TEXT) or types.fits(t, ListOf(TEXT))) and not is_constant(option.value):
            self.report.error(
                "bad-recorded",
                f"`recorded` is not {show(t)}",
                option.span,
                help="write a string, a list of strings, or `ids(1, 2, 3)`",
            )

    def _fork(self, fork: Fork, scope: Scope) -> Worst:
        own = self._limits(fork.options, "fork", scope)
        width = self.report.read(lambda: fork_width(fork), 1)
        if width is None:
            t = self._exprs.want(fork.width, scope, INT, "the width of a fork")
            width = self._dynamic("fork", own.upto, fork) if types.fits(t, INT) else 1
        elif own.upto is not None and width > own.upto:
            self.report.error(
                "count-above-width",
                f"the fork has {width} branches, more than `upto={own.upto}`",
                fork.width.span,
                help="leave `upto` out: the width is known",
            )
        elif width == 1:
            self.report.warn("fork-of-one", "a fork of one runs nothing side by side", self.report.head(fork.span))
        given = [(fork.index, INT)] if fork.index is not None else []
        arm, worst = self._arm(fork, fork.body, scope, 0, given, own, self.report.head(fork.span))
        return self._join(fork, fork.join, [arm], width, own, worst.times(width), scope)

    def _branches(self, fork: Branches, scope: Scope) -> Worst:
        own = self._limits(fork.options, "branches", scope)
        width = len(fork.branches)
        if width == 0:
            self.report.error("empty-fork", "this fork has no branches", self.report.head(fork.span))
        elif width == 1:
            self.report.warn("fork-of-one", "a fork of one runs nothing side by side", self.report.head(fork.span))
        elif width > MAX_WIDTH:
            self.report.error(
                "option-range", f"the width of a fork is at most {MAX_WIDTH}", self.report.head(fork.span)
            )
        arms: list[Arm] = []
        labels: set[str] = set()
        mixed = False
        total = NOTHING
        for i, branch in enumerate(fork.branches):
            span = self.report.name_span(branch.span, branch.label)
            if branch.label is not None and branch.label in labels:
                self.report.error("bound-twice", f"two branches are labelled `{branch.label}`", span)
            elif (branch.label is None) != (fork.branches[0].label is None) and not mixed:
                mixed = True
                self.report.error(
                    "mixed-labels",
                    "either every branch of a fork has a label, or none has",
                    span,
                    help="a labelled fork yields a record, one without labels a list",
                )
            if branch.label is not None:
                labels.add(branch.label)
            if branch.prompt is not None:
                self._exprs.infer(branch.prompt, scope)
            limit = self._limits(branch.options, "branch", scope, outer=own.budget)
            both = replace(
                limit,
                fresh=limit.fresh or own.fresh,
                retry=limit.retry or own.retry,
                budget=own.budget if limit.budget is None else limit.budget,
            )
            arm, worst = self._arm(fork, branch.body, scope, i, [], both, span)
            arm.label = branch.label
            if limit.budget is not None:
                self._budget_below(branch.options, limit.budget, worst.fixed)
                worst = worst.within(limit.budget)
            arms.append(arm)
            total += worst
        return self._join(fork, fork.join, arms, width, own, total, scope)

    def _map(self, fork: Map, scope: Scope) -> Worst:
        own = self._limits(fork.options, "map", scope)
        elem, most = self._over(fork, "map", own, scope)
        given = [(fork.item, elem)]
        if fork.index is not None:
            given.insert(0, (fork.index, INT))
        arm, worst = self._arm(fork, fork.body, scope, 0, given, own, self.report.head(fork.span))
        return self._join(fork, fork.join, [arm], most, own, worst.times(most), scope)

    def _reduce(self, stmt: Reduce, scope: Scope) -> Worst:
        own = self._limits(stmt.options, "reduce", scope)
        elem, most = self._over(stmt, "reduce", own, scope)
        by = quiet(lambda: reduce_by(stmt.options), 2)
        # Later levels merge what the body yields, whose type is that of the items or the levels would differ.
        arm, worst = self._arm(
            stmt, stmt.body, scope, 0, [(stmt.item, ListOf(elem, by))], own, self.report.head(stmt.span)
        )
        if not types.fits(arm.value, elem):
            self.report.error(
                "reduce-type",
                f"`reduce` merges {show(elem)} into {show(arm.value)}, which the next level cannot merge",
                self.report.head(stmt.span),
                help=f"return {show(elem)} from the body",
            )
        value = types.merge(elem, arm.value)
        worst = worst.times(reduce_groups(most, by))
        if own.budget is not None:
            self._budget_below(stmt.options, own.budget, worst.fixed)
            worst = worst.within(own.budget)
        self.most[id(stmt)] = most
        self._fallback(own, value, "reduce", scope)
        self._joins.append((self._bind(stmt, value, scope), self.report.head(stmt.span), "reduce"))
        return worst

    def _over(self, stmt: Map | Reduce, what: str, own: Limits, scope: Scope) -> tuple[Type, int]:
        """The type of an item of the list that is mapped or reduced, and the most items."""
        t = self._exprs.infer(stmt.over, scope)
        match t:
            case ListOf(elem=elem, most=most):
                pass
            case AnyType():
                elem, most = ANY, None
            case _:
                self.report.error("wrong-operand", f"`{what}` goes over a list, not {show(t)}", stmt.over.span)
                return ANY, 1
        if most is not None and own.upto is not None:
            most = min(most, own.upto)
        elif most is None:
            most = self._dynamic(what, own.upto, stmt)
        return elem, most

    def _dynamic(self, what: str, upto: int | None, stmt: Fork | Map | Reduce) -> int:
        """The most branches where only the run knows the number."""
        if upto is not None:
            return upto
        if any(option.name == "upto" for option in stmt.options):
            return 1
        span = stmt.width.span if isinstance(stmt, Fork) else stmt.over.span
        self.report.error(
            "unbounded-width",
            f"only the run knows how many branches this `{what}` has"
            if what != "reduce"
            else "only the run knows how many items this `reduce` has",
            span,
            note="no bound is known",
            help=f"write `upto=16` among the options of `{what}`, or bound the list where it comes from",
        )
        return 1

    def _arm(
        self,
        stmt: Fork | Branches | Map | Reduce,
        body: Block,
        scope: Scope,
        i: int,
        given: Sequence[tuple[str, Type]],
        own: Limits,
        span: Span,
    ) -> tuple[Arm, Worst]:
        """Walk one branch."""
        inner = Scope(scope, "thread", ("branch", id(stmt), i))
        for name, t in given:
            define(self.report, name, t, span, inner)
        around = self._threads[-1].budget
        value, worst = self._thread(body, inner, around if own.budget is None else own.budget)
        names = frozenset(name for name, _ in given)
        arm = Arm(body, inner, value, names, None, span, own.fresh)
        return arm, worst.inside().times(1 + own.retry)

    def _limits(self, options: Sequence[Option], kind: str, scope: Scope, outer: int | None = None) -> Limits:
        """The options of a statement that bounds; `outer`: the budget of the fork around a branch."""
        own = self.report.read(lambda: limits(options, kind=kind), Limits())
        by_name = {option.name: option for option in options}
        around = self._threads[-1].budget if outer is None else outer
        if own.budget is not None and around is not None and own.budget > around:
            self.report.error(
                "budget-above-parent",
                f"a budget of {own.budget} inside one of {around}",
                by_name["budget"].span,
                help=f"at most {around} can be spent here",
            )
            own = replace(own, budget=around)
        if own.deadline_s is not None and self.target.deterministic:
            self.report.error(
                "wall-clock",
                "a deadline depends on the wall clock, which a deterministic run does not read",
                by_name["deadline"].span,
                help="bound the tokens with `budget=`, or run without `--deterministic`",
            )
        return own

    def _join(
        self,
        stmt: Fork | Branches | Map,
        join: Join | None,
        arms: Sequence[Arm],
        width: int,
        own: Limits,
        worst: Worst,
        scope: Scope,
    ) -> Worst:
        """Check how a fork ends, and bind its name. `width`: the most branches there can be."""
        what = "map" if isinstance(stmt, Map) else "fork"
        self.most[id(stmt)] = width
        spec = self.report.read(lambda: join_spec(join), JoinSpec())
        value = self._join_checker.value(what, join, spec, arms, width, self.report.head(stmt.span))
        if own.budget is not None:
            self._budget_below(stmt.options, own.budget, worst.fixed)
            worst = worst.within(own.budget)
        self._fallback(own, value, what, scope)
        binding = self._bind(stmt, value, scope)
        if spec.context == "drop":
            self._joins.append((binding, self.report.head(stmt.span), what))
        return worst

    def _fallback(self, own: Limits, value: Type, what: str, scope: Scope) -> None:
        if own.fallback is None:
            return
        t = self._exprs.infer(own.fallback, scope)
        if not types.fits(t, value):
            self.report.error(
                "fallback-type",
                f"the fallback is {show(t)}, and the {what} yields {show(value)}",
                own.fallback.span,
                help="give a value of the type that the join yields",
            )

    def _budget_below(self, options: Sequence[Option], budget: int, worst: int) -> None:
        if budget < worst:
            option = next(o for o in options if o.name == "budget")
            self.report.warn(
                "budget-below-worst",
                f"a budget of {budget} is less than the {worst} tokens that may be decoded",
                option.span,
                help="branches that run out of it end as truncated; raise it, or lower a `max`",
            )

    def _loop(self, loop: Loop, scope: Scope) -> Worst:
        rounds = self.report.read(lambda: loop_rounds(loop), 1)
        inner = Scope(scope, "loop")
        worst = self._block(loop.body, inner)
        if loop.until is not None:
            self._exprs.want(loop.until, inner, BOOL, "what `until` asks for")
        for name, binding in inner.names.items():
            # What was rebound is seen after the loop under its first binding, which `also` leads on from.
            if scope.clash(name) is None:
                scope.names[name] = binding
        return worst.inside().times(rounds)

    def _if(self, stmt: If, scope: Scope) -> Worst:
        self._exprs.want(stmt.cond, scope, BOOL, "the condition of `if`")
        then = Scope(scope, "arm", ("arm", id(stmt), 0))
        worst = self._block(stmt.then, then).inside()
        if stmt.orelse is None:
            return worst
        orelse = Scope(scope, "arm", ("arm", id(stmt), 1))
        worst = worst.either(self._block(stmt.orelse, orelse).inside())
        for name, one in then.names.items():
            other = orelse.names.get(name)
            if other is None or scope.lookup(name) is not None:
                continue
            if not types.comparable(one.type, other.type):
                self.report.error(
                    "arm-types",
                    f"`{name}` is {show(one.type)} in one arm and {show(other.type)} in the other",
                    self.report.head(stmt.span) if other.span is None else other.span,
                    help="bind it with one type in both, or use two names",
                )
            scope.names[name] = Binding(name, types.merge(one.type, other.type), other.span, also=[one, other])
        return worst

    def _call(self, call: Call, scope: Scope) -> Worst:
        own = self._limits(call.options, "call", scope)
        span = self.report.head(call.span)
        arg_types = [self._exprs.infer(arg.value, scope) for arg in call.args]
        worst = NOTHING
        value: Type = ANY
        if call.plan == self._plan.name:
            if self._depth == 0:
                self.report.error(
                    "recursion-without-depth",
                    f"the plan `{call.plan}` calls itself, and its depth has no bound",
                    span,
                    help=f"write `{call.plan} = plan(..., depth=3)`",
                )
            worst = Worst(calls=1, own_calls=1, nested=1, to_itself=1)
        elif call.plan in self.value_types:
            value = self.value_types[call.plan]
            worst = Worst(self.worst_tokens[call.plan]) + self._called[call.plan]
        elif call.plan in self._plan_names:
            self.report.error(
                "plan-order",
                f"the plan `{call.plan}` is defined further down",
                span,
                help=f"a plan calls plans above it, or itself: move `{call.plan}` up",
            )
        else:
            self.report.error(
                "unknown-plan",
                f"there is no plan `{call.plan}`",
                span,
                help=did_you_mean(call.plan, self._plan_names),
            )
        callee = self._plans.get(call.plan)
        if callee is not None:
            check_arguments(self.report, call, callee, arg_types, span)
            if callee is not self._plan:
                around = self._threads[-1].budget if own.budget is None else own.budget
                check_budget(self.report, callee, around, span)
        worst = worst.times(1 + own.retry)
        if own.budget is not None:
            self._budget_below(call.options, own.budget, worst.fixed)
            worst = worst.within(own.budget)
        self._fallback(own, value, "plan", scope)
        self._joins.append((self._bind(call, value, scope), span, "call"))
        return worst

    def _expand(self, stmt: Expand, scope: Scope) -> Worst:
        if stmt.prompt is not None:
            self._exprs.infer(stmt.prompt, scope)
        self.report.error(
            "expand-unavailable",
            "`expand` is not available in this version",
            self.report.head(stmt.span),
            help="write out the branches it should make, with `fork` or `map`",
        )
        self._bind(stmt, ANY, scope)
        return NOTHING


def _count(number: int) -> str:
    return f"{number:,}" if number < 10**15 else "more than 10^15"


def _place(diagnostic: Diagnostic) -> tuple[int, int]:
    span = diagnostic.span
    return (0, 0) if span is None else (span.start, span.end)
