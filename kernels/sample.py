"""The draw: from a row of logits to one token id.

    penalties, token mask, temperature, top-k, top-p, min-p, then
    argmax over the kept tokens of logit / T + Gumbel(u), the lowest id on ties

The noise of a token is a pure function of (key, index, token id): Philox4x32-10 with counter
(index, token id // 4, 0, 0), whose lane token id % 4 gives 32 bits x; u = max(x >> 8, 1) * 2^-24, and the noise is
-log(-log(u)), each logarithm rounded to fp32. So a row's draw never depends on the rows beside it, and every sum that
decides what is kept is made in an order fixed by the row alone.

Tokens are ordered by (logit / T descending, id ascending). top-k keeps the first k of that order, top-p the shortest
prefix of what top-k kept whose share of the probability is at least p, and min-p what has at least min_p times the
probability of the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Seen: TypeAlias = Sequence[Tensor | None]
"""For each row the token ids that a penalty applies to (int64, any order, repeats allowed), or None."""

MAX_NOISE = 16.6356  # above -log(-log(1 - 2^-24)) = 16.635532: no token's noise is larger
COLDEST = 1e-5  # below it logit / T may leave fp32; differences of 2e-4 in a logit already decide, so it counts as 0
_HEADS = (64, 1024, 16384)  # how many leading tokens to look at before all; benchmarks/sample.py
_U32 = 0xFFFFFFFF


class NothingAllowed(ValueError):
    """The token masks of `rows` leave no token to draw."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = tuple(rows)
        super().__init__(f"no token is allowed in rows {list(self.rows)}")


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32 with 10 rounds.

    counter: [..., 4], int64 holding uint32
    key: [..., 2], int64 holding uint32
    Returns [..., 4], int64 holding uint32.
    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    return torch.stack(_philox_rounds(c0, c1, c2, c3, k0, k1), -1)


def _philox_rounds(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    for _ in range(10):
        # A product of two uint32 fills 64 bits: int64 wraps, but the bits are right; masking undoes the shift's sign.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & _U32, p1 & _U32, ((p0 >> 32) ^ c3 ^ k1) & _U32, p0 & _U32
        k0, k1 = (k0 + 0x9E3779B9) & _U32, (k1 + 0xBB67AE85) & _U32
    return c0, c1, c2, c3


def gumbel(bits: Tensor) -> Tensor:
    """Gumbel noise, fp32, from uint32 `bits` (int64): -log(-log(u)) with u = max(bits >> 8, 1) * 2^-24.

    Each logarithm is taken in fp64 and rounded to fp32, so that it does not depend on the machine's vector width.
    """
    u = (bits >> 8).clamp_(min=1).double().mul_(2.0**-24)
    inner = u.log_().float()
    return inner.neg_().double().log_().float().neg_()


def noise(keys: Tensor, index: Tensor, tokens: Tensor) -> Tensor:
    """The noise of `tokens` [n], int64, under `keys` [n, 2] and `index` [n], int64: fp32 [n]."""
    zero = torch.zeros_like(tokens)
    lanes = _philox_rounds(index, tokens >> 2, zero, zero, keys[:, 0], keys[:, 1])
    return gumbel(torch.stack(lanes, -1).gather(-1, (tokens & 3).unsqueeze(-1)).squeeze(-1))


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
    Raises NothingAllowed if a row's mask (or a row of -inf) leaves nothing, ValueError if logits hold NaN or +inf.
    """
    n, vocab = logits.shape
    if n == 0:
        return torch.empty(0, dtype=torch.int64)
    logits = penalize(
        logits, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty, seen=seen, drawn=drawn
    )
    if mask is not None:
        logits = _masked(logits, mask)
    top, ids = logits.max(-1)
    if not bool(top.isfinite().all()):
        _refuse(top)
    hot = (temperature >= COLDEST).nonzero().squeeze(-1)
    if not len(hot):
        return ids
    every = len(hot) == n
    z = (logits if every else logits[hot]) / (temperature if every else temperature[hot]).unsqueeze(-1)
    keys, index = (keys, index) if every else (keys[hot], index[hot])
    filtered = (top_k[hot] > 0) & (top_k[hot] < vocab) | (top_p[hot] < 1) | (min_p[hot] > 0)
    picked = torch.empty(len(hot), dtype=torch.int64)
    for rows, pick in ((~filtered, _pick_any), (filtered, _pick_filtered)):
        chosen = rows.nonzero().squeeze(-1)
        if len(chosen) == len(hot):
            picked = pick(z, keys, index, top_k[hot], top_p[hot], min_p[hot])
        elif len(chosen):
            among = hot[chosen]
            picked[chosen] = pick(z[chosen], keys[chosen], index[chosen], top_k[among], top_p[among], min_p[among])
    if every:
        return picked
    return ids.index_copy(0, hot, picked)


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    n, vocab = logits.shape
    if mask.dtype == torch.bool:
        if mask.shape != logits.shape:
            raise ValueError(f"mask is {tuple(mask.shape)}, logits are {tuple(logits.shape)}")
        return logits.masked_fill(~mask, -math.inf)
    if mask.dtype != torch.int32 or mask.shape != (n, (vocab + 31) // 32):
        raise ValueError(f"a packed mask must be int32 [{n}, {(vocab + 31) // 32}]")
    return logits.masked_fill(~unpack_mask(mask, vocab), -math.inf)


def _refuse(top: Tensor) -> None:
    if bool((top.isnan() | (top == math.inf)).any()):
        raise ValueError(
            f"logits of rows {(top.isnan() | (top == math.inf)).nonzero().squeeze(-1).tolist()} are not finite"
        )
    raise NothingAllowed((top == -math.inf).nonzero().squeeze(-1).tolist())


def _pick_any(z: Tensor, keys: Tensor, index: Tensor, *_off: Tensor) -> Tensor:
    """The draw from all tokens of each row of z = logit / T.

    The best score among the leading tokens bounds what can still win: a token whose z is more than `MAX_NOISE` below it
    cannot, whatever its noise, so only the others' noise is computed.
    """
    n, vocab = z.shape
    lead = min(_HEADS[0], vocab)
    values, tokens = z.topk(lead, dim=-1, sorted=False)
    rows = torch.arange(n).repeat_interleave(lead)
    bits = noise(keys[rows], index[rows], tokens.flatten()).view(n, lead)
    best = (values + bits).amax(-1)
    # Rounding of z + noise is relative to its size, which a low temperature makes large.
    floor = best - MAX_NOISE - (1e-3 + 1e-6 * best.abs())
    rows, tokens = (z >= floor.unsqueeze(-1)).nonzero().unbind(-1)
    return _win(z, keys, index, rows, tokens)


def _win(z: Tensor, keys: Tensor, index: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """For each row of `z` the token with the highest z + noise among the (rows, tokens) pairs; each row has one."""
    n, vocab = z.shape
    scores = z[rows, tokens] + noise(keys[rows], index[rows], tokens)
    best = torch.full((n,), -math.inf).scatter_reduce(0, rows, scores, "amax")
    won = scores == best[rows]
    return torch.full((n,), vocab).scatter_reduce(0, rows[won], tokens[won], "amin")


def _pick_filtered(z: Tensor, keys: Tensor, index: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The draw from what top-k, top-p and min-p keep of each row of z = logit / T."""
    least, spare = _cutoff(z, top_k, top_p, min_p)
    rows, tokens = (z >= least.unsqueeze(-1)).nonzero().unbind(-1)
    if bool((spare > 0).any()):
        keep = _without_spare(z, rows, tokens, least, spare)
        rows, tokens = rows[keep], tokens[keep]
    return _win(z, keys, index, rows, tokens)


def _without_spare(z: Tensor, rows: Tensor, tokens: Tensor, least: Tensor, spare: Tensor) -> Tensor:
    """Which pairs stay when in each row the `spare` highest ids among those equal to `least` go."""
    keep = torch.ones(len(rows), dtype=torch.bool)
    for row in spare.nonzero().squeeze(-1).tolist():
        tied = ((rows == row) & (z[rows, tokens] == least[row])).nonzero().squeeze(-1)
        keep[tied[len(tied) - int(spare[row]) :]] = False
    return keep


def _cutoff(z: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """(least, spare) of each row: kept is what has z >= least, without the last `spare` of those equal to it."""
    n, vocab = z.shape
    top = z.amax(-1)
    # Compared as logits: log(min_p) is rounded once, and no exponential decides.
    least = torch.where(min_p > 0, top + min_p.double().log().float(), torch.full((n,), -math.inf))
    spare = torch.zeros(n, dtype=torch.int64)
    nucleus = top_p < 1
    limited = (top_k > 0) & (top_k < vocab)
    todo = (nucleus | limited).nonzero().squeeze(-1)
    for head in (*_HEADS, vocab):
        if not len(todo):
            break
        head = min(head, vocab)
        k = torch.where(limited[todo], top_k[todo], vocab)
        found, edge, beyond = _prefix(z[todo], top[todo], k, top_p[todo], head)
        done = todo[found]
        # min-p may cut deeper than the prefix; then its own bound stands and nothing is spare.
        deeper = edge[found] >= least[done]
        spare[done] = torch.where(deeper, beyond[found], 0)
        least[done] = torch.maximum(edge[found], least[done])
        todo = todo[~found]
    # A token of -inf is masked out, so it is never kept.
    return least.clamp_(min=torch.finfo(torch.float32).min), spare


def _prefix(z: Tensor, top: Tensor, k: Tensor, top_p: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where top-k and then top-p end, looking at the first `head` tokens of each row's order.

    Returns found (bool [n]: it is inside), edge (fp32 [n]: z of the last token kept), and beyond (int64 [n]: how many
    tokens equal to the edge are not kept).
    """
    n, vocab = z.shape
    values = z.topk(head, dim=-1).values
    shares = (values - top.unsqueeze(-1)).exp().double().cumsum(-1)
    inside = (k <= head).nonzero().squeeze(-1)
    nucleus = (top_p < 1).nonzero().squeeze(-1)
    whole = torch.ones(n, dtype=torch.float64)
    if len(nucleus):
        open_ = nucleus[k[nucleus] >= vocab]
        if len(open_):
            whole[open_] = tree_sum((z[open_] - top[open_].unsqueeze(-1)).exp_()).double()
    if len(inside):
        whole[inside] = shares[inside].gather(-1, (k[inside] - 1).unsqueeze(-1)).squeeze(-1)
    reached = shares >= (top_p.double() * whole).unsqueeze(-1)
    by_p = torch.where(reached.any(-1), reached.to(torch.uint8).argmax(-1) + 1, vocab)
    kept = torch.minimum(k, torch.where(top_p < 1, by_p, vocab))
    found = (kept <= head) & ((k <= head) | (k >= vocab))
    if head == vocab:
        found, kept = torch.ones_like(found), kept.clamp(max=vocab)
    edge = values.gather(-1, (kept.clamp(max=head) - 1).unsqueeze(-1)).squeeze(-1)
    beyond = torch.where(found, (z >= edge.unsqueeze(-1)).sum(-1) - kept, 0)
    return found, edge, beyond


def tree_sum(x: Tensor) -> Tensor:
    """Sum over the last axis of [n, m] by halving: the order of the additions depends on m alone. Same dtype, [n]."""
    size = 1 << max(0, x.shape[-1] - 1).bit_length()
    half = size // 2
    if half == 0:
        return x.squeeze(-1)
    rest = x.shape[-1] - half
    out = x[:, :half].clone()
    out[:, :rest] += x[:, half:]
    while out.shape[-1] > 1:
        half = out.shape[-1] // 2
        out = out[:, :half] + out[:, half:]
    return out.squeeze(-1)


def log_normalizer(logits: Tensor) -> Tensor:
    """log(sum(exp(logits))) over the last axis of [n, vocab], [n] of the same dtype, natural log, in an order fixed by vocab."""
    top = logits.amax(-1)
    return top + tree_sum((logits - top.unsqueeze(-1)).exp_()).double().log_().to(logits.dtype)


def logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural-log probability of `tokens` (int64 [n]) under `logits` [n, vocab], unmasked, at temperature 1.

    Returns [n] of the dtype of `logits`.
    """
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - log_normalizer(logits)


def top_logprobs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of each row: (ids int64 [n, count], natural-log probabilities fp32 [n, count]).

    Most likely first, the lowest id first on ties. logits: fp32 [n, vocab].
    """
    if not 0 < count <= logits.shape[-1]:
        raise ValueError(f"count must be from 1 to {logits.shape[-1]}, not {count}")
    edge = logits.topk(count, dim=-1).values[:, -1:]
    ids = torch.empty(len(logits), count, dtype=torch.int64)
    for row in range(len(logits)):
        tied = (logits[row] >= edge[row]).nonzero().squeeze(-1)
        order = logits[row, tied].sort(descending=True, stable=True).indices[:count]
        ids[row] = tied[order]
    return ids, logits.gather(-1, ids) - log_normalizer(logits).unsqueeze(-1)
