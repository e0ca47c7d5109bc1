"""What the place where a plan is to run can do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """What the place where a plan is to run can do.

    name: how errors name it
    stitch_many: whether several branches can be aliased into one view (our engine can, a remote one cannot)
    deterministic: no decision may depend on the wall clock
    """

    name: str = "engine"
    stitch_many: bool = True
    deterministic: bool = False
