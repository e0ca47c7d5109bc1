"""The Triton kernels behind `sample` and `automaton_mask`.

    peaks    of each (row, tile): the highest logit / T, its lowest token, and the highest raw logit
    rungs    of each (row, tile) with top-k or top-p: count and mass of what is within 4, 8, 16, 32 of the highest
    cuts     of each row: the last token, in the draw's order, that top-k and top-p keep; min-p's bound; a score to beat
    scores   of each (row, tile): the best logit / T + noise, and the mass of the raw logits
    finish   of each row: its token and log-probability

A mass is a sum of exp(x - highest), each as an integer of 2^-42, so that no order of additions matters. Logits are
ordered as int32 keys, and (key, token) as one int64 of which the maximum is the draw's first.
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anabranch.kernels.jit import HAS_TRITON, jit, power_of_two
from anabranch.kernels.sample import COLDEST, MAX_NOISE
from anabranch.kernels.sample_device import UNREACHED
from anabranch.kernels.shipped import Config

if HAS_TRITON:
    import triton.language as tl

    LOWEST = tl.constexpr(-2139095041)  # the key of -inf
    HIGHEST = tl.constexpr(0x7F800000)  # the key of inf
    COLD = tl.constexpr(COLDEST)
    MOST_NOISE = tl.constexpr(MAX_NOISE)
    NEVER = tl.constexpr(-(2**63))  # below every (key, token)

# Chosen by ahead-of-time builds for sm_80, sm_90, sm_100 and gfx942 so that nothing spills to memory. Not timed.
BLOCK = 2048
NUM_WARPS = 4
SEARCH_BLOCK = 4096
SEARCH_WARPS = 16  # few programs, one a row: each needs many loads under way
CAPACITY = 16384  # candidates kept for the search, 8 bytes each; where there are more, logits are read again
MASK_WORDS = 32  # words of a mask that a program packs: 1,024 tokens
MASK_WARPS = 4
NUM_STAGES = 1
RUNGS = 5  # 4, 8, 16, 32 and no bound
ROW_FIELDS = 4  # mode, last key, last token of that key, likeliest token
ROW_BOUNDS = 3  # score to beat, min-p's bound, highest raw logit


# Numbers.


@jit
def _key(x):
    """fp32 as int32 in the same order: 0 and -0 alike, NaN above all."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@jit
def _value(key):
    """What `_key` was made of, but for the sign of 0."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _first(key, token):
    """(key, token) as one int64 that is higher for a higher key, then for a lower token; any of them is above -2^63."""
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@jit
def _share(x, top):
    """exp(x - top) as a whole number of 2^-42, x at most top; 0 where either is NaN or top is infinite."""
    share = tl.exp(x - top) * 4398046511104.0
    return tl.where(share >= 0.0, share, 0.0).to(tl.int64)


@jit
def _at_least(part, whole):
    """The least whole number, 1 or more, that is not below `part` of `whole`."""
    exact = part.to(tl.float64) * whole.to(tl.float64)
    floor = exact.to(tl.int64)
    return tl.maximum(tl.where(floor.to(tl.float64) < exact, floor + 1, floor), 1)


@jit
def _philox(c0, c1, key0, key1):
    """Ten rounds of Philox4x32 from the counter (c0, c1, 0, 0): four words of uint32, held in uint64; keys in int64."""
    c0 = c0.to(tl.uint64)
    c1 = c1.to(tl.uint64)
    c2 = c1 ^ c1
    c3 = c2
    low = 0xFFFFFFFF
    for turn in tl.static_range(10):
        k0 = ((key0 + turn * 0x9E3779B9) & low).to(tl.uint64)
        k1 = ((key1 + turn * 0xBB67AE85) & low).to(tl.uint64)
        # 32-bit factors, so that each product is one wide multiplication.
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0 = (p1 >> 32) ^ c1 ^ k0
        c2 = (p0 >> 32) ^ c3 ^ k1
        c1 = p1 & low
        c3 = p0 & low
    return c0, c1, c2, c3


@jit
def _top24(word):
    """The bits of a word that make u, as int32."""
    return (word >> 8).to(tl.int32)


@jit
def _gumbel(top24):
    """-log(-log(u)), each logarithm in fp64 and rounded to fp32."""
    u = tl.maximum(top24, 1).to(tl.float64) * 5.9604644775390625e-08
    inner = tl.log(u).to(tl.float32)
    return -(tl.log(-inner.to(tl.float64)).to(tl.float32))


@jit
def _bit(words_ptr, token, ok):
    """Bit `token` of a row's bitmap."""
    return ((tl.load(words_ptr + token // 32, mask=ok, other=0) >> (token % 32)) & 1) != 0


@jit
def _divisor(temperature):
    return tl.where(temperature < COLD, 1.0, temperature)


@jit
def _scaled(
    raw, token, ok, divisor, repetition, presence, mask_ptr, seen_ptr,
    MASKED: tl.constexpr, REPEATS: tl.constexpr, PRESENT: tl.constexpr,
):  # fmt: skip
    """Logit / T after penalties, -inf where the row's mask hides the token."""
    z = raw
    if REPEATS or PRESENT:
        seen = _bit(seen_ptr, token, ok)
        if REPEATS:
            z = tl.where(seen, tl.where(z > 0.0, tl.div_rn(z, repetition), z * repetition), z)
        if PRESENT:
            z = tl.where(seen, z - presence, z)
    if MASKED:
        z = tl.where(_bit(mask_ptr, token, ok), z, float("-inf"))
    # Rounded as the definition's division is; `/` may be off by two units in the last place.
    return tl.div_rn(z, divisor)


# Over (row, tile).


@jit
def peaks_kernel(
    logits_ptr, logits_stride, vocab, temperature_ptr, mask_ptr, seen_ptr, repetition_ptr, presence_ptr, words,
    peaks_ptr, raw_peaks_ptr,
    MASKED: tl.constexpr, REPEATS: tl.constexpr, PRESENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first of each tile in the draw's order, and the key of its highest raw logit."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    token = tile * BLOCK + tl.arange(0, BLOCK)
    ok = token < vocab
    raw = tl.load(logits_ptr + row * logits_stride + token, mask=ok, other=float("-inf"))
    z = _scaled(
        raw, token, ok, _divisor(tl.load(temperature_ptr + row)),
        tl.load(repetition_ptr + row), tl.load(presence_ptr + row), mask_ptr + row * words, seen_ptr + row * words,
        MASKED, REPEATS, PRESENT,
    )  # fmt: skip
    at = row * tl.num_programs(1) + tile
    tl.store(peaks_ptr + at, tl.max(_first(_key(z), token), 0))
    tl.store(raw_peaks_ptr + at, tl.max(_key(raw), 0))


@jit
def rungs_kernel(
    logits_ptr, logits_stride, vocab, temperature_ptr, mask_ptr, seen_ptr, repetition_ptr, presence_ptr, words,
    top_k_ptr, top_p_ptr, peaks_ptr, rungs_ptr,
    MASKED: tl.constexpr, REPEATS: tl.constexpr, PRESENT: tl.constexpr, RUNGS: tl.constexpr,
    BLOCK_TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For a row with top-k or top-p: how many of a tile's tokens each rung holds, and their mass."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    tiles = tl.num_programs(1)
    top_k = tl.load(top_k_ptr + row)
    if ((top_k > 0) & (top_k < vocab)) | (tl.load(top_p_ptr + row) < 1.0):
        each = tl.arange(0, BLOCK_TILES)
        first = tl.max(tl.load(peaks_ptr + row * tiles + each, mask=each < tiles, other=NEVER), 0)
        top = _value((first >> 32).to(tl.int32))
        token = tile * BLOCK + tl.arange(0, BLOCK)
        ok = token < vocab
        raw = tl.load(logits_ptr + row * logits_stride + token, mask=ok, other=float("-inf"))
        z = _scaled(
            raw, token, ok, _divisor(tl.load(temperature_ptr + row)),
            tl.load(repetition_ptr + row), tl.load(presence_ptr + row), mask_ptr + row * words, seen_ptr + row * words,
            MASKED, REPEATS, PRESENT,
        )  # fmt: skip
        share = _share(z, top)
        out = rungs_ptr + row * (2 * RUNGS) * tiles + tile
        for rung in tl.static_range(RUNGS):
            within = z > float("-inf")
            if rung < RUNGS - 1:
                within = z >= top - 4.0 * 2**rung
            tl.store(out + 2 * rung * tiles, tl.sum(within.to(tl.int64), 0))
            tl.store(out + (2 * rung + 1) * tiles, tl.sum(tl.where(within, share, 0), 0))


@jit
def scores_kernel(
    logits_ptr, logits_stride, vocab, temperature_ptr, mask_ptr, seen_ptr, repetition_ptr, presence_ptr, words,
    keys_ptr, index_ptr, rows_ptr, bounds_ptr, scores_ptr, masses_ptr,
    MASKED: tl.constexpr, REPEATS: tl.constexpr, PRESENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The best logit / T + noise of the kept tokens of a tile, where one may win; and the mass of its raw logits.

    A token can win only if its 24 bits are high enough for its distance from the score to beat: since 1 - u <= -log(u),
    only if 1 - u <= exp(z - beat). So a tile whose tokens are all too low takes no random numbers, and one in which
    none is lucky no logarithms.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    token = tile * BLOCK + tl.arange(0, BLOCK)
    ok = token < vocab
    raw = tl.load(logits_ptr + row * logits_stride + token, mask=ok, other=float("-inf"))
    at = row * tl.num_programs(1) + tile
    tl.store(masses_ptr + at, tl.sum(_share(raw, tl.load(bounds_ptr + row * 3 + 2)), 0))
    best = tl.full([], NEVER, tl.int64)
    if tl.load(rows_ptr + row * 4) == 2:
        last_key = tl.load(rows_ptr + row * 4 + 1).to(tl.int32)
        last_token = tl.load(rows_ptr + row * 4 + 2)
        beat = tl.load(bounds_ptr + row * 3)
        # The sum z + noise is rounded relative to its size, which a low temperature makes large.
        beat -= 1e-3 + 1e-6 * tl.abs(beat)
        z = _scaled(
            raw, token, ok, _divisor(tl.load(temperature_ptr + row)),
            tl.load(repetition_ptr + row), tl.load(presence_ptr + row), mask_ptr + row * words, seen_ptr + row * words,
            MASKED, REPEATS, PRESENT,
        )  # fmt: skip
        key = _key(z)
        kept = (key > last_key) | ((key == last_key) & (token <= last_token))
        kept = kept & (z >= tl.load(bounds_ptr + row * 3 + 1)) & (z >= beat - MOST_NOISE)
        if tl.max(kept.to(tl.int32), 0) > 0:
            counter = tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
            w0, w1, w2, w3 = _philox(
                tl.load(index_ptr + row), counter, tl.load(keys_ptr + 2 * row), tl.load(keys_ptr + 2 * row + 1)
            )
            # The four words of a counter stand side by side, as the four tokens do that one thread loads.
            top24 = tl.join(tl.join(_top24(w0), _top24(w2)), tl.join(_top24(w1), _top24(w3))).reshape(BLOCK)
            missing = (16777216 - top24).to(tl.float32)
            kept = kept & (missing <= tl.exp(z - beat) * 16778893.0 + 2.0)
            if tl.max(kept.to(tl.int32), 0) > 0:
                found = _first(_key(z + _gumbel(top24)), token)
                best = tl.max(tl.where(kept, found, NEVER), 0)
    tl.store(scores_ptr + at, best)


# Over rows.


@jit
def _candidates(
    begin, size, compact, candidates_ptr, CAPACITY: tl.constexpr,
    logits_ptr, divisor, repetition, presence, mask_ptr, seen_ptr,
    MASKED: tl.constexpr, REPEATS: tl.constexpr, PRESENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys and tokens, which ascend, of `BLOCK` candidates from `begin` on; the key of -inf past the end."""
    at = begin + tl.arange(0, BLOCK)
    ok = at < size
    if compact:
        key = tl.load(candidates_ptr + at, mask=ok, other=LOWEST)
        token = tl.load(candidates_ptr + CAPACITY + at, mask=ok, other=0)
    else:
        raw = tl.load(logits_ptr + at, mask=ok, other=float("-inf"))
        key = _key(
            _scaled(raw, at, ok, divisor, repetition, presence, mask_ptr, seen_ptr, MASKED, REPEATS, PRESENT)
        )  # fmt: skip
        token = at
    return key, token


@jit
def _cut(
    goal, by_mass, top_key, kept_key, kept_token,
    size, compact, candidates_ptr, CAPACITY: tl.constexpr,
    logits_ptr, divisor, repetition, presence, mask_ptr, seen_ptr,
    MASKED: tl.constexpr, REPEATS: tl.constexpr, PRESENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The shortest prefix of the draw's order whose mass (or count) is at least `goal`, as its last key and the last
    token of that key, and its mass; all that was kept, where that is less.

    goal: at least 1
    kept_key, kept_token: the candidates that count end so
    """
    top = _value(top_key)
    low = tl.full([], LOWEST, tl.int64)
    high = top_key.to(tl.int64) + 1
    # At least the goal is from `low` on, or all of it is too little; less is from `high` on. Each step moves a bound to
    # the next key that there is, so it takes about log2 of the candidates and not of the keys.
    while high - low > 1:
        middle = low + (high - low) // 2
        weight = tl.full([], 0, tl.int64)
        next_above = top_key
        next_below = tl.full([], LOWEST, tl.int32)
        for begin in range(0, size, BLOCK):
            key, token = _candidates(
                begin, size, compact, candidates_ptr, CAPACITY, logits_ptr, divisor, repetition, presence, mask_ptr,
                seen_ptr, MASKED, REPEATS, PRESENT, BLOCK,
            )  # fmt: skip
            counts = (key > kept_key) | ((key == kept_key) & (token <= kept_token))
            one = tl.where(by_mass, _share(_value(key), top), 1)
            weight += tl.sum(tl.where(counts & (key >= middle), one, 0), 0)
            next_above = tl.minimum(next_above, tl.min(tl.where(counts & (key >= middle), key, top_key), 0))
            next_below = tl.maximum(next_below, tl.max(tl.where(counts & (key < middle), key, LOWEST), 0))
        if weight >= goal:
            low = next_above.to(tl.int64)
        else:
            high = next_below.to(tl.int64) + 1
    cut_key = tl.maximum(low.to(tl.int32), kept_key)
    # All tokens of one key weigh the same, so of the last key as many are kept, the lowest ids, as are needed.
    above = tl.full([], 0, tl.int64)
    mass = tl.full([], 0, tl.int64)
    for begin in range(0, size, BLOCK):
        key, token = _candidates(
            begin, size, compact, candidates_ptr, CAPACITY, logits_ptr, divisor, repetition, presence, mask_ptr,
            seen_ptr, MASKED, REPEATS, PRESENT, BLOCK,
        )  # fmt: skip
        share = tl.where(key > cut_key, _share(_value(key), top), 0)
        mass += tl.sum(share, 0)
        above += tl.sum(tl.where(by_mass, share, (key > cut_key).to(tl.int64)), 0)
    share = _share(_value(cut_key), top)
    unit = tl.where(by_mass, share, 1)
    ties = tl.full([], 0, tl.int32)
    cut_token = tl.full([], -1, tl.int32)
    for begin in range(0, size, BLOCK):
        key, token = _candidates(
            begin, size, compact, candidates_ptr, CAPACITY, logits_ptr, divisor, repetition, presence, mask_ptr,
            seen_ptr, MASKED, REPEATS, PRESENT, BLOCK,
        )  # fmt: skip
        tie = ((key == cut_key) & ((key > kept_key) | (token <= kept_token))).to(tl.int32)
        before = ties + tl.cumsum(tie, 0) - tie
        needed = (tie > 0) & (above + before * unit < goal)
        cut_token = tl.maximum(cut_token, tl.max(tl.where(needed, token, -1), 0))
        mass += tl.sum(needed.to(tl.int64), 0) * share
        ties += tl.sum(tie, 0)
    return cut_key, cut_token, mass


@jit
def cuts_kernel(
    logits_ptr, logits_stride, vocab, temperature_ptr, mask_ptr, seen_ptr, repetition_ptr, presence_ptr, words,
    top_k_ptr, top_p_ptr, min_p_ptr, keys_ptr, index_ptr,
    peaks_ptr, raw_peaks_ptr, rungs_ptr, candidates_ptr, tiles, rows_ptr, bounds_ptr,
    MASKED: tl.constexpr, REPEATS: tl.constexpr, PRESENT: tl.constexpr, RUNGS: tl.constexpr,
    CAPACITY: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What each row keeps, as its last token in the draw's order and min-p's bound; and a score to beat.

    Mode 0: the row draws nothing; 1: it takes its likeliest token; 2: it draws.
    Top-k and top-p look at the tokens within the first rung that holds all that they may keep. These are gathered, and
    their last key is found by bisection.
    """
    row = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, BLOCK_TILES)
    tile_ok = each < tiles
    first = tl.max(tl.load(peaks_ptr + row * tiles + each, mask=tile_ok, other=NEVER), 0)
    raw_key = tl.max(tl.load(raw_peaks_ptr + row * tiles + each, mask=tile_ok, other=-(2**31)), 0)
    top_key = (first >> 32).to(tl.int32)
    top_token = 0x7FFFFFFF - (first & 0x7FFFFFFF).to(tl.int32)
    top = _value(top_key)
    temperature = tl.load(temperature_ptr + row)
    draws = (top_key < HIGHEST) & (top_key > LOWEST)
    draws = draws & (temperature >= 0.0) & (temperature < float("inf"))
    hot = draws & (temperature >= COLD)
    mode = draws.to(tl.int64) + hot.to(tl.int64)

    last_key = tl.full([], LOWEST, tl.int32)
    last_token = tl.full([], -1, tl.int32)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    by_count = (top_k > 0) & (top_k < vocab)
    by_mass = top_p < 1.0
    if hot & (by_count | by_mass):
        rungs = rungs_ptr + row * (2 * RUNGS) * tiles + each
        whole = tl.sum(tl.load(rungs + (2 * RUNGS - 1) * tiles, mask=tile_ok, other=0), 0)
        goal = _at_least(top_p, whole)
        depth = tl.full([], 0.0, tl.float32)
        size = tl.full([], 0, tl.int32)
        for rung in tl.static_range(RUNGS):
            count = tl.sum(tl.load(rungs + 2 * rung * tiles, mask=tile_ok, other=0), 0)
            mass = tl.sum(tl.load(rungs + (2 * rung + 1) * tiles, mask=tile_ok, other=0), 0)
            holds = tl.where(by_count, count >= top_k, mass >= goal)
            if rung == RUNGS - 1:
                holds = count > 0
            taken = (size == 0) & holds
            if rung == RUNGS - 1:
                depth = tl.where(taken, float("inf"), depth)
            else:
                depth = tl.where(taken, 4.0 * 2**rung, depth)
            size = tl.where(taken, count.to(tl.int32), size)

        logits = logits_ptr + row * logits_stride
        divisor = _divisor(temperature)
        repetition = tl.load(repetition_ptr + row)
        presence = tl.load(presence_ptr + row)
        mask = mask_ptr + row * words
        seen = seen_ptr + row * words
        candidates = candidates_ptr + row * (2 * CAPACITY)
        compact = size <= CAPACITY
        if compact:
            gathered = tl.full([], 0, tl.int32)
            for begin in range(0, vocab, BLOCK):
                token = begin + tl.arange(0, BLOCK)
                ok = token < vocab
                raw = tl.load(logits + token, mask=ok, other=float("-inf"))
                z = _scaled(raw, token, ok, divisor, repetition, presence, mask, seen, MASKED, REPEATS, PRESENT)
                within = (z >= top - depth) & (z > float("-inf"))
                place = gathered + tl.cumsum(within.to(tl.int32), 0) - 1
                tl.store(candidates + place, _key(z), mask=within)
                tl.store(candidates + CAPACITY + place, token, mask=within)
                gathered += tl.sum(within.to(tl.int32), 0)
            # Other threads of this program read what is written here.
            tl.debug_barrier()
        else:
            size = tl.full([], 0, tl.int32) + vocab
        # Top-k, then top-p of what it kept.
        for turn in range(2):
            if tl.where(turn == 0, by_count, by_mass):
                last_key, last_token, whole = _cut(
                    tl.where(turn == 0, top_k, _at_least(top_p, whole)), turn == 1, top_key, last_key, last_token,
                    size, compact, candidates, CAPACITY, logits, divisor, repetition, presence, mask, seen,
                    MASKED, REPEATS, PRESENT, BLOCK,
                )  # fmt: skip

    least = tl.full([], float("-inf"), tl.float32)
    min_p = tl.load(min_p_ptr + row)
    if min_p > 0.0:
        least = top + tl.log(tl.minimum(min_p, 1.0).to(tl.float64)).to(tl.float32)
    w0, w1, w2, w3 = _philox(
        tl.load(index_ptr + row), top_token // 4, tl.load(keys_ptr + 2 * row), tl.load(keys_ptr + 2 * row + 1)
    )
    lane = top_token % 4
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    noise = _gumbel(_top24(word))
    tl.store(rows_ptr + row * 4, mode)
    tl.store(rows_ptr + row * 4 + 1, last_key.to(tl.int64))
    tl.store(rows_ptr + row * 4 + 2, last_token.to(tl.int64))
    tl.store(rows_ptr + row * 4 + 3, top_token.to(tl.int64))
    tl.store(bounds_ptr + row * 3, top + noise)
    tl.store(bounds_ptr + row * 3 + 1, least)
    tl.store(bounds_ptr + row * 3 + 2, _value(raw_key))


@jit
def finish_kernel(
    logits_ptr, logits_stride, rows_ptr, bounds_ptr, scores_ptr, masses_ptr, tiles, tokens_ptr, logprob_ptr,
    BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """The token of each row and its log-probability under the raw logits; -1 and NaN where it draws nothing."""
    row = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, BLOCK_TILES)
    best = tl.max(tl.load(scores_ptr + row * tiles + each, mask=each < tiles, other=NEVER), 0)
    mass = tl.sum(tl.load(masses_ptr + row * tiles + each, mask=each < tiles, other=0), 0)
    mode = tl.load(rows_ptr + row * 4)
    # The likeliest token is kept and reaches its own score; were that ever to fail, no wild address follows from it.
    mode = tl.where((mode == 2) & (best == NEVER), 0, mode)
    likeliest = tl.load(rows_ptr + row * 4 + 3)
    token = tl.where(mode == 2, 0x7FFFFFFF - (best & 0x7FFFFFFF), likeliest)
    raw = tl.load(logits_ptr + row * logits_stride + token, mask=mode > 0, other=float("nan"))
    total = tl.log(tl.maximum(mass, 1).to(tl.float64) * 2.2737367544323206e-13).to(tl.float32)
    tl.store(tokens_ptr + row, tl.where(mode > 0, token, -1))
    # A NaN or +inf that the mask hides is among the raw logits still.
    highest = tl.load(bounds_ptr + row * 3 + 2)
    logprob = raw - (highest + total)
    tl.store(logprob_ptr + row, tl.where(highest == float("inf"), float("nan"), logprob))


@jit
def automaton_mask_kernel(
    next_state_ptr, distance_ptr, accepting_ptr, state_ptr, left_ptr, end_tokens_ptr, num_end_tokens, mask_ptr,
    vocab, words, UNREACHED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """WORDS words of a row's mask, as `automaton_mask_torch` defines it."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    state = tl.load(state_ptr + row).to(tl.int64)
    bits = tl.full([WORDS], -1, tl.int32)
    if state >= 0:
        bit = tl.arange(0, 32)[None, :]
        token = word[:, None] * 32 + bit
        target = tl.load(next_state_ptr + state * vocab + token, mask=token < vocab, other=-1)
        some = target >= 0
        distance = tl.load(distance_ptr + target, mask=some, other=UNREACHED)
        reach = tl.minimum(tl.load(left_ptr + row) - 1, UNREACHED - 1)
        allowed = (some & (distance <= reach)).to(tl.int32)
        # No two bits are alike, so the sum is their union.
        bits = tl.sum(allowed << bit, 1)
        if tl.load(accepting_ptr + state) != 0:
            for i in range(num_end_tokens):
                end = tl.load(end_tokens_ptr + i)
                bits = bits | tl.where(word == end // 32, 1, 0).to(tl.int32) << (end % 32).to(tl.int32)
    tl.store(mask_ptr + row * words + word, bits, mask=word < words)


class Sizes(NamedTuple):
    """How a row is cut up; no result depends on it.

    block: tokens of a tile; search_block: tokens that a step of the search takes; both powers of two, and block at
        least 4
    capacity: candidates that are kept for the search
    """

    block: int
    search_block: int
    capacity: int


SIZES = Sizes(BLOCK, SEARCH_BLOCK, CAPACITY)


def launch_sample(
    wrap: Callable[[Any], Any],
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor, index: Tensor,
    mask: Tensor | None, seen: Tensor | None, repetition: Tensor | None, presence: Tensor | None,
    tokens: Tensor, logprob: Tensor, sizes: Sizes = SIZES,
) -> None:  # fmt: skip
    """Fill `tokens` and `logprob`. Arguments as `sample`'s, which checks them.

    wrap: makes a kernel ready for its launch: `torch.library.wrap_triton`, or nothing
    """
    n, vocab = logits.shape
    if n == 0:
        return
    block, search_block, capacity = sizes
    tiles = -(-vocab // block)
    peaks, scores, masses = logits.new_empty((3, n, tiles), dtype=torch.int64)
    raw_peaks = logits.new_empty((n, tiles), dtype=torch.int32)
    rungs = logits.new_empty((n, 2 * RUNGS, tiles), dtype=torch.int64)
    candidates = logits.new_empty((n, 2, capacity), dtype=torch.int32)
    rows = logits.new_empty((n, ROW_FIELDS), dtype=torch.int64)
    bounds = logits.new_empty((n, ROW_BOUNDS))
    # What a kernel is compiled without is not read: any pointer of the type stands for it.
    logit = (
        logits, logits.stride(0), vocab, temperature,
        candidates if mask is None else mask, candidates if seen is None else seen,
        temperature if repetition is None else repetition, temperature if presence is None else presence,
        (vocab + 31) // 32,
    )  # fmt: skip
    flags = {
        "MASKED": mask is not None, "REPEATS": seen is not None and repetition is not None,
        "PRESENT": seen is not None and presence is not None,
    }  # fmt: skip
    each = power_of_two(tiles)
    wrap(peaks_kernel)[(n, tiles)](
        *logit, peaks, raw_peaks, **flags, BLOCK=block, num_warps=NUM_WARPS, num_stages=NUM_STAGES
    )
    wrap(rungs_kernel)[(n, tiles)](
        *logit,
        top_k,
        top_p,
        peaks,
        rungs,
        **flags,
        RUNGS=RUNGS,
        BLOCK_TILES=each,
        BLOCK=block,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    wrap(cuts_kernel)[(n,)](
        *logit, top_k, top_p, min_p, keys, index, peaks, raw_peaks, rungs, candidates, tiles, rows, bounds,
        **flags, RUNGS=RUNGS, CAPACITY=capacity, BLOCK_TILES=each, BLOCK=search_block,
        num_warps=SEARCH_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    wrap(scores_kernel)[(n, tiles)](
        *logit, keys, index, rows, bounds, scores, masses, **flags, BLOCK=block,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    wrap(finish_kernel)[(n,)](
        logits,
        logits.stride(0),
        rows,
        bounds,
        scores,
        masses,
        tiles,
        tokens,
        logprob,
        BLOCK_TILES=each,
        num_warps=1,
        num_stages=NUM_STAGES,
    )


def launch_automaton_mask(
    kernel: Any, next_state: Tensor, distance: Tensor, accepting: Tensor, state: Tensor, left: Tensor,
    end_tokens: Tensor, mask: Tensor,
) -> None:  # fmt: skip
    """Fill `mask`. Other arguments as `automaton_mask`'s, which checks them.

    kernel: `automaton_mask_kernel`, or that wrapped for tracing
    """
    n, words = mask.shape
    if n:
        kernel[(n, -(-words // MASK_WORDS))](
            next_state, distance, accepting, state, left, end_tokens, end_tokens.numel(), mask,
            next_state.shape[1], words, UNREACHED=UNREACHED, WORDS=MASK_WORDS,
            num_warps=MASK_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip


def shipped(masked: bool, penalized: bool) -> tuple[Config, ...]:
    """The kernels of one call of `sample` that look at every logit, as `launch_sample` launches them."""
    logit = {
        "logits_ptr": "*fp32", "logits_stride": "i32", "vocab": "i32", "temperature_ptr": "*fp32", "mask_ptr": "*i32",
        "seen_ptr": "*i32", "repetition_ptr": "*fp32", "presence_ptr": "*fp32", "words": "i32",
    }  # fmt: skip
    flags: dict[str, int | bool] = {"MASKED": masked, "REPEATS": penalized, "PRESENT": penalized, "BLOCK": BLOCK}
    tiles = {"RUNGS": RUNGS, "BLOCK_TILES": 128}
    filters = {"top_k_ptr": "*i64", "top_p_ptr": "*fp32"}
    peaks = {"peaks_ptr": "*i64", "raw_peaks_ptr": "*i32"}
    stream = {"keys_ptr": "*i64", "index_ptr": "*i64", "rows_ptr": "*i64", "bounds_ptr": "*fp32"}
    scores = {"scores_ptr": "*i64", "masses_ptr": "*i64"}
    cut = {"min_p_ptr": "*fp32", "rungs_ptr": "*i64", "candidates_ptr": "*i32", "tiles": "i32"}
    parts: tuple[tuple[Any, dict[str, str], dict[str, int | bool]], ...] = (
        (peaks_kernel, logit | peaks, flags),
        (rungs_kernel, logit | filters | {"peaks_ptr": "*i64", "rungs_ptr": "*i64"}, flags | tiles),
        (
            cuts_kernel, logit | filters | peaks | stream | cut,
            flags | tiles | {"CAPACITY": CAPACITY, "BLOCK": SEARCH_BLOCK},
        ),
        (scores_kernel, logit | stream | scores, flags),
    )  # fmt: skip
    return tuple(
        Config(
            f"sample_{kernel.__name__.removesuffix('_kernel')}{'-mask' * masked}{'-penalties' * penalized}", kernel,
            signature, constants, SEARCH_WARPS if kernel is cuts_kernel else NUM_WARPS, NUM_STAGES, "none",
        )
        for kernel, signature, constants in parts
    )  # fmt: skip


SHIPPED = (
    *shipped(False, False),
    *shipped(True, False),
    *shipped(True, True),
    Config(
        "sample_finish", finish_kernel,
        {
            "logits_ptr": "*fp32", "logits_stride": "i32", "rows_ptr": "*i64", "bounds_ptr": "*fp32",
            "scores_ptr": "*i64", "masses_ptr": "*i64", "tiles": "i32", "tokens_ptr": "*i64", "logprob_ptr": "*fp32",
        },
        {"BLOCK_TILES": 128}, 1, NUM_STAGES, "none",
    ),
    Config(
        "automaton_mask", automaton_mask_kernel,
        {
            "next_state_ptr": "*i32", "distance_ptr": "*i32", "accepting_ptr": "*i1", "state_ptr": "*i32",
            "left_ptr": "*i32", "end_tokens_ptr": "*i64", "num_end_tokens": "i32", "mask_ptr": "*i32",
            "vocab": "i32", "words": "i32",
        },
        {"UNREACHED": UNREACHED, "WORDS": MASK_WORDS}, MASK_WARPS, NUM_STAGES, "none",
    ),
)  # fmt: skip
"""What `sample` and `automaton_mask` may launch; a vocabulary of up to 262,144, whose size moves little."""
