"""The Triton kernel of `rope_append` in Triton's interpreter, against its torch definition."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from interpreter import INTERPRETED, interpreted, run_in_interpreter, starts_interpreter
from torch import Tensor

from anabranch.kernels.norms import rms_norm
from anabranch.kernels.rope import rope_table, rotate
from anabranch.kernels.rope_append import rope_append, rope_append_torch

TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3}
SENTINEL = 1234.0


@starts_interpreter
def test_in_the_interpreter() -> None:
    """Every test below that needs the interpreter passes in it."""
    run_in_interpreter(__file__)


@dataclass(frozen=True)
class Case:
    """The rows of one step, and the pools they go to, which hold sentinels."""

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor
    slots: Tensor
    cos: Tensor
    sin: Tensor
    k_pool: Tensor
    v_pool: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float = 1e-5

    def arguments(self) -> tuple[Tensor | None, ...]:
        """Those of the op, but eps."""
        return (
            self.q, self.k, self.v, self.positions, self.slots, self.cos, self.sin, self.k_pool, self.v_pool,
            self.q_norm, self.k_norm,
        )  # fmt: skip

    def fresh(self) -> Case:
        """The same with pools of its own."""
        return replace(self, k_pool=self.k_pool.clone(), v_pool=self.v_pool.clone())


def make(
    slots: list[int], *, heads: tuple[int, int] = (6, 2), head_dim: int = 64, page_size: int = 16,
    dtype: torch.dtype = torch.float32, head_first: bool = False, norms: tuple[bool, bool] = (True, True),
) -> Case:  # fmt: skip
    """Rows that are views of one row of projections; a pool of five pages."""
    generator = torch.Generator().manual_seed(0)
    num_heads, num_kv_heads = heads
    qkv = torch.randn(len(slots), num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)
    positions = torch.randint(0, 50, (len(slots),), generator=generator, dtype=torch.int32)
    angles = torch.arange(50)[:, None] * 10000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    shape = (num_kv_heads, 5, page_size, head_dim) if head_first else (5, num_kv_heads, page_size, head_dim)
    pools = [torch.full(shape, SENTINEL, dtype=dtype) for _ in "kv"]
    if head_first:
        pools = [pool.transpose(0, 1) for pool in pools]
    weights = [torch.rand(head_dim, generator=generator).to(dtype) + 0.5 for _ in "qk"]
    return Case(
        qkv[:, :num_heads], qkv[:, num_heads : num_heads + num_kv_heads], qkv[:, num_heads + num_kv_heads :],
        positions, torch.tensor(slots, dtype=torch.int64), angles.cos(), angles.sin(), *pools,
        *(weight if there else None for weight, there in zip(weights, norms, strict=True)),
    )  # fmt: skip


def run_kernel(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and pools by the kernel; the output ends in a sentinel, which must survive."""
    from anabranch.kernels.rope_append_triton import launch_rope_append, rope_append_kernel

    case = case.fresh()
    num_rows, num_heads, head_dim = case.q.shape
    out = torch.full((num_rows + 1, num_heads, head_dim), SENTINEL, dtype=case.q.dtype)
    launch_rope_append(rope_append_kernel, *case.arguments(), out[:-1], eps=case.eps)  # type: ignore[arg-type]
    assert (out[-1] == SENTINEL).all()
    return out[:-1], case.k_pool, case.v_pool


def run_torch(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the definition."""
    case = case.fresh()
    return rope_append_torch(*case.arguments(), case.eps), case.k_pool, case.v_pool  # type: ignore[arg-type]


def expected_slots(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The same slot by slot, from the engine's own norm and rotation."""
    case = case.fresh()
    q, k = case.q.float(), case.k.float()
    if case.q_norm is not None:
        q = rms_norm(q, case.q_norm.float(), case.eps)
    if case.k_norm is not None:
        k = rms_norm(k, case.k_norm.float(), case.eps).to(case.k.dtype).float()
    size = case.k_pool.shape[2]
    half = case.q.shape[2] // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    keys = rotate(k, *rope_table(frequencies, case.positions.long(), 1.0, torch.float32))
    for row, slot in enumerate(case.slots.tolist()):
        if slot >= 0:
            case.k_pool[slot // size, :, slot % size] = keys[row].to(case.k.dtype)
            case.v_pool[slot // size, :, slot % size] = case.v[row]
    return q.to(case.q.dtype), case.k_pool, case.v_pool


SLOTS = [3, 17, -1, 79, 0, 41]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norms", [(False, False), (True, True), (True, False), (False, True)])
def test_the_definition_writes_rotated_keys(norms: tuple[bool, bool], dtype: torch.dtype) -> None:
    """The definition norms, rotates and writes as the engine's own functions do, slot by slot, and nowhere else."""
    case = make(SLOTS, norms=norms, dtype=dtype)
    for found, expected in zip(run_torch(case), expected_slots(case), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype])
    assert (run_torch(case)[1] == SENTINEL).all(-1).all(1).sum() == 80 - 5


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norms", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "head_first"),
    [((6, 2), 64, 16, False), ((5, 1), 80, 64, True), ((3, 3), 96, 128, False), ((4, 2), 128, 16, True),
     ((7, 1), 256, 16, False)],
)  # fmt: skip
def test_append(
    heads: tuple[int, int], head_dim: int, page_size: int, head_first: bool, norms: tuple[bool, bool],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Views of one row of projections, either pool layout, odd query groups; what no slot names stays as it was."""
    case = make(
        SLOTS, heads=heads, head_dim=head_dim, page_size=page_size, head_first=head_first, norms=norms, dtype=dtype
    )
    found, expected = run_kernel(case), run_torch(case)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[dtype])
    # Bits, since these are only copied.
    assert torch.equal(found[2], expected[2])
    for pool in found[1:]:
        untouched = torch.ones(5 * page_size, dtype=torch.bool)
        untouched[[slot for slot in SLOTS if slot >= 0]] = False
        pages = pool.transpose(1, 2).reshape(5 * page_size, -1)
        assert torch.equal((pages == SENTINEL).all(1), untouched)
        assert not (pages[~untouched] == SENTINEL).any()


@interpreted
def test_keys_are_rounded_between_norm_and_rotation() -> None:
    """To the bit, on whole numbers, whose squares add up to the same in any order."""
    case = make(SLOTS, dtype=torch.float16)
    case = replace(case, q=(case.q * 4).round(), k=(case.k * 4).round())
    for found, expected in zip(run_kernel(case), run_torch(case), strict=True):
        assert torch.equal(found, expected)


@interpreted
@pytest.mark.parametrize("slots", [[], [-1], [79], [-1, -1, -1]], ids=["no-rows", "no-slot", "last-slot", "no-slots"])
def test_small_sizes(slots: list[int]) -> None:
    """No rows, one, and rows that write nothing: they still get their queries."""
    case = make(slots, heads=(1, 1))
    for found, expected in zip(run_kernel(case), run_torch(case), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)


@interpreted
def test_what_is_out_of_range_stays_in_bounds() -> None:
    """A position past the table, or below it, writes NaN to its own slot; a slot past the pool is not written."""
    case = make([3, 17, 80, 79, 5])
    case.positions[:2] = torch.tensor([50, -1])
    expected = run_torch(replace(case, positions=case.positions.clamp(0, 49), slots=torch.tensor([3, 17, -1, 79, 5])))
    found = run_kernel(case)
    assert torch.isnan(found[1][0, :, 3]).all() and torch.isnan(found[1][1, :, 1]).all()
    for pool, other in zip(found[1:], expected[1:], strict=True):
        pool[0, :, 3] = other[0, :, 3]
        pool[1, :, 1] = other[1, :, 1]
        torch.testing.assert_close(pool, other, rtol=0, atol=3e-6)


@interpreted
def test_a_row_does_not_depend_on_the_others() -> None:
    """A row's bits are the same alone and among others."""
    case = make(SLOTS)
    q, k_pool, v_pool = run_kernel(case)
    for row, slot in enumerate(SLOTS):
        one = slice(row, row + 1)
        alone = replace(
            case, q=case.q[one], k=case.k[one], v=case.v[one], positions=case.positions[one], slots=case.slots[one]
        )
        q_alone, k_alone, v_alone = run_kernel(alone)
        assert torch.equal(q[row], q_alone[0])
        if slot >= 0:
            assert torch.equal(k_pool[slot // 16, :, slot % 16], k_alone[slot // 16, :, slot % 16])
            assert torch.equal(v_pool[slot // 16, :, slot % 16], v_alone[slot // 16, :, slot % 16])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is no matter for the operator's registration")
@pytest.mark.parametrize("norms", [(False, False), (True, True)])
def test_the_op_is_well_made(norms: tuple[bool, bool]) -> None:
    """opcheck finds nothing wrong with schema, mutation, fake and tracing; the op gives the definition's results."""
    case = make(SLOTS, norms=norms, head_first=True)
    torch.library.opcheck(torch.ops.anabranch.rope_append.default, (*case.fresh().arguments(), case.eps))
    used = case.fresh()
    out = rope_append(*used.arguments()[:9], q_norm=used.q_norm, k_norm=used.k_norm, eps=used.eps)  # type: ignore[arg-type]
    assert out.is_contiguous() and out.data_ptr() != case.q.data_ptr()
    for found, expected in zip((out, used.k_pool, used.v_pool), run_torch(case), strict=True):
        assert torch.equal(found, expected)


def test_what_is_not_supported_is_named() -> None:
    """A wrong head size, type, group, pool, list or layout is refused by name before anything is written."""
    case = make(SLOTS)
    q, k, v, positions, slots, cos, sin, k_pool, v_pool, norm, _ = case.arguments()
    assert norm is not None

    def call(*, norm: Tensor | None = norm, **other: Tensor) -> None:
        given = {
            "q": q, "k": k, "v": v, "positions": positions, "slots": slots, "cos": cos, "sin": sin,
            "k_pool": k_pool, "v_pool": v_pool, **other,
        }  # fmt: skip
        rope_append(**given, q_norm=norm, k_norm=norm)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="head size of 63"):
        call(q=case.q[..., :63])
    with pytest.raises(ValueError, match="do not go with"):
        call(v=case.v[:, :1])
    with pytest.raises(ValueError, match="no multiple of"):
        call(q=case.q[:, :5])
    with pytest.raises(ValueError, match="pools of"):
        call(k_pool=case.k_pool[:, :1], v_pool=case.v_pool[:, :1])
    with pytest.raises(ValueError, match="share one type"):
        call(v_pool=case.v_pool.half())
    with pytest.raises(ValueError, match="share one type"):
        call(norm=norm.double())
    with pytest.raises(ValueError, match="k_norm are"):
        call(norm=norm[:8])
    with pytest.raises(ValueError, match="contiguous in head_dim"):
        call(q=case.q.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match="positions are int32"):
        call(positions=case.positions.long())
    with pytest.raises(ValueError, match="slots are int64"):
        call(slots=case.slots.int())
    with pytest.raises(ValueError, match=r"cos and sin are \["):
        call(cos=case.cos[:, :8])
    with pytest.raises(ValueError, match="cos and sin are fp32"):
        call(cos=case.cos.double(), sin=case.sin.double())
    assert (case.k_pool == SENTINEL).all() and (case.v_pool == SENTINEL).all()
    call()
