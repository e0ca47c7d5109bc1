"""What a thread's context looks like at each statement, on every path: its open chat role, and whether its last
token has logits that a `gen` without a prompt can draw from.

    state = (role, last)
    role  = none        no turn was written: plain text
          | closed      the last turn is whole; the next `text`, `gen` or `fork` opens the assistant's
          | assistant   the assistant's turn is open
    last  = ready       a token whose logits are known
          | stitched    several branches side by side: no one token is the last
          | empty       nothing, and no start token

A block takes a set of states to a set of states; since there are nine states and a block's result for one is
remembered, the walk is linear in the plan's text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, assert_never

from anabranch.dsl.ast import (
    Block,
    Bool,
    Branch,
    Branches,
    Call,
    Expand,
    Expr,
    Fork,
    Gen,
    If,
    Join,
    Let,
    Loop,
    Map,
    Need,
    PlanDef,
    Program,
    Reduce,
    Return,
    Stmt,
    Write,
)
from anabranch.dsl.diagnostics import Diagnostic, PlanError, Span
from anabranch.dsl.options import const_int, is_constant, literal

Role: TypeAlias = Literal["none", "closed", "assistant"]
Last: TypeAlias = Literal["ready", "stitched", "empty"]
State: TypeAlias = tuple[Role, Last]
States: TypeAlias = frozenset[State]

_NONE: States = frozenset()


@dataclass(frozen=True, slots=True)
class _Exits:
    """The states in which a block is left: at its end, and at its returns."""

    end: States = _NONE
    returned: States = _NONE

    def __or__(self, other: _Exits) -> _Exits:
        return _Exits(self.end | other.end, self.returned | other.returned)

    @property
    def all(self) -> States:
        return self.end | self.returned


@dataclass(frozen=True, slots=True)
class _Arm:
    body: Block
    prompt: Expr | None
    fresh: bool
    span: Span


class Flow:
    """Walks the plans of a program. `most`: the most branches of a fork or map, by the statement's id.

    start_token: whether an empty view begins with one; None where no model is known, and then what needs to know
    is not told and `asked_start_token` is set.
    """

    def __init__(self, program: Program, most: Mapping[int, int], start_token: bool | None) -> None:
        self._plans = {plan.name: plan for plan in program.plans}
        self._program = program
        self._most = most
        self._start_token = start_token
        self._seen: dict[tuple[int, State], _Exits] = {}
        self._calls: list[tuple[str, State]] = []
        self._found: dict[tuple[str, int], Diagnostic] = {}
        self.asked_start_token = False

    def run(self) -> Iterator[Diagnostic]:
        """What is wrong, once for each statement."""
        called = {stmt.plan for plan in self._program.plans for stmt in _calls(plan)}
        start: State = ("none", "empty" if self._start_token is not True else "ready")
        # A plan that another calls may count on its caller's context, so it need not stand alone.
        waiting = [(p.name, start) for p in self._program.plans if p.name not in called or p is self._program.plans[-1]]
        done: set[tuple[str, State]] = set()
        while waiting:
            name, state = waiting.pop()
            if (name, state) in done or name not in self._plans:
                continue
            done.add((name, state))
            self._block(self._plans[name].body, frozenset({state}))
            waiting.extend(self._calls)
            self._calls.clear()
        yield from self._found.values()

    def _block(self, block: Block, states: States) -> _Exits:
        exits = _Exits()
        for state in states:
            key = (id(block), state)
            if key not in self._seen:
                # A block is never inside itself, so this is not read before it is complete.
                self._seen[key] = self._statements(block, state)
            exits |= self._seen[key]
        return exits

    def _statements(self, block: Block, state: State) -> _Exits:
        states: States = frozenset({state})
        returned: States = _NONE
        for place, stmt in enumerate(block.stmts):
            following = block.stmts[place + 1] if place + 1 < len(block.stmts) else None
            exits = self._statement(stmt, states, following)
            states, returned = exits.end, returned | exits.returned
            if not states:
                break
        return _Exits(states, returned)

    def _statement(self, stmt: Stmt, states: States, following: Stmt | None) -> _Exits:
        match stmt:
            case Write(role="text", value=value):
                states = _opened(states)
                held = isinstance(following, Gen) and following.prompt is None and literal(value) == " "
                return _Exits(states if literal(value) == "" or held else _ready(states))
            case Write():
                return _Exits(frozenset({("closed", "ready")}))
            case Gen(prompt=prompt, options=written):
                states = _opened(states)
                recorded = next((option.value for option in written if option.name == "recorded"), None)
                if recorded is not None:
                    # Nothing is drawn, so it needs no logits to draw from.
                    said = (prompt is not None and literal(prompt) not in ("", " ")) or literal(recorded) != ""
                    return _Exits(_ready(states) if said else states)
                if prompt is None or literal(prompt) in ("", " "):
                    self._continues(stmt, states)
                return _Exits(_ready(states))
            case Fork(body=body):
                arm = _Arm(body, None, _is_fresh(stmt), stmt.span)
                return _Exits(self._fork(stmt, stmt.join, (arm,), states))
            case Branches(branches=branches):
                arms = tuple(_Arm(b.body, b.prompt, _is_fresh(stmt) or _is_fresh(b), b.span) for b in branches)
                return _Exits(self._fork(stmt, stmt.join, arms, states))
            case Map(body=body):
                arm = _Arm(body, None, _is_fresh(stmt), stmt.span)
                return _Exits(self._fork(stmt, stmt.join, (arm,), states))
            case Reduce(body=body):
                arm = _Arm(body, None, _is_fresh(stmt), stmt.span)
                return _Exits(self._fork(stmt, None, (arm,), states))
            case Call(plan=plan):
                states = _opened(states)
                begin = self._fresh() if _is_fresh(stmt) else states
                self._calls.extend((plan, state) for state in begin)
                return _Exits(states)
            case Expand():
                return _Exits(_ready(_opened(states)))
            case Loop(body=body):
                exits, entered = _Exits(), _NONE
                while not states <= entered:
                    entered |= states
                    exits = self._block(body, entered)
                    states = exits.end
                return exits
            case If(then=then, orelse=orelse):
                other = self._block(orelse, states) if orelse is not None else _Exits(states)
                return self._block(then, states) | other
            case Return():
                return _Exits(returned=states)
            case Let() | Need():
                return _Exits(states)
            case _:
                assert_never(stmt)

    def _fork(
        self, stmt: Fork | Branches | Map | Reduce, join: Join | None, arms: tuple[_Arm, ...], states: States
    ) -> States:
        states = _opened(states)
        context = join.context.kind if join is not None and join.context is not None else "drop"
        ends: States = _NONE
        for arm in arms:
            begin = self._fresh() if arm.fresh else states
            if arm.prompt is not None and literal(arm.prompt) != "":
                begin = _ready(_opened(begin))
            exits = self._block(arm.body, begin)
            ends |= exits.all
            if context != "drop" and not arm.fresh:
                self._same_role(arm, states, exits.all, context)
        if context == "drop":
            return states
        failed = states if any(option.name == "fallback" for option in stmt.options) else _NONE
        if context == "text":
            return _ready(states) | failed
        if self._joins_several(stmt, join):
            return frozenset((role, "stitched") for role, _ in states) | failed
        roles = {role for role, _ in states}
        return frozenset((role, last) for role, last in ends if role in roles) | failed or states

    def _joins_several(self, stmt: Fork | Branches | Map | Reduce, join: Join | None) -> bool:
        """Whether a stitch may put several branches side by side."""
        return stitches_several(join, self._most.get(id(stmt), 2))

    def _same_role(self, arm: _Arm, parent: States, ends: States, context: str) -> None:
        roles = {role for role, _ in parent}
        for role, _ in sorted(ends):
            if role not in roles:
                how = {
                    "closed": "a whole turn, with no turn open",
                    "assistant": "an open assistant's turn",
                    "none": "plain text",
                }
                begin = " or ".join(how[r] for r in sorted(roles))
                self._tell(
                    Diagnostic(
                        "role-mismatch",
                        f"`{context}` needs branches to end in the role they began in",
                        arm.span,
                        f"begins in {begin} and may end in {how[role]}",
                        "write turns before the fork, or join with `drop`",
                    )
                )
                return

    def _continues(self, gen: Gen, states: States) -> None:
        lasts = {last for _, last in states}
        if "stitched" in lasts:
            self._tell(
                Diagnostic(
                    "nothing-to-continue",
                    "this `gen` has nothing to continue: the context ends in several branches side by side",
                    gen.span,
                    help='give it a prompt: `gen("...", max=...)`, or write `text("...")` before it',
                )
            )
        elif "empty" in lasts:
            if self._start_token is None:
                self.asked_start_token = True
            else:
                self._tell(
                    Diagnostic(
                        "nothing-to-continue",
                        "this `gen` has nothing to continue: the context is empty, and the model has no start token",
                        gen.span,
                        help='give it a prompt: `gen("...", max=...)`, or write `text("...")` before it',
                    )
                )

    def _fresh(self) -> States:
        return frozenset({("none", "ready" if self._start_token is True else "empty")})

    def _tell(self, diagnostic: Diagnostic) -> None:
        span = diagnostic.span
        self._found.setdefault((diagnostic.code, -1 if span is None else span.start), diagnostic)


def stitches_several(join: Join | None, most: int) -> bool:
    """Whether the join may alias more than one branch into the parent, of at most `most` branches."""
    if join is None or join.context is None or join.context.kind != "stitch" or most < 2:
        return False
    if join.value is None or join.value.kind == "all":
        return True
    count = join.value.count
    if join.value.kind != "first" or count is None:
        return False
    return not (is_constant(count) and _is_one(count))


def _is_one(expr: Expr) -> bool:
    try:
        return const_int(expr) == 1
    except PlanError:
        return False


def _is_fresh(stmt: Fork | Branches | Branch | Map | Reduce | Call) -> bool:
    return any(o.name == "fresh" and isinstance(o.value, Bool) and o.value.value for o in stmt.options)


def _opened(states: States) -> States:
    """The states after the assistant's turn is opened where none is open."""
    return frozenset(("assistant", last) if role == "closed" else (role, last) for role, last in states)


def _ready(states: States) -> States:
    return frozenset((role, "ready") for role, _ in states)


def _calls(plan: PlanDef) -> Iterator[Call]:
    waiting = [plan.body]
    while waiting:
        for stmt in waiting.pop().stmts:
            match stmt:
                case Call():
                    if stmt.plan != plan.name:
                        yield stmt
                case Fork(body=body) | Map(body=body) | Reduce(body=body) | Loop(body=body):
                    waiting.append(body)
                case Branches(branches=branches):
                    waiting.extend(branch.body for branch in branches)
                case If(then=then, orelse=orelse):
                    waiting.append(then)
                    if orelse is not None:
                        waiting.append(orelse)
                case _:
                    pass
