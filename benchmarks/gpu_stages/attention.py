"""Decode attention, kernels and merge, against what else there is: cold, inside one graph, in bf16.

*counted* is the bytes that the tasks read and write (K and V, partial states, q and o) in the time that was measured,
as a share of the bandwidth of a large copy; *unique* is the bytes of K and V that there are, each once. Peers work on
the same values: SDPA with one attention a branch over a copy of its own of all that it sees, FlexAttention over all
keys under a mask, and FlashInfer's cascade over the very pages, where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from bytes import PAGE_SIZE, Shape, count, fasttree, hydragen, others, planned, tile
from torch import Tensor

from anabranch.kernels.merge_states import merge_parts
from anabranch.kernels.segment_attention import segment_attention
from anabranch.runtime.task_plan import Row
from gpu_stages.log import Figures, Log
from gpu_stages.timing import Time, cold_buffers, copy_bandwidth, measure, measure_eagerly
from gpu_stages.trees import LISTS

DTYPE = torch.bfloat16
TAIL = 64
"""Tokens of each branch's own, as in benchmarks/bytes.py."""
TOLERANCE = 0.06
MOST_OF_MEMORY = 0.4
"""Of what is free, for the copies that one attention a branch needs."""


def run(log: Log) -> None:
    """Ours for all shapes first, those of the targets before the others; then each peer."""
    ours, compared = shapes(log.small)
    copied = log.case("copy", lambda: {"bytes_s": copy_bandwidth(log.device, log.small)})["bytes_s"]
    for shape in ours:
        log.case(label(shape), partial(own, log.device, shape, copied))
    targets(log, ours)
    peers = {"SDPA": sdpa, "FlexAttention": flex}
    if find_spec("flashinfer") is not None:
        peers["FlashInfer"] = cascade
    else:
        log.headlines["FlashInfer"] = "not installed"
    for peer, call in peers.items():
        for shape in compared:
            log.case(f"{label(shape)}, {peer}", partial(beside, log.device, shape, call, log.rows[label(shape)]["us"]))


def label(shape: Shape) -> str:
    """Of a case."""
    return f"{shape.name}, {shape.heads[0]}/{shape.heads[1]}"


def shapes(small: bool) -> tuple[list[Shape], list[Shape]]:
    """All, and those that peers are tried on."""
    if small:
        tiny = [Shape(f"8B {prefix} x {n}", (1, n), (prefix, 5), (4, 2), 64) for prefix in (64, 40) for n in (1, 3)]
        return [*tiny, Shape("FastTree tiny", (1, 2, 4), (33, 20, 3), (4, 4), 64)], tiny[1:2]
    eight = [
        Shape(f"8B {prefix} x {n}", (1, n), (prefix, TAIL), (32, 8))
        for prefix in (32768, 8192, 2048)
        for n in (16, 1, 64, 4, 2, 8, 32)
    ]
    cascades = [shape for shape in others() if not shape.name.startswith("8B")]
    compared = [shape for shape in eight if shape.nodes[-1] in (1, 16, 64)]
    return [*eight, *cascades, *hydragen(), *fasttree()], [*compared, *cascades]


def targets(log: Log, ours: list[Shape]) -> None:
    """At the longest prefix; at the next one for information."""
    eight = [shape for shape in ours if shape.name.startswith("8B")]
    for prefix in sorted({shape.tokens[0] for shape in eight})[::-1][:2]:
        of = {shape.nodes[-1]: log.rows[label(shape)] for shape in eight if shape.tokens[0] == prefix}
        many = 16 if 16 in of else max(of)
        figures = (of[many]["counted"], of[many]["unique"], of[many]["us"] / of[1]["us"])
        if prefix == eight[0].tokens[0]:
            log.target(f"attention, {prefix} x {many}: all bytes, of a copy", figures[0], "at least", 0.8)
            log.target(f"attention, {prefix} x {many}: unique KV, of a copy", figures[1], "at least", 0.65)
            log.target(f"attention, {prefix}: {many} branches to 1", figures[2], "at most", 1.3)
        else:
            log.headlines[f"{prefix} x {many}: all bytes, unique KV, {many} branches to 1"] = figures


@dataclass
class Case:
    """One shape on the device. pools: (K, V) that calls rotate over; call: ours over one of them."""

    shape: Shape
    rows: list[Row]
    q: Tensor
    pools: list[tuple[Tensor, Tensor]]
    call: Callable[[Tensor, Tensor], Tensor]
    counted: int
    unique: int


def case_of(device: torch.device, shape: Shape) -> Case:
    """Random keys and values, and the planner's lists for them. Angles are 0, so that peers need no rotation."""
    rows, lists, plan = planned(shape)
    counts = count(shape, rows, lists, plan)
    num_heads, num_kv_heads = shape.heads
    num_pages = rows[0].segment.pool.num_pages
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=DTYPE, device=device, generator=generator)

    pool = (num_pages, num_kv_heads, PAGE_SIZE, shape.head_dim)
    pools = [(random(*pool), random(*pool)) for _ in range(cold_buffers(counts.unique, device))]
    q = random(len(rows), num_heads, shape.head_dim)
    positions = torch.full((len(rows),), sum(shape.tokens) - 1, dtype=torch.int32, device=device)
    cos = torch.ones(sum(shape.tokens), shape.head_dim // 2, device=device)
    sin = torch.zeros_like(cos)
    on_device = [torch.from_numpy(getattr(lists, name)).to(device) for name in LISTS]
    lengths = torch.tensor([row.segment.length for row in rows], dtype=torch.int32, device=device)
    indptr = torch.from_numpy(lists.row_parts_indptr[: len(rows) + 1]).to(device)
    row_parts = torch.from_numpy(lists.row_parts).to(device)

    def call(k: Tensor, v: Tensor) -> Tensor:
        out, lse = segment_attention(
            q, positions, k, v, cos, sin, *on_device, lengths, num_parts=plan.parts, scale=shape.head_dim**-0.5,
            block_m=tile(shape),
        )  # fmt: skip
        return merge_parts(out, lse, indptr, row_parts, DTYPE)[0]

    return Case(shape, rows, q, pools, call, counts.read + counts.partial + counts.other, counts.unique)


def own(device: torch.device, shape: Shape, copied: float) -> Figures:
    """Ours."""
    case = case_of(device, shape)
    time = measure([partial(case.call, k, v) for k, v in case.pools], device)
    return {
        "us": time.median_s * 1e6, "least_us": time.least_s * 1e6, "counted": case.counted / time.median_s / copied,
        "unique": case.unique / time.median_s / copied, "unique_mib": case.unique / 2**20, "buffers": len(case.pools),
        "block_m": tile(shape),
    }  # fmt: skip


Peer = Callable[[Case], list[Callable[[], Tensor]]]


class NotHere(Exception):
    """A peer cannot do this shape here."""


def beside(device: torch.device, shape: Shape, peer: Peer, ours_us: float) -> Figures:
    """A peer's time, and how far its results are from ours; what keeps it from running is no failure of ours."""
    try:
        case = case_of(device, shape)
        calls = peer(case)
        found = calls[0]()
        time = attempt(calls, device)
    except NotHere as reason:
        return {"skipped": str(reason)}
    except Exception as error:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return {"skipped": f"{type(error).__name__}: {str(error)[:200]}"}
    off = float((found.view_as(case.q).float() - case.call(*case.pools[0]).float()).abs().max())
    figures: Figures = {
        "us": time.median_s * 1e6, "to_ours": time.median_s * 1e6 / ours_us, "off": off, "captured": time.captured,
    }  # fmt: skip
    return figures | ({} if off <= TOLERANCE else {"error": f"differs from ours by {off:.3g}"})


def attempt(calls: list[Callable[[], Tensor]], device: torch.device) -> Time:
    """In a graph, or eagerly where this version of a peer cannot be captured."""
    try:
        return measure(calls, device)
    except RuntimeError:
        return measure_eagerly(calls, device)


def slots(row: Row) -> Tensor:
    """The pool slots that a row sees, in order."""
    chain = [] if row.view is None else row.view.chain()
    segments = [*(entry.segment for link in chain for entry in link.entries), row.segment]
    return torch.cat([torch.arange(first, stop) for segment in segments for first, stop in segment.runs()])


def gathered(pool: Tensor, index: Tensor) -> Tensor:
    """[num_kv_heads, len(index), head_dim] of `pool`, contiguous."""
    return pool.transpose(1, 2).reshape(-1, pool.shape[1], pool.shape[3])[index].transpose(0, 1).contiguous()


def sdpa(case: Case) -> list[Callable[[], Tensor]]:
    """One attention a branch, each over its own copy of the prefix."""
    device = case.q.device
    index = torch.stack([slots(row) for row in case.rows]).to(device)
    each = 2 * index.numel() * case.shape.heads[1] * case.shape.head_dim * DTYPE.itemsize
    copies = min(len(case.pools), cold_buffers(each, device))
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] * MOST_OF_MEMORY
        if copies * each > free:
            raise NotHere(f"{copies * each / 2**30:.0f} GiB of copies")
    q = case.q[:, :, None]

    def call(k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0]

    pairs = [
        tuple(torch.stack([gathered(pool, row) for row in index]) for pool in case.pools[number])
        for number in range(copies)
    ]
    return [partial(call, k, v) for k, v in pairs]


def two_levels(case: Case) -> tuple[int, int, Tensor]:
    """(tokens of the prefix, of each tail, slots of the prefix and then of all tails)."""
    if len(case.shape.tokens) != 2:
        raise NotHere("more than two levels")
    prefix, tail = case.shape.tokens
    tails = [slots(row)[prefix:] for row in case.rows]
    return prefix, tail, torch.cat([slots(case.rows[0])[:prefix], *tails])


def flex(case: Case) -> list[Callable[[], Tensor]]:
    """All keys in one run; a mask hides the tails of other branches."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = case.q.device
    prefix, tail, index = two_levels(case)
    index = index.to(device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < prefix) | ((key - prefix) // tail == query)

    mask = create_block_mask(visible, None, None, len(case.rows), len(index), device=str(device))
    # Or the shapes before this one would count towards the limit of compiled variants.
    torch.compiler.reset()
    # Eagerly it makes all scores, which is for tiny sizes alone.
    attend: Any = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
    q = case.q.transpose(0, 1)[None].contiguous()

    def call(k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = attend(q, k, v, block_mask=mask, enable_gqa=True)
        return found[0].transpose(0, 1).contiguous()

    pairs = [(gathered(k, index)[None], gathered(v, index)[None]) for k, v in case.pools]
    return [partial(call, k, v) for k, v in pairs]


def cascade(case: Case) -> list[Callable[[], Tensor]]:
    """FlashInfer's two levels over the same pages (its layout HND is ours)."""
    import flashinfer

    device = case.q.device
    prefix, tail, _ = two_levels(case)
    num_heads, num_kv_heads = case.shape.heads
    [shared] = {id(row.view): row.view for row in case.rows}.values()
    assert shared is not None
    shared_pages = [page for link in shared.chain() for entry in link.entries for page in entry.segment.pages]
    own_pages = [row.segment.pages[: row.segment.num_pages] for row in case.rows]

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    rows = len(case.rows)
    bounds = [0]
    for pages in own_pages:
        bounds.append(bounds[-1] + len(pages))
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "HND")
    wrapper.plan(
        [ints([0, rows]), ints(list(range(rows + 1)))],
        [ints([0, len(shared_pages)]), ints(bounds)],
        [ints(shared_pages), ints([page for pages in own_pages for page in pages])],
        [ints([(prefix - 1) % PAGE_SIZE + 1]), ints([(tail - 1) % PAGE_SIZE + 1] * rows)],
        num_heads, num_kv_heads, case.shape.head_dim, PAGE_SIZE, q_data_type=DTYPE,
    )  # fmt: skip
    return [partial(wrapper.run, case.q, pool) for pool in case.pools]
