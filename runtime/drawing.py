"""One token for each of several gens, by the host's draw or by the device's op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.kernels.sample import draw, logprob
from anabranch.kernels.sample_device import sample
from anabranch.runtime.tasks import Draw


@dataclass(frozen=True, slots=True)
class DrawRow:
    """What one token is drawn from.

    logits: [num_logits]; mask: packed int32 [ceil(num_logits / 32)], None if every token is allowed
    drawn: how many tokens its thread drew before; drawn_ids: those that penalties apply to
    """

    request: Draw
    logits: Tensor
    mask: Tensor | None
    drawn: int
    drawn_ids: Sequence[int]


def draw_rows(rows: Sequence[DrawRow]) -> list[tuple[int, float]]:
    """The token of each row, and its log-probability where that is wanted (else 0): on the host.

    At least one row. Raises ValueError for logits that are not finite.
    """
    logits = torch.stack([row.logits for row in rows]).float()
    repetition, presence = _penalties(rows)
    penal = has_penalties(rows)
    seen = [torch.tensor(row.drawn_ids, dtype=torch.int64) for row in rows] if penal else ()
    tokens = draw(
        logits,
        temperature=_column(rows, "temperature", torch.float32),
        top_k=_column(rows, "top_k", torch.int64),
        top_p=_column(rows, "top_p", torch.float32),
        min_p=_column(rows, "min_p", torch.float32),
        keys=_keys(rows),
        index=_index(rows),
        mask=_masks(rows),
        repetition_penalty=repetition if penal else None,
        presence_penalty=presence if penal else None,
        seen=seen,
        drawn=seen,
    )
    found = [(token, 0.0) for token in tokens.tolist()]
    wants = [place for place, row in enumerate(rows) if row.request.wants_logprobs]
    if wants:
        index = torch.tensor(wants)
        for place, log in zip(wants, logprob(logits[index], tokens[index]).tolist(), strict=True):
            found[place] = found[place][0], log
    return found


def draw_rows_on_device(rows: Sequence[DrawRow]) -> list[tuple[int, float]]:
    """`draw_rows` where the logits are on a device."""
    logits = torch.stack([row.logits for row in rows]).float()
    where = logits.device

    def sent(host: Tensor) -> Tensor:
        return upload(host, where)

    mask = _masks(rows)
    penal = has_penalties(rows)
    seen = torch.stack([bitmap(row.drawn_ids, logits.shape[1]) for row in rows]) if penal else None
    repetition, presence = _penalties(rows)
    tokens, logs = sample(
        logits,
        sent(_column(rows, "temperature", torch.float32)),
        sent(_column(rows, "top_k", torch.int64)),
        sent(_column(rows, "top_p", torch.float32)),
        sent(_column(rows, "min_p", torch.float32)),
        sent(_keys(rows)),
        sent(_index(rows)),
        None if mask is None else sent(mask),
        None if seen is None else sent(seen),
        sent(repetition) if penal else None,
        sent(presence) if penal else None,
    )
    found = list(zip(tokens.tolist(), logs.tolist(), strict=True))
    broken = [place for place, (token, _) in enumerate(found) if token < 0]
    if broken:
        raise ValueError(f"the logits of rows {broken} are not finite")
    return found


def upload(host: Tensor, device: torch.device) -> Tensor:
    """`host` on `device`, without waiting for what the device has to do."""
    if device.type != "cuda":
        return host.to(device)
    # torch keeps a pinned block until the copies from it are done.
    return host.pin_memory().to(device, non_blocking=True)


def has_penalties(rows: Sequence[DrawRow]) -> bool:
    """Whether any row needs to know what was drawn before."""
    return any(penal(row.request) for row in rows)


def penal(request: Draw) -> bool:
    """Whether a gen needs to know what its thread drew before."""
    return request.parameters["repetition_penalty"] != 1 or request.parameters["presence_penalty"] != 0


def bitmap(tokens: Sequence[int], vocab_size: int) -> Tensor:
    """int32 [ceil(vocab_size / 32)] with the bits of `tokens`."""
    bits = torch.zeros(-(-vocab_size // 32) * 32, dtype=torch.int64)
    bits[torch.tensor(list(tokens), dtype=torch.int64)] = 1
    packed = (bits.view(-1, 32) << torch.arange(32)).sum(1)
    # Bit 31 is the sign.
    return torch.where(packed > 0x7FFFFFFF, packed - (1 << 32), packed).to(torch.int32)


def _column(rows: Sequence[DrawRow], name: str, dtype: torch.dtype) -> Tensor:
    return torch.tensor([row.request.parameters[name] for row in rows], dtype=dtype)


def _penalties(rows: Sequence[DrawRow]) -> tuple[Tensor, Tensor]:
    return _column(rows, "repetition_penalty", torch.float32), _column(rows, "presence_penalty", torch.float32)


def _keys(rows: Sequence[DrawRow]) -> Tensor:
    return torch.tensor([row.request.key for row in rows], dtype=torch.int64)


def _index(rows: Sequence[DrawRow]) -> Tensor:
    return torch.tensor([row.drawn for row in rows], dtype=torch.int64)


def _masks(rows: Sequence[DrawRow]) -> Tensor | None:
    words = next((row.mask.numel() for row in rows if row.mask is not None), None)
    if words is None:
        return None
    free = torch.full((words,), -1, dtype=torch.int32)
    return torch.stack([free if row.mask is None else row.mask for row in rows])
