"""The attention operations against their plain definition."""

import pytest
import torch

from anabranch.kernels.merge_states import merge_states
from anabranch.kernels.segment_attention import attend_causal, attend_shared, attend_tails, attention_torch

HEADS = [(1, 1), (4, 4), (9, 3), (10, 2)]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def _random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 40), (5, 1), (7, 33)])
def test_shared_is_masked_attention(heads: tuple[int, int], rows: int, keys: int, dtype: torch.dtype) -> None:
    """Rows that all see one run, with and without a mask, get what the definition gives."""
    q = _random(rows, heads[0], 16, dtype=dtype, seed=0)
    k, v = _random(heads[1], keys, 16, dtype=dtype, seed=1), _random(heads[1], keys, 16, dtype=dtype, seed=2)
    visible = torch.ones(rows, keys, dtype=torch.bool)
    visible[:, keys // 3 : keys // 2] = False
    for seen in (torch.ones_like(visible), visible):
        mask = None if seen.all() else torch.zeros(rows, keys, dtype=dtype).masked_fill(~seen, float("-inf"))
        found = attend_shared(q, k, v, scale=0.3, mask=mask)
        for a, b in zip(found, attention_torch(q, k, v, seen, scale=0.3), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (6, 6), (3, 20)])
def test_causal_hides_later_rows(heads: tuple[int, int], rows: int, keys: int, dtype: torch.dtype) -> None:
    """The newest rows of a segment see what stands before them and themselves."""
    q = _random(rows, heads[0], 16, dtype=dtype, seed=3)
    k, v = _random(heads[1], keys, 16, dtype=dtype, seed=4), _random(heads[1], keys, 16, dtype=dtype, seed=5)
    visible = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    found = attend_causal(q, k, v, scale=0.3)
    for a, b in zip(found, attention_torch(q, k, v, visible, scale=0.3), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("heads", HEADS)
def test_tails_do_not_read_their_padding(heads: tuple[int, int]) -> None:
    """Each row sees its own keys alone, whatever stands in the padding."""
    lengths = [1, 5, 12]
    q = _random(3, heads[0], 16, dtype=torch.float64, seed=6)
    k, v = (_random(3, heads[1], 12, 16, dtype=torch.float64, seed=s) for s in (7, 8))
    mask = torch.zeros(3, 12, dtype=torch.float64)
    for row, length in enumerate(lengths):
        mask[row, length:] = float("-inf")
        k[row, :, length:] = 1e6
        v[row, :, length:] = 1e6
    out, lse = attend_tails(q, k, v, mask, scale=0.3)
    for row, length in enumerate(lengths):
        seen = torch.ones(1, length, dtype=torch.bool)
        expected = attention_torch(q[row : row + 1], k[row, :, :length], v[row, :, :length], seen, scale=0.3)
        torch.testing.assert_close(out[row : row + 1], expected[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(lse[row : row + 1], expected[1], rtol=0, atol=1e-12)


def test_merged_parts_are_the_whole() -> None:
    """Attention over three parts, merged in any order, is attention over their union; -inf is the unit."""
    q = _random(4, 6, 16, dtype=torch.float64, seed=9)
    k, v = (_random(2, 30, 16, dtype=torch.float64, seed=s) for s in (10, 11))
    whole, _ = attention_torch(q, k, v, torch.ones(4, 30, dtype=torch.bool), scale=0.3)
    parts = [attend_shared(q, k[:, a:b], v[:, a:b], scale=0.3) for a, b in ((0, 7), (7, 8), (8, 30))]
    parts.append((torch.zeros_like(parts[0][0]), torch.full_like(parts[0][1], float("-inf"))))
    for order in ((0, 1, 2, 3), (3, 2, 0, 1)):
        out = torch.stack([parts[i][0] for i in order], dim=1)
        lse = torch.stack([parts[i][1] for i in order], dim=1)
        torch.testing.assert_close(merge_states(out, lse), whole, rtol=0, atol=1e-12)
    one = merge_states(parts[1][0][:, None], parts[1][1][:, None])
    torch.testing.assert_close(one, parts[1][0], rtol=0, atol=1e-15)
