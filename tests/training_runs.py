"""Runs of the random test model as traces, the rows they make, and what engine and reference let their tokens see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from law_runs import TOLERANCE, model, weights
from torch import Tensor

import anabranch
from anabranch.compiler import recording as rec
from anabranch.compiler.verify_recording import verify_recording
from anabranch.dsl.parse import parse_text
from anabranch.runtime.dense import dense_forward
from anabranch.runtime.engine import Engine, EngineConfig, RunResult
from anabranch.runtime.journal import Header
from anabranch.runtime.layout import Layout
from anabranch.runtime.packing import PackedRow, RowBuilder
from anabranch.runtime.recorder import Recorder
from anabranch.runtime.replay import LogEntry, Replay
from anabranch.runtime.traces import Example, Trace
from anabranch.runtime.training import shifts, visibility
from anabranch.testing import Plan

STOPS = """
p = plan(q: text(20)) {
  user("#{q}");
  a = gen("one", max=12, stop=["t"]);
  b = gen(" two", recorded="past it", max=12);
  c = gen(" three", type=choice("yes", "no", by="logprob"), max=2);
  d = fork(2, fallback="") { x = gen("k", max=9); need(len(x) > 900); } join(first(1), drop);
  e = fork(2) { y = gen("m", max=5); } join(first(1), stitch);
  return([a, b, c]);
}
"""

SHARED = """
p = plan(q: text(200)) {
  user("#{q}");
  a = fork(3) { g = gen("so ", max=4); } join(all, stitch);
  text("!");
  z = gen("k", max=3);
}
"""


ROOMY = EngineConfig(lanes=8, pages=512, page_size=4, chunk=16, prefix_cache=False, trace_logits=True)

Place = tuple[tuple[str, ...], int]
"""A token of a run, by the thread that wrote it and its position. A thread writes one twice only after a trim."""

Views = Mapping[Place, set[frozenset[tuple[Place, int]]]]
"""What the tokens that stood at a place saw: (place, shift) of each key."""


def header(text: str, **changed: Any) -> Header:
    """Of a run of `text` on the random model."""
    fields: dict[str, Any] = {
        "anabranch": anabranch.__version__, "source": "a.plan", "text": text, "plan": parse_text(text).plans[-1].name,
        "inputs": ({},), "many": False, "seed": 1, "deterministic": False, "lanes": 4, "pages": 512,
        "page_size": 4, "chunk": 64, "model": "random", "fingerprint": model().fingerprint, "preempt": "swap",
        "threads": 1, "dtype": "float64", "device": None, "template": None, "functions": None,
    }  # fmt: skip
    return Header(**{**fields, **changed})


def traced(
    plan: Plan, config: EngineConfig = ROOMY, seed: int = 1, replayed: Sequence[LogEntry] = ()
) -> tuple[RunResult, Trace, rec.Recording]:
    """Run a plan on an engine whose pool holds the least that it needs, and `config.pages` more."""
    roomy = Engine(model(), replace(config, pages=4096))
    compiled = roomy.compile(plan.program, functions=tuple(plan.functions))
    least = compiled.bounds(roomy, plan.inputs).pages_depth_first
    recorder = None if replayed else Recorder()
    engine = Engine(model(), replace(config, pages=least + (config.pages or 0)), recorder=recorder)
    engine.clock = lambda: float(engine.num_steps)
    log: list[LogEntry] = list(replayed)
    run = engine.submit(
        compiled,
        plan.inputs,
        seed=seed,
        functions=plan.functions,
        log=log.append,
        replay=Replay(replayed) if replayed else None,
    )
    while run.result is None:
        engine.step()
    recording = rec.Recording(engine.scheduler.machine, False, (), ()) if recorder is None else recorder.recording()
    if recorder is not None:
        verify_recording(recording, compiled=[compiled])
    head = header(plan.text, inputs=(dict(plan.inputs),), seed=seed)
    return run.result, Trace(f"run {seed}", head, plan.inputs, tuple(log)), recording


def engine_views(recording: rec.Recording) -> Views:
    """What the engine let each row attend to, from the slots that its kernels were given."""
    size = recording.machine.page_size
    path: dict[int, tuple[str, ...]] = {}
    opened: dict[int, tuple[int, int]] = {}
    pages: defaultdict[int, list[int]] = defaultdict(list)
    owner: dict[int, tuple[int, int]] = {}
    found: defaultdict[Place, set[frozenset[tuple[Place, int]]]] = defaultdict(set)

    def take(segment: int, page: int) -> None:
        owner[page] = segment, len(pages[segment])
        pages[segment].append(page)

    def place(slot: int) -> Place:
        segment, number = owner[slot // size]
        thread, start = opened[segment]
        return path[thread], start + number * size + slot % size

    for step in recording.steps:
        match step:
            case rec.Begin():
                path[step.thread] = step.path
            case rec.Open():
                opened[step.segment] = step.thread, step.start
            case rec.Page():
                take(step.segment, step.page)
            case rec.Shrink():
                del pages[step.segment][len(pages[step.segment]) - step.count :]
            case rec.SwapOut():
                pages[step.segment].clear()
            case rec.SwapIn():
                for page in step.pages:
                    take(step.segment, page)
            case rec.Call():
                for block in step.blocks:
                    for row, reads in enumerate(block.reads):
                        seen = [(place(first + n), shift) for first, count, shift in reads for n in range(count)]
                        assert len(seen) == len(set(seen))
                        found[path[block.thread], block.position + row].add(frozenset(seen))
            case _:
                pass
    return found


def reference_views(layout: Layout) -> Views:
    """What the reference lets each token see."""
    visible, distance = layout.visibility()
    places = [(layout.segments[token.segment].path, token.position) for token in layout.tokens]
    found: defaultdict[Place, set[frozenset[tuple[Place, int]]]] = defaultdict(set)
    for row, place in enumerate(places):
        keys = visible[row].nonzero()[:, 0].tolist()
        found[place].add(frozenset((places[key], int(distance[row, key])) for key in keys))
    return found


def build(
    examples: Iterable[Example],
) -> tuple[PackedRow, list[tuple[tuple[int, ...], ...]], dict[tuple[int, int], int]]:
    """One row of all examples; the tokens of the row that each is, and where labels stand."""
    builder = RowBuilder()
    placed = []
    for example in examples:
        fit = builder.fit(example)
        before = builder.num_tokens
        placed.append(builder.add(example, fit))
        assert builder.num_tokens == before + fit.num_new
    row, where = builder.finish()
    assert row.num_tokens == builder.num_tokens
    return row, placed, where


def forward(batch: Mapping[str, Tensor]) -> Tensor:
    """[length, vocab]: the logits of a batch of one row, by the plain decoder in fp64."""
    return dense_forward(
        batch["input_ids"][0],
        batch["position_ids"][0],
        visibility(batch)[0],
        shifts(batch)[0],
        model().decoder.config,
        weights(),
    )


def hold_example(
    batch: Mapping[str, Tensor],
    logits: Tensor,
    example: Example,
    placed: Sequence[Sequence[int]],
    where: Mapping[tuple[int, int], int],
    result: RunResult,
    views: Sequence[Views],
) -> int:
    """One run in a row: what its tokens see is what `views` say, and drawn labels have the engine's logits."""
    visible, distance = visibility(batch)[0], shifts(batch)[0]
    place_of: dict[int, Place] = {}
    for segment, path, rows in zip(example.segments, example.paths, placed, strict=True):
        for n, row in enumerate(rows):
            assert row not in place_of, "two tokens of a run are one"
            place_of[row] = path, segment.start + n
            assert int(batch["position_ids"][0, row]) == segment.start + n
            assert int(batch["input_ids"][0, row]) == segment.ids[n]
    predicts = {placed[t.segment][t.place] for t in example.targets if t.draw is not None}
    for row, place in place_of.items():
        keys = visible[row].nonzero()[:, 0].tolist()
        # A key of another run has no place, and is an error here.
        seen = frozenset((place_of[key], int(distance[row, key])) for key in keys)
        for known in views:
            assert seen in known[place] if row in predicts else not known.get(place) or seen in known[place]
    rows = {(row.path, row.index): row for row in result.logits}
    for target in example.targets:
        at = where[placed[target.segment][target.place], target.token]
        assert int(batch["labels"][0, at]) == target.token
        if target.draw is not None:
            assert rows[target.draw].token == target.token
            assert float((logits[at] - rows[target.draw].logits).abs().max()) <= TOLERANCE
    return len(example.targets)
