"""Under `deterministic` the bits of a branch's logits depend on what the branch sees, and on nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law_runs import COMMON
from torch import Tensor

from anabranch.compiler.recording import Lose, SwapIn
from anabranch.compiler.scheduler import Need, Policy
from anabranch.dsl.diagnostics import PlanError
from anabranch.dsl.parse import parse_text
from anabranch.kernels.merge_states import fold_, sum_parts_, weigh_parts
from anabranch.kernels.sample import draw, logprob
from anabranch.kernels.segment_attention import attend_parts, attention_torch
from anabranch.runtime import attention_fixed, fixed_shapes
from anabranch.runtime.engine import Engine, EngineConfig, RunResult
from anabranch.runtime.events import Path
from anabranch.runtime.fixed_shapes import PART, FixedShapes
from anabranch.runtime.model import Decoder
from anabranch.runtime.models import LoadedModel, load
from anabranch.runtime.random_model import random_weights
from anabranch.runtime.recorder import Recorder
from anabranch.runtime.reference import check_run
from anabranch.testing import Plan, plans

DTYPES = [torch.float32, torch.float64]
ROOMY = EngineConfig(lanes=8, pages=4096, page_size=16, chunk=64, trace_logits=True, deterministic=True)


@cache
def model(dtype: torch.dtype) -> LoadedModel:
    torch.set_num_threads(1)
    return load("random", dtype=dtype)


@cache
def shaped(heads: int, kv_heads: int, head_dim: int, window: int | None, dtype: torch.dtype) -> LoadedModel:
    """The random model with other heads, and with a sliding window in its first layer."""
    base = model(dtype)
    config = base.decoder.config
    config = replace(
        config, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, sliding_window=(window, None, None)
    )
    return replace(base, decoder=Decoder(config, random_weights(config, base.tokenizer, 0), dtype=dtype))


@st.composite
def engines(draw: st.DrawFn) -> EngineConfig:
    """Engines of every shape. `pages` counts those beyond the least that the plans need; `run` adds that."""
    return EngineConfig(
        lanes=draw(st.sampled_from([8, 3, 2, 1])),
        pages=draw(st.sampled_from([400, 8, 1, 0])),
        page_size=draw(st.sampled_from([16, 5, 2, 1])),
        chunk=draw(st.sampled_from([512, 64, 16, 3, 1])),
        prefix_cache=draw(st.booleans()),
        preempt=draw(st.sampled_from(["swap", "recompute", "never"])),
        deterministic=True,
        trace_logits=True,
    )


class Bold(Policy):
    """Lets everything start, so that much must be taken back."""

    def expects(self, need: Need) -> int:
        return 1


def run(
    model: LoadedModel,
    config: EngineConfig,
    batch: Sequence[Plan],
    *,
    seed: int = 0,
    warm: bool = False,
    policy: Policy | None = None,
    recorder: Recorder | None = None,
) -> list[RunResult]:
    """Run the plans in one batch; `warm`: after they were run once, so that prefixes come from the cache."""
    roomy = Engine(model, replace(config, pages=4096))
    compiled = [roomy.compile(plan.program, functions=tuple(plan.functions)) for plan in batch]
    least = max(one.bounds(roomy, plan.inputs).pages_depth_first for one, plan in zip(compiled, batch, strict=True))
    engine = Engine(model, replace(config, pages=least + (config.pages or 0)), policy=policy, recorder=recorder)
    for _ in range(1 + warm):
        runs = [
            engine.submit(one, plan.inputs, seed=seed, functions=plan.functions)
            for one, plan in zip(compiled, batch, strict=True)
        ]
        while any(run.result is None for run in runs):
            engine.step()
    return [run.result for run in runs if run.result is not None]


def rows(result: RunResult) -> dict[tuple[Path, int], Tensor]:
    """The logits of every draw, by (path, index)."""
    return {(row.path, row.index): row.logits for row in result.logits}


def compare(one: RunResult, two: RunResult) -> tuple[int, int]:
    """How many draws both runs made, and in how many of them some bit of the logits differs."""
    a, b = rows(one), rows(two)
    both = a.keys() & b.keys()
    return len(both), sum(not torch.equal(a[key], b[key]) for key in both)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_engine_nor_batch_changes_a_bit(dtype: torch.dtype) -> None:
    """A plan alone, and beside another on an engine of another shape, its prefix from the cache or not."""
    total = 0

    @settings(COMMON, max_examples=80)
    @given(
        plans(deadlines=False),
        engines(),
        engines(),
        plans(fuel=30, max_depth=1, deadlines=False),
        st.integers(0, 2**32),
        st.booleans(),
    )
    def law(plan: Plan, one: EngineConfig, two: EngineConfig, other: Plan, seed: int, warm: bool) -> None:
        nonlocal total
        alone = run(model(dtype), one, [plan], seed=seed)[0]
        beside = run(model(dtype), two, [other, plan], seed=seed, warm=warm)[1]
        assert (alone.status, alone.value) == (beside.status, beside.value)
        count, differ = compare(alone, beside)
        assert not differ
        total += count

    law()
    assert total > 500


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ordinary_mode_does_change_bits(dtype: torch.dtype) -> None:
    """What the test above compares can differ: without `deterministic` a third of the rows does, at the least."""
    total = differing = 0

    @settings(COMMON, max_examples=25)
    @given(plans(deadlines=False), engines(), engines(), plans(fuel=30, max_depth=1, deadlines=False))
    def look(plan: Plan, one: EngineConfig, two: EngineConfig, other: Plan) -> None:
        nonlocal total, differing
        alone = run(model(dtype), replace(one, deterministic=False), [plan])[0]
        beside = run(model(dtype), replace(two, deterministic=False), [other, plan])[1]
        count, differ = compare(alone, beside)
        total, differing = total + count, differing + differ

    look()
    print(f"{dtype}: {differing} of {total} rows differ")  # shown with `pytest -s`
    assert differing > total / 3


LONG = """
main = plan(head: text, own: text, tail: text) {
  text("#{head}");
  x = fork(WIDTH) {
    text("#{own}");
    a = gen(max=3);
    y = fork(2) { b = gen("b", max=4); } join(all, INNER);
    c = gen("c", max=2);
  } join(all, OUTER);
  text("#{tail}");
  z = gen("z", max=3);
}
"""
JOINS = ["drop", "text", "stitch", "stitch(sum)"]
SHAPES = [(4, 2, 16, None), (4, 2, 16, 70), (3, 1, 64, None), (6, 2, 12, 9), (2, 2, 128, None), (9, 3, 32, 130)]


@st.composite
def long_plans(draw: st.DrawFn) -> tuple[Plan, Plan]:
    """A plan whose texts end anywhere in a part, and the same with another number of branches."""
    lengths = st.one_of(st.integers(0, 2 * PART + 5), st.sampled_from([PART - 1, PART, PART + 1, 2 * PART]))
    texts = {name: ("na" * PART * 2)[: draw(lengths)] for name in ("head", "own", "tail")}
    text = LONG.replace("INNER", draw(st.sampled_from(JOINS))).replace("OUTER", draw(st.sampled_from(JOINS)))
    widths = draw(st.lists(st.integers(1, 5), min_size=2, max_size=2, unique=True))
    one, two = (Plan(parse_text(text.replace("WIDTH", str(width))), texts) for width in widths)
    return one, two


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_views_keep_their_bits(dtype: torch.dtype) -> None:
    """Several parts, shifts, windows and heads: beside fewer or more siblings, and however the text was cut."""
    total = 0

    @settings(COMMON, max_examples=25)
    @given(long_plans(), engines(), engines(), st.sampled_from(SHAPES), st.booleans())
    def law(
        pair: tuple[Plan, Plan],
        one: EngineConfig,
        two: EngineConfig,
        shape: tuple[int, int, int, int | None],
        warm: bool,
    ) -> None:
        nonlocal total
        found = shaped(*shape, dtype)
        (alone,) = run(found, one, pair[:1])
        beside, other = run(found, two, pair, warm=warm)
        counts = [compare(alone, beside), compare(alone, other)]
        assert counts[0][1] == 0
        # What follows the join sees other branches; the branches themselves do not.
        branches = rows(alone).keys() & rows(other).keys() - {key for key in rows(alone) if not key[0]}
        assert all(torch.equal(rows(alone)[key], rows(other)[key]) for key in branches)
        total += counts[0][0] + len(branches)

    law()
    assert total > 500


@settings(COMMON, max_examples=30)
@given(long_plans(), engines(), st.sampled_from(SHAPES))
def test_long_views_have_the_logits_of_the_reference(
    pair: tuple[Plan, Plan], config: EngineConfig, shape: tuple[int, int, int, int | None]
) -> None:
    """Law 1 where a view has several parts, in groups of two: under shifts, windows and other heads."""
    found = shaped(*shape, torch.float64)
    decoder = found.decoder
    weights = {name: w.double() for name, w in random_weights(decoder.config, found.tokenizer, 0).items()}
    plan = pair[0]
    with work_cut(GROUP=2):
        (result,) = run(found, config, [plan])
    check_run(
        plan.program, None, plan.inputs, result.events, found.tokenizer, found.chat, decoder.config, weights,
        result.logits, tolerance=1e-9,
    )  # fmt: skip


@contextmanager
def work_cut(**constants: int) -> Iterator[None]:
    """The work of attention cut otherwise."""
    before = {name: getattr(attention_fixed, name) for name in constants}
    try:
        for name, value in constants.items():
            setattr(attention_fixed, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(attention_fixed, name, value)


@settings(COMMON, max_examples=10)
@given(long_plans(), st.sampled_from([1, 8, 50]), st.sampled_from([1, 2, 99]), st.sampled_from([1, 3, 256]))
def test_how_the_work_is_cut_changes_no_bit(pair: tuple[Plan, Plan], queries: int, own: int, copied: int) -> None:
    """Rows a call, what is read in place and how much is copied at once are matters of speed."""
    for dtype in DTYPES:
        (expected,) = run(model(dtype), ROOMY, pair[:1])
        with work_cut(QUERIES=queries, OWN_PARTS=own, COPIED_PARTS=copied):
            (found,) = run(model(dtype), ROOMY, pair[:1])
        count, differ = compare(found, expected)
        assert count
        assert not differ


@settings(COMMON, max_examples=10)
@given(long_plans(), engines(), engines())
def test_groups_of_parts_keep_their_bits(pair: tuple[Plan, Plan], one: EngineConfig, two: EngineConfig) -> None:
    """A view of several groups, which takes thousands of tokens, or groups of two parts."""
    for dtype in DTYPES:
        with work_cut(GROUP=2):
            (alone,) = run(model(dtype), one, pair[:1])
            beside, _ = run(model(dtype), two, pair)
        count, differ = compare(alone, beside)
        assert count
        assert not differ


@pytest.mark.parametrize("preempt", ["swap", "recompute"])
def test_what_is_preempted_keeps_its_bits(preempt: str) -> None:
    """Keys that were computed again, from rows fed in other company, are the ones that were lost."""
    taken = 0

    @settings(COMMON, max_examples=10)
    @given(long_plans(), st.sampled_from([3, 6]), st.sampled_from([1, 7]), st.integers(0, 2))
    def law(pair: tuple[Plan, Plan], lanes: int, page_size: int, pages: int) -> None:
        nonlocal taken
        (alone,) = run(model(torch.float32), ROOMY, pair[:1])
        config = replace(ROOMY, lanes=lanes, page_size=page_size, pages=pages, preempt=preempt)  # type: ignore[arg-type]
        recorder = Recorder()
        pressed, _ = run(model(torch.float32), config, pair, policy=Bold(), recorder=recorder)
        count, differ = compare(alone, pressed)
        assert count
        assert not differ
        taken += sum(isinstance(step, SwapIn | Lose) for step in recorder.recording().steps)

    law()
    assert taken > 2


def test_with_two_threads_the_bits_do_not_depend_on_the_batch_either() -> None:
    """The sizes that agree are found for each number of threads."""
    text = LONG.replace("WIDTH", "2").replace("INNER", "stitch").replace("OUTER", "stitch")
    plan = Plan(parse_text(text), {"head": "h" * (PART + 2), "own": "o", "tail": "t"})
    found = shaped(3, 1, 64, None, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert found.decoder.fixed_shapes().num_threads == 2
        (alone,) = run(found, replace(ROOMY, lanes=1, chunk=40), [plan])
        together = run(found, replace(ROOMY, lanes=16, chunk=512), [plan] * 2)
    finally:
        torch.set_num_threads(threads)
    count, differ = compare(alone, together[0])
    assert count
    assert not differ


def test_smollm2_keeps_its_bits() -> None:
    """The real model in fp32, at the shapes that matter."""
    try:
        smollm2 = load("smollm2", template="raw")
    except PlanError as error:
        if error.code == "no-model":
            pytest.skip("needs SmolLM2: `anabranch model get smollm2`")
        raise
    text = "main = plan() { text(T); x = fork(WIDTH) { a = gen(max=4); }; y = gen('so', max=2); }"
    text = text.replace("T)", "'" + "Water boils at 100 degrees. " * 12 + "')")
    one, four = (Plan(parse_text(text.replace("WIDTH", width)), {}) for width in ("1", "4"))
    (alone,) = run(smollm2, replace(ROOMY, lanes=1, pages=200, chunk=7), [one])
    beside, wide = run(smollm2, replace(ROOMY, pages=200, chunk=512), [one, four])
    assert compare(alone, beside) == (6, 0)
    assert compare(alone, wide) == (6, 0)


# --- what it is built from


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_plain_attention(dtype: torch.dtype) -> None:
    """The state of a part is attention over its keys alone; merged states are attention over all parts."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    parts, queries, heads, dim = 3, 5, 2, 16
    q, k, v = random(heads, queries, dim), random(parts, heads, PART, dim), random(parts, heads, PART, dim)
    lengths = torch.tensor([PART, 1, 7])
    hidden = torch.arange(PART)[None, :] >= lengths[:, None]
    mask = torch.zeros(parts, 1, PART, dtype=dtype).masked_fill_(hidden[:, None], float("-inf"))
    out, lse = attend_parts(q.expand(parts, heads, queries, dim), k, v, scale=0.3, mask=mask)
    rows_ = q.transpose(0, 1)
    for part, length in enumerate(lengths.tolist()):
        visible = torch.ones(queries, length, dtype=torch.bool)
        expected = attention_torch(rows_, k[part, :, :length], v[part, :, :length], visible, scale=0.3)
        torch.testing.assert_close(out[part].transpose(0, 1), expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(lse[part].T, expected[1], rtol=0, atol=1e-5)
    weight, _ = weigh_parts(lse)
    merged = sum_parts_(out * weight[..., None]) / sum_parts_(weight.clone())[..., None]
    keys, values = (torch.cat([x[p, :, :n] for p, n in enumerate(lengths.tolist())], 1) for x in (k, v))
    visible = torch.ones(queries, keys.shape[1], dtype=torch.bool)
    expected_out, _ = attention_torch(rows_, keys, values, visible, scale=0.3)
    torch.testing.assert_close(merged.transpose(0, 1), expected_out, rtol=0, atol=1e-5)


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 2**32))
@settings(COMMON, max_examples=100)
def test_zeros_change_no_bit_of_a_sum(terms: int, zeros: int, seed: int) -> None:
    """Law of `sum_parts_`; a sum in another order would differ."""
    x = torch.randn(terms, 33, generator=torch.Generator().manual_seed(seed))
    padded = torch.cat((x, torch.zeros(zeros, 33)))
    assert torch.equal(sum_parts_(x.clone()), sum_parts_(padded))


def test_the_unit_is_exact() -> None:
    """Law of `fold_`: a group that a row has no part in leaves every bit of it, and all parts hidden weigh nothing."""
    generator = torch.Generator().manual_seed(0)
    lse = torch.randn(5, 8, generator=generator)
    lse[:, 3] = float("-inf")
    weight, high = weigh_parts(lse)
    assert not weight[:, 3].any()
    total, out = torch.rand(8, generator=generator), torch.randn(8, 16, generator=generator)
    unit = (torch.full((8,), torch.finfo(torch.float32).min), torch.zeros(8), torch.zeros(8, 16))
    state = (high.clone(), total.clone(), out.clone())
    fold_(*state, *unit)
    assert all(torch.equal(a, b) for a, b in zip(state, (high, total, out), strict=True))
    begun = tuple(x.clone() for x in unit)
    fold_(*begun, high, total, out)
    real = torch.arange(8) != 3
    assert all(torch.equal(a[real], b[real]) for a, b in zip(begun, (high, total, out), strict=True))


def test_sizes_that_disagree_are_left_out() -> None:
    """Of the sizes tried those stay that agree with the largest; if none agrees with itself the mode is refused."""
    found = torch.randn(fixed_shapes._DISTINCT, 5, generator=torch.Generator().manual_seed(0))

    def uneven(x: Tensor) -> Tensor:
        return x * 3 + (1e-3 if len(x) in (2, 12) else 0)

    assert fixed_shapes._agreeing("it", (2, 4, 8, 12, 16), found, uneven) == (4, 8, 16)

    def by_place(x: Tensor) -> Tensor:
        """In calls of more than four rows the last row is computed apart."""
        out = x * 3
        if len(x) > 4:
            out[-1] += 1e-3
        return out

    assert fixed_shapes._agreeing("it", (2, 4, 8, 12), found, by_place) == (2, 4)
    with pytest.raises(PlanError, match="it gives a row other bits beside other rows") as caught:
        fixed_shapes._agreeing("it", (2, 4, 8), found, lambda x: x + torch.arange(len(x))[:, None])
    assert caught.value.code == "not-deterministic"


def test_calls_are_made_up_of_the_sizes_that_agree() -> None:
    """No call has another number of rows or queries, and none has fewer than are needed."""
    shapes = FixedShapes((4, 8, 32), (4,), (4, 12, 32), 1)
    for count in range(1, 100):
        sizes = fixed_shapes.tiles(count, shapes.layer_rows)
        assert set(sizes) <= {4, 8, 32}
        assert count <= sum(sizes)
        assert sum(sizes) - sizes[-1] < count
        padded = shapes.pad_queries(count)
        assert padded >= count
        assert padded % 32 in (0, 4, 12)
        assert padded - count < 32
    assert fixed_shapes.tiles(41, shapes.layer_rows) == [32, 32]


def test_a_decoder_that_pads_to_one_size_still_gives_the_logits() -> None:
    """Where only one size agrees, rows are computed in calls of that size, and the logits are the same."""
    decoder = model(torch.float64).decoder
    ids = torch.arange(11)
    shapes = FixedShapes((4,), (4,), (4, 8, 32), 1)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q

    plain = decoder.forward(ids, ids, attend, ids)
    fixed = decoder.forward(ids, ids, attend, ids, shapes)
    torch.testing.assert_close(fixed, plain, rtol=0, atol=1e-12)
    for row in range(11):
        alone = decoder.forward(ids[row : row + 1], ids[:1], attend, torch.tensor([0]), shapes)
        assert torch.equal(alone[0], fixed[row])


@settings(COMMON, max_examples=50)
@given(st.integers(0, 2**32), st.integers(1, 9), st.sampled_from([5, 261, 1000]))
def test_a_draw_does_not_depend_on_the_rows_beside_it(seed: int, count: int, vocab: int) -> None:
    """Tokens and log-probabilities of rows together are those of each row alone, bit for bit."""
    numbers = np.random.default_rng(seed)
    logits = torch.from_numpy(numbers.standard_normal((count, vocab), dtype=np.float32) * 4)
    columns = {
        "temperature": torch.from_numpy(numbers.choice(np.float32([0, 0.3, 1, 3]), count)),
        "top_k": torch.from_numpy(numbers.choice([0, 3], count)),
        "top_p": torch.from_numpy(numbers.choice(np.float32([1, 0.7]), count)),
        "min_p": torch.from_numpy(numbers.choice(np.float32([0, 0.05]), count)),
        "keys": torch.from_numpy(numbers.integers(0, 2**32, (count, 2))),
        "index": torch.from_numpy(numbers.integers(0, 1000, count)),
    }
    tokens = draw(logits, **columns)
    logs = logprob(logits, tokens)
    for row in range(count):
        one = slice(row, row + 1)
        assert draw(logits[one], **{name: column[one] for name, column in columns.items()})[0] == tokens[row]
        assert torch.equal(logprob(logits[one], tokens[one])[0], logs[row])
        assert torch.equal(logprob(logits[one].double(), tokens[one])[0], logprob(logits.double(), tokens)[row])
