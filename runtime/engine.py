"""The engine: many runs of plans in one batch over one page pool."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from anabranch.compiler import recording
from anabranch.compiler.bounds import Bounds, steps_bound
from anabranch.compiler.graph import Graph
from anabranch.compiler.pipeline import Compiled, compile_plan
from anabranch.compiler.scheduler import Machine, Policy, Scheduler, Step, Thread
from anabranch.compiler.sizes import ModelSizes
from anabranch.dsl.ast import Program
from anabranch.dsl.check import Target, check
from anabranch.dsl.diagnostics import Span
from anabranch.dsl.parse import parse_text
from anabranch.dsl.printer import print_plan
from anabranch.dsl.spec import Value
from anabranch.dsl.values import EvaluationError
from anabranch.kernels.sample import logprob
from anabranch.runtime.attention import Block, StepAttention
from anabranch.runtime.attention_fixed import FixedAttention
from anabranch.runtime.constrain import Constraints
from anabranch.runtime.context import Context, Row
from anabranch.runtime.device import Device, PagedStore, StepOnDevice
from anabranch.runtime.drawing import DrawRow, draw_rows, draw_rows_on_device
from anabranch.runtime.events import BranchEnded, Event, GenEnded, LogitsRow, Path, RunEnded, Status, TextDelta
from anabranch.runtime.interrupt import stop_on_interrupt
from anabranch.runtime.joins import Ended
from anabranch.runtime.models import LoadedModel
from anabranch.runtime.pages import Entry, KvStore, PagePool, Segment, View
from anabranch.runtime.recorder import Recorder
from anabranch.runtime.replay import Log, LogEntry, Replay
from anabranch.runtime.tasks import BranchStopped, Draw, Feed, ForkState, Reserve, Rows, Score, Spawn, Task, child_names
from anabranch.runtime.waves import Drawn, LaneStep, Waves


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine runs.

    lanes: threads that hold a row of the batch at once
    pages, page_size: KV pages, and token slots in each; None takes as many pages as `pool_bytes` holds
    chunk: most prefilled rows in one step
    deterministic: joins close by tokens decoded, not by time, deadlines are refused, and a branch's logits are the same
        bit for bit whatever else runs. Raises PlanError `not-deterministic` where this machine cannot keep that
    trace_logits: keep the logits that each token was drawn from (tests; a row is as large as the vocabulary)
    prefix_cache: keep the pages of finished prompts for later runs
    run_ahead: on a device, decode steps that may be under way while the host handles what came before; tokens do not
        depend on it
    preempt: what becomes of a thread that started on expected need when the pool runs out: its keys and values go to
        host memory and come back bit for bit (`swap`), or are computed again from its tokens (`recompute`). Under
        `never` a thread starts only when its worst case is reserved, and lanes may stand empty
    """

    lanes: int = 64
    pages: int | None = None
    page_size: int = 16
    chunk: int = 512
    pool_bytes: int = 2 << 30
    deterministic: bool = False
    trace_logits: bool = False
    prefix_cache: bool = True
    run_ahead: int = 1
    preempt: Literal["swap", "recompute", "never"] = "swap"


@dataclass(frozen=True, slots=True)
class BranchRecord:
    """One thread of a finished run, as `run --json` shows it."""

    path: str
    label: str | None
    status: Status
    text: str
    reason: str
    tokens: int
    value: Value


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run came to. `value` is None unless `status` is ok."""

    value: Value
    status: Status
    reason: str
    branches: tuple[BranchRecord, ...]
    counts: Mapping[str, int | float]
    events: tuple[Event, ...]
    logits: tuple[LogitsRow, ...] = ()

    @classmethod
    def of(cls, events: Sequence[Event], logits: Sequence[LogitsRow] = ()) -> RunResult:
        """What the events of a run that is over tell; the last is its `RunEnded`."""
        over = events[-1]
        if not isinstance(over, RunEnded):
            raise ValueError("the run is not over")
        branches = tuple(
            BranchRecord("/".join(e.path), e.label, e.status, e.text, e.reason, e.tokens, e.value)
            for e in events
            if isinstance(e, BranchEnded) and e.path
        )
        return cls(over.value, over.status, over.reason, branches, over.counts, tuple(events), tuple(logits))


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """An event of `stream`, with the input it belongs to."""

    input_index: int
    event: Event


class Interrupted(KeyboardInterrupt):
    """The run was interrupted; `results` holds what was finished."""

    def __init__(self, results: list[RunResult]) -> None:
        super().__init__("interrupted")
        self.results = results


COUNTS = (
    "tokens_decoded", "tokens_trimmed", "tokens_prefilled", "tokens_reprefilled", "tokens_flushed", "tokens_cached",
    "tokens_recomputed", "tokens_replayed", "tokens_aliased", "tokens_stitched", "tokens_unfed",
    "critical_path_tokens", "total_tokens", "rows", "steps",
)  # fmt: skip


LATE = "the deadline passed"


class Run:
    """One plan on one input."""

    def __init__(
        self,
        engine: Engine,
        compiled: Compiled,
        bounds: Bounds,
        inputs: Mapping[str, Value],
        *,
        input_index: int,
        seed: int,
        functions: Mapping[str, Callable[..., Any]],
        listener: Callable[[Run, Event], None] | None,
    ) -> None:
        self.engine = engine
        self.compiled = compiled
        self.graph: Graph = compiled.graph
        self.bounds = bounds
        self.inputs = inputs
        self.input_index = input_index
        self.seed = seed
        self.functions = functions
        self.deterministic = engine.config.deterministic
        self.wants_logprobs = compiled.reads_logprobs
        self.listener = listener
        self.log: Log | None = None
        self.replay: Replay | None = None
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self.rows = [0] * len(Row)
        self.events: list[Event] = []
        self.logits: list[LogitsRow] = []
        self.root: Task | None = None
        self.started_s = engine.clock()
        self.number = 0
        self.last_step = -1
        self.result: RunResult | None = None

    def emit(self, event: Event) -> None:
        self.events.append(event)
        if self.listener is not None:
            self.listener(self, event)

    def tell(self, events: Sequence[Event]) -> None:
        """What a journal holds happened without any thread's doing it again."""
        for event in events:
            if isinstance(event, GenEnded):
                self.count_recorded(event)
            self.emit(event)

    def count_recorded(self, ended: GenEnded) -> None:
        """Count a gen that a journal holds."""
        self.counts["tokens_replayed"] += ended.drawn
        self.counts["total_tokens"] += len(ended.ids) if ended.end == "recorded" else ended.drawn

    def drop(self, context: Context) -> None:
        """Let go of a context; sampled tokens that nothing needed are counted as never fed."""
        context.owner = None
        self.forget(context)
        context.drop()

    def forget(self, context: Context) -> None:
        """Nothing will need the unfed tokens of a context."""
        self.counts["tokens_unfed"] += sum(u.row is Row.DECODE for u in context.unfed)
        context.discard(len(context.unfed))

    def at(self, span: Span | None) -> str:
        """Where in the plan's source, as ` (line 4)`; empty where that is not known."""
        if span is None:
            return ""
        line, _ = self.compiled.program.source.position(span.start)
        return f" (line {line})"

    def check_position(self, position: int) -> None:
        """Positions end with the model's context."""
        most = self.engine.max_context
        if position > most:
            raise BranchStopped(f"the text is longer than the model's context of {most} tokens")


@dataclass(slots=True)
class _Work:
    """What a seated task has asked for.

    queue: contexts to feed from, in order
    rides: a sampled token at the head of one is no row of the feed, but rides along
    """

    task: Task
    queue: list[Context]
    flush: bool = False
    rides: bool = True
    draw: Draw | None = None
    score: Score | None = None
    scored: list[Tensor] = field(default_factory=list)


class Engine:
    """Runs plans on one model. Several streams, and several threads, may share it: their runs share its batch."""

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig | None = None,
        *,
        policy: Policy | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """policy: who gets a lane, and who is preempted
        recorder: writes down what is done, as a schedule that can be verified

        Raises ValueError for a model on a device whose kernels do not support it, or its page size.
        """
        self.model = model
        self.policy = policy
        self.config = config or EngineConfig()
        decoder = model.decoder
        if self.config.deterministic and decoder.packed:
            decoder.fixed_shapes()
        shape = decoder.config
        pages = self.config.pages
        if pages is None:
            page_bytes = (
                2
                * shape.num_layers
                * shape.num_kv_heads
                * shape.head_dim
                * self.config.page_size
                * decoder.dtype.itemsize
            )
            pages = max(64, self.config.pool_bytes // page_bytes)
        self.machine = Machine(self.config.lanes, pages, self.config.page_size, self.config.chunk)
        self.pool = PagePool(pages, self.config.page_size)
        self.recorder = recorder
        if recorder is not None:
            recorder.attach(self.machine, deterministic=self.config.deterministic)
            self.pool.recorder = recorder
        self.tokenizer = model.tokenizer
        self.device: Device | None = None
        self.waves: Waves | None = None
        self.store: KvStore | PagedStore
        if decoder.packed:
            self.store = KvStore(self.pool, shape.num_layers, shape.num_kv_heads, shape.head_dim, decoder.dtype)
        else:
            with self._on_its_device():
                self.device = Device(
                    decoder,
                    self.pool,
                    lanes=self.config.lanes,
                    chunk=self.config.chunk,
                    deterministic=self.config.deterministic,
                )
                self.store = self.device.store
                self.waves = self._new_waves(self.device)
        self.chat = model.chat
        self.constraints = Constraints(model.tokenizer)
        self.sizes = ModelSizes(model.tokenizer, model.chat)
        self.max_context = shape.max_context
        self.scheduler = self._new_scheduler()
        self.num_steps = 0
        self.num_preempted = 0
        self._num_threads = 0
        self._tasks: dict[Thread, Task] = {}
        self._forks: dict[Any, ForkState] = {}
        self._work: dict[Thread, _Work] = {}
        self._deadlines: list[ForkState] = []
        self._runs: list[Run] = []
        # The bounds of every run since the engine was last idle: what they share a pool and steps with.
        self._batch: list[Bounds] = []
        self._lock = threading.RLock()

    def compile(
        self, plan: Program | str | Compiled, name: str | None = None, functions: Sequence[str] = ()
    ) -> Compiled:
        """Compile a plan for this engine. Raises PlanError.

        What is compiled already is taken as it is: a `max` below what its type takes then fails the branch.
        """
        if isinstance(plan, Compiled):
            if self.config.deterministic:
                # It may have been compiled for a place where the clock is read.
                check(plan.program, functions=functions, target=Target(self.model.name, deterministic=True))
            return plan
        program = parse_text(plan) if isinstance(plan, str) else plan
        target = Target(
            self.model.name,
            deterministic=self.config.deterministic,
        )
        start_token = self.tokenizer.bos_id is not None
        compiled = compile_plan(program, name, functions=functions, target=target, start_token=start_token)
        compiled.check_least(self.constraints.least_tokens)
        return compiled

    def submit(
        self,
        plan: Program | str | Compiled,
        inputs: Mapping[str, Value] | None = None,
        *,
        name: str | None = None,
        seed: int = 0,
        input_index: int = 0,
        functions: Mapping[str, Callable[..., Any]] | None = None,
        listener: Callable[[Run, Event], None] | None = None,
        log: Log | None = None,
        replay: Replay | None = None,
    ) -> Run:
        """Queue a run; `step` moves it on. Raises PlanError if the plan or its inputs are wrong, or can never fit.

        Raises ValueError for a replay on an engine that is recorded: a recording holds nothing of before the kill.

        log: takes what a journal keeps of the run
        replay: what a journal holds of it; the run goes on from there, and `step` raises PlanError if it does not fit
        """
        if replay is not None and self.recorder is not None:
            raise ValueError("a run that goes on from a journal cannot be recorded")
        compiled = self.compile(plan, name, tuple(functions or ()))
        run = self._prepare(compiled, inputs or {}, seed, input_index, functions or {}, listener)
        run.log, run.replay = log, replay
        with self._lock:
            self._open(run)
        return run

    def _prepare(
        self,
        compiled: Compiled,
        inputs: Mapping[str, Value],
        seed: int,
        input_index: int,
        functions: Mapping[str, Callable[..., Any]],
        listener: Callable[[Run, Event], None] | None,
    ) -> Run:
        bounds = compiled.bounds(self, inputs)
        return Run(
            self,
            compiled,
            bounds,
            dict(inputs),
            input_index=input_index,
            seed=seed,
            functions=functions,
            listener=listener,
        )

    def _submit_all(
        self,
        plan: Program | str | Compiled,
        inputs: Sequence[Mapping[str, Value]] | Mapping[str, Value] | None,
        name: str | None,
        seed: int,
        functions: Mapping[str, Callable[..., Any]] | None,
        listener: Callable[[Run, Event], None] | None,
    ) -> list[Run]:
        """Queue a run for each input, or none if one of them is wrong."""
        compiled = self.compile(plan, name, tuple(functions or ()))
        given = [inputs] if isinstance(inputs, Mapping) else [{}] if inputs is None else list(inputs)
        runs = [
            self._prepare(compiled, values, seed, index, functions or {}, listener)
            for index, values in enumerate(given)
        ]
        with self._lock:
            for run in runs:
                self._open(run)
        return runs

    def run(
        self,
        plan: Program | str | Compiled,
        inputs: Sequence[Mapping[str, Value]] | Mapping[str, Value] | None = None,
        *,
        name: str | None = None,
        seed: int = 0,
        functions: Mapping[str, Callable[..., Any]] | None = None,
        listener: Callable[[Run, Event], None] | None = None,
    ) -> list[RunResult]:
        """Run a plan on each of `inputs` (one mapping, or several), all in one batch; results in their order.

        On ctrl-C the runs are cancelled and `Interrupted` carries what was finished.
        """
        runs = self._submit_all(plan, inputs, name, seed, functions, listener)
        try:
            with stop_on_interrupt() as stopped:
                while any(run.result is None for run in runs) and not stopped.is_set():
                    self.step()
        finally:
            for run in runs:
                self.cancel(run)
        results = [_result(run) for run in runs]
        if stopped.is_set():
            raise Interrupted(results)
        return results

    async def stream(
        self,
        plan: Program | str | Compiled,
        inputs: Sequence[Mapping[str, Value]] | Mapping[str, Value] | None = None,
        *,
        name: str | None = None,
        seed: int = 0,
        functions: Mapping[str, Callable[..., Any]] | None = None,
    ) -> AsyncIterator[StreamEvent]:
        """The events of the runs as they happen; leaving the loop early cancels them."""
        pending: deque[StreamEvent] = deque()

        def listener(run: Run, event: Event) -> None:
            pending.append(StreamEvent(run.input_index, event))

        runs = self._submit_all(plan, inputs, name, seed, functions, listener)
        try:
            while any(run.result is None for run in runs):
                step = asyncio.ensure_future(asyncio.to_thread(self.step))
                try:
                    await asyncio.shield(step)
                except asyncio.CancelledError:
                    # The thread cannot be stopped, and the runs must not be cancelled under its hands.
                    await asyncio.wait([step])
                    raise
                while pending:
                    yield pending.popleft()
            # Another stream's step may have brought the end.
            while pending:
                yield pending.popleft()
        finally:
            for run in runs:
                self.cancel(run)

    def cancel(self, run: Run) -> None:
        """End a run that is not over; its branches that run are cancelled."""
        with self._lock, self._on_its_device():
            # A journal goes on from where the run was, and not from its having been cancelled.
            run.log = None
            if run.result is None and run.root is not None:
                self._end(run.root, "cancelled", None, "cancelled")

    def step(self) -> bool:
        """Start what can start and call the model once. Returns False when nothing is left to do.

        If a step breaks, every run that is not over fails, and the engine starts anew from an empty pool.
        """
        with self._lock, self._on_its_device():
            try:
                return self._step()
            except BaseException as error:
                self._abandon(f"{type(error).__name__}: {error}")
                raise

    def _step(self) -> bool:
        self._expire()
        self._start()
        step = self.scheduler.next()
        if step is None:
            if self._runs and not self._wait():
                raise RuntimeError("nothing can run and plans are left: the scheduler is stuck")
            return bool(self._runs)
        fits = self._make_room(step)
        if fits is not None:
            self._execute(fits)
        return bool(self._runs)

    def _make_room(self, step: Step) -> Step | None:
        """The step, once the pool holds what it writes; guests are preempted for that. None if none of it is left."""
        rows = sum(count for _, count in step.feeds) + 2 * (len(step.feeds) + len(step.draws))
        if self._num_free() >= rows:
            return step
        wanted = {thread: self._pages_for(self._work[thread], count) for thread, count in step.feeds}
        for thread in step.draws:
            context = self._work[thread].queue[0]
            wanted[thread] = context.pages_for(len(context.unfed))
        while self._num_free() < sum(wanted.values()):
            thread = self.scheduler.victim()
            self._preempt(thread)
            wanted.pop(thread, None)
        feeds = tuple((thread, count) for thread, count in step.feeds if thread in wanted)
        draws = tuple(thread for thread in step.draws if thread in wanted)
        return Step(feeds, draws, step.repeat) if feeds or draws else None

    def _num_free(self) -> int:
        """Pages that nobody holds, or the prefix cache alone."""
        return self.machine.pages - self.pool.used + self.pool.idle

    def _pages_for(self, work: _Work, count: int) -> int:
        return sum(context.pages_for(rows) for context, rows in self._portions(work, count))

    def _preempt(self, thread: Thread) -> None:
        """A guest gives its pages up."""
        task, work = self._tasks[thread], self._work.get(thread)
        context = task.context
        feed = thread.feed
        if context.segment is not None and context.segment.pages:
            # Options that are being scored are half fed, and fed again they would be scored twice.
            if self.config.preempt == "swap" or (work is not None and work.score is not None):
                context.segment.swap_out(self.store)
            else:
                context.lose()
                if work is not None:
                    # A sampled token that comes after lost ones is counted as a row, so it does not ride.
                    work.rides = False
                    feed = len(context.unfed)
        self.scheduler.preempt(thread, feed=feed)
        self.num_preempted += 1

    def _bring_back(self, task: Task) -> None:
        """A thread that was parked, or preempted, has its reservation now."""
        segment = task.context.segment
        if segment is not None and segment.swapped is not None:
            while self._num_free() * self.machine.page_size < segment.length:
                self._preempt(self.scheduler.victim())
            segment.swap_in(self.store)
        if isinstance(task.request, Reserve):
            self._resume(task, None)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        tokens = self.tokenizer
        return b"".join(tokens.token_bytes(t) for t in token_ids if not tokens.is_special(t)).decode(errors="replace")

    def logprob(self, logits: Tensor, token: int) -> float:
        """Natural log of the probability of `token` under one row of logits, unmasked, at temperature 1."""
        return float(logprob(logits[None].cpu(), torch.tensor([token]))[0])

    def is_blank(self, context: Context) -> bool:
        """Whether nothing stands in `context` but perhaps a start token."""
        return context.position == (self.tokenizer.bos_id is not None)

    def remember(self, context: Context) -> None:
        """Index a sealed prefix that begins at the root, for later runs."""
        if not self.config.prefix_cache or context.view is None:
            return
        ids: list[int] = []
        pages: list[int] = []
        for link in context.view.chain():
            for entry in link.entries:
                segment = entry.segment
                if entry.shift or segment.start != len(ids) or len(ids) % self.pool.page_size:
                    break
                ids.extend(segment.ids)
                pages.extend(segment.pages)
            else:
                continue
            break
        self.pool.cache.insert(ids, pages)

    def _abandon(self, reason: str) -> None:
        """Forget all runs: what a broken step left half done cannot be trusted."""
        for run in self._runs:
            run.result = RunResult(None, "failed", reason, (), dict(run.counts), tuple(run.events), tuple(run.logits))
        for held in (self._runs, self._batch, self._tasks, self._forks, self._work, self._deadlines):
            held.clear()
        if self.recorder is not None:
            self.recorder.give_up(reason)
        self.scheduler = self._new_scheduler()
        self.pool = PagePool(self.machine.pages, self.machine.page_size)
        if self.device is not None and self.waves is not None:
            self.device.forget()
            self.waves.leave()

    def _on_its_device(self) -> AbstractContextManager[Any]:
        """Streams, events and launches are those of the current device, which each thread has its own of."""
        where = self.model.decoder.device
        return torch.cuda.device(where) if where.type == "cuda" else nullcontext()

    def _new_waves(self, device: Device) -> Waves:
        engine = weakref.ref(self)

        def num_free() -> int:
            found = engine()
            return 0 if found is None else found._num_free()

        return Waves(
            device,
            lanes=self.config.lanes,
            vocab_size=self.model.decoder.num_logits,
            end_tokens=sorted(self.tokenizer.eos_ids),
            run_ahead=self.config.run_ahead,
            num_free=num_free,
            keeps_reads=self.recorder is not None,
        )

    def _new_scheduler(self) -> Scheduler:
        # An engine is large, and goes with its last owner: nothing that it holds may hold it.
        engine = weakref.ref(self)

        def room() -> int:
            found = engine()
            return 0 if found is None else found._room()

        return Scheduler(self.machine, self.policy, None if self.config.preempt == "never" else room)

    def clock(self) -> float:
        """Seconds, from any start. A simulator has a clock of its own."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait by that clock."""
        time.sleep(seconds)

    def _room(self) -> int:
        """Pages that are free, less those that guests are still expected to take."""
        taken = self.pool.used - self.pool.idle
        for thread in self.scheduler.guests:
            held = self._tasks[thread].context.num_pages() if thread in self._tasks else 0
            taken += max(0, self.scheduler.policy.expects(thread.need) - held)
        return self.machine.pages - taken

    def _open(self, run: Run) -> None:
        graph = run.graph
        plan = graph.plans[graph.main]
        child = run.bounds.root()
        if self.recorder is not None:
            program = run.compiled.program
            text = program.source.text or print_plan(program)
            inputs, functions = dict(run.inputs), tuple(sorted(run.functions))
            run.number = self.recorder.add_run(recording.Source(text, plan.name, inputs, run.seed, functions))
        context = self._empty_context(self._begin(run, (), None, 0, fresh=True))
        names = {param: run.inputs[param] for param in plan.params}
        run.root = Task(self, run, (), context, plan.region, names, budget=plan.limits.budget, plan=plan.name)
        thread = self.scheduler.open(child)
        run.root.thread = thread
        self._tasks[thread] = run.root
        self._runs.append(run)
        self._batch.append(run.bounds)

    def _begin(self, run: Run, path: Path, fork: ForkState | None, index: int, *, fresh: bool) -> int:
        """The number of a thread that starts now."""
        number = self._num_threads
        self._num_threads += 1
        if self.recorder is not None:
            parent, node = (None, None) if fork is None else (fork.parent.number, fork.node)
            self.recorder.note(recording.Begin(number, run.number, path, parent, node, index, fresh))
        return number

    def _empty_context(self, owner: int) -> Context:
        context = Context(self.pool, None, 0, None)
        context.owner = owner
        if self.tokenizer.bos_id is not None:
            context.push([self.tokenizer.bos_id], Row.PREFILL)
        return context

    def _start(self) -> None:
        while True:
            seated = self.scheduler.start()
            if not seated:
                return
            for thread in seated:
                if thread.state != "seated":
                    continue
                task = self._tasks.get(thread)
                if task is None:
                    self._resume(self._make_child(thread), None)
                elif task.steps is None:
                    task.start(None)
                    self._resume(task, None)
                elif isinstance(task.request, Spawn):
                    fork = task.request.fork
                    self._resume(task, fork.join.result())
                else:
                    self._bring_back(task)

    def _make_child(self, thread: Thread) -> Task:
        fork = self._forks[thread.group]
        index = thread.index
        task = self._child_task(fork, index, attempt=0)
        task.thread = thread
        self._tasks[thread] = task
        fork.running[index] = task
        return task

    def _child_task(self, fork: ForkState, index: int, attempt: int) -> Task:
        parent = fork.parent
        branch = fork.branch(index)
        suffix = f"~{attempt}" if attempt else ""
        path = (*parent.here, f"{fork.site}[{branch.key}]{suffix}")
        fresh = fork.limits.fresh or branch.limits.fresh
        number = self._begin(parent.run, path, fork, index, fresh=fresh)
        if fresh:
            context = self._empty_context(number)
        else:
            outer = parent.context
            context = Context(self.pool, outer.view, outer.position, outer.role)
            context.owner = number
            context.logits = outer.logits
            context.forks = outer.forks if outer.view is None else (*outer.forks, outer.view)
            parent.run.counts["tokens_aliased"] += outer.view.total_tokens if outer.view is not None else 0
        names = dict(branch.names) if fork.callee is not None else child_names(parent.names, branch.names)
        task = Task(
            self,
            parent.run,
            path,
            context,
            branch.region,
            names,
            parent=fork,
            index=index,
            label=branch.label,
            budget=branch.budget,
            depth=fork.depth,
            critical=fork.critical,
            plan=fork.callee or parent.plan,
            own_names=tuple(branch.names),
            generated=branch.generated,
        )
        task.attempt = attempt
        task.start(branch)
        return task

    def _resume(self, task: Task, answer: Any) -> None:
        """Let a seated task walk on to its next request."""
        assert task.steps is not None and task.thread is not None
        task.request = None
        try:
            request = task.steps.send(answer)
        except StopIteration as stop:
            self._end(task, "ok", stop.value, "")
            return
        except BranchStopped as stopped:
            self._stopped(task, stopped.status, stopped.reason)
            return
        except EvaluationError as error:
            self._stopped(task, "failed", error.reason + task.run.at(error.span))
            return
        task.request = request
        thread = task.thread
        context = task.context
        match request:
            case Spawn(fork):
                self._spawn(task, fork)
            case Reserve():
                if self.scheduler.promote(thread):
                    self._resume(task, None)
            case Draw():
                self._match_prefix(task)
                self._give(task, _Work(task, [context], draw=request), len(context.unfed), request.generation.left)
            case Feed(flush):
                self._match_prefix(task)
                self._give(task, _Work(task, [context], flush=flush), len(context.unfed), 0)
            case Rows(contexts):
                work = _Work(task, list(contexts), flush=True)
                self._work[thread] = work
                self.scheduler.submit(thread, feed=sum(len(c.unfed) for c in contexts))
            case Score(token_ids):
                work = _Work(task, [context], score=request)
                assert context.logits is not None
                work.scored.append(context.logits)
                context.push(token_ids, Row.PREFILL)
                self._work[thread] = work
                self.scheduler.submit(thread, feed=len(token_ids))

    def _give(self, task: Task, work: _Work, unfed: int, draw_tokens: int) -> None:
        """Hand work to the scheduler. A sampled token at the head rides along with what follows it."""
        assert task.thread is not None
        self._work[task.thread] = work
        rides = unfed > 0 and draw_tokens > 0 and task.context.unfed[0].row is Row.DECODE
        self.scheduler.submit(task.thread, feed=unfed - rides, draw=draw_tokens)

    def _match_prefix(self, task: Task) -> None:
        """Begin an empty context from the pages of an equal prefix, if there are any."""
        context = task.context
        if not self.config.prefix_cache or context.view is not None or context.segment is not None:
            return
        if task.thread is not None and task.thread.guest:
            # What a guest holds must be its own, so that all of it can be taken; nobody reserved a page for it.
            return
        ids = [u.token for u in context.unfed[:-1]]
        pages = self.pool.cache.match(ids)
        if not pages:
            return
        count = len(pages) * self.pool.page_size
        segment = Segment(self.pool, 0, pages=pages)
        segment.length = count
        segment.ids = ids[:count]
        segment.sealed = True
        context.view = View(None, [Entry(segment)])
        segment.drop()
        if self.recorder is not None and context.owner is not None:
            self.recorder.note(recording.Adopt(segment.number, context.owner, tuple(segment.ids), tuple(pages)))
        del context.unfed[:count]
        task.run.counts["tokens_cached"] += count

    def _spawn(self, task: Task, fork: ForkState) -> None:
        assert task.thread is not None
        fork.depth = task.depth + 1 if fork.callee == task.plan else 0 if fork.callee is not None else task.depth
        task.fork = fork
        fork.scheduled = self.scheduler.fork(
            task.thread, fork.needs, base=task.num_pages(), limit=fork.limits.limit, only=fork.starts
        )
        self._forks[fork.scheduled] = fork
        if fork.limits.deadline_s is not None and not fork.join.closed:
            fork.deadline = self.clock() + fork.limits.deadline_s
            self._deadlines.append(fork)

    def _stopped(self, task: Task, status: Status, reason: str) -> None:
        """A task cannot go on: it is run again if it may be, or ends."""
        fork = task.parent
        if status == "failed" and fork is not None and not fork.closed:
            branch = fork.branch(task.index)
            if task.attempt < max(branch.limits.retry, fork.limits.retry):
                task.leave(status, None, reason, again=True)
                task.run.drop(task.context)
                again = self._child_task(fork, task.index, task.attempt + 1)
                again.thread, task.thread = task.thread, None
                again.critical = max(again.critical, task.critical)
                again.below = task.tokens
                if task.budget is not None:
                    # All tries share what the branch was given; a fork's share is charged whole, as within a try.
                    again.budget = task.budget - task.spent - task.charged
                assert again.thread is not None
                self._tasks[again.thread] = again
                fork.running[task.index] = again
                self._resume(again, None)
                return
        self._end(task, status, None, reason)

    def _end(self, task: Task, status: Status, value: Value, reason: str) -> None:
        """A task is over: its own branches are ended, and its parent's join told."""
        if task.thread is None or task.thread.state == "ended":
            return
        if task.fork is not None:
            task.critical = max(task.critical, self._close(task.fork, "cancelled" if status != "late" else "late"))
        thread = task.thread
        work = self._work.pop(thread, None)
        if work is not None and work.draw is not None:
            self._cut(task, work.draw)
        if task.steps is not None:
            task.steps.close()
        task.request = None
        ended = task.leave(status, value, reason)
        fork = task.parent
        keeps = status == "ok" and fork is not None and not fork.closed and fork.join.spec.context == "stitch"
        if not keeps:
            if fork is None:
                task.run.forget(task.context)
                segment = task.context.segment
                if segment is None or segment.swapped is None:
                    task.context.seal()
                    self.remember(task.context)
            task.run.drop(task.context)
        self.scheduler.end(thread, kept=task.num_pages() if keeps else 0)
        del self._tasks[thread]
        if fork is None:
            self._finish(task, status, value, reason)
            return
        fork.running.pop(task.index, None)
        parent = fork.parent
        if fork.closed:
            return
        parent.critical = max(parent.critical, task.critical)
        if keeps or fork.join.spec.context == "text":
            fork.finished[task.index] = task
        if task.index in fork.rebuilding:
            fork.rebuilding.remove(task.index)
        else:
            fork.join.offer(ended)
        if not fork.rebuilding and fork.join.decided(lambda: self._soonest(fork)):
            parent.close(fork)
            self._close(fork, "cancelled")
            self.scheduler.resume(_thread(parent))

    def _soonest(self, fork: ForkState) -> tuple[int, int] | None:
        """At most the (tokens decoded so far, index) of every branch of `fork` that has not ended; None if all have."""
        assert fork.scheduled is not None
        if fork.scheduled.pending:
            return (0, -1)
        running = fork.running
        return min(((running[i].tokens if i in running else 0, i) for i in fork.scheduled.active), default=None)

    def _close(self, fork: ForkState, status: Status) -> int:
        """No branch of `fork` goes on. Returns the longest critical path among those that this ends."""
        if fork.closed:
            return 0
        fork.closed = True
        deepest = 0
        for task in list(fork.running.values()):
            reason = LATE if status == "late" else "the join closed without it"
            self._end(task, status, None, reason)
            deepest = max(deepest, task.critical)
        if fork.deadline is not None and fork in self._deadlines:
            self._deadlines.remove(fork)
        assert fork.scheduled is not None
        for thread in list(fork.scheduled.active.values()):
            # Seated in this very step, and its task not yet made.
            self.scheduler.end(thread)
        self.scheduler.close(fork.scheduled)
        del self._forks[fork.scheduled]
        fork.parent.fork = None
        return deepest

    def _cut(self, task: Task, request: Draw) -> None:
        """A gen is ended from outside, or is done and its thread never hears of it: what it has is kept as text."""
        request.generation.cut("cancelled", "its branch was ended")
        ended = task.gen_ended(request)
        task.text.append(self.text_of(ended.ids))
        task.emit(ended)

    def _finish(self, task: Task, status: Status, value: Value, reason: str) -> None:
        run = task.run
        self._runs.remove(run)
        run.root = None
        counts = run.counts
        counts["critical_path_tokens"] = task.critical
        counts["tokens_prefilled"] = run.rows[Row.PREFILL] + run.rows[Row.REPREFILL]
        counts["tokens_reprefilled"] = run.rows[Row.REPREFILL]
        counts["tokens_flushed"] = run.rows[Row.FLUSH]
        counts["tokens_recomputed"] = run.rows[Row.RECOMPUTE]
        sampled_fed = counts["tokens_decoded"] - counts["tokens_unfed"]
        known_fed = counts["tokens_prefilled"] + counts["tokens_recomputed"]
        if run.rows[Row.DECODE] + run.rows[Row.FLUSH] != sampled_fed or counts["rows"] != known_fed + sampled_fed:
            raise RuntimeError(f"rows do not add up: {counts}, by kind {run.rows}")
        shown: dict[str, int | float] = dict(counts)
        shown["pages_peak"] = self.pool.peak
        shown["pages_bound"] = min(self.machine.pages, sum(b.pages_bound(self.machine) for b in self._batch))
        shown["steps_bound"] = steps_bound(self._batch, self.machine)
        shown["elapsed_s"] = self.clock() - run.started_s
        over = RunEnded(status, value, reason, shown)
        if run.log is not None:
            run.log(LogEntry((), over))
        run.emit(over)
        run.result = RunResult.of(run.events, run.logits)
        if not self._runs:
            self._batch.clear()
            self.pool.peak = self.pool.used - self.pool.idle

    def _expire(self) -> None:
        now = self.clock() if self._deadlines else 0.0
        for fork in list(self._deadlines):
            # A branch that is only rebuilt had ended in time.
            if fork.deadline is not None and fork.deadline <= now and not fork.closed and not fork.rebuilding:
                for index in fork.running:
                    fork.join.offer(Ended(index, "late", reason=LATE))
                fork.join.close_now()
                fork.parent.close(fork)
                fork.parent.critical = max(fork.parent.critical, self._close(fork, "late"))
                self.scheduler.resume(_thread(fork.parent))

    def _wait(self) -> bool:
        """Nothing can run now: wait for the next deadline. False if there is none."""
        if not self._deadlines:
            return False
        soonest = min(fork.deadline for fork in self._deadlines if fork.deadline is not None)
        self.sleep(max(0.0, soonest - self.clock()))
        return True

    def _execute(self, step: Step) -> None:
        """Feed the step's rows, sample, and let every task that is done go on."""
        blocks: list[Block] = []
        owners: list[Run] = []
        kinds: list[recording.Kinds] = []
        tokens: list[int] = []
        wanted: list[int] = []
        takers: list[tuple[_Work, Context, bool]] = []
        ready: list[tuple[_Work, Context]] = []
        waved: list[tuple[_Work, Context, LaneStep]] = []
        wave_kinds: list[recording.Kinds] = []
        for thread, count in step.feeds:
            work = self._work[thread]
            last = count == thread.feed
            for context, rows in self._portions(work, count):
                kinds.append(self._feed(work, context, rows, blocks, tokens))
                owners.append(work.task.run)
                final = not context.unfed
                if work.score is not None:
                    # Of the option's tokens all but the last are conditions of a token that follows.
                    wanted.extend(range(len(tokens) - rows, len(tokens)))
                    takers.extend((work, context, False) for _ in range(rows))
                elif final:
                    wanted.append(len(tokens) - 1)
                    takers.append((work, context, last and work.draw is not None))
        for thread in step.draws:
            work = self._work[thread]
            context = work.queue[0]
            if self._on_device(work, context):
                wave_kinds.append(self._feed_lane(work, context, waved))
            elif context.unfed:
                kinds.append(self._feed(work, context, len(context.unfed), blocks, tokens))
                owners.append(work.task.run)
                wanted.append(len(tokens) - 1)
                takers.append((work, context, True))
            else:
                ready.append((work, context))
        drawn = self.waves.step([lane for *_, lane in waved]) if self.waves is not None and waved else []
        if drawn is None:
            # They see more than the lists of a wave hold: a step of its own has lists of any size.
            for (work, context, lane), kind in zip(waved, wave_kinds, strict=True):
                blocks.append(lane.block)
                kinds.append(kind)
                owners.append(work.task.run)
                tokens.append(lane.token)
                wanted.append(len(tokens) - 1)
                takers.append((work, context, True))
            waved, drawn = [], []
        sampling: list[tuple[_Work, Context, Tensor]] = []
        for work, context in ready:
            assert context.logits is not None
            sampling.append((work, context, context.logits))
        attention = self._attention(blocks)
        if self.recorder is not None:
            reads = [*attention.reads(), *(came.reads for came in drawn)]
            lanes = [lane.block for *_, lane in waved]
            self._record_call(step, [*blocks, *lanes], [*kinds, *wave_kinds[: len(waved)]], reads)
        for work, _, _ in waved:
            work.task.run.counts["rows"] += 1
        if blocks:
            logits = self._forward(attention, blocks, owners, tokens, wanted)
            for row, (work, context, draws) in enumerate(takers):
                if work.score is not None:
                    work.scored.append(logits[row])
                elif draws:
                    sampling.append((work, context, logits[row]))
                else:
                    context.logits = logits[row].clone()
        self.num_steps += 1
        for thread in {*(t for t, _ in step.feeds), *step.draws}:
            run = self._work[thread].task.run
            if run.last_step != self.num_steps:
                run.last_step = self.num_steps
                run.counts["steps"] += 1
        if sampling:
            self._sample(sampling)
        for (work, context, _), came in zip(waved, drawn, strict=True):
            self._take_lane(work, context, came)
        done = dict.fromkeys(self.scheduler.advance(step))
        for work, _, _ in (*sampling, *waved):
            if work.draw is not None and work.draw.generation.done:
                thread = _thread(work.task)
                self.scheduler.stop(thread)
                done[thread] = None
        for thread in done:
            if thread.state == "seated" and thread in self._work:
                self._resume_done(thread)

    def _portions(self, work: _Work, count: int) -> list[tuple[Context, int]]:
        """Which contexts the next `count` known rows come from; a sampled token at the head rides along."""
        portions: list[tuple[Context, int]] = []
        for context in work.queue:
            if not context.unfed or not count:
                continue
            rides = work.rides and work.draw is not None and context.unfed[0].row is Row.DECODE
            rows = min(len(context.unfed), count + rides)
            portions.append((context, rows))
            count -= rows - rides
        return portions

    def _feed(
        self, work: _Work, context: Context, count: int, blocks: list[Block], tokens: list[int]
    ) -> recording.Kinds:
        """Take rows of a context into the step; returns their kinds."""
        fed, segment, first = context.take(count)
        blocks.append(Block(context.view, segment, first, count, context.owner, context.forks))
        rows = work.task.run.rows
        kinds: list[tuple[str, int]] = []
        for unfed in fed:
            tokens.append(unfed.token)
            row = Row.FLUSH if work.flush and unfed.row is Row.DECODE else unfed.row
            rows[row] += 1
            kind = row.name.lower()
            if kinds and kinds[-1][0] == kind:
                kinds[-1] = (kind, kinds[-1][1] + 1)
            else:
                kinds.append((kind, 1))
        return tuple(kinds)

    def _on_device(self, work: _Work, context: Context) -> bool:
        """Whether the device draws the next token by itself."""
        if self.waves is None or work.draw is None or len(context.unfed) != 1:
            return False
        return self.waves.takes(work.draw, context.segment)

    def _feed_lane(
        self, work: _Work, context: Context, waved: list[tuple[_Work, Context, LaneStep]]
    ) -> recording.Kinds:
        """Take the row of a lane that the device steps; returns its kinds."""
        blocks: list[Block] = []
        tokens: list[int] = []
        kinds = self._feed(work, context, 1, blocks, tokens)
        assert work.draw is not None
        task = work.task
        waved.append((work, context, LaneStep(work.draw, blocks[0], tokens[0], task.drawn, task.drawn_ids)))
        return kinds

    def _take_lane(self, work: _Work, context: Context, row: Drawn) -> None:
        """Push what the device drew."""
        assert work.draw is not None
        generation = work.draw.generation
        if row.token >= 0:
            self._take(work.task, context, work.draw, row.token, row.logprob, row.logits)
            return
        generation.mask()
        if not generation.done:
            raise ValueError(f"the logits of {'/'.join(work.task.path)} are not finite")
        context.logits = row.logits.clone()

    def _attention(self, blocks: Sequence[Block]) -> StepAttention | FixedAttention | StepOnDevice:
        decoder = self.model.decoder
        if self.device is not None:
            return self.device.step(blocks)
        assert isinstance(self.store, KvStore)
        if not self.config.deterministic:
            return StepAttention(self.store, decoder.config, blocks, decoder.dtype)
        return FixedAttention(self.store, decoder.config, blocks, decoder.dtype, decoder.fixed_shapes())

    def _record_call(
        self,
        step: Step,
        blocks: Sequence[Block],
        kinds: Sequence[recording.Kinds],
        row_reads: Sequence[Sequence[tuple[int, int, int]]],
    ) -> None:
        assert self.recorder is not None
        seats = dict.fromkeys(self._work[t].task.number for t in (*(t for t, _ in step.feeds), *step.draws))
        reads = iter(row_reads)
        noted = tuple(
            recording.Block(
                -1 if block.owner is None else block.owner,
                block.segment.number,
                block.first,
                block.segment.start + block.first,
                kind,
                tuple(tuple(next(reads)) for _ in range(block.count)),
            )
            for block, kind in zip(blocks, kinds, strict=True)
        )
        self.recorder.note(recording.Call(tuple(seats), noted))

    def _forward(
        self,
        attention: StepAttention | FixedAttention | StepOnDevice,
        blocks: Sequence[Block],
        owners: Sequence[Run],
        tokens: Sequence[int],
        wanted: Sequence[int],
    ) -> Tensor:
        """Logits of the `wanted` rows. The one place where the model is called, and where its rows are counted."""
        decoder = self.model.decoder
        if attention.num_rows != len(tokens):
            raise RuntimeError(f"{len(tokens)} tokens for {attention.num_rows} rows")
        for run, block in zip(owners, blocks, strict=True):
            run.counts["rows"] += block.count
        if isinstance(attention, StepOnDevice):
            return attention.logits(tokens, wanted)
        return decoder.forward(
            torch.tensor(tokens, dtype=torch.int64),
            attention.positions,
            attention,
            torch.tensor(wanted, dtype=torch.int64),
            decoder.fixed_shapes() if self.config.deterministic else None,
        )

    def _sample(self, sampling: Sequence[tuple[_Work, Context, Tensor]]) -> None:
        """Draw one token for each gen, and push it into the gen and its context."""
        able: list[tuple[Context, Task, DrawRow]] = []
        for work, context, row in sampling:
            assert work.draw is not None
            mask = work.draw.generation.mask()
            if work.draw.generation.done:
                # Nothing of the type fits in what is left.
                context.logits = row.clone()
            else:
                task = work.task
                able.append((context, task, DrawRow(work.draw, row, mask, task.drawn, task.drawn_ids)))
        if not able:
            return
        drawn = self._draw([from_row for *_, from_row in able], [task for _, task, _ in able])
        for (context, task, from_row), (token, log) in zip(able, drawn, strict=True):
            self._take(task, context, from_row.request, token, log, from_row.logits)

    def _draw(self, rows: Sequence[DrawRow], tasks: Sequence[Task]) -> list[tuple[int, float]]:
        """The token of each row, each of one of `tasks`, and its log-probability where that is wanted."""
        return draw_rows(rows) if self.device is None else draw_rows_on_device(rows)

    def _take(self, task: Task, context: Context, request: Draw, token: int, log: float, row: Tensor) -> None:
        run = task.run
        if self.config.trace_logits:
            run.logits.append(LogitsRow(task.path, task.drawn, row.cpu().clone(), token))
        request.generation.push(token, log)
        task.drawn += 1
        task.spent += 1
        task.critical += 1
        task.drawn_ids.append(token)
        run.counts["tokens_decoded"] += 1
        run.counts["total_tokens"] += 1
        if request.wants_logprobs:
            task.logprob_sum += log
            task.logprob_count += 1
        context.push([token], Row.DECODE)
        context.logits = row.clone() if request.generation.done else None
        if run.listener is not None:
            text = request.generation.delta()
            if text:
                run.emit(TextDelta(task.here, None, text))

    def _resume_done(self, thread: Thread) -> None:
        work = self._work.pop(thread)
        task = work.task
        answer: Any = None
        if work.score is not None:
            context = task.context
            context.trim(len(work.score.token_ids))
            context.logits = work.scored[0]
            answer = work.scored[:-1]
        self._resume(task, answer)


def _thread(task: Task) -> Thread:
    if task.thread is None:
        raise RuntimeError(f"{task.path} has no thread")
    return task.thread


def _result(run: Run) -> RunResult:
    if run.result is None:
        raise RuntimeError("the run is not over")
    return run.result


__all__ = ["BranchRecord", "Engine", "EngineConfig", "Interrupted", "Run", "RunResult", "StreamEvent"]
