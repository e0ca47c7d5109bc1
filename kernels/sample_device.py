"""The draw of `kernels/sample.py` and the masks of regular types, as ops that read nothing back to the host.

So both can stand in a captured graph: a lane's token is drawn, and the mask of its next draw made, between two steps of
the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.kernels.jit import define_op, takes_torch, wrap
from anabranch.kernels.sample import draw, logprob, unpack_mask

MAX_VOCAB = 1 << 20  # the probabilities are summed as integers, so many of which fit 63 bits
UNREACHED = 1 << 30  # the distance of a state from which no value can be reached (FAR of runtime/automata.py)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor, index: Tensor,
    mask: Tensor | None = None, seen: Tensor | None = None, repetition: Tensor | None = None,
    presence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token for each row, and its log-probability: `draw` and `logprob` of `kernels/sample.py`.

    logits: [n, vocab], fp32, contiguous in the vocabulary; vocab is 1 to `MAX_VOCAB`
    temperature: [n], fp32; below `COLDEST` counts as 0, which is argmax
    top_k: [n], int64; 0 for off
    top_p: [n], fp32; 1 or more for off
    min_p: [n], fp32; 0 for off
    keys: [n, 2], int64 holding uint32
    index: [n], int64 holding uint32: how many tokens this thread drew before
    mask: [n, ceil(vocab/32)], int32, token i being bit i % 32 of word i // 32; None allows all
    seen: [n, ceil(vocab/32)], int32, such bits too: the tokens that the penalties apply to; None for none
    repetition: [n], fp32, 1 for none, or None; presence: [n], fp32, 0 for none, or None
    Returns tokens [n], int64, and logprob [n], fp32: natural log, unmasked, at temperature 1, without penalties.
    A row gives token -1 and a logprob of NaN where the mask (or a row of -inf) leaves nothing, where what is allowed
    holds NaN or +inf, or where the temperature is negative or not finite: what `draw` raises for.
    The op `anabranch::sample`: Triton on a GPU, `sample_torch` on a CPU.
    Raises ValueError for a shape, dtype or layout that is not supported.
    Laws: a row's results depend on its own row alone, not on n, the launch or its tiling: sums are of integers.
    On a GPU a share of the probability that decides top-p's cut may differ by 4e-6 of the whole from `draw`'s, which
    adds fp32 numbers in another order and takes another exponential; all else is the same but for the last bit of a
    logarithm, which after rounding to fp32 differs once in about 2^28.
    """
    _check_sample(logits, temperature, top_k, top_p, min_p, keys, index, mask, seen, repetition, presence)
    drawn: tuple[Tensor, Tensor] = _sample(
        logits, temperature, top_k, top_p, min_p, keys, index, mask, seen, repetition, presence
    )
    return drawn


def sample_torch(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor, index: Tensor,
    mask: Tensor | None, seen: Tensor | None, repetition: Tensor | None, presence: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition of `sample`: `draw`, and what that raises for as -1."""
    tokens = draw_or_refuse(logits, temperature, top_k, top_p, min_p, keys, index, mask, seen, repetition, presence)
    found = logprob(logits, tokens.clamp(min=0)) if len(logits) else logits.new_empty(0)
    return tokens, torch.where(tokens < 0, float("nan"), found)


def draw_or_refuse(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor, index: Tensor,
    mask: Tensor | None, seen: Tensor | None, repetition: Tensor | None, presence: Tensor | None,
) -> Tensor:  # fmt: skip
    """The tokens of `sample`, by `draw` on a CPU; -1 for a row that it raises for. Arguments are those of `sample`."""
    n, vocab = logits.shape
    bits = () if seen is None else tuple(row.nonzero().squeeze(-1) for row in unpack_mask(seen, vocab))

    def drawn(rows: slice) -> Tensor:
        return draw(
            logits[rows], temperature=temperature[rows], top_k=top_k[rows], top_p=top_p[rows], min_p=min_p[rows],
            keys=keys[rows], index=index[rows], mask=None if mask is None else mask[rows],
            repetition_penalty=None if repetition is None else repetition[rows],
            presence_penalty=None if presence is None else presence[rows],
            seen=bits[rows], drawn=bits[rows],
        )  # fmt: skip

    try:
        tokens = drawn(slice(None))
    except ValueError:
        tokens = torch.full((n,), -1, dtype=torch.int64)
        for row in range(n):
            try:
                tokens[row] = drawn(slice(row, row + 1))
            except ValueError:
                continue
    return tokens


def _check_sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor, index: Tensor,
    mask: Tensor | None, seen: Tensor | None, repetition: Tensor | None, presence: Tensor | None,
) -> None:  # fmt: skip
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise ValueError(f"logits are fp32 [n, vocab], not {logits.dtype} {list(logits.shape)}")
    n, vocab = logits.shape
    if not 0 < vocab <= MAX_VOCAB:
        raise ValueError(f"a vocabulary of {vocab} is not supported: it is 1 to {MAX_VOCAB}")
    if logits.stride(1) != 1:
        raise ValueError("logits are contiguous in the vocabulary")
    words = (n, (vocab + 31) // 32)
    for name, tensor, shape, dtype in (
        ("temperature", temperature, (n,), torch.float32),
        ("top_k", top_k, (n,), torch.int64),
        ("top_p", top_p, (n,), torch.float32),
        ("min_p", min_p, (n,), torch.float32),
        ("keys", keys, (n, 2), torch.int64),
        ("index", index, (n,), torch.int64),
        ("mask", mask, words, torch.int32),
        ("seen", seen, words, torch.int32),
        ("repetition", repetition, (n,), torch.float32),
        ("presence", presence, (n,), torch.float32),
    ):
        _check(name, tensor, shape, dtype, logits.device)


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor is None:
        return
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"{name} is {dtype} {list(shape)}, contiguous, not {tensor.dtype} {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, not on {device}")


# Opaque to tracing, since its loops follow the data.
@torch.library.custom_op("anabranch::sample_cpu", mutates_args=())
def _sample_on_cpu(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor, index: Tensor,
    mask: Tensor | None, seen: Tensor | None, repetition: Tensor | None, presence: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return sample_torch(logits, temperature, top_k, top_p, min_p, keys, index, mask, seen, repetition, presence)


@define_op("anabranch::sample")
def _sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor, index: Tensor,
    mask: Tensor | None, seen: Tensor | None, repetition: Tensor | None, presence: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if takes_torch(logits):
        drawn: tuple[Tensor, Tensor] = _sample_on_cpu(
            logits, temperature, top_k, top_p, min_p, keys, index, mask, seen, repetition, presence
        )
        return drawn
    from anabranch.kernels import sample_device_triton as on_gpu

    tokens, found = _drawn(logits)
    on_gpu.launch_sample(
        wrap, logits, temperature, top_k, top_p, min_p, keys, index, mask, seen, repetition,
        presence, tokens, found,
    )  # fmt: skip
    return tokens, found


def _drawn(logits: Tensor) -> tuple[Tensor, Tensor]:
    n = logits.shape[0]
    return logits.new_empty(n, dtype=torch.int64), logits.new_empty(n)


def _fake_sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor, index: Tensor,
    mask: Tensor | None, seen: Tensor | None, repetition: Tensor | None, presence: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _drawn(logits)


_sample_on_cpu.register_fake(_fake_sample)
_sample.register_fake(_fake_sample)


def automaton_mask(
    next_state: Tensor, distance: Tensor, accepting: Tensor, state: Tensor, left: Tensor, end_tokens: Tensor
) -> Tensor:
    """The packed token mask of each row's state: what may follow so that a value still completes within `left`.

    next_state: [states, vocab], int32, contiguous; -1 where a token may not follow
    distance: [states], int32: the fewest tokens from each state to a value; `UNREACHED` where there is none
    accepting: [states], bool
    state: [n], int32, below states; -1 for a row without a type, which is allowed everything
    left: [n], int32: how many tokens may be drawn, this one included
    end_tokens: [k], int64: the end-of-turn tokens, allowed where the state accepts
    Returns [n, ceil(vocab/32)], int32, token i being bit i % 32 of word i // 32.
    The op `anabranch::automaton_mask`: Triton on a GPU, `automaton_mask_torch` on a CPU.
    Raises ValueError for shapes and dtypes other than these.
    Law: equals `Automaton.mask(state, left)` of runtime/automata.py over that automaton's `tables`.
    """
    if next_state.dim() != 2 or next_state.dtype != torch.int32 or not next_state.is_contiguous():
        raise ValueError(f"next_state is int32 [states, vocab], not {next_state.dtype} {list(next_state.shape)}")
    states, n = next_state.shape[0], state.shape[0]
    if not states or not next_state.shape[1]:
        raise ValueError("an automaton has a state, and its vocabulary a token")
    for name, tensor, shape, dtype in (
        ("distance", distance, (states,), torch.int32),
        ("accepting", accepting, (states,), torch.bool),
        ("state", state, (n,), torch.int32),
        ("left", left, (n,), torch.int32),
        ("end_tokens", end_tokens, (end_tokens.numel(),), torch.int64),
    ):
        _check(name, tensor, shape, dtype, next_state.device)
    mask: Tensor = _automaton_mask(next_state, distance, accepting, state, left, end_tokens)
    return mask


def automaton_mask_torch(
    next_state: Tensor, distance: Tensor, accepting: Tensor, state: Tensor, left: Tensor, end_tokens: Tensor
) -> Tensor:
    """The definition of `automaton_mask`."""
    vocab = next_state.shape[1]
    at = state.clamp(min=0).long()
    target = next_state[at]
    reach = (left - 1).clamp(max=UNREACHED - 1)
    allowed = (target >= 0) & (distance[target.clamp(min=0).long()] <= reach[:, None])
    allowed[:, end_tokens] |= accepting[at][:, None]
    padded = torch.nn.functional.pad(allowed, (0, -vocab % 32))
    bits = padded.view(len(state), padded.shape[1] // 32, 32).long() << torch.arange(32, device=state.device)
    # The sum is a uint32; bit 31 is the sign of the word.
    words = bits.sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    return torch.where(state[:, None] < 0, -1, words)


@define_op("anabranch::automaton_mask")
def _automaton_mask(
    next_state: Tensor, distance: Tensor, accepting: Tensor, state: Tensor, left: Tensor, end_tokens: Tensor
) -> Tensor:
    if takes_torch(state):
        return automaton_mask_torch(next_state, distance, accepting, state, left, end_tokens)
    from anabranch.kernels import sample_device_triton as on_gpu

    mask = _fake_mask(next_state, distance, accepting, state, left, end_tokens)
    kernel = wrap(on_gpu.automaton_mask_kernel)
    on_gpu.launch_automaton_mask(kernel, next_state, distance, accepting, state, left, end_tokens, mask)
    return mask


def _fake_mask(
    next_state: Tensor, distance: Tensor, accepting: Tensor, state: Tensor, left: Tensor, end_tokens: Tensor
) -> Tensor:
    return state.new_empty((state.shape[0], (next_state.shape[1] + 31) // 32), dtype=torch.int32)


_automaton_mask.register_fake(_fake_mask)
