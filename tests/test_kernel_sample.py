"""The Triton kernels of the draw and of token masks in Triton's interpreter, against `draw` and `Automaton.mask`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpreter import INTERPRETED, interpreted, run_in_interpreter, starts_interpreter
from torch import Tensor

from anabranch.dsl.spec import BoolType, ChoiceType, FloatType, GenType, IntType, LinesType, RegexType
from anabranch.kernels.jit import HAS_TRITON, jit
from anabranch.kernels.sample import penalize, philox4x32
from anabranch.kernels.sample_device import (
    UNREACHED,
    automaton_mask,
    automaton_mask_torch,
    sample,
    sample_torch,
)
from anabranch.kernels.sample_device_triton import (
    SIZES,
    Sizes,
    _philox,
    automaton_mask_kernel,
    launch_automaton_mask,
    launch_sample,
)
from anabranch.runtime.automata import FAR, DfaAutomaton, LinesAutomaton, Vocabulary, tables
from anabranch.runtime.constrain import AutomatonConstraint, Constraints
from anabranch.runtime.smollm2 import packaged_gguf
from anabranch.runtime.tokenizer import Tokenizer, byte_tokenizer
from anabranch.runtime.weights import GgufFile

if HAS_TRITON:
    import triton.language as tl

VECTORS = Path(__file__).parent / "data" / "draw_vectors.json"
SENTINEL = 1234
SMALL = Sizes(block=64, search_block=128, capacity=24)
"""Many tiles, and a search that often has more candidates than it may keep."""


@starts_interpreter
def test_in_the_interpreter() -> None:
    """Every test below that needs the interpreter passes in it."""
    run_in_interpreter(__file__)


# The draw.


def options(n: int, **given: Any) -> dict[str, Any]:
    """Arguments of `sample` beside the logits: a number for all rows, or a list with one for each."""
    kinds = {
        "temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float32, "min_p": torch.float32,
        "repetition": torch.float32, "presence": torch.float32,
    }  # fmt: skip
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | given
    rng = np.random.default_rng(5)
    out: dict[str, Any] = {
        "keys": torch.from_numpy(rng.integers(0, 1 << 32, (n, 2))),
        "index": torch.arange(n) * 17,
        **dict.fromkeys(("mask", "seen", "repetition", "presence")),
    }
    for name, value in values.items():
        many = isinstance(value, list)
        out[name] = torch.tensor(value if many else [value] * n, dtype=kinds[name]) if name in kinds else value
    return out


def pack(bits: Tensor) -> Tensor:
    """bool [n, vocab] as int32 [n, ceil(vocab/32)]; the bits past the vocabulary are set, and must not matter."""
    n, vocab = bits.shape
    padded = np.ones((n, (vocab + 31) // 32 * 32), dtype=np.uint8)
    padded[:, :vocab] = bits.numpy()
    return torch.from_numpy(np.packbits(padded, axis=-1, bitorder="little").view(np.int32))


ORDER = (
    "temperature", "top_k", "top_p", "min_p", "keys", "index", "mask", "seen", "repetition", "presence",
)  # fmt: skip


def run_kernel(logits: Tensor, chosen: dict[str, Any], sizes: Sizes = SIZES) -> tuple[Tensor, Tensor]:
    """By the kernels, launched on outputs that end in a sentinel, which must survive."""
    n = len(logits)
    tokens, logprob = torch.full((n + 1,), SENTINEL), torch.full((n + 1,), float(SENTINEL))
    launch_sample(
        lambda kernel: kernel, logits, *(chosen[name] for name in ORDER), tokens[:-1], logprob[:-1], sizes=sizes
    )
    assert tokens[-1] == SENTINEL and logprob[-1] == SENTINEL
    return tokens[:-1], logprob[:-1]


def check(logits: Tensor, chosen: dict[str, Any], *sizes: Sizes) -> Tensor:
    """Token for token as `draw`; returns the tokens."""
    expected = sample_torch(logits, *(chosen[name] for name in ORDER))
    for size in sizes or (SIZES,):
        tokens, logprob = run_kernel(logits, chosen, size)
        assert tokens.tolist() == expected[0].tolist()
        torch.testing.assert_close(logprob, expected[1], rtol=0, atol=2e-6, equal_nan=True)
    return expected[0]


def rows(n: int, vocab: int, spread: float, seed: int = 0) -> Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed * 7919 + vocab)) * spread


@jit
def philox_kernel(counter_ptr, key_ptr, out_ptr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0)
    block = tl.load(counter_ptr + 2 * at + 1) + tl.arange(0, 1)
    words = _philox(tl.load(counter_ptr + 2 * at), block, tl.load(key_ptr + 2 * at), tl.load(key_ptr + 2 * at + 1))
    for lane in tl.static_range(4):
        tl.store(out_ptr + 4 * at + lane + tl.arange(0, 1), words[lane].to(tl.int64))


@interpreted
def test_philox() -> None:
    """Random123's published answer, and the definition's for other counters and keys, the largest included."""
    ends = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
    counters = torch.tensor([[a, b] for a in ends for b in ends])
    keys = torch.tensor([[b, a ^ 0x243F6A88] for a in ends for b in ends])
    keys[0] = 0
    out = torch.zeros(len(keys), 4, dtype=torch.int64)
    philox_kernel[(len(keys),)](counters, keys, out)
    assert out[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert torch.equal(out, philox4x32(torch.nn.functional.pad(counters, (0, 2)), keys))


@interpreted
def test_known_answers() -> None:
    """The vectors that every back end must reproduce."""
    cases = json.loads(VECTORS.read_text())
    for vocab in sorted({case["vocab"] for case in cases}):
        chosen = [case for case in cases if case["vocab"] == vocab]
        place = np.arange(vocab, dtype=np.int64)
        logits, allowed = [], []
        for case in chosen:
            seed, spread = case["logits_seed"], case["spread"]
            residue = (place * place * 7919 + place * (2 * seed + 1) * 613 + seed) % 65521
            row = torch.tensor([np.float32(r / 65521 * spread - 3) for r in residue.tolist()])[None]
            # The vectors' two penalties apply to different tokens, so they are applied beforehand.
            logits.append(
                penalize(
                    row,
                    repetition_penalty=torch.tensor([case["repetition_penalty"]]),
                    presence_penalty=torch.tensor([case["presence_penalty"]]),
                    seen=[torch.tensor(case["seen"])],
                    drawn=[torch.tensor(case["drawn"])],
                )
            )
            allowed.append(torch.arange(vocab) % case["mask_modulus"] == case["mask_rest"])
        given = options(
            len(chosen),
            **{name: [case[name] for case in chosen] for name in ("temperature", "top_k", "top_p", "min_p")},
            mask=pack(torch.stack(allowed)),
        )
        given["keys"] = torch.tensor([case["key"] for case in chosen])
        given["index"] = torch.tensor([case["index"] for case in chosen])
        tokens, _ = run_kernel(torch.cat(logits), given)
        assert tokens.tolist() == [case["token"] for case in chosen]


MANY: dict[str, list[Any]] = {
    "temperature": [1.0, 0.7, 0.0, 1e-6, 2.5, 1.0, 0.02, 1.0, 1.3, 1.0, 5.0, 1.0],
    "top_k": [0, 5, 0, 3, 1, 7, 9, 40, 0, 3, 0, 10**12],
    "top_p": [1.0, 1.0, 0.5, 1.0, 1.0, 0.9, 1.0, 0.5, 0.9, 0.99, 0.1, 1e-6],
    "min_p": [0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.1, 0.02, 0.0, 0.0, 0.3, 0.0],
}


@interpreted
@pytest.mark.parametrize("vocab", [1, 31, 257, 1000])
def test_all_filters(vocab: int) -> None:
    """Every filter alone and with others, with masks and penalties, on odd vocabularies; NaN past a row is not read."""
    n = len(MANY["top_k"])
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.full((n, vocab + 5), float("nan"))[:, :vocab]
    logits.copy_(rows(n, vocab, 3.0))
    some = torch.rand(n, vocab, generator=generator) < 0.6
    some[:, vocab // 2] = True
    seen = torch.rand(n, vocab, generator=generator) < 0.3
    penalties = {
        "seen": pack(seen),
        "repetition": (torch.rand(n, generator=generator) + 0.7).tolist(),
        "presence": torch.randn(n, generator=generator).tolist(),
    }
    found = check(logits, options(n, **MANY, mask=pack(some), **penalties))
    if vocab == 257:
        others: list[dict[str, Any]] = [
            {}, {"mask": pack(some)},
            {"seen": penalties["seen"], "repetition": penalties["repetition"]},
            {"seen": penalties["seen"], "presence": penalties["presence"]},
        ]  # fmt: skip
        outcomes = [check(logits, options(n, **MANY, **other)).tolist() for other in others]
        assert len({*map(tuple, outcomes), tuple(found.tolist())}) == 5
        check(logits, options(n, **MANY, mask=pack(some), **penalties), SMALL)


@interpreted
@pytest.mark.parametrize("spread", [0.0, 2.0, 400.0])
def test_a_large_vocabulary(spread: float) -> None:
    """49,152 tokens, flat and peaked; more candidates than the search keeps, as many as top-p takes in a flat row."""
    chosen = options(4, top_k=[0, 50, 0, 20000], top_p=[1.0, 0.9, 0.95, 1.0], min_p=[0.0, 0.0, 0.001, 0.0])
    check(rows(4, 49152, spread), chosen)


@interpreted
def test_ties_at_the_cuts() -> None:
    """Few distinct logits, 0 and -0 among them: top-k and top-p end within a run of equals, and keep the lowest ids."""
    n, vocab = 40, 45
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.choice(np.float32([-2, -1, -0.0, 0, 0.5, 3, -np.inf]), (n, vocab)))
    chosen = options(
        n, temperature=rng.choice([0.0, 0.5, 1.0, 3.0], n).tolist(), top_k=rng.integers(0, 50, n).tolist(),
        top_p=rng.choice([1.0, 0.9, 0.31, 0.01], n).tolist(),
        min_p=rng.choice([0.0, 0.011, 0.33, 1.0, 2.0], n).tolist(),
    )  # fmt: skip
    check(logits, chosen, SMALL)
    signed = torch.tensor([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]])
    assert check(signed, options(2, temperature=0.0)).tolist() == [1, 1]
    # Which of 40 equals are kept shows only over many draws.
    flat = torch.zeros(n, vocab)
    assert set(check(flat, options(n, top_k=2)).tolist()) == {0, 1}


@interpreted
def test_top_p_at_exact_boundaries() -> None:
    """A prefix whose share is exactly p is enough, and one below it is not; whatever p, one token is kept."""
    vocab, n = 8, 12
    flat = torch.zeros(n, vocab)
    assert set(check(flat, options(n, top_p=0.25)).tolist()) == {0, 1}
    above = float(np.nextafter(np.float32(0.25), np.float32(1)))
    assert set(check(flat, options(n, top_p=above)).tolist()) == {0, 1, 2}
    # Of the first four that top-k keeps a half.
    assert set(check(flat, options(n, top_k=4, top_p=0.5)).tolist()) == {0, 1}
    for p in (0.0, -1.0, 1e-30):
        assert set(check(flat, options(n, top_p=p)).tolist()) == {0}
    peaked = torch.tensor([[0.0, 30.0, -30.0, 30.0]]).repeat(n, 1)
    assert set(check(peaked, options(n, top_p=0.5)).tolist()) == {1}
    assert set(check(peaked, options(n, top_p=0.50001)).tolist()) == {1, 3}


@interpreted
def test_each_bit_of_mask_and_bitmap() -> None:
    """A row that allows one token draws it, and a token that alone is not penalized is drawn, at each place."""
    vocab = 35
    logits = rows(vocab, vocab, 1.0)
    one = torch.eye(vocab, dtype=torch.bool)
    for given in ({}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}, {"temperature": 0.0}):
        chosen = options(vocab, mask=pack(one), **given)
        assert run_kernel(logits, chosen, SMALL)[0].tolist() == list(range(vocab))
    penalized = options(vocab, seen=pack(~one), presence=1000.0)
    assert run_kernel(logits, penalized, SMALL)[0].tolist() == list(range(vocab))
    repeated = options(vocab, seen=pack(one), repetition=1e-4)
    assert run_kernel(logits.abs() + 0.1, repeated, SMALL)[0].tolist() == list(range(vocab))


BAD = float("nan"), float("inf")


@interpreted
def test_rows_that_draw_nothing() -> None:
    """A mask or a row that leaves nothing, NaN, +inf, and a temperature that is none: -1, and the others as ever."""
    n, vocab = 9, 70
    logits = rows(n, vocab, 2.0)
    allowed = torch.ones(n, vocab, dtype=torch.bool)
    allowed[0] = False
    logits[1] = float("-inf")
    logits[2, 69], logits[3, 5] = BAD
    # Hidden, so the draw goes on; its log-probability is that of the raw logits.
    logits[4, 3], logits[5, 6] = BAD
    allowed[4, 3] = allowed[5, 6] = False
    for given in ({}, {"top_k": 5, "top_p": 0.8}, {"temperature": [1.0] * 6 + [-1.0, *BAD]}):
        tokens = check(logits, options(n, mask=pack(allowed), **given), SIZES, SMALL)
        assert tokens[:4].tolist() == [-1] * 4 and (tokens[4:6] >= 0).all()
        assert ((tokens[6:] < 0) == ("temperature" in given)).all()
    cold = check(logits, options(n, mask=pack(allowed), temperature=0.0))
    assert cold[:4].tolist() == [-1] * 4


@interpreted
def test_a_row_depends_on_itself_alone() -> None:
    """The same tokens and bits alone, beside others, in another order and whatever the tiling."""
    n = len(MANY["top_k"])
    logits, chosen = rows(n, 700, 2.0), options(n, **MANY)
    tokens, logprob = run_kernel(logits, chosen)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))[:7]
    some = {name: None if value is None else value[order].contiguous() for name, value in chosen.items()}
    for sizes in (Sizes(128, 256, 100), Sizes(256, 512, 1)):
        found = run_kernel(logits[order], some, sizes)
        assert torch.equal(found[0], tokens[order]) and torch.equal(found[1], logprob[order])


@interpreted
def test_no_rows() -> None:
    """Nothing is launched for an empty batch."""
    assert run_kernel(torch.empty(0, 9), options(0))[0].shape == (0,)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is no matter for the operator's registration")
def test_the_draw_is_a_well_made_op() -> None:
    """opcheck finds nothing wrong, and on a CPU the op is `draw`."""
    logits = rows(4, 77, 2.0)
    chosen = options(4, top_k=5, seen=pack(logits > 1), repetition=1.2)
    arguments = (logits, *(chosen[name] for name in ORDER))
    torch.library.opcheck(torch.ops.anabranch.sample.default, arguments)
    for found, expected in zip(sample(*arguments), sample_torch(*arguments), strict=True):
        assert torch.equal(found, expected)
    assert sample(torch.empty(0, 5), *(options(0)[name] for name in ORDER))[0].shape == (0,)


def test_what_the_draw_does_not_support_is_named() -> None:
    """Wrong types, shapes, layouts and sizes are refused by name before anything runs."""
    logits = rows(2, 40, 1.0)

    def call(x: Tensor = logits, **changed: Any) -> None:
        chosen = options(2, **changed)
        sample(x, *(chosen[name] for name in ORDER))

    call()
    with pytest.raises(ValueError, match="logits are fp32"):
        call(logits.half())
    with pytest.raises(ValueError, match="contiguous in the vocabulary"):
        call(rows(40, 2, 1.0).T)
    with pytest.raises(ValueError, match="vocabulary of 0"):
        call(logits[:, :0])
    with pytest.raises(ValueError, match="temperature is"):
        call(temperature=[1.0])
    with pytest.raises(ValueError, match=r"mask is torch.int32 \[2, 2\]"):
        call(mask=torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="seen is"):
        call(seen=torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="keys is"):
        call(keys=torch.zeros(2, 2, dtype=torch.int32))


# Masks of regular types.

TYPES: dict[str, GenType] = {
    "int": IntType(),
    "float": FloatType(),
    "bool": BoolType(),
    "choice": ChoiceType(("yes", "no", "not sure", "né", "n")),
    "lines": LinesType(2, 3),
    "one line": LinesType(1, 1),
    "regex": RegexType(r"[A-Z][a-z]{2,5}(-[^0-9]+)?|#."),
    "date": RegexType(r"\d{4}-\d{2}"),
}


@pytest.fixture(scope="module", params=["bytes", "smollm2"])
def constraints(request: pytest.FixtureRequest) -> Constraints:
    if request.param == "bytes":
        return Constraints(byte_tokenizer())
    return Constraints(Tokenizer.from_gguf(GgufFile(packaged_gguf())))


def walk(automaton: DfaAutomaton | LinesAutomaton, rng: random.Random, steps: int) -> list[int]:
    """The states of a random walk, which keeps to what leads to a value."""
    state, states = automaton.start, [automaton.start]
    for _ in range(steps):
        mask = np.unpackbits(automaton.mask(state, FAR).view(np.uint8), bitorder="little")
        ends = automaton.vocabulary.eos_ids
        tokens = [token for token in mask.nonzero()[0].tolist() if token not in ends]
        if not tokens:
            break
        following = automaton.step(state, rng.choice(tokens))
        assert following is not None
        state = following
        states.append(state)
    return states


def ends_of(vocabulary: Vocabulary) -> Tensor:
    return torch.tensor(sorted(vocabulary.eos_ids), dtype=torch.int64)


def automaton_of(constraints: Constraints, name: str, held: bool) -> DfaAutomaton | LinesAutomaton:
    constraint = constraints.start(TYPES[name], held_space=held)
    assert isinstance(constraint, AutomatonConstraint)
    assert isinstance(constraint.automaton, DfaAutomaton | LinesAutomaton)
    return constraint.automaton


@pytest.mark.skipif(INTERPRETED, reason="the definition needs no interpreter")
@pytest.mark.parametrize("held", [False, True], ids=["", "held space"])
@pytest.mark.parametrize("name", TYPES)
def test_masks_over_tables_are_the_automatons(constraints: Constraints, name: str, held: bool) -> None:
    """Along random walks and for every small budget; nothing left, and any budget, included."""
    automaton = automaton_of(constraints, name, held)
    dense = tables(automaton)
    rng = random.Random(name)
    states = sorted({state for _ in range(6) for state in walk(automaton, rng, 6)})
    lefts = [-1, 0, 1, 2, 3, 4, 5, 6, 9, 10**6, FAR, 2**31 - 1]
    pairs = [(state, left) for state in states for left in lefts]
    state, left = (torch.tensor(column, dtype=torch.int32) for column in zip(*pairs, strict=True))
    found = automaton_mask(
        torch.from_numpy(dense.next_state), torch.from_numpy(dense.distance), torch.from_numpy(dense.accepting),
        state, left, ends_of(automaton.vocabulary),
    )  # fmt: skip
    for words, pair in zip(found, pairs, strict=True):
        assert np.array_equal(words.numpy(), automaton.mask(*pair)), pair
    assert UNREACHED == FAR


def random_tables(states: int, vocab: int, n: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    distance = draw(0, 6, states)
    distance[0] = UNREACHED
    ends = torch.tensor([vocab - 1, vocab // 2, vocab // 2], dtype=torch.int64)
    return (
        draw(-2, states, states, vocab).clamp_(min=-1), distance, draw(0, 2, states) > 0, draw(-1, states, n),
        draw(-1, 9, n), ends,
    )  # fmt: skip


def run_mask(arguments: tuple[Tensor, ...]) -> Tensor:
    n, vocab = len(arguments[3]), arguments[0].shape[1]
    words = (vocab + 31) // 32
    out = torch.full((n + 1, words), SENTINEL, dtype=torch.int32)
    launch_automaton_mask(automaton_mask_kernel, *arguments, mask=out[:-1])
    assert (out[-1] == SENTINEL).all()
    return out[:-1]


@interpreted
@pytest.mark.parametrize(("states", "vocab", "n"), [(1, 1, 3), (5, 31, 7), (9, 33, 20), (40, 1030, 20), (3, 64, 0)])
def test_the_mask_kernel(states: int, vocab: int, n: int) -> None:
    """Words and bits past the last token are 0, rows without a type allow everything, repeated ends count once."""
    arguments = random_tables(states, vocab, n, vocab)
    found = run_mask(arguments)
    assert torch.equal(found, automaton_mask_torch(*arguments))
    if n > 5:
        assert len(found.unique(dim=0)) > 3
    no_ends = (*arguments[:5], arguments[5][:0])
    assert torch.equal(run_mask(no_ends), automaton_mask_torch(*no_ends))


@interpreted
def test_each_entry_of_the_table_shows() -> None:
    """One allowed move at a time sets one bit, and the largest budget does not reach what cannot be reached."""
    vocab = 70
    arguments = list(random_tables(vocab, vocab, vocab, 1))
    arguments[0] = torch.where(torch.eye(vocab, dtype=torch.bool), 1, -1).to(torch.int32)
    arguments[2] = torch.zeros(vocab, dtype=torch.bool)
    arguments[3] = torch.arange(vocab, dtype=torch.int32)
    arguments[4] = torch.full((vocab,), 2**31 - 1, dtype=torch.int32)
    bits = np.unpackbits(run_mask(tuple(arguments)).numpy().view(np.uint8), axis=-1, bitorder="little")
    assert np.array_equal(bits[:, :vocab], np.eye(vocab)) and not bits[:, vocab:].any()
    arguments[1] = torch.full((vocab,), UNREACHED, dtype=torch.int32)
    assert (run_mask(tuple(arguments)) == 0).all()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is no matter for the operator's registration")
def test_the_mask_is_a_well_made_op() -> None:
    """opcheck finds nothing wrong, and wrong tables are refused by name."""
    arguments = random_tables(4, 77, 6, 0)
    torch.library.opcheck(torch.ops.anabranch.automaton_mask.default, arguments)
    assert torch.equal(automaton_mask(*arguments), automaton_mask_torch(*arguments))
    next_state, distance, accepting, state, left, ends = arguments
    with pytest.raises(ValueError, match="next_state is"):
        automaton_mask(next_state.long(), distance, accepting, state, left, ends)
    with pytest.raises(ValueError, match="distance is"):
        automaton_mask(next_state, distance[1:], accepting, state, left, ends)
    with pytest.raises(ValueError, match="accepting is"):
        automaton_mask(next_state, distance, accepting.int(), state, left, ends)
    with pytest.raises(ValueError, match="left is"):
        automaton_mask(next_state, distance, accepting, state, left[1:], ends)
    with pytest.raises(ValueError, match="has a state"):
        automaton_mask(next_state[:0], distance[:0], accepting[:0], state, left, ends)
