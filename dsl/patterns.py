"""Regular expressions and JSON schemas: whether they can be used, and a full match in bounded time.

llguidance does the work (Rust regex syntax, derivatives, no backtracking); it is imported on first use, since a
plan without a pattern must check without it.
"""

from __future__ import annotations

import json
from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

MAX_PATTERN = 10_000  # characters
MAX_SCHEMA = 100_000  # characters
MAX_SCHEMA_NESTING = 64
MAX_REPEAT = 5_000  # what nested `{a,b}` may multiply to; a match of 10,000 characters then takes about 0.6 s
MAX_GROUPS = 64  # nested groups


@lru_cache(maxsize=1024)
def check_regex(pattern: str) -> str:
    """Why `pattern` cannot be used, in a few words; "" if it can."""
    if len(pattern) > MAX_PATTERN:
        return f"it is longer than {MAX_PATTERN} characters"
    reason = _shape(pattern)
    if reason:
        return reason
    from llguidance import LLMatcher

    message = LLMatcher.validate_grammar(LLMatcher.grammar_from_regex(pattern), None, limits=parser_limits())
    return _reason(message) if message else ""


@lru_cache(maxsize=1024)
def check_schema(schema: str) -> str:
    """Why the JSON schema (a JSON text) cannot be used, in a few words; "" if it can."""
    if len(schema) > MAX_SCHEMA:
        return f"it is longer than {MAX_SCHEMA} characters"
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
        grammar = LLMatcher.grammar_from_json_schema(schema)
    except ValueError as error:
        return _reason(str(error))
    message = LLMatcher.validate_grammar(grammar, None, limits=parser_limits())
    return _reason(message) if message else ""


@cache
def parser_limits() -> LLParserLimits:
    """Limits under which every pattern and schema of a plan is compiled and run."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        max_lexer_states=50_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def _shape(pattern: str) -> str:
    """Refuse counted repetitions that multiply, and deep groups: they make the automaton's states explode.

    `(a{1,1000}){1,1000}` passes validation and then takes minutes and gigabytes on a text of 2,000 characters,
    outside every limit that llguidance offers.
    """
    # One frame per open group: the largest product of nested counts seen inside it so far.
    frames = [1]
    last = 1  # the same for the atom just read
    i = 0
    while i < len(pattern):
        c = pattern[i]
        if c == "\\":
            i += 2
            last = 1
            continue
        if c == "[":
            i = _class_end(pattern, i)
            last = 1
            continue
        if c == "(":
            if len(frames) > MAX_GROUPS:
                return f"its groups nest deeper than {MAX_GROUPS}"
            frames.append(1)
        elif c == ")" and len(frames) > 1:
            last = frames.pop()
        elif c == "{":
            end = pattern.find("}", i)
            count = _count(pattern[i + 1 : end]) if end > 0 else None
            if count is not None:
                last *= max(1, count)
                if last > MAX_REPEAT and last != count:
                    return f"its nested repetitions multiply to more than {MAX_REPEAT}"
                i = end
        elif c not in "*+?|":
            last = 1
        frames[-1] = max(frames[-1], last)
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
    """The largest count of the inside of `{...}`; None where it is no repetition."""
    low, comma, high = text.partition(",")
    low, high = low.strip(), high.strip()
    if not low.isdecimal() or (high and not high.isdecimal()) or len(low) > 10 or len(high) > 10:
        return None
    return int(high) if comma and high else int(low)


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
    return (lines[0] if lines else "unknown")[:200]
