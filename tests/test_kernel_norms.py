"""The Triton kernels of the residual norm and the gate in Triton's interpreter, against their torch definitions."""

from __future__ import annotations

import pytest
import torch
from interpreter import INTERPRETED, interpreted, run_in_interpreter, starts_interpreter
from torch import Tensor

from anabranch.kernels.norms import rms_norm, rms_norm_residual, rms_norm_residual_torch
from anabranch.kernels.swiglu import swiglu, swiglu_packed, swiglu_packed_torch

TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3}
SENTINEL = 1234.0


@starts_interpreter
def test_in_the_interpreter() -> None:
    """Every test below that needs the interpreter passes in it."""
    run_in_interpreter(__file__)


def strided(num_rows: int, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random rows inside wider ones, whose other columns are NaN and must not be read."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.full((num_rows, size + 7), float("nan"), dtype=dtype)
    whole[:, 3 : size + 3] = torch.randn(num_rows, size, generator=generator)
    return whole[:, 3 : size + 3]


def guarded(num_rows: int, size: int, dtype: torch.dtype) -> Tensor:
    """An output with one row more, of sentinels."""
    return torch.full((num_rows + 1, size), SENTINEL, dtype=dtype)


def run_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The kernel, on outputs that end in a sentinel, which must survive."""
    from anabranch.kernels.norms_triton import launch_rms_norm, rms_norm_kernel

    normed, hidden = (guarded(*x.shape, x.dtype) for _ in range(2))
    of_sum = None if added is None else hidden[:-1]
    launch_rms_norm(rms_norm_kernel, x, added, weight, normed[:-1], of_sum, eps=eps)
    assert (normed[-1] == SENTINEL).all() and (hidden[-1] == SENTINEL).all()
    return normed[:-1], x if added is None else hidden[:-1]


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("num_rows", "size"), [(1, 1), (3, 17), (2, 64), (5, 576), (1, 1025), (0, 32)])
def test_norm(num_rows: int, size: int, residual: bool, dtype: torch.dtype) -> None:
    """With and without a residual, on odd, empty and one-element rows of any stride."""
    x, added = (strided(num_rows, size, dtype, seed) for seed in (1, 2))
    weight = strided(1, size, dtype, 3)[0]
    found = run_norm(x, added if residual else None, weight, 1e-5)
    expected = rms_norm_residual_torch(x, added if residual else None, weight, 1e-5)
    torch.testing.assert_close(found[0], expected[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(found[1], expected[1])


@interpreted
def test_the_norm_is_of_what_is_handed_on() -> None:
    """The sum is rounded before its norm is taken, so that a later norm of the same hidden state agrees."""
    x = torch.tensor([[100.0, 1.0], [200.0, 3.0], [50.0, -1.0]], dtype=torch.float16)
    added = torch.tensor([[0.04, 0.5], [0.07, 0.25], [-0.02, 1.5]], dtype=torch.float16)
    weight = torch.ones(2, dtype=torch.float16)
    normed, hidden = run_norm(x, added, weight, 0.0)
    assert torch.equal(normed, run_norm(hidden, None, weight, 0.0)[0])
    assert torch.equal(normed, rms_norm_residual_torch(x, added, weight, 0.0)[0])


@interpreted
def test_every_number_of_a_row_shows_in_that_row_alone() -> None:
    """A change of one number of x, or of what is added, changes the norm of its whole row and of no other."""
    x, added = (strided(3, 33, torch.float32, seed) for seed in (4, 5))
    weight = torch.ones(33)
    before = run_norm(x, added, weight, 1e-5)[0]
    for column in range(33):
        for what in (x, added):
            what[1, column] += 3
            changed = run_norm(x, added, weight, 1e-5)[0] != before
            what[1, column] -= 3
            assert changed[1].all() and not changed[0].any() and not changed[2].any()


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_rows", "size"), [(1, 1), (3, 17), (2, 1024), (2, 1536), (0, 8)])
def test_gate(num_rows: int, size: int, dtype: torch.dtype) -> None:
    """The gate over a part of a block, a whole one and several; a far negative gate closes."""
    from anabranch.kernels.swiglu_triton import launch_swiglu, swiglu_kernel

    gate_up = strided(num_rows, 2 * size, dtype, 6)
    gate_up[:, 0] = -1000
    out = guarded(num_rows, size, dtype)
    launch_swiglu(swiglu_kernel, gate_up, out[:-1])
    assert (out[-1] == SENTINEL).all()
    torch.testing.assert_close(out[:-1], swiglu_packed_torch(gate_up), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert (out[:-1, 0] == 0).all()


def test_the_definitions_are_those_of_the_cpu() -> None:
    """In fp32 they give what the engine on a CPU computes; in bf16 they round once at the end."""
    x, added = (strided(4, 40, torch.float32, seed) for seed in (7, 8))
    weight = torch.rand(40)
    normed, hidden = rms_norm_residual(x, added, weight, 1e-6)
    torch.testing.assert_close(hidden, x + added, rtol=0, atol=0)
    torch.testing.assert_close(normed, rms_norm(x + added, weight, 1e-6), rtol=1e-6, atol=1e-6)
    again, same = rms_norm_residual(hidden, None, weight, 1e-6)
    assert torch.equal(again, normed) and same is hidden
    torch.testing.assert_close(swiglu_packed(x), swiglu(x[:, :20], x[:, 20:]), rtol=1e-6, atol=1e-6)
    half = x.bfloat16()
    exact = rms_norm(half.float(), weight.bfloat16().float(), 1e-6)
    assert torch.equal(rms_norm_residual(half, None, weight.bfloat16(), 1e-6)[0], exact.bfloat16())
    exact = torch.nn.functional.silu(half[:, :20].float()) * half[:, 20:].float()
    assert torch.equal(swiglu_packed(half), exact.bfloat16())


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is no matter for the operator's registration")
def test_the_ops_are_well_made() -> None:
    """opcheck finds nothing wrong with schema, fake and tracing."""
    x, added = (strided(3, 34, torch.float16, seed) for seed in (9, 10))
    weight = torch.ones(34, dtype=torch.float16)
    torch.library.opcheck(torch.ops.anabranch.rms_norm.default, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.anabranch.rms_norm_residual.default, (x, added, weight, 1e-5))
    torch.library.opcheck(torch.ops.anabranch.swiglu.default, (x,))


def test_what_is_not_supported_is_named() -> None:
    """A wrong size, type, shape or layout is refused by name before anything runs."""
    x, weight = torch.ones(3, 8), torch.ones(8)
    rms_norm_residual(x, x, weight, 1e-5)
    with pytest.raises(ValueError, match="weight is"):
        rms_norm_residual(x, x, weight[:7], 1e-5)
    with pytest.raises(ValueError, match="x and added are"):
        rms_norm_residual(x, x[:2], weight, 1e-5)
    with pytest.raises(ValueError, match="a row of 32769"):
        rms_norm_residual(torch.ones(1, 32769), None, torch.ones(32769), 1e-5)
    with pytest.raises(ValueError, match="a row of 0"):
        rms_norm_residual(torch.ones(1, 0), None, torch.ones(0), 1e-5)
    with pytest.raises(ValueError, match="share one type"):
        rms_norm_residual(x, x.half(), weight, 1e-5)
    with pytest.raises(ValueError, match="share one type"):
        rms_norm_residual(x.double(), None, weight.double(), 1e-5)
    with pytest.raises(ValueError, match="contiguous in size"):
        rms_norm_residual(x, torch.ones(8, 3).T, weight, 1e-5)
    with pytest.raises(ValueError, match="gate_up is"):
        swiglu_packed(torch.ones(2, 5))
    with pytest.raises(ValueError, match="not torch"):
        swiglu_packed(torch.ones(2, 4).double())
    with pytest.raises(ValueError, match="are contiguous"):
        swiglu_packed(torch.ones(4, 2).T)
