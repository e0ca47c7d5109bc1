"""Regular expressions and JSON schemas: whether they can be used, and a full match in bounded time.

llguidance does the work (Rust regex syntax, derivatives, no backtracking); it is imported on first use, since a
plan without a pattern must check without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_PATTERN = 10_000  # characters
MAX_SCHEMA = 100_000  # characters
MAX_SCHEMA_NESTING = 64
MAX_EXPANDED = 10_000  # characters with counted repetitions written out; a match may then take about a second
MAX_GROUPS = 64  # nested groups

_PIECE = 64  # bytes of a text that share the fuel of one step


@lru_cache(maxsize=1024)
def check_regex(pattern: str) -> str:
    """Why `pattern` cannot be used, in a few words; "" if it can."""
    if len(pattern) > MAX_PATTERN:
        return f"it is longer than {MAX_PATTERN} characters"
    reason = _no_utf8(pattern) or _shape(pattern)
    if reason:
        return reason
    from llguidance import LLMatcher

    try:
        with panics_told():
            message = LLMatcher.validate_grammar(LLMatcher.grammar_from_regex(pattern), None, limits=parser_limits())
    except EnginePanic as error:
        return str(error)
    return _reason(message) if message else ""


@lru_cache(maxsize=1024)
def check_schema(schema: str) -> str:
    """Why the JSON schema (a JSON text) cannot be used, in a few words; "" if it can."""
    if len(schema) > MAX_SCHEMA:
        return f"it is longer than {MAX_SCHEMA} characters"
    if reason := _no_utf8(schema):
        return reason
    try:
        document = json.loads(schema)
    except (ValueError, RecursionError) as error:
        return f"it is no JSON ({error})"
    if not isinstance(document, dict):
        return "a schema is a JSON object"
    if _nesting(document) > MAX_SCHEMA_NESTING:
        return f"it nests deeper than {MAX_SCHEMA_NESTING}"
    from llguidance import LLMatcher

    try:
        with panics_told():
            grammar = LLMatcher.grammar_from_json_schema(schema)
            message = LLMatcher.validate_grammar(grammar, None, limits=parser_limits())
    except ValueError as error:
        return _reason(str(error))
    return _reason(message) if message else ""


class EnginePanic(ValueError):
    """llguidance met a fault of its own."""


@contextmanager
def panics_told() -> Iterator[None]:
    """Raise EnginePanic for a panic in llguidance, which reaches Python as an exception that is no `Exception`."""
    try:
        yield
    except BaseException as error:
        # pyo3 makes the class anew in each extension and gives it no module to import it from.
        if type(error).__name__ != "PanicException":
            raise
        raise EnginePanic("the engine of token masks fails on it") from None


class PatternTooComplex(Exception):
    """A match went over the limits of `parser_limits`."""


def full_match(pattern: str, text: str) -> bool:
    """Whether the whole of `text` matches `pattern`, in time linear in the text.

    Raises ValueError if the pattern cannot be used or the engine fails on the text, and PatternTooComplex where a match
    would take too long.
    """
    reason = check_regex(pattern)
    if reason:
        raise ValueError(reason)
    matcher = _matcher(pattern).deep_copy()
    # A JSON value can hold a lone surrogate, which has no UTF-8; its bytes match no pattern.
    data = text.encode("utf-8", "surrogatepass")
    for start in range(0, len(data), _PIECE):
        piece = list(data[start : start + _PIECE])
        with panics_told():
            taken = matcher.try_consume_tokens(piece)
        if matcher.is_error():
            raise PatternTooComplex(matcher.get_error().splitlines()[0])
        if taken < len(piece):
            return False
    return bool(matcher.is_accepting())


@lru_cache(maxsize=256)
def _matcher(pattern: str) -> LLMatcher:
    from llguidance import LLMatcher

    return LLMatcher(_bytes(), LLMatcher.grammar_from_regex(pattern), log_level=0, limits=parser_limits())


@cache
def _bytes() -> LLTokenizer:
    """A tokenizer whose tokens are the bytes, so that a matcher reads plain text."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()), slices=[])


class _Bytes:
    """What `TokenizerWrapper` asks of a tokenizer."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([i]) for i in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


@cache
def parser_limits() -> LLParserLimits:
    """Limits under which every pattern and schema of a plan is compiled and run.

    The fuel of a step is for each call that consumes tokens, so feed a long text in pieces.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        max_lexer_states=50_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def _no_utf8(text: str) -> str:
    return "it holds half a character, a lone surrogate" if any("\ud800" <= c <= "\udfff" for c in text) else ""


def _shape(pattern: str) -> str:
    """Refuse patterns that grow large when counted repetitions are written out, and deep groups.

    `(a{1,1000}){1,1000}` passes validation and then takes minutes and gigabytes on a text of 2,000 characters,
    outside every limit that llguidance offers.
    """
    sizes = [0]  # of each open group, what stands in it so far
    last = 0  # of the atom just read
    i = 0
    while i < len(pattern):
        c = pattern[i]
        if c == "(":
            if len(sizes) > MAX_GROUPS:
                return f"its groups nest deeper than {MAX_GROUPS}"
            sizes.append(0)
            last = 0
        elif c == ")" and len(sizes) > 1:
            last = max(1, sizes.pop())
            sizes[-1] += last
        elif c == "{" and (count := _count(pattern[i + 1 : i + 24])) is not None:
            sizes[-1] += last * (count - 1)
            last *= count
            i = pattern.index("}", i)
        elif c not in "*+?|":
            last = 1
            sizes[-1] += 1
            i = _class_end(pattern, i) - 1 if c == "[" else i + 1 if c == "\\" else i
        if sizes[-1] > MAX_EXPANDED:
            return f"its repetitions stand for more than {MAX_EXPANDED} characters"
        i += 1
    return ""


def _class_end(pattern: str, start: int) -> int:
    """The offset after the character class that starts at `start`."""
    depth = 0
    i = start
    while i < len(pattern):
        if pattern[i] == "\\":
            i += 1
        elif pattern[i] == "[":
            depth += 1
        elif pattern[i] == "]" and i > start + 1:
            depth -= 1
            if depth == 0:
                return i + 1
        i += 1
    return i


def _count(text: str) -> int | None:
    """The largest count of the repetition that `text` is the inside of; None where it is none."""
    inside, brace, _ = text.partition("}")
    low, comma, high = inside.partition(",")
    low, high = low.strip(), high.strip()
    if not brace or not low.isdecimal() or (high and not high.isdecimal()) or len(low) > 10 or len(high) > 10:
        return None
    return max(1, int(high) if comma and high else int(low))


def _nesting(document: object) -> int:
    deepest = 0
    stack = [(document, 1)]
    while stack:
        value, depth = stack.pop()
        deepest = max(deepest, depth)
        if isinstance(value, dict):
            stack.extend((item, depth + 1) for item in value.values())
        elif isinstance(value, list):
            stack.extend((item, depth + 1) for item in value)
    return deepest


def _reason(message: str) -> str:
    """The last telling line of llguidance's message, which shows its own grammar around it."""
    lines = [line.strip() for line in message.splitlines()]
    for line in lines:
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    reason = (lines[0] if lines else "unknown").rpartition(" (in regex): ")[2]
    return reason.partition("; ")[0][:200]
