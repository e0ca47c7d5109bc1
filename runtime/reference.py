"""What a plan means, as plain code: lay every token of a run out in one list, and run the model over it once.

The plan's AST is interpreted as it stands, against the recorded events alone: a `GenEnded` says which tokens a `gen`
left, a `Joined` which branches had ended when the join closed, a `HostCalled` what a function of the caller returned,
a `BranchEnded` that a branch was cut off. All else is derived here anew: visibility, positions, branch values, votes,
loop exits and texts. An event that says otherwise is a `ReferenceMismatch`. There is no cache, page, batch or schedule.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, TypeVar, assert_never

import torch
from torch import Tensor

from anabranch.dsl import ast, options, values
from anabranch.dsl.sites import arm_prefix, sites
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
    Value,
)
from anabranch.runtime.chat import Chat, Role
from anabranch.runtime.config import ModelConfig
from anabranch.runtime.dense import dense_forward
from anabranch.runtime.events import (
    BranchEnded,
    BranchStarted,
    Event,
    GenEnded,
    HostCalled,
    Joined,
    LogitsRow,
    Path,
    RunEnded,
    Status,
    TextDelta,
)
from anabranch.runtime.layout import Claim, Draw, Forced, Layout, LayoutBuilder
from anabranch.runtime.tokenizer import Piece, Tokenizer
from anabranch.runtime.verdict import Branch, Undecided, Verdict, decide

Evaluated = TypeVar("Evaluated")
AwaitedEvent = TypeVar("AwaitedEvent", GenEnded, HostCalled, Joined)


class ReferenceMismatch(Exception):
    """The run's events, or the engine's logits, are not what the plan means. `path` names the thread."""

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what
        super().__init__(f"at {' / '.join(path) or 'the plan itself'}: {what}")


def lay_out(
    program: ast.Program,
    plan: str | None,
    inputs: Mapping[str, Value],
    events: Iterable[Event],
    tokenizer: Tokenizer,
    chat: Chat,
    *,
    drawn: Mapping[tuple[Path, int], int] | None = None,
) -> Layout:
    """Every token of one run, with its position and its view.

    events: of this run alone, in order
    drawn: the id of each draw by (thread's path, index), from a trace; without it, tokens that were drawn and trimmed
        again are left out, since events do not hold them
    Raises ReferenceMismatch where the events contradict the plan.
    """
    return _Run(program, plan, inputs, events, tokenizer, chat, drawn or {}).lay_out()


def dense_logits(
    layout: Layout, config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float64
) -> Tensor:
    """The logits of every token of `layout`, [num_tokens, vocab] in `dtype`. Raises ValueError if there is none."""
    if not layout.tokens:
        raise ValueError("the layout holds no token")
    visible, shifts = layout.visibility()
    ids = torch.tensor([token.id for token in layout.tokens])
    positions = torch.tensor([token.position for token in layout.tokens])
    return dense_forward(ids, positions, visible, shifts, config, weights, dtype)


@dataclass(frozen=True, slots=True)
class Report:
    """What `check_run` compared. `worst`: the largest absolute difference of a logit, at `worst_at`."""

    layout: Layout
    num_rows: int
    num_logprobs: int
    worst: float
    worst_at: tuple[Path, int] | None


def check_run(
    program: ast.Program,
    plan: str | None,
    inputs: Mapping[str, Value],
    events: Iterable[Event],
    tokenizer: Tokenizer,
    chat: Chat,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    rows: Sequence[LogitsRow],
    *,
    tolerance: float,
    logprob_tolerance: float = 1e-5,
    dtype: torch.dtype = torch.float64,
) -> Report:
    """Law 1: forced to the engine's own tokens, the reference gives the engine's logits.

    rows: one for each token the engine drew
    tolerance: largest absolute difference of a logit
    logprob_tolerance: the same of a log-probability, which the engine computes in fp32 whatever the model's dtype
    Raises ReferenceMismatch naming the thread and the draw.
    """
    drawn = {(row.path, row.index): row.token for row in rows}
    if len(drawn) != len(rows):
        raise ReferenceMismatch((), "two traced rows have one path and index, so two draws shared their noise")
    layout = lay_out(program, plan, inputs, events, tokenizer, chat, drawn=drawn)
    unasked = drawn.keys() - layout.draws.keys()
    if unasked:
        path, index = min(unasked)
        raise ReferenceMismatch(path, f"the engine drew a token {index} that the plan does not ask for")
    if not layout.tokens:
        return Report(layout, 0, 0, 0.0, None)
    logits = dense_logits(layout, config, weights, dtype)
    worst, worst_at = 0.0, None
    for row in rows:
        draw = layout.draws[row.path, row.index]
        difference = float((row.logits.to(dtype) - logits[draw.after]).abs().max())
        # Written so that a NaN is a mismatch too.
        if not difference <= tolerance:
            raise ReferenceMismatch(
                row.path, f"the logits of draw {row.index} differ by {difference:.3g}, tolerated is {tolerance:.3g}"
            )
        if difference >= worst:
            worst, worst_at = difference, (row.path, row.index)
    scores = torch.log_softmax(logits, dim=-1)
    for draw, logprob in layout.logprobs:
        expected = float(scores[draw.after, draw.token])
        if not abs(expected - logprob) <= logprob_tolerance:
            raise ReferenceMismatch(
                draw.path, f"the log-probability of draw {draw.index} is {logprob!r}, the reference has {expected!r}"
            )
    for claim in layout.claims:
        _check_claim(claim, scores, logprob_tolerance)
    return Report(layout, len(rows), len(layout.logprobs), worst, worst_at)


def _check_claim(claim: Claim, scores: Tensor, tolerance: float) -> None:
    """scores: [num_tokens, vocab], log-probabilities after each token."""
    totals = {}
    for index, candidate in claim.candidates.items():
        total = sum(float(scores[after, token]) for after, token in candidate)
        totals[index] = total / len(candidate) if claim.mean else total
    best = max(totals.values())
    if not any(totals[index] >= best - tolerance for index in claim.chosen):
        raise ReferenceMismatch(
            claim.path, f"{claim.what} chose {claim.chosen}, the log-probabilities of the reference are {totals}"
        )


def _continues(stmt: ast.Stmt | None) -> bool:
    """Whether a gen without a prompt stands here, so that a space just before it is held back."""
    return isinstance(stmt, ast.Gen) and stmt.prompt is None


def _without_held(text: str, held: bool) -> str:
    """The text of a gen before which a space was held back: if it begins with that space, the rest."""
    return text[1:] if held and text.startswith(" ") else text


def _read(kind: GenType, text: str) -> Value:
    """The value that `text` stands for. Raises ValueError if it is none of its type."""
    match kind:
        case TextType() | RegexType():
            return text
        case ChoiceType():
            return kind.options[kind.options.index(text)]
        case IntType():
            return int(text)
        case FloatType():
            return float(text)
        case BoolType():
            return (False, True)[("false", "true").index(text)]
        case LinesType():
            lines = text.split("\n")
            if not kind.least <= len(lines) <= kind.most or not all(lines):
                raise ValueError(f"{len(lines)} lines")
            return lines
        case JsonType():
            return json.loads(text)
        case _:
            assert_never(kind)


def _without_last_character(pieces: Sequence[Piece]) -> list[Piece]:
    kept = [piece for piece in pieces if piece[0]]
    text, is_literal = kept.pop()
    return [*kept, (text[:-1], is_literal)]


class _Failed(Exception):
    """The thread fails here: a false `need`, a value that cannot be had, a join that cannot be met."""


class _Unmet(Exception):
    """A join cannot be met: its fallback's turn."""


class _CutOff(Exception):
    """The thread was stopped from outside: the events hold no more of it."""


class _Returned(Exception):
    def __init__(self, value: Value) -> None:
        self.value = value
        super().__init__()


@dataclass(slots=True)
class _Thread:
    """A context on its way through a plan.

    path: as in `BranchStarted`; rounds: the loops it is inside, in events' paths
    view: what it sees besides its open segment; the first `inherited` entries were its parent's
    position: of its next token
    role: None before any turn of a chat, "between" turns, or "assistant" while that turn is open
    last: the token whose logits the next draw reads
    interpolated: a value was written since its last event. One that is longer than the compiler counted on fails the
        branch, and only the events tell that
    num_drawn: tokens drawn in it
    num_decoded: with those of its branches that its joins found ok, and of its tries before
    draws: (after, token id) of each token drawn in it that is known
    """

    path: Path
    view: list[tuple[int, int]]
    inherited: int
    position: int
    role: Literal["between", "assistant"] | None
    last: int | None
    rounds: Path = ()
    segment: int | None = None
    space_held: bool = False
    interpolated: bool = False
    num_drawn: int = 0
    num_decoded: int = 0
    text: list[str] = field(default_factory=list)
    draws: list[tuple[int, int]] = field(default_factory=list)

    @property
    def at(self) -> Path:
        """The path of what happens in it now."""
        return self.path + self.rounds


@dataclass(frozen=True, slots=True)
class _Arm:
    """A branch as written.

    key: its number in the path of its thread
    names: what it binds at its start
    alone: it sees no name of the parent
    """

    key: int
    label: str | None
    prompt: ast.Expr | None
    body: ast.Block
    names: Mapping[str, Value]
    limits: Limits = field(default_factory=Limits)
    alone: bool = False


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a branch ended. `thread`: of its last try, with the tokens of all; None if it never began."""

    status: Status
    value: Value = None
    names: Mapping[str, Value] = field(default_factory=dict)
    thread: _Thread | None = None


Scope: TypeAlias = dict[str, Value]


class _Run:
    def __init__(
        self,
        program: ast.Program,
        plan: str | None,
        inputs: Mapping[str, Value],
        events: Iterable[Event],
        tokenizer: Tokenizer,
        chat: Chat,
        drawn: Mapping[tuple[Path, int], int],
    ) -> None:
        self.program = program
        self.plan = program.plan(plan)
        self.inputs = inputs
        self.tokenizer = tokenizer
        self.chat = chat
        self.drawn = drawn
        self.build = LayoutBuilder()
        self.started: set[Path] = set()
        self.ended: dict[Path, BranchEnded] = {}
        self.run_ended: RunEnded | None = None
        self.gens: defaultdict[Path, deque[GenEnded]] = defaultdict(deque)
        self.calls: defaultdict[Path, deque[HostCalled]] = defaultdict(deque)
        self.joins: defaultdict[Path, deque[Joined]] = defaultdict(deque)
        for event in events:
            self._file(event)

    def _file(self, event: Event) -> None:
        match event:
            case GenEnded():
                self.gens[event.path].append(event)
            case HostCalled():
                self.calls[event.path].append(event)
            case Joined():
                self.joins[event.path].append(event)
            case BranchStarted():
                if event.path in self.started:
                    raise ReferenceMismatch(event.path, "the branch started twice")
                self.started.add(event.path)
            case BranchEnded():
                if event.path in self.ended:
                    raise ReferenceMismatch(event.path, "the branch ended twice")
                self.ended[event.path] = event
            case RunEnded():
                self.run_ended = event
            case TextDelta():
                pass
            case _:
                assert_never(event)

    def lay_out(self) -> Layout:
        # The plans being called, the innermost last, each with how often it has called itself to come there.
        self.called: list[tuple[str, int]] = [(self.plan.name, 0)]
        thread = self._begin((), None)
        scope = dict(self.inputs)
        outcome = self._conclude(thread, self.plan, self.plan.body, scope)
        if self.run_ended is not None:
            self._same((), "the run's status", self.run_ended.status, outcome.status)
            if outcome.status == "ok":
                self._same((), "the run's value", self.run_ended.value, outcome.value)
        for name, left in (("gen", self.gens), ("host call", self.calls), ("join", self.joins)):
            for path, queue in left.items():
                if queue:
                    raise ReferenceMismatch(
                        path, f"the events hold a {name} that the plan does not come to: {queue[0]}"
                    )
        return self.build.finish(outcome.status, outcome.value)

    # --- threads

    def _begin(self, path: Path, parent: _Thread | None) -> _Thread:
        """A thread that sees what `parent` does, or nothing but a start token."""
        if parent is not None:
            view = list(parent.view)
            return _Thread(path, view, len(view), parent.position, parent.role, parent.last)
        thread = _Thread(path, [], 0, 0, None, None)
        if self.tokenizer.bos_id is not None:
            self._feed(thread, self.tokenizer.bos_id)
        return thread

    def _conclude(
        self, thread: _Thread, plan: ast.PlanDef, body: ast.Block, scope: Scope, prompt: ast.Expr | None = None
    ) -> _Outcome:
        """Run `body` to its end in `thread`, and hold the outcome against the thread's `BranchEnded`."""
        recorded = self.ended.get(thread.path)
        status: Status = "ok"
        value: Value = None
        reason = ""
        try:
            if prompt is not None:
                first = body.stmts[0] if body.stmts else None
                self._say(thread, self._pieces(thread, prompt, scope), hold_space=_continues(first))
            self._block(thread, plan, body, scope)
            value = "".join(thread.text)
        except _Returned as returned:
            value = returned.value
        except _Failed as failed:
            status, reason = "failed", str(failed)
        except _CutOff as cut:
            status, reason = (recorded.status if recorded is not None else "cancelled"), str(cut)
            if status == "ok" or (status == "failed" and not thread.interpolated):
                why = f" ({recorded.reason})" if recorded is not None and recorded.reason else ""
                raise ReferenceMismatch(thread.path, f"it ended {status}{why}, but {reason}") from None
        if recorded is None:
            if thread.path in self.started and self.run_ended is not None:
                raise ReferenceMismatch(thread.path, "it never ended")
        elif recorded.status == "failed" and status == "ok" and thread.interpolated:
            status, reason = "failed", recorded.reason
        elif recorded.status != status:
            # A branch may be cut off at any moment, also when it had just come to its own end.
            if recorded.status not in ("cancelled", "late"):
                raise ReferenceMismatch(
                    thread.path,
                    f"it ended {recorded.status} ({recorded.reason}), the plan says {status}: {reason or value!r}",
                )
            status = recorded.status
        elif status == "ok":
            self._same(thread.path, "its value", recorded.value, value)
            self._same(thread.path, "its text", recorded.text, "".join(thread.text))
        return _Outcome(status, value if status == "ok" else None, scope, thread)

    def _same(self, path: Path, what: str, recorded: object, derived: object) -> None:
        if type(recorded) is not type(derived) or recorded != derived:
            raise ReferenceMismatch(path, f"{what} is {recorded!r} in the events, {derived!r} by the plan")

    def _feed(self, thread: _Thread, token_id: int) -> int:
        if thread.segment is None:
            thread.segment = self.build.open(thread.path, tuple(thread.view))
        thread.last = self.build.append(thread.segment, token_id, thread.position)
        thread.position += 1
        return thread.last

    def _seal(self, thread: _Thread) -> None:
        """The open segment joins the view; what the thread writes next starts another."""
        if thread.segment is not None:
            thread.view.append((thread.segment, 0))
            thread.segment = None

    def _next(self, queues: Mapping[Path, deque[AwaitedEvent]], thread: _Thread, what: str) -> AwaitedEvent:
        queue = queues.get(thread.at)
        if not queue:
            raise _CutOff(f"the events hold no {what} at {' / '.join(thread.at)}")
        thread.interpolated = False
        return queue.popleft()

    # --- statements

    def _block(self, thread: _Thread, plan: ast.PlanDef, block: ast.Block, scope: Scope, prefix: str = "") -> None:
        names = sites(block, prefix)
        for place, stmt in enumerate(block.stmts):
            following = block.stmts[place + 1] if place + 1 < len(block.stmts) else None
            self._statement(thread, plan, stmt, names[place], place, following, scope)

    def _statement(
        self,
        thread: _Thread,
        plan: ast.PlanDef,
        stmt: ast.Stmt,
        site: str,
        place: int,
        following: ast.Stmt | None,
        scope: Scope,
    ) -> None:
        match stmt:
            case ast.Write():
                if stmt.role == "text":
                    self._say(thread, self._pieces(thread, stmt.value, scope), hold_space=_continues(following))
                else:
                    self._write_turn(thread, stmt.role, self._pieces(thread, stmt.value, scope))
            case ast.Gen():
                self._gen(thread, stmt, options.gen_spec(stmt, plan), site, scope)
            case ast.Fork():
                width = self._integer(thread, stmt.width, scope)
                arms = [_Arm(i, None, None, stmt.body, {stmt.index: i} if stmt.index else {}) for i in range(width)]
                limits = options.limits(stmt.options, kind="fork")
                value = self._fork(thread, plan, site, arms, options.join_spec(stmt.join), limits, scope)
                self._bind(scope, stmt.name, value)
            case ast.Branches():
                arms = [
                    _Arm(i, branch.label, branch.prompt, branch.body, {}, options.limits(branch.options, kind="branch"))
                    for i, branch in enumerate(stmt.branches)
                ]
                limits = options.limits(stmt.options, kind="branches")
                value = self._fork(thread, plan, site, arms, options.join_spec(stmt.join), limits, scope)
                self._bind(scope, stmt.name, value)
            case ast.Map():
                items = self._list(thread, stmt.over, scope)
                arms = [
                    _Arm(i, None, None, stmt.body, {stmt.item: item} | ({stmt.index: i} if stmt.index else {}))
                    for i, item in enumerate(items)
                ]
                limits = options.limits(stmt.options, kind="map")
                value = self._fork(thread, plan, site, arms, options.join_spec(stmt.join), limits, scope)
                self._bind(scope, stmt.name, value)
            case ast.Reduce():
                limits = options.limits(stmt.options, kind="reduce")
                value = self._or_fallback(
                    thread, limits, scope, lambda: self._reduce(thread, plan, stmt, site, limits, scope)
                )
                self._bind(scope, stmt.name, value)
            case ast.Loop():
                self._loop(thread, plan, stmt, site, scope)
            case ast.If():
                if self._value(thread, stmt.cond, scope):
                    self._block(thread, plan, stmt.then, scope, arm_prefix(site, place, orelse=False))
                elif stmt.orelse is not None:
                    self._block(thread, plan, stmt.orelse, scope, arm_prefix(site, place, orelse=True))
            case ast.Need():
                if not self._value(thread, stmt.cond, scope):
                    raise _Failed("a need is not met")
            case ast.Return():
                raise _Returned(self._value(thread, stmt.value, scope))
            case ast.Let():
                scope[stmt.name] = self._value(thread, stmt.value, scope)
            case ast.Call():
                self._bind(scope, stmt.name, self._call(thread, stmt, site, scope))
            case ast.Expand():
                raise ValueError("the reference does not lay out `expand`")
            case _:
                assert_never(stmt)

    def _value(self, thread: _Thread, expr: ast.Expr, scope: Scope) -> Value:
        return self._evaluated(thread, lambda call: values.evaluate(expr, scope, call))

    def _pieces(self, thread: _Thread, expr: ast.Expr, scope: Scope) -> tuple[Piece, ...]:
        """The text of a statement in parts: (text, whether special tokens in it count)."""
        pieces = self._evaluated(thread, lambda call: values.parts(expr, scope, call))
        thread.interpolated |= any(not is_literal for _, is_literal in pieces)
        return pieces

    def _evaluated(self, thread: _Thread, evaluate: Callable[[values.Call], Evaluated]) -> Evaluated:
        """Evaluate with the recorded results of the caller's functions. Raises _Failed."""
        stopped: list[Exception] = []

        def call(function: str, args: list[Value]) -> Value:
            # Whatever leaves this function counts as an error of the caller's, so what is not must be kept aside.
            try:
                event = self._next(self.calls, thread, f"call of `{function}`")
                self._same(thread.at, "the function that was called", event.function, function)
            except (_CutOff, ReferenceMismatch) as error:
                stopped.append(error)
                raise values.EvaluationError("stopped") from None
            if event.error:
                raise values.EvaluationError(event.error)
            return event.value

        try:
            return evaluate(call)
        except values.EvaluationError as error:
            if stopped:
                raise stopped[0] from None
            raise _Failed(error.reason) from None

    def _integer(self, thread: _Thread, expr: ast.Expr, scope: Scope) -> int:
        value = self._value(thread, expr, scope)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise _Failed(f"a fork of {value!r} branches")
        return value

    def _list(self, thread: _Thread, expr: ast.Expr, scope: Scope) -> list[Value]:
        value = self._value(thread, expr, scope)
        if not isinstance(value, list):
            raise _Failed(f"{value!r} is no list")
        return value

    def _bind(self, scope: Scope, name: str | None, value: Value) -> None:
        if name is not None:
            scope[name] = value

    def _loop(self, thread: _Thread, plan: ast.PlanDef, stmt: ast.Loop, site: str, scope: Scope) -> None:
        outside = thread.rounds
        for turn in range(options.loop_rounds(stmt)):
            thread.rounds = (*outside, f"{site}[{turn}]")
            self._block(thread, plan, stmt.body, scope)
            if stmt.until is not None and self._value(thread, stmt.until, scope):
                break
        thread.rounds = outside

    # --- text

    def _say(self, thread: _Thread, pieces: Sequence[Piece], *, hold_space: bool) -> None:
        """Write on the assistant's side; with `hold_space`, one trailing space is left to the gen that follows."""
        self._open_turn(thread)
        thread.space_held = hold_space and "".join(text for text, _ in pieces).endswith(" ")
        if thread.space_held:
            pieces = _without_last_character(pieces)
        self._encode(thread, pieces)
        thread.text.extend(text for text, _ in pieces)

    def _open_turn(self, thread: _Thread) -> None:
        """After a whole turn, open the assistant's."""
        if thread.role == "between":
            self._encode(thread, self.chat.open_assistant(first=False))
            thread.role = "assistant"

    def _write_turn(self, thread: _Thread, role: Role, content: Sequence[Piece]) -> None:
        """A whole turn. Only its content is text of the thread."""
        pieces = self.chat.turn(role, content, first=thread.role is None, open=thread.role == "assistant")
        self._encode(thread, pieces)
        thread.role = "between"
        thread.text.extend(text for text, _ in content)

    def _is_blank(self, thread: _Thread) -> bool:
        """Whether the context holds nothing but a start token."""
        return thread.position == (self.tokenizer.bos_id is not None)

    def _encode(self, thread: _Thread, pieces: Sequence[Piece]) -> None:
        for token_id in self.tokenizer.encode(pieces, start=self._is_blank(thread)):
            self._feed(thread, token_id)

    # --- gen

    def _gen(self, thread: _Thread, stmt: ast.Gen, spec: GenSpec, site: str, scope: Scope) -> None:
        if stmt.prompt is None:
            self._open_turn(thread)
        else:
            self._say(thread, self._pieces(thread, stmt.prompt, scope), hold_space=True)
        held, thread.space_held = thread.space_held, False
        forced: list[int] = []
        if spec.recorded is None:
            self._evaluate_sampling(thread, spec, scope)
        else:
            forced = self._forced(thread, spec, spec.recorded, scope)
            try:
                _read(spec.type, _without_held(self._text(forced), held))
            except ValueError:
                raise _Failed(f"what is recorded is no value of the type of `{site}`") from None
        if not self.gens.get(thread.at):
            self._lay_traced(thread)
        event = self._next(self.gens, thread, "gen")
        self._same(thread.at, "the gen's place", event.site, site)
        if event.drawn > spec.max_tokens:
            raise ReferenceMismatch(thread.at, f"`{site}` drew {event.drawn} tokens of at most {spec.max_tokens}")
        kind: Literal["recorded", "scored"] | None = None if spec.recorded is None else "recorded"
        if isinstance(spec.type, ChoiceType) and spec.type.by == "logprob" and event.end == "complete":
            self._lay_choices(thread, spec.type, event, held)
            kind = "scored"
        self._lay_tokens(thread, event, kind)
        text = self._text(event.ids)
        thread.text.append(text)
        self._same(thread.at, f"the text of `{site}`", event.text, _without_held(text, held))
        if spec.recorded is not None:
            self._same(thread.at, f"what `{site}` left in the context", event.ids, tuple(forced))
        match event.end:
            case "failed":
                raise _Failed(event.reason)
            case "truncated" | "cancelled":
                raise _CutOff(f"its gen `{site}` was {event.end}")
            case "max" | "stop" | "end_of_turn" | "complete" | "recorded":
                try:
                    value = _read(spec.type, event.text)
                except ValueError:
                    raise ReferenceMismatch(
                        thread.at, f"`{site}` yields {event.text!r}, which is no value of its type"
                    ) from None
                self._same(thread.at, f"the value of `{site}`", event.value, value)
                self._bind(scope, stmt.name, event.value)
            case _:
                assert_never(event.end)

    def _evaluate_sampling(self, thread: _Thread, spec: GenSpec, scope: Scope) -> None:
        """The options that may fail, or call a function of the caller; what they are does not matter here."""
        if isinstance(spec.type, ChoiceType) and spec.type.by == "logprob":
            return
        if spec.seed is not None:
            self._value(thread, spec.seed, scope)
        for name in SAMPLING:
            if name in spec.sampling:
                value = self._value(thread, spec.sampling[name], scope)
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise _Failed(f"`{name}` is {value!r}, no number")

    def _lay_tokens(self, thread: _Thread, event: GenEnded, forced: Literal["recorded", "scored"] | None) -> None:
        """The tokens that the gen left in the context, and beside them those that it drew and trimmed again.

        Draw j reads the logits after the j tokens drawn before it. As long as those are the tokens that stay, that is
        the thread's own last token; from the first one that does not stay, they stand in a segment that nothing else
        sees. Only a trace knows them.
        """
        first = thread.num_drawn
        thread.num_drawn += event.drawn
        thread.num_decoded += event.drawn
        ids = event.ids
        kept = 0
        while kept < event.drawn:
            token = self.drawn.get((thread.path, first + kept), ids[kept] if kept < len(ids) else None)
            stays = kept < len(ids) and token == ids[kept]
            self._draw(thread, first + kept, thread.last, token, stays=stays)
            if not stays:
                break
            if kept < len(event.logprobs):
                self._score(thread, first + kept, event.logprobs[kept])
            self._feed(thread, ids[kept])
            kept += 1
        if kept + 1 < event.drawn:
            self._lay_trimmed(thread, first + kept, first + event.drawn)
        for token_id in ids[kept:]:
            if forced is not None and thread.last is not None:
                self.build.forced.append(Forced(thread.path, forced, thread.last, token_id))
            self._feed(thread, token_id)

    def _lay_traced(self, thread: _Thread) -> None:
        """A gen that was cut off leaves no event, but a trace has the tokens that it had drawn."""
        while (token := self.drawn.get((thread.path, thread.num_drawn))) is not None:
            self._draw(thread, thread.num_drawn, thread.last, token)
            self._feed(thread, token)
            thread.num_drawn += 1
            thread.num_decoded += 1

    def _lay_trimmed(self, thread: _Thread, start: int, end: int) -> None:
        """Tokens drawn as `start` .. `end` - 1 of which none stays, as far as the trace holds them."""
        self._seal(thread)
        beside = self.build.open(thread.path, tuple(thread.view))
        position = thread.position
        for index in range(start, end - 1):
            token = self.drawn.get((thread.path, index))
            if token is None:
                return
            after = self.build.append(beside, token, position)
            self._draw(thread, index + 1, after, self.drawn.get((thread.path, index + 1)), stays=False)
            position += 1

    def _lay_choices(self, thread: _Thread, choice: ChoiceType, event: GenEnded, held: bool) -> None:
        """Every option, in a segment of its own that nothing else sees: the one that was taken must score best."""
        if thread.last is None:
            raise ReferenceMismatch(thread.at, f"`{event.site}` has nothing to continue")
        self._seal(thread)
        space = " " if held else ""
        candidates: dict[int, tuple[tuple[int, int], ...]] = {}
        for index, option in enumerate(choice.options):
            beside = self.build.open(thread.path, tuple(thread.view))
            after = thread.last
            scored = []
            for offset, token_id in enumerate(self.tokenizer.encode([(space + option, False)])):
                scored.append((after, token_id))
                after = self.build.append(beside, token_id, thread.position + offset)
            candidates[index] = tuple(scored)
        chosen = choice.options.index(event.value) if event.value in choice.options else -1
        ids = tuple(token_id for _, token_id in candidates.get(chosen, ()))
        self._same(thread.at, f"what `{event.site}` left in the context", event.ids, ids)
        self.build.claims.append(Claim(thread.at, f"`{event.site}`", candidates, (chosen,), mean=False))

    def _draw(self, thread: _Thread, index: int, after: int | None, token: int | None, *, stays: bool = True) -> None:
        if after is None:
            raise ReferenceMismatch(thread.at, f"draw {index} has nothing to continue")
        self.build.draws[thread.path, index] = Draw(thread.path, index, after, token, stays)
        if token is not None:
            thread.draws.append((after, token))

    def _score(self, thread: _Thread, index: int, logprob: float) -> None:
        self.build.logprobs.append((self.build.draws[thread.path, index], logprob))

    def _text(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids).decode(errors="replace")

    def _forced(self, thread: _Thread, spec: GenSpec, recorded: ast.Expr, scope: Scope) -> list[int]:
        """The tokens of `recorded=`: of a text, of pieces that are encoded apart, or as they are."""
        if isinstance(recorded, ast.Apply) and recorded.function == "ids":
            value: Value = [self._value(thread, arg.value, scope) for arg in recorded.args]
        else:
            value = self._value(thread, recorded, scope)
        ids: list[int] = []
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                ids.extend(self.tokenizer.encode([(item, False)]))
            elif isinstance(item, int) and not isinstance(item, bool) and 0 <= item < self.tokenizer.vocab_size:
                ids.append(item)
            else:
                raise _Failed(f"{item!r} is neither text nor a token")
        return ids

    # --- forks

    def _fork(
        self,
        thread: _Thread,
        plan: ast.PlanDef,
        site: str,
        arms: Sequence[_Arm],
        join: JoinSpec,
        limits: Limits,
        scope: Scope,
    ) -> Value:
        if limits.upto is not None and len(arms) > limits.upto:
            raise _Failed(f"{len(arms)} branches are more than `upto`")
        return self._or_fallback(
            thread, limits, scope, lambda: self._branch_out(thread, plan, site, arms, join, limits, scope)
        )

    def _or_fallback(self, thread: _Thread, limits: Limits, scope: Scope, run: Callable[[], Value]) -> Value:
        """What `run` yields, or the fallback where a join in it is not met."""
        try:
            return run()
        except _Unmet as unmet:
            if limits.fallback is None:
                raise _Failed(str(unmet)) from None
            return self._value(thread, limits.fallback, scope)

    def _branch_out(
        self,
        thread: _Thread,
        plan: ast.PlanDef,
        site: str,
        arms: Sequence[_Arm],
        join: JoinSpec,
        limits: Limits,
        scope: Scope,
    ) -> Value:
        """Run the branches and read their join. Raises _Unmet."""
        self._open_turn(thread)
        self._seal(thread)
        outcomes = [self._branch(thread, plan, site, arm, limits, scope) for arm in arms]
        event = self._next(self.joins, thread, "join")
        self._same(thread.at, "the join's place", event.site, site)
        came_ok = tuple(i for i, outcome in enumerate(outcomes) if outcome.status == "ok")
        self._check_ok(thread, join, event, came_ok, outcomes)
        ok = [
            Branch(i, arms[i].label, outcomes[i].value, outcomes[i].names, self._thread_of(outcomes[i]).num_decoded)
            for i in event.ok
        ]
        thread.num_decoded += sum(branch.tokens for branch in ok)
        try:
            if join.kind == "best" and join.key == "logprob":
                verdict = self._best_by_logprob(thread, join, event, ok, outcomes)
            else:
                verdict = decide(join, ok, len(arms))
        except Undecided as reason:
            self._same(thread.at, f"the winners of `{site}`", event.winners, ())
            if not event.failed:
                raise ReferenceMismatch(thread.at, f"`{site}` yields {event.value!r}, by the plan {reason}") from None
            raise _Unmet(f"`{site}`: {reason}") from None
        if event.failed:
            raise ReferenceMismatch(thread.at, f"`{site}` failed ({event.failed}), by the plan it yields {verdict}")
        self._same(thread.at, f"the value of `{site}`", event.value, verdict.value)
        match join.context:
            case "drop":
                self._same(thread.at, f"the winners of `{site}`", event.winners, ())
            case "text":
                # `first(n)` counts the first n, and those that came later are cancelled; else every ok branch is read.
                read = verdict.winners if join.kind == "first" else event.ok
                self._same(thread.at, f"the winners of `{site}`", event.winners, read)
                text = "".join(part for i in read for part in self._thread_of(outcomes[i]).text)
                self._say(thread, [(text, False)], hold_space=False)
            case "stitch":
                self._same(thread.at, f"the winners of `{site}`", event.winners, verdict.winners)
                self._stitch(thread, [self._thread_of(outcomes[i]) for i in verdict.winners], join.positions)
            case _:
                assert_never(join.context)
        return verdict.value

    def _check_ok(
        self, thread: _Thread, join: JoinSpec, event: Joined, came_ok: tuple[int, ...], outcomes: Sequence[_Outcome]
    ) -> None:
        """The join read every branch that ended ok; `first` and `quorum` may leave out those that came later.

        A branch can end ok and be left out only where ends are ordered by (tokens decoded, index) and not by time.
        """
        if event.ok == came_ok:
            return
        left_out = set(came_ok) - set(event.ok)
        in_order = sorted(came_ok, key=lambda i: (self._thread_of(outcomes[i]).num_decoded, i))
        if (
            join.kind not in ("first", "quorum")
            or event.ok != tuple(sorted(set(came_ok) - left_out))
            or set(in_order[: len(event.ok)]) != set(event.ok)
        ):
            self._same(thread.at, f"which branches of `{event.site}` were ok", event.ok, came_ok)

    def _best_by_logprob(
        self, thread: _Thread, join: JoinSpec, event: Joined, ok: Sequence[Branch], outcomes: Sequence[_Outcome]
    ) -> Verdict:
        """Take the recorded winner as a claim that the model's own log-probabilities must bear out.

        Under `drop` the event names no winner, and any branch may be it that returned the value.
        """
        drew = {branch.index: self._thread_of(outcomes[branch.index]).draws for branch in ok}
        drew = {index: draws for index, draws in drew.items() if draws}
        if not drew:
            raise Undecided("no ok branch drew a token")
        if join.context == "stitch":
            chosen = event.winners
        else:
            chosen = tuple(b.index for b in ok if b.index in drew and b.value == event.value)
        if not chosen or not set(chosen) <= drew.keys() or (join.context == "stitch" and len(chosen) != 1):
            raise ReferenceMismatch(thread.at, f"`{event.site}` yields {event.value!r}, which no ok branch returned")
        candidates = {index: tuple(draws) for index, draws in drew.items()}
        # Without a trace, tokens that were trimmed are not known, and nothing can be said of the mean.
        if all(len(draws) == self._thread_of(outcomes[index]).num_drawn for index, draws in candidates.items()):
            what = f"best(logprob) of `{event.site}`"
            self.build.claims.append(Claim(thread.at, what, candidates, chosen, mean=True))
        return Verdict(outcomes[chosen[0]].value, chosen)

    def _thread_of(self, outcome: _Outcome) -> _Thread:
        if outcome.thread is None:
            raise ValueError("a branch that never began has no thread")
        return outcome.thread

    def _branch(
        self, parent: _Thread, plan: ast.PlanDef, site: str, arm: _Arm, limits: Limits, scope: Scope
    ) -> _Outcome:
        """One branch, with its further tries. A branch that was never admitted counts as cancelled."""
        fresh = limits.fresh or arm.limits.fresh
        key = str(arm.key) if arm.label is None else arm.label
        outcome = _Outcome("cancelled")
        num_decoded = 0
        for attempt in range(1 + max(limits.retry, arm.limits.retry)):
            suffix = f"~{attempt}" if attempt else ""
            path = (*parent.at, f"{site}[{key}]{suffix}")
            if path not in self.started:
                return _Outcome("cancelled", thread=outcome.thread)
            thread = self._begin(path, None if fresh else parent)
            names = dict(arm.names) if arm.alone else {**scope, **arm.names}
            outcome = self._conclude(thread, plan, arm.body, names, arm.prompt)
            num_decoded += thread.num_decoded
            thread.num_decoded = num_decoded
            if outcome.status != "failed":
                break
        return outcome

    def _stitch(self, thread: _Thread, winners: Sequence[_Thread], positions: Literal["max", "sum"]) -> None:
        """The winners' own segments enter the view; nothing is fed.

        max: the parent goes on at the largest end. sum: the winners are laid end to end, each shifted by the lengths
        of those before it; shifts of stitches inside them add.
        """
        start = thread.position
        for winner in winners:
            self._seal(winner)
            shift = thread.position - start if positions == "sum" else 0
            thread.view.extend((segment, inner + shift) for segment, inner in winner.view[winner.inherited :])
            end = winner.position + shift
            thread.position = max(thread.position, end)
            thread.text.extend(winner.text)
            thread.role = winner.role
        if winners:
            thread.last = winners[0].last if len(winners) == 1 else None

    def _reduce(
        self, thread: _Thread, plan: ast.PlanDef, stmt: ast.Reduce, site: str, limits: Limits, scope: Scope
    ) -> Value:
        by = options.reduce_by(stmt.options)
        items = self._list(thread, stmt.over, scope)
        if not items:
            raise _Failed(f"`{site}` has nothing to reduce")
        self._open_turn(thread)
        num_started = 0
        while len(items) > 1:
            groups = [items[i : i + by] for i in range(0, len(items), by)]
            merging = [i for i, group in enumerate(groups) if len(group) > 1]
            arms = [_Arm(num_started + n, None, None, stmt.body, {stmt.item: groups[i]}) for n, i in enumerate(merging)]
            num_started += len(arms)
            merged = self._branch_out(thread, plan, site, arms, JoinSpec(), limits, scope)
            items = [group[0] for group in groups]
            for i, value in zip(merging, merged, strict=True):
                items[i] = value
        return items[0]

    def _call(self, thread: _Thread, stmt: ast.Call, site: str, scope: Scope) -> Value:
        callee = self.program.plan(stmt.plan)
        caller, depth = self.called[-1]
        depth = depth + 1 if callee.name == caller else 0
        if depth > options.plan_depth(callee):
            raise _Failed(f"`{callee.name}` calls itself deeper than {options.plan_depth(callee)}")
        limits = options.limits(stmt.options, kind="call")
        places = iter([param.name for param in callee.params])
        names = {arg.name or next(places): self._value(thread, arg.value, scope) for arg in stmt.args}
        arm = _Arm(0, None, None, callee.body, names, alone=True)
        self.called.append((callee.name, depth))
        try:
            return self._fork(thread, callee, site, [arm], JoinSpec("first", 1), limits, scope)
        finally:
            self.called.pop()
