"""The kernels of one model, compiled for named targets: what its steps and its draws launch on a GPU."""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch

from anabranch.kernels import (
    fixed_linear_triton,
    merge_states_triton,
    norms_triton,
    rope_append_triton,
    sample_device_triton,
    segment_attention_triton,
    segment_prefill_triton,
    swiglu_triton,
)
from anabranch.kernels.aot import TARGETS, Built, Target
from anabranch.kernels.aot_workers import build_each
from anabranch.kernels.jit import power_of_two
from anabranch.kernels.segment_prefill import largest_block
from anabranch.kernels.shipped import Config, pointer


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the kernels' constants depend on.

    num_logits: tokens that may be drawn
    windows: whether layers have a sliding window: the kinds there are
    qk_norm: whether queries and keys are normed by head
    linears: of each kind of linear, for `fixed_linear`: numbers that go in, and whether there is a bias; none where
        torch's own linears are called
    """

    dtype: torch.dtype
    head_dim: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int
    intermediate_size: int
    num_logits: int
    page_size: int
    block_m: int
    windows: tuple[bool, ...]
    qk_norm: bool
    linears: tuple[tuple[int, bool], ...]


@dataclass(frozen=True, slots=True)
class ModelKernel:
    """One kernel in one target's machine code. binary: cubin or hsaco"""

    config: Config
    target: Target
    built: Built
    binary: bytes


def model_configs(shape: ModelShape) -> tuple[Config, ...]:
    """Each kernel that a model of this shape launches, as it is launched; names are the file names of the machine code.

    The draw's come for every use of masks and penalties.
    """
    return tuple({config.name: config for config in _configs(shape)}.values())


def _configs(shape: ModelShape) -> Iterator[Config]:
    dtype, head_dim, page_size = shape.dtype, shape.head_dim, shape.page_size
    group = shape.num_heads // shape.num_kv_heads
    heads = {"NUM_KV_HEADS": shape.num_kv_heads}
    for windowed in shape.windows:
        attention = (head_dim, dtype, page_size, shape.block_m, group, windowed)
        yield _with(segment_attention_triton.shipped(*attention), heads)
        prefill = (head_dim, dtype, page_size, largest_block(head_dim, dtype), group, windowed)
        yield _with(segment_prefill_triton.shipped(*prefill), heads)
    yield _with(rope_append_triton.shipped(head_dim, dtype, page_size, group, shape.qk_norm), heads)
    for added in (False, True):
        yield norms_triton.shipped(shape.hidden_size, dtype, added)
    [merge] = [
        config
        for config in merge_states_triton.SHIPPED
        if config.constexprs["HEAD_DIM"] == head_dim and config.signature["out_ptr"] == _pointer(shape)
    ]
    yield _with(merge, {"NUM_HEADS": shape.num_heads})
    gate = next(config for config in swiglu_triton.SHIPPED if config.signature["out_ptr"] == _pointer(shape))
    sized = _with(gate, {"SIZE": shape.intermediate_size})
    yield sized._replace(name=f"swiglu-{_pointer(shape)[1:]}-{shape.intermediate_size}")
    block_k = fixed_linear_triton.tile(dtype.itemsize).block_k
    for num_in, biased in shape.linears:
        yield fixed_linear_triton.shipped(dtype, 16, num_in % block_k == 0, biased)
    tiles = power_of_two(-(-shape.num_logits // sample_device_triton.SIZES.block))
    for masked in (False, True):
        for penalized in (False, True):
            for config in sample_device_triton.shipped(masked, penalized):
                yield _with(config, {"BLOCK_TILES": tiles} if "BLOCK_TILES" in config.constexprs else {})
    finish, automaton = sample_device_triton.SHIPPED[-2:]
    yield _with(finish, {"BLOCK_TILES": tiles})
    yield automaton


def _with(config: Config, constants: dict[str, int]) -> Config:
    return config._replace(constexprs=config.constexprs | constants)


def _pointer(shape: ModelShape) -> str:
    return pointer(shape.dtype)


def build_model_kernels(
    shape: ModelShape, targets: Collection[str], num_workers: int | None = None
) -> Generator[ModelKernel]:
    """Compile every kernel of a model for each target, in processes of their own, in no order.

    targets: names of `TARGETS`; num_workers: as many as there are cores by default
    Raises ValueError for another target, and RuntimeError for a kernel that does not compile; what was being compiled
    ends when the iterator is closed.
    """
    known = {target.name: target for target in TARGETS}
    for name in targets:
        if name not in known:
            raise ValueError(f"there is no target `{name}`: there are {', '.join(known)}")
    configs = partial(model_configs, shape)
    jobs = [(config, known[name]) for name in targets for config in configs()]
    workers: int = num_workers or os.cpu_count() or 1
    with closing(build_each(jobs, configs, workers, keeps_binary=True)) as builds:
        for (config, target), built in builds:
            if isinstance(built, str) or built.binary is None:
                raise RuntimeError(f"`{config.name}` does not compile for {target.name}: {built}")
            yield ModelKernel(config, target, built, built.binary)


def target_names() -> Sequence[str]:
    """What `build_model_kernels` builds for."""
    return [target.name for target in TARGETS]
