"""Every kernel against its torch definition on the CPU, and the draw against its known answers.

Kernels are launched by their launch functions on buffers that end in a sentinel, which must survive; what must not be
read is NaN. Without a GPU the definitions stand in for the kernels, unless Triton's interpreter is on
(`TRITON_INTERPRET=1`), which has no bf16.
"""

from __future__ import annotations

import json
import os
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.kernels.fixed_linear import fixed_linear_torch
from anabranch.kernels.merge_states import merge_parts_torch
from anabranch.kernels.norms import rms_norm_residual_torch
from anabranch.kernels.rope_append import rope_append_torch
from anabranch.kernels.sample_device import automaton_mask_torch, sample_torch
from anabranch.kernels.segment_attention import HEAD_DIMS, PAGE_SIZES, segment_attention_torch, supports
from anabranch.kernels.segment_prefill import largest_block, segment_prefill_torch
from anabranch.kernels.swiglu import swiglu_packed_torch
from anabranch.runtime.device import PrefillLists
from gpu_stages.log import Figures, Log
from gpu_stages.trees import LISTS, Sizes, moved, tables, wave

VECTORS = Path(__file__).resolve().parent.parent.parent / "tests" / "data" / "draw_vectors.json"
SENTINEL = 1234.0
TOLERANCE = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}
"""On numbers of a few units: a last bit of bf16 is 0.03 there. A fault moves them by 0.1 and more."""


def run(log: Log) -> None:
    """The kernels one after another, each in every type."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    real = log.device.type == "cuda" or interpreted
    if not real:
        log.headlines["kernels"] = "not run: their definitions stood in"
    launch = Launch(log.device, real)
    # What stood in for a kernel is compared with itself, and the interpreter is silently wrong in bf16.
    for dtype in (torch.float32, torch.float16) if interpreted else (torch.float32, torch.float16, torch.bfloat16):
        kind = str(dtype)[6:]
        for check, cases in (
            (norm, NORMS), (gate, GATES), (linear, LINEARS), (append, APPENDS), (attention, ATTENTIONS),
            (prefill, PREFILLS),
        ):  # fmt: skip
            for number, case in enumerate(cases[log.small]):
                name = f"{check.__name__} {number}, {kind}"
                log.case(name, partial(verdict, partial(check, launch, dtype, case), TOLERANCE[dtype]))
    log.case("draw, known answers", partial(known_answers, launch))
    for vocab in (517,) if log.small else (517, 32000, 151936):
        log.case(f"draw, vocabulary of {vocab}", partial(drawn, launch, vocab))
    log.case("automaton_mask", partial(masks, launch, 70 if log.small else 50000))


def verdict(check: Any, tolerance: float) -> Figures:
    """`check` gives (what, the largest difference) pairs; inf where a sentinel was written over."""
    off = dict(check())
    worst = max(off.values(), default=0.0)
    figures: Figures = {"off": worst}
    if not worst <= tolerance:
        figures["error"] = f"off by more than {tolerance}: {off}"
    return figures


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest; inf where one is NaN or infinite and the other is not the same."""
    a, b = found.detach().cpu().double(), expected.double()
    if a.shape != b.shape:
        return float("inf")
    same = (a == b) | (a.isnan() & b.isnan())
    off = torch.where(same, 0.0, (a - b).abs())
    return float(off.nan_to_num(nan=float("inf")).max()) if off.numel() else 0.0


class Launch:
    """Runs a kernel on the device, or its definition where it cannot.

    Every output has one row more than it needs, of sentinels.
    """

    def __init__(self, device: torch.device, real: bool) -> None:
        self.device = device
        self.real = real

    def to(self, x: Any) -> Any:
        """A tensor on the device."""
        return moved(x, self.device)

    def guarded(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An output with its sentinel."""
        return torch.full((shape[0] + 1, *shape[1:]), SENTINEL, dtype=dtype, device=self.device)

    def survived(self, *outputs: Tensor) -> tuple[str, float]:
        """Whether the sentinels did."""
        good = all(bool((x[-1] == torch.tensor(SENTINEL, dtype=x.dtype, device=x.device)).all()) for x in outputs)
        return "sentinel", 0.0 if good else float("inf")


Pairs = list[tuple[str, float]]


def rows_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random rows inside wider ones, the rest of which is NaN."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.full((*shape[:-1], shape[-1] + 8), float("nan"), dtype=dtype)
    whole[..., : shape[-1]] = torch.randn(shape, generator=generator)
    return whole[..., : shape[-1]]


NORMS = {
    False: list(product([(0, 64), (1, 1), (5, 64), (37, 576), (3, 1000), (64, 4096), (1, 32768)], [False, True])),
    True: [((3, 80), True)],
}


def norm(launch: Launch, dtype: torch.dtype, case: tuple[tuple[int, int], bool]) -> Pairs:
    """rms_norm, with and without what is added."""
    shape, residual = case
    x, added = rows_of(shape, dtype, 1), rows_of(shape, dtype, 2) if residual else None
    weight = torch.randn(shape[1], generator=torch.Generator().manual_seed(3)).to(dtype)
    expected, hidden = rms_norm_residual_torch(x, added, weight, 1e-6)
    if not launch.real:
        return [("normed", difference(expected, expected))]
    from anabranch.kernels.norms_triton import launch_rms_norm, rms_norm_kernel

    normed, summed = (launch.guarded(*shape, dtype=dtype) for _ in range(2))
    where = summed[:-1] if residual else None
    launch_rms_norm(
        rms_norm_kernel, launch.to(x), launch.to(added), launch.to(weight), normed[:-1], where, eps=1e-6
    )  # fmt: skip
    pairs = [("normed", difference(normed[:-1], expected)), launch.survived(normed, summed)]
    return [*pairs, ("hidden", difference(summed[:-1], hidden))] if residual else pairs


GATES = {False: [(0, 64), (1, 1), (5, 127), (3, 1536), (16, 14336)], True: [(2, 33)]}


def gate(launch: Launch, dtype: torch.dtype, case: tuple[int, int]) -> Pairs:
    """swiglu."""
    both = rows_of((case[0], 2 * case[1]), dtype, 4)
    expected = swiglu_packed_torch(both)
    if not launch.real:
        return [("out", difference(expected, expected))]
    from anabranch.kernels.swiglu_triton import launch_swiglu, swiglu_kernel

    out = launch.guarded(*case, dtype=dtype)
    launch_swiglu(swiglu_kernel, launch.to(both), out[:-1])
    return [("out", difference(out[:-1], expected)), launch.survived(out)]


LINEARS = {
    False: [
        (*sizes, block_m)
        for sizes in ((0, 64, 64), (1, 1, 1), (3, 70, 33), (17, 576, 200), (64, 4096, 1024))
        for block_m in (16, 32)
    ],
    True: [(3, 70, 33, 16)],
}  # fmt: skip


def linear(launch: Launch, dtype: torch.dtype, case: tuple[int, int, int, int]) -> Pairs:
    """fixed_linear, with a bias."""
    num_rows, num_in, num_out, block_m = case
    x, weight = rows_of((num_rows, num_in), dtype, 5), rows_of((num_out, num_in), dtype, 6).mul_(num_in**-0.5)
    bias = torch.randn(num_out, generator=torch.Generator().manual_seed(7)).to(dtype)
    expected = fixed_linear_torch(x, weight, bias, block_m)
    if not launch.real:
        return [("out", difference(expected, expected))]
    from anabranch.kernels.fixed_linear_triton import fixed_linear_kernel, launch_fixed_linear

    out = launch.guarded(num_rows, num_out, dtype=dtype)
    launch_fixed_linear(
        fixed_linear_kernel, launch.to(x), launch.to(weight), launch.to(bias), out[:-1], block_m=block_m
    )
    return [("out", difference(out[:-1], expected)), launch.survived(out)]


APPENDS = {
    False: [
        (5, (4, 2), 64, 16, False, False),
        (1, (3, 1), 80, 64, True, False),
        (33, (32, 8), 96, 128, True, True),
        (64, (16, 8), 128, 16, False, False),
        (7, (9, 3), 256, 64, True, False),
    ],
    True: [(3, (3, 1), 80, 16, True, False)],
}  # fmt: skip


def append(launch: Launch, dtype: torch.dtype, case: tuple[int, tuple[int, int], int, int, bool, bool]) -> Pairs:
    """rope_append, one row of which writes nothing; all of the pools is compared."""
    num_rows, (num_heads, num_kv_heads), head_dim, page_size, norms, head_first = case
    generator = torch.Generator().manual_seed(8)
    wide = torch.randn(num_rows, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)
    q, k, v = torch.split(wide, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    num_pages = num_rows // page_size + 3
    slots = torch.randperm(num_pages * page_size, generator=generator)[:num_rows]
    slots[num_rows // 2] = -1
    positions = torch.randint(0, 5000, (num_rows,), generator=generator, dtype=torch.int32)
    cos, sin = tables(head_dim, 5000)
    weights = torch.randn(2, head_dim, generator=generator).to(dtype) if norms else (None, None)

    def pool() -> Tensor:
        made = torch.full((num_pages, num_kv_heads, page_size, head_dim), SENTINEL, dtype=dtype)
        return made.transpose(0, 1).contiguous().transpose(0, 1) if head_first else made

    k_pool, v_pool = pool(), pool()
    expected = rope_append_torch(q, k, v, positions, slots, cos, sin, k_pool, v_pool, *weights, 1e-6)
    if not launch.real:
        return [("q", difference(expected, expected))]
    from anabranch.kernels.rope_append_triton import launch_rope_append, rope_append_kernel

    out = launch.guarded(num_rows, num_heads, head_dim, dtype=dtype)
    pools = launch.to(pool()), launch.to(pool())
    launch_rope_append(
        rope_append_kernel, *map(launch.to, (q, k, v, positions, slots, cos, sin)), *pools, *map(launch.to, weights),
        out[:-1], eps=1e-6,
    )  # fmt: skip
    return [
        ("q", difference(out[:-1], expected)), ("k", difference(pools[0], k_pool)), ("v", difference(pools[1], v_pool)),
        launch.survived(out),
    ]  # fmt: skip


_GROUPS = ((4, 2), (3, 1), (32, 8), (8, 8), (5, 1))
_SIZES = [
    (dim, heads, PAGE_SIZES[(number + turn) % len(PAGE_SIZES)])
    for number, (dim, heads) in enumerate(zip(HEAD_DIMS, _GROUPS, strict=True))
    for turn in range(2)
]
"""Every head size with two page sizes: each combination is compiled, and those of all would take too long."""
ATTENTIONS = {
    False: [
        *(
            Sizes(prefix, rows, 90, heads, dim, page, stitched=3, window=window, chunk=512, head_first=dim == 96)
            for dim, heads, page in _SIZES
            for prefix, rows, window in ((133, 5, 0), (1030, 9, 70))
        ),
        Sizes(1, 1, 1, (2, 1), 64),
        Sizes(16, 1, 16, (8, 1), 64),
        Sizes(777, 3, 40, (7, 1), 128, block_m=128),
        Sizes(8192, 16, 64, (32, 8), 128, stitched=2),
        Sizes(8192, 16, 64, (32, 8), 128, block_m=16),
        Sizes(2048, 64, 64, (32, 8), 128, stitched=5),
        Sizes(4097, 17, 37, (16, 8), 128, page_size=128),
        Sizes(3001, 11, 130, (8, 2), 256, page_size=64),
    ],
    True: [Sizes(37, 3, 9, (4, 2), 64, stitched=2, chunk=32), Sizes(20, 2, 5, (3, 1), 80, window=7)],
}


def attention(launch: Launch, dtype: torch.dtype, sizes: Sizes) -> Pairs:
    """segment_attention by the planner's lists, and merge_states over what it gave."""
    case = wave(sizes, dtype)
    block_m = sizes.tile if supports(sizes.tile, sizes.head_dim, dtype) else 64
    planned, lists = case.lists(dtype)
    tables_ = [torch.from_numpy(getattr(lists, name)) for name in LISTS]
    indptr, row_parts = torch.from_numpy(lists.row_parts_indptr), torch.from_numpy(lists.row_parts)
    indptr = indptr[: sizes.rows + 1].contiguous()
    arguments = (case.q, case.positions, case.k, case.v, case.cos, case.sin, *tables_, case.lengths)
    scale = sizes.head_dim**-0.5
    out, lse = segment_attention_torch(*arguments, planned.parts, scale, sizes.window, block_m)
    merged, merged_lse = merge_parts_torch(out, lse, indptr, row_parts, dtype)
    if not launch.real:
        return [("merged", difference(merged, merged))]
    from anabranch.kernels.merge_states_triton import launch_merge_parts, merge_parts_kernel
    from anabranch.kernels.segment_attention_triton import launch_segment_attention, segment_attention_kernel

    num_heads, head_dim = sizes.heads[0], sizes.head_dim
    parts = launch.guarded(planned.parts, num_heads, head_dim, dtype=torch.float32)
    sums = launch.guarded(planned.parts, num_heads, dtype=torch.float32)
    launch_segment_attention(
        segment_attention_kernel, *map(launch.to, arguments), parts, sums, scale=scale, window=sizes.window,
        block_m=block_m,
    )  # fmt: skip
    found = launch.guarded(sizes.rows, num_heads, head_dim, dtype=dtype)
    found_lse = launch.guarded(sizes.rows, num_heads, dtype=torch.float32)
    launch_merge_parts(
        merge_parts_kernel, parts, sums, launch.to(indptr), launch.to(row_parts), found[:-1], found_lse[:-1]
    )
    seen = (lse > float("-inf"))[..., None]
    return [
        ("parts", difference(parts[:-1].cpu().where(seen, 0.0), out.where(seen, 0.0))),
        ("lse", difference(sums[:-1], lse)),
        ("merged", difference(found[:-1], merged)),
        ("merged lse", difference(found_lse[:-1], merged_lse)),
        launch.survived(parts, sums, found, found_lse),
    ]


PREFILLS = {
    False: [
        *(
            (Sizes(prefix, 3, 90, heads, dim, page, stitched=2, window=window, head_first=dim == 96), block_m)
            for dim, heads, page in _SIZES
            for prefix, window, block_m in ((133, 0, 16), (517, 0, 32), (1030, 70, 64))
        ),
        (Sizes(1, 1, 1, (2, 1), 64), 16),
        # The definition takes them row by row, which is slow.
        (Sizes(2048, 2, 200, (32, 8), 128), 64),
        (Sizes(2048, 2, 200, (32, 8), 128, page_size=128), 32),
        (Sizes(8192, 1, 90, (16, 8), 128), 64),
    ],
    True: [(Sizes(37, 3, 40, (4, 2), 64, stitched=2), 16), (Sizes(20, 2, 33, (3, 1), 80, window=7), 16)],
}


def prefill(launch: Launch, dtype: torch.dtype, case: tuple[Sizes, int]) -> Pairs:
    """segment_prefill by the executor's blocks: the newest two thirds of each thread's open segment."""
    sizes, block_m = case
    block_m = min(block_m, largest_block(sizes.head_dim, dtype))
    made = wave(sizes, dtype)
    blocks = made.blocks([max(1, 2 * row.segment.length // 3) for row in made.rows])
    firsts, positions = [], []
    for block in blocks:
        firsts.append((len(positions), block))
        positions += [block.segment.start + block.first + at for at in range(block.count)]
    plan = PrefillLists(firsts, sizes.page_size, torch.device("cpu"))
    # A row that no block names stands at the end: it must stay as it was.
    generator = torch.Generator().manual_seed(9)
    num_rows, (num_heads, _) = len(positions), sizes.heads
    q = torch.randn(num_rows + 1, num_heads, sizes.head_dim, generator=generator).to(dtype)
    arguments = (
        q, torch.tensor([*positions, 0], dtype=torch.int32), made.k, made.v, made.cos, made.sin, plan.blocks,
        plan.num_blocks, plan.spans, plan.task_pages, plan.page_start,
    )  # fmt: skip
    scale = sizes.head_dim**-0.5
    out, lse = segment_prefill_torch(*arguments, scale, sizes.window, block_m)
    if not launch.real:
        return [("out", difference(out, out))]
    from anabranch.kernels.segment_prefill_triton import launch_segment_prefill, segment_prefill_kernel

    found = launch.guarded(num_rows, num_heads, sizes.head_dim, dtype=dtype)
    sums = launch.guarded(num_rows, num_heads, dtype=torch.float32)
    launch_segment_prefill(
        segment_prefill_kernel, *map(launch.to, arguments), found, sums, scale=scale, window=sizes.window,
        block_m=block_m,
    )  # fmt: skip
    return [
        ("out", difference(found[:-1], out[:-1])), ("lse", difference(sums[:-1], lse[:-1])),
        launch.survived(found, sums),
    ]  # fmt: skip


ORDER = ("temperature", "top_k", "top_p", "min_p", "keys", "index", "mask", "seen", "repetition", "presence")


def draw_on(launch: Launch, logits: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, tuple[str, float]]:
    """`sample` by the kernels."""
    n = len(logits)
    chosen = [options.get(name) for name in ORDER]
    if not launch.real:
        return *sample_torch(logits, *chosen), ("sentinel", 0.0)
    from anabranch.kernels.sample_device_triton import launch_sample

    tokens, found = launch.guarded(n, dtype=torch.int64), launch.guarded(n, dtype=torch.float32)
    launch_sample(lambda kernel: kernel, launch.to(logits), *map(launch.to, chosen), tokens[:-1], found[:-1])
    return tokens[:-1].cpu(), found[:-1].cpu(), launch.survived(tokens, found)


def packed(bits: Tensor) -> Tensor:
    """bool [n, vocab] as int32 [n, ceil(vocab / 32)]."""
    n, vocab = bits.shape
    wide = np.zeros((n, (vocab + 31) // 32 * 32), dtype=np.uint8)
    wide[:, :vocab] = bits.numpy()
    return torch.from_numpy(np.packbits(wide, axis=-1, bitorder="little").view(np.int32))


def known_answers(launch: Launch) -> Figures:
    """tests/data/draw_vectors.json, whose outcomes no rounding can turn.

    A vector's penalties fall on two sets of tokens; here both fall on one: those where the sets differ are left out.
    """
    cases = json.loads(VECTORS.read_text(encoding="utf-8"))
    plain = [c for c in cases if (c["repetition_penalty"], c["presence_penalty"]) == (1.0, 0.0)]
    wrong = 0
    for case in plain:
        vocab, seed = case["vocab"], case["logits_seed"]
        index = np.arange(vocab, dtype=np.int64)
        residues = (index * index * 7919 + index * (2 * seed + 1) * 613 + seed) % 65521
        logits = torch.from_numpy((residues / 65521 * case["spread"] - 3).astype(np.float32))[None]
        allowed = torch.arange(vocab) % case["mask_modulus"] == case["mask_rest"]
        options = {
            "temperature": torch.tensor([case["temperature"]]), "top_k": torch.tensor([case["top_k"]]),
            "top_p": torch.tensor([case["top_p"]]), "min_p": torch.tensor([case["min_p"]]),
            "keys": torch.tensor([case["key"]]), "index": torch.tensor([case["index"]]), "mask": packed(allowed[None]),
        }  # fmt: skip
        tokens, _, (_, off) = draw_on(launch, logits, options)
        wrong += int(tokens[0]) != case["token"] or off > 0
    figures: Figures = {"vectors": len(plain), "wrong": wrong}
    return figures | ({"error": f"{wrong} of {len(plain)} vectors"} if wrong or not plain else {})


def drawn(launch: Launch, vocab: int) -> Figures:
    """Random rows under every option, against the definition: the same tokens.

    A share of the probability at the very edge of top-p may be counted otherwise on a GPU; such rows are only counted.
    """
    n = 24
    generator = torch.Generator().manual_seed(10)
    logits = torch.randn(n, vocab, generator=generator) * 4
    rows = torch.arange(n)
    options = {
        "temperature": torch.tensor([0.0, 0.7, 1.0, 1.5]).repeat(n // 4),
        "top_k": torch.tensor([0, 0, 40, 0, 5, 0]).repeat(n // 6),
        "top_p": torch.tensor([1.0, 0.9, 1.0]).repeat(n // 3),
        "min_p": torch.where(rows % 5 == 0, 0.05, 0.0),
        "keys": torch.randint(0, 1 << 32, (n, 2), generator=generator),
        "index": rows * 1001,
        "mask": packed(torch.rand(n, vocab, generator=generator) < 0.7),
        "seen": packed(torch.rand(n, vocab, generator=generator) < 0.1),
        "repetition": torch.where(rows % 2 == 0, 1.3, 1.0),
        "presence": torch.where(rows % 4 == 0, 0.4, 0.0),
    }
    expected, logprob = sample_torch(logits, *(options[name] for name in ORDER))
    tokens, found, (_, off) = draw_on(launch, logits, options)
    other = tokens != expected
    wrong = int((other & (options["top_p"] >= 1)).sum())
    figures: Figures = {"rows": n, "wrong": wrong, "at the edge of top-p": int(other.sum()) - wrong}
    figures["logprob off"] = difference(found[~other], logprob[~other])
    if wrong or off or not figures["logprob off"] < 1e-4:
        figures["error"] = "other tokens, other log-probabilities, or a sentinel that was written over"
    return figures


def masks(launch: Launch, vocab: int) -> Figures:
    """automaton_mask over random tables."""
    generator = torch.Generator().manual_seed(11)
    states, n = 9, 40
    arguments = (
        torch.randint(-4, states, (states, vocab), generator=generator, dtype=torch.int32).clamp_(min=-1),
        torch.randint(0, 6, (states,), generator=generator, dtype=torch.int32),
        torch.rand(states, generator=generator) < 0.3,
        torch.randint(-1, states, (n,), generator=generator, dtype=torch.int32),
        torch.randint(1, 8, (n,), generator=generator, dtype=torch.int32),
        torch.tensor([2, vocab - 1]),
    )  # fmt: skip
    expected = automaton_mask_torch(*arguments)
    words = expected.shape[1]
    if not launch.real:
        return {"rows": n, "wrong": 0}
    from anabranch.kernels.sample_device_triton import automaton_mask_kernel, launch_automaton_mask

    mask = launch.guarded(n, words, dtype=torch.int32)
    launch_automaton_mask(automaton_mask_kernel, *map(launch.to, arguments), mask[:-1])
    wrong = int((mask[:-1].cpu() != expected).any(dim=1).sum())
    survived = launch.survived(mask)[1] == 0
    figures: Figures = {"rows": n, "wrong": wrong}
    return figures | ({"error": f"{wrong} of {n} rows; sentinel intact: {survived}"} if wrong or not survived else {})
