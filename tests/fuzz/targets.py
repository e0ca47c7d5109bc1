"""What is fuzzed, and what must hold of any bytes at all. Nothing here needs atheris.

target = parse        plan text: read, printed, formatted
       | check        plan text: checked, compiled, bounded, explained
       | schema       a JSON schema or a regex of a typed gen: read, and tokens drawn under its mask
       | recording    the JSON of a schedule, recorded or static: read, and held against its plan
       | journal      a run's journal

A target takes bytes and returns. It raises `Broken`, or whatever escaped from the code under test, where something that
must hold does not. Cost is libFuzzer's to bound (`-timeout`, `-rss_limit_mb`), and the replay's (calls made).
"""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

from anabranch.cli.text import printable
from anabranch.compiler import recording as recorded
from anabranch.compiler import schedule_json
from anabranch.compiler.explain import explain
from anabranch.compiler.graph_text import graph_text
from anabranch.compiler.json_values import load
from anabranch.compiler.pipeline import compile_plan
from anabranch.compiler.scheduler import Machine
from anabranch.compiler.verify_graph import VerifyError
from anabranch.compiler.verify_recording import ScheduleFault, verify_recording
from anabranch.dsl.ast import Program
from anabranch.dsl.check import check as check_program
from anabranch.dsl.diagnostics import PlanError, Source
from anabranch.dsl.parse import parse as parse_source
from anabranch.dsl.patterns import PatternTooComplex, check_regex, check_schema, full_match
from anabranch.dsl.printer import dump_ast, format_source, print_plan
from anabranch.runtime.events import RunEnded
from anabranch.runtime.replay import LogEntry

ROOT: Final = Path(__file__).parent.parent.parent
CORPUS: Final = Path(__file__).parent / "corpus"

MAX_SHOWN: Final = 2_000
"""The most characters that one finding may take when it is shown."""

FUNCTIONS: Final = ("score", "search")


class Broken(Exception):
    """Something that must hold of any input does not."""


def parse(data: bytes) -> None:
    """Any text is a program or a PlanError; a program prints, formats, and is read again as the same."""
    source = _source(data)
    program = _program(source)
    if program is None:
        return
    printed = print_plan(program)
    if parse_source(Source("printed", printed)) != program:
        raise Broken(f"printed, it is another program:\n{printed}")
    formatted = format_source(source)
    again = Source("formatted", formatted)
    if parse_source(again) != program:
        raise Broken(f"formatted, it is another program:\n{formatted}")
    if format_source(again) != formatted:
        raise Broken(f"formatting is not done after once:\n{formatted}")
    dump_ast(program)


def check(data: bytes) -> None:
    """A program is refused with PlanErrors, or compiles, and then its worst case can be told."""
    source = _source(data)
    program = _program(source)
    if program is None:
        return
    try:
        checked = check_program(program, functions=FUNCTIONS)
        for warning in checked.warnings:
            _shown(PlanError(warning, source), source)
        compiled = compile_plan(program, functions=FUNCTIONS)
        graph_text(compiled.graph)
        machine = Machine()
        compiled.check_bounds(compiled.bounds_on(machine), machine, 1 << 16)
        explain(compiled, machine).text()
    except PlanError as error:
        _shown(error, source)


def schema(data: bytes) -> None:
    """Data that begin with `/` are a pattern, others a schema. Refused in a few words, or every value drawn is one."""
    from anabranch.dsl.spec import JsonType, RegexType

    text = data.decode("utf-8", "replace")
    if text.startswith("/"):
        pattern = text[1:]
        if _refused(check_regex(pattern)):
            return
        try:
            full_match(pattern, pattern[:64])
        except PatternTooComplex:
            pass
        for value in _drawn(RegexType(pattern), data):
            try:
                if not full_match(pattern, value):
                    raise Broken(f"{value!r} was drawn, and {pattern!r} does not match it")
            except PatternTooComplex:
                pass
    elif not _refused(check_schema(text)):
        for _ in _drawn(JsonType(text), data):
            pass


def recording(data: bytes) -> None:
    """Anything is a schedule, recorded or static, or a PlanError; a schedule is read back as it is written.

    What is read is held against its plan, which tells faults of the schedule and nothing worse.
    """
    try:
        document = load(data)
        kind = document.get("kind") if isinstance(document, dict) else None
        if kind == "static":
            schedule, origin = schedule_json.from_document(document)
            if schedule_json.from_json(schedule_json.to_json(schedule, origin)) != (schedule, origin):
                raise Broken("written and read again, it is another schedule")
            schedule_json.verify_static(schedule, origin)
        else:
            read = recorded.from_document(document)
            if recorded.from_json(recorded.to_json(read)) != read:
                raise Broken("written and read again, it is another recording")
            verify_recording(read)
    except PlanError as error:
        _shown(error, None)
    except (ScheduleFault, VerifyError) as fault:
        if len(str(fault)) > MAX_SHOWN:
            raise Broken(f"a fault is told in {len(str(fault))} characters") from None


def journal(data: bytes) -> None:
    """Any file is a journal or a PlanError, and what is read of one is read again of the journal written from it."""
    from anabranch.runtime.journal import Journal, read_journal

    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        path = Path(folder, "a.journal")
        path.write_bytes(data)
        try:
            read = read_journal(str(path))
        except PlanError as error:
            _shown(error, None)
            return
        again = Path(folder, "b.journal")
        with Journal.create(str(again)) as written:
            written.begin(read.header)
            for run, entries in enumerate(read.entries):
                log = written.log(run)
                for entry in entries:
                    log(entry)
            written.log(0)(_RUN_ENDED)  # so that what comes before it is written
            written.commit()
        back = read_journal(str(again))
        ended = (read.entries[0] + (_RUN_ENDED,), *read.entries[1:])
        # A number in it may be no number, which is not equal to itself.
        if repr((back.header, back.entries)) != repr((read.header, ended)):
            raise Broken("written and read again, it is another journal")


_MEMORY: Final = "/dev/shm" if Path("/dev/shm").is_dir() else None
_RUN_ENDED: Final = LogEntry((), RunEnded("ok", None, "", {}))

TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "parse": parse,
    "check": check,
    "schema": schema,
    "recording": recording,
    "journal": journal,
}


def _source(data: bytes) -> Source:
    # A file must be UTF-8; text that a program gives may hold lone surrogates besides.
    return Source("fuzz.plan", data.decode("utf-8", "surrogateescape"))


def _program(source: Source) -> Program | None:
    try:
        return parse_source(source)
    except PlanError as error:
        _shown(error, source)
        return None


@cache
def _codes() -> frozenset[str]:
    return frozenset(re.findall(r"^### `([a-z0-9-]+)`$", (ROOT / "docs/errors.md").read_text("utf-8"), re.MULTILINE))


def _shown(error: PlanError, source: Source | None) -> None:
    """A finding has a documented code, a place in the text, and can be shown."""
    for found in error.diagnostics:
        if found.code not in _codes():
            raise Broken(f"the code {found.code!r} is not in docs/errors.md")
        if not found.message:
            raise Broken(f"`{found.code}` says nothing")
        if source is not None:
            span = found.span
            if span is None or not 0 <= span.start <= span.end <= len(source.text) + 1:
                raise Broken(f"`{found.code}` at {span} of {len(source.text)} characters")
        if len(found.render(source)) > MAX_SHOWN:
            raise Broken(f"`{found.code}` is shown in {len(found.render(source))} characters")
    printable(error.render()).encode()


def _refused(reason: str) -> bool:
    if len(reason) > MAX_SHOWN or "\n" in reason:
        raise Broken(f"a reason of many words: {reason!r}")
    return bool(reason)


def _drawn(kind: Any, seed: bytes) -> list[str]:
    """The values of two gens of the type: tokens are drawn at random among those that its mask allows."""
    from anabranch.dsl.spec import GenSpec, JsonType
    from anabranch.runtime.generation import Generation

    values: list[str] = []
    choose = random.Random(seed)
    for limit in (12, 40):
        try:
            constraint = _constraints().start(kind)
        except PlanError as error:
            _shown(error, None)
            return values
        gen = Generation(GenSpec(kind, limit), _constraints().vocabulary.tokenizer, constraint=constraint, limit=limit)
        while not gen.done:
            mask = gen.mask()
            if mask is None or gen.done:
                break
            allowed = [i for i in range(len(mask) * 32) if int(mask[i // 32]) >> i % 32 & 1]
            gen.push(choose.choice(allowed))
        if gen.done in ("complete", "end_of_turn", "max"):
            if isinstance(kind, JsonType):
                json.loads(gen.text)
            values.append(gen.text)
    return values


@cache
def _constraints() -> Any:
    from anabranch.runtime.constrain import Constraints
    from anabranch.runtime.tokenizer import byte_tokenizer

    return Constraints(byte_tokenizer())
