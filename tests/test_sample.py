"""The draw: against a slow one in Python's own integers, and in any company."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.kernels import sample
from anabranch.kernels.sample import NothingAllowed, draw, gumbel, logprob, philox4x32, unpack_mask
from anabranch.runtime.sampler import draw_key

VECTORS = Path(__file__).parent / "data" / "draw_vectors.json"
U32 = 0xFFFFFFFF


# --- the slow draw: nothing of `kernels/sample.py` is used


def slow_philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & U32, (p0 >> 32) ^ c3 ^ k1, p0 & U32
        k0, k1 = (k0 + 0x9E3779B9) & U32, (k1 + 0xBB67AE85) & U32
    return c0, c1, c2, c3


def slow_noise(key: tuple[int, int], index: int, token: int) -> np.float32:
    x = slow_philox((index, token // 4, 0, 0), key)[token % 4]
    u = max(x >> 8, 1) * 2.0**-24
    return -np.float32(math.log(-np.float32(math.log(u))))


def slow_draw(logits: list[np.float32], case: dict[str, Any]) -> tuple[int, float]:
    """(token, margin): how far the nearest other outcome is, in the fp32 quantities that decide."""
    values = list(logits)
    for token in set(case["seen"]):
        penalty = np.float32(case["repetition_penalty"])
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token in set(case["drawn"]):
        values[token] = values[token] - np.float32(case["presence_penalty"])
    allowed = [t for t in range(len(values)) if t % case["mask_modulus"] == case["mask_rest"]]
    temperature = np.float32(case["temperature"])
    if temperature == 0:
        order = sorted(allowed, key=lambda t: (-values[t], t))
        return order[0], float(values[order[0]] - values[order[1]]) if len(order) > 1 else math.inf
    z = {t: values[t] / temperature for t in allowed}
    order = sorted(allowed, key=lambda t: (-z[t], t))
    top = z[order[0]]
    margin = math.inf
    if case["top_k"]:
        order = order[: case["top_k"]]
    if case["top_p"] < 1:
        shares = [math.exp(float(z[t] - top)) for t in order]
        goal = float(np.float32(case["top_p"])) * math.fsum(shares)
        total, kept = 0.0, 0
        for share in shares:
            margin = min(margin, abs(total - goal) / goal)
            total += share
            kept += 1
            if total >= goal:
                margin = min(margin, (total - goal) / goal)
                break
        order = order[:kept]
    if case["min_p"] > 0:
        least = math.log(float(np.float32(case["min_p"])))
        margin = min(margin, min(abs(float(z[t] - top) - least) for t in order))
        order = [t for t in order if float(z[t] - top) >= least]
    key = tuple(case["key"])
    scores = sorted(((float(z[t] + slow_noise(key, case["index"], t)), -t) for t in order), reverse=True)
    if len(scores) > 1:
        margin = min(margin, scores[0][0] - scores[1][0])
    return -scores[0][1], margin


def vector_logits(vocab: int, seed: int, spread: float) -> list[np.float32]:
    """A fixed sequence that any language can make: residues of a square, spread evenly."""
    return [
        np.float32(((i * i * 7919 + i * (2 * seed + 1) * 613 + seed) % 65521) / 65521 * spread - 3)
        for i in range(vocab)
    ]


def make_vectors() -> list[dict[str, Any]]:
    """Cases whose outcome no rounding can turn."""
    settings_ = product(
        (0.0, 0.7, 1.0, 2.5),
        ((0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (40, 0.9, 0.02), (3, 0.5, 0.3)),
        ((1, 0), (3, 1)),
        ((1.0, 0.0), (1.3, 0.6)),
    )
    out = []
    for number, (temperature, (top_k, top_p, min_p), (modulus, rest), (repetition, presence)) in enumerate(settings_):
        low, high = draw_key(number, number % 3, (f"fork0[{number}]",))
        case: dict[str, Any] = {
            "vocab": (6, 130, 517)[number % 3],
            "logits_seed": number,
            "spread": (4.0, 12.0)[number % 2],
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "mask_modulus": modulus,
            "mask_rest": rest,
            "repetition_penalty": repetition,
            "presence_penalty": presence,
            "seen": [1, 4, 5, 5],
            "drawn": [0, 4],
            "key": [low, high],
            "index": number * 1000,
        }
        case["token"], margin = slow_draw(vector_logits(case["vocab"], number, case["spread"]), case)
        if margin > 1e-4:
            out.append(case)
    return out


def draw_case(case: dict[str, Any]) -> int:
    vocab = case["vocab"]
    logits = torch.tensor(np.array([vector_logits(vocab, case["logits_seed"], case["spread"])]))
    return int(
        draw(
            logits,
            temperature=torch.tensor([case["temperature"]]),
            top_k=torch.tensor([case["top_k"]]),
            top_p=torch.tensor([case["top_p"]]),
            min_p=torch.tensor([case["min_p"]]),
            keys=torch.tensor([case["key"]]),
            index=torch.tensor([case["index"]]),
            mask=(torch.arange(vocab) % case["mask_modulus"] == case["mask_rest"])[None],
            repetition_penalty=torch.tensor([case["repetition_penalty"]]),
            presence_penalty=torch.tensor([case["presence_penalty"]]),
            seen=[torch.tensor(case["seen"])],
            drawn=[torch.tensor(case["drawn"])],
        )
    )


# --- known answers


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((U32,) * 4, (U32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    """Random123's published vectors."""
    assert tuple(philox4x32(torch.tensor(counter), torch.tensor(key)).tolist()) == words


def test_draw_key_known_answers() -> None:
    """The key is the first 8 bytes of BLAKE2b over the seed, the input's number and the path, each after U+001F."""
    # printf '7\x1f0\x1f' | b2sum, and '7\x1f0\x1fa[0]\x1fb[1]': the first 8 bytes, little-endian words.
    assert draw_key(7, 0, ()) == (0xFA6BAA7D, 0xF0AC5AF8)
    assert draw_key(7, 0, ("a[0]", "b[1]")) == (0x7F205E1A, 0xDDF187A5)
    assert draw_key(7, 0, ("a[0]", "b[1]")) != draw_key(7, 0, ("a[0]b[1]",))
    assert draw_key(7, 1, ()) != draw_key(71, 0, ())


def test_the_largest_and_smallest_noise() -> None:
    """u of 24 bits is never 0 or 1, and no noise is above the bound that prunes."""
    ends = gumbel(torch.tensor([U32, 0, 255]))
    assert ends[0] < sample.MAX_NOISE < ends[0] + 1e-3
    assert ends[1] == ends[2] == pytest.approx(-math.log(24 * math.log(2)), abs=1e-6)


def test_vectors_are_the_slow_draw() -> None:
    """The file holds what the slow draw gives."""
    assert json.loads(VECTORS.read_text()) == make_vectors()


@pytest.mark.parametrize("case", json.loads(VECTORS.read_text()), ids=lambda case: str(case["logits_seed"]))
def test_draw_known_answers(case: dict[str, Any]) -> None:
    """One set of vectors for every back end."""
    assert draw_case(case) == case["token"]


# --- properties


def options(n: int, **given_: Any) -> dict[str, Tensor]:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | given_
    rng = np.random.default_rng(5)
    return {
        **{k: torch.full((n,), v) for k, v in values.items()},
        "keys": torch.from_numpy(rng.integers(0, 1 << 32, (n, 2))),
        "index": torch.arange(n) * 17,
    }


def full_draw(logits: Tensor, chosen: dict[str, Tensor]) -> Tensor:
    """The unfiltered draw with every token's noise computed."""
    n, vocab = logits.shape
    out = []
    for row in range(n):
        counter = torch.zeros(((vocab + 3) // 4, 4), dtype=torch.int64)
        counter[:, 0] = chosen["index"][row]
        counter[:, 1] = torch.arange(len(counter))
        bits = philox4x32(counter, chosen["keys"][row].expand(len(counter), 2)).reshape(-1)[:vocab]
        out.append((logits[row] / chosen["temperature"][row] + gumbel(bits)).argmax())
    return torch.stack(out)


@pytest.mark.parametrize("vocab", [1, 2, 127, 1029, 49152])
@pytest.mark.parametrize(("spread", "temperature"), [(0.0, 1.0), (0.5, 1.0), (6.0, 1.0), (6.0, 0.01), (400.0, 3.0)])
def test_pruning_is_exact(vocab: int, spread: float, temperature: float) -> None:
    """Computing only the noise that can win draws the same tokens as computing all of it."""
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab)) * spread
    chosen = options(6, temperature=temperature)
    assert torch.equal(draw(logits, **chosen), full_draw(logits, chosen))


def test_a_masked_tail_is_drawn_from() -> None:
    """A token past the last whole group can be all that is allowed."""
    logits = torch.zeros(2, 5 * 128 * 8 + 3)
    mask = torch.zeros_like(logits, dtype=torch.bool)
    mask[0, -1] = mask[1, 7] = True
    assert draw(logits, **options(2), mask=mask).tolist() == [logits.shape[1] - 1, 7]


SETTINGS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.7, "min_p": 0.01},
]


def test_batch_mates_do_not_matter() -> None:
    """A row's token is the same alone, beside others, and in any order."""
    n, vocab = 24, 3001
    logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(1)) * 3
    chosen = options(n)
    for row in range(n):
        for name, value in SETTINGS[row % len(SETTINGS)].items():
            chosen[name][row] = value
    together = draw(logits, **chosen)
    alone = torch.cat([draw(logits[i : i + 1], **{k: v[i : i + 1] for k, v in chosen.items()}) for i in range(n)])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2))[: n // 2]
    some = draw(logits[order], **{k: v[order] for k, v in chosen.items()})
    assert torch.equal(together, alone)
    assert torch.equal(together[order], some)
    assert torch.equal(logprob(logits, together)[order], logprob(logits[order], some))


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_filters_equal_the_slow_draw(data: st.DataObject) -> None:
    """Any options, few distinct logits, so that ties at the cuts are common."""
    vocab = data.draw(st.integers(1, 40))
    logits = data.draw(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0]), min_size=vocab, max_size=vocab))
    case: dict[str, Any] = {
        "temperature": data.draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
        "top_k": data.draw(st.integers(0, 45)),
        "top_p": data.draw(st.sampled_from([1.0, 0.9, 0.31, 0.01])),
        "min_p": data.draw(st.sampled_from([0.0, 0.011, 0.33, 1.0])),
        "mask_modulus": 1,
        "mask_rest": 0,
        "seen": [],
        "drawn": [],
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "key": [data.draw(st.integers(0, U32)), data.draw(st.integers(0, U32))],
        "index": data.draw(st.integers(0, 1 << 20)),
    }
    token, margin = slow_draw([np.float32(v) for v in logits], case)
    names = ("temperature", "top_k", "top_p", "min_p", "index")
    drawn = draw(
        torch.tensor([logits]), keys=torch.tensor([case["key"]]), **{k: torch.tensor([case[k]]) for k in names}
    )
    # Exact ties are decided by the lowest id; only what rounding could turn is left out.
    if margin == 0 or margin > 1e-6 or case["temperature"] == 0:
        assert int(drawn) == token


def test_ties_go_to_the_lowest_id() -> None:
    """At temperature 0, and at the edge of top-k."""
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert draw(logits, **options(1, temperature=0.0)).tolist() == [1]
    drawn = {int(draw(logits, **(options(1, top_k=2) | {"index": torch.tensor([i])}))) for i in range(60)}
    assert drawn == {1, 2}


def test_draws_follow_the_distribution() -> None:
    """20,000 draws are within 5 standard deviations of the probabilities, for each token."""
    n = 20_000
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5]).expand(n, 5)
    chosen = options(n) | {"keys": torch.tensor([[3, 4]]).expand(n, 2), "index": torch.arange(n)}
    counts = draw(logits, **chosen).bincount(minlength=5)
    p = logits[0].softmax(-1)
    assert ((counts - n * p).abs() < 5 * (n * p * (1 - p)).sqrt()).all()


def test_penalties_touch_only_their_rows_and_tokens() -> None:
    """Repetition divides a positive logit and multiplies a negative one; presence subtracts once."""
    logits = torch.tensor([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
    before = logits.clone()
    out = sample.penalize(
        logits,
        repetition_penalty=torch.tensor([2.0, 1.0]),
        presence_penalty=torch.tensor([0.0, 0.5]),
        seen=[torch.tensor([0, 1, 1]), torch.tensor([0])],
        drawn=[torch.tensor([0]), torch.tensor([2, 2])],
    )
    assert out.tolist() == [[1.0, -4.0, 1.0], [2.0, -2.0, 0.5]]
    assert torch.equal(logits, before)
    assert sample.penalize(logits) is logits


def test_packed_and_bool_masks_agree() -> None:
    """Token i is bit i % 32 of word i // 32, also where the vocabulary is no multiple of 32."""
    vocab = 77
    allowed = torch.rand(3, vocab, generator=torch.Generator().manual_seed(4)) < 0.3
    packed = torch.zeros(3, 3, dtype=torch.int64)
    for row, token in allowed.nonzero().tolist():
        packed[row, token // 32] |= 1 << token % 32
    words = torch.from_numpy(packed.numpy().astype(np.uint32).view(np.int32))
    assert torch.equal(unpack_mask(words, vocab), allowed)
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(5))
    drawn = draw(logits, **options(3), mask=words)
    assert torch.equal(drawn, draw(logits, **options(3), mask=allowed))
    assert allowed[range(3), drawn].all()


def test_a_mask_that_allows_nothing_is_told_by_row() -> None:
    """The rows are named, so that their branches fail and the others go on."""
    mask = torch.tensor([[True, False], [False, False], [False, False]])
    with pytest.raises(NothingAllowed) as raised:
        draw(torch.zeros(3, 2), **options(3), mask=mask)
    assert raised.value.rows == (1, 2)


def test_wrong_arguments_are_refused() -> None:
    """NaN and infinite logits, a mask of another shape, other dtypes, temperatures that are none."""
    good = torch.zeros(1, 4)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            draw(good.index_fill(1, torch.tensor([2]), bad), **options(1))
    for temperature in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            draw(good, **options(1, temperature=temperature))
    with pytest.raises(ValueError, match="mask"):
        draw(good, **options(1), mask=torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(TypeError, match="float32"):
        draw(good.double(), **options(1))
    assert draw(torch.zeros(0, 4), **options(0)).shape == (0,)


def test_log_probabilities() -> None:
    """Natural logarithm, unmasked."""
    logits = torch.randn(5, 333, generator=torch.Generator().manual_seed(6)) * 4
    exact = logits.double().log_softmax(-1)
    tokens = torch.tensor([3, 0, 1, 2, 332])
    assert torch.allclose(logprob(logits, tokens).double(), exact[range(5), tokens], atol=2e-6)
