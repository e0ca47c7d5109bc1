"""The engine's face: many runs at once, streaming, interruption, caching, counts."""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch

from anabranch.dsl.diagnostics import PlanError
from anabranch.runtime.engine import Engine, EngineConfig, Interrupted, RunResult
from anabranch.runtime.events import BranchEnded, GenEnded, RunEnded, TextDelta
from anabranch.runtime.models import load

VOTE = """
p = plan(q: text(60)) {
  user("#{q}");
  a = fork(4) { w = gen(max=12); n = gen("Answer: ", type=int, max=4); return(n); } join(vote(n), stitch);
  z = gen(" because ", max=6);
  return([a, z]);
}
"""


def engine(**options: object) -> Engine:
    """A small engine on the random test model."""
    config = {"lanes": 8, "pages": 512, **options}
    return Engine(load("random", dtype=torch.float64), EngineConfig(**config))  # type: ignore[arg-type]


def assert_idle(found: Engine) -> None:
    """Every page is free or held by the prefix cache alone, and nothing is reserved."""
    assert found.pool.used == found.pool.idle
    assert found.scheduler.reserved == 0
    assert found.scheduler.idle


def one(results: list[RunResult]) -> RunResult:
    (result,) = results
    return result


def test_a_stitch_prefills_nothing() -> None:
    """Forking prefills the branches' own prompts alone; the join prefills none and flushes at most one token each."""
    found = engine(prefix_cache=False)
    # A gen of whole words is never cut inside a character, so nothing is put in its place.
    counts = one(found.run(VOTE.replace("gen(max=12)", 'gen(type=choice("aye", "nay"), max=12)'), {"q": "why?"})).counts
    tokens = found.tokenizer
    user = len(tokens.encode(found.chat.turn("user", [("why?", False)], first=True, open=False)))
    assistant = len(tokens.encode(found.chat.open_assistant(first=False)))
    answer = len(tokens.encode([("Answer:", True)]))
    because = len(tokens.encode([(" because", True)]))
    start = int(tokens.bos_id is not None)
    assert counts["tokens_prefilled"] == start + user + assistant + 4 * answer + because
    assert counts["tokens_reprefilled"] == 0
    assert counts["tokens_flushed"] <= 4
    assert counts["tokens_aliased"] >= 4 * (user + assistant)
    assert_idle(found)


def test_a_text_join_prefills_again() -> None:
    """What `stitch` saves is what `text` counts as prefilled again."""
    plan = 'p = plan() { text("x"); a = fork(3) { w = gen(max=5); } join(all, text); z = gen(max=3); }'
    counts = one(engine().run(plan)).counts
    assert counts["tokens_reprefilled"] > 0
    stitched = one(engine().run(plan.replace("join(all, text); z = gen(max", "join(all, stitch); z = gen('.', max")))
    assert stitched.counts["tokens_reprefilled"] == 0


def test_a_second_run_starts_from_cached_pages() -> None:
    """The same prompt again is read from the prefix cache, and gives the same value."""
    found = engine()
    first = one(found.run(VOTE, {"q": "a question long enough to fill a page of sixteen"}))
    second = one(found.run(VOTE, {"q": "a question long enough to fill a page of sixteen"}))
    assert first.counts["tokens_cached"] == 0
    assert second.counts["tokens_cached"] >= 16
    assert second.counts["tokens_prefilled"] == first.counts["tokens_prefilled"] - second.counts["tokens_cached"]
    assert second.value == first.value
    assert_idle(found)


def test_inputs_share_a_batch_and_keep_their_own_noise() -> None:
    """Three inputs at once give what each gives alone under its index, in fewer steps."""
    found = engine()
    inputs = [{"q": "one"}, {"q": "two"}, {"q": "one"}]
    together = found.run(VOTE, inputs, seed=3)
    steps = found.num_steps
    assert [r.status for r in together] == ["ok"] * 3
    assert together[0].value != together[2].value
    alone = one(engine().run(VOTE, inputs[0], seed=3))
    assert alone.value == together[0].value
    assert steps < sum(r.counts["steps"] for r in together)
    assert_idle(found)


def test_a_wrong_input_queues_nothing() -> None:
    """If one of several inputs is wrong, none of them is left in the engine."""
    found = engine()
    with pytest.raises(PlanError) as caught:
        found.run(VOTE, [{"q": "one"}, {}])
    assert caught.value.code == "missing-input"
    assert not found.step()
    assert one(found.run(VOTE, {"q": "one"})).status == "ok"


def test_different_plans_run_at_once() -> None:
    """Plans submitted together advance in the same steps, and each comes out as it does alone."""
    found = engine()
    runs = [found.submit(VOTE, {"q": "x"}), found.submit('p = plan() { text("y"); g = gen(max=9); }')]
    while found.step():
        pass
    alone = one(engine().run('p = plan() { text("y"); g = gen(max=9); }'))
    assert runs[1].result is not None
    assert runs[1].result.value == alone.value
    assert_idle(found)


def test_streaming_gives_the_text_as_it_comes() -> None:
    """The deltas of a gen add up to its text; the last event is the run's end."""

    async def collect() -> list[object]:
        return [e.event async for e in engine().stream(VOTE, {"q": "x"})]

    events = asyncio.run(collect())
    assert isinstance(events[-1], RunEnded)
    path = next(e.path for e in events if isinstance(e, TextDelta))
    ended = [e for e in events if isinstance(e, GenEnded) and e.path == path]
    deltas = "".join(e.text for e in events if isinstance(e, TextDelta) and e.path == path)
    assert deltas == "".join(e.text for e in ended)


def test_leaving_a_stream_cancels_the_run() -> None:
    """A consumer that stops early leaves no run and no page behind."""
    found = engine()

    async def first() -> None:
        stream = found.stream(VOTE, {"q": "x"})
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(first())
    assert not found.step()
    assert_idle(found)


def test_cancelling_a_stream_waits_for_its_step() -> None:
    """A cancelled task does not touch the engine while a step still runs in its thread."""
    found = engine()

    async def consume() -> None:
        async for _ in found.stream(VOTE, [{"q": "x"}] * 4):
            pass

    async def main() -> None:
        task = asyncio.create_task(consume())
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert_idle(found)


def test_an_interrupt_keeps_what_was_finished() -> None:
    """Ctrl-C ends `run` between two steps; the results tell what was done, and the engine can go on."""
    found = engine(lanes=1)
    sent = threading.Event()

    def listener(run: object, event: object) -> None:
        if isinstance(event, BranchEnded) and not sent.is_set():
            sent.set()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        found.run(VOTE, {"q": "x"}, listener=listener)
    (result,) = caught.value.results
    assert result.status == "cancelled"
    assert "ok" in {b.status for b in result.branches}
    assert_idle(found)
    assert one(found.run(VOTE, {"q": "x"})).status == "ok"


def _raises(x: object) -> object:
    raise KeyError(x)


def test_a_host_function_that_raises_fails_its_branch() -> None:
    """The branch says which function raised what; its siblings go on."""
    plan = """
    p = plan() {
      text("x");
      a = fork(i: 3) { g = gen(max=3); y = host(i); return(y); } join(all(min=2), drop);
      return(a);
    }
    """
    found = engine()
    result = one(found.run(plan, functions={"host": lambda i: _raises(i) if i == 1 else i * 10}))
    assert result.value == [0, 20]
    assert [b.reason for b in result.branches if b.status == "failed"] == ["`host` raised KeyError: 1 (line 4)"]
    assert_idle(found)


def test_a_deadline_ends_the_late() -> None:
    """Branches that outlast their deadline are late, and the fallback is the value."""
    plan = """
    p = plan() {
      text("x");
      a = fork(2, deadline="1ms", fallback=["none"]) { g = gen(max=400); loop(50) { h = gen(max=20); }; return(g); }
        join(all, drop);
      return(a);
    }
    """
    found = engine(pages=4096)
    result = one(found.run(plan))
    assert result.value == ["none"]
    assert {b.status for b in result.branches} == {"late"}
    assert_idle(found)


def counts_of(results: list[RunResult]) -> Iterator[dict[str, int | float]]:
    for result in results:
        yield dict(result.counts)


def test_rows_add_up() -> None:
    """Rows are prefilled, decoded, flushed or recomputed; sampled tokens that nothing needed are counted apart."""
    for counts in counts_of(engine().run(VOTE, [{"q": "x"}, {"q": "yy"}])):
        decoded_rows = counts["tokens_decoded"] - counts["tokens_unfed"] - counts["tokens_flushed"]
        fed = counts["tokens_prefilled"] + decoded_rows + counts["tokens_flushed"] + counts["tokens_recomputed"]
        assert counts["rows"] == fed


def test_a_wide_fork_keeps_few_pages() -> None:
    """A wide fork starts its branches as lanes come free: pages stay few."""
    plan = 'p = plan() { text("x"); a = fork(2000) { g = gen(max=2); } join(all, drop); return(len(a)); }'
    found = engine(lanes=64)
    result = one(found.run(plan))
    assert result.value == 2000
    assert result.counts["pages_peak"] <= 65
    assert_idle(found)
