"""Machines that a plan, or several together, can run on; from the smallest pool that suffices to a roomy one."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from anabranch.compiler.scheduler import Machine
from anabranch.testing._plan import Plan


def least_pages(plan: Plan, machine: Machine) -> int:
    """The fewest pages on which `plan` may run (`pages_depth_first`), whatever the pages of `machine`."""
    from anabranch.testing._simulate import model_sizes

    return plan.compiled.bounds_on(machine, model_sizes(), plan.inputs).pages_depth_first


@st.composite
def machines(draw: st.DrawFn, *plans: Plan, least: bool | None = None) -> Machine:
    """Machines for `plans`: lanes, page size, batch tokens (`chunk`), and from the least number of pages up.

    least: True for pools that hold exactly what the largest plan needs, False for larger ones
    """
    machine = Machine(
        lanes=draw(_LANES),
        pages=1,
        page_size=draw(_PAGE_SIZES),
        chunk=draw(_CHUNKS),
    )
    needed = max((least_pages(plan, machine) for plan in plans), default=1)
    return replace(machine, pages=needed + draw(_ROOM[least]))


_LANES = st.sampled_from([1, 2, 3, 4, 8, 32])
_PAGE_SIZES = st.sampled_from([16, 4, 1, 2, 5])
_CHUNKS = st.sampled_from([64, 16, 3, 1])
_ROOM = {
    None: st.sampled_from([0, 1, 3, 8, 40, 400]),
    True: st.just(0),
    False: st.sampled_from([1, 3, 8, 40, 400]),
}
