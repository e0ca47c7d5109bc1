"""The engine held to its limits: odd values, broken steps, wide joins, bounds, shared use."""

import asyncio
import gc
import weakref

import pytest
from test_engine import VOTE, assert_idle, engine, one

from anabranch.dsl.diagnostics import PlanError
from anabranch.runtime.engine import Engine, EngineConfig
from anabranch.runtime.events import GenEnded, RunEnded
from anabranch.runtime.recorder import Recorder
from anabranch.runtime.replay import Replay


def test_two_streams_share_an_engine() -> None:
    """Streams awaited side by side do not step under each other's hands, and each gets its own run's end."""
    found = engine()

    async def last(question: str) -> object:
        events = [e.event async for e in found.stream(VOTE, {"q": question})]
        return events[-1]

    async def both() -> list[object]:
        return list(await asyncio.gather(last("one"), last("two")))

    for ended in asyncio.run(both()):
        assert isinstance(ended, RunEnded)
        assert ended.status == "ok"
    assert_idle(found)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -1.0),
        ("top_k", 10**30),
        ("top_k", 1.5),
        ("top_p", 2.0),
        ("repetition_penalty", 0.0),
        ("seed", "x"),
    ],
)
def test_a_sampling_option_out_of_range_fails_its_branch(option: str, value: object) -> None:
    """A computed option is held to the range of a written one; a run beside it goes on."""
    found = engine()
    bad = found.submit(f'p = plan(t) {{ text("a"); x = gen(max=2, {option}=t); return(x); }}', {"t": value})
    good = found.submit(VOTE, {"q": "x"})
    while found.step():
        pass
    assert bad.result is not None
    assert good.result is not None
    assert (bad.result.status, good.result.status) == ("failed", "ok")
    assert f"`{option}`" in bad.result.reason


@pytest.mark.parametrize("value", ["ab" * 5000, 3, ["a", 1]])
def test_recorded_text_that_does_not_fit_fails_its_branch(value: object) -> None:
    """What a host function gives as recorded text is held to its type and to the bound that admission counted."""
    plan = 'p = plan() { text("a"); y = f(); z = gen(recorded=y, max=4); w = gen(max=2); return(w); }'
    found = engine()
    assert one(found.run(plan, functions={"f": lambda: value})).status == "failed"
    assert_idle(found)


@pytest.mark.parametrize(
    "body",
    [
        'gen(recorded="a <|im_end|> b", max=4);',
        'gen(recorded="a <|im_" + "end|> b" + \'"\', max=4);',
        'x = "a <|im_end|> b"; text(x); text("#{x}");',
        'f = fork() { branch() { text("x"); return("<|im_end|><|im_end|>"); }; } join(all, drop); text("#{f[0]}");',
        'text("a " + "<|im_end|>");',
        'gen(recorded=["<|im_end|>", "b"], max=4);',
    ],
)
def test_a_special_token_that_is_spelled_in_a_value_counts_as_text(body: str) -> None:
    """Text that is no statement's own string forms no special token, and fits the bound that was counted for it."""
    found = engine()
    result = one(found.run(f'p = plan() {{ text("k"); {body} w = gen(max=2); }}'))
    assert result.status == "ok", result.reason
    counts = result.counts
    assert counts["pages_peak"] <= counts["pages_bound"]
    assert_idle(found)


def test_a_stop_trims_what_was_drawn_past_it() -> None:
    """Tokens of the stop itself are drawn, do not stay, and are counted apart."""
    plan = 'p = plan() { text("a"); y = gen(max=60, stop=["e"]); z = gen("k", max=3); return([y, z]); }'
    result = one(engine().run(plan))
    ended = next(e for e in result.events if isinstance(e, GenEnded))
    assert ended.end == "stop"
    assert result.counts["tokens_trimmed"] > 0


def test_a_plan_without_a_fork_is_cached_too() -> None:
    """Also a prefix that ends in a gen is kept for the next run."""
    found = engine()
    plan = 'p = plan(q: text(60)) { text("#{q}"); x = gen(max=2); return(x); }'
    question = {"q": "a question long enough to fill a page of sixteen"}
    first, second = (one(found.run(plan, question)) for _ in range(2))
    assert second.counts["tokens_cached"] >= 16
    assert first.value == second.value


def test_a_broken_step_does_not_poison_the_engine() -> None:
    """An error inside a step fails the runs that were under way; the next run starts from an empty pool."""
    found = engine()

    def listener(run: object, event: object) -> None:
        if isinstance(event, GenEnded):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        found.run(VOTE, {"q": "x"}, listener=listener)
    assert_idle(found)
    assert one(found.run(VOTE, {"q": "x"})).status == "ok"


def test_the_critical_path_counts_what_a_deadline_cut() -> None:
    """Tokens of late branches are on the path that the parent waited for."""
    plan = """
    p = plan() { text("x"); a = fork(2, deadline="30ms", fallback=["late"]) {
      loop(50) { h = gen(max=20); }; return("done");
    } join(all, drop); }
    """
    counts = one(engine(pages=4096).run(plan)).counts
    assert 0 < counts["critical_path_tokens"] <= counts["tokens_decoded"]


def test_a_batch_keeps_within_its_bounds() -> None:
    """Pages and steps of several inputs stay within the bounds of the whole batch."""
    found = engine(lanes=2)
    for result in found.run(VOTE, [{"q": "one"}, {"q": "two"}, {"q": "three"}]):
        assert result.counts["pages_peak"] <= result.counts["pages_bound"]
        assert result.counts["steps"] <= result.counts["steps_bound"]


def test_a_wide_fork_feeds_its_winner_again_within_the_bound() -> None:
    """Above the width that keeps logits, the winner's last token is fed once more, and the bound knows."""
    plan = (
        'p = plan() { text("a"); f = fork(65) { text("k"); y = 1; return(y); } join(vote(y), stitch); z = gen(max=3); }'
    )
    counts = one(engine().run(plan)).counts
    assert counts["tokens_recomputed"] == 1
    assert counts["steps"] <= counts["steps_bound"]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_wide_quorum_closes(deterministic: bool) -> None:
    """A quorum over two thousand branches closes as soon as five hundred agree."""
    plan = """
    p = plan() { text("x"); a = fork(2000) { g = gen(max=1); y = 1; return(y); } join(quorum(500, y)); return(a); }
    """
    result = one(engine(deterministic=deterministic).run(plan))
    assert result.value == 1
    assert sum(b.status == "ok" for b in result.branches) >= 500


@pytest.mark.parametrize("items", [["a", "b"], ["a", "b", "c", "d"]])
def test_the_fallback_of_a_reduce_stands_for_its_value(items: list[str]) -> None:
    """A level that fails ends the reduce with its fallback, which is of the items' type and no list of them."""
    plan = """
    p = plan(xs: list(4, text(4))) {
      r = reduce(g: xs, by=2, fallback="none") { need(false); return("a"); };
      return(r);
    }
    """
    found = engine()
    assert one(found.run(plan, {"xs": items})).value == "none"
    assert_idle(found)


def test_adopted_pages_count_as_held_at_a_fork() -> None:
    """In a tight pool, a fork after a prompt from the prefix cache reserves no less than it takes."""
    plan = """
    p = plan() {
      text("A prompt of some length that goes on for a while");
      a = fork() {
        one = branch("k") { x = fork(1) { g = gen(type=regex("[ab]{24}"), max=24); } join(all, drop); return(1); };
        two = branch("k") { g = gen(type=regex("[ab]{24}"), max=24); return(2); };
      } join(all, stitch);
    }
    """
    beside = 'p = plan() { text("k"); g = gen(type=regex("[ab]{20}"), max=20); }'
    roomy = engine(page_size=1, pages=4096)
    least = roomy.compile(plan).bounds(roomy, {}).pages_depth_first
    for more in range(0, 64, 8):
        found = engine(page_size=1, pages=least + more, preempt="never")
        assert one(found.run(plan)).status == "ok"
        runs = [found.submit(plan), found.submit(beside)]
        while any(run.result is None for run in runs):
            found.step()
        assert all(run.result is not None and run.result.status == "ok" for run in runs)
        assert_idle(found)


def test_what_a_join_cut_off_does_not_count_under_deterministic() -> None:
    """How far cancelled branches had come depends on the lanes; which branch comes first must not."""
    plan = """
    p = plan() {
      text("x");
      a = fork(i: 4) {
        b = fork(3) { g = gen(max=20); return(g); } join(first(1));
        h = gen("k", max=8);
        return(i);
      } join(first(1));
      return(a);
    }
    """
    for seed in range(12):
        values = {one(engine(deterministic=True, lanes=lanes).run(plan, seed=seed)).value for lanes in (1, 3, 16)}
        assert len(values) == 1, seed


def test_an_engine_goes_with_its_last_owner() -> None:
    """Nothing that an engine holds holds it, also after runs: its pool is large, and must not wait for a collection."""
    found = engine()
    one(found.run(VOTE, {"q": "x"}))
    cancelled = found.submit(VOTE, {"q": "y"})
    found.step()
    found.cancel(cancelled)
    known = weakref.ref(found)
    gc.disable()
    try:
        del found
        assert known() is None or cancelled.engine is known()
        del cancelled
        assert known() is None
    finally:
        gc.enable()


def test_a_compiled_plan_is_held_to_what_is_deterministic() -> None:
    """A deadline is refused also in a plan that was compiled for an engine that reads the clock."""
    compiled = engine().compile('p = plan() { a = fork(2, deadline="1s") { g = gen("a", max=2); }; }')
    with pytest.raises(PlanError) as raised:
        engine(deterministic=True).run(compiled)
    assert raised.value.code == "wall-clock"


def test_what_goes_on_from_a_journal_is_not_recorded() -> None:
    """A recording holds nothing of before a kill, so a replay on a recorded engine is refused at once."""
    model = engine().model
    recorded = Engine(model, EngineConfig(pages=64), recorder=Recorder())
    with pytest.raises(ValueError, match="cannot be recorded"):
        recorded.submit(VOTE, {"q": "x"}, replay=Replay(()))
