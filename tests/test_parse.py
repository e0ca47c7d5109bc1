"""Reading plans: the syntax built, spans, what hostile text meets, and the words of every error."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.dsl import ast
from anabranch.dsl.diagnostics import PlanError, Source, Span
from anabranch.dsl.parse import MAX_BRACKETS, MAX_DEPTH, MAX_ERRORS, MAX_FILE_BYTES, parse, parse_text, read_source
from anabranch.dsl.printer import format_source, print_plan


def _stmt(text: str) -> ast.Stmt:
    (stmt,) = parse_text(f"a = plan() {{ {text} }}").plans[0].body.stmts
    return stmt


def _value(text: str) -> ast.Expr:
    stmt = _stmt(f"x = {text};")
    assert isinstance(stmt, ast.Let)
    return stmt.value


def _refused(text: str) -> PlanError:
    with pytest.raises(PlanError) as caught:
        parse_text(text)
    return caught.value


def _in_plan(text: str) -> PlanError:
    return _refused(f"a = plan() {{\n  {text}\n}}\n")


def test_calls_of_plans_are_told_from_host_calls() -> None:
    """A call is a `Call` if the file holds a plan of that name; parameters are told from options."""
    program = parse_text("""
        b = plan(q, depth=2) { x = b(q); y = c(); z = len(q); c(k=1, budget=5); }
        c = plan(k) { }
    """)
    x, y, z, bare = program.plans[0].body.stmts
    assert x == ast.Call("x", "b", (ast.Arg(None, ast.Name("q")),), ())
    assert y == ast.Call("y", "c", (), ())
    assert z == ast.Let("z", ast.Apply("len", (ast.Arg(None, ast.Name("q")),)))
    assert bare == ast.Call(None, "c", (ast.Arg("k", ast.Int(1)),), (ast.Option("budget", ast.Int(5)),))


@pytest.mark.parametrize("word", ["fork", "gen", "plan", "join", "else", "until", "text", "in", "branch"])
def test_words_can_be_names(word: str) -> None:
    """The grammar takes any word as a name (the checker refuses reserved ones)."""
    program = parse_text(f"{word} = plan({word}) {{ {word} = gen(max=3); x = {word} + 1; }}")
    assert program.plans[0].name == word
    assert program.plans[0].body.stmts[0] == ast.Gen(word, None, (ast.Option("max", ast.Int(3)),))


def test_precedence() -> None:
    """`||` is loosest, then `&&`, comparisons, `+ -`, `* /`, signs, and fields; the same level groups to the left."""
    assert _value("a || b && c == d + e * -f.g") == _value("a || (b && (c == (d + (e * (-(f.g))))))")
    assert _value("a - b - c") == _value("(a - b) - c") != _value("a - (b - c)")


def test_numbers_have_their_sign() -> None:
    """A minus before a literal is part of it; a literal in brackets is negated."""
    assert _value("-5") == ast.Int(-5)
    assert _value("- 2.50") == ast.Float(-2.5)
    assert _value("-(5)") == ast.Unary("-", ast.Int(5))
    assert _value("--5") == ast.Unary("-", ast.Int(-5))
    assert _value("a -5") == ast.Binary("-", ast.Name("a"), ast.Int(5))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('"a #{x.y[0]} b"', ("a ", ast.Index(ast.Field(ast.Name("x"), "y"), ast.Int(0)), " b")),
        ('"#{a}#{b}"', (ast.Name("a"), ast.Name("b"))),
        ('"##{x}"', ("#{x}",)),
        ('"###{x}"', ("#", ast.Name("x"))),
        ('"####{x}"', ("##{x}",)),
        ('"# #x {y} #"', ("# #x {y} #",)),
        ("'\\n \\frac{1}{2}'", ("\\n \\frac{1}{2}",)),
        ('"""a "b" ""\nc"""', ('a "b" ""\nc',)),
        ('""', ()),
        ('""""""', ()),
        ('"#{x[-1]}"', (ast.Index(ast.Name("x"), ast.Int(-1)),)),
    ],
)
def test_strings_are_raw_with_interpolations(text: str, parts: tuple[object, ...]) -> None:
    """No escapes; `#{...}` is a value, and in a run of `#` before a `{` each pair stands for one."""
    assert _value(text) == ast.Str(parts)  # type: ignore[arg-type]


def test_spans_point_into_the_source() -> None:
    """Every part of a statement knows its place, those of a string included."""
    text = 'a = plan(q: text(9)) {\n  x = fork(i: 4) { y = gen("#{q.z}!", max=3); } join(vote(y), stitch);\n  (q);\n}'
    text = text.replace("  (q);\n", "")
    plan = parse_text(text).plans[0]

    def shown(span: Span) -> str:
        return text[span.start : span.end]

    (fork,) = plan.body.stmts
    assert isinstance(fork, ast.Fork) and fork.join and fork.join.value and fork.join.context
    assert shown(plan.span) == text
    assert shown(plan.params[0].span) == "q: text(9)"
    assert shown(plan.body.span) == text[text.index("{") :]
    assert shown(fork.span).startswith("x = fork(i: 4)") and shown(fork.span).endswith("stitch);")
    assert shown(fork.join.span) == "join(vote(y), stitch)"
    assert shown(fork.join.value.span) == "vote(y)"
    assert shown(fork.join.context.span) == "stitch"
    (gen,) = fork.body.stmts
    assert isinstance(gen, ast.Gen) and isinstance(gen.prompt, ast.Str)
    assert shown(gen.span) == 'y = gen("#{q.z}!", max=3);'
    assert shown(gen.options[0].span) == "max=3"
    assert shown(gen.prompt.span) == '"#{q.z}!"'
    part = gen.prompt.parts[0]
    assert isinstance(part, ast.Field)
    assert shown(part.span) == "q.z" and shown(part.value.span) == "q"


def test_brackets_belong_to_a_span() -> None:
    """The span of an operation begins where its first operand does, brackets included."""
    text = "a = plan() { x = (b + c) * d; }"
    (let,) = parse_text(text).plans[0].body.stmts
    assert isinstance(let, ast.Let)
    assert text[let.value.span.start : let.value.span.end] == "(b + c) * d"


def test_a_last_comment_needs_no_newline() -> None:
    """A file may end in a comment, with or without a line end."""
    assert parse_text("a = plan() {} # end") == parse_text("a = plan() {}\n# end\n")


def test_read_source(tmp_path: Path) -> None:
    """A file's text, named as it was given; a byte-order mark and carriage returns at line ends are dropped."""
    path = tmp_path / "a.plan"
    path.write_bytes(b'\xef\xbb\xbfa = plan() {\r\n text("""x\r\ny""");\r\n}\r\n')
    source = read_source(path)
    assert source.name == str(path)
    (write,) = parse(source).plans[0].body.stmts
    assert write == ast.Write("text", ast.Str(("x\ny",)))


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (None, "no-such-file", "there is no file"),
        (b"", "empty-file", "is empty"),
        (b" \n\t\n", "empty-file", "is empty"),
        (b"\xef\xbb\xbf", "empty-file", "is empty"),
        (b"a = plan() { }\n# caf\xe9\n", "not-utf-8", "byte 0xe9 at offset 20"),
        (b" " * (MAX_FILE_BYTES + 1), "file-too-large", "larger than 16 MiB"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_can_t_be_read(tmp_path: Path, data: bytes | None, code: str, words: str) -> None:
    """A file that holds no plan's text is refused by name."""
    path = tmp_path / "a.plan"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(PlanError) as caught:
        read_source(path)
    assert caught.value.code == code
    assert words in caught.value.render() and str(path) in caught.value.render()
    assert caught.value.diagnostics[0].help


def test_a_directory_is_no_plan(tmp_path: Path) -> None:
    """A directory, and a path that no file can have, are refused like a missing file."""
    for path, code in ((tmp_path, "is-a-directory"), ("a\0b", "unreadable-file")):
        with pytest.raises(PlanError) as caught:
            read_source(path)
        assert caught.value.code == code


@pytest.mark.parametrize("levels", [500, 50_000])
@pytest.mark.parametrize(
    ("before", "link", "after"),
    [
        ("", "if (x) { ", "}; "),
        ("x = ", "(", ")"),
        ("x = ", "[", "]"),
        ("x = ", "f(", ")"),
        ("x = ", "a[", "]"),
        ("x = ", "!", ""),
        ("x = ", "-", ""),
        ("x = y", ".z", ""),
        ("x = y", "[0]", ""),
        ("x = y", " + y", ""),
        ("x = y", " || y", ""),
        ("x = y", " && y == z", ""),
    ],
)
def test_deep_nesting_is_refused(before: str, link: str, after: str, levels: int) -> None:
    """Nesting of any kind, however deep, is an error with a place, and takes time in proportion."""
    middle = "" if before.endswith("y") else "y"
    error = _refused("a = plan() { " + before + link * levels + middle + after * levels + "; }")
    assert error.code == "too-deep"
    assert error.diagnostics[0].span is not None
    assert len(error.render()) < 2000


def test_as_deep_as_allowed() -> None:
    """The deepest programs allowed can be compared, printed, formatted and read again."""
    blocks = MAX_BRACKETS - 2
    nested = "a = plan() { " + "if (x) { " * blocks + "y = f(1);" + " };" * blocks + " }"
    chain = "a = plan() { x = " + "y + " * (MAX_DEPTH - 8) + "y; }"
    for text in (nested, chain):
        program = parse_text(text)
        assert parse_text(print_plan(program)) == program
        assert parse_text(format_source(Source("x", text))) == program
        hash(program.plans)
        repr(program)
    assert _refused("a = plan() { " + "if (x) { " * MAX_BRACKETS).code == "too-deep"
    assert _refused("a = plan() { x = " + "y + " * MAX_DEPTH + "y; }").code == "too-deep"


def test_wide_is_not_deep() -> None:
    """Many operators side by side, each in an argument of its own, are no nesting."""
    terms = ", ".join("a + b * c == d && e[0].f" for _ in range(2000))
    value = _value(f"[{terms}]")
    assert isinstance(value, ast.List) and len(value.items) == 2000


def _branches(count: int) -> str:
    each = (
        'b{0} = branch("Approach {0}: ") {{ w = gen(max={0}1); a = gen("So #{{w}}: ", type=int, max=12); return(a); }};'
    )
    body = "\n".join(each.format(i) for i in range(count))
    return "main = plan() {\n x = fork() {\n" + body + "\n } join(vote(a), stitch);\n}\n"


def test_many_branches() -> None:
    """10,000 distinct branches (450,000 tokens) are read; benchmarks/compile.py tells how fast."""
    (fork,) = parse_text(_branches(10_000)).plans[0].body.stmts
    assert isinstance(fork, ast.Branches) and len(fork.branches) == 10_000


def test_ten_megabytes() -> None:
    """A string of 10 MB is read; an error in one is shown in a few lines."""
    text = 'x" #{' * 2_000_000
    (write,) = parse_text('a = plan() { text("""' + text.replace("#{", "# {") + 'x"""); }').plans[0].body.stmts
    assert isinstance(write, ast.Write)
    error = _refused('a = plan() { text("""' + text + 'x"""); }')
    assert error.code == "bad-interpolation" and len(error.diagnostics) == MAX_ERRORS
    assert len(error.render()) < 20_000
    assert _refused('a = plan() { text("' + "x" * 10_000_000 + "); }").code == "unterminated-string"
    assert _refused("{" * 10_000_000).code == "not-a-plan"
    assert len(_refused("a" * 10_000_000 + "(").render()) < 2000
    assert len(_refused('a = plan("' + "x" * 10_000_000 + '") {}').render()) < 2000
    assert _refused("a = plan() { " + "if (x) {}; " * 20_000).code == "unclosed-bracket"


@given(st.text(max_size=60) | st.text("(){}[];,:=.+-*/!<>&|#\"'a1_ \n", max_size=60))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    """No text does anything but parse or raise a PlanError that can be shown."""
    for tried in (text, f"a = plan() {{ {text} }}"):
        try:
            parse_text(tried)
        except PlanError as error:
            assert error.render()
            assert all(d.span is None or 0 <= d.span.start <= d.span.end <= len(tried) for d in error.diagnostics)


def test_threads_do_not_mix() -> None:
    """Texts read at once in several threads each give their own program."""
    texts = [f"p{i} = plan() {{ {'x = 1; ' * 200} y = {i}; }}" for i in range(8)]
    found: list[ast.Program | None] = [None] * len(texts)

    def read(i: int) -> None:
        found[i] = parse_text(texts[i])

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [parse_text(text) for text in texts]


def test_an_error_leaves_nothing_behind() -> None:
    """After a refused text the next one is read as if it were the first."""
    _refused("a = plan() { x = 1 + gen(max=3); loop(2) {} join(all); (")
    assert parse_text("a = plan() { x = 1; }").plans[0].body.stmts == (ast.Let("x", ast.Int(1)),)


def test_no_torch_on_the_way() -> None:
    """Reading a plan imports neither torch nor llguidance."""
    code = "import sys, anabranch.dsl.printer; print([m for m in ('torch', 'llguidance') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


EXACT = {
    "frok(4) { };": """\
error[unknown-statement]: `frok` is no statement that takes a block
 --> <plan>:2:3
  |
2 |   frok(4) { };
  |   ^^^^
help: did you mean `fork`?""",
    'txet("a");': """\
error[unknown-statement]: `txet` is no statement
 --> <plan>:2:3
  |
2 |   txet("a");
  |   ^^^^
help: did you mean `text`?""",
    "fork { };": """\
error[missing-brackets]: `fork` needs brackets
 --> <plan>:2:3
  |
2 |   fork { };
  |   ^^^^
help: write `x = fork(4) { ... } join(all, drop);`""",
    "x = fork(4);": """\
error[missing-block]: `fork` needs a block
 --> <plan>:2:7
  |
2 |   x = fork(4);
  |       ^^^^
help: write `x = fork(4) { ... } join(all, drop);`""",
    "x = gen(max=3) { };": """\
error[unexpected-block]: `gen` takes no block
 --> <plan>:2:18
  |
2 |   x = gen(max=3) { };
  |                  ^
help: write `x = gen("...", max=100);`; is a `;` missing?""",
    "loop(3) { } join(all);": """\
error[misplaced-tail]: `join` follows `fork` and `map`, not `loop`
 --> <plan>:2:15
  |
2 |   loop(3) { } join(all);
  |               ^^^^
help: write `loop(3) { ... } until(done);`""",
    "x = gen(max=3) join(all);": """\
error[misplaced-tail]: `join` can't stand here
 --> <plan>:2:18
  |
2 |   x = gen(max=3) join(all);
  |                  ^^^^
help: `join` follows the block of a `fork` or `map`, `else` that of an `if`, `until` that of a `loop`""",
    "x = fork(2) { a = branch() { }; };": """\
error[width-and-branches]: a `fork` has a width or named branches, not both
 --> <plan>:2:12
  |
2 |   x = fork(2) { a = branch() { }; };
  |            ^ this is the width
help: leave the width out: the branches say how many there are""",
    'a = branch("x") { };': """\
error[branch-outside-fork]: a `branch` stands directly in a `fork`
 --> <plan>:2:3
  |
2 |   a = branch("x") { };
  |   ^
help: put it in the block of a fork without a width: `x = fork() { a = branch() { ... }; };`""",
    "x = fork() { };": """\
error[bad-arguments]: a `fork` needs a width or named branches
 --> <plan>:2:7
  |
2 |   x = fork() { };
  |       ^^^^
help: write `fork(4) { ... }`, or `fork() { a = branch() { ... }; b = branch() { ... }; }`""",
    "x = map(xs) { };": """\
error[bad-arguments]: `map` names its item: `map(item: items)`, or `map(i, item: items)` with the index
 --> <plan>:2:7
  |
2 |   x = map(xs) { };
  |       ^^^
help: write `x = map(item: items) { ... } join(all, drop);`""",
    "text(a, b);": """\
error[bad-arguments]: `text` takes at most one unnamed argument
 --> <plan>:2:11
  |
2 |   text(a, b);
  |           ^
help: write `text("...");`""",
    "x = fork(2) { } join(vote);": """\
error[bad-join]: `vote` has the wrong arguments
 --> <plan>:2:24
  |
2 |   x = fork(2) { } join(vote);
  |                        ^^^^
help: write `vote(x)` with the name to vote on, or `vote(x, by=casefold)`""",
    "x = fork(2) { } join(voet(a));": """\
error[unknown-join]: `voet` is no join
 --> <plan>:2:24
  |
2 |   x = fork(2) { } join(voet(a));
  |                        ^^^^^^^
help: did you mean `vote`?""",
    "x = fork(2) { } join(stitch, all);": """\
error[bad-join]: `all` is out of place: a join has one value, then one context
 --> <plan>:2:32
  |
2 |   x = fork(2) { } join(stitch, all);
  |                                ^^^
help: write `join(value, context)`: `all`, `vote(x)`, `best(x)`, `first(n)` or `quorum(n, x)`, then `drop`, `text` or \
`stitch`; either may be left out""",
    'text("#{1+}");': """\
error[bad-interpolation]: `#{1+}` can't be interpolated
 --> <plan>:2:9
  |
2 |   text("#{1+}");
  |         ^^^^^ a name, with fields and indices, may stand here
help: bind the value to a name first: `#{name}`, `#{x.field}`, `#{x[0]}`; write `##{` for the text `#{`""",
    'text("open);': """\
error[unterminated-string]: this string does not end on its line
 --> <plan>:2:8
  |
2 |   text("open);
  |        ^^^^^^^
help: close it with `"`, or use `\"\"\"` for text of several lines""",
    "x = 1": """\
error[missing-semicolon]: a `;` is missing after `1`
 --> <plan>:2:7
  |
2 |   x = 1
  |       ^
help: every statement ends in `;`, also after a block""",
    "x = (1;": """\
error[unclosed-bracket]: this `(` is never closed
 --> <plan>:2:7
  |
2 |   x = (1;
  |       ^
help: close it with `)` before this `;` (line 2, column 9)""",
    "x = gen(max=3, );": """\
error[unexpected-token]: `)` can't stand here
 --> <plan>:2:18
  |
2 |   x = gen(max=3, );
  |                  ^
help: remove the `,` before it""",
    "x = 3 % 2;": """\
error[bad-character]: `%` is no operator
 --> <plan>:2:9
  |
2 |   x = 3 % 2;
  |         ^
help: the operators are `+ - * /`""",
    "Answer = 3;": """\
error[bad-name]: `Answer` is no name
 --> <plan>:2:3
  |
2 |   Answer = 3;
  |   ^^^^^^
help: names are lower-case letters, digits and `_`""",
    "x + 1;": """\
error[bare-expression]: an expression alone does nothing
 --> <plan>:2:3
  |
2 |   x + 1;
  |   ^^^^^
help: bind it: `x = ...;`, or give it back: `return(...);`""",
    "x = 1 + gen(max=3);": """\
error[nested-statement]: `gen` is a statement and can't stand inside an expression
 --> <plan>:2:11
  |
2 |   x = 1 + gen(max=3);
  |           ^^^
help: bind its value first: `x = gen(...);`, then use `x`""",
    "x = need(y);": """\
error[no-value]: `need` yields no value to bind to `x`
 --> <plan>:2:7
  |
2 |   x = need(y);
  |       ^^^^
help: write `need(x > 0);`""",
    "loop(3, budget=5) { };": """\
error[unknown-option]: `loop` has no option `budget`
 --> <plan>:2:11
  |
2 |   loop(3, budget=5) { };
  |           ^^^^^^^^
help: write `loop(3) { ... } until(done);`""",
    "x = gen(max=3, max=4);": """\
error[repeated-option]: option `max` is given twice
 --> <plan>:2:18
  |
2 |   x = gen(max=3, max=4);
  |                  ^^^^^
help: keep one of them""",
}


@pytest.mark.parametrize("text", EXACT, ids=lambda text: text)
def test_what_errors_say(text: str) -> None:
    """Each class of error, word for word."""
    assert _in_plan(text).render() == EXACT[text]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "empty-file"),
        ("# only a comment", "empty-file"),
        ("a", "unexpected-token"),
        ("a = pln() { }", "not-a-plan"),
        ("x = gen(max=3);", "not-a-plan"),
        ("text('a');", "not-a-plan"),
        ("a = plan() { } text('a');", "not-a-plan"),
        ("a = plan() { } }", "unopened-bracket"),
        ("a = plan() { x = 1;", "unclosed-bracket"),
        ("a = plan() { x = [1; }", "unclosed-bracket"),
        ("a = plan(x { }", "unclosed-bracket"),
        ("a = plan() { x = 1;\nb = plan() { }\nc = plan() { }", "unclosed-bracket"),
        ("a = plan() { b = plan() { }; }", "nested-plan"),
        ("a = plan(1) { }", "unexpected-token"),
        ("a = plan(k=1, k=2) { }", "repeated-option"),
        ("a = plan() { x = f(y: 1); }", "misplaced-binder"),
        ("a = plan() { x = 1 + f(fork(2)); }", "nested-statement"),
        ("a = plan() { x = fork(2) { } join(1); }", "unknown-join"),
        ("a = plan() { x = fork(2) { } join(limit=3); }", "bad-join"),
        ("a = plan() { x = fork(2) { } join(drop(1)); }", "bad-join"),
        ("a = plan() { x = fork(2) { } join(stitch(mix)); }", "bad-join"),
        ("a = plan() { x = fork(2) { } join(vote(a, by=exactly)); }", "bad-join"),
        ("a = plan() { x = fork(2) { } join(best(a + 1)); }", "bad-join"),
        ("a = plan() { x = fork(2) { } join(first(1, by=exact)); }", "bad-join"),
        ("a = plan() { x = fork() { b = branch() { }; y = 1; }; }", "bad-fork"),
        ("a = plan() { x = fork(i: 2, 3) { }; }", "bad-arguments"),
        ("a = plan() { x = reduce(xs, by=2) { }; }", "bad-arguments"),
        ("a = plan() { x = reduce(g: xs) { } join(all); }", "misplaced-tail"),
        ("a = plan() { if (x) { } until(y); }", "misplaced-tail"),
        ("a = plan() { need(); }", "bad-arguments"),
        ("a = plan() { x = 1 { }; }", "unexpected-block"),
        ("a = plan() { text('#{a b}'); }", "bad-interpolation"),
        ("a = plan() { text('#{'); }", "bad-interpolation"),
        ("a = plan() { text('#{x" + ".y" * 40 + "}'); }", "bad-interpolation"),
        ('a = plan() { text("""open"); }', "unterminated-string"),
        ("a = plan() { x = " + "9" * 5000 + "; }", "number-too-large"),
        ("a = plan() { x = " + "9" * 400 + ".0; }", "number-too-large"),
        ("a = plan() { x = \u201ca\u201d; }", "bad-character"),
        ("a = plan() { x = a & b; }", "bad-character"),
        ("a = plan() { // no\n }", "unexpected-token"),
        ("a = plan() { x = a == b == c; }", "unexpected-token"),
        ("a = plan() { x.y = 3; }", "unexpected-token"),
        ("a = plan() { x = not y; }", "unexpected-token"),
        ("a = plan() { for (x) { }; }", "unknown-statement"),
        ("a = plan() { while x { }; }", "unexpected-token"),
    ],
)
def test_codes(text: str, code: str) -> None:
    """The code, a help and a place in the text, for what else can be wrong."""
    error = _refused(text)
    assert error.code == code, error.render()
    assert error.diagnostics[0].span is not None
    assert error.diagnostics[0].help


def test_errors_come_together_in_order() -> None:
    """Statements of the wrong shape are all told, up to the first thing that can't be read."""
    error = _in_plan("frok(2) { };\n  loop() { };\n  x = fork(2) { } join(vot(a));\n  return x;")
    assert [d.code for d in error.diagnostics] == [
        "unknown-statement",
        "bad-arguments",
        "unknown-join",
        "missing-brackets",
    ]


def test_the_indentation_tells_the_open_block() -> None:
    """Of the blocks that may lack their `}`, the one whose `}` would stand where an outer one's does is named."""
    error = _refused("a = plan() {\n  x = fork(2) {\n    y = 1;\n  z = 2;\n}\n")
    assert error.source is not None and error.diagnostics[0].span is not None
    assert error.source.position(error.diagnostics[0].span.start)[0] == 2


def test_the_language_page_is_right() -> None:
    """Every example of docs/language.md is read, its `...` aside."""
    page = (Path(__file__).parents[1] / "docs" / "language.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 12
    for example in examples:
        if example == "join(value, context)\n":
            continue
        text = re.sub(r"\.\.\.(?=[\n ])", "", example)
        if " = plan(" not in text:
            text = "a = plan() {\n" + text + "}\n"
        parse_text(text)
