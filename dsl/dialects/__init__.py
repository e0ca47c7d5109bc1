"""Traces of other systems: read as plans that replay them, and written again byte for byte.

    import_trace("multiverse", source)     the text of a plan
    export_trace("multiverse", program)    the text of the trace
    dialect("multiverse").reader()         a push parser, see `reader.py`

Each format has a module of its own, which says where it is described. `docs/dialects.md` has all three.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from anabranch.dsl import ast
from anabranch.dsl.diagnostics import Diagnostic, PlanError, Source, Span
from anabranch.dsl.dialects import apr, blocks, multiverse, threadweaver
from anabranch.dsl.dialects.build import Build, PlanBuilder
from anabranch.dsl.dialects.export import Step, steps_of, written
from anabranch.dsl.dialects.reader import Reader
from anabranch.dsl.parse import MAX_FILE_BYTES
from anabranch.dsl.printer import print_plan

_SURROGATE: Final = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Dialect:
    """One format. name: as the command line has it; title: as its authors have it; reader: makes a push parser of it"""

    name: str
    title: str
    reader: Callable[[], Reader]
    build: Build


def _block_seed(format: blocks.BlockFormat) -> Callable[[str], int]:
    pattern = format.seed()

    def seed(text: str) -> int:
        found = pattern.match(text)
        return found.end() if found else 0

    return seed


DIALECTS: Final = {
    known.name: known
    for known in (
        Dialect(
            "multiverse",
            "Multiverse",
            multiverse.MultiverseReader,
            Build("stitch", _block_seed(multiverse.FORMAT)),
        ),
        Dialect(
            "threadweaver",
            "ThreadWeaver",
            threadweaver.ThreadWeaverReader,
            Build("text", _block_seed(threadweaver.FORMAT)),
        ),
        Dialect("apr", "APR", apr.AprReader, Build("told", apr.seed)),
    )
}


def dialect(name: str) -> Dialect:
    """The format called `name`: multiverse, threadweaver or apr. Raises ValueError."""
    try:
        return DIALECTS[name]
    except KeyError:
        raise ValueError(f"there is no dialect {name!r}: {', '.join(DIALECTS)}") from None


def import_program(name: str, source: Source) -> ast.Program:
    """The plan that replays the trace in `source`, as syntax without a source.

    Raises PlanError, its spans in the trace; ValueError for a dialect that is none.
    """
    known = dialect(name)
    if (half := _SURROGATE.search(source.text)) is not None:
        raise PlanError(
            Diagnostic(
                "bad-character",
                f"this is half a character (U+{ord(half[0]):04X}), which no file can hold",
                Span(half.start(), half.end()),
                help="remove it: decode text from UTF-8, or UTF-16, as a whole",
            ),
            source,
        )
    if not source.text:
        raise PlanError(Diagnostic("empty-file", f"`{source.name}` is empty", help="a trace has some text"), source)
    reader = known.reader()
    builder = PlanBuilder(known.build)
    try:
        builder.take(reader.feed(source.text))
        builder.take(reader.close())
    except PlanError as error:
        raise PlanError(error.diagnostics, source) from None
    return builder.finish()


def import_trace(name: str, source: Source) -> str:
    """The text of the plan that replays the trace in `source`, which holds it as it is in its file.

    Raises PlanError, its spans in the trace; ValueError for a dialect that is none.
    """
    text = (
        f"# A trace of {dialect(name).title}. `anabranch convert --to {name}` gives it back, byte for byte.\n"
        + print_plan(import_program(name, source))
    )
    if len(text.encode()) > MAX_FILE_BYTES:
        raise PlanError(
            Diagnostic(
                "file-too-large",
                f"the plan of this trace is larger than {MAX_FILE_BYTES // 2**20} MiB",
                help="import parts of it",
            ),
            source,
        )
    return text


def export_trace(name: str, program: ast.Program, plan: str | None = None) -> str:
    """The trace that `plan` of the program replays, the last plan by default: the text that it was imported from.

    Turns of a chat before the trace are no part of it. Raises PlanError `not-a-trace` where the plan is not what
    importing that text gives, its span in the plan; ValueError for a dialect that is none, KeyError for such a plan.
    """
    known = dialect(name)
    steps = steps_of(program, program.plan(plan))
    text = written(steps)
    try:
        _check_same(known, text, steps, program.source)
    except PlanError as error:
        for other in DIALECTS.values():
            if other is not known and _is_same(other, text, steps, program.source):
                message = f"this plan replays a trace of {other.title}, not of {known.title}"
                finding = Diagnostic("not-a-trace", message, help=f"write `--to {other.name}`")
                raise PlanError(finding, program.source) from None
        raise error from None
    return text


def _is_same(known: Dialect, text: str, steps: list[Step], source: Source) -> bool:
    try:
        _check_same(known, text, steps, source)
    except PlanError:
        return False
    return True


def _check_same(known: Dialect, text: str, steps: list[Step], source: Source) -> None:
    """Raises PlanError `not-a-trace` unless `steps` are those of the plan that importing `text` gives."""
    help = "only a plan that `convert --from` made has a trace; a change of what is recorded must leave its tags alone"
    try:
        again = import_program(known.name, Source(source.name, text))
    except PlanError as error:
        [finding, *_] = error.diagnostics
        message = f"what this plan replays is no trace of {known.title}: {finding.message}"
        span = _span_at(steps, finding.span.start if finding.span else 0)
        raise PlanError(Diagnostic("not-a-trace", message, span, help=help), source) from None
    wanted = steps_of(again, again.plan())
    for have, want in zip(steps, wanted, strict=False):
        if have != want:
            break
    else:
        if len(steps) == len(wanted):
            return
        have = steps[min(len(steps), len(wanted)) - 1]
    message = f"the plan of this trace of {known.title} is another one"
    raise PlanError(Diagnostic("not-a-trace", message, have.span, note="from here on", help=help), source)


def _span_at(steps: list[Step], offset: int) -> Span | None:
    """Of the step that writes the character at `offset` of the text, or of the last one."""
    span = None
    for step in steps:
        if step.kind in ("text", "gen"):
            span = step.span
            offset -= len(step.text)
            if offset < 0:
                break
    return span
