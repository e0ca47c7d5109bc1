"""One gen: where it ends, what it is worth, and what stays in the context."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    Value,
)
from anabranch.runtime.constrain import Constraints
from anabranch.runtime.generation import (
    Generation,
    choice_encodings,
    encode_bytes,
    read_value,
    recorded_ids,
    whole_characters,
)
from anabranch.runtime.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
CONSTRAINTS = Constraints(TOKENIZER)
TOKENS = CONSTRAINTS.vocabulary.by_text
EOS = min(TOKENIZER.eos_ids)


def tokens(*texts: str | bytes) -> list[int]:
    """One token for each text."""
    return [TOKENS[t.encode() if isinstance(t, str) else t] for t in texts]


def context(gen: Generation) -> bytes:
    """The bytes that stay in the context."""
    return b"".join(TOKENIZER.token_bytes(t) for t in gen.kept_ids)


def run(ids: list[int], *stop: str, limit: int = 99, held_space: bool = False) -> Generation:
    """A text gen fed until it is done or `ids` end."""
    gen = Generation(GenSpec(TextType(), limit, stop=stop), TOKENIZER, held_space=held_space, limit=limit)
    for number, token in enumerate(ids):
        if gen.done:
            break
        gen.push(token, -float(number))
    return gen


def test_max_ends_after_its_last_token() -> None:
    """All tokens are kept."""
    gen = run(tokens("t", "h", "e"), limit=3)
    assert (gen.done, gen.text, gen.value, gen.kept, gen.replacement) == ("max", "the", "the", 3, ())
    assert gen.logprobs == (0.0, -1.0, -2.0)


def test_the_end_of_turn_is_neither_value_nor_context() -> None:
    """It is counted as drawn."""
    gen = run([*tokens("y", "e"), EOS])
    assert (gen.done, gen.text, gen.drawn, gen.kept, len(gen.drawn_logprobs)) == ("end_of_turn", "ye", 3, 2, 3)
    empty = run([EOS])
    assert (empty.done, empty.text, empty.value, empty.kept_ids) == ("end_of_turn", "", "", ())


def test_a_stop_of_its_own_tokens_leaves_no_trace() -> None:
    """The tokens wholly before it stay as they were drawn."""
    gen = run(tokens("a", "b", "#", "#", "c"), "##")
    assert (gen.done, gen.text, gen.drawn, gen.kept, gen.replacement) == ("stop", "ab", 4, 2, ())


def test_a_token_that_straddles_the_stop_is_replaced() -> None:
    """By the encoding of its kept bytes."""
    assert b".\n" in TOKENS
    gen = run(tokens("a", ".\n"), "\n")
    assert (gen.text, gen.kept, gen.replacement) == ("a.", 1, tuple(tokens(".")))
    assert context(gen) == b"a."


def test_a_stop_inside_one_token() -> None:
    """What follows the stop in the token is dropped with it."""
    gen = run(tokens("the"), "h")
    assert (gen.done, gen.text, gen.kept, context(gen)) == ("stop", "t", 0, b"t")


def test_the_stop_that_is_whole_first_wins() -> None:
    """And of those that end together the longest, however the text is cut into tokens."""
    assert run(tokens("x", "a", "b", "c", "d"), "abcd", "bc").text == "xa"
    assert run(tokens("x", "a", "b", "c"), "bc", "abc").text == "x"
    assert run(tokens("t", "h", "e", "n"), "then", "he").text == run(tokens("the", "n"), "then", "he").text == "t"


def test_a_value_never_ends_in_half_a_character() -> None:
    """The half is in neither value nor context; a token with more than the half is replaced."""
    half = run(tokens("a", b"\xc3"), limit=2)
    assert (half.text, half.kept, context(half)) == ("a", 1, b"a")
    assert b"\xe2\x80" in TOKENS
    three = run(tokens("a", b"\xe2\x80"), limit=2)
    assert (three.text, context(three)) == ("a", b"a")
    whole = run(tokens("a", b"\xc3", b"\xa9"), limit=3)
    assert (whole.text, whole.kept) == ("aé", 3)


def test_bytes_that_are_no_utf8_are_shown_as_such() -> None:
    """Replacement characters stand for them in the text; the context keeps the bytes."""
    gen = run(tokens("a", b"\xff", "b", b"\x80"), limit=4)
    assert (gen.text, context(gen)) == ("a\ufffdb\ufffd", b"a\xffb\x80")


def test_a_held_back_space_is_no_part_of_the_value() -> None:
    """It stays in the context; a second space is the value's; stops are looked for after it."""
    assert b" the" in TOKENS
    gen = run([*tokens(" the"), EOS], held_space=True)
    assert (gen.text, gen.kept) == ("the", 1)
    assert run([*tokens(" the"), EOS]).text == " the"
    assert run([*tokens(" ", " "), EOS], held_space=True).text == " "
    stopped = run(tokens(" ", "a", " "), " ", held_space=True)
    assert (stopped.text, context(stopped)) == ("a", b" a")


def test_a_gen_that_is_done_takes_no_more() -> None:
    """That, and a limit of none, are the caller's errors."""
    gen = run([EOS])
    with pytest.raises(ValueError, match="done"):
        gen.push(EOS)
    with pytest.raises(ValueError, match="at least 1"):
        Generation(GenSpec(TextType(), 1), TOKENIZER, limit=0)


def test_a_gen_is_cut_from_outside() -> None:
    """Its text so far stays, without half a character; a second end changes nothing."""
    gen = run(tokens("a", b"\xc3"))
    gen.cut("truncated", "the budget is spent")
    gen.cut("cancelled")
    assert (gen.done, gen.reason, gen.text, gen.value, gen.kept) == ("truncated", "the budget is spent", "a", None, 1)


texts = st.lists(
    st.sampled_from([t for t in sorted(TOKENS) if len(t) > 1 or t in b"abt h.\n\xc3\xa9\xe2\x80\x99"]), max_size=12
)
stops = st.lists(st.sampled_from(["\n", "the", ". ", "é", "a", "\n\n", "e a", "’"]), max_size=3, unique=True)


@given(texts, stops, st.booleans())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_the_end_depends_on_the_bytes_alone(parts: list[bytes], stop: list[str], held: bool) -> None:
    """Value and context are what the definition says of the joined bytes, and deltas add up to the text."""
    data = b"".join(parts)
    first = 1 if held and data[:1] == b" " else 0
    ends = [(n, -len(s)) for s in map(str.encode, stop) for n in range(len(data) + 1) if data[first:n].endswith(s)]
    expected = data[first:]
    if ends:
        end, length = min(ends)
        expected = data[first : end + length]
    else:
        expected = expected[: whole_characters(expected)]
    gen = Generation(GenSpec(TextType(), 99, stop=tuple(stop)), TOKENIZER, held_space=held, limit=99)
    shown = ""
    for part in parts:
        if not gen.done:
            gen.push(TOKENS[part])
            shown += gen.delta()
            assert gen.text.startswith(shown)
    if not gen.done:
        gen.push(EOS)
    shown += gen.delta()
    expected = expected[: whole_characters(expected)]
    assert (gen.done == "stop") == bool(ends)
    assert gen.text == shown == expected.decode(errors="replace")
    assert context(gen) == data[:first] + expected
    drawn = [TOKENS[p] for p in parts][: gen.kept]
    assert list(gen.kept_ids[: gen.kept]) == drawn


def test_deltas_hold_back_what_may_be_a_stop() -> None:
    """Until it cannot be one any more."""
    gen = Generation(GenSpec(TextType(), 9, stop=("##!",)), TOKENIZER, limit=9)
    shown = []
    for token in tokens("a", "#", "#", "#", "b"):
        gen.push(token)
        shown.append(gen.delta())
    assert shown == ["a", "", "", "#", "##b"]


@given(st.binary(max_size=9))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_only_a_begun_character_is_taken_off(data: bytes) -> None:
    """What is taken off is begun characters alone; what is left ends in none."""
    end = whole_characters(data)
    assert not any(_is_begun(data[end - n : end]) for n in range(1, min(3, end) + 1))
    tail = data[end:]
    while tail:
        begun = next(n for n in range(1, 4) if _is_begun(tail[:n]) and (n == len(tail) or tail[n] & 0xC0 != 0x80))
        tail = tail[begun:]


def _is_begun(part: bytes) -> bool:
    return any(
        _decodes(part + more) for n in (1, 2, 3) for more in (b"\x80" * n, b"\xbf" * n, b"\x90" + b"\x80" * (n - 1))
    )


def _decodes(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


@given(st.binary(max_size=12))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_bytes_can_be_spelled(data: bytes) -> None:
    """Also halves of characters, for which the tokenizer has no text."""
    assert b"".join(TOKENIZER.token_bytes(t) for t in encode_bytes(TOKENIZER, data)) == data


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (TextType(), " a ", " a "),
        (IntType(), "-0", 0),
        (IntType(), "123", 123),
        (FloatType(), "-1.50", -1.5),
        (BoolType(), "true", True),
        (BoolType(), "false", False),
        (LinesType(1, 2), "a b\nc", ["a b", "c"]),
        (ChoiceType(("a", "b")), "b", "b"),
        (RegexType("x+"), "xx", "xx"),
        (JsonType("{}"), '{"a": [1, null]}', {"a": [1, None]}),
    ],
)
def test_values_are_read(kind: GenType, text: str, value: Value) -> None:
    """Each type's value has the language's type."""
    read = read_value(kind, text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (IntType(), "9" * 4301),
        (FloatType(), "9" * 400),
        (BoolType(), "True"),
        (LinesType(2, 3), "a"),
        (LinesType(1, 1), "a\nb"),
        (LinesType(1, 3), "a\n\nb"),
        (ChoiceType(("a",)), "b"),
        (JsonType("{}"), "{"),
    ],
)
def test_what_is_no_value_is_refused(kind: GenType, text: str) -> None:
    """With a reason, for the branch that fails."""
    with pytest.raises(ValueError, match=r"."):
        read_value(kind, text)


def test_a_number_too_long_fails_its_gen() -> None:
    """Though every token of it was allowed."""
    gen = Generation(GenSpec(IntType(), 4400), TOKENIZER, constraint=CONSTRAINTS.start(IntType()), limit=4400)
    for token in tokens("9") * 4400:
        gen.push(token)
    assert gen.done == "failed"
    assert "4300 digits" in gen.reason


def test_a_type_of_nothing_is_complete_at_once() -> None:
    """No token is drawn for it."""
    gen = Generation(GenSpec(RegexType(""), 3), TOKENIZER, constraint=CONSTRAINTS.start(RegexType("")), limit=3)
    assert (gen.done, gen.value, gen.drawn) == ("complete", "", 0)


def test_recorded_text_becomes_tokens() -> None:
    """A text, pieces each encoded apart, or the ids themselves."""
    assert recorded_ids(TOKENIZER, "the") == tuple(TOKENIZER.encode([("the", False)]))
    assert recorded_ids(TOKENIZER, ["t", "he"]) == tuple(
        tokens("t", "he" if b"he" in TOKENS else "h", *([] if b"he" in TOKENS else ["e"]))
    )
    assert recorded_ids(TOKENIZER, [5, EOS]) == (5, EOS)
    marker = next(iter(TOKENIZER.specials))
    assert not set(recorded_ids(TOKENIZER, marker)) & set(TOKENIZER.specials.values())
    with pytest.raises(ValueError, match="outside the vocabulary"):
        recorded_ids(TOKENIZER, [TOKENIZER.vocab_size])


def test_choices_are_spelled_for_scoring() -> None:
    """A held-back space goes before each."""
    kind = ChoiceType(("yes", "no"), by="logprob")
    spelled = choice_encodings(TOKENIZER, kind, held_space=True)
    assert [b"".join(map(TOKENIZER.token_bytes, ids)) for ids in spelled] == [b" yes", b" no"]
    assert [
        b"".join(map(TOKENIZER.token_bytes, ids)) for ids in choice_encodings(TOKENIZER, kind, held_space=False)
    ] == [b"yes", b"no"]
