"""The training export: what a row holds is what the engine did and the reference says."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law_runs import COMMON, TOLERANCE, engines, model, weights
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention
from training_runs import (
    SHARED,
    STOPS,
    build,
    engine_views,
    forward,
    hold_example,
    reference_views,
    traced,
)

from anabranch.dsl.diagnostics import PlanError
from anabranch.runtime.engine import EngineConfig
from anabranch.runtime.events import GenEnded
from anabranch.runtime.packing import IGNORED, PackedRow, Packer, RowBuilder
from anabranch.runtime.reference import dense_logits
from anabranch.runtime.traces import Example, Kind, Segment, Target, example_of, layout_of
from anabranch.runtime.training import (
    PackedDataset,
    block_mask,
    collate,
    loss,
    pack,
    shifts,
    tensors_of,
    visibility,
)
from anabranch.testing import Plan, plans


def test_a_row_is_what_the_engine_did_and_the_reference_says(tmp_path: Path) -> None:
    """For any plan and engine: visibility, positions, shifts, labels and logits, with other runs in the same row."""
    held: Counter[str] = Counter()

    @settings(COMMON, max_examples=160)
    @given(
        plans(fuel=40), plans(fuel=15, max_depth=1), engines(), st.sampled_from(["ok", "ok", "all"]), st.integers(0, 99)
    )
    def law(plan: Plan, other: Plan, config: EngineConfig, statuses: Any, seed: int) -> None:
        config = replace(config, prefix_cache=False, deterministic=False)
        runs = [traced(plan, config, seed), traced(plan, config, seed + 1), traced(other, config, seed)]
        examples = [example_of(trace, model(), statuses=statuses) for _, trace, _ in runs]
        with_targets = [each for each in examples if each.targets]
        row, placed, where = build(with_targets)
        all_placed = list(placed)
        folder = tmp_path / f"{held['plans']}"
        held["plans"] += 1

        def packed(shifts: bool) -> None:
            traces = (trace for _, trace, _ in runs)
            pack(traces, folder, length=max(1, row.num_tokens), model=model(), statuses=statuses, shifts=shifts)

        if not with_targets:
            with pytest.raises(PlanError, match="nothing to train on"):
                packed(True)
            held["without targets"] += 1
            return
        shifted = any(each.has_shifts for each in examples)
        if shifted:
            with pytest.raises(PlanError, match="error\\[trace-shifts\\]"):
                packed(False)
            held["with shifts"] += 1
        packed(shifted)
        dataset = PackedDataset(folder)
        assert len(dataset) == 1
        assert dataset.manifest.shifts == shifted
        for name in PackedRow.__slots__:
            assert np.array_equal(getattr(dataset.row(0), name), getattr(row, name)), name
        batch = collate([dataset[0]])
        shutil.rmtree(folder)
        logits = forward(batch)
        for (result, trace, recording), example in zip(runs, examples, strict=True):
            if not example.targets:
                continue
            layout = layout_of(trace, model())
            views = [engine_views(recording), reference_views(layout)]
            tokens = placed.pop(0)
            held["labels"] += hold_example(batch, logits, example, tokens, where, result, views)
            forced = [target for target in example.targets if target.draw is None]
            if statuses == "all" and forced:
                expected = dense_logits(layout, model().decoder.config, weights())
                for target, source in zip(forced, layout.forced, strict=True):
                    at = where[tokens[target.segment][target.place], target.token]
                    assert (target.token, target.kind) == (source.token, source.kind)
                    assert float((logits[at] - expected[source.after]).abs().max()) <= TOLERANCE
                held["forced"] += len(forced)
        tokens_alone = sum(each.num_tokens for each in with_targets)
        held["shared"] += tokens_alone - len({row for each in all_placed for rows in each for row in rows})

    law()
    print(dict(held))
    assert held["with shifts"] >= 5, held
    assert held["forced"] >= 5, held
    assert held["labels"] >= 10 * held["plans"], held
    assert held["shared"] >= held["plans"], held


# --- what is trained


def labels_of(example: Example) -> dict[Kind, list[int]]:
    found: dict[Kind, list[int]] = {"drawn": [], "trimmed": [], "recorded": [], "scored": []}
    for target in example.targets:
        found[target.kind].append(target.token)
    return found


def test_what_a_model_wrote_is_labelled_by_its_kind() -> None:
    """Drawn, trimmed, recorded and scored tokens are each what the events hold, and each can be left out."""
    _, trace, _ = traced(Plan.parse(STOPS, {"q": "why?"}), seed=30)
    gens = {e.event.site: e for e in trace.entries if isinstance(e.event, GenEnded) and len(e.event.path) == 0}
    a = gens["a"].event
    assert isinstance(a, GenEnded)
    assert a.end == "stop" and a.drawn > len(a.ids) + 1
    example = example_of(trace, model())
    found = labels_of(example)
    encode = model().tokenizer.encode
    assert found["recorded"] == encode([("past it", False)])
    assert found["scored"] == encode([(gens["c"].event.text, False)])  # type: ignore[union-attr]
    assert tuple(found["trimmed"][: a.drawn - len(a.ids)]) == gens["a"].drawn_ids[len(a.ids) :]
    assert tuple(found["drawn"][: len(a.ids)]) == a.ids
    for kind in ("drawn", "trimmed", "recorded", "scored"):
        others: list[Kind] = [each for each in found if each != kind]
        left = labels_of(example_of(trace, model(), kinds=others))
        assert left == {**found, kind: []}


def test_only_branches_that_ended_ok_are_trained_unless_all_are_asked_for() -> None:
    """A branch that failed or was cancelled, and what stands in it, is neither in the row nor labelled by default."""
    result, trace, _ = traced(Plan.parse(STOPS, {"q": "why?"}), seed=3)
    status = {tuple(branch.path.split("/")): branch.status for branch in result.branches}
    assert Counter(status.values()) == {"failed": 2, "ok": 1, "cancelled": 1}
    ok, everything = (example_of(trace, model(), statuses=statuses) for statuses in ("ok", "all"))  # type: ignore[arg-type]

    def writers(example: Example) -> set[str]:
        return {status[t.draw[0]] for t in example.targets if t.draw is not None and t.draw[0]}

    assert writers(ok) == {"ok"}
    assert writers(everything) >= {"ok", "failed"}
    assert not {path for path in ok.paths if path and status[path] != "ok"}
    drawn = sum(e.event.drawn for e in trace.entries if isinstance(e.event, GenEnded))
    assert sum(t.draw is not None for t in everything.targets) == drawn


def test_a_branch_that_ended_ok_in_one_that_failed_is_not_trained() -> None:
    """What stands in a failed branch was for nothing, also where it ended ok itself."""
    plan = """
    p = plan() {
      a = fork(2, fallback="") {
        b = fork(2) { g = gen("k", max=3); } join(all, stitch);
        need(1 > 2);
      } join(first(1), drop);
      z = gen("k", max=3);
    }
    """
    result, trace, _ = traced(Plan.parse(plan))
    assert Counter(branch.status for branch in result.branches) == {"ok": 4, "failed": 2}
    assert {target.draw[0] for target in example_of(trace, model()).targets if target.draw} == {()}
    assert len({target.draw[0] for target in example_of(trace, model(), statuses="all").targets if target.draw}) == 5


def test_a_run_that_failed_is_trained_only_when_all_are_asked_for() -> None:
    """All that a failed run wrote stands in a thread that failed: its own."""
    _, trace, _ = traced(
        Plan.parse('p = plan() { a = fork(2) { g = gen("k", max=3); } join(all, stitch); need(1 > 2); }')
    )
    assert not example_of(trace, model()).targets
    assert example_of(trace, model(), statuses="all").targets


def test_an_end_of_turn_is_predicted_though_it_is_not_in_the_context() -> None:
    """The token that ends a turn is a label, so a model that is trained learns to end."""
    ends = 0
    for seed in range(8):
        _, trace, _ = traced(Plan.parse('p = plan() { user("hi"); a = gen(max=60); }'), seed=seed)
        [gen] = [e.event for e in trace.entries if isinstance(e.event, GenEnded)]
        example = example_of(trace, model())
        if gen.end == "end_of_turn":
            ends += 1
            assert example.targets[-1].token in model().tokenizer.eos_ids
            assert example.targets[-1].kind == "trimmed"
    assert ends >= 2


# --- sharing


def test_sharing_changes_no_loss_and_no_gradient() -> None:
    """Runs on one prompt in one row: fewer tokens, and the same summed likelihood as each run alone."""
    examples = [
        example_of(traced(Plan.parse(SHARED, {"q": "a long question"}), seed=s)[1], model()) for s in (1, 2, 2, 3)
    ]
    alone = 0.0
    for example in examples:
        row, _, _ = build([example])
        alone += float(nll(row))
    row, placed, _ = build(examples)
    assert float(nll(row)) == pytest.approx(alone, abs=1e-9)
    assert int(row.weights.sum()) == sum(len(example.targets) for example in examples)
    assert placed[1] == placed[2]
    prompt = min(len(example.segments[0].ids) for example in examples)
    assert prompt > 10
    assert all(rows[0][:prompt] == placed[0][0][:prompt] for rows in placed)
    # Three equal prompts of siblings that the parent sees stay three.
    assert len(set(placed[0])) == len(placed[0])


def nll(row: PackedRow) -> Tensor:
    """The summed negative log-likelihood of a row's labels, as `loss` weighs them."""
    batch = collate([tensors_of(row, row.num_tokens)])
    return loss(forward(batch)[None], batch) * batch["weights"].sum()


def test_rows_are_filled_first_fit_and_hold_every_run_once() -> None:
    """No row is longer than it may be, no token is lost, and at most so many rows are open."""
    examples = [
        example_of(traced(Plan.parse(SHARED, {"q": f"question {s // 3} " * (1 + s % 3)}), seed=s)[1], model())
        for s in range(12)
    ]
    packer = Packer(160, open_rows=2)
    rows = [row for example in examples for row in packer.add(example)]
    assert rows
    last = list(packer.finish())
    assert len(last) == 2
    rows += last
    assert max(row.num_tokens for row in rows) <= 160
    assert sum(int(row.weights.sum()) for row in rows) == sum(len(each.targets) for each in examples)
    tokens = sum(each.num_tokens for each in examples)
    assert sum(row.num_tokens for row in rows) == tokens - packer.num_shared + packer.num_echoes
    assert packer.num_shared > 0
    with pytest.raises(ValueError, match="do not fit a row of 20"):
        Packer(20).add(examples[0])
    with pytest.raises(ValueError, match="hold nothing"):
        Packer(0)


def test_a_run_goes_to_the_row_that_it_shares_most_with() -> None:
    """A later row that holds a run's prompt is taken before an earlier one that has room for all of it."""

    def example(*ids: int) -> Example:
        return Example((Segment((), 0, ids),), (Target(0, len(ids) - 1, 99, "drawn"),))

    packer = Packer(10)
    for each in (example(1, 2, 3, 4, 5, 6), example(7, 8, 9, 10, 11, 12), example(7, 8, 9, 10), example(1, 2, 3, 5)):
        assert packer.add(each) == []
    assert [row.ids.tolist() for row in packer.finish()] == [[1, 2, 3, 4, 5, 6, 5], [7, 8, 9, 10, 11, 12]]
    assert packer.num_shared == 4 + 3


def test_prompts_of_any_length_are_shared_as_far_as_they_agree() -> None:
    """A run whose text goes on where another's ended shares all of it, and one that differs at once nothing."""
    short, longer, other = (
        example_of(traced(Plan.parse(f'p = plan() {{ text("{text}"); g = gen(max=3); }}'))[1], model())
        for text in ("abcdefgh", "abcdefghijkl", "xbcdefgh")
    )
    builder = RowBuilder()
    builder.add(short, builder.fit(short))
    start = int(model().tokenizer.bos_id is not None)
    assert builder.fit(longer).num_shared == start + 8
    assert builder.fit(other).num_shared == start


# --- masks


NESTED = """
p = plan() {
  a = fork(3) { b = fork(2) { g = gen("so ", max=4); } join(all, stitch); h = gen("k", max=4); } join(all, stitch);
  z = gen("k", max=3);
}
"""


def batch_of_two() -> dict[str, Tensor]:
    """Two rows of different runs, the first with forks in forks, both padded."""
    runs = [traced(Plan.parse(NESTED)), traced(Plan.parse(SHARED, {"q": "hi"}))]
    return collate([tensors_of(build([example_of(trace, model())])[0], 192) for _, trace, _ in runs])


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_block_mask_is_the_visibility() -> None:
    """FlexAttention's mask lets each token see what the dense mask does, with a window too, and attends the same."""
    batch = batch_of_two()
    assert batch["spans"].shape[0] == 2
    for window in (None, 7):
        mask, dense = block_mask(batch, window=window, block_size=32), visibility(batch, window=window)
        full = create_mask(mask.mask_mod, 2, 1, 192, 192, device="cpu")
        assert torch.equal(full[:, 0], dense)
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 2, 192, 16, generator=generator, dtype=torch.float64) for _ in range(3))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense[:, None])
        with torch.no_grad():
            assert float((flex_attention(q, k, v, block_mask=mask) - attended).abs().max()) < 1e-12
    assert mask.sparsity() > 0


def test_the_padding_sees_itself_and_is_seen_by_nobody() -> None:
    """A token of the padding attends to itself alone, so that no softmax is over nothing."""
    batch = batch_of_two()
    seen = visibility(batch)
    padding = batch["segment_ids"] < 0
    assert padding.any(dim=1).all()
    for row in range(2):
        own = torch.eye(192, dtype=torch.bool)
        assert torch.equal(seen[row][padding[row]], own[padding[row]])
        assert torch.equal(seen[row][:, padding[row]], own[:, padding[row]])
    assert (batch["labels"][padding] == IGNORED).all()


def test_a_mask_refuses_shifts() -> None:
    """A batch with shifts has no block mask: position ids would tell wrong distances."""
    plan = Plan.parse(
        'p = plan() { a = fork(2) { g = gen("so ", max=4); } join(all, stitch(sum)); z = gen("k", max=3); }'
    )
    example = example_of(traced(plan)[1], model())
    assert example.has_shifts
    row, _, _ = build([example])
    batch = collate([tensors_of(row, row.num_tokens)])
    assert shifts(batch).any()
    with pytest.raises(ValueError, match="do not say shifts"):
        block_mask(batch)
