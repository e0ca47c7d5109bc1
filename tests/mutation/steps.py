"""Mutants of recordings, drawn by machine: a field one off, a step dropped, doubled, or swapped with the next."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from anabranch.compiler import recording as rec
from anabranch.compiler.recording import Recording, Step

_STATUSES = ("ok", "failed", "truncated", "cancelled", "late")
_KINDS = ("prefill", "reprefill", "decode", "flush", "recompute")


@dataclass(frozen=True)
class StepMutant:
    """`recording` number `source` with one step changed. operator: field, drop, double or swap."""

    source: int
    index: int
    operator: str
    detail: str
    steps: tuple[Step, ...]

    def of(self, recording: Recording) -> Recording:
        return replace(recording, steps=self.steps)


def draw(recordings: Sequence[Recording], count: int, seed: int) -> list[StepMutant]:
    """`count` distinct mutants; kinds of step, and operators, are equally likely, however common they are."""
    chance = random.Random(seed)
    by_kind: dict[type, list[tuple[int, int]]] = {}
    for source, recording in enumerate(recordings):
        for index, step in enumerate(recording.steps):
            by_kind.setdefault(type(step), []).append((source, index))
    kinds = sorted(by_kind, key=lambda kind: kind.__name__)
    found: list[StepMutant] = []
    seen: set[tuple[int, int, str, str]] = set()
    while len(found) < count:
        kind = chance.choice(kinds)
        source, index = chance.choice(by_kind[kind])
        steps = recordings[source].steps
        # Half of them change a field: there are many of those.
        operator = chance.choice(("field", "field", "field", "drop", "double", "swap"))
        mutant = _mutant(steps, source, index, operator, chance)
        key = (source, index, operator, mutant.detail if mutant is not None else "")
        if mutant is not None and key not in seen and mutant.steps != steps:
            seen.add(key)
            found.append(mutant)
    return found


def _mutant(
    steps: tuple[Step, ...], source: int, index: int, operator: str, chance: random.Random
) -> StepMutant | None:
    before, step, after = steps[:index], steps[index], steps[index + 1 :]
    name = type(step).__name__
    match operator:
        case "drop":
            return StepMutant(source, index, operator, f"{name} dropped", before + after)
        case "double":
            return StepMutant(source, index, operator, f"{name} doubled", (*before, step, step, *after))
        case "swap":
            if not after:
                return None
            detail = f"{name} swapped with {type(after[0]).__name__}"
            return StepMutant(source, index, operator, detail, (*before, after[0], step, *after[1:]))
        case _:
            options = list(variants(step))
            if not options:
                return None
            where, changed = chance.choice(options)
            return StepMutant(source, index, operator, f"{name}{where}", (*before, changed, *after))


_CONTROL = (
    rec.Begin, rec.Enter, rec.Round, rec.Arm, rec.Write, rec.Token, rec.Trim, rec.Forked, rec.Joined, rec.Stitch,
    rec.End,
)  # fmt: skip

EQUIVALENT = {
    "apart": "two steps between the same calls changed places that act on different threads, segments and pages: "
    "nothing comes between them that could tell",
    "walk and memory": "a step of a thread's walk and one of its pages changed places between the same calls: each "
    "order has the same rows, and the same owner of every page in every call",
    "beside its node": "known tokens are written or taken back just before their thread comes to a node instead of "
    "just after: the same tokens in the same order; which statement they are of takes the plan's text to tell",
    "a call later": "a segment is sealed or freed, known tokens are written, a thread ends, comes to a node, or draws "
    "from logits that were at hand, one call later or earlier: the same rows are fed in the same calls, no page is "
    "wanted meanwhile, and each draw is at its node",
    "cut off before": "a thread that is cut off or fails comes to one node less: it did nothing there",
    "freed open": "a segment that nobody will see is freed as it is, without being sealed first",
    "forgotten": "neither a thread nor a branch of it feeds anything before it is cut off or fails: what it takes back "
    "before does not matter",
}
"""Why a mutant that lives is no fault, by its class. Each class is decided by `equivalent`, from the steps alone."""


def equivalent(mutant: StepMutant, recording: Recording) -> str:
    """The class of `EQUIVALENT` that a mutant falls in, or "" for none."""
    changed, later = recording.steps[mutant.index], recording.steps[mutant.index + 1 :]
    if mutant.operator == "drop" and isinstance(changed, rec.Seal) and _is_freed_next(changed.segment, later):
        return "freed open"
    if mutant.operator == "drop" and isinstance(changed, rec.Enter) and _ends_at_once(changed.thread, later):
        return "cut off before"
    if mutant.operator != "swap" and isinstance(changed, rec.Trim) and _ends_at_once(changed.thread, later, _WALK):
        return "forgotten"
    if mutant.operator != "swap":
        return ""
    one, two = recording.steps[mutant.index], recording.steps[mutant.index + 1]
    if isinstance(one, rec.Call) or isinstance(two, rec.Call):
        call, other = (one, two) if isinstance(one, rec.Call) else (two, one)
        if isinstance(other, rec.Token) and isinstance(call, rec.Call):
            return "" if any(block.thread == other.thread for block in call.blocks) else "a call later"
        if isinstance(other, rec.End):
            return "" if other.thread in call.seats else "a call later"  # type: ignore[union-attr]
        if isinstance(other, rec.Seal):
            return "" if any(block.segment == other.segment for block in call.blocks) else "a call later"  # type: ignore[union-attr]
        return "a call later" if isinstance(other, rec.Free | rec.Enter | rec.Round | rec.Arm | rec.Write) else ""
    if isinstance(one, _CONTROL) != isinstance(two, _CONTROL):
        return "walk and memory"
    if not _subjects(one) & _subjects(two):
        return "apart"
    comes, writes = (one, two) if isinstance(two, rec.Write | rec.Trim) else (two, one)
    if isinstance(comes, rec.Enter | rec.Round | rec.Arm) and isinstance(writes, rec.Write | rec.Trim):
        return "beside its node"
    return ""


def _is_freed_next(segment: int, steps: Sequence[Step]) -> bool:
    """Whether the next that becomes of a segment is that it is freed."""
    for step in steps:
        if isinstance(step, rec.Call):
            if any(block.segment == segment for block in step.blocks):
                return False
        elif getattr(step, "segment", None) == segment:
            return isinstance(step, rec.Free)
    return False


_WALK = (rec.Enter, rec.Round, rec.Arm, rec.Write, rec.Forked)


def _ends_at_once(thread: int, steps: Sequence[Step], but_for: tuple[type, ...] = ()) -> bool:
    """Whether the next that a thread does, but for some steps, is to end, and not well."""
    for step in steps:
        match step:
            case rec.End() if step.thread == thread:
                return step.status != "ok"
            case rec.Call(seats, blocks):
                if thread in seats or any(block.thread == thread for block in blocks):
                    return False
            case _ if ("thread", thread) in _subjects(step) and not isinstance(step, but_for):
                return False
            case _:
                pass
    return False


def _subjects(step: Step) -> set[tuple[str, int]]:
    """What a step that is no call acts on."""
    found: set[tuple[str, int]] = set()
    for name in ("thread", "parent", "segment", "page"):
        number = getattr(step, name, None)
        if number is not None:
            found.add(("thread" if name == "parent" else name, number))
    found.update(("page", page) for page in getattr(step, "pages", ()))
    if isinstance(step, rec.Stitch):
        found.update(("thread", winner) for winner in step.winners)
    return found


def variants(value: Any) -> Iterator[tuple[str, Any]]:
    """Each way to have `value` one off, in one place: (where and how, the changed value)."""
    if isinstance(value, bool):
        yield " negated", not value
    elif isinstance(value, int):
        yield " + 1", value + 1
        yield " - 1", value - 1
    elif isinstance(value, str):
        for names in (_STATUSES, _KINDS):
            if value in names:
                yield " changed", names[(names.index(value) + 1) % len(names)]
    elif isinstance(value, tuple):
        for place, item in enumerate(value):
            for where, changed in variants(item):
                yield f"[{place}]{where}", (*value[:place], changed, *value[place + 1 :])
        if value:
            yield " shorter", value[:-1]
            yield " longer", (*value, value[-1])
    elif is_dataclass(value):
        for field in fields(value):
            for where, changed in variants(getattr(value, field.name)):
                yield f".{field.name}{where}", replace(value, **{field.name: changed})  # type: ignore[type-var]
