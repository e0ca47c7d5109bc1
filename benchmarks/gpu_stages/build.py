"""Every shipped configuration, compiled for the card and checked for spills, shared memory and matrix instruction.

A card that is no target of the builds is built for as the nearest target below it.
"""

from __future__ import annotations

import os
from contextlib import closing

import torch

from anabranch.kernels.aot import MODULES, TARGETS, Built, Target, shipped_configs
from anabranch.kernels.aot_cache import Cache
from anabranch.kernels.aot_command import findings, results
from gpu_stages.log import Log, OutOfTime


def run(log: Log) -> None:
    """One case a configuration; figures of earlier builds are kept in the stage's own cache."""
    target = target_of(log.device)
    log.headlines["target"] = target.name
    configs = shipped_configs(MODULES)
    if log.small:
        configs = tuple(config for config in configs if config.name.startswith("swiglu"))[:2]
    jobs = [(config, target) for config in configs if config.name not in log.rows]
    workers = min(16, os.cpu_count() or 1)
    with closing(results(jobs, Cache(log.out / "aot"), MODULES, workers)) as each:
        for job, result in zip(jobs, each, strict=True):
            figures = (
                {"registers": result.registers, "shared_kib": result.shared_bytes / 1024, "matrix": result.matrix}
                if isinstance(result, Built)
                else {}
            )
            if wrong := findings(job, result):
                figures["error"] = "; ".join(wrong)
            log.case(job[0].name, lambda figures=figures: figures)
            if log.left_s() <= 0:
                raise OutOfTime


def target_of(device: torch.device) -> Target:
    """The target of the builds that the card is, or the nearest below it. Raises ValueError if there is none."""
    if device.type != "cuda":
        return next(target for target in TARGETS if target.name == "sm_90")
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        fitting = [target for target in TARGETS if target.name == name]
    else:
        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
        fitting = [target for target in TARGETS if isinstance(target.arch, int) and target.arch <= arch]
        name = f"sm_{arch}"
    if not fitting:
        raise ValueError(f"kernels are built for {', '.join(target.name for target in TARGETS)}, and not for {name}")
    return fitting[-1]
