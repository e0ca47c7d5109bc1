"""Build the kernels ahead of time, and check what came out: no GPU is needed.

    python -m anabranch.kernels.aot [--full] [--jobs N] [--table FILE] [--cache DIR]

`build` compiles one configuration for one target and reads the machine code; `problems` says what is wrong with it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Final

from anabranch.kernels.aot_build import Built, Target, build
from anabranch.kernels.shipped import Config

__all__ = ["MODULES", "TARGETS", "Built", "Target", "build", "problems", "shipped_configs"]

MODULES: Final[tuple[str, ...]] = (
    "anabranch.kernels.segment_attention_triton",
    "anabranch.kernels.merge_states_triton",
    "anabranch.kernels.segment_prefill_triton",
    "anabranch.kernels.fixed_linear_triton",
    "anabranch.kernels.norms_triton",
    "anabranch.kernels.swiglu_triton",
    "anabranch.kernels.rope_append_triton",
    "anabranch.kernels.sample_device_triton",
)
"""The modules with a `SHIPPED`: all that is built."""


TARGETS: Final[tuple[Target, ...]] = (
    Target("sm_80", "cuda", 80, 32, 163 * 1024, {"none": ("none",), "mma": ("HMMA",), "wgmma": ("HMMA",)}),
    Target("sm_90", "cuda", 90, 32, 227 * 1024, {"none": ("none",), "mma": ("HMMA",), "wgmma": ("HGMMA",)}),
    Target("sm_100", "cuda", 100, 32, 227 * 1024, {"none": ("none",), "mma": ("HMMA",), "wgmma": ("UTCHMMA",)}),
    # The products of AMD's fp32 matrix instruction are exact.
    Target(
        "gfx942", "hip", "gfx942", 64, 64 * 1024,
        {"none": ("none", "MFMA.F32"), "mma": ("MFMA",), "wgmma": ("MFMA",)},
    ),
)  # fmt: skip

TENSOR_MEMORY_COLUMNS: Final = 512  # of sm_100; PTX ISA, tcgen05


def shipped_configs(modules: Iterable[str] = MODULES) -> tuple[Config, ...]:
    """All that `modules` ship, in their order.

    Raises ValueError if two configurations have one name.
    """
    configs: dict[str, Config] = {}
    for module in modules:
        for config in import_module(module).SHIPPED:
            if config.name in configs:
                raise ValueError(f"two configurations are named `{config.name}`")
            configs[config.name] = config
    return tuple(configs.values())


def problems(config: Config, target: Target, built: Built) -> list[str]:
    """What must not be shipped, a line each."""
    found = []
    if built.spills:
        found.append(f"{built.spills} spills, {built.registers} registers: make the tile smaller or take more warps")
    elif built.stack_bytes:
        found.append(f"{built.stack_bytes} bytes of a thread's own memory, of which there should be none")
    if built.shared_bytes > target.shared_bytes:
        limit = f"of which a block has {target.shared_bytes}"
        found.append(
            f"{built.shared_bytes} bytes of shared memory, {limit}: make the tile smaller or take fewer stages"
        )
    if built.tensor_memory > TENSOR_MEMORY_COLUMNS:
        found.append(f"{built.tensor_memory} columns of tensor memory, of which there are {TENSOR_MEMORY_COLUMNS}")
    expected = target.matrix[config.matrix]
    if built.matrix not in expected:
        found.append(f"matrix instruction {built.matrix}, expected {' or '.join(expected)}")
    return [f"`{config.name}` for {target.name}: {problem}" for problem in found]


if __name__ == "__main__":
    # By its name, or each class here would exist twice.
    from anabranch.kernels.aot_command import main

    sys.exit(main())
