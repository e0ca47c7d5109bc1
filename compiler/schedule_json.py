"""Static schedules as JSON, with the plan that they are of, so that they can be verified again.

As JSON a static schedule is an object: `format` "anabranch-schedule", `version` 1, `kind` "static", `machine`, `run`
(the plan's text, which plan of it, the inputs that were known, the names of host functions), `main`, `calls`,
`pages_peak`, `threads`, and `steps` as in a recording: each a list that begins with its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from anabranch.compiler.bounds import Bounds
from anabranch.compiler.json_values import as_object, as_tagged, bad_schedule, dump, from_object, from_tagged, load
from anabranch.compiler.pipeline import compile_plan
from anabranch.compiler.recording import FORMAT, VERSION, check_head
from anabranch.compiler.schedule import (
    Alias,
    Choose,
    Decode,
    Flush,
    Free,
    Moved,
    Part,
    Prefill,
    Ref,
    Repeat,
    Runs,
    Schedule,
    Step,
    Stitch,
    size,
)
from anabranch.compiler.scheduler import Machine
from anabranch.compiler.sizes import Sizes
from anabranch.compiler.verify_schedule import verify_schedule
from anabranch.dsl.parse import parse_text

# Threads, lanes and segments that all the steps of a file may name. Verifying takes time for each.
_MOST_NAMES = 1 << 22


@dataclass(frozen=True, slots=True)
class Origin:
    """What a static schedule is of. inputs: those that were known; functions: names of the host's functions."""

    text: str
    plan: str
    inputs: Mapping[str, Any]
    functions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Figures:
    main: str
    calls: int
    pages_peak: int
    threads: int


def to_json(schedule: Schedule, origin: Origin) -> str:
    """The schedule as one JSON document, a step a line."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "kind": "static",
        "machine": as_object(schedule.machine),
        "run": as_object(origin),
        **as_object(_Figures(schedule.main, schedule.calls, schedule.pages_peak, schedule.threads)),
    }
    lines = ",\n".join(dump(as_tagged(step)) for step in schedule.steps)
    return f'{dump(head)[:-1]},"steps":[\n{lines}\n]}}\n'


def from_json(text: str | bytes) -> tuple[Schedule, Origin]:
    """Read what `to_json` wrote. Raises PlanError `bad-schedule`, saying where and what, for anything else."""
    return from_document(load(text))


def from_document(document: Any) -> tuple[Schedule, Origin]:
    """Read a parsed document. Raises PlanError `bad-schedule`."""
    names = [field.name for field in fields(_Figures)]
    check_head(document, "static", {"machine", "run", "steps", *names})
    if not isinstance(document["steps"], list):
        raise bad_schedule("`steps` must be a list")
    machine = from_object(Machine, document["machine"], "machine")
    origin = from_object(Origin, document["run"], "run")
    figures = from_object(_Figures, {name: document[name] for name in names}, "the file")
    try:
        steps = tuple(from_tagged(Step, step, f"steps[{place}]") for place, step in enumerate(document["steps"]))
    except RecursionError:
        raise bad_schedule("its steps are nested too deep") from None
    schedule = Schedule(machine, figures.main, steps, figures.calls, figures.pages_peak, figures.threads)
    _check_numbers(schedule)
    return schedule, origin


def verify_static(schedule: Schedule, origin: Origin, *, sizes: Sizes | None = None) -> Schedule:
    """Compile the plan anew, hold the schedule against it, and return it.

    sizes: as for `Compiled.bounds_on`; must be those that the schedule was made with
    Raises VerifyError where a rule of `verify_schedule.RULES` is broken, and PlanError where the plan does not compile,
    or the schedule names what the plan has not.
    """
    try:
        compiled = compile_plan(parse_text(origin.text), origin.plan, functions=origin.functions)
    except KeyError:
        raise bad_schedule(f"its text has no plan `{origin.plan}`") from None
    compiled.check_values(origin.inputs, sizes)
    bounds = compiled.bounds_on(schedule.machine, sizes, origin.inputs)
    if schedule.main != compiled.graph.main:
        raise bad_schedule(f"it is of `{schedule.main}`, and its plan is `{compiled.graph.main}`")
    for step in _every(schedule.steps):
        for ref in _refs(step):
            _check_ref(bounds, ref)
    try:
        return verify_schedule(schedule, bounds)
    except (KeyError, IndexError, ValueError) as error:
        # The verifier was written for what the compiler makes, in which every name is one that an earlier step made.
        raise bad_schedule(f"a step names what is not there: {error}") from None


def _check_ref(bounds: Bounds, ref: Ref) -> None:
    plan, ctx = ref
    if plan not in bounds.graph.plans or bounds.plan_bounds(plan).node_at(ctx) is None:
        raise bad_schedule(f"a step names the node %{ctx} of `{plan}`, which its plan has not")


def _check_numbers(schedule: Schedule) -> None:
    left = _MOST_NAMES
    for step in _every(schedule.steps):
        for names in _names(step):
            if any(first < 0 or count < 1 for first, count in names):
                raise bad_schedule("threads, lanes and segments are counted from 0, in runs of at least one")
            left -= size(names)
            if left < 0:
                raise bad_schedule(f"its steps name more than {_MOST_NAMES} threads, lanes and segments")
        counts = [part.rows for part in _parts(step)]
        if isinstance(step, Decode):
            counts.append(step.at_most - 1)
        if isinstance(step, Repeat):
            counts.append(step.rounds - 1)
        if any(count < 0 for count in counts):
            raise bad_schedule("rows, rounds and tokens are counted from 0 or 1")


def _every(steps: Sequence[Step]) -> Iterator[Step]:
    """The steps, and those inside them."""
    stack = [iter(steps)]
    while stack:
        step = next(stack[-1], None)
        if step is None:
            stack.pop()
            continue
        yield step
        match step:
            case Repeat(steps=inner):
                stack.append(iter(inner))
            case Choose(arms=arms):
                stack.extend(iter(arm) for arm in arms)
            case _:
                pass


def _parts(step: Step) -> tuple[Part, ...]:
    return step.parts if isinstance(step, Prefill | Decode | Flush) else ()


def _refs(step: Step) -> Iterator[Ref]:
    match step:
        case Alias(fork=ref) | Stitch(fork=ref) | Repeat(loop=ref) | Choose(cond=ref):
            yield ref
        case Free():
            pass
        case Prefill() | Decode() | Flush():
            for part in step.parts:
                yield from part.nodes


def _names(step: Step) -> Iterator[Runs]:
    moved: tuple[Moved, ...] = ()
    match step:
        case Alias():
            yield from (step.branches, step.lanes, step.segments)
        case Stitch():
            yield from (step.branches, step.gained)
        case Free():
            yield step.segments
        case Repeat():
            moved = step.moved
        case Choose():
            moved = (*step.merged, *(end for ends in step.ends for end in ends))
        case Prefill() | Decode() | Flush():
            yield from (part.lanes for part in step.parts)
    yield from (one.gained for one in moved)
