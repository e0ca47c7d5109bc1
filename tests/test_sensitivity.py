"""How sharp the random test model is: one fault of position, view, order or shift moves a logit that a draw reads.

The laws are tested in fp64 at 1e-9, and some runs in fp32 at `TOLERANCE`. That is only worth something if no fault
hides below it, so every fault of each kind, on a run with each kind of join, must move some compared logit by at least
100 times the looser of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import pytest
import torch
from torch import Tensor

from anabranch.dsl.parse import parse_text
from anabranch.runtime.chat import RawChat
from anabranch.runtime.dense import dense_forward
from anabranch.runtime.events import BranchEnded, BranchStarted, Event, GenEnded, Joined
from anabranch.runtime.layout import Layout
from anabranch.runtime.random_model import random_config, random_weights
from anabranch.runtime.reference import lay_out
from anabranch.runtime.tokenizer import byte_tokenizer

TOLERANCE = 1e-4
FAULT = 100 * TOLERANCE

TOKENIZER = byte_tokenizer()
CONFIG = random_config(TOKENIZER)
WEIGHTS = random_weights(CONFIG, TOKENIZER, 0)

PLAN = """
main = plan() {
  text("Go");
  x = fork() {
    a = branch("A") { u = gen(max=3); };
    b = branch("B") { v = fork(2) { w = gen(max=2); } join(all, stitch(sum)); };
  } join(all, JOIN);
  z = gen("Q", max=3);
}
"""


def _gen(path: tuple[str, ...], site: str, text: str) -> GenEnded:
    ids = tuple(TOKENIZER.encode([(text, False)]))
    return GenEnded(path, site, site, ids, len(ids), text, text, "max")


@cache
def run(join: str) -> Layout:
    """Two named branches, one of which stitches two of its own, joined by `join` and gone on from."""
    text, inner = {"a": "Akx2", "b": "Bpqrs"}, ("pq", "rs")
    events: list[Event] = [_gen(("x[a]",), "u", "kx2"), _gen((), "z", "m7!")]
    events += [_gen(("x[b]", f"v[{i}]"), "w", inner[i]) for i in range(2)]
    for path, written in ((("x[a]",), text["a"]), (("x[b]",), text["b"])):
        events += [BranchStarted(path), BranchEnded(path, "ok", written, written, "", 0)]
    for i, written in enumerate(inner):
        path = ("x[b]", f"v[{i}]")
        events += [BranchStarted(path), BranchEnded(path, "ok", written, written, "", 0)]
    winners = () if join == "drop" else (0, 1)
    events += [Joined(("x[b]",), "v", (0, 1), (0, 1), list(inner)), Joined((), "x", (0, 1), winners, text)]
    return lay_out(parse_text(PLAN.replace("JOIN", join)), None, {}, events, TOKENIZER, RawChat())


JOINS = ("drop", "text", "stitch(max)", "stitch(sum)")


class Faulty:
    """The tables of a layout, to be changed in one place."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.ids = torch.tensor([token.id for token in layout.tokens])
        self.positions = torch.tensor([token.position for token in layout.tokens])
        self.visible, self.shifts = layout.visibility()
        self.read = torch.tensor(sorted({draw.after for draw in layout.draws.values()}))

    def logits(self) -> Tensor:
        """[num_draws, vocab]: the rows that a run is compared by."""
        every = dense_forward(self.ids, self.positions, self.visible, self.shifts, CONFIG, WEIGHTS)
        return every[self.read]

    def matters(self) -> Tensor:
        """[T], bool: the tokens that some draw depends on, other than by being all there is."""
        reach = self.visible.clone()
        for _ in range(CONFIG.num_layers):
            reach = (reach.double() @ self.visible.double()) > 0
        return reach[self.read].any(0)


def moved(layout: Layout, fault: Callable[[Faulty], None]) -> float:
    """How far the fault moves the logits of the draws."""
    faulty = Faulty(layout)
    before = faulty.logits()
    fault(faulty)
    return float((faulty.logits() - before).abs().max())


def check_all(layout: Layout, faults: Mapping[str, Callable[[Faulty], None]]) -> None:
    """Each fault by itself must show; there must be some."""
    assert faults
    for name, fault in faults.items():
        assert moved(layout, fault) >= FAULT, f"{name} does not show"


def text(layout: Layout, token: int) -> str:
    return f"{TOKENIZER.decode([layout.tokens[token].id]).decode()!r} ({token})"


@pytest.mark.parametrize("join", JOINS)
def test_a_position_off_by_one_shows(join: str) -> None:
    """Any one token that a draw depends on, written one position too early or too late."""
    layout = run(join)

    def put(token: int, by: int) -> Callable[[Faulty], None]:
        def fault(faulty: Faulty) -> None:
            faulty.positions[token] += by

        return fault

    tokens = Faulty(layout).matters().nonzero().flatten().tolist()
    check_all(layout, {f"{text(layout, t)} {by:+d}": put(t, by) for t in tokens for by in (-1, 1)})


@pytest.mark.parametrize("join", JOINS)
def test_one_token_hidden_shows(join: str) -> None:
    """Any one key hidden from any one query."""
    layout = run(join)

    def hide(q: int, k: int) -> Callable[[Faulty], None]:
        def fault(faulty: Faulty) -> None:
            faulty.visible[q, k] = False

        return fault

    faulty = Faulty(layout)
    pairs = [(q, k) for q, k in faulty.visible.nonzero().tolist() if q != k and faulty.matters()[q]]
    check_all(layout, {f"{text(layout, k)} hidden from {text(layout, q)}": hide(q, k) for q, k in pairs})


@pytest.mark.parametrize("join", JOINS)
def test_one_token_added_shows(join: str) -> None:
    """Any one token of a branch shown to any one query that does not see it, such as a sibling's or a dropped one."""
    layout = run(join)

    def show(q: int, k: int) -> Callable[[Faulty], None]:
        def fault(faulty: Faulty) -> None:
            faulty.visible[q, k] = True

        return fault

    faulty = Faulty(layout)
    distance = faulty.positions[:, None] - faulty.positions[None, :]
    pairs = [(q, k) for q, k in (~faulty.visible & (distance >= 0)).nonzero().tolist() if faulty.matters()[q]]
    check_all(layout, {f"{text(layout, k)} shown to {text(layout, q)}": show(q, k) for q, k in pairs})


@pytest.mark.parametrize("join", JOINS)
def test_two_siblings_swapped_show(join: str) -> None:
    """What one branch wrote, standing where the other's should."""
    layout = run(join)
    first, second = (
        [t for t, token in enumerate(layout.tokens) if layout.segments[token.segment].path == ("x[b]", f"v[{i}]")]
        for i in range(2)
    )

    def swap(faulty: Faulty) -> None:
        faulty.ids[first + second] = faulty.ids[second + first]

    check_all(layout, {"the siblings swapped": swap})


@pytest.mark.parametrize("join", ["stitch(max)", "stitch(sum)"])
def test_a_wrong_shift_shows(join: str) -> None:
    """Any one segment of any one view, one position nearer or farther."""
    layout = run(join)

    def move(segment: int, key: int, by: int) -> Callable[[Faulty], None]:
        def fault(faulty: Faulty) -> None:
            rows = torch.tensor(layout.segments[segment].tokens)
            keys = torch.tensor(layout.segments[key].tokens)
            faulty.shifts[rows[:, None], keys] += by

        return fault

    views = [(i, key) for i, segment in enumerate(layout.segments) for key, _ in segment.view if segment.tokens]
    check_all(layout, {f"segment {k} seen from {s}, {by:+d}": move(s, k, by) for s, k in views for by in (-1, 1)})


def test_siblings_stitched_in_another_order_show() -> None:
    """Under `stitch(sum)` the order of the branches is their shifts, so exchanging those must show."""
    layout = run("stitch(sum)")
    goes_on = [segment for segment in layout.segments if segment.path == ()][-1]
    shifted = sorted({shift for _, shift in goes_on.view})
    assert len(shifted) == 3

    def exchange(faulty: Faulty) -> None:
        rows = torch.tensor(goes_on.tokens)[:, None]
        for key, shift in goes_on.view:
            if shift:
                other = shifted[1] if shift == shifted[2] else shifted[2]
                faulty.shifts[rows, torch.tensor(layout.segments[key].tokens)] = other

    check_all(layout, {"shifts exchanged": exchange})
