"""A fixed set of runs, chosen to reach much of the scheduler and the engine, and all that is checked of each run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import torch
from law_runs import COMMON, model, weights
from test_attention import windowed
from test_laws import drawn, told
from torch import Tensor

from anabranch.compiler import recording as rec
from anabranch.compiler.pipeline import Compiled
from anabranch.compiler.recording import Recording
from anabranch.compiler.scheduler import Need, Policy
from anabranch.compiler.verify_recording import ScheduleFault, verify_recording
from anabranch.dsl.diagnostics import PlanError
from anabranch.dsl.printer import print_plan
from anabranch.runtime.drawing import DrawRow
from anabranch.runtime.engine import Engine, EngineConfig, Run, RunResult
from anabranch.runtime.events import BranchEnded, BranchStarted, Event, GenEnded, Joined
from anabranch.runtime.models import LoadedModel
from anabranch.runtime.recorder import Recorder
from anabranch.runtime.reference import ReferenceMismatch, Report, check_run
from anabranch.runtime.tasks import Task
from anabranch.testing import Plan, plans

TOLERANCE = 1e-9
# No run of the battery takes a fifth of this many steps.
MOST_STEPS = 3000
HERE = Path(__file__).parent


class Caught(Exception):
    """A check failed. checker: which one; detail: what it said, in one line."""

    def __init__(self, checker: str, detail: str) -> None:
        self.checker = checker
        self.detail = detail.partition("\n")[0]
        super().__init__(f"{checker}: {self.detail}")


class Bold(Policy):
    """Lets everything start, so that much must be taken back."""

    def expects(self, need: Need) -> int:
        return 1


@dataclass(frozen=True)
class Job:
    """One run to submit. after: steps that the engine has made before; cancel: steps after which it is cancelled."""

    text: str
    inputs: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 1
    after: int = 0
    cancel: int | None = None


def _nothing() -> dict[str, Callable[..., Any]]:
    return {}


@dataclass(frozen=True, eq=False)
class Setting:
    """An engine and what it runs: each batch of `batches` once the one before is over.

    more: pages beyond the least that the largest plan needs
    told: whether tokens and events must be those of a roomy engine, because no decision is left to time
    window: tokens that a row sees in the first layer, or 0 for all
    reference: whether the reference can tell what the plan comes to; it knows no `depth=` that is passed
    """

    name: str
    batches: tuple[tuple[Job, ...], ...]
    config: EngineConfig = field(default_factory=EngineConfig)
    more: int = 400
    bold: bool = False
    functions: Callable[[], Mapping[str, Callable[..., Any]]] = _nothing
    told: bool = True
    reference: bool = True
    window: int = 0

    @property
    def jobs(self) -> tuple[Job, ...]:
        return tuple(job for batch in self.batches for job in batch)


class WatchedEngine(Engine):
    """Notes the noise of each draw: no two of one run may share theirs."""

    noise: set[tuple[int, tuple[int, int], int]]

    def _draw(self, rows: Sequence[DrawRow], tasks: Sequence[Task]) -> list[tuple[int, float]]:
        for row, task in zip(rows, tasks, strict=True):
            key = row.request.key
            taken = (id(task.run), key, task.drawn)
            if taken in self.noise:
                raise Caught("noise", f"two draws share the noise of {key} at {task.drawn}")
            self.noise.add(taken)
        return super()._draw(rows, tasks)


@dataclass(frozen=True)
class Outcome:
    """What a setting came to; jobs, results, compiled: run by run."""

    setting: Setting
    engine: WatchedEngine
    recording: Recording
    jobs: tuple[Job, ...]
    results: tuple[RunResult, ...]
    compiled: tuple[Compiled, ...]


def model_of(setting: Setting) -> tuple[LoadedModel, Mapping[str, Tensor]]:
    """The random model, and its weights for the reference."""
    return windowed(setting.window) if setting.window else (model(), weights())


@cache
def compiled_of(text: str, functions: tuple[str, ...]) -> Compiled:
    return Engine(model(), EngineConfig(pages=8)).compile(text, None, functions)


@cache
def least_pages(setting: Setting) -> int:
    engine = Engine(model_of(setting)[0], replace(setting.config, pages=8192))
    names = tuple(setting.functions())
    return max(compiled_of(job.text, names).bounds(engine, job.inputs).pages_depth_first for job in setting.jobs)


def perform(setting: Setting) -> Outcome:
    """Run it all. Raises Caught if it does not come to an end, or whatever the engine raises."""
    recorder = Recorder()
    pages = least_pages(setting) + setting.more
    config = replace(setting.config, pages=pages, trace_logits=True)
    engine = WatchedEngine(model_of(setting)[0], config, policy=Bold() if setting.bold else None, recorder=recorder)
    engine.noise = set()
    slept = [0.0]
    # Ten milliseconds a step, and time passes where the engine waits.
    engine.clock = lambda: engine.num_steps * 0.01 + slept[0]
    engine.sleep = lambda seconds: slept.__setitem__(0, slept[0] + seconds + 1e-6)
    jobs: list[Job] = []
    runs: list[Run] = []
    steps = 0
    for batch in setting.batches:
        left = sorted(batch, key=lambda job: job.after)
        begun = steps
        while left or any(run.result is None for run in runs):
            while left and steps - begun >= left[0].after:
                job = left.pop(0)
                functions = setting.functions()
                plan = compiled_of(job.text, tuple(functions))
                jobs.append(job)
                runs.append(engine.submit(plan, job.inputs, seed=job.seed, functions=functions))
            for run, job in zip(runs, jobs, strict=True):
                if job.cancel is not None and steps - begun >= job.cancel:
                    engine.cancel(run)
            engine.step()
            steps += 1
            if steps > MOST_STEPS:
                raise Caught("ends", f"not over after {MOST_STEPS} steps")
            if engine.pool.used > pages or len(engine.scheduler.seated) > config.lanes:
                raise Caught("limits", f"{engine.pool.used} pages, {len(engine.scheduler.seated)} lanes")
    results = tuple(run.result for run in runs if run.result is not None)
    return Outcome(setting, engine, recorder.recording(), tuple(jobs), results, tuple(run.compiled for run in runs))


def check(outcome: Outcome) -> None:
    """Every check of an outcome but `check_told`, the cheap ones first. Raises Caught."""
    check_empty(outcome.engine)
    check_recording(outcome.recording, outcome)
    if not outcome.setting.reference:
        return
    for run, (job, result, plan) in enumerate(zip(outcome.jobs, outcome.results, outcome.compiled, strict=True)):
        report = hold_against_reference(outcome.setting, job, result, plan)
        check_written(outcome.recording, run, report)


def check_empty(engine: Engine) -> None:
    """Every page is back, or the prefix cache's, and nothing is reserved, seated or kept."""
    pool = engine.pool
    if pool.used != pool.idle or sum(count > 0 for count in pool.ref_count) != pool.used:
        raise Caught("all back", f"{pool.used} pages are used and {pool.idle} are idle")
    if pool.idle != sum(pool._cached) or max(pool.ref_count) > 1:
        raise Caught("all back", f"{pool.idle} pages are idle, {sum(pool._cached)} are cached")
    scheduler = engine.scheduler
    if scheduler.reserved or not scheduler.idle or scheduler.guests or scheduler.seated:
        raise Caught("all back", f"{scheduler.reserved} pages are reserved, {len(scheduler.guests)} guests are left")
    if engine._tasks or engine._forks or engine._work or engine._deadlines or engine._runs:
        raise Caught("all back", "the engine still holds tasks, forks or work")


def read_back(recording: Recording) -> Recording:
    """The recording, through JSON. Raises Caught if its schema does not hold."""
    try:
        return rec.from_json(rec.to_json(recording))
    except PlanError as error:
        raise Caught("schema", error.diagnostics[0].message) from None
    except ValueError as error:
        raise Caught("schema", str(error)) from None


def check_recording(recording: Recording, outcome: Outcome) -> None:
    """The verifier, then the recording against what the runs' events and counts say. Raises Caught."""
    try:
        compiled = [compiled_of(source.text, source.functions) for source in recording.runs]
        verify_recording(recording, sizes=outcome.engine.sizes, compiled=compiled)
    except ScheduleFault as fault:
        raise Caught(f"verifier: {fault.rule}", fault.message) from None
    check_events(recording, outcome)


# --- the recording against the events


@dataclass
class _Said:
    """What a recording says of one run."""

    begun: list[tuple[str, ...]] = field(default_factory=list)
    ended: list[tuple[tuple[str, ...], str]] = field(default_factory=list)
    drawn: dict[tuple[str, ...], list[int]] = field(default_factory=dict)
    gens: dict[tuple[str, ...], list[int]] = field(default_factory=dict)
    joined: Counter[Any] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    steps: int = 0


def check_events(recording: Recording, outcome: Outcome) -> None:
    """Threads, tokens, joins, ends, rows and steps are those of the runs' own events, traces and counts."""
    said = [_Said() for _ in outcome.results]
    threads: dict[int, tuple[int, tuple[str, ...]]] = {}
    calls = preempted = 0
    cached: set[int] = set()
    for step in recording.steps:
        match step:
            case rec.Begin(thread, run, path):
                threads[thread] = (run, path)
                said[run].begun.append(path)
            case rec.End(thread, status):
                run, path = threads[thread]
                said[run].ended.append((path, status))
            case rec.Enter(thread):
                run, path = threads[thread]
                said[run].gens.setdefault(path, []).append(0)
            case rec.Token(thread, token):
                run, path = threads[thread]
                said[run].drawn.setdefault(path, []).append(token)
                said[run].gens[path][-1] += 1
            case rec.Joined(thread, _, ok, winners, failed):
                said[threads[thread][0]].joined[ok, winners, failed] += 1
            case rec.Call(seats, blocks):
                calls += 1
                for run in {threads[seat][0] for seat in seats}:
                    said[run].steps += 1
                for block in blocks:
                    for kind, count in block.kinds:
                        said[threads[block.thread][0]].rows[kind] += count
            case rec.Cache(page):
                cached.add(page)
            case rec.Uncache(page):
                cached.discard(page)
            case rec.SwapOut() | rec.Lose():
                preempted += 1
            case _:
                pass
    _same("calls", calls, outcome.engine.num_steps)
    if preempted > outcome.engine.num_preempted:
        raise Caught("events", f"{preempted} times pages were given up, and the engine counts fewer")
    _same("cached pages", cached, {page for page, held in enumerate(outcome.engine.pool._cached) if held})
    for found, result in zip(said, outcome.results, strict=True):
        events = result.events
        _same("threads", found.begun, [e.path for e in events if isinstance(e, BranchStarted)])
        _same("ends", found.ended, [(e.path, e.status) for e in events if isinstance(e, BranchEnded)])
        traced: dict[tuple[str, ...], list[int]] = {}
        for row in sorted(result.logits, key=lambda row: row.index):
            traced.setdefault(row.path, []).append(row.token)
        _same("tokens", found.drawn, traced)
        gens: dict[tuple[str, ...], list[int]] = {}
        for event in events:
            if isinstance(event, GenEnded) and event.drawn:
                # The path of an event has the rounds of its thread's loops.
                path = max((p for p in found.begun if event.path[: len(p)] == p), key=len)
                gens.setdefault(path, []).append(event.drawn)
        at_gens = {path: [count for count in counts if count] for path, counts in found.gens.items()}
        _same("tokens at each gen", {path: counts for path, counts in at_gens.items() if counts}, gens)
        joins = [e for e in events if isinstance(e, Joined)]
        told_joins = Counter((e.ok, e.winners, bool(e.failed)) for e in joins)
        if result.status != "cancelled" and not any(
            e.status == "cancelled" for e in events if isinstance(e, BranchEnded)
        ):
            _same("joins", found.joined, told_joins)
        elif told_joins - found.joined:
            raise Caught("events", f"joins are told that are not recorded: {told_joins - found.joined}")
        rows = found.rows
        counts = result.counts
        _same("prefilled rows", rows["prefill"] + rows["reprefill"], counts["tokens_prefilled"])
        _same("reprefilled rows", rows["reprefill"], counts["tokens_reprefilled"])
        _same("flushed rows", rows["flush"], counts["tokens_flushed"])
        _same("recomputed rows", rows["recompute"], counts["tokens_recomputed"])
        _same("rows", sum(rows.values()), counts["rows"])
        _same("steps", found.steps, counts["steps"])


def _same(what: str, recorded: object, events: object) -> None:
    if recorded != events:
        raise Caught("events", f"{what}: {recorded!s:.80} are recorded, and the run says {events!s:.80}")


def check_written(recording: Recording, run: int, report: Report) -> None:
    """Each thread wrote what the reference's layout holds of it. Raises Caught."""
    layout = report.layout
    seen = {other for segment in layout.segments for other, _ in segment.view}
    found = written(recording, run)
    by_path: dict[tuple[str, ...], list[int]] = {path: [] for path in found}
    drawn_ids: dict[tuple[str, ...], set[int]] = {path: set() for path in found}
    for draw in layout.draws.values():
        if draw.path in drawn_ids and draw.token is not None:
            drawn_ids[draw.path].add(draw.token)
    for number, segment in enumerate(layout.segments):
        if segment.path in by_path and segment.tokens:
            by_path[segment.path].append(number)
    for path, numbers in by_path.items():
        # What was scored, or drawn and taken back, stands in a segment that nothing sees; its thread goes on beside it.
        views = [layout.segments[number].view for number in numbers]
        kept = [n for place, n in enumerate(numbers) if n in seen or views[place] not in views[place + 1 :]]
        texts = [[layout.tokens[index].id for n in kept for index in layout.segments[n].tokens]]
        if kept and kept[-1] not in seen:
            last = [layout.tokens[index].id for index in layout.segments[kept[-1]].tokens]
            if drawn_ids[path].issuperset(last):
                texts.append(texts[0][: -len(last)])
        ids, ever, whole = found[path]
        # Of a thread that was cut off, the reference may not know the last that it wrote.
        if not any(ids == text or (not whole and ids[: len(text)] == text) for text in texts):
            raise Caught("events", f"{path} wrote {ids}, and the reference {texts[0]}")
        known = Counter(layout.tokens[index].id for n in numbers for index in layout.segments[n].tokens)
        if whole and not ever <= known:
            raise Caught("events", f"{path} wrote {dict(ever - known)}, which the reference has not")


def written(recording: Recording, run: int) -> dict[tuple[str, ...], tuple[list[int], Counter[int], bool]]:
    """By path, what each thread of a run had written in the end, the known tokens it ever wrote, whether it ended ok.

    What is taken back to be fed once more counts once.
    """
    paths: dict[int, tuple[str, ...]] = {}
    ids: dict[int, list[int]] = {}
    ever: dict[int, Counter[int]] = {}
    back: dict[int, list[int]] = {}
    ended: dict[int, str] = {}
    for step in recording.steps:
        match step:
            case rec.Begin(thread, of, path):
                if of == run:
                    paths[thread], ids[thread], ever[thread] = path, [], Counter()
            case rec.Write(thread, tokens) if thread in ids:
                ids[thread].extend(tokens)
                if back.pop(thread, None) != list(tokens):
                    ever[thread].update(tokens)
            case rec.Token(thread, token) if thread in ids:
                ids[thread].append(token)
            case rec.Trim(thread, count) if thread in ids and thread not in ended:
                back[thread] = ids[thread][len(ids[thread]) - count :]
                del ids[thread][len(ids[thread]) - count :]
            case rec.End(thread, status):
                ended[thread] = status
            case _:
                pass
    return {paths[thread]: (ids[thread], ever[thread], ended.get(thread) == "ok") for thread in ids}


# --- the laws


def hold_against_reference(setting: Setting, job: Job, result: RunResult, plan: Compiled) -> Report:
    """Law 1. Raises Caught."""
    found, tensors = model_of(setting)
    try:
        return check_run(
            plan.program,
            None,
            job.inputs,
            result.events,
            found.tokenizer,
            found.chat,
            found.decoder.config,
            tensors,
            result.logits,
            tolerance=TOLERANCE,
        )
    except ReferenceMismatch as mismatch:
        raise Caught("reference", mismatch.what) from None


# Counts that no schedule decides.
_COUNTS = (
    "tokens_decoded", "tokens_trimmed", "tokens_reprefilled", "tokens_aliased", "tokens_unfed", "critical_path_tokens",
    "total_tokens",
)  # fmt: skip


def calm(setting: Setting) -> Setting:
    """The same plans with room for everything."""
    config = EngineConfig(
        lanes=16,
        page_size=16,
        chunk=64,
        prefix_cache=False,
        preempt="never",
        deterministic=setting.config.deterministic,
    )
    return replace(setting, config=config, more=1000, bold=False)


@dataclass(frozen=True)
class Told:
    """What law 2 fixes of a run. cut: some branch was cancelled, or late."""

    status: str
    value: Any
    drawn: Mapping[Any, int]
    events: Mapping[Any, Any]
    counts: Mapping[str, float]
    cut: bool


def _without_logprobs(found: Mapping[tuple[str, ...], list[Event]]) -> dict[tuple[str, ...], list[Event]]:
    """Their last bits depend on the shape of the engine; law 1 compares them with the reference."""
    return {
        path: [replace(event, logprobs=()) if isinstance(event, GenEnded) else event for event in events]
        for path, events in found.items()
    }


def tell(outcome: Outcome) -> list[Told]:
    return [
        Told(
            result.status,
            result.value,
            drawn(result),
            _without_logprobs(told(result)),
            {name: result.counts[name] for name in _COUNTS},
            any(branch.status in ("cancelled", "late") for branch in result.branches),
        )
        for result in outcome.results
    ]


def check_told(outcome: Outcome, expected: Sequence[Told]) -> None:
    """Law 2: tokens, events, values and what no schedule decides are those of a roomy engine. Raises Caught."""
    for found, other in zip(tell(outcome), expected, strict=True):
        if (found.status, found.value) != (other.status, other.value):
            raise Caught("law 2", f"a roomy engine gives {other.value!r}, this one {found.value!r}")
        for name in ("drawn", "events", "counts"):
            one, two = getattr(found, name), getattr(other, name)
            # How far a branch came that was cancelled is decided by time.
            keys = one.keys() & two.keys() if found.cut or other.cut else one.keys() | two.keys()
            for key in () if name == "counts" and (found.cut or other.cut) else sorted(keys):
                if one.get(key) != two.get(key):
                    raise Caught("law 2", f"{name} of {key}: {two.get(key)} on a roomy engine, here {one.get(key)}")


# --- the plans

NESTED = """
main = plan(q: text(20)) {
  user("#{q}");
  a = fork(3) {
    w = gen(max=4);
    b = fork(2) { c = gen("k", max=3, temperature=2); } join(all, POSITIONS);
    n = gen("is", type=int, max=3);
    return(n);
  } join(JOIN, POSITIONS);
  z = gen(" then", max=4);
  return([a, z]);
}
"""
CONTROL = """
aid = plan(a: text(12)) { v = gen("A #{a}", max=4); return(v); }
main = plan(n: int, xs: list(4)) {
  text("Go");
  m = map(i, s: xs, limit=2) { text("#{s}"); g = gen(max=4); h = aid(g); return(h); } join(all, text);
  r = reduce(p: m, by=2) { t = gen("M #{p}", max=4); return(t); };
  k = 0;
  loop(3) {
    k = k + 1;
    f = fork(2) { e = gen(max=2); } join(all, stitch);
    if (k == 2) { o = gen("two", max=2); } else { o = gen("no", max=3); };
    d = fork(2, fresh=true) { y = gen("B", max=2); } join(all, drop);
  } until(k >= n);
  c = gen(type=choice("the", "a", by="logprob"), max=3);
  return([r, c]);
}
"""
RACE = """
main = plan(n: int) {
  text("Race");
  a = fork(i: n, upto=5) { g = gen(max=6, stop=["e"]); m = gen(type=int, max=2); v = 1; return(m); }
    join(JOIN, CONTEXT);
  b = fork(2) { h = gen("b", max=3); };
  z = gen("so", max=3);
  return(a);
}
"""
RETRY = """
main = plan() {
  text("Try");
  a = fork(i: 3, retry=2, limit=2) {
    g = gen(max=3);
    b = fork(2) { h = gen(max=2); } join(all, stitch);
    y = flaky(i);
    return(y);
  } join(all(min=2), stitch);
  z = gen("k", max=3);
  return(a);
}
"""
RETRY_WITHIN = """
main = plan() {
  text("Try");
  a = fork(i: 2, retry=1, budget=24) {
    g = gen(type=regex("[ab]{3}"), max=3);
    b = fork(2, fallback=["cut"]) { h = gen(type=regex("[ab]{2}"), max=2); };
    y = flaky(i);
    k = gen(type=regex("[ab]{5,6}"), max=6);
    return(k);
  } join(all(min=1), stitch);
  z = gen("k", max=3);
  return(a);
}
"""
PRESSED = """
main = plan(n: int) {
  text("Go on and on");
  x = fork(n, upto=6) {
    a = gen(max=9);
    INNER
    b = gen("so", type=int, max=3);
    c = gen(type=choice("a", "the", by="logprob"), max=4);
    return(b);
  } join(all(min=1), CONTEXT);
  z = gen(" then", max=3);
}
"""
INNER = 'd = fork(2) { e = gen("k", max=3); } join(all, stitch(sum));'
LEFT = 'main = plan() { text("Beside"); a = gen(max=8); b = fork(2) { c = gen(max=4); }; }'
PROMPT = """
main = plan(q: text(60)) {
  text("A prompt of some length: #{q}");
  a = fork(2) { g = gen(max=3); } join(all, stitch);
  z = gen("k", max=2);
}
"""
LONG = """
main = plan(q: text(900)) {
  text("#{q}");
  y = gen(max=3);
  a = fork(2) { text("a branch"); g = gen(max=2); } join(all, stitch(sum));
  b = fork(1) { h = gen("k", max=3); } join(all, stitch);
  z = gen("k", max=2);
}
"""
AT_ONCE = """
main = plan(n: int) {
  text("x");
  a = fork() {
    short = branch() { v = 1; return(v); };
    long = branch() { if (n > 5) { g = gen("k", max=9); }; return(2); };
  } join(first(1), drop);
  z = gen(max=2);
  return(a);
}
"""
BELOW = """
main = plan() {
  text("x");
  a = fork() {
    many = branch() { b = fork(3) { g = gen("k", type=regex("[ab]{4}"), max=4); }; return(1); };
    few = branch() { g = gen("k", type=regex("[ab]{6}"), max=6); return(2); };
  } join(first(1), drop);
  z = gen(max=2);
  return(a);
}
"""
ADOPTED = """
main = plan(q: text(60)) {
  text("A prompt of some length that goes on for a while: #{q}");
  a = fork() {
    one = branch("k") { x = fork(1) { g = gen(type=regex("[ab]{24}"), max=24); } join(all, drop); return(1); };
    two = branch("k") { g = gen(type=regex("[ab]{24}"), max=24); return(2); };
  } join(all, stitch);
  z = gen("k", max=2);
}
"""
BESIDE = 'main = plan() { text("k"); g = gen(type=regex("[ab]{20}"), max=20); }'
ODD = """
main = plan() {
  text("x");
  a = fork(i: 4) { g = gen(max=2); v = odd(i); } join(best(v), stitch);
  b = fork(i: 4) { g = gen("k", max=2); v = odd(i); return(v); } join(quorum(1, v, by=number), text);
  z = gen(max=2);
  return([a, b]);
}
"""
LATE = """
main = plan() {
  text("x");
  a = fork(3, deadline="60ms", fallback=["late"]) { loop(4) { h = gen(max=9); b = fork(2) { c = gen(max=4); }; };
    return("done"); } join(all, drop);
  d = fork(2, deadline="80ms") { e = gen(max=3); return(1); } join(all(min=1), stitch);
  z = gen("k", max=2);
  return(a);
}
"""
BUDGET = """
main = plan(budget=40) {
  text("x");
  a = fork(3, budget=30) {
    g = gen(max=5);
    h = gen(type=choice("a", "b"), max=3);
    b = fork(2, fallback=["cut"]) { c = gen("k", max=2); };
    return(h);
  } join(all(min=1), stitch);
  z = gen("k", max=2);
  return(a);
}
"""
EMPTY = """
main = plan(n: int) {
  text("x");
  a = fork(n, upto=3) { g = gen(max=2); } join(all, stitch);
  b = fork(2) { text("only text"); } join(all, stitch);
  c = fork(2) { y = 1; return(y); } join(vote(y), stitch);
  d = fork(66) { text("k"); y = 1; return(y); } join(vote(y), stitch);
  o = fork(1) { text("one"); } join(all, stitch);
  p = gen(max=2);
  z = gen(max=2);
  return(z);
}
"""
FAILS = """
main = plan() {
  text("x");
  a = fork(2, fallback=["no"]) { g = gen(max=2); need(false); return(g); } join(all, stitch);
  b = fork(2, fallback="no") { g = gen("k", max=2); y = "no number"; } join(vote(y, by=number), stitch);
  c = fork(3, fallback="no") { g = gen("k", max=2); h = gen(type=int, max=2); need(false); } join(best(h), stitch);
  d = fork(i: 3, fallback=3) { g = gen("k", max=2); v = i; } join(quorum(2, v), stitch);
  e = fork(3, fallback=["few"]) { g = gen("k", max=2); need(false); return(g); } join(first(2), text);
  f = fork(2, fallback="best") { text("only"); t = "u"; return(t); } join(best(logprob), text);
  z = gen("k", max=2);
  return([a, e]);
}
"""
DEEP = """
down = plan(n: int, depth=2) {
  text("d");
  g = gen(max=2);
  m = n - 1;
  if (m > 0) { x = down(m); };
  return(n);
}
main = plan(n: int) {
  text("x");
  a = fork(1, fallback=[0]) { b = down(n); return(b); } join(all, drop);
  c = down(2);
  return(a);
}
"""
BEST = """
main = plan() {
  user("What?");
  a = fork(3) {
    g = gen(max=4, temperature=0.7);
    b = fork(2) { c = gen("k", max=3); } join(best(logprob), stitch);
    return(g);
  } join(best(logprob), stitch);
  n = fork(4) { v = gen(type=int, max=2); w = 1; } join(best(w), stitch(sum));
  z = gen(max=3);
  return(a);
}
"""


def _flaky() -> dict[str, Callable[..., Any]]:
    calls: Counter[int] = Counter()

    def flaky(i: int) -> int:
        calls[i] += 1
        if calls[i] <= i:
            raise RuntimeError("not yet")
        return i

    return {"flaky": flaky}


def _odd() -> dict[str, Callable[..., Any]]:
    """Not all that is compared is a number."""
    return {"odd": lambda i: [True, math.nan, "9", 0.5][i]}


def _nested(join: str, positions: str) -> str:
    return NESTED.replace("JOIN", join).replace("POSITIONS", positions)


def _race(join: str, context: str) -> str:
    return RACE.replace("JOIN", join).replace("CONTEXT", context)


def _pressed(context: str, inner: str = INNER) -> str:
    return PRESSED.replace("CONTEXT", context).replace("INNER", inner)


def _one(text: str, inputs: Mapping[str, Any] | None = None, **more: Any) -> tuple[tuple[Job, ...], ...]:
    return ((Job(text, inputs or {}, **more),),)


Q = {"q": "why?"}
# More tokens than a row reads in place, and than are padded.
LONG_Q = {"q": "a long text that says much and goes on " * 19}
XS = {"n": 2, "xs": ["a", "b", "c"]}


def _config(**options: Any) -> EngineConfig:
    return EngineConfig(**{"lanes": 4, "page_size": 4, "chunk": 8, **options})


def settings() -> tuple[Setting, ...]:
    """The battery, what kills most mutants soonest first."""
    return (*_crafted(), *_generated())


def _crafted() -> Iterator[Setting]:
    yield Setting("nested max", _one(_nested("all", "stitch"), Q), _config(deterministic=True))
    yield Setting("pressed swap", _one(_pressed("drop"), {"n": 5}), _config(page_size=3, lanes=8), 0, True)
    yield Setting(
        "pressed recompute",
        ((Job(_pressed("stitch", ""), {"n": 5}), Job(_pressed("drop"), {"n": 4}, seed=3), Job(LEFT, after=2)),),
        _config(page_size=3, preempt="recompute", lanes=8),
        0,
        True,
    )
    yield Setting("half expected", _one(_pressed("drop", ""), {"n": 6}), _config(page_size=2, lanes=8), 6)
    yield Setting("control", _one(CONTROL, XS), _config(lanes=3, page_size=2))
    yield Setting(
        "cached", ((Job(PROMPT, Q),), (Job(PROMPT, Q), Job(PROMPT, {"q": "why not?"})), (Job(PROMPT, Q),)), _config()
    )
    yield Setting("cached tokens", ((Job(PROMPT, {"q": "abc"}),), (Job(PROMPT, {"q": "cab"}),)), _config(page_size=1))
    yield Setting(
        "adopted in a tight pool",
        ((Job(ADOPTED, Q),), (Job(ADOPTED, Q), Job(BESIDE))),
        _config(page_size=1, lanes=8, preempt="never"),
        8,
    )
    yield Setting("retry", _one(RETRY), _config(), functions=_flaky)
    yield Setting("retry within a budget", _one(RETRY_WITHIN), _config(), functions=_flaky)
    yield Setting("race first", _one(_race("first(2)", "stitch"), {"n": 4}), _config(), told=False)
    yield Setting("race in order", _one(_race("first(1)", "stitch"), {"n": 5}), _config(deterministic=True, lanes=2))
    yield Setting("quorum", _one(_race("quorum(2, v)", "text"), {"n": 4}), _config(page_size=16), told=False)
    yield Setting("nested sum", _one(_nested("vote(n)", "stitch(sum)"), Q), _config(lanes=1, chunk=1, page_size=1), 0)
    yield Setting("windowed", _one(_nested("all", "stitch(sum)"), Q), _config(lanes=3), window=5)
    yield Setting("nested text", _one(_nested("first(3)", "stitch(sum)"), Q), _config(lanes=2, chunk=3), 1)
    yield Setting("late", _one(LATE), _config(), told=False)
    yield Setting(
        "cancelled",
        ((Job(_nested("all", "stitch"), Q, cancel=7), Job(LEFT, after=3), Job(CONTROL, XS, cancel=16)),),
        _config(),
        told=False,
    )
    yield Setting("budget", _one(BUDGET), _config(lanes=2))
    yield Setting("empty", _one(EMPTY, {"n": 0}), _config(lanes=9))
    yield Setting("at once", _one(AT_ONCE, {"n": 1}), _config(deterministic=True))
    yield Setting("windowed long", _one(LONG, LONG_Q), _config(page_size=16, chunk=256), window=5)
    yield Setting("below", _one(BELOW), _config(deterministic=True))
    yield Setting("race of one", _one(_race("first(2)", "drop"), {"n": 1}), _config(deterministic=True))
    yield Setting("odd", _one(ODD), _config(lanes=3), functions=_odd, told=False)
    yield Setting("fails", _one(FAILS), _config(lanes=3))
    yield Setting("deep enough", _one(DEEP, {"n": 3}), _config(page_size=2, lanes=2))
    yield Setting("too deep", _one(DEEP, {"n": 9}), _config(page_size=2, lanes=2), reference=False)
    yield Setting("best", _one(BEST), _config(lanes=3, page_size=2))
    yield Setting(
        "three in a tight pool",
        ((Job(LEFT), Job(CONTROL, XS, seed=2, after=2), Job(LEFT, seed=3, after=4), Job(PROMPT, Q)),),
        _config(page_size=2, lanes=5, preempt="never"),
        3,
    )
    yield Setting("long", _one(LONG, LONG_Q), _config(lanes=4, page_size=16, chunk=256))
    yield Setting(
        "pressed pages", _one(_pressed("drop", ""), {"n": 6}), _config(page_size=1, lanes=8, chunk=2), 12, True
    )
    yield Setting(
        "pressed cache",
        ((Job(PROMPT, Q),), (Job(_pressed("drop"), {"n": 4}), Job(PROMPT, Q), Job(LEFT)), (Job(PROMPT, Q),)),
        _config(page_size=2, preempt="recompute", lanes=6),
        4,
        True,
    )
    yield Setting(
        "race pressed",
        ((Job(_race("first(1)", "drop"), {"n": 5}), Job(LEFT)),),
        _config(page_size=1, lanes=6),
        1,
        True,
        told=False,
    )


def _generated() -> Iterator[Setting]:
    """Plans that Hypothesis drew once (`--redraw`), each on another engine."""
    for number, case in enumerate(json.loads((HERE / "generated.json").read_text(encoding="utf-8"))):
        tight = number % 2 == 1
        config = EngineConfig(
            lanes=(8, 3, 2, 5)[number % 4],
            page_size=(4, 1, 16, 2, 5)[number % 5],
            chunk=(16, 3, 64, 1)[number // 2 % 4],
            deterministic=True,
            preempt=("swap", "recompute")[number // 2 % 2],
        )
        told_too = "best(logprob)" not in case["text"]
        yield Setting(
            f"generated {number}",
            _one(case["text"], case["inputs"], seed=number),
            config,
            number % 3 if tight else 40,
            tight,
            told=told_too,
        )


def redraw(count: int) -> None:
    """Draw `count` plans anew and write them to `generated.json`."""
    found: dict[str, Any] = {}

    @hypothesis.settings(COMMON, max_examples=6 * count)
    @hypothesis.given(plans(fuel=60))
    def collect(case: Plan) -> None:
        text = print_plan(case.program)
        if text.count("fork") + text.count("map") + text.count("reduce") >= 2:
            found.setdefault(text, case.inputs)

    collect()
    chosen = [{"text": text, "inputs": inputs} for text, inputs in found.items()][:count]
    (HERE / "generated.json").write_text(json.dumps(chosen, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def warm() -> None:
    """Load what every run needs, so that a forked child has it."""
    torch.set_num_threads(1)
    model()
    weights()
