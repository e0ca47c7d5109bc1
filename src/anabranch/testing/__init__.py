"""Property testing of plans and schedules: strategies for Hypothesis, and the engine on a scripted model.

    @given(st.data())
    def test_my_policy(data):
        plan = data.draw(plans())
        machine = data.draw(machines(plan))
        simulate(plan, machine, data.draw(traces()), policy=MyPolicy()).verify()

`docs/testing.md` is the guide. Everything public is named here and imported on first use, so that the strategies, which
Hypothesis registers by itself, do not import torch. Needs the `testing` extra.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from anabranch.compiler.recording import Recording
    from anabranch.compiler.scheduler import Machine, Policy, Waiting
    from anabranch.compiler.verify_recording import Report, ScheduleFault, verify_recording
    from anabranch.testing._adversarial import adversarial_plans
    from anabranch.testing._machines import least_pages, machines
    from anabranch.testing._plan import Plan
    from anabranch.testing._plans import plans
    from anabranch.testing._schedules import schedules
    from anabranch.testing._simulate import Simulation, simulate
    from anabranch.testing._trace import Outcome, Trace
    from anabranch.testing._traces import traces

if find_spec("hypothesis") is None:
    raise ImportError("`anabranch.testing` needs Hypothesis: pip install 'anabranch[testing]'")

__all__ = [
    "Machine",
    "Outcome",
    "Plan",
    "Policy",
    "Recording",
    "Report",
    "ScheduleFault",
    "Simulation",
    "Trace",
    "Waiting",
    "adversarial_plans",
    "least_pages",
    "machines",
    "plans",
    "schedules",
    "simulate",
    "traces",
    "verify_recording",
]

_HOMES: Final = {
    "anabranch.compiler.recording": ("Recording",),
    "anabranch.compiler.scheduler": ("Machine", "Policy", "Waiting"),
    "anabranch.compiler.verify_recording": ("Report", "ScheduleFault", "verify_recording"),
    "anabranch.testing._adversarial": ("adversarial_plans",),
    "anabranch.testing._machines": ("least_pages", "machines"),
    "anabranch.testing._plan": ("Plan",),
    "anabranch.testing._plans": ("plans",),
    "anabranch.testing._schedules": ("schedules",),
    "anabranch.testing._simulate": ("Simulation", "simulate"),
    "anabranch.testing._trace": ("Outcome", "Trace"),
    "anabranch.testing._traces": ("traces",),
}
_HOME: Final = {name: module for module, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # else a type checker would accept any name

    def __getattr__(name: str) -> object:
        module = _HOME.get(name)
        if module is None:
            raise AttributeError(f"module `anabranch.testing` has no attribute `{name}`")
        value = getattr(importlib.import_module(module), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
