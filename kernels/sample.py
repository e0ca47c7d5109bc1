"""The draw: from a row of logits to one token id.

    penalties, token mask, temperature, top-k, top-p, min-p, then
    argmax over the kept tokens of logit / T + Gumbel(u), the lowest id on ties

The noise of a token is a pure function of (key, index, token id): Philox4x32-10 with counter
(index, token id // 4, 0, 0), whose lane token id % 4 gives 32 bits x; u = max(x >> 8, 1) * 2^-24, and the noise is
-log(-log(u)), each logarithm rounded to fp32. So a row's draw never depends on the rows beside it, and every sum that
decides what is kept is made in an order fixed by the vocabulary's size.

Tokens are ordered by (logit / T descending, id ascending). top-k keeps the first k of that order, top-p the shortest
prefix of what top-k kept whose share of the probability is at least p, and min-p what has at least min_p times the
probability of the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Seen: TypeAlias = Sequence[Tensor | None]
"""For each row the token ids that a penalty applies to (int64, any order, repeats allowed), or None."""
Floats: TypeAlias = NDArray[np.float32]
Words: TypeAlias = NDArray[np.uint64]
Ids: TypeAlias = NDArray[np.int64]

MAX_NOISE = 16.6356  # above -log(-log(1 - 2^-24)) = 16.635532: no token's noise is larger
COLDEST = 1e-5  # below it logit / T may leave fp32; differences of 2e-4 in a logit already decide, so it counts as 0
_CHUNK = 16384  # counters at once: best of 2048 to 49152, 14 ns each; the buffers then stay in a 1 MB cache
_GROUP = 128  # tokens whose largest logit is looked at as one when a first bound is sought
_LEADERS = 8  # groups whose noise is computed for it; benchmarks/sample.py
_DENSE = 16  # where more than one token in so many is a contender, the whole row's counters cost less than picking
_LADDER = (4.0, 8.0, 12.0, 20.0)  # how far below the largest logit top-k and top-p look, before they sort everything


class NothingAllowed(ValueError):
    """The token masks of `rows` leave no token to draw."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = tuple(rows)
        super().__init__(f"no token is allowed in rows {list(self.rows)}")


# The noise.


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32 with 10 rounds.

    counter: [..., 4], int64 holding uint32
    key: [..., 2], int64 holding uint32, the same leading sizes
    Returns [..., 4], int64 holding uint32.
    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    if counter.shape[-1:] != (4,) or key.shape[-1:] != (2,) or counter.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"counter is {tuple(counter.shape)}, key is {tuple(key.shape)}")
    c0, c1, c2, c3 = np.ascontiguousarray(counter.reshape(-1, 4).numpy().T).astype(np.uint64)
    k0, k1 = np.ascontiguousarray(key.reshape(-1, 2).numpy().T).astype(np.uint64)
    lanes = _rounds(c0, c1, c2, c3, k0, k1)
    return torch.from_numpy(np.stack(lanes, axis=-1).astype(np.int64)).reshape(counter.shape)


def _philox(c0: Words, c1: Words, k0: Words | np.uint64, k1: Words | np.uint64) -> tuple[Words, Words, Words, Words]:
    """Ten rounds from the counter (c0, c1, 0, 0); uint32 held in uint64 [n], in which a product of two is exact."""
    c2, c3 = np.zeros_like(c1), np.zeros_like(c1)
    return _rounds(c0.copy(), c1.copy(), c2, c3, k0, k1)


def _rounds(
    c0: Words, c1: Words, c2: Words, c3: Words, k0: Words | np.uint64, k1: Words | np.uint64
) -> tuple[Words, Words, Words, Words]:
    """The counter's four words are overwritten."""
    p0, p1 = np.empty_like(c0), np.empty_like(c0)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        np.multiply(c0, np.uint64(0xD2511F53), out=p0)
        np.multiply(c2, np.uint64(0xCD9E8D57), out=p1)
        np.right_shift(p1, half, out=c0)
        c0 ^= c1
        c0 ^= k0
        np.right_shift(p0, half, out=c2)
        c2 ^= c3
        c2 ^= k1
        np.bitwise_and(p1, low, out=c1)
        np.bitwise_and(p0, low, out=c3)
        k0 = (k0 + np.uint64(0x9E3779B9)) & low
        k1 = (k1 + np.uint64(0xBB67AE85)) & low
    return c0, c1, c2, c3


def gumbel(bits: Tensor) -> Tensor:
    """Gumbel noise, fp32, from uint32 `bits` (int64): -log(-log(u)) with u = max(bits >> 8, 1) * 2^-24.

    Each logarithm is taken in fp64 and rounded to fp32, so that it does not depend on the machine's vector width.
    """
    return torch.from_numpy(_gumbel((bits.numpy() >> 8).astype(np.uint32)))


def _gumbel(top24: NDArray[np.uint32]) -> Floats:
    u = np.maximum(top24, 1).astype(np.float64) * 2.0**-24
    inner = np.log(u).astype(np.float32)
    return -np.log(-inner.astype(np.float64)).astype(np.float32)


class _Streams:
    """The random numbers of the rows of one draw. keys: uint64 [n, 2]; index: uint64 [n]."""

    def __init__(self, keys: Words, index: Words, vocab: int) -> None:
        self.keys = keys
        self.index = index
        self.blocks = (vocab + 3) // 4  # four tokens share a counter

    def top24(self, rows: Ids, tokens: Ids) -> NDArray[np.uint32]:
        """The 24 bits of each (row, token), uint32; pairs are ordered by row, then token."""
        blocks = rows * self.blocks + (tokens >> 2)
        first = np.ones(len(blocks), dtype=bool)
        np.not_equal(blocks[1:], blocks[:-1], out=first[1:])
        owner, numbers = np.divmod(blocks[first], self.blocks)
        lanes = np.empty((len(owner), 4), dtype=np.uint32)
        for low in range(0, len(owner), _CHUNK):
            part = slice(low, low + _CHUNK)
            keys = self.keys[owner[part]]
            words = _philox(
                self.index[owner[part]], numbers[part].astype(np.uint64), keys[:, 0].copy(), keys[:, 1].copy()
            )
            _store(words, lanes[part])
        picked: NDArray[np.uint32] = lanes.reshape(-1)[(first.cumsum() - 1) * 4 + (tokens & 3)]
        return picked

    def whole(self, row: int) -> NDArray[np.uint32]:
        """The 24 bits of every token of `row`, uint32 [vocab rounded up to 4]."""
        out = np.empty((self.blocks, 4), dtype=np.uint32)
        for low in range(0, self.blocks, _CHUNK):
            numbers = np.arange(low, min(low + _CHUNK, self.blocks), dtype=np.uint64)
            _store(_philox(np.full_like(numbers, self.index[row]), numbers, *self.keys[row]), out[low : low + _CHUNK])
        return out.reshape(-1)


def _store(words: Sequence[Words], out: NDArray[np.uint32]) -> None:
    """The top 24 of 32 bits of the four `words` [n] to `out` [n, 4]."""
    for lane, word in enumerate(words):
        word >>= np.uint64(8)
        out[:, lane] = word


# What is allowed.


def unpack_mask(mask: Tensor, vocab: int) -> Tensor:
    """A packed token mask int32 [n, ceil(vocab/32)] (token i is bit i % 32 of word i // 32) as bool [n, vocab]."""
    words = mask.contiguous().numpy().view(np.uint8)
    return torch.from_numpy(np.unpackbits(words, axis=-1, count=vocab, bitorder="little")).view(torch.bool)


def penalize(
    logits: Tensor,
    *,
    repetition_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    seen: Seen = (),
    drawn: Seen = (),
) -> Tensor:
    """Logits with the penalties applied, in a new tensor if any applies.

    logits: [n, vocab], fp32
    repetition_penalty: [n], 1 for none; a logit of a token in `seen` is divided by it if positive, else multiplied
    presence_penalty: [n], 0 for none; subtracted from the logit of a token in `drawn`
    Source: CTRL (Keskar et al. 2019) for repetition; OpenAI's API for presence.
    """
    out = logits
    for row in range(len(logits)):
        tokens = seen[row] if row < len(seen) else None
        if repetition_penalty is not None and tokens is not None and float(repetition_penalty[row]) != 1.0:
            out = logits.clone() if out is logits else out
            values = out[row, tokens]
            out[row, tokens] = torch.where(
                values > 0, values / repetition_penalty[row], values * repetition_penalty[row]
            )
        tokens = drawn[row] if row < len(drawn) else None
        if presence_penalty is not None and tokens is not None and float(presence_penalty[row]) != 0.0:
            out = logits.clone() if out is logits else out
            out[row, tokens] = out[row, tokens] - presence_penalty[row]
    return out


def draw(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    keys: Tensor,
    index: Tensor,
    mask: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    seen: Seen = (),
    drawn: Seen = (),
) -> Tensor:
    """One token for each row; the module's docstring defines which.

    logits: [n, vocab], fp32; not changed
    temperature: [n], fp32; below `COLDEST` counts as 0, which is argmax
    top_k: [n], int64; 0 for off
    top_p: [n], fp32; 1 or more for off
    min_p: [n], fp32; 0 for off
    keys: [n, 2], int64 holding uint32
    index: [n], int64: how many tokens this thread drew before
    mask: bool [n, vocab], or packed int32 [n, ceil(vocab/32)] (see `unpack_mask`); None allows all
    repetition_penalty, presence_penalty, seen, drawn: see `penalize`
    Returns int64 [n].
    Raises NothingAllowed if a row's mask (or a row of -inf) leaves nothing; ValueError if logits hold NaN or +inf, or a
    temperature is negative or not finite; TypeError for other logits than fp32.
    """
    if logits.dtype != torch.float32:
        raise TypeError(f"logits must be float32, not {logits.dtype}")
    cold = temperature.numpy()
    if not (np.isfinite(cold) & (cold >= 0)).all():
        raise ValueError("a temperature must be a finite number of at least 0")
    n, vocab = logits.shape
    if n == 0:
        return torch.empty(0, dtype=torch.int64)
    values = penalize(
        logits, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty, seen=seen, drawn=drawn
    ).numpy()
    lines = _Lines(values, _allowed(logits.shape, mask), cold)
    ids, top = lines.best()
    if not np.isfinite(top).all():
        _refuse(top)
    streams = _Streams(keys.numpy().astype(np.uint64), index.numpy().astype(np.uint64), vocab)
    k, p, m = top_k.numpy(), top_p.numpy(), min_p.numpy()
    filtered = ((k > 0) & (k < vocab)) | (p < 1) | (m > 0)
    hot = cold >= COLDEST
    pools = _contenders(lines, (hot & ~filtered).nonzero()[0], streams)
    for row in (hot & filtered).nonzero()[0].tolist():
        line = lines[row]
        tokens = kept_tokens(line, top_k=int(k[row]), top_p=float(p[row]), min_p=float(m[row]))
        pools[row] = tokens, line[tokens]
    if pools:
        rows = sorted(pools)
        ids[rows] = _winners(rows, [pools[row] for row in rows], streams)
    return torch.from_numpy(ids)


class _Lines:
    """The rows of logits with mask and temperature applied, one at a time, so that each stays in the cache."""

    def __init__(self, values: Floats, allowed: Mapping[int, NDArray[np.bool_]], temperature: Floats) -> None:
        self.values = values
        self.allowed = allowed
        self.temperature = temperature

    def __getitem__(self, row: int) -> Floats:
        line: Floats = self.values[row]
        if row in self.allowed:
            line = np.where(self.allowed[row], line, np.float32(-np.inf))
        temperature = self.temperature[row]
        return line if temperature == 1 or temperature < COLDEST else line / temperature

    def best(self) -> tuple[Ids, Floats]:
        """The likeliest allowed token of each row, the lowest id on ties, and its logit / T (at T = 0 its logit)."""
        ids = self.values.argmax(-1)
        top = self.values[np.arange(len(ids)), ids]
        for row in self.allowed:
            line = self[row]
            ids[row] = line.argmax()
            top[row] = line[ids[row]]
        return ids, top


def _allowed(shape: Sequence[int], mask: Tensor | None) -> dict[int, NDArray[np.bool_]]:
    """bool [vocab] for each row that is not allowed everything."""
    n, vocab = shape
    if mask is None:
        return {}
    if mask.dtype == torch.int32:
        if mask.shape != (n, (vocab + 31) // 32):
            raise ValueError(f"a packed mask must be [{n}, {(vocab + 31) // 32}], not {tuple(mask.shape)}")
        rows = (mask != -1).any(-1).nonzero().squeeze(-1)
        return dict(zip(rows.tolist(), unpack_mask(mask[rows], vocab).numpy(), strict=True))
    if mask.dtype != torch.bool or mask.shape != (n, vocab):
        raise ValueError(f"a mask must be bool [{n}, {vocab}] or packed int32, not {mask.dtype} {tuple(mask.shape)}")
    return dict(enumerate(mask.numpy()))


def _refuse(top: Floats) -> None:
    broken = np.isnan(top) | (top == np.inf)
    if broken.any():
        raise ValueError(f"the logits of rows {broken.nonzero()[0].tolist()} are not finite")
    raise NothingAllowed((top == -np.inf).nonzero()[0].tolist())


def _contenders(lines: _Lines, rows: Ids, streams: _Streams) -> dict[int, tuple[Ids, Floats]]:
    """For each of `rows` the tokens that may have the highest z + noise, ascending, with their z = logit / T.

    Some leading tokens' noise gives a score to beat; a token whose z is more than `MAX_NOISE` below it cannot win,
    whatever its noise. Of the others the noise's bits are computed and compared with what they need to be, without a
    logarithm: -log(-log(u)) >= best - z only if 1 - u <= exp(z - best), since 1 - u <= -log(u).
    """
    out: dict[int, tuple[Ids, Floats]] = {}
    if not len(rows):
        return out
    best = _scores_to_beat(lines, rows, streams)
    # The sum z + noise is rounded relative to its size, which a low temperature makes large.
    best -= 1e-3 + 1e-6 * np.abs(best)
    for row, beat in zip(rows.tolist(), best, strict=True):
        line = lines[row]
        tokens = np.flatnonzero(line >= beat - np.float32(MAX_NOISE))
        if len(tokens) * _DENSE > len(line):
            bits = streams.whole(row)[tokens]
        else:
            bits = streams.top24(np.full_like(tokens, row), tokens)
        z = line[tokens]
        missing = ((1 << 24) - bits).astype(np.float32)
        may_win = missing <= np.exp(z - beat) * np.float32(1.0001 * 2**24) + np.float32(2)
        out[row] = tokens[may_win], z[may_win]
    return out


def _scores_to_beat(lines: _Lines, rows: Ids, streams: _Streams) -> Floats:
    """The highest z + noise among the tokens of the `_LEADERS` groups of highest z of each row; fp32 [rows]."""
    leads = [_leaders(lines[row]) for row in rows.tolist()]
    tokens = np.stack([lead for lead, _ in leads])
    z = np.stack([values for _, values in leads])
    noise = _gumbel(streams.top24(np.repeat(rows, tokens.shape[1]), tokens.reshape(-1)))
    scores: Floats = (z + noise.reshape(z.shape)).max(axis=-1)
    return scores


def _leaders(line: Floats) -> tuple[Ids, Floats]:
    """Some tokens, ascending, among them one of the highest z; and the z of each. As many for each line of a size."""
    vocab = len(line)
    groups = vocab // _GROUP
    if groups <= _LEADERS:
        return np.arange(vocab), line
    highest = torch.from_numpy(line[: groups * _GROUP]).view(groups, _GROUP).amax(-1).numpy()
    lead = np.sort(np.argpartition(highest, groups - _LEADERS)[-_LEADERS:])
    # What the groups leave over always takes part: it may be all that a mask allows.
    tokens = np.concatenate(
        ((lead[:, None] * _GROUP + np.arange(_GROUP)).reshape(-1), np.arange(groups * _GROUP, vocab))
    )
    return tokens, line[tokens]


def _winners(rows: Sequence[int], pools: Sequence[tuple[Ids, Floats]], streams: _Streams) -> Ids:
    """For each row the token of its pool (ids ascending, with z; at least one) of highest z + noise."""
    sizes = np.array([len(tokens) for tokens, _ in pools])
    tokens = np.concatenate([tokens for tokens, _ in pools])
    z = np.concatenate([values for _, values in pools])
    scores = z + _gumbel(streams.top24(np.repeat(np.array(rows), sizes), tokens))
    starts = sizes.cumsum() - sizes
    best = np.repeat(np.maximum.reduceat(scores, starts), sizes)
    # Ids ascend within a row, so its first winning place is its lowest id.
    places = np.where(scores == best, np.arange(len(scores)), len(scores))
    won: Ids = tokens[np.minimum.reduceat(places, starts)]
    return won


def kept_tokens(z: Floats, *, top_k: int, top_p: float, min_p: float) -> Ids:
    """The ids, ascending, that top-k, top-p and min-p keep of one row z = logit / T (fp32 [vocab])."""
    top = z.max()
    vocab = len(z)
    count = min(top_k, vocab) if top_k > 0 else vocab
    # Compared as logits: log(min_p) is rounded once, and no exponential decides.
    least = top + np.float32(math.log(min(min_p, 1.0))) if min_p > 0 else np.float32(-np.inf)
    if count == vocab and top_p >= 1:
        return np.flatnonzero((z >= least) & (z > -np.inf))
    whole = None if count < vocab else float(tree_sum(np.exp(z - top)))
    for depth in _LADDER:
        order = _leading(z, np.flatnonzero(z >= top - np.float32(depth)), count, top_p, whole)
        if order is not None:
            break
    else:
        every = np.flatnonzero(z > -np.inf)
        order = _leading(z, every, min(count, len(every)), top_p, whole)
        # The shares' own sum may round to less than top_p of the whole: then nothing is cut.
        order = _ordered(z, every) if order is None else order
    return np.sort(order[z[order] >= least])


def _ordered(z: Floats, tokens: Ids) -> Ids:
    """`tokens`, which ascend, by z descending, then id."""
    return tokens[np.argsort(-z[tokens], kind="stable")]


def _leading(z: Floats, tokens: Ids, count: int, top_p: float, whole: float | None) -> Ids | None:
    """The tokens that the first `count` and then `top_p` keep, if they are all among `tokens`, the highest; else None.

    whole: what the probabilities sum to, as multiples of the first; None for that of the first `count`
    """
    if whole is None and len(tokens) < count:
        return None
    order = _ordered(z, tokens)[:count]
    if top_p >= 1:
        return order
    shares = np.exp(z[order] - z[order[0]]).astype(np.float64).cumsum()
    reached = shares >= top_p * (shares[-1] if whole is None else whole)
    return order[: int(reached.argmax()) + 1] if reached[-1] else None


def tree_sum(x: Floats) -> np.float32:
    """Sum of [m] by halving: the order of the additions depends on m alone."""
    while len(x) > 1:
        half = (len(x) + 1) // 2
        rest = len(x) - half
        out = x[:half].copy()
        out[:rest] += x[half:]
        x = out
    total: np.float32 = x[0]
    return total


# Log-probabilities.


def log_normalizer(logits: Tensor) -> Tensor:
    """log(sum(exp(logits))) over the last axis of [n, vocab]: [n] of the same dtype, natural log, row by row."""
    values = logits.numpy()
    top = values.max(axis=-1)
    # A row at a time stays in the cache.
    total = np.array([tree_sum(np.exp(line - high)) for line, high in zip(values, top, strict=True)], dtype=np.float64)
    return torch.from_numpy(top + np.log(total).astype(values.dtype))


def logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural-log probability of `tokens` (int64 [n]) under `logits` [n, vocab], unmasked, at temperature 1.

    Returns [n] of the dtype of `logits`.
    """
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - log_normalizer(logits)
