"""The threads of a run: each walks its region of the graph and asks the engine for rows, tokens and branches.

request = Feed()                 the unfed tokens of the thread's context
        | Rows(contexts)         the unfed tokens of other contexts: the winners of a stitch
        | Score(token ids)       forced continuations, each taken back again
        | Draw(generation, ...)  tokens, until the gen is done
        | Reserve()              that its worst case is reserved, before it forks
        | Spawn(fork)            branches, until the join closes
"""

from __future__ import annotations

import math
from collections import ChainMap, deque
from collections.abc import Callable, Collection, Generator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, assert_never

from torch import Tensor

from anabranch.compiler import graph, recording
from anabranch.compiler.bounds import KEPT_LOGITS
from anabranch.compiler.scheduler import Fork as ScheduledFork
from anabranch.compiler.scheduler import Thread
from anabranch.dsl.ast import Apply, Expr, Float, Int, Option, Str, names_in
from anabranch.dsl.diagnostics import PlanError
from anabranch.dsl.options import check_sampling
from anabranch.dsl.spec import SAMPLING, ChoiceType, GenSpec, JoinSpec, Limits, Value
from anabranch.dsl.values import EvaluationError, checked, evaluate, parts, render
from anabranch.runtime.context import Context, Row
from anabranch.runtime.events import BranchEnded, BranchStarted, GenEnded, HostCalled, Joined, Path, Status
from anabranch.runtime.generation import Generation, choice_encodings, read_value, recorded_ids
from anabranch.runtime.joins import Ended, JoinResult, JoinState
from anabranch.runtime.pages import Entry, View
from anabranch.runtime.replay import LogEntry, Recorded, branch_of, check_same, misfit
from anabranch.runtime.sampler import draw_key

if TYPE_CHECKING:
    from anabranch.runtime.engine import Engine, Run

SAMPLING_DEFAULTS = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
}


class BranchStopped(Exception):
    """A thread cannot go on: it failed, or was truncated."""

    def __init__(self, reason: str, status: Status = "failed") -> None:
        super().__init__(reason)
        self.reason = reason
        self.status: Status = status


class JoinFailed(BranchStopped):
    """Too few branches were ok, and nothing stands in for them."""


@dataclass(frozen=True, slots=True)
class Feed:
    """Feed what is unfed. `flush`: it is fed only because the segment seals."""

    flush: bool = False


@dataclass(frozen=True, slots=True)
class Rows:
    """Feed what is unfed in each of `contexts`, before they are aliased."""

    contexts: tuple[Context, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Feed `token_ids` and answer with the logits before each of them; the tokens are taken back."""

    token_ids: tuple[int, ...]


@dataclass(slots=True)
class Draw:
    """Draw tokens into `generation` until it is done.

    key: Philox key; parameters: the six sampling options by name
    """

    node: graph.Decode
    generation: Generation
    key: tuple[int, int]
    parameters: Mapping[str, float]
    wants_logprobs: bool


@dataclass(frozen=True, slots=True)
class Reserve:
    """Go on only once the thread's worst case is reserved."""


@dataclass(slots=True)
class Spawn:
    """Run the branches of `fork` and answer with its `JoinResult`."""

    fork: ForkState


Request: TypeAlias = Feed | Rows | Score | Draw | Reserve | Spawn
Steps: TypeAlias = Generator[Request, Any, Any]


@dataclass(frozen=True, slots=True)
class Returned:
    value: Value


@dataclass(frozen=True, slots=True)
class Branch:
    """What one branch of a fork is started with."""

    key: str
    label: str | None
    region: graph.Region
    names: Mapping[str, Value]
    prompt: Expr | None
    hold_space: bool
    limits: Limits
    budget: int | None
    generated: Collection[str] = ()


@dataclass(slots=True)
class ForkState:
    """A fork while its branches run.

    site: as in events; branches are made as they start, so that a wide fork costs nothing until then
    starts: the branches that are to run, where a journal tells of others; None for all
    rebuilding: those of them that are run only for their segments: the join knows how they ended
    texts: of branches that do not run again, by index
    logged: the journal holds the join's decision
    """

    parent: Task
    site: str
    width: int
    branch: Callable[[int], Branch]
    join: JoinState
    limits: Limits
    needs: Sequence[Any]
    callee: str | None = None
    deadline: float | None = None
    scheduled: ScheduledFork | None = None
    running: dict[int, Task] = field(default_factory=dict)
    finished: dict[int, Task] = field(default_factory=dict)
    closed: bool = False
    depth: int = 0
    critical: int = 0
    base_view: View | None = None
    node: tuple[str, int] = ("", 0)
    starts: Collection[int] | None = None
    rebuilding: set[int] = field(default_factory=set)
    texts: dict[int, str] = field(default_factory=dict)
    logged: bool = False

    def component(self, index: int) -> str:
        """What the path of a branch ends in, whichever try of it it is."""
        return f"{self.site}[{self.branch(index).key}]"


class Task:
    """One thread of a run."""

    def __init__(
        self,
        engine: Engine,
        run: Run,
        path: Path,
        context: Context,
        region: graph.Region,
        names: MutableMapping[str, Value],
        *,
        parent: ForkState | None = None,
        index: int = 0,
        label: str | None = None,
        budget: int | None = None,
        depth: int = 0,
        critical: int = 0,
        plan: str = "",
        own_names: Collection[str] = (),
        generated: Collection[str] = (),
    ) -> None:
        self.engine = engine
        self.run = run
        self.path = path
        self.context = context
        self.region = region
        self.names = names
        self.parent = parent
        self.index = index
        self.label = label
        self.budget = budget
        self.depth = depth
        self.thread: Thread | None = None
        self.steps: Steps | None = None
        self.request: Request | None = None
        self.fork: ForkState | None = None
        self.joining: ForkState | None = None
        self.base_view = context.view
        self.text: list[str] = []
        self.held_space = False
        self.rounds: tuple[str, ...] = ()
        self.drawn = 0
        self.spent = 0
        self.below = 0
        self.logprob_sum = 0.0
        self.logprob_count = 0
        self.drawn_ids: list[int] = []
        self.critical = critical
        self.plan = plan
        self.charged = 0
        self.attempt = 0
        self.number = context.owner if context.owner is not None else 0
        self.node: tuple[str, int] | None = None
        self.own_names: set[str] = set(names) if parent is None else set(own_names)
        self.generated: set[str] = set(generated)
        # What a journal holds of this thread that it has not come to again.
        self.recorded: deque[tuple[int, LogEntry]] = run.replay.thread(path) if run.replay is not None else deque()

    @property
    def here(self) -> Path:
        """The path of what happens now, loop rounds included."""
        return self.path + self.rounds

    @property
    def tokens(self) -> int:
        """Tokens decoded in this thread, and in those of its branches that its joins found ok.

        How far the other branches had come when a join closed depends on time, and this orders ends without it.
        """
        return self.spent + self.below

    def num_pages(self) -> int:
        """Pages that this thread's context has gained since it began."""
        context = self.context
        gained = context.view.gained_since(self.base_view) if context.view is not None else []
        return context.num_pages() + sum(len(entry.segment.pages) for entry in gained)

    def emit(self, event: Recorded, ended: Ended | None = None) -> None:
        """Tell what happened, and log it; what the journal holds already is held against it instead.

        ended: with a `BranchEnded`, what the join is told
        """
        if self.recorded:
            check_same(self.recorded.popleft()[1].event, event)
        else:
            self._log(event, ended)
        self.run.emit(event)

    def _log(self, event: Recorded, ended: Ended | None = None) -> None:
        if self.run.log is None:
            return
        if isinstance(event, GenEnded):
            drawn = tuple(self.drawn_ids[len(self.drawn_ids) - event.drawn :])
            self.run.log(LogEntry(self.path, event, drawn, self.logprob_sum))
        else:
            self.run.log(LogEntry(self.path, event, ended=ended))

    def leave(self, status: Status, value: Value, reason: str, *, again: bool = False) -> Ended:
        """Tell that the thread ended. Returns what its join is told.

        again: the branch is run again, and its join is told nothing
        """
        self.note(recording.End(self.number, status))
        self.drop_finished()
        names: dict[str, Value] = {}
        if status == "ok" and self.parent is not None and (key := self.parent.join.spec.key) in self.names:
            names = {str(key): self.names[str(key)]}
        mean = self.logprob_sum / self.logprob_count if self.logprob_count else None
        ended = Ended(self.index, status, value, reason, names, mean, self.tokens, self.critical)
        if self.run.replay is not None and status in ("cancelled", "late"):
            # Perhaps it was cut off on its way back to where it had been: what it was stays.
            events, cut = self.run.replay.take_thread(self.path)
            self._tell(events, cut)
            if any(isinstance(event, BranchEnded) and event.path == self.path for event in events):
                return ended
        event = BranchEnded(self.path, status, "".join(self.text), value, reason, self.spent, self.label)
        self.emit(event, None if again or self.parent is None else ended)
        return ended

    def close(self, fork: ForkState) -> None:
        """The join of `fork` has been decided; that is logged before the branches that it cuts off end.

        Branches that had begun before a kill, and have not again, are told of: the join cuts them off too.
        """
        if self.run.log is not None and not fork.logged and not self.recorded:
            self._log(self._joined(fork, fork.join.result()))
            fork.logged = True
        replay = self.run.replay
        if replay is not None and replay.has_begun(self.here, fork.site):
            over = fork.join.ended.keys() | fork.running.keys()
            waiting = {fork.component(i): i for i in range(fork.width) if i not in over}
            self._tell(*replay.take(self.here, waiting), waiting)

    def _joined(self, fork: ForkState, result: JoinResult) -> Joined:
        return Joined(self.here, fork.site, result.ok, result.winners, result.value, result.failed)

    def note(self, step: recording.Step) -> None:
        """Write down what this thread does, where the engine is recorded."""
        if self.engine.recorder is not None:
            self.engine.recorder.note(step)

    def _enter(self, dst: int) -> tuple[str, int]:
        """The thread comes to a node."""
        self.node = (self.plan, dst)
        self.note(recording.Enter(self.number, self.node))
        return self.node

    def start(self, branch: Branch | None) -> None:
        """Begin to walk the region."""
        self.emit(BranchStarted(self.path, self.label))
        self.steps = self._walk(branch)

    def _walk(self, branch: Branch | None) -> Steps:
        if branch is not None and branch.prompt is not None:
            start = self.context.position
            self._write(branch.prompt, hold_space=branch.hold_space)
            self._within(start, self.run.bounds.start_of(self.region).rows)
        returned = yield from self._region(self.region)
        value = returned.value if returned is not None else "".join(self.text)
        if self.parent is not None and self.parent.join.spec.context == "stitch":
            yield from self._ready_to_stitch(self.parent)
        return value

    def _ready_to_stitch(self, fork: ForkState) -> Steps:
        """Leave at most one token for the join to flush, and no logits that it will not read."""
        context = self.context
        if len(context.unfed) > 1 or any(u.row is not Row.DECODE for u in context.unfed):
            # Known text at the end is the branch's own prefill.
            yield Feed()
        spec = fork.join.spec
        several = spec.kind == "all" or (spec.kind == "first" and (spec.count or 1) > 1)
        if several and fork.width > 1:
            context.logits = None
        elif fork.width > KEPT_LOGITS or context.logits is None:
            # The parent may go on from the last token, whose logits are not kept, or went with tokens taken back.
            self._feed_last_again()

    def _feed_last_again(self) -> None:
        """Where nothing is left to feed, the last token of the open segment is fed once more, for its logits."""
        context = self.context
        if not context.unfed and context.segment is not None and context.segment.length:
            self._reopen()

    def _region(self, region: graph.Region) -> Generator[Request, Any, Returned | None]:
        for node in region.nodes:
            if not isinstance(node, graph.Let | graph.Need | graph.Return):
                here = self._enter(node.dst)
            match node:
                case graph.Write():
                    start = self.context.position
                    self._statement(node)
                    self._within(start, self.run.bounds.feed(node).rows)
                case graph.Decode():
                    yield from self._decode(node)
                case graph.Fork():
                    yield from self._fork(node)
                case graph.Map():
                    yield from self._map(node)
                case graph.Reduce():
                    yield from self._reduce(node)
                case graph.Call():
                    yield from self._call(node)
                case graph.Loop():
                    outer = self.rounds
                    for number in range(node.rounds):
                        self.rounds = (*outer, f"{node.site}[{number}]")
                        self.note(recording.Round(self.number, here, number))
                        returned = yield from self._region(node.region)
                        if returned is not None:
                            return returned
                        if node.until is not None and self._evaluate(node.until):
                            break
                    self.rounds = outer
                case graph.Cond():
                    holds = bool(self._evaluate(node.cond))
                    arm = node.then if holds else node.orelse
                    self.note(recording.Arm(self.number, here, -1 if arm is None else 0 if holds else 1))
                    if arm is not None:
                        returned = yield from self._region(arm)
                        if returned is not None:
                            return returned
                case graph.Let():
                    generated = self._is_generated(node.value)
                    self.names[node.name] = self._evaluate(node.value)
                    self.own_names.add(node.name)
                    if generated:
                        self.generated.add(node.name)
                case graph.Need():
                    if not self._evaluate(node.cond):
                        raise BranchStopped(f"`need` does not hold{self.run.at(node.span)}")
                case graph.Return():
                    return Returned(self._evaluate(node.value))
                case graph.Expand():
                    raise BranchStopped("`expand` is not available")
                case _:
                    assert_never(node)
        return None

    def _evaluate(self, expr: Expr) -> Value:
        return evaluate(expr, self.names, self._host)

    def _host(self, function: str, args: list[Value]) -> Value:
        target = self.run.functions.get(function)
        if target is None:
            raise EvaluationError(f"no function `{function}` was registered")
        if self.recorded:
            return self._answered(function)
        reason = ""
        try:
            # Copies both ways: what the host changes or keeps is not the plan's, and what it returned stays as it was.
            own = [checked(arg, "an argument") for arg in args]
            value = checked(target(*own), f"what `{function}` returned")
        except EvaluationError as error:
            reason = error.reason
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also SystemExit, GeneratorExit, and what no `str` can be had of
            reason = " ".join(f"`{function}` raised {type(error).__name__}: {_said(error)}".split())
        if reason:
            self.emit(HostCalled(self.here, function, None, reason))
            raise EvaluationError(reason)
        self.emit(HostCalled(self.here, function, value))
        return value

    def _answered(self, function: str) -> Value:
        """What a host function gave when it was called."""
        event = self.recorded[0][1].event
        if not isinstance(event, HostCalled) or (event.path, event.function) != (self.here, function):
            raise misfit(self.here, f"`{function}` is called where the journal holds {type(event).__name__}")
        self.emit(event)
        if event.error:
            raise EvaluationError(event.error)
        return event.value

    def _is_generated(self, expr: Expr) -> bool:
        """Whether text that a thread of this run decoded may be in the value."""
        return any(self._names_generated(name) for name in names_in(expr))

    def _names_generated(self, name: str) -> bool:
        task: Task | None = self
        while task is not None:
            if name in task.own_names:
                return name in task.generated
            task = task.parent.parent if task.parent is not None and task.parent.callee is None else None
        return False

    def _without_generated(self, value: Expr) -> list[tuple[str, bool]]:
        """The pieces of a statement, but for those that interpolate generated text."""
        kept = value.parts if isinstance(value, Str) else () if self._is_generated(value) else (value,)
        return [
            piece
            for part in kept
            if isinstance(part, str) or not self._is_generated(part)
            for piece in (((part, True),) if isinstance(part, str) else parts(part, self.names, self._host))
        ]

    def _pieces(self, value: Expr, *, hold_space: bool) -> list[tuple[str, bool]]:
        """The text of a statement; one trailing space is held back if asked for and there."""
        pieces = list(parts(value, self.names, self._host))
        while pieces and not pieces[-1][0]:
            pieces.pop()
        self.held_space = False
        if hold_space and pieces and pieces[-1][0].endswith(" "):
            text, literal = pieces[-1]
            pieces[-1] = (text[:-1], literal)
            self.held_space = True
        return pieces

    def _push(self, pieces: list[tuple[str, bool]], value: Expr | None = None) -> None:
        start = self.engine.is_blank(self.context)
        ids = self.engine.tokenizer.encode(pieces, start=start)
        again = 0
        if value is not None and self._is_generated(value):
            again = len(ids) - len(self.engine.tokenizer.encode(self._without_generated(value), start=start))
            again = min(max(0, again), len(ids))
        self.context.push(ids[: len(ids) - again], Row.PREFILL)
        self.context.push(ids[len(ids) - again :], Row.REPREFILL)
        self.run.check_position(self.context.position)

    def _within(self, start: int, most: int) -> None:
        """What was written from position `start` on is at most what admission counted on."""
        rows = self.context.position - start
        if rows > most:
            raise BranchStopped(f"the text takes {rows} tokens, and at most {most} were counted for it")

    def _open_assistant(self) -> None:
        if self.context.role == "between":
            self.context.role = "assistant"
            self._push(self.engine.chat.open_assistant(first=False))

    def _write(self, value: Expr, *, hold_space: bool) -> None:
        self._open_assistant()
        pieces = self._pieces(value, hold_space=hold_space)
        self.text.extend(text for text, _ in pieces)
        self._push(pieces, value)

    def _statement(self, node: graph.Write) -> None:
        if node.role == "text":
            self._write(node.value, hold_space=node.hold_space)
            return
        context = self.context
        content = self._pieces(node.value, hold_space=False)
        self.text.extend(text for text, _ in content)
        turn = self.engine.chat.turn(node.role, content, first=context.role is None, open=context.role == "assistant")
        context.role = "between"
        self._push(turn, node.value)

    def _decode(self, node: graph.Decode) -> Steps:
        start = self.context.position
        self._open_assistant()
        if node.prompt is not None:
            self._write(node.prompt, hold_space=True)
        self._within(start, self.run.bounds.feed(node).rows)
        held, self.held_space = self.held_space, False
        spec = node.spec
        if spec.recorded is not None:
            ended = self._recorded(node, held)
            self._within(start, self.run.bounds.feed(node).rows)
        elif self.recorded and isinstance(self.recorded[0][1].event, GenEnded):
            ended = self._retake(node, self.recorded[0][1])
        elif isinstance(spec.type, ChoiceType) and spec.type.by == "logprob":
            ended = yield from self._choose(node, spec.type, held)
        else:
            ended = yield from self._draw(node, held)
        self.emit(ended)
        self.text.append(self.engine.text_of(ended.ids))
        if ended.end == "failed":
            raise BranchStopped(ended.reason or "the gen failed")
        if ended.end == "truncated":
            raise BranchStopped(ended.reason, "truncated")
        self._bind(node.name, ended.value)

    def _bind(self, name: str | None, value: Value) -> None:
        if name is not None:
            self.names[name] = value
            self.own_names.add(name)
            self.generated.add(name)

    def _recorded(self, node: graph.Decode, held: bool) -> GenEnded:
        assert node.spec.recorded is not None
        recorded = node.spec.recorded
        value: Value
        if isinstance(recorded, Apply) and recorded.function == "ids":
            value = [self._evaluate(arg.value) for arg in recorded.args]
        else:
            value = self._evaluate(recorded)
        if not isinstance(value, str) and not (isinstance(value, list) and _all_of(value)):
            raise BranchStopped("recorded text is a string, a list of strings or token ids")
        try:
            ids = recorded_ids(self.engine.tokenizer, value)
            text = self.engine.text_of(ids)
            shown = text[1:] if held and text.startswith(" ") else text
            read = read_value(node.spec.type, shown)
        except ValueError as error:
            raise BranchStopped(f"the recorded text does not fit: {error}") from error
        self.context.push(ids, Row.PREFILL)
        self.critical += len(ids)
        self.run.counts["total_tokens"] += len(ids)
        self.run.check_position(self.context.position)
        return GenEnded(self.here, node.site, node.name, tuple(ids), 0, shown, read, "recorded")

    def _choose(self, node: graph.Decode, kind: ChoiceType, held: bool) -> Generator[Request, Any, GenEnded]:
        """Score each option as a continuation; the most probable is written, the first of equals."""
        options = choice_encodings(self.engine.tokenizer, kind, held_space=held)
        self._goes_on(node.site)
        yield from self._at_hand()
        scores: list[float] = []
        for ids in options:
            rows: list[Tensor] = yield Score(ids)
            scores.append(sum(self.engine.logprob(row, token) for row, token in zip(rows, ids, strict=True)))
        best = max(range(len(options)), key=lambda i: (scores[i], -i))
        self.context.push(options[best], Row.PREFILL)
        value = kind.options[best]
        return GenEnded(self.here, node.site, node.name, options[best], 0, value, value, "complete")

    def _retake(self, node: graph.Decode, entry: LogEntry) -> GenEnded:
        """A gen that had ended: what it drew is not drawn again, and fed again only where something needs it."""
        ended = entry.event
        assert isinstance(ended, GenEnded)
        if (ended.path, ended.site) != (self.here, node.site):
            raise misfit(self.here, f"the gen `{node.site}` comes where the journal holds {ended.site}")
        if ended.drawn != len(entry.drawn_ids) or ended.drawn > node.spec.max_tokens:
            raise misfit(self.here, f"the gen `{node.site}` drew {ended.drawn} tokens of {node.spec.max_tokens}")
        vocab = self.engine.tokenizer.vocab_size
        if not all(0 <= token < vocab for token in (*ended.ids, *entry.drawn_ids)):
            raise misfit(self.here, f"the gen `{node.site}` has a token outside the vocabulary of {vocab}")
        kept = 0
        while kept < min(len(ended.ids), ended.drawn) and ended.ids[kept] == entry.drawn_ids[kept]:
            kept += 1
        self.context.push(ended.ids[:kept], Row.RECOMPUTE, sampled=True)
        self.context.push(ended.ids[kept:], Row.PREFILL)
        self.run.check_position(self.context.position)
        self.drawn += ended.drawn
        self.spent += ended.drawn
        self.critical += ended.drawn
        self.drawn_ids.extend(entry.drawn_ids)
        if node.spec.logprobs or self.run.wants_logprobs:
            self.logprob_sum = entry.logprob_sum
            self.logprob_count += ended.drawn
        self.run.count_recorded(ended)
        return ended

    def _at_hand(self) -> Generator[Request, Any, None]:
        """Feed until the logits of the last token are at hand."""
        context = self.context
        if context.unfed:
            yield Feed()
        elif context.logits is None:
            self._reopen()
            yield Feed()

    def _reopen(self) -> None:
        """The last token was fed and its logits are gone: it is fed once more."""
        context = self.context
        if context.segment is None or not context.segment.length:
            raise BranchStopped("there is nothing to continue from")
        context.reopen()

    def _draw(self, node: graph.Decode, held: bool) -> Generator[Request, Any, GenEnded]:
        spec = node.spec
        left = spec.max_tokens if self.budget is None else min(spec.max_tokens, self.budget - self.spent - self.charged)
        if left < 1:
            raise BranchStopped("the budget ran out", "truncated")
        context = self.context
        if not context.unfed and context.logits is None:
            self._reopen()
        self.run.check_position(context.position + left)
        constraint = self.engine.constraints.start(spec.type, held_space=held, stop=spec.stop)
        generation = Generation(spec, self.engine.tokenizer, constraint=constraint, held_space=held, limit=left)
        key = draw_key(self._seed(spec), self.run.input_index, self.here)
        parameters = {name: self._parameter(spec, name) for name in SAMPLING}
        wants = bool(spec.logprobs) or self.run.wants_logprobs
        context.expect = -(-(len(context.unfed) + left) // context.pool.page_size)
        request = Draw(node, generation, key, parameters, wants)
        self._goes_on(node.site)
        if generation.done is None:
            yield request
        self._settle(generation)
        if generation.done == "max" and left < spec.max_tokens:
            return replace(self.gen_ended(request), end="truncated", reason="the budget ran out")
        return self.gen_ended(request)

    def _goes_on(self, site: str) -> None:
        """What follows has not happened before."""
        if self.recorded:
            raise misfit(self.here, f"it comes to `{site}` where it holds {type(self.recorded[0][1].event).__name__}")

    def gen_ended(self, request: Draw) -> GenEnded:
        """The event of a gen that is done."""
        generation = request.generation
        return GenEnded(
            self.here,
            request.node.site,
            request.node.name,
            generation.kept_ids,
            generation.drawn,
            generation.text,
            generation.value,
            generation.done or "failed",
            generation.logprobs if request.wants_logprobs else (),
            generation.reason,
        )

    def _parameter(self, spec: GenSpec, name: str) -> float:
        expr = spec.sampling.get(name)
        if expr is None:
            return SAMPLING_DEFAULTS[name]
        value = self._evaluate(expr)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BranchStopped(f"`{name}` is not a number")
        try:
            check_sampling(Option(name, Int(value) if isinstance(value, int) else Float(value)))
        except PlanError as error:
            raise BranchStopped(str(error.diagnostics[0].message)) from None
        return value

    def _seed(self, spec: GenSpec) -> int:
        if spec.seed is None:
            return self.run.seed
        seed = self._evaluate(spec.seed)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise BranchStopped("`seed` is not a whole number")
        return seed

    def _settle(self, generation: Generation) -> None:
        """Make the context hold what the gen keeps.

        Before: every drawn token but the last is fed. The last is unfed, and the logits are those it was drawn from;
        or, where no token was allowed after it, it is fed too.
        """
        context = self.context
        drawn, kept = generation.drawn, generation.kept
        if kept < drawn:
            logits, unfed = context.logits, len(context.unfed)
            context.discard(unfed)
            self.run.counts["tokens_unfed"] += unfed
            self.run.counts["tokens_trimmed"] += drawn - kept - (generation.done == "end_of_turn")
            if kept < drawn - unfed:
                context.trim(drawn - unfed - kept)
                logits = None
            context.logits = logits
        if generation.replacement:
            context.push(generation.replacement, Row.PREFILL)

    def _fork(self, node: graph.Fork) -> Steps:
        arms: list[graph.Arm] = []
        if node.width is not None:
            width = self._evaluate(node.width)
            most = node.arms[0].multiplicity
            if isinstance(width, bool) or not isinstance(width, int) or not 0 <= width <= most:
                raise BranchStopped(f"a fork of {render(width)} branches where from 0 to {most} may be")
            arms = [node.arms[0]] * width
        else:
            arms = [arm for arm in node.arms for _ in range(arm.multiplicity)]
        needs = self.run.bounds.children(node, len(arms), self.depth)
        worst = [self._worst(arm.region, self.depth, node.limits, arm.limits) for arm in arms]
        shares = self._shares(node, worst, node.limits)

        def branch(index: int) -> Branch:
            arm = arms[index]
            names: dict[str, Value] = {} if node.index is None else {node.index: index}
            key = arm.label if arm.label is not None else str(index)
            limits = arm.limits
            budget = _least(shares[index], limits.budget)
            return Branch(key, arm.label, arm.region, names, arm.prompt, arm.hold_space, limits, budget)

        labels = [arm.label for arm in arms]
        value = yield from self._run_branches(
            node.site, labels, branch, node.join, node.limits, needs, fresh=all(_fresh(node.limits, a) for a in arms)
        )
        self._bind(node.name, value)

    def _map(self, node: graph.Map) -> Steps:
        items = self._items(node.over, node.most)
        needs = self.run.bounds.children(node, len(items), self.depth)
        shares = self._shares(node, [self._worst(node.region, self.depth, node.limits)] * len(items), node.limits)

        def branch(index: int) -> Branch:
            names: dict[str, Value] = {node.item: items[index]}
            if node.index is not None:
                names[node.index] = index
            return Branch(str(index), None, node.region, names, None, False, node.limits, shares[index], generated)

        generated = (node.item,) if self._is_generated(node.over) else ()
        value = yield from self._run_branches(
            node.site, [None] * len(items), branch, node.join, node.limits, needs, fresh=node.limits.fresh
        )
        self._bind(node.name, value)

    def _items(self, over: Expr, most: int) -> list[Value]:
        items = self._evaluate(over)
        if not isinstance(items, list):
            raise BranchStopped(f"a list is wanted here, not {render(items)[:40]!r}")
        if len(items) > most:
            raise BranchStopped(f"{len(items)} items where at most {most} may be")
        return items

    def _reduce(self, node: graph.Reduce) -> Steps:
        values = self._items(node.over, node.most)
        if not values:
            raise BranchStopped("`reduce` of nothing")
        self._open_assistant()
        started = 0
        # The fallback stands for the value of the whole, and not for what one level yields.
        level = replace(node.limits, fallback=None)
        while len(values) > 1:
            groups = [values[i : i + node.by] for i in range(0, len(values), node.by)]
            run = [i for i, group in enumerate(groups) if len(group) > 1]
            needs = self.run.bounds.children(node, len(run), self.depth)
            shares = self._shares(node, [self._worst(node.region, self.depth, node.limits)] * len(run), node.limits)
            first = started

            def branch(
                index: int, groups: list[list[Value]] = groups, run: list[int] = run, first: int = first,
                shares: Sequence[int | None] = shares,
            ) -> Branch:  # fmt: skip
                names = {node.item: groups[run[index]]}
                key = str(first + index)
                return Branch(key, None, node.region, names, None, False, node.limits, shares[index], (node.item,))

            try:
                merged = yield from self._run_branches(
                    node.site, [None] * len(run), branch, JoinSpec(), level, needs, fresh=level.fresh
                )
            except JoinFailed:
                if node.limits.fallback is None:
                    raise
                self._bind(node.name, self._evaluate(node.limits.fallback))
                return
            started += len(run)
            values = [group[0] for group in groups]
            for place, value in zip(run, merged, strict=True):
                values[place] = value
        self._bind(node.name, values[0])

    def _call(self, node: graph.Call) -> Steps:
        plan = self.run.graph.plans[node.plan]
        depth = self.depth + 1 if node.plan == self.plan else 0
        if depth > plan.depth:
            raise BranchStopped(f"`{plan.name}` calls itself deeper than {plan.depth}")
        names = {name: self._evaluate(value) for name, value in node.args}
        needs = self.run.bounds.children(node, 1, self.depth)
        shares = self._shares(node, [self._worst(plan.region, depth, node.limits)], node.limits)
        budget = _least(shares[0], plan.limits.budget)

        def branch(index: int) -> Branch:
            return Branch("0", None, plan.region, names, None, False, node.limits, budget, generated)

        generated = [name for name, value in node.args if self._is_generated(value)]

        value = yield from self._run_branches(
            node.site,
            [None],
            branch,
            JoinSpec("first", 1),
            node.limits,
            needs,
            fresh=node.limits.fresh,
            callee=node.plan,
        )
        self._bind(node.name, value)

    def _worst(self, region: graph.Region, depth: int, *limits: Limits) -> int:
        """What a branch may decode, all its tries together."""
        return self.run.bounds.tokens(region, depth) * (1 + max(limit.retry for limit in limits))

    def _shares(self, node: graph.Node, worst: Sequence[int], limits: Limits) -> Sequence[int | None]:
        """What each branch may decode: its worst case where all of those fit, else an equal share."""
        left = (
            None
            if self.budget is None
            else self.budget - self.spent - self.charged - self.run.bounds.rest(node, self.depth)
        )
        left = _least(left, limits.budget)
        if left is None or not worst:
            return [None] * len(worst)
        left = max(0, left)
        shares = worst if sum(worst) <= left else [left // len(worst)] * len(worst)
        # Charged whole, spent or not: what one branch leaves over never changes what a later statement may decode.
        self.charged += sum(shares)
        return shares

    def _run_branches(
        self,
        site: str,
        labels: list[str | None],
        branch: Callable[[int], Branch],
        spec: JoinSpec,
        limits: Limits,
        needs: Sequence[Any],
        *,
        fresh: bool,
        callee: str | None = None,
    ) -> Generator[Request, Any, Value]:
        context = self.context
        if self.thread is not None and self.thread.guest:
            yield Reserve()
        self._open_assistant()
        if not fresh:
            if self.held_space:
                # A space held back for a gen that did not come belongs to the text after all.
                self.held_space = False
            if context.logits is None:
                # Branches go on from the last token, whose logits went with tokens that were taken back.
                self._feed_last_again()
            if context.unfed:
                # What was lost comes before it, and has a kind of its own.
                yield Feed(flush=all(unfed.row is Row.RECOMPUTE for unfed in context.unfed[:-1]))
            logits = context.logits
            context.seal()
            context.logits = logits
            self.engine.remember(context)
        state = ForkState(
            self,
            site,
            len(labels),
            branch,
            JoinState(spec, labels, deterministic=self.run.deterministic),
            limits,
            needs,
        )
        state.base_view = context.view
        state.critical = self.critical
        state.callee = callee
        self.joining = state
        assert self.node is not None
        state.node = self.node
        self.note(recording.Forked(self.number, state.node, len(labels)))
        result: JoinResult
        if not labels:
            state.join.close_now()
            result = state.join.result()
        elif self._recall(state):
            result = yield Spawn(state)
        else:
            result = state.join.result()
        value = yield from self._join(state, result)
        return value

    def _recall(self, state: ForkState) -> bool:
        """Take what a journal tells of a fork: its decision, and how branches ended. False if none has to run.

        What had ended counts before anything that ends now, as it did then. Of branches that had ended, only those
        run again whose own segments a stitch may need; every other's events are told as they were.
        """
        replay = self.run.replay
        if replay is None:
            return True
        decision = self._recorded_join(state)
        if not replay.has_begun(self.here, state.site):
            if decision is not None and decision.ok:
                raise misfit(self.here, f"the fork `{state.site}` has winners that did not begin")
            return True
        index_of = {state.component(i): i for i in range(state.width)}
        join = state.join
        for component, ended, event in replay.ends(self.here, state.site, index_of):
            if ended.index != index_of[component]:
                raise misfit(self.here, f"`{component}` is branch {index_of[component]}, and not {ended.index}")
            join.offer(ended)
            state.texts[ended.index] = event.text
        recalled = dict(join.ended)
        if decision is not None:
            if not recalled.keys() >= {*decision.ok, *decision.winners}:
                raise misfit(self.here, f"the fork `{state.site}` has winners that did not end")
            join.recall(JoinResult(decision.ok, decision.winners, decision.value, decision.failed))
        over = join.decided(lambda: None if len(recalled) == state.width else (0, -1))
        if join.spec.context == "stitch":
            ok = (ended.index for ended in recalled.values() if ended.status == "ok")
            state.rebuilding = set(join.result().winners if over else ok)
        if over:
            self.close(state)
            state.starts = set(state.rebuilding)
        else:
            state.starts = {*range(state.width)} - recalled.keys() | state.rebuilding
        for ended in recalled.values():
            if ended.index not in state.rebuilding and ended.status != "cancelled":
                self.critical = max(self.critical, ended.critical)
        self._tell(*replay.take(self.here, (c for c, i in index_of.items() if i in recalled and i not in state.starts)))
        return bool(state.starts)

    def _recorded_join(self, state: ForkState) -> Joined | None:
        """What a journal holds of the decision of a fork that this thread has come to."""
        if not self.recorded:
            return None
        event = self.recorded[0][1].event
        if not isinstance(event, Joined) or (event.path, event.site) != (self.here, state.site):
            raise misfit(self.here, f"it comes to the fork `{state.site}` where it holds {type(event).__name__}")
        return event

    def _tell(
        self, events: Sequence[Recorded], cut: Sequence[BranchEnded], index_of: Mapping[str, int] | None = None
    ) -> None:
        """What a journal holds of other threads happened without their doing it again.

        cut: ends that it does not hold, and should; index_of: of the branches of this thread's fork
        """
        self.run.tell(events)
        for event in cut:
            *here, component = event.path
            index = index_of.get(branch_of(component)) if index_of and tuple(here) == self.here else None
            ended = None if index is None else Ended(index, event.status, reason=event.reason)
            if self.run.log is not None:
                self.run.log(LogEntry(event.path, event, ended=ended))
            self.run.emit(event)

    def drop_finished(self) -> None:
        """Let go of the branches' contexts that waited for their join to be read."""
        if self.joining is not None:
            for task in self.joining.finished.values():
                self.run.drop(task.context)
            self.joining.finished.clear()
            self.joining = None

    def _join(self, state: ForkState, result: JoinResult) -> Generator[Request, Any, Value]:
        spec = state.join.spec
        failed = bool(result.failed)
        self.below += sum(state.join.ended[index].tokens for index in result.ok)
        if state.logged:
            self.run.emit(self._joined(state, result))
        else:
            self.emit(self._joined(state, result))
        self.note(recording.Joined(self.number, state.node, result.ok, () if failed else result.winners, failed))
        if not result.failed and spec.context == "stitch" and result.winners:
            yield from self._stitch(state, [state.finished[i] for i in result.winners])
        elif not result.failed and spec.context == "text":
            self._open_assistant()
            texts = {index: "".join(task.text) for index, task in state.finished.items()} | state.texts
            text = "".join(texts[index] for index in result.winners)
            ids = self.engine.tokenizer.encode([(text, False)], start=self.engine.is_blank(self.context))
            self.context.push(ids, Row.REPREFILL)
            self.text.append(text)
            self.run.check_position(self.context.position)
        self.drop_finished()
        if not result.failed:
            return result.value
        if state.limits.fallback is None and state.callee is not None:
            ended = state.join.ended[0]
            raise BranchStopped(f"`{state.callee}` {ended.status}: {ended.reason}")
        if state.limits.fallback is None:
            raise JoinFailed(f"{state.site}: {result.failed}")
        return self._evaluate(state.limits.fallback)

    def _stitch(self, state: ForkState, winners: list[Task]) -> Generator[Request, Any, None]:
        context = self.context
        unfed = tuple(task.context for task in winners if task.context.unfed)
        if unfed:
            yield Rows(unfed)
        logits = winners[0].context.logits if len(winners) == 1 else None
        entries: list[Entry] = []
        start = context.position
        end = start
        offset = 0
        for task in winners:
            view = task.context.seal()
            gained = view.gained_since(state.base_view) if view is not None else []
            entries.extend(Entry(e.segment, e.shift + offset) for e in gained)
            length = task.context.position - start
            if state.join.spec.positions == "sum":
                offset += length
                end = start + offset
            else:
                end = max(end, task.context.position)
            self.text.extend(task.text)
        stitched = sum(e.segment.length for e in entries)
        self.run.counts["tokens_aliased"] += stitched
        self.run.counts["tokens_stitched"] += stitched
        self.note(recording.Stitch(self.number, tuple(task.number for task in winners)))
        if entries:
            context.alias(entries, end)
            context.logits = logits
        self.run.check_position(end)


def _said(error: BaseException) -> str:
    """What an exception of the host's says, of which a run keeps a bounded part."""
    try:
        return str(error)[:500]
    except Exception:
        return "it cannot be shown"


def _all_of(items: list[Value]) -> bool:
    return all(isinstance(i, str) for i in items) or all(isinstance(i, int) and not isinstance(i, bool) for i in items)


def _fresh(limits: Limits, arm: graph.Arm) -> bool:
    return limits.fresh or arm.limits.fresh


def _least(a: int | None, b: int | None) -> int | None:
    return a if b is None else b if a is None else min(a, b)


def child_names(outer: MutableMapping[str, Value], own: Mapping[str, Value]) -> MutableMapping[str, Value]:
    """A branch's names: its own, over those it sees of its parent."""
    return ChainMap(dict(own), outer)
