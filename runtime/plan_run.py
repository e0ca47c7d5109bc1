"""The host's side of a plan graph's run: the text that its threads read and write, and which of them are where.

A plan graph (`compiler/emit_fx.py`) runs all threads of a region together, one statement after another. Its nodes call
the ops of `runtime/plan_ops.py`, and those that are about text come here. What a statement means is `Task`'s, as in the
engine; what a `PlanRun` adds is the order: a thread stands in a region until a statement sends it elsewhere, and its
requests (to feed, to draw, to fork) wait until the graph's next op serves them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from anabranch.compiler import graph
from anabranch.compiler.bounds import Bounds
from anabranch.compiler.pipeline import Compiled
from anabranch.compiler.regions import Names
from anabranch.compiler.sizes import ModelSizes
from anabranch.dsl.diagnostics import Diagnostic, PlanError
from anabranch.dsl.spec import Value
from anabranch.dsl.values import EvaluationError
from anabranch.kernels.sample import logprob
from anabranch.runtime.attention import Block, StepAttention
from anabranch.runtime.attention_fixed import FixedAttention
from anabranch.runtime.constrain import AutomatonConstraint, Constraints
from anabranch.runtime.context import Context, Row, Unfed
from anabranch.runtime.device import Device, PagedStore
from anabranch.runtime.drawing import bitmap, penal
from anabranch.runtime.engine import Engine, EngineConfig, Run
from anabranch.runtime.events import BranchEnded, BranchStarted, Path, RunEnded, Status
from anabranch.runtime.models import LoadedModel
from anabranch.runtime.pages import KvStore, PagePool, Segment
from anabranch.runtime.plan_tables import GenTables
from anabranch.runtime.tasks import BranchStopped, Draw, Feed, ForkState, Rows, Score, Spawn, Steps, Task, child_names

LANE_INTS = (
    "thread", "logits", "row", "length", "left", "index", "state", "stop_state", "top_k", "key_0", "key_1", "trace",
)  # fmt: skip
"""Columns of a lane's whole numbers.

thread: its number; logits: the row of the table that the first token is drawn from; row: the one of its own
length: tokens of its segment; left: draws that are left; index: draws before the first
state, stop_state: of the type's automaton, and of that of the stops; trace: the first row of the trace
"""
LANE_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty")


class Host:
    """What a `Task` needs of an engine, for one model."""

    recorder = None

    def __init__(self, model: LoadedModel, constraints: Constraints, *, deterministic: bool) -> None:
        self.model = model
        self.tokenizer = model.tokenizer
        self.chat = model.chat
        self.constraints = constraints
        self.sizes = ModelSizes(model.tokenizer, model.chat)
        self.max_context = model.decoder.config.max_context
        self.config = EngineConfig(deterministic=deterministic)

    def clock(self) -> float:
        return time.monotonic()

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        tokens = self.tokenizer
        return b"".join(tokens.token_bytes(t) for t in token_ids if not tokens.is_special(t)).decode(errors="replace")

    def is_blank(self, context: Context) -> bool:
        """Whether nothing stands in `context` but perhaps a start token."""
        return context.position == (self.tokenizer.bos_id is not None)

    def logprob(self, logits: Tensor, token: int) -> float:
        """Natural log of the probability of `token` under one row of logits."""
        return float(logprob(logits[None].cpu(), torch.tensor([token]))[0])

    def remember(self, context: Context) -> None:
        """A graph's run keeps no prefixes: its pool is its own."""


@dataclass(slots=True)
class _Feed:
    """Tokens that a thread waits for. into: the row of logits that the last token of the context writes, -1 for none

    keep_last: all but the last token are fed, which is left to whoever needs it
    """

    thread: _Thread
    contexts: deque[Context]
    into: int
    flush: bool = False
    keep_last: bool = False


class _Thread(Task):
    """A thread of a graph's run. Its context's logits are the number of a row of the graph's table of logits.

    row: of that table, its own; group: the region that it began in; region_name: the one that it is in
    node_name, resumed: the statement that it is in the middle of, and what it asked for: draw, score, spawned
    lent: rows that hold logits of its branches, until their join is read
    loops: those that it is in, outermost first: (the rounds around it, which round)
    """

    row: int
    group: str
    region_name: str
    node_name: str = ""
    resumed: Steps | None = None
    draw: Draw | None = None
    trace_row: int = 0
    score: Score | None = None
    spawned: ForkState | None = None
    returned: Value = None
    loops: list[tuple[tuple[str, ...], int]]
    lent: list[int]


@dataclass(frozen=True, slots=True)
class _Pending:
    """A branch that has not begun. again: the try before it, which failed"""

    fork: ForkState
    index: int
    group: str
    again: _Thread | None = None


@dataclass(frozen=True, slots=True)
class Lanes:
    """The threads that draw at a gen, row by row, as `open_lanes` of `runtime/plan_ops.py` gives them."""

    ints: Tensor
    floats: Tensor
    seen: Tensor
    forced: Tensor


@dataclass(slots=True)
class _Region:
    """Where threads are. waiting: branches that have not begun; over: threads that returned before the end"""

    inside: list[_Thread] = field(default_factory=list)
    waiting: deque[_Pending] = field(default_factory=deque)
    over: list[_Thread] = field(default_factory=list)


class PlanRun:
    """One run of a plan graph.

    host: of the model, shared by runs
    names: of the plan's regions and nodes
    forced: tokens to draw, by thread, instead of what would be drawn
    pages, page_size: of the KV pools that the graph made; logit_rows: of its table of logits
    Raises PlanError for inputs that do not fit.
    """

    def __init__(
        self,
        host: Host,
        compiled: Compiled,
        names: Names,
        tables: Callable[[graph.Decode], GenTables],
        bounds: Bounds,
        inputs: Mapping[str, Value],
        *,
        seed: int,
        input_index: int,
        forced: Mapping[Path, Sequence[int]],
        pages: int,
        page_size: int,
        logit_rows: int,
    ) -> None:
        self._host = host
        self._engine = cast(Engine, host)
        self._names = names
        self._tables = tables
        self._forced = forced
        self.pool = PagePool(pages, page_size)
        self._regions = {name: _Region() for name in names.regions}
        self._feeds: dict[str, deque[_Feed]] = {name: deque() for name in (*names.nodes, *names.regions)}
        self._fed: list[_Feed] = []
        self._waiting: dict[str, list[_Thread]] = {name: [] for name in names.nodes}
        self._rows = list(range(logit_rows))[::-1]
        self._contexts: dict[int, Context] = {}
        self._num_threads = 0
        self._device: Device | None = None
        self.traced: list[tuple[Path, int, int, int]] = []
        self._num_traced = 0
        self._num_packed = 0
        self.run = Run(
            self._engine, compiled, bounds, dict(inputs), input_index=input_index, seed=seed, functions={},
            listener=None,
        )  # fmt: skip
        self.run.deterministic = True
        plan = compiled.graph.plans[compiled.graph.main]
        root = next(iter(names.regions))
        values = {param: inputs[param] for param in plan.params}
        self._root = _Thread(
            self._engine, self.run, (), self._empty_context(), plan.region, values, budget=plan.limits.budget,
            plan=plan.name,
        )  # fmt: skip
        self._seat(self._root, root)
        self._root.emit(BranchStarted(()))

    # Statements.

    def write(self, name: str) -> None:
        """`text`, `user`, `system` or `assistant`: its tokens are to be fed."""
        node = self._node(name, graph.Write)

        def written(thread: _Thread) -> None:
            start = thread.context.position
            thread._statement(node)
            thread._within(start, self.run.bounds.feed(node).rows)

        self._each(name, written)

    def assign(self, name: str) -> None:
        """`x = expr`, `need` or `return`."""
        node = self._names.nodes[name].node

        def assigned(thread: _Thread) -> None:
            match node:
                case graph.Let():
                    generated = thread._is_generated(node.value)
                    thread.names[node.name] = thread._evaluate(node.value)
                    thread.own_names.add(node.name)
                    if generated:
                        thread.generated.add(node.name)
                case graph.Need():
                    if not thread._evaluate(node.cond):
                        raise BranchStopped(f"`need` does not hold{self.run.at(node.span)}")
                case graph.Return():
                    thread.returned = thread._evaluate(node.value)
                    self._leave(thread)
                    thread.loops.clear()
                    self._regions[thread.group].over.append(thread)
                case _:
                    raise TypeError(f"`{name}` is no assignment")

        self._each(name, assigned)

    def split(self, name: str) -> tuple[bool, bool]:
        """`if`: each thread goes to its arm. Returns whether anybody is in the first, and in the second."""
        node = self._node(name, graph.Cond)
        arms = self._names.nodes[name].inside

        def chosen(thread: _Thread) -> None:
            holds = bool(thread._evaluate(node.cond))
            if holds or len(arms) > 1:
                self._leave(thread)
                self._enter(thread, arms[0 if holds else 1])

        self._each(name, chosen)
        return bool(self._inside(arms[0])), len(arms) > 1 and bool(self._inside(arms[1]))

    def merge(self, name: str) -> None:
        """The end of an `if`."""
        named = self._names.nodes[name]
        for arm in named.inside:
            for thread in self._inside(arm):
                self._leave(thread)
                self._enter(thread, named.region)
        self._regions[named.region].inside.sort(key=lambda thread: thread.number)

    def enter_loop(self, name: str) -> None:
        """Everybody in the region begins its first round."""
        node = self._node(name, graph.Loop)
        [body] = self._names.nodes[name].inside

        def entered(thread: _Thread) -> None:
            thread.loops.append((thread.rounds, 0))
            thread.rounds = (*thread.rounds, f"{node.site}[0]")
            self._leave(thread)
            self._enter(thread, body)

        self._each(name, entered)

    def looping(self, name: str) -> bool:
        """Whether anybody is in the loop."""
        return any(map(self._inside, self._names.nodes[name].inside))

    def until(self, name: str) -> None:
        """The end of a round: whoever is done goes on after the loop."""
        node = self._node(name, graph.Loop)
        named = self._names.nodes[name]

        def ended(thread: _Thread) -> None:
            outer, number = thread.loops.pop()
            done = number + 1 >= node.rounds or (node.until is not None and bool(thread._evaluate(node.until)))
            self._leave(thread)
            if done:
                thread.rounds = outer
                self._enter(thread, named.region)
            else:
                thread.rounds = (*outer, f"{node.site}[{number + 1}]")
                thread.loops.append((outer, number + 1))
                self._enter(thread, named.inside[0])

        for thread in self._inside(named.inside[0]):
            self._guard(thread, ended)
        self._regions[named.region].inside.sort(key=lambda thread: thread.number)

    def begin(self, name: str) -> None:
        """Everybody in the region comes to a `gen` or a fork; what has to be fed first waits for `take`."""
        node = self._names.nodes[name].node

        def begun(thread: _Thread) -> None:
            thread.node_name = name
            match node:
                case graph.Decode():
                    thread.resumed = thread._decode(node)
                case graph.Fork():
                    thread.resumed = thread._fork(node)
                case graph.Map():
                    thread.resumed = thread._map(node)
                case graph.Reduce():
                    thread.resumed = thread._reduce(node)
                case graph.Call():
                    thread.resumed = thread._call(node)
                case _:
                    raise TypeError(f"`{name}` waits for nothing")
            thread._enter(node.dst)
            self._waiting[name].append(thread)
            self._resume(thread, None)

        self._each(name, begun)

    # Feeding.

    def unfed(self, name: str) -> bool:
        """Whether something waits to be fed."""
        return bool(self._feeds[name])

    def take(self, name: str, chunk: int) -> tuple[list[tuple[int, int, int]], list[int], list[int], list[int]]:
        """At most `chunk` rows of what waits: (blocks, token ids, wanted rows, the rows of logits that they write)."""
        feeds = self._feeds[name]
        blocks: list[tuple[int, int, int]] = []
        tokens: list[int] = []
        wanted: list[int] = []
        into: list[int] = []
        while feeds and len(tokens) < chunk:
            feed = feeds[0]
            while feed.contexts and len(tokens) < chunk:
                context = feed.contexts[0]
                due = len(context.unfed) - feed.keep_last
                self._take(context, min(due, chunk - len(tokens)), blocks, tokens, flush=feed.flush)
                if len(context.unfed) > feed.keep_last:
                    break
                feed.contexts.popleft()
                if feed.into >= 0:
                    wanted.append(len(tokens) - 1)
                    into.append(feed.into)
                    context.logits = torch.tensor(feed.into)
            if not feed.contexts:
                self._fed.append(feeds.popleft())
        return blocks, tokens, wanted, into

    def fed(self) -> None:
        """What was taken is fed: whoever waited for it goes on."""
        fed, self._fed = self._fed, []
        for feed in fed:
            thread = feed.thread
            if thread.resumed is not None and thread.draw is None:
                self._resume(thread, None)

    def blocks(self, rows: Sequence[Sequence[int]]) -> list[Block]:
        """The blocks that a step's rows name: (thread, first, count) each."""
        found: list[Block] = []
        for number, first, count in rows:
            context = self._contexts[number]
            if context.segment is None:
                raise RuntimeError(f"thread {number} has no open segment")
            # What a lane drew is the segment's when the gen closes; that it was drawn may decide how it is fed.
            ahead = first + count - len(context.segment.sampled)
            context.segment.sampled.extend(b"\1" * max(0, ahead))
            found.append(Block(context.view, context.segment, first, count, number, context.forks))
        return found

    def step(self, blocks: Sequence[Block], tokens: Tensor, wanted: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Feed rows: logits of the wanted ones, [num_wanted, num_logits]. k, v: every layer's pool, stacked"""
        decoder = self._host.model.decoder
        if not decoder.packed:
            if self._device is None:
                config = self._host.config
                self._device = Device(
                    decoder, self.pool, lanes=config.lanes, chunk=config.chunk, deterministic=config.deterministic,
                    store=PagedStore.over(list(k), list(v)),
                )  # fmt: skip
            return self._device.step(blocks).logits(tokens.tolist(), wanted.tolist())
        store = KvStore.over(list(k), list(v))
        fixed = decoder.fixed_shapes() if self._host.config.deterministic else None
        attention = (
            StepAttention(store, decoder.config, blocks, decoder.dtype)
            if fixed is None
            else FixedAttention(store, decoder.config, blocks, decoder.dtype, fixed)
        )
        return decoder.forward(tokens, attention.positions, attention, wanted, fixed)

    # Choices that are scored.

    def scoring(self, name: str) -> bool:
        """Whether somebody has an option to score."""
        return any(thread.score is not None for thread in self._waiting[name])

    def take_option(self, name: str) -> tuple[list[tuple[int, int, int]], list[int], list[int]]:
        """The next option of each thread that scores: (blocks, token ids, the row of logits before each block)."""
        blocks: list[tuple[int, int, int]] = []
        tokens: list[int] = []
        before: list[int] = []
        for thread in self._waiting[name]:
            if thread.score is not None:
                context = thread.context
                assert context.logits is not None
                before.append(int(context.logits))
                context.push(thread.score.token_ids, Row.PREFILL)
                self._take(context, len(context.unfed), blocks, tokens)
        return blocks, tokens, before

    def scored(self, name: str, before: Sequence[int], table: Tensor, logits: Tensor) -> None:
        """The options were fed: they are taken back, and their threads go on.

        table: of logits; logits: of every row of the options
        """
        first = 0
        for thread, row in zip([t for t in self._waiting[name] if t.score is not None], before, strict=True):
            assert thread.score is not None
            count = len(thread.score.token_ids)
            thread.context.trim(count)
            thread.context.logits = torch.tensor(row)
            rows = [table[row], *logits[first : first + count - 1]]
            first += count
            thread.score = None
            self._resume(thread, rows)

    # Drawing.

    def open_lanes(self, name: str) -> Lanes:
        """The threads that draw now, each with slots for all it may draw."""
        node = self._node(name, graph.Decode)
        vocab = self._host.model.decoder.num_logits
        ints: list[list[int]] = []
        floats: list[list[float]] = []
        seen: list[Tensor] = []
        forced: list[list[int]] = []
        tables = self._tables(node)
        for thread in self._waiting[name]:
            request, context = thread.draw, thread.context
            if request is None:
                continue
            generation = request.generation
            if context.segment is None:
                context.segment = Segment(self.pool, context.position, expect=context.expect)
            segment, size = context.segment, self.pool.page_size
            self._check_room(-(-(segment.length + generation.left) // size) - len(segment.pages))
            segment.reserve(segment.length + generation.left)
            state = -1
            if isinstance(generation.constraint, AutomatonConstraint):
                state = tables.state_of(generation.constraint)
            assert context.logits is not None
            thread.trace_row = self._num_traced
            ints.append([
                thread.number, int(context.logits), thread.row, context.segment.length, generation.left, thread.drawn,
                state, tables.first_stop_state(held_space=generation.held_space), int(request.parameters["top_k"]),
                *request.key, self._num_traced,
            ])  # fmt: skip
            self._num_traced += generation.left
            options = request.parameters
            floats.append([
                options["temperature"], options["top_p"], options["min_p"], options["repetition_penalty"],
                options["presence_penalty"],
            ])  # fmt: skip
            if penal(request):
                seen.append(bitmap(thread.drawn_ids, vocab))
            else:
                seen.append(torch.zeros(-(-vocab // 32), dtype=torch.int32))
            script = list(self._forced.get(thread.path, ()))[thread.drawn :][: node.spec.max_tokens]
            forced.append(script + [-1] * (node.spec.max_tokens - len(script)))
        return Lanes(
            torch.tensor(ints, dtype=torch.int64).view(-1, len(LANE_INTS)),
            torch.tensor(floats, dtype=torch.float32).view(-1, len(LANE_FLOATS)),
            torch.stack(seen) if seen else torch.zeros(0, -(-vocab // 32), dtype=torch.int32),
            torch.tensor(forced, dtype=torch.int64).view(-1, node.spec.max_tokens),
        )

    def close_lanes(self, name: str, tokens: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]) -> None:
        """What each lane drew, -1 where nothing was allowed or after its end; the gen's value is read from it.

        Raises ValueError for logits that were not finite.
        """
        lanes = [thread for thread in self._waiting[name] if thread.draw is not None]
        for thread, drawn, logs in zip(lanes, tokens, logprobs, strict=True):
            request, context = thread.draw, thread.context
            assert request is not None and context.logits is not None
            generation, begun = request.generation, int(context.logits)
            assert context.segment is not None
            del context.segment.sampled[context.segment.length :]
            fed = 0
            for token, log in zip(drawn, logs, strict=True):
                if context.unfed:
                    self._count(context.take(1)[0])
                    fed += 1
                if token < 0:
                    break
                self._push(thread, request, token, log)
                if generation.done is not None:
                    break
            if generation.done is None:
                generation.mask()
            if generation.done is None:
                raise ValueError(f"the logits of {'/'.join(thread.path)} are not finite")
            # Those that the last token was drawn from.
            context.logits = torch.tensor(thread.row if fed else begun)
            thread.draw = None
            self._resume(thread, None)

    def pack_trace(self, trace: Tensor) -> None:
        """The rows of the trace that the last lanes wrote are put side by side. trace: [num_rows, num_logits]"""
        packed = self._num_packed
        fresh = self.traced[packed:]
        trace[packed : len(self.traced)] = trace[[row for *_, row in fresh]]
        self.traced[packed:] = [
            (path, index, token, packed + place) for place, (path, index, token, _) in enumerate(fresh)
        ]
        self._num_packed = self._num_traced = len(self.traced)

    # Forks.

    def forking(self, name: str) -> bool:
        """Whether a fork is open: of a `reduce`, another level of it."""
        return any(thread.spawned is not None for thread in self._waiting[name])

    def pending(self, region: str) -> bool:
        """Whether branches of a region have not begun."""
        return bool(self._regions[region].waiting)

    def admit(self, region: str, lanes: int) -> None:
        """The next branches begin, at most `lanes` of them together."""
        waiting = self._regions[region].waiting
        while waiting and len(self._regions[region].inside) < lanes:
            self._start(waiting.popleft())

    def end(self, region: str) -> None:
        """Threads of a region are at its end: what a stitch needs of them waits for `take`, but for a last token."""
        for thread in self._at_end(region):
            fork, context = thread.parent, thread.context
            if fork is not None and fork.join.spec.context == "stitch" and len(context.unfed) > 1:
                self._feeds[region].append(_Feed(thread, deque([context]), -1, keep_last=True))

    def retire(self, region: str) -> None:
        """Threads of a region end: their joins are told."""
        for thread in self._at_end(region):
            self._leave(thread)
            if thread in self._regions[region].over:
                self._regions[region].over.remove(thread)
                value = thread.returned
            else:
                value = "".join(thread.text)
            self._close(thread, "ok", value, "")

    def join(self, name: str) -> None:
        """All branches have ended: what comes out is decided, and what has to be fed for it waits for `take`."""
        for thread in list(self._waiting[name]):
            fork = thread.spawned
            if fork is None:
                continue
            thread.spawned = None
            if not fork.join.decided(lambda: None):
                raise RuntimeError(f"{fork.site}: branches have not ended")
            fork.closed = True
            thread.fork = None
            thread.critical = max([thread.critical, *(ended.critical for ended in fork.join.ended.values())])
            self._resume(thread, fork.join.result())

    # The end.

    def finish(self) -> RunEnded:
        """Raises RuntimeError while threads are still under way."""
        last = self.run.events[-1]
        if not isinstance(last, BranchEnded) or last.path:
            raise RuntimeError("threads are still under way")
        counts: dict[str, int | float] = dict(self.run.counts)
        counts["critical_path_tokens"] = self._root.critical
        counts["tokens_prefilled"] = self.run.rows[Row.PREFILL] + self.run.rows[Row.REPREFILL]
        counts["tokens_reprefilled"] = self.run.rows[Row.REPREFILL]
        counts["tokens_flushed"] = self.run.rows[Row.FLUSH]
        counts["tokens_recomputed"] = self.run.rows[Row.RECOMPUTE]
        counts["rows"] = sum(self.run.rows)
        counts["pages_peak"] = self.pool.peak
        counts["elapsed_s"] = self._host.clock() - self.run.started_s
        over = RunEnded(last.status, last.value, last.reason, counts)
        self.run.emit(over)
        return over

    # Threads.

    def _node(self, name: str, kind: type[Any]) -> Any:
        node = self._names.nodes[name].node
        if not isinstance(node, kind):
            raise TypeError(f"`{name}` is a {type(node).__name__}")
        return node

    def _inside(self, region: str) -> list[_Thread]:
        return list(self._regions[region].inside)

    def _at_end(self, region: str) -> list[_Thread]:
        found = self._regions[region]
        return sorted((*found.inside, *found.over), key=lambda thread: thread.number)

    def _each(self, name: str, act: Callable[[_Thread], None]) -> None:
        for thread in self._inside(self._names.nodes[name].region):
            self._guard(thread, act)

    def _guard(self, thread: _Thread, act: Callable[[_Thread], None]) -> None:
        try:
            act(thread)
        except BranchStopped as stopped:
            self._stop(thread, stopped.status, stopped.reason)
        except EvaluationError as error:
            self._stop(thread, "failed", error.reason + self.run.at(error.span))

    def _enter(self, thread: _Thread, region: str) -> None:
        thread.region_name = region
        self._regions[region].inside.append(thread)

    def _leave(self, thread: _Thread) -> None:
        inside = self._regions[thread.region_name].inside
        if thread in inside:
            inside.remove(thread)

    def _resume(self, thread: _Thread, answer: Any) -> None:
        """The statement that a thread is in goes on to its next request, or to its end."""

        def on(thread: _Thread) -> None:
            assert thread.resumed is not None
            try:
                request = thread.resumed.send(answer)
            except StopIteration:
                thread.resumed = None
                self._waiting[thread.node_name].remove(thread)
                self._keep_logits(thread)
                return
            feeds, context = self._feeds[thread.node_name], thread.context
            match request:
                case Feed(flush):
                    feeds.append(_Feed(thread, deque([context]), thread.row, flush))
                case Rows(contexts):
                    # Of several winners nobody reads the logits.
                    into = self._take_row() if len(contexts) == 1 else -1
                    if into >= 0:
                        thread.lent.append(into)
                    feeds.append(_Feed(thread, deque(contexts), into, flush=True))
                case Draw():
                    thread.draw = request
                    if context.unfed:
                        feeds.append(_Feed(thread, deque([context]), thread.row))
                case Score():
                    thread.score = request
                case Spawn(fork):
                    self._spawn(thread, fork)
                case _:
                    raise RuntimeError(f"a graph does not serve {type(request).__name__}")

        self._guard(thread, on)

    def _spawn(self, thread: _Thread, fork: ForkState) -> None:
        named = self._names.nodes[thread.node_name]
        fork.depth = thread.depth if fork.callee is None else 0
        thread.fork = thread.spawned = fork
        arms = [0] * fork.width
        if isinstance(named.node, graph.Fork) and named.node.width is None:
            arms = [place for place, arm in enumerate(named.node.arms) for _ in range(arm.multiplicity)]
        for index, arm in enumerate(arms):
            group = named.inside[arm]
            self._regions[group].waiting.append(_Pending(fork, index, group))

    def _start(self, pending: _Pending) -> None:
        """A branch begins, or a further try of it."""
        fork, index, before = pending.fork, pending.index, pending.again
        parent = fork.parent
        branch = fork.branch(index)
        attempt = 0 if before is None else before.attempt + 1
        path = (*parent.here, f"{fork.site}[{branch.key}]{f'~{attempt}' if attempt else ''}")
        if fork.limits.fresh or branch.limits.fresh:
            context = self._empty_context()
        else:
            outer = parent.context
            context = Context(self.pool, outer.view, outer.position, outer.role)
            context.owner = self._number()
            context.logits = outer.logits
            context.forks = outer.forks if outer.view is None else (*outer.forks, outer.view)
            self.run.counts["tokens_aliased"] += outer.view.total_tokens if outer.view is not None else 0
        thread = _Thread(
            self._engine, self.run, path, context, branch.region,
            dict(branch.names) if fork.callee is not None else child_names(parent.names, branch.names),
            parent=fork, index=index, label=branch.label, budget=branch.budget, depth=fork.depth,
            critical=fork.critical, plan=fork.callee or parent.plan, own_names=tuple(branch.names),
            generated=branch.generated,
        )  # fmt: skip
        thread.attempt = attempt
        if before is not None:
            thread.critical = max(thread.critical, before.critical)
            thread.below = before.tokens
            if before.budget is not None:
                thread.budget = before.budget - before.spent - before.charged
        self._seat(thread, pending.group)
        thread.emit(BranchStarted(thread.path, thread.label))

        def opened(thread: _Thread) -> None:
            if branch.prompt is not None:
                start = thread.context.position
                thread._write(branch.prompt, hold_space=branch.hold_space)
                thread._within(start, self.run.bounds.start_of(thread.region).rows)

        self._guard(thread, opened)

    def _stop(self, thread: _Thread, status: Status, reason: str) -> None:
        """A thread cannot go on: it is run again if it may be, or ends."""
        self._leave(thread)
        if thread.resumed is not None:
            thread.resumed.close()
            thread.resumed = None
            self._waiting[thread.node_name].remove(thread)
        fork = thread.parent
        if status == "failed" and fork is not None:
            branch = fork.branch(thread.index)
            if thread.attempt < max(branch.limits.retry, fork.limits.retry):
                thread.leave(status, None, reason, again=True)
                self._let_go(thread)
                self._regions[thread.group].waiting.append(_Pending(fork, thread.index, thread.group, thread))
                return
        self._close(thread, status, None, reason)

    def _close(self, thread: _Thread, status: Status, value: Value, reason: str) -> None:
        """A thread is over, and its parent's join is told."""
        fork = thread.parent
        keeps = status == "ok" and fork is not None and fork.join.spec.context == "stitch"
        if keeps and fork is not None:
            spec = fork.join.spec
            if fork.width > 1 and (spec.kind == "all" or (spec.kind == "first" and (spec.count or 1) > 1)):
                thread.context.logits = None
            else:
                # The parent may go on from the last token: its logits come with the flush, and none are kept till then.
                thread._feed_last_again()
        ended = thread.leave(status, value, reason)
        if not keeps:
            self._let_go(thread)
        elif not thread.context.unfed and thread.context.logits is not None and fork is not None:
            # A stitch of its own ended it: there is no last token of its own to feed again, and its logits stay.
            cast(_Thread, fork.parent).lent.append(thread.row)
        else:
            self._free_rows(thread)
        if fork is not None:
            if keeps or (status == "ok" and fork.join.spec.context == "text"):
                fork.finished[thread.index] = thread
            fork.join.offer(ended)

    def _let_go(self, thread: _Thread) -> None:
        self._contexts.pop(thread.number, None)
        self.run.drop(thread.context)
        self._free_rows(thread)

    def _seat(self, thread: _Thread, group: str) -> None:
        """A new thread stands at the beginning of its region."""
        thread.group = group
        thread.loops, thread.lent = [], []
        thread.row = self._take_row()
        self._contexts[thread.number] = thread.context
        self._enter(thread, group)

    def _keep_logits(self, thread: _Thread) -> None:
        """A fork is over: if its winner's logits are the thread's own now, so is the row that they stand in."""
        for row in thread.lent:
            if thread.context.logits is not None and int(thread.context.logits) == row:
                row, thread.row = thread.row, row
            self._rows.append(row)
        thread.lent.clear()

    def _free_rows(self, thread: _Thread) -> None:
        self._rows += [thread.row, *thread.lent]
        thread.lent.clear()

    def _take_row(self) -> int:
        if not self._rows:
            raise RuntimeError("the table of logits is full")
        return self._rows.pop()

    def _number(self) -> int:
        self._num_threads += 1
        return self._num_threads - 1

    def _empty_context(self) -> Context:
        context = Context(self.pool, None, 0, None)
        context.owner = self._number()
        bos = self._host.tokenizer.bos_id
        if bos is not None:
            context.push([bos], Row.PREFILL)
        return context

    def _take(
        self,
        context: Context,
        count: int,
        blocks: list[tuple[int, int, int]],
        tokens: list[int],
        *,
        flush: bool = False,
    ) -> None:
        """Take rows of a context into the step."""
        self._check_room(context.pages_for(count))
        assert context.owner is not None
        fed, _, first = context.take(count)
        blocks.append((context.owner, first, count))
        tokens.extend(unfed.token for unfed in fed)
        self._count(fed, flush=flush)

    def _count(self, fed: Sequence[Unfed], *, flush: bool = False) -> None:
        for unfed in fed:
            self.run.rows[Row.FLUSH if flush and unfed.row is Row.DECODE else unfed.row] += 1

    def _check_room(self, pages: int) -> None:
        if pages > self.pool.num_free:
            plan = self.run.graph.plans[self.run.graph.main]
            raise PlanError(
                Diagnostic(
                    "pool-too-small",
                    f"the graph's pool of {self.pool.num_pages} pages is full: branches of a region run together",
                    plan.span,
                    help="make the graph with more `pages`, or with fewer `lanes`",
                ),
                self.run.compiled.program.source,
            )

    def _push(self, thread: _Thread, request: Draw, token: int, log: float) -> None:
        """What a lane drew goes to its gen and its context."""
        self.traced.append((thread.path, thread.drawn, token, thread.trace_row + request.generation.drawn))
        request.generation.push(token, log)
        thread.drawn += 1
        thread.spent += 1
        thread.critical += 1
        thread.drawn_ids.append(token)
        self.run.counts["tokens_decoded"] += 1
        self.run.counts["total_tokens"] += 1
        if request.wants_logprobs:
            thread.logprob_sum += log
            thread.logprob_count += 1
        thread.context.push([token], Row.DECODE)
