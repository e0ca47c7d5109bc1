"""The readers of `plan.lark` agree: lark's LALR parser, the token-mask engine llguidance, and hypothesis."""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path

import pytest
import strategies_ast as strategies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.lark import from_lark
from lark import Lark
from lark.exceptions import UnexpectedInput
from llguidance import LLMatcher, LLTokenizer

from anabranch.dsl.grammar import grammar_text, lark_parser, llguidance_grammar
from anabranch.dsl.printer import print_plan

_SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

PLANS = [
    """# four attempts
solve = plan(problem: text(2000), budget=8000) {
  user("#{problem}");
  answer = fork(i: 4, limit=2) { work = gen(max=1500, temperature=0.9); return([work, i]); } join(vote(ans), stitch);
  x = -a.b[0] * (c - 1) / 2 >= 3 && !d || f(x, by=1.5) != 'it"s';
}
""",
    """p = plan() {
  x = fork() { a = branch("A") { text(\"\"\"one "two" \"\"\"); }; b = branch() {}; } join(first(1));
  loop(3) { y = gen(); } until(y == "");  # after
  if (x) { need(true); } else { return([]); };
}
join = plan(xs: list(16)) { best = reduce(g: xs, by=3) { return(g); }; }
""",
]

REFUSED = [
    "",
    "x",
    "a = plan() { x = 1 }",
    "a = plan() { x = gen(max=3,); }",
    "a = plan() { x = 1.y; }",
    "a = plan() { x = 1[0]; }",
    "a = plan() { x = a == b == c; }",
    "a = plan() { return x; }",
    "a = plan() { if (x) {} else if (y) {}; }",
    "a = plan() { x = fork(2) { } join all; }",
    "a = plan() {};",
    "a = plan() {} join(all)",
    "a = plan() { x = (1, 2); }",
    "a = plan() { x = [1, 2,]; }",
    "a = plan() { x = f(a: b: c); }",
    "a = plan() { X = 1; }",
    "a = plan() { x = 'it's'; }",
    'a = plan() { x = "a\nb"; }',
    'a = plan() { x = """a"; }',
    'a = plan() { x = """"""" ; }',
    "a = plan() { x = 1 y = 2; }",
    "a = plan() { x = y z; }",
    "a = plan() { x = .5; }",
    "a = plan() { x = 5.; }",
    "a = plan() { x = = 5; }",
    "a = plan() { x = a & b; }",
    "a = plan(3) {}",
    "a = plan(x=1=2) {}",
    "a = plan() { x. = 1; }",
    "a = plan() { {} }",
    "a = plan() { ; }",
]


@cache
def _lark() -> Lark:
    return lark_parser()


@cache
def _tokenizer() -> LLTokenizer:
    return LLTokenizer("byte")


@cache
def _matcher() -> LLMatcher:
    matcher = LLMatcher(_tokenizer(), llguidance_grammar(), log_level=0)
    assert not matcher.get_error()
    return matcher


def lark_reads(text: str) -> bool:
    """Whether lark's parser accepts `text` (which it gets with a last newline)."""
    try:
        _lark().parse(text + "\n")
    except UnexpectedInput:
        return False
    return True


_LEXEME = re.compile(r'"""[^"]*(?:""?[^"]+)*"""|"[^"\n]*"|' + r"'[^'\n]*'|(?P<ignored>#[^\n]*|[ \t\r\n]+)|.")


def llguidance_reads(text: str) -> bool:
    """Whether llguidance accepts `text`, from whose end it needs white space and comments stripped."""
    lexemes = list(_LEXEME.finditer(text))
    while lexemes and lexemes[-1]["ignored"]:
        lexemes.pop()
    text = text[: lexemes[-1].end()] if lexemes else ""
    matcher = _matcher().deep_copy()
    return all(matcher.consume_token(byte) for byte in text.encode()) and matcher.is_accepting()


def _agree(text: str) -> bool:
    """What both readers say of `text`."""
    by_lark, by_llguidance = lark_reads(text), llguidance_reads(text)
    assert by_lark == by_llguidance, f"lark {by_lark}, llguidance {by_llguidance}: {text!r}"
    return by_lark


def test_the_grammar_has_no_conflict() -> None:
    """lark's strict mode finds no conflict and no two terminals that match the same text in one place."""
    lark_parser(strict=True)


def test_strict_mode_sees_a_conflict() -> None:
    """The test above can fail: an ambiguous rule is refused."""
    ambiguous = grammar_text().replace("?sum: term |", "?sum: term | sum sum |")
    with pytest.raises(Exception, match="conflict"):
        Lark(ambiguous, parser="lalr", strict=True)


def test_a_name_is_no_keyword() -> None:
    """Every statement word, and the three words of the grammar, can be names where the grammar takes names."""
    for word in ("fork", "gen", "plan", "join", "else", "until", "text", "true"):
        assert _agree(f"{word} = plan({word}, {word}=1) {{ {word} = {word}({word}={word}.{word}); }}")
        assert _agree(f"a = plan() {{ }} {word} = plan() {{ }}")


@pytest.mark.parametrize("text", PLANS)
def test_plans_are_read(text: str) -> None:
    """Both readers accept plans that use all of the grammar."""
    assert _agree(text)


@pytest.mark.parametrize("text", REFUSED)
def test_what_lark_refuses_llguidance_refuses(text: str) -> None:
    """Near misses are refused by both."""
    assert not _agree(text)


@given(from_lark(_lark(), start="start"))
@_SETTINGS
def test_generated_texts_are_read(text: str) -> None:
    """What hypothesis makes of the grammar, both accept."""
    assert _agree(text)


@given(strategies.programs(depth=1), st.randoms(use_true_random=False))
@_SETTINGS
def test_mutants_agree(program: object, random: random.Random) -> None:
    """A character dropped, doubled, or replaced by one that means something: both accept, or both refuse."""
    text = print_plan(program)  # type: ignore[arg-type]
    assert _agree(text)
    for _ in range(8):
        at = random.randrange(len(text))
        new = random.choice(["", text[at] * 2, *"(){}[];,:=.+-*/!<>&|#\"'a1_ \n\\é"])
        _agree(text[:at] + new + text[at + 1 :])


@given(strategies.programs(depth=1), st.randoms(use_true_random=False))
@_SETTINGS
def test_keyword_swaps_agree(program: object, random: random.Random) -> None:
    """A word or a sign exchanged for another: both accept, or both refuse."""
    text = print_plan(program)  # type: ignore[arg-type]
    spans = [m.span() for m in re.finditer(r"[a-z_]+|[^\w\s]", text)]
    for _ in range(8):
        start, end = random.choice(spans)
        new = random.choice(
            ["join", "else", "until", "fork", "plan", "gen", "true", "{", "}", ";", "==", "=", "1.5", '""']
        )
        _agree(text[:start] + new + text[end:])


def test_one_grammar_file() -> None:
    """llguidance gets the very text that lark gets, after one line of its own."""
    assert llguidance_grammar().split("\n", 1)[1] == grammar_text()
    assert grammar_text() == (Path(__file__).parents[1] / "dsl" / "plan.lark").read_text(encoding="utf-8")
