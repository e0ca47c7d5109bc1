"""Types as token automata: against llguidance, against Python's `re`, and steered to their budget."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import llguidance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.dsl.diagnostics import PlanError
from anabranch.dsl.spec import (
    BoolType,
    ChoiceType,
    FloatType,
    GenSpec,
    GenType,
    IntType,
    JsonType,
    LinesType,
    RegexType,
    TextType,
)
from anabranch.runtime import automata
from anabranch.runtime.automata import DfaAutomaton, LinesAutomaton, TooLarge, Vocabulary, tables, to_dfa, with_stops
from anabranch.runtime.constrain import AutomatonConstraint, Constraints, MatcherConstraint, regex_of
from anabranch.runtime.generation import Generation
from anabranch.runtime.regexes import parse_regex
from anabranch.runtime.smollm2 import packaged_gguf
from anabranch.runtime.tokenizer import Tokenizer, byte_tokenizer
from anabranch.runtime.weights import GgufFile

LINE = r"[^ \t\r\n][^\r\n]*"
TYPES: dict[str, tuple[GenType, str]] = {
    "int": (IntType(), "-?(0|[1-9][0-9]*)"),
    "float": (FloatType(), r"-?(0|[1-9][0-9]*)(\.[0-9]+)?"),
    "bool": (BoolType(), "true|false"),
    "choice": (ChoiceType(("yes", "no", "not sure", "né", "n")), "yes|no|not sure|né|n"),
    "lines": (LinesType(2, 3), rf"{LINE}(\n{LINE}){{1,2}}\n?"),
    "one line": (LinesType(1, 1), rf"{LINE}\n?"),
    "regex": (RegexType(r"[A-Z][a-z]{2,5}(-[^0-9]+)?|#."), r"[A-Z][a-z]{2,5}(-[^0-9]+)?|#."),
}
SCHEMA = JsonType(
    '{"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"},'
    ' "tags": {"type": "array", "items": {"type": "object", "properties": {"t": {"type": "string"}},'
    ' "required": ["t"]}}},'
    ' "required": ["name", "n"], "additionalProperties": false}'
)


@pytest.fixture(scope="module", params=["bytes", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "bytes":
        return byte_tokenizer()
    path = packaged_gguf()
    if path is None:
        pytest.skip("needs SmolLM2: `anabranch model get smollm2`")
    return Tokenizer.from_gguf(GgufFile(path))


@pytest.fixture(scope="module")
def constraints(tokenizer: Tokenizer) -> Constraints:
    return Constraints(tokenizer)


@pytest.fixture(scope="module")
def small() -> Constraints:
    return Constraints(byte_tokenizer())


def allowed(mask: Any) -> list[int]:
    return [int(i) for i in np.unpackbits(np.asarray(mask).view(np.uint8), bitorder="little").nonzero()[0]]


def generate(
    constraints: Constraints, kind: GenType, limit: int, pick: Callable[[list[int]], int], **options: Any
) -> Generation:
    """Draw by `pick` among the allowed tokens until the gen is done."""
    held, stop = options.get("held_space", False), options.get("stop", ())
    constraint = constraints.start(kind, held_space=held, stop=stop)
    gen = Generation(
        GenSpec(kind, limit, stop=stop),
        constraints.vocabulary.tokenizer,
        constraint=constraint,
        held_space=held,
        limit=limit,
    )
    while not gen.done:
        mask = gen.mask()
        if not gen.done:
            gen.push(pick(allowed(mask)))
    return gen


@pytest.mark.parametrize("held", [False, True], ids=["", "held space"])
@pytest.mark.parametrize("name", TYPES)
def test_masks_equal_llguidance(constraints: Constraints, name: str, held: bool) -> None:
    """Along random walks, every bit, the end-of-turn tokens included."""
    kind, pattern = TYPES[name]
    grammar = llguidance.LLMatcher.grammar_from_regex(f" ?(?:{pattern})" if held else pattern)
    rng = random.Random(name)
    for walk in range(6):
        matcher = llguidance.LLMatcher(constraints.vocabulary.tokenizer.ll_tokenizer(), grammar)
        constraint = constraints.start(kind, held_space=held)
        assert isinstance(constraint, AutomatonConstraint)
        for _ in range(14):
            assert constraint.complete == matcher.is_stopped()
            if constraint.complete:
                break
            assert constraint.accepting == matcher.is_accepting()
            size = constraints.vocabulary.size
            theirs = [i for i in allowed(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)) if i < size]
            ours = allowed(constraint.mask(automata.FAR))
            forced = matcher.compute_ff_bytes()
            if forced:
                # Then llguidance's mask holds only the token that the tokenizer itself would take for the forced text.
                texts = constraints.vocabulary.texts
                assert (
                    set(theirs)
                    <= set(ours)
                    == {i for i, t in enumerate(texts) if t and forced.startswith(t)}
                    | {i for i in ours if texts[i].startswith(forced) and matcher.validate_tokens([i]) == 1}
                )
            else:
                assert ours == theirs
            go_on = [i for i in ours if i not in constraints.vocabulary.eos_ids]
            # Half the walks go by short tokens, so that they come through more states.
            short = [i for i in go_on if len(constraints.vocabulary.texts[i]) < 3] if walk % 2 else []
            token = rng.choice(short or go_on)
            constraint.advance(token)
            assert matcher.consume_token(token)


@pytest.mark.parametrize("held", [False, True], ids=["", "held space"])
@pytest.mark.parametrize("name", TYPES)
def test_every_budget_gives_a_value(constraints: Constraints, name: str, held: bool) -> None:
    """From the least number of tokens on a typed gen never fails, whatever is drawn; below, it fails before a draw."""
    kind, pattern = TYPES[name]
    least = constraints.least_tokens(kind, held_space=held)
    rng = random.Random(name)
    for limit in range(least, least + 8):
        for _ in range(4):
            gen = generate(constraints, kind, limit, rng.choice, held_space=held)
            assert gen.done in ("max", "complete", "end_of_turn"), gen.reason
            assert re.fullmatch(pattern, gen.text)
            assert gen.drawn <= limit
    if least > 1:
        gen = generate(constraints, kind, least - 1, rng.choice, held_space=held)
        assert (gen.done, gen.drawn) == ("failed", 0)
        assert f"the {least - 1} tokens that are left" in gen.reason


def test_least_tokens_is_least(small: Constraints) -> None:
    """By trying all runs of tokens up to the figure."""
    vocabulary = small.vocabulary
    for kind in (BoolType(), ChoiceType(("noon", "yes!")), LinesType(2, 2), RegexType("a{3}|b{5}")):
        constraint = small.start(kind)
        assert isinstance(constraint, AutomatonConstraint)
        automaton = constraint.automaton
        states, steps = {automaton.start}, 0
        while not any(automaton.accepting(s) for s in states):
            found = {automaton.step(s, t) for s, t in product(states, range(vocabulary.size))}
            states, steps = {s for s in found if s is not None}, steps + 1
        assert small.least_tokens(kind) == steps


def test_lines_end_where_they_should(small: Constraints) -> None:
    """No line is empty; a line end after the last is no part of the value, and after `most` lines nothing follows."""

    def of(text: str, least: int, most: int) -> Generation:
        kind = LinesType(least, most)
        gen = Generation(GenSpec(kind, 99), small.vocabulary.tokenizer, constraint=small.start(kind), limit=99)
        for byte in text.encode():
            gen.push(small.vocabulary.by_text[bytes([byte])])
        return gen

    done = of("a b\nc\n", 1, 2)
    assert (done.done, done.value, done.text) == ("complete", ["a b", "c"], "a b\nc")
    open_ = of("a\nb\n", 1, 3)
    assert open_.done is None
    open_.push(min(small.vocabulary.eos_ids))
    assert (open_.value, open_.kept) == (["a", "b"], 3)
    for bad in ("\n", " a", "a\n\n", "a\n b"):
        with pytest.raises(ValueError, match="not allowed"):
            of(bad, 1, 3)
    with pytest.raises(ValueError, match="end-of-turn"):
        of("a", 2, 3).push(min(small.vocabulary.eos_ids))


def test_many_lines_cost_no_more(small: Constraints) -> None:
    """The automaton's size does not grow with `most`, and a long way to go is known."""
    few, many = (LinesAutomaton(small.vocabulary, n, n) for n in (2, 3000))
    assert len(many.edges.token) == len(few.edges.token)
    assert many.distance(many.start) > 1000
    loose = LinesAutomaton(small.vocabulary, 1, 10**9)
    assert loose.distance(loose.start) == 1


def test_a_stop_may_follow_a_value(small: Constraints) -> None:
    """Where a value could go on, its stop is allowed; where it cannot, it ends by itself."""
    eos = small.vocabulary.eos_ids

    def no_eos(tokens: list[int]) -> int:
        return next((t for t in tokens if small.vocabulary.texts[t] == b"."), next(t for t in tokens if t not in eos))

    gen = generate(small, RegexType("[1-9]+"), 5, no_eos, stop=(".",))
    assert (gen.done, gen.text, gen.drawn, gen.kept) == ("stop", "1", 2, 1)
    assert generate(small, ChoiceType(("ab",)), 9, no_eos, stop=(".",)).done == "complete"
    dfa = with_stops(to_dfa(automata.INT), (".", "\n\n"))
    assert [dfa.matches(t) for t in (b"12.", b"1\n\n", b"-.", b"1.2", b"1", b"0.")] == [
        True,
        True,
        False,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("held", [False, True], ids=["", "held space"])
@pytest.mark.parametrize("name", TYPES)
def test_tables_say_what_the_automaton_does(small: Constraints, name: str, held: bool) -> None:
    """The dense form for devices: next state, distance and ends of each state that is reached, under its own number."""
    constraint = small.start(TYPES[name][0], held_space=held)
    assert isinstance(constraint, AutomatonConstraint)
    automaton = constraint.automaton
    assert isinstance(automaton, DfaAutomaton | LinesAutomaton)
    dense = tables(automaton)
    reached = [automaton.start]
    for state in reached:
        nexts = [automaton.step(state, token) for token in range(small.vocabulary.size)]
        assert dense.next_state[state].tolist() == [-1 if n is None else n for n in nexts]
        assert dense.distance[state] == automaton.distance(state)
        assert dense.accepting[state] == automaton.accepting(state)
        assert dense.final[state] == automaton.final(state)
        reached += sorted({n for n in nexts if n is not None} - set(reached))
    assert len(dense.next_state) == len(dense.distance) == len(dense.accepting) == len(dense.final)


def test_tables_have_a_size_limit(small: Constraints) -> None:
    """A type whose tables would be too large is refused before they are made, however many lines it may have."""
    automaton = DfaAutomaton(small.vocabulary, to_dfa(automata.FLOAT))
    taken = tables(automaton).next_state.nbytes
    assert tables(automaton, taken).next_state.nbytes == taken
    with pytest.raises(TooLarge, match="states"):
        tables(automaton, taken - 1)
    with pytest.raises(TooLarge, match="states"):
        tables(LinesAutomaton(small.vocabulary, 1, 10**9))


PATTERNS = [
    "",
    "abc",
    "a|bc|",
    "(a|b)*c+",
    "[a-c]{2}x?",
    "a{2,}b{0,2}",
    r"\d+\.\d{2}",
    r"[\w.]+@[a-z]+",
    r"\s?\(\)",
    "[^ab]",
    "[a-]",
    ".",
    "é+|[àb]",
    "(?:ab)+?",
    "((a)|b){3}",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_regexes_equal_python(pattern: str) -> None:
    """What is read of Rust's syntax means the same to Python's `re` on ASCII classes."""
    regex = parse_regex(pattern)
    assert regex is not None
    dfa = to_dfa(regex)
    expected = re.compile(pattern, re.ASCII)
    texts = ["".join(t) for n in range(4) for t in product("abc-]", repeat=n)]
    texts += ["1.25", "12.3", "a.b@c", " ()", "()", "é", "éé", "à", "x", "\n", "😀", "aabb", "abab", "bbbbb", "ccc"]
    assert [dfa.matches(t.encode()) for t in texts] == [bool(expected.fullmatch(t)) for t in texts]


@pytest.mark.parametrize(
    "pattern",
    [
        "^a",
        "a$",
        r"\bx",
        r"\p{L}",
        "(?i)a",
        "[[:alpha:]]",
        "[a&&b]",
        "[]a]",
        r"[^\d]",
        "[a-é]",
        "[^é]",
        "a{,3}",
        "a{3,2}",
        "(",
        "a)",
        "[",
        "*",
        "\\",
        "{",
        "(" * 500,
    ],
)
def test_other_regexes_are_left_to_llguidance(pattern: str) -> None:
    """What is outside the subset, or no regex, is not read at all."""
    assert parse_regex(pattern) is None


@given(st.text(alphabet="ab01(|)[]{},*+?.^-\\dé", max_size=12))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_reading_a_regex_never_breaks(pattern: str) -> None:
    """Any text is read or refused; what is read is a pattern to Python too and means the same."""
    regex = parse_regex(pattern)
    if regex is None:
        return
    try:
        dfa = to_dfa(regex)
    except TooLarge:
        return
    expected = re.compile(pattern, re.ASCII)
    for text in ("", "a", "b", "0", "ab", "a0", "aa", "-", "é", "\n", "d", ",", "bbb"):
        assert dfa.matches(text.encode()) == bool(expected.fullmatch(text)), text


@given(st.binary(max_size=4))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_any_char_is_utf8(data: bytes) -> None:
    """The class of all characters holds exactly the well-formed sequences of one."""
    try:
        one = len(data.decode()) == 1
    except UnicodeDecodeError:
        one = False
    assert to_dfa(automata.any_char_but("")).matches(data) == one


def test_a_type_too_large_is_told(small: Constraints) -> None:
    """A regex that blows up is left to llguidance; a choice that does is refused; neither takes long."""
    start = time.process_time()
    assert isinstance(small.start(RegexType("(a?b?){9000}c")), MatcherConstraint)
    assert isinstance(small.start(RegexType("(.*a.{12})")), MatcherConstraint)
    with pytest.raises(PlanError) as raised:
        small.start(ChoiceType(tuple(f"{i:06d}{'x' * 90}" for i in range(4000))))
    assert raised.value.code == "bad-choice"
    assert time.process_time() - start < 20


def test_a_bad_pattern_or_schema_is_told(small: Constraints) -> None:
    """With the checker's own codes."""
    for kind, code in (
        (RegexType("(?<=a)b"), "bad-regex"),
        (JsonType("[]"), "bad-schema"),
        (JsonType("{"), "bad-schema"),
        (JsonType('{"a":' * 100_000), "bad-schema"),
        (JsonType('{"type": "nonsense"}'), "bad-schema"),
    ):
        with pytest.raises(PlanError) as raised:
            small.start(kind)
        assert raised.value.code == code


def test_text_is_not_constrained(small: Constraints) -> None:
    """And has no regex."""
    assert small.start(TextType()) is None
    assert regex_of(TextType()) is None


@pytest.mark.parametrize("held", [False, True], ids=["", "held space"])
def test_json_closes_within_its_budget(constraints: Constraints, held: bool) -> None:
    """Drawn at random, an object with lists of objects is whole at any budget with some room."""
    rng = random.Random(1)
    for limit in (45, 100):
        for _ in range(3):
            gen = generate(constraints, SCHEMA, limit, rng.choice, held_space=held)
            assert gen.done in ("complete", "max"), gen.reason
            assert set(gen.value) >= {"name", "n"}


def test_a_regex_outside_the_subset_closes_too(constraints: Constraints) -> None:
    """Its shortest way to a value is looked for, and taken before the budget ends."""
    rng = random.Random(2)
    for limit in (6, 20):
        for _ in range(4):
            gen = generate(constraints, RegexType(r"\p{Lu}[a-z]+x|\p{Nd}{3}"), limit, rng.choice)
            assert gen.done != "failed", gen.reason


def test_a_space_of_the_value_is_no_held_space(small: Constraints) -> None:
    """A space is left off only if what follows is a value."""
    eos = min(small.vocabulary.eos_ids)

    def write(kind: GenType, text: bytes) -> Generation:
        gen = Generation(
            GenSpec(kind, 9),
            small.vocabulary.tokenizer,
            constraint=small.start(kind, held_space=True),
            held_space=True,
            limit=9,
        )
        for byte in text:
            gen.push(small.vocabulary.by_text[bytes([byte])])
        if not gen.done:
            gen.push(eos)
        return gen

    assert write(ChoiceType((" a", "b")), b" a").value == " a"
    assert write(ChoiceType((" a", "b")), b"  a").value == " a"
    assert write(ChoiceType((" a", "b")), b" b").value == "b"
    assert write(IntType(), b" 7").value == write(IntType(), b"7").value == 7
    assert write(RegexType(r"\p{L}| x"), b" x").value == "x"
    assert write(RegexType(r"\p{Lu}| x"), b" x").value == " x"


def test_building_is_quick(constraints: Constraints) -> None:
    """Each type well under a second at 49,152 tokens, its masks far under a millisecond once made."""
    vocabulary = Vocabulary(constraints.vocabulary.tokenizer)
    fresh = Constraints(constraints.vocabulary.tokenizer)
    start = time.process_time()
    for kind, _ in TYPES.values():
        fresh.start(kind)
    assert time.process_time() - start < 2
    assert vocabulary.size == fresh.vocabulary.size
