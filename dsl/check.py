"""The checker: everything about a plan that can be wrong before it runs, told in one go.

It walks each plan once, with the names in scope, their types, and what may be decoded at most; `check_flow` walks it
again for what depends on the path (chat roles, and whether a `gen` has something to continue).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, assert_never

from anabranch.dsl import types
from anabranch.dsl.ast import (
    Apply,
    Arg,
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
from anabranch.dsl.check_expr import ExprChecker
from anabranch.dsl.check_flow import Flow, stitches_several
from anabranch.dsl.check_joins import key_paths, show_gen
from anabranch.dsl.diagnostics import NOWHERE, Diagnostic, PlanError, Span, did_you_mean
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
from anabranch.dsl.types import ANY, BOOL, INT, TEXT, AnyType, ListOf, Record, Text, Type, show
from anabranch.dsl.worst import NOTHING, Worst, reduce_groups

MAX_ERRORS = 100
"""The checker stops here: a person reads the first few, and a hostile file must not earn a report of its size."""

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Target:
    """What the place where a plan is to run can do.

    name: how errors name it
    stitch_many: whether several branches can be aliased into one view (our engine can, a remote one cannot)
    deterministic: no decision may depend on the wall clock
    """

    name: str = "engine"
    stitch_many: bool = True
    deterministic: bool = False


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
    except _TooMany:
        pass
    errors, warnings = checker.errors, checker.warnings
    if errors:
        raise PlanError(sorted(errors, key=_place), program.source)
    return Checked(
        program=program,
        warnings=tuple(sorted(warnings, key=_place)),
        skipped=tuple(checker.skipped),
        value_types=checker.value_types,
        params=checker.params,
        most=checker.most,
        worst_tokens=checker.worst_tokens,
    )


class _TooMany(Exception):
    """`MAX_ERRORS` have been found."""


@dataclass(slots=True)
class _Thread:
    """The body being walked. `budget`: the nearest around it; `returns`: types of its returns so far."""

    budget: int | None
    returns: list[Type]


@dataclass(slots=True)
class _Arm:
    """A branch that was walked: its names, and the type of what it yields."""

    body: Block
    scope: Scope
    value: Type
    given: frozenset[str]
    label: str | None
    span: Span
    fresh: bool


class _Checker:
    def __init__(self, program: Program, functions: frozenset[str], target: Target, start_token: bool | None) -> None:
        self.program = program
        self.functions = functions
        self.target = target
        self.start_token = start_token
        self.errors: list[Diagnostic] = []
        self.warnings: list[Diagnostic] = []
        self.skipped: list[str] = []
        self.value_types: dict[str, Type] = {}
        self.params: dict[str, tuple[Type, ...]] = {}
        self.most: dict[int, int] = {}
        self.worst_tokens: dict[str, int] = {}
        self._plan_names = frozenset(plan.name for plan in program.plans)
        self._others = self._plan_names | functions
        self._exprs = ExprChecker(self.report, self._undefined, self._plan_names, functions)
        self._returns: dict[int, bool] = {}
        # Of the plan being walked:
        self._plan = program.plans[0] if program.plans else PlanDef("", (), (), Block(()))
        self._depth = 0
        self._names: PlanNames | None = None
        self._threads: list[_Thread] = []
        self._joins: list[tuple[Binding | None, Span, str]] = []

    # --- reports

    def report(self, diagnostic: Diagnostic) -> None:
        self.errors.append(diagnostic)
        if len(self.errors) >= MAX_ERRORS:
            raise _TooMany

    def error(self, code: str, message: str, span: Span, *, note: str = "", help: str = "") -> None:
        self.report(Diagnostic(code, message, span, note, help))

    def warn(self, code: str, message: str, span: Span, *, note: str = "", help: str = "") -> None:
        if len(self.warnings) < MAX_ERRORS:
            self.warnings.append(Diagnostic(code, message, span, note, help, "warning"))

    def _read(self, read: Callable[[], T], otherwise: U) -> T | U:
        try:
            return read()
        except PlanError as error:
            for diagnostic in error.diagnostics:
                self.report(diagnostic)
            return otherwise

    def _undefined(self, name: str, scope: Scope, span: Span) -> Diagnostic:
        if self._names is None:
            self._names = PlanNames(self._plan, self.program.source)
        return self._names.explain(name, scope, span, self._others)

    # --- plans

    def run(self) -> None:
        seen: dict[str, PlanDef] = {}
        for plan in self.program.plans:
            name_span = self._name_span(plan.span, plan.name)
            if plan.name in seen:
                self.error("bound-twice", f"there are two plans `{plan.name}`", name_span, help="rename one of them")
            elif plan.name in RESERVED:
                self.error("reserved-word", f"`{plan.name}` is a word of the language", name_span)
            elif plan.name in self.functions:
                self.error(
                    "shadowed-name", f"the plan `{plan.name}` would hide the host function of that name", name_span
                )
            self._run_plan(plan)
            seen[plan.name] = plan
        flow = Flow(self.program, self.most, self.start_token)
        for diagnostic in flow.run():
            self.report(diagnostic)
        if flow.asked_start_token:
            self.skipped.append("whether every `gen` without a prompt has a token to continue: that needs a model")

    def _run_plan(self, plan: PlanDef) -> None:
        self._plan, self._names, self._joins = plan, None, []
        options = self._read(lambda: limits(plan.options, kind="plan"), Limits())
        self._depth = self._quiet(lambda: plan_depth(plan), 1)
        scope = Scope(None, "thread")
        for option in plan.options:
            if option.name in SAMPLING:
                self._sampling(option, scope)
        param_types = []
        for param in plan.params:
            bound = param.bound
            t = self._read(lambda: types.of_bound(bound), ANY)  # noqa: B023 - called at once
            self.define(param.name, t, self._name_span(param.span, param.name), scope)
            param_types.append(t)
        self.params[plan.name] = tuple(param_types)
        value, worst = self._thread(plan.body, scope, options.budget)
        total = worst.total(self._depth)
        if options.budget is not None:
            self._budget_below(plan.options, options.budget, total)
            total = min(total, options.budget)
        self.worst_tokens.setdefault(plan.name, total)
        self.value_types.setdefault(plan.name, value)
        for binding, span, what in self._joins:
            if binding is None or not binding.used:
                name = f"`{binding.name}`" if binding is not None else "its value"
                self.warn(
                    "unused-join",
                    f"this {what} has no effect: {name} is never used, and its context is dropped",
                    span,
                    help="use the value, join with `text` or `stitch`, or remove it",
                )

    def _quiet(self, read: Callable[[], T], otherwise: U) -> T | U:
        """For what is read twice: the first reading has told what is wrong."""
        try:
            return read()
        except PlanError:
            return otherwise

    # --- names

    def define(self, name: str, t: Type, span: Span, scope: Scope) -> Binding:
        binding = Binding(name, t, span)
        if name in RESERVED:
            self.error("reserved-word", f"`{name}` is a word of the language and names nothing else", span)
            scope.names[name] = binding
            return binding
        match scope.clash(name):
            case None:
                pass
            case "twice", before:
                self.error(
                    "bound-twice",
                    f"`{name}` is already bound",
                    span,
                    note=self._at(before),
                    help="a name is bound once; only the body of a `loop` may bind a name of its surroundings again",
                )
            case "shadow", before:
                self.error(
                    "shadowed-name",
                    f"`{name}` is already bound outside this branch",
                    span,
                    note=self._at(before),
                    help="a branch cannot change a name of its parent; use another name",
                )
            case _, before:
                self._rebind(before, binding, span)
        scope.names[name] = binding
        return binding

    def _rebind(self, before: Binding, binding: Binding, span: Span) -> None:
        binding.used = True  # the next round, and what follows the loop, may read it
        old, new = before.type, binding.type
        if old != new and not (isinstance(old, AnyType) or isinstance(new, AnyType)):
            self.error(
                "rebound-type",
                f"a loop may bind `{binding.name}` again with the same type: it was {show(old)}, and is {show(new)}",
                span,
                note=self._at(before),
            )
        elif (
            isinstance(old, ListOf)
            and isinstance(new, ListOf)
            and old.most is not None
            and (new.most is None or new.most > old.most)
        ):
            # What an earlier statement of the body was told of the list must hold in every round.
            most = "any number of" if new.most is None else f"up to {new.most}"
            self.error(
                "rebound-type",
                f"`{binding.name}` holds at most {old.most} items before the loop and {most} in it",
                span,
                note=self._at(before),
                help="give it the same bound at both places",
            )

    def _at(self, binding: Binding) -> str:
        if binding.span is None or binding.span == NOWHERE or not self.program.source.text:
            return ""
        return f"first bound at line {self.program.source.position(binding.span.start)[0]}"

    def _name_span(self, span: Span, name: str | None) -> Span:
        """The part of a statement's span that is the name it begins with."""
        text = self.program.source.text
        if name is not None and text.startswith(name, span.start):
            return Span(span.start, span.start + len(name))
        return self._head(span)

    def _head(self, span: Span) -> Span:
        """The first line of a statement, up to its block: what a person looks at."""
        text = self.program.source.text[span.start : min(span.end, span.start + 400)]
        line = text.split("\n", 1)[0].split("{", 1)[0].rstrip()
        return Span(span.start, span.start + len(line)) if line else span

    # --- blocks

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
        return value, worst

    def _block(self, block: Block, scope: Scope) -> Worst:
        worst = NOTHING
        over = told = False
        for stmt in block.stmts:
            if over and not told:
                self.warn("unreachable", "this is never reached: a `return` comes before it", self._head(stmt.span))
                told = True
            worst += self._statement(stmt, scope)
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
                self.define(name, t, self._name_span(stmt.span, name), scope)
                return NOTHING
            case Call():
                return self._call(stmt, scope)
            case Expand():
                return self._expand(stmt, scope)
            case _:
                assert_never(stmt)

    def _bind(self, stmt: Stmt, t: Type, scope: Scope) -> Binding | None:
        name = bound_name(stmt)
        return None if name is None else self.define(name, t, self._name_span(stmt.span, name), scope)

    # --- gen

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
        spec = self._read(lambda: gen_spec(gen, self._plan), None)
        if spec is None:
            written = next((o for o in gen.options if o.name == "type"), None)
            gen_type = TextType() if written is None else self._quiet(lambda: read_type(written.value), None)
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
            self.error("wrong-operand", f"`{option.name}` is a number, not {show(t)}", option.value.span)

    def _recorded(self, option: Option, scope: Scope) -> None:
        if isinstance(option.value, Apply) and option.value.function == "ids":
            return
        t = self._exprs.infer(option.value, scope)
        if not (types.fits(t, TEXT) or types.fits(t, ListOf(TEXT))) and not is_constant(option.value):
            self.error(
                "bad-recorded",
                f"`recorded` is not {show(t)}",
                option.span,
                help="write a string, a list of strings, or `ids(1, 2, 3)`",
            )

    # --- forks

    def _fork(self, fork: Fork, scope: Scope) -> Worst:
        own = self._limits(fork.options, "fork", scope)
        width = self._read(lambda: fork_width(fork), 1)
        if width is None:
            t = self._exprs.want(fork.width, scope, INT, "the width of a fork")
            width = self._dynamic("fork", own.upto, fork) if types.fits(t, INT) else 1
        elif own.upto is not None and width > own.upto:
            self.error(
                "count-above-width",
                f"the fork has {width} branches, more than `upto={own.upto}`",
                fork.width.span,
                help="leave `upto` out: the width is known",
            )
        elif width == 1:
            self.warn("fork-of-one", "a fork of one runs nothing side by side", self._head(fork.span))
        given = [(fork.index, INT)] if fork.index is not None else []
        arm, worst = self._arm(fork, fork.body, scope, 0, given, own, self._head(fork.span))
        return self._join(fork, fork.join, [arm], width, own, worst.times(width), scope)

    def _branches(self, fork: Branches, scope: Scope) -> Worst:
        own = self._limits(fork.options, "branches", scope)
        width = len(fork.branches)
        if width == 0:
            self.error("empty-fork", "this fork has no branches", self._head(fork.span))
        elif width == 1:
            self.warn("fork-of-one", "a fork of one runs nothing side by side", self._head(fork.span))
        elif width > MAX_WIDTH:
            self.error("option-range", f"the width of a fork is at most {MAX_WIDTH}", self._head(fork.span))
        arms: list[_Arm] = []
        labels: set[str] = set()
        mixed = False
        total = NOTHING
        for i, branch in enumerate(fork.branches):
            span = self._name_span(branch.span, branch.label)
            if branch.label is not None and branch.label in labels:
                self.error("bound-twice", f"two branches are labelled `{branch.label}`", span)
            elif (branch.label is None) != (fork.branches[0].label is None) and not mixed:
                mixed = True
                self.error(
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
        arm, worst = self._arm(fork, fork.body, scope, 0, given, own, self._head(fork.span))
        return self._join(fork, fork.join, [arm], most, own, worst.times(most), scope)

    def _reduce(self, stmt: Reduce, scope: Scope) -> Worst:
        own = self._limits(stmt.options, "reduce", scope)
        elem, most = self._over(stmt, "reduce", own, scope)
        by = self._quiet(lambda: reduce_by(stmt.options), 2)
        # Later levels merge what the body yields, whose type is that of the items or the levels would differ.
        arm, worst = self._arm(stmt, stmt.body, scope, 0, [(stmt.item, ListOf(elem, by))], own, self._head(stmt.span))
        if not types.fits(arm.value, elem):
            self.error(
                "reduce-type",
                f"`reduce` merges {show(elem)} into {show(arm.value)}, which the next level cannot merge",
                self._head(stmt.span),
                help=f"return {show(elem)} from the body",
            )
        value = types.merge(elem, arm.value)
        worst = worst.times(reduce_groups(most, by))
        if own.budget is not None:
            self._budget_below(stmt.options, own.budget, worst.fixed)
            worst = worst.within(own.budget)
        self.most[id(stmt)] = most
        self._fallback(own, value, "reduce", scope)
        self._joins.append((self._bind(stmt, value, scope), self._head(stmt.span), "reduce"))
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
                self.error("wrong-operand", f"`{what}` goes over a list, not {show(t)}", stmt.over.span)
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
        self.error(
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
    ) -> tuple[_Arm, Worst]:
        """Walk one branch."""
        inner = Scope(scope, "thread", ("branch", id(stmt), i))
        for name, t in given:
            self.define(name, t, span, inner)
        around = self._threads[-1].budget
        value, worst = self._thread(body, inner, around if own.budget is None else own.budget)
        names = frozenset(name for name, _ in given)
        return _Arm(body, inner, value, names, None, span, own.fresh), worst.times(1 + own.retry)

    def _limits(self, options: Sequence[Option], kind: str, scope: Scope, outer: int | None = None) -> Limits:
        """The options of a statement that bounds; `outer`: the budget of the fork around a branch."""
        own = self._read(lambda: limits(options, kind=kind), Limits())
        by_name = {option.name: option for option in options}
        around = self._threads[-1].budget if outer is None else outer
        if own.budget is not None and around is not None and own.budget > around:
            self.error(
                "budget-above-parent",
                f"a budget of {own.budget} inside one of {around}",
                by_name["budget"].span,
                help=f"at most {around} can be spent here",
            )
            own = replace(own, budget=around)
        if own.deadline_s is not None and self.target.deterministic:
            self.error(
                "wall-clock",
                "a deadline depends on the wall clock, which a deterministic run does not read",
                by_name["deadline"].span,
                help="bound the tokens with `budget=`, or run without `--deterministic`",
            )
        return own

    # --- joins

    def _join(
        self,
        stmt: Fork | Branches | Map,
        join: Join | None,
        arms: Sequence[_Arm],
        width: int,
        own: Limits,
        worst: Worst,
        scope: Scope,
    ) -> Worst:
        """Check how a fork ends, and bind its name. `width`: the most branches there can be."""
        what = "map" if isinstance(stmt, Map) else "fork"
        self.most[id(stmt)] = width
        spec = self._read(lambda: join_spec(join), JoinSpec())
        span = self._join_span(stmt, join)
        if spec.count is not None and spec.count > width and width > 0:
            shown = (
                f"all(min={spec.count})"
                if spec.kind == "all"
                else f"{spec.kind}({spec.count}{', ...' * (spec.kind == 'quorum')})"
            )
            self.error(
                "count-above-width",
                f"`{shown}` needs {spec.count} branches, and the {what} has at most {width}",
                span,
                help=f"ask for {width} or fewer",
            )
        if spec.context == "stitch":
            self._stitch(join, arms, width)
        value = self._join_value(spec, join, arms, width, span)
        if own.budget is not None:
            self._budget_below(stmt.options, own.budget, worst.fixed)
            worst = worst.within(own.budget)
        self._fallback(own, value, what, scope)
        binding = self._bind(stmt, value, scope)
        if spec.context == "drop":
            self._joins.append((binding, self._head(stmt.span), what))
        return worst

    def _join_span(self, stmt: Fork | Branches | Map, join: Join | None) -> Span:
        if join is None:
            return self._head(stmt.span)
        return join.span if join.value is None else join.value.span

    def _stitch(self, join: Join | None, arms: Sequence[_Arm], width: int) -> None:
        context = join.context.span if join is not None and join.context is not None else NOWHERE
        fresh = next((arm for arm in arms if arm.fresh), None)
        if fresh is not None:
            self.error(
                "stitch-fresh",
                "a fresh branch cannot be stitched: it was written without the parent's context",
                context,
                help="join with `text`, or leave `fresh=true` out",
            )
        if not self.target.stitch_many and stitches_several(join, width):
            self.error(
                "stitch-many",
                f"`{self.target.name}` cannot stitch several branches into one context",
                context,
                help="join with `text`, or stitch a single winner: `first(1)`, `vote(x)`, `best(x)`",
            )

    def _join_value(self, spec: JoinSpec, join: Join | None, arms: Sequence[_Arm], width: int, span: Span) -> Type:
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
                self.warn(
                    "vote-on-text",
                    f"`{spec.kind}` on free text: two answers that mean the same are seldom equal",
                    span,
                    help=f"compare with `by=casefold` or `by=number`, or give `{spec.key}` a type such as `int`",
                )
            return key_type
        if spec.kind == "best" and spec.key != "logprob":
            key_type = self._key(spec, arms, span)
            if not types.is_number(key_type):
                self.error(
                    "best-key",
                    f"`best({spec.key})` compares numbers, and `{spec.key}` is {show(key_type)}",
                    span,
                    help="bind it with `gen(type=int)` or `gen(type=float)`, or use `best(logprob)`",
                )
        first = arms[0].value
        for arm in arms[1:]:
            if not types.comparable(first, arm.value):
                self.error(
                    "branch-types",
                    f"`{spec.kind}` picks among branches that return different types",
                    arm.span,
                    note=f"returns {show(arm.value)}, the first branch {show(first)}",
                    help="return one type from every branch",
                )
                return ANY
        value = _merged(arms)
        return ListOf(value, spec.count) if spec.kind == "first" and spec.count != 1 else value

    def _key(self, spec: JoinSpec, arms: Sequence[_Arm], span: Span) -> Type:
        """The type of the join's key, which every branch must bind on every path."""
        key = spec.key or ""
        shown = f"quorum({spec.count}, {key})" if spec.kind == "quorum" else f"{spec.kind}({key})"
        found: Type | None = None
        paths = [key_paths(arm.body, key) for arm in arms]
        example = next((path.gen for path in paths if path.gen is not None), None)
        for arm, path in zip(arms, paths, strict=True):
            if key not in arm.given and not path.always:
                one_body = len(arms) == 1 and arm.label is None
                self.error(
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
                self.error(
                    "key-type",
                    f"`{shown}` compares values of different types",
                    arm.span,
                    note=f"binds `{key}` to {show(t)}, another branch to {show(found)}",
                    help=f"give `{key}` one type in every branch",
                )
                return ANY
        return ANY if found is None else found

    def _fallback(self, own: Limits, value: Type, what: str, scope: Scope) -> None:
        if own.fallback is None:
            return
        t = self._exprs.infer(own.fallback, scope)
        if not types.fits(t, value):
            self.error(
                "fallback-type",
                f"the fallback is {show(t)}, and the {what} yields {show(value)}",
                own.fallback.span,
                help="give a value of the type that the join yields",
            )

    def _budget_below(self, options: Sequence[Option], budget: int, worst: int) -> None:
        if budget < worst:
            option = next(o for o in options if o.name == "budget")
            self.warn(
                "budget-below-worst",
                f"a budget of {budget} is less than the {worst} tokens that may be decoded",
                option.span,
                help="branches that run out of it end as truncated; raise it, or lower a `max`",
            )

    # --- loops, arms, calls

    def _loop(self, loop: Loop, scope: Scope) -> Worst:
        rounds = self._read(lambda: loop_rounds(loop), 1)
        inner = Scope(scope, "loop")
        worst = self._block(loop.body, inner)
        if loop.until is not None:
            self._exprs.want(loop.until, inner, BOOL, "what `until` asks for")
        for name, binding in inner.names.items():
            # What was rebound is seen after the loop under its first binding, which `also` leads on from.
            if scope.clash(name) is None:
                scope.names[name] = binding
        return worst.times(rounds)

    def _if(self, stmt: If, scope: Scope) -> Worst:
        self._exprs.want(stmt.cond, scope, BOOL, "the condition of `if`")
        then = Scope(scope, "arm", ("arm", id(stmt), 0))
        worst = self._block(stmt.then, then)
        if stmt.orelse is None:
            return worst
        orelse = Scope(scope, "arm", ("arm", id(stmt), 1))
        worst = worst.either(self._block(stmt.orelse, orelse))
        for name, one in then.names.items():
            other = orelse.names.get(name)
            if other is None or scope.lookup(name) is not None:
                continue
            if not types.comparable(one.type, other.type):
                self.error(
                    "arm-types",
                    f"`{name}` is {show(one.type)} in one arm and {show(other.type)} in the other",
                    self._head(stmt.span) if other.span is None else other.span,
                    help="bind it with one type in both, or use two names",
                )
            scope.names[name] = Binding(name, types.merge(one.type, other.type), other.span, also=[one, other])
        return worst

    def _call(self, call: Call, scope: Scope) -> Worst:
        own = self._limits(call.options, "call", scope)
        span = self._head(call.span)
        arg_types = [self._exprs.infer(arg.value, scope) for arg in call.args]
        worst = NOTHING
        value: Type = ANY
        if call.plan == self._plan.name:
            if self._depth == 0:
                self.error(
                    "recursion-without-depth",
                    f"the plan `{call.plan}` calls itself, and its depth has no bound",
                    span,
                    help=f"write `{call.plan} = plan(..., depth=3)`",
                )
            worst = Worst(0, 1)
        elif call.plan in self.value_types:
            value = self.value_types[call.plan]
            worst = Worst(self.worst_tokens[call.plan])
        elif call.plan in self._plan_names:
            self.error(
                "plan-order",
                f"the plan `{call.plan}` is defined further down",
                span,
                help=f"a plan calls plans above it, or itself: move `{call.plan}` up",
            )
        else:
            self.error(
                "unknown-plan",
                f"there is no plan `{call.plan}`",
                span,
                help=did_you_mean(call.plan, self._plan_names),
            )
        callee = next((plan for plan in self.program.plans if plan.name == call.plan), None)
        if callee is not None:
            self._arguments(call, callee, arg_types, span)
            self._callee_budget(call, callee, own)
        worst = worst.times(1 + own.retry)
        if own.budget is not None:
            self._budget_below(call.options, own.budget, worst.fixed)
            worst = worst.within(own.budget)
        self._fallback(own, value, "plan", scope)
        self._joins.append((self._bind(call, value, scope), span, "call"))
        return worst

    def _callee_budget(self, call: Call, callee: PlanDef, own: Limits) -> None:
        around = self._threads[-1].budget if own.budget is None else own.budget
        inner = self._quiet(lambda: limits(callee.options, kind="plan").budget, None)
        if around is not None and inner is not None and inner > around and callee is not self._plan:
            self.error(
                "budget-above-parent",
                f"the plan `{callee.name}` has a budget of {inner}, and is called inside one of {around}",
                self._head(call.span),
                help=f"at most {around} can be spent here",
            )

    def _arguments(self, call: Call, callee: PlanDef, arg_types: Sequence[Type], span: Span) -> None:
        names = [param.name for param in callee.params]
        wanted = {
            param.name: self._quiet(lambda: types.of_bound(param.bound), ANY)  # noqa: B023 - called at once
            for param in callee.params
        }
        places = iter(names)
        given: set[str] = set()
        for arg, t in zip(call.args, arg_types, strict=True):
            name = arg.name if arg.name is not None else next(places, None)
            if name is None or name not in wanted:
                self._stray_argument(callee, arg, name, names)
                continue
            if name in given:
                self.error("bad-call", f"`{name}` is given twice", arg.span)
            given.add(name)
            if not types.fits(t, wanted[name]):
                self.error(
                    "argument-type",
                    f"`{name}` of `{callee.name}` is {show(wanted[name])}, not {show(t)}",
                    arg.value.span,
                )
        missing = [name for name in names if name not in given]
        if missing:
            listed = ", ".join(f"`{name}`" for name in missing)
            self.error(
                "bad-call",
                f"`{callee.name}` is called without {listed}",
                span,
                help=f"write `{callee.name}({', '.join(names)})`",
            )

    def _stray_argument(self, callee: PlanDef, arg: Arg, name: str | None, names: Sequence[str]) -> None:
        if name is None:
            message = f"`{callee.name}` takes {len(names)} argument{'s' if len(names) != 1 else ''}"
            self.error("bad-call", message, arg.span, help=f"write `{callee.name}({', '.join(names)})`")
        else:
            near = did_you_mean(name, names)
            self.error("bad-call", f"`{callee.name}` has no parameter `{name}`", arg.span, help=near)

    def _expand(self, stmt: Expand, scope: Scope) -> Worst:
        if stmt.prompt is not None:
            self._exprs.infer(stmt.prompt, scope)
        self.error(
            "expand-unavailable",
            "`expand` is not available in this version",
            self._head(stmt.span),
            help="write out the branches it should make, with `fork` or `map`",
        )
        self._bind(stmt, ANY, scope)
        return NOTHING


def _merged(arms: Sequence[_Arm]) -> Type:
    value = arms[0].value
    for arm in arms[1:]:
        value = types.merge(value, arm.value)
    return value


def _place(diagnostic: Diagnostic) -> tuple[int, int]:
    span = diagnostic.span
    return (0, 0) if span is None else (span.start, span.end)
