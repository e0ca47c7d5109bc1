"""Documents: each plan in `tests/cases/*.md` gives the syntax, graph, schedule, errors or warnings written below it.

A document is prose with fenced blocks. A `plan` block is followed by `ast`, `graph`, `schedule`, `error` and `warning`
blocks, each of which holds what that plan gives at that stage. `pytest tests/test_cases.py --update` rewrites them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from anabranch.compiler.show import show
from anabranch.dsl.check import check
from anabranch.dsl.diagnostics import PlanError, Source
from anabranch.dsl.parse import parse
from anabranch.dsl.printer import dump_ast

CASES = Path(__file__).parent / "cases"
_FENCE = re.compile(r"^```(plan|ast|graph|schedule|error|warning)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Case:
    """One block of a document: what `plan` gives at `stage`. `span` is where in the document it is expected."""

    stage: str
    plan: str
    expected: str
    span: tuple[int, int]


def read_cases(document: str) -> list[Case]:
    """The expectations of a document, each with the plan above it. Raises ValueError for one without a plan."""
    cases: list[Case] = []
    plan: str | None = None
    for fence in _FENCE.finditer(document):
        if fence[1] == "plan":
            plan = fence[2]
        elif plan is None:
            raise ValueError(f"a `{fence[1]}` block stands before any plan")
        else:
            cases.append(Case(fence[1], plan, fence[2], fence.span(2)))
    return cases


def given(case: Case) -> str:
    """What the case's plan gives at its stage; errors and warnings as they are shown."""
    source = Source("case.plan", case.plan)
    try:
        program = parse(source)
        if case.stage == "ast":
            return dump_ast(program)
        checked = check(program)
        if case.stage == "warning":
            return "\n\n".join(warning.render(source) for warning in checked.warnings) + "\n"
        if case.stage == "error":
            return "no error\n"
        shown = show(program, "graph" if case.stage == "graph" else "schedule")
        return shown if shown.endswith("\n") else shown + "\n"
    except PlanError as error:
        return error.render() + "\n"


def _ids() -> list[tuple[Path, int]]:
    return [
        (path, number)
        for path in sorted(CASES.glob("*.md"))
        for number in range(len(read_cases(path.read_text(encoding="utf-8"))))
    ]


@pytest.mark.parametrize(("path", "number"), _ids(), ids=[f"{path.stem}-{number}" for path, number in _ids()])
def test_document(path: Path, number: int, request: pytest.FixtureRequest) -> None:
    """The block holds what its plan gives."""
    document = path.read_text(encoding="utf-8")
    case = read_cases(document)[number]
    found = given(case)
    if request.config.getoption("--update"):
        start, end = case.span
        path.write_text(document[:start] + found + document[end:], encoding="utf-8")
        return
    assert found == case.expected


def test_an_expectation_needs_a_plan() -> None:
    """A document that begins with an expectation is refused, not passed over."""
    with pytest.raises(ValueError, match="before any plan"):
        read_cases("```ast\nx\n```\n")


def test_a_wrong_expectation_is_seen() -> None:
    """The comparison can fail: another plan's tree is not this plan's."""
    case = read_cases("```plan\na = plan() {}\n```\n```ast\nPlanDef b\n  Block\n```\n")[0]
    assert given(case) == "PlanDef a\n  Block\n"
    assert given(case) != case.expected
