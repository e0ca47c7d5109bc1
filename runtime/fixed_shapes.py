"""Which shapes this machine's kernels compute alike, for a mode in which a row's bits depend on nothing beside it.

A matrix product may sum a row's terms in another order when it has another number of rows. How many rows agree is a
property of the library, the processor and the shapes, so it is measured on the model's own shapes: calls are padded to
sizes that were seen to give every row, at every place, the bits that it has in the largest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anabranch.dsl.diagnostics import Diagnostic, PlanError
from anabranch.kernels.merge_states import fold_, sum_parts_, weigh_parts
from anabranch.kernels.rope import rope_table, rotate
from anabranch.kernels.segment_attention import attend_parts

if TYPE_CHECKING:
    from anabranch.runtime.model import Decoder

PART = 64
"""Keys of a part. On SmolLM2's heads, 32 rows and one thread (AMD EPYC, Zen 5) the attention of a layer took, in ms:

    PART                               32    64   128   256   one call
    1,024 keys that all rows share   1.16  0.96  0.86  0.81       0.80
    a part that each row has alone   0.11  0.20  0.37  0.73

A row's last part is padded to a whole one and copied, so that a large part costs as much as several small ones."""

# Sizes that are tried, each a row count of one call; what is above the largest is computed in several calls. Close
# together where a call is cheap: a row of padding costs as much as any other.
LAYER_ROWS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
LOGIT_ROWS = (2, 4, 8, 16, 32, 64)
QUERY_BLOCK = 32
"""Queries that the flash kernel for CPUs takes at a time while there are fewer than 192 in all."""


@dataclass(frozen=True, slots=True)
class FixedShapes:
    """Sizes of calls, each ascending, that agree with one another bit for bit.

    layer_rows: rows of the linears and norms of a layer
    logit_rows: rows of the last norm and the LM head
    queries: queries of one KV head in a block of attention; the last is QUERY_BLOCK
    num_threads: threads of torch for which that was found
    """

    layer_rows: tuple[int, ...]
    logit_rows: tuple[int, ...]
    queries: tuple[int, ...]
    num_threads: int

    def pad_queries(self, count: int) -> int:
        """The least number of queries, at least `count`, that whole blocks and one of a fixed size make up."""
        whole, rest = divmod(count, QUERY_BLOCK)
        return whole * QUERY_BLOCK + (next(size for size in self.queries if size >= rest) if rest else 0)


def tiles(count: int, sizes: Sequence[int]) -> list[int]:
    """Sizes of calls, out of `sizes` (ascending), that together hold `count` rows."""
    largest = sizes[-1]
    whole, rest = divmod(count, largest)
    return [largest] * whole + ([next(size for size in sizes if size >= rest)] if rest else [])


@torch.no_grad()
def find_fixed_shapes(decoder: Decoder) -> FixedShapes:
    """Measure, with random numbers, on the shapes of `decoder` and with the threads that torch has now.

    Raises PlanError `not-deterministic` if no size of some call gives a row the same bits at every place.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(decoder.dtype)

    _check_elementwise(random, decoder)
    hidden = random(_DISTINCT, decoder.config.hidden_size)
    return FixedShapes(
        _agreeing("a layer", LAYER_ROWS, hidden, decoder.probe_layer),
        _agreeing("the LM head", LOGIT_ROWS, hidden, decoder.probe_head),
        _agreeing_queries(random, decoder),
        torch.get_num_threads(),
    )


# Rows of a call are these many, in turn. A prime, so that in a large call each of them stands at every place of a tile.
_DISTINCT = 7


def _agreeing(what: str, sizes: Sequence[int], rows: Tensor, call: Callable[[Tensor], Tensor]) -> tuple[int, ...]:
    """The sizes that agree with the largest one which agrees with itself."""
    found: list[int] = []
    expected: Tensor | None = None
    for size in reversed(sizes):
        place = torch.arange(size) % _DISTINCT
        if expected is not None:
            if torch.equal(call(rows[place]), expected[place]):
                found.append(size)
            continue
        # In a call of fewer rows than there are, they take turns.
        turns = [place] if size > _DISTINCT else [(place + shift) % _DISTINCT for shift in range(_DISTINCT)]
        outs = [call(rows[turn]) for turn in turns]
        first = outs[0][:_DISTINCT] if size > _DISTINCT else torch.stack([out[0] for out in outs])
        if all(torch.equal(out, first[turn]) for out, turn in zip(outs, turns, strict=True)):
            expected = first
            found.append(size)
    if not found:
        raise _refused(what)
    return tuple(reversed(found))


def _agreeing_queries(random: Callable[..., Tensor], decoder: Decoder) -> tuple[int, ...]:
    """Sizes of a block of queries that agree, for parts apart and together, masked and not."""
    config = decoder.config
    kv_heads, dim, scale = config.num_kv_heads, config.head_dim, config.head_dim**-0.5
    parts = 3
    k, v = (random(kv_heads, parts, PART, dim).transpose(0, 1) for _ in range(2))
    q = random(1, kv_heads, QUERY_BLOCK, dim)
    mask = torch.zeros(1, QUERY_BLOCK, PART, dtype=q.dtype)
    mask.masked_fill_(torch.arange(PART)[None, None] > torch.arange(1, QUERY_BLOCK + 1)[None, :, None], float("-inf"))

    def states(first: int, size: int, *, hide: bool, apart: bool) -> list[Tensor]:
        rows = q[:, :, first : first + size].contiguous()
        hidden = mask[:, first : first + size] if hide else None
        if apart:
            calls = [attend_parts(rows, k[i : i + 1], v[i : i + 1], scale=scale, mask=hidden) for i in range(parts)]
            return [torch.cat([call[side] for call in calls]) for side in (0, 1)]
        wide = None if hidden is None else hidden.expand(parts, size, PART)
        return list(attend_parts(rows.expand(parts, kv_heads, size, dim), k, v, scale=scale, mask=wide))

    whole = {hide: states(0, QUERY_BLOCK, hide=hide, apart=False) for hide in (False, True)}

    def agrees(size: int) -> bool:
        for first in {0, (QUERY_BLOCK - size) // 2, QUERY_BLOCK - size}:
            for hide, expected in whole.items():
                for apart in (False, True):
                    found = states(first, size, hide=hide, apart=apart)
                    if not all(
                        torch.equal(a, b[:, :, first : first + size]) for a, b in zip(found, expected, strict=True)
                    ):
                        return False
        return True

    rolled = attend_parts(q.roll(5, 2), k[:1], v[:1], scale=scale)[0].roll(-5, 2)
    found = [size for size in range(1, QUERY_BLOCK + 1) if agrees(size)]
    if QUERY_BLOCK not in found or not torch.equal(rolled, whole[False][0][:1]):
        raise _refused("attention")
    return tuple(found)


def _check_elementwise(random: Callable[..., Tensor], decoder: Decoder) -> None:
    """Functions of one number give the same bits at any place of any run of numbers."""
    heads, dim = decoder.config.num_heads, decoder.config.head_dim
    frequencies = torch.linspace(1, 1e-4, dim // 2)
    rows = 70
    x, lse = random(rows, heads, dim), random(9, rows, heads) * 8
    positions = torch.arange(-3, rows - 3) * 97

    def all_of(first: int, stop: int) -> list[Tensor]:
        cos, sin = rope_table(frequencies, positions[first:stop], 1.0, x.dtype)
        turned = rotate(x[first:stop], cos, sin)
        weight, high = weigh_parts(lse[:, first:stop].contiguous())
        out = turned[None] * weight[..., None]
        state = [high.clone(), sum_parts_(weight.clone()).clone(), sum_parts_(out).clone()]
        fold_(state[0], state[1], state[2], high + 1, state[1] * 0.5, turned)
        return [cos, sin, turned, weight.transpose(0, 1), *state]

    whole = all_of(0, rows)
    for first, stop in ((0, 1), (1, 2), (rows - 1, rows), (3, 6), (5, 16), (0, 33), (1, rows)):
        for found, expected in zip(all_of(first, stop), whole, strict=True):
            if not torch.equal(found, expected[first:stop]):
                raise _refused("an elementwise function")


def not_deterministic(reason: str, help: str = "run without `--deterministic`") -> PlanError:
    """The error for what cannot keep a row's bits."""
    return PlanError(Diagnostic("not-deterministic", reason, help=help))


def _refused(what: str) -> PlanError:
    return not_deterministic(
        f"{what} gives a row other bits beside other rows on this machine, whatever the size of the call",
        "run without `--deterministic`, or with another build of torch or another dtype",
    )
