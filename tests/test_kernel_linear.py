"""The Triton kernel of the fixed linear in Triton's interpreter, against its torch definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreter import INTERPRETED, interpreted, run_in_interpreter, starts_interpreter
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from anabranch.kernels.fixed_linear import BLOCK_ROWS, fixed_linear, fixed_linear_torch

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3}
SENTINEL = 1234.5


@starts_interpreter
def test_in_the_interpreter() -> None:
    """Every test below that needs the interpreter passes in it."""
    run_in_interpreter(__file__)


def make(num_rows: int, num_in: int, num_out: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weight and bias, the first two followed in memory by NaN: past a row's end, and past the last row."""
    generator = torch.Generator().manual_seed(num_rows + num_in)
    x, weight = (
        torch.full((size + 2, num_in + 16), float("nan"), dtype=dtype)[:size, :num_in] for size in (num_rows, num_out)
    )
    for one in (x, weight):
        one.copy_(torch.randn(one.shape, generator=generator) * max(num_in, 1) ** -0.25)
    bias = torch.full((num_out + 16,), float("nan"), dtype=dtype)
    bias[:num_out] = torch.randn(num_out, generator=generator)
    return x, weight, bias[:num_out]


def run_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, block_m: int = 16) -> Tensor:
    """The kernel, launched on a part of a buffer of sentinels, the rest of which must survive."""
    from anabranch.kernels.fixed_linear_triton import fixed_linear_kernel, launch_fixed_linear

    rows, size = x.shape[0], weight.shape[0]
    out = torch.full((rows + 1, size + 3), SENTINEL, dtype=x.dtype)
    launch_fixed_linear(fixed_linear_kernel, x, weight, bias, out[:rows, :size], block_m=block_m)
    past = torch.tensor(SENTINEL).to(x.dtype)
    assert (out[rows] == past).all() and (out[:, size:] == past).all()
    return out[:rows, :size]


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_m", BLOCK_ROWS)
@pytest.mark.parametrize(
    ("num_rows", "num_in", "num_out"),
    [(1, 1, 1), (0, 64, 32), (3, 0, 5), (1, 128, 32), (17, 200, 33), (40, 320, 7), (5, 63, 100)],
)
def test_sizes(num_rows: int, num_in: int, num_out: int, block_m: int, dtype: torch.dtype) -> None:
    """One element, none, whole tiles and sizes that fill no tile, with and without a bias."""
    x, weight, bias = make(num_rows, num_in, num_out, dtype)
    for one in (bias, None):
        found, expected = run_kernel(x, weight, one, block_m), fixed_linear_torch(x, weight, one, block_m)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@interpreted
def test_every_element_shows() -> None:
    """A change of one element of a row, the weight or the bias shows in all that depend on it, and nowhere else."""
    x, weight, bias = make(3, 70, 37)
    before = run_kernel(x, weight, bias)
    for place in (0, 31, 63, 64, 69):
        other = x.clone()
        other[1, place] += 1
        after = run_kernel(other, weight, bias)
        assert (after[1] != before[1]).all() and torch.equal(after[[0, 2]], before[[0, 2]])
    for row in (0, 31, 32, 36):
        others = weight.clone(), bias.clone()
        others[0][row, 69] += 1
        others[1][row] += 1
        for changed in (run_kernel(x, others[0], bias) != before, run_kernel(x, weight, others[1]) != before):
            assert changed[:, row].all() and changed.sum() == 3


def product(a: NDArray[np.float32], b: NDArray[np.float32], dtype: DTypeLike) -> NDArray[np.float32]:
    """Matrix product whose sums go in order: those of a BLAS depend on a row's place."""
    total = np.zeros((a.shape[0], b.shape[1]), dtype)
    for inner in range(a.shape[1]):
        total += a[:, inner, None] * b[inner]
    return total


@interpreted
@pytest.mark.parametrize(("block_m", "dtype"), [(16, torch.float32), (32, torch.float32), (16, torch.float16)])
def test_a_row_has_the_same_bits_in_any_company(
    block_m: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's bits are the same alone and at every place among 2, 7, 16, 17 and 40, one of which is NaN."""
    shapes = []

    def watched(a: NDArray[np.float32], b: NDArray[np.float32], dtype: DTypeLike) -> NDArray[np.float32]:
        shapes.append((a.shape, b.shape))
        return product(a, b, dtype)

    monkeypatch.setattr("numpy.matmul", watched)
    others, weight, bias = make(41, 150, 35, dtype)
    row = others[40]
    alone = run_kernel(row[None], weight, bias, block_m)[0]
    for num_rows in (2, 7, 16, 17, 40):
        for place in range(num_rows):
            x = others[:num_rows].clone()
            x[(place + 1) % num_rows] = float("nan")
            x[place] = row
            assert torch.equal(run_kernel(x, weight, bias, block_m)[place], alone)
    # One shape of product, so one matrix instruction, whatever the rows.
    assert len(set(shapes)) == 1


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is no matter for the operator's registration")
def test_the_op_is_well_made() -> None:
    """opcheck finds nothing wrong with schema, fake and tracing, and the op gives what the definition gives."""
    x, weight, bias = make(5, 24, 9)
    for one in (bias, None):
        torch.library.opcheck(torch.ops.anabranch.fixed_linear.default, (x, weight, one, 16))
        assert torch.equal(fixed_linear(x, weight, one), fixed_linear_torch(x, weight, one, 16))
    torch.testing.assert_close(fixed_linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert fixed_linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16


def test_what_is_not_supported_is_named() -> None:
    """A wrong shape, type, layout or tile is refused by name."""
    x, weight, bias = make(5, 24, 9)
    with pytest.raises(ValueError, match="do not go with a weight"):
        fixed_linear(x[:, :8], weight)
    with pytest.raises(ValueError, match="a bias of"):
        fixed_linear(x, weight, bias[:8])
    with pytest.raises(ValueError, match="share one type"):
        fixed_linear(x, weight.half())
    with pytest.raises(ValueError, match="share one type"):
        fixed_linear(x.double(), weight.double())
    with pytest.raises(ValueError, match="contiguous"):
        fixed_linear(x.t().contiguous().t(), weight)
    with pytest.raises(ValueError, match="block_m=64"):
        fixed_linear(x, weight, block_m=64)
