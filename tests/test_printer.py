"""Canonical text, formatting and the syntax tree's dump."""

from __future__ import annotations

import random
import re

import pytest
import strategies_ast as strategies
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from anabranch.dsl import ast
from anabranch.dsl.diagnostics import Source
from anabranch.dsl.parse import parse_text
from anabranch.dsl.printer import WIDTH, format_source, print_plan
from anabranch.dsl.strings import read_string, write_string

_SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@given(strategies.programs())
@_SETTINGS
def test_printed_programs_read_back(program: ast.Program) -> None:
    """parse(print(p)) == p, and printing again gives the same text."""
    text = print_plan(program)
    again = parse_text(text)
    assert again == program
    assert print_plan(again) == text
    assert format_source(Source("x", text)) == text


@given(strategies.strings)
@_SETTINGS
def test_strings_read_back(string: ast.Str) -> None:
    """A string that some quotes can hold is read as it was, in each of its parts."""
    errors: list[object] = []
    assert read_string(write_string(string), 0, errors.append) == string
    assert errors == []


_TOKEN = re.compile(r'"""[^"]*(?:""?[^"]+)*"""|"[^"\n]*"|' + r"'[^'\n]*'|[a-z_0-9.]+|[=!<>]=|&&|\|\||\s+|.", re.DOTALL)


def _littered(text: str, random: random.Random) -> tuple[str, list[str]]:
    """`text` with comments, line ends and blanks put between its tokens; the comments."""
    out: list[str] = []
    comments: list[str] = []
    for token in _TOKEN.findall(text):
        chance = random.random()
        if token.isspace() or token in "(){};,=":
            if chance < 0.08:
                comments.append(f"# note {len(comments)} \"{{'")
                out.append(f" {comments[-1]}\n")
            elif chance < 0.15:
                out.append(random.choice(["\n", "\n\n\n", "  ", "\t"]))
        out.append(token)
    return "".join(out), comments


@given(strategies.programs(), st.randoms(use_true_random=False))
@_SETTINGS
def test_formatting_keeps_syntax_and_comments(program: ast.Program, random: random.Random) -> None:
    """Wherever comments and blanks stand, formatting keeps the syntax and every comment, and is done at once."""
    text, comments = _littered(print_plan(program), random)
    formatted = format_source(Source("x", text))
    assert parse_text(formatted) == program
    found = re.findall(r"# note \d+ \"\{'", formatted)
    assert sorted(found) == sorted(comments)
    assert format_source(Source("x", formatted)) == formatted
    assert not re.search(r"[ \t]$", re.sub(r'"""[^"]*(?:""?[^"]+)*"""|"[^"\n]*"|' + r"'[^'\n]*'", "s", formatted), re.M)


UNTIDY = """\
   # About the file.

# About a.


a   =  plan( q ,budget = 10){ # opens
# first
   text( "x" ) ;   # beside


   # on its own

   y=fork(2){return(1);}   join( all ) ; # beside the fork
   z = fork(  # in the header
     ){ b=branch(){ # opens b
   }; # beside b
   # closes z
   };
   if(q){
     # only a comment
   }else{text("no");};
   # closes a
} # after a
# before b
b = plan(){}


# the end
"""

TIDY = """\
# About the file.

# About a.

a = plan(q, budget=10) {  # opens
  # first
  text("x");  # beside

  # on its own

  y = fork(2) {
    return(1);
  } join(all);  # beside the fork
  # in the header
  z = fork() {
    b = branch() {  # opens b
    };  # beside b
    # closes z
  };
  if (q) {
    # only a comment
  } else {
    text("no");
  };
  # closes a
}  # after a

# before b
b = plan() {}

# the end
"""


def test_where_comments_go() -> None:
    """A comment stays beside, before or at the end of what it was; inside a statement it moves before it."""
    assert format_source(Source("x", UNTIDY)) == TIDY
    assert format_source(Source("x", TIDY)) == TIDY


def test_long_argument_lists_wrap() -> None:
    """An argument list that does not fit takes a line an argument; a nested one wraps in its turn."""
    long = "x" * 60
    text = print_plan(parse_text(f'a = plan() {{ y = gen("{long}", max=10, type=choice("{long}", "{long}")); }}'))
    assert text == (
        "a = plan() {\n"
        "  y = gen(\n"
        f'    "{long}",\n'
        "    max=10,\n"
        "    type=choice(\n"
        f'      "{long}",\n'
        f'      "{long}"\n'
        "    )\n"
        "  );\n"
        "}\n"
    )
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize(
    "text",
    [
        "(a + b) * c",
        "a - (b - c)",
        "a - b - c",
        "!(a && b) || c",
        "(a == b) == c",
        "a == (b < c)",
        "-(2)",
        "-2",
        "--2",
        "(-2).x",
        "(2)[0]",
        "(a + b).x[i + 1]",
        "-a.b",
        "(-a).b",
        "f(a, by=b + 1)[0]",
        "[1, [2.5, -0.1]]",
        "a + -1",
    ],
)
def test_least_brackets(text: str) -> None:
    """An expression written with no more brackets than needed is printed as it is."""
    assert print_plan(parse_text(f"a = plan() {{ x = {text}; }}")) == f"a = plan() {{\n  x = {text};\n}}\n"


def test_needless_brackets_go() -> None:
    """Brackets that change nothing are not printed."""
    program = parse_text("a = plan() { x = ((a) * (b)) + (f((c))); }")
    assert print_plan(program) == "a = plan() {\n  x = a * b + f(c);\n}\n"


@pytest.mark.parametrize(
    ("raw", "written"),
    [
        ("plain", '"plain"'),
        ('say "hi"', "'say \"hi\"'"),
        ("it's", '"it\'s"'),
        ('it\'s "hi" now', '"""it\'s "hi" now"""'),
        ("two\nlines", '"""two\nlines"""'),
        ("#{x}", '"##{x}"'),
        ("##{x}", '"####{x}"'),
        ("a # b #", '"a # b #"'),
    ],
)
def test_quotes_are_chosen(raw: str, written: str) -> None:
    """The first quotes that can hold a string are used, and `#{` in text is escaped."""
    assert print_plan(ast.Str((raw,))) == written


@given(st.floats(allow_nan=False, allow_infinity=False))
@example(5e-324)
@example(1.7976931348623157e308)
@example(-0.0)
@_SETTINGS
def test_floats_read_back(number: float) -> None:
    """Every finite float has a text without an exponent that reads back to the same bits."""
    text = print_plan(ast.Return(ast.Float(number)))
    stmt = parse_text(f"a = plan() {{ {text} }}").plans[0].body.stmts[0]
    assert isinstance(stmt, ast.Return) and isinstance(stmt.value, ast.Float)
    assert stmt.value.value.hex() == number.hex()


def _deep(levels: int) -> ast.Expr:
    value: ast.Expr = ast.Name("x")
    for _ in range(levels):
        value = ast.Unary("!", value)
    return value


@pytest.mark.parametrize(
    "node",
    [
        ast.Str(('it\'s "hi"\nsay """ now',)),
        ast.Str(('ends\nin "',)),
        ast.Str((ast.Index(ast.Name("x"), ast.Name("i")),)),
        ast.Name("Upper"),
        ast.Name("true"),
        ast.Float(float("inf")),
        ast.Float(float("nan")),
        ast.Int(10**2000),
        ast.Apply("gen", ()),
        ast.Let("x", ast.Apply("text", ())),
        ast.Let("a-b", ast.Int(1)),
        ast.Gen(None, None, (ast.Option("max tokens", ast.Int(1)),)),
        _deep(100_000),
    ],
    ids=lambda node: type(node).__name__,
)
def test_what_no_text_can_say(node: ast.Expr | ast.Stmt) -> None:
    """Syntax without a text is a ValueError, not wrong text."""
    with pytest.raises(ValueError):
        print_plan(node)


def test_parts_print_alone() -> None:
    """A plan, a branch, a statement and an expression can be printed without their program."""
    program = parse_text("a = plan() { x = fork() { b = branch() { y = 1 + 2; }; }; }")
    fork = program.plans[0].body.stmts[0]
    assert isinstance(fork, ast.Branches)
    branch = fork.branches[0]
    let = branch.body.stmts[0]
    assert isinstance(let, ast.Let)
    assert print_plan(let.value) == "1 + 2"
    assert print_plan(let) == "y = 1 + 2;"
    assert print_plan(branch) == "b = branch() {\n  y = 1 + 2;\n};"
    assert print_plan(program.plans[0]) + "\n" == print_plan(program)
