"""What a typed `gen` may draw: a token mask per step, steered so that the value completes within its budget.

    constraint = AutomatonConstraint    int float bool choice lines, and the regexes that `runtime/regexes.py` reads
               | MatcherConstraint      other regexes, json: an llguidance matcher

An automaton knows how far each state is from a value, so its values always complete. A matcher does not: there a way to
close the value is looked for (`MatcherConstraint.closing`), and the budget is steered by what was found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Protocol, TypeVar, assert_never, cast

import llguidance
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.dsl.diagnostics import Diagnostic, PlanError
from anabranch.dsl.patterns import EnginePanic, panics_told, parser_limits
from anabranch.dsl.spec import (
    BoolType,
    ChoiceType,
    FloatType,
    GenType,
    IntType,
    JsonType,
    LinesType,
    RegexType,
    TextType,
)
from anabranch.runtime import automata
from anabranch.runtime.automata import (
    Automaton,
    Dfa,
    DfaAutomaton,
    LinesAutomaton,
    TokenizerLike,
    Vocabulary,
    encode_longest,
    pack,
)
from anabranch.runtime.regexes import parse_regex


class Constraint(Protocol):
    """The state of one gen's type; `advance` moves it by one drawn token."""

    @property
    def accepting(self) -> bool:
        """The text so far is a value, so the end-of-turn token is allowed."""
        ...

    @property
    def complete(self) -> bool:
        """The text so far is a value and nothing can follow: the gen ends without another token."""
        ...

    def mask(self, left: int) -> Tensor:
        """The tokens that may come next, when `left` tokens may still be drawn, this one included.

        Packed int32 [ceil(vocab/32)]: token i is bit i % 32 of word i // 32. Not to be changed by the caller. All zero
        if no value fits in `left` tokens.
        """
        ...

    def advance(self, token: int) -> None:
        """Move by a drawn token that does not end the turn.

        Raises ValueError if the type does not allow it here, and ConstraintError if it does and the engine gives up.
        """
        ...

    def value_starts(self, data: bytes) -> int | None:
        """Where the value begins in `data`: 1 after a held-back space, else 0; None if it is no value of the type."""
        ...


class AutomatonConstraint:
    """A walk through a token automaton.

    value: the type's own DFA, without the held-back space and stops
    """

    def __init__(self, automaton: Automaton, value: Dfa, *, held_space: bool) -> None:
        self.automaton = automaton
        self.state = automaton.start
        self._value = value
        self._held_space = held_space

    @property
    def accepting(self) -> bool:
        return self.automaton.accepting(self.state)

    @property
    def complete(self) -> bool:
        return self.automaton.final(self.state)

    def mask(self, left: int) -> Tensor:
        return torch.from_numpy(self.automaton.mask(self.state, left))

    def advance(self, token: int) -> None:
        state = self.automaton.step(self.state, token)
        if state is None:
            raise ValueError(f"token {token} is not allowed here")
        self.state = state

    def value_starts(self, data: bytes) -> int | None:
        return _value_starts(data, self._held_space, self._value.matches)


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _no_panic(method: _Method) -> _Method:
    """A panic in llguidance is a ConstraintError: the gen fails, and not the engine with all that it runs."""

    @wraps(method)
    def guarded(*args: Any, **options: Any) -> Any:
        try:
            with panics_told():
                return method(*args, **options)
        except EnginePanic as error:
            raise ConstraintError(str(error)) from None

    return cast(_Method, guarded)


class MatcherConstraint:
    """A walk through an llguidance grammar.

    llguidance does not say how far a value is. So, when the budget gets near what closing the value takes, `closing`
    looks for a way to close it; while there is more room than that and a margin, every token of the grammar is allowed
    (in json, none that opens another list or record), and from there on only the way that was found, or the end of the
    turn if the text is a value already. Steering is thus a best effort: a value can still be cut off if no way was
    found, or if one token made it longer than the margin.

    grammar: an llguidance grammar of the value with what may stand around it
    value: the grammar of the value alone
    """

    @_no_panic
    def __init__(self, vocabulary: Vocabulary, grammar: str, value: str, *, held_space: bool, is_json: bool) -> None:
        self._vocabulary = vocabulary
        self._value_grammar = value
        self._held_space = held_space
        self._is_json = is_json
        self._matcher = _matcher(vocabulary, grammar)
        self._data = bytearray()
        self._way: list[int] = []  # the rest of the closing that is being forced
        self._whole: int | None = None  # tokens of the value that `closing` finds from the start
        self._margin = 8 if is_json else 2  # in json one token can begin a further `, "key": value`

    @property
    def accepting(self) -> bool:
        return not self._matcher.is_error() and (self._matcher.is_accepting() or self._matcher.is_stopped())

    @property
    def complete(self) -> bool:
        return not self._matcher.is_error() and self._matcher.is_stopped()

    @_no_panic
    def mask(self, left: int) -> Tensor:
        if self._way:
            return torch.from_numpy(pack(self._way[:1], self._vocabulary.size))
        bits = self._bits(self._matcher)
        if self._whole is None:
            self._whole = len(self.closing(left) or ())
        if left > 2 * self._whole + 4 * self._margin:
            return _packed(bits)
        if self.accepting:
            return (
                _packed(bits)
                if left > 2
                else torch.from_numpy(pack((), self._vocabulary.size, self._vocabulary.eos_ids))
            )
        way = self.closing(left)
        if way and left <= len(way) + self._margin:
            self._way = way
            return torch.from_numpy(pack(way[:1], self._vocabulary.size))
        if self._is_json and not _in_string(self._data):
            bits = self._without_openings(bits)
        return _packed(bits)

    def _bits(self, matcher: Any) -> NDArray[np.uint8]:
        """uint8 [32 * ceil(vocab/32)], 1 where a token may come next."""
        words = matcher.compute_bitmask()
        if matcher.is_error():
            raise ConstraintError(_reason(matcher.get_error()))
        # llguidance adds a bit of its own after the last token.
        return np.unpackbits(np.frombuffer(words, dtype=np.uint8), count=self._vocabulary.bits, bitorder="little")

    def _without_openings(self, bits: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Without what begins another list or record, if anything is left."""
        fewer = bits & ~self._vocabulary.holding(b"{[")
        return fewer if fewer.any() else bits

    def closing(self, most: int) -> list[int] | None:
        """Tokens, at most `most`, that make the text so far a value; None if the search found none.

        The search takes at each step the token that most likely ends something, and never goes back.
        """
        matcher = self._matcher.deep_copy()
        data = bytearray(self._data)
        way: list[int] = []
        while not (matcher.is_accepting() or matcher.is_stopped()):
            if len(way) >= min(most, _LONGEST_CLOSING):
                return None
            bits = self._bits(matcher)
            if self._is_json:
                token = self._closer(bits, _in_string(data))
            else:
                last = self._last(matcher, bits)
                token = self._longest(bits) if last is None else last
            if token is None or not matcher.consume_token(token):
                return None
            data += self._vocabulary.texts[token]
            way.append(token)
        return None if matcher.is_error() else way

    def _closer(self, bits: NDArray[np.uint8], in_string: bool) -> int | None:
        for text in _CLOSERS_IN_STRING if in_string else _CLOSERS:
            token = self._vocabulary.by_text.get(text)
            if token is not None and bits[token]:
                return token
        return self._longest(bits)

    def _last(self, matcher: Any, bits: NDArray[np.uint8]) -> int | None:
        """An allowed token of one byte after which the text is a value."""
        for token in self._vocabulary.single_bytes:
            if bits[token] and matcher.consume_token(token):
                ends = matcher.is_accepting() or matcher.is_stopped()
                matcher.rollback(1)
                if ends:
                    return token
        return None

    def _longest(self, bits: NDArray[np.uint8]) -> int | None:
        """The allowed token of most bytes, the lowest id of equals; a forced text or a counted one ends soonest so."""
        lengths = self._vocabulary.lengths * bits[: self._vocabulary.size]
        return int(lengths.argmax()) if lengths.any() else None

    @_no_panic
    def advance(self, token: int) -> None:
        if self._matcher.try_consume_tokens([token]) != 1:
            if self._matcher.is_error():
                raise ConstraintError(_reason(self._matcher.get_error()))
            raise ValueError(f"token {token} is not allowed here")
        self._data += self._vocabulary.texts[token]
        if self._way:
            self._way = self._way[1:] if self._way[0] == token else []

    @_no_panic
    def value_starts(self, data: bytes) -> int | None:
        def matches(part: bytes) -> bool:
            matcher = _matcher(self._vocabulary, self._value_grammar)
            ok: bool = matcher.consume_tokens(encode_longest(self._vocabulary.by_text, part))
            return ok and (matcher.is_accepting() or matcher.is_stopped())

        return _value_starts(data, self._held_space, matches)


_LONGEST_CLOSING = 256
# What ends something first: a record, a list, an item; then the shortest values.
_CLOSERS = (b"}", b"]", b",", b", ", b":", b": ", b"0", b"1", b"null", b"true", b"false", b'""', b'"')
_CLOSERS_IN_STRING = (b'"',)


def _packed(bits: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))


class ConstraintError(ValueError):
    """The grammar engine gave up: the type is too complex for the text at hand."""


def _in_string(data: bytes | bytearray) -> bool:
    """Whether JSON text ends inside a string."""
    inside = False
    at = 0
    while at < len(data):
        if data[at] == 0x5C and inside:
            at += 1
        elif data[at] == 0x22:
            inside = not inside
        at += 1
    return inside


def _value_starts(data: bytes, held_space: bool, matches: Callable[[bytes], bool]) -> int | None:
    if held_space and data[:1] == b" " and matches(data[1:]):
        return 1
    return 0 if matches(data) else None


def _matcher(vocabulary: Vocabulary, grammar: str) -> Any:
    matcher = llguidance.LLMatcher(vocabulary.tokenizer.ll_tokenizer(), grammar, log_level=0, limits=parser_limits())
    if matcher.is_error():
        raise ConstraintError(_reason(matcher.get_error()))
    return matcher


def _reason(message: str) -> str:
    """The telling line of an llguidance message, which shows its own grammar around it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for line in lines:
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    return (lines[0] if lines else "unknown")[:200]


class Constraints:
    """Fresh constraints for one tokenizer; automata are built once per type and shared by all gens.

    Building the vocabulary's trie takes about 0.2 s at 49,152 tokens, so an engine keeps one of these.
    """

    def __init__(self, tokenizer: TokenizerLike) -> None:
        self.vocabulary = Vocabulary(tokenizer)
        self._automata: dict[tuple[GenType, tuple[str, ...], bool], tuple[Automaton, Dfa] | None] = {}

    def start(self, kind: GenType, *, held_space: bool = False, stop: Sequence[str] = ()) -> Constraint | None:
        """The constraint of a gen that begins; None for text.

        held_space: the text may begin with one space that is no part of the value
        stop: texts that may follow a value (and end the gen there)
        Raises PlanError `bad-regex`, `bad-schema` or `bad-choice` if the type cannot be used.
        """
        match kind:
            case TextType():
                return None
            case JsonType() | RegexType():
                found = self._automaton(kind, tuple(stop), held_space) if isinstance(kind, RegexType) else None
                if found is None:
                    return self._matched(kind, held_space, tuple(stop))
            case _:
                found = self._automaton(kind, tuple(stop), held_space)
        if found is None:
            raise PlanError(Diagnostic("bad-choice", "the choices are too many or too long for one automaton"))
        return AutomatonConstraint(*found, held_space=held_space)

    def least_tokens(self, kind: GenType, *, held_space: bool = False) -> int:
        """The fewest tokens that a value of the type takes, where it is known, else 1. A gen's `max` must reach it."""
        constraint = self.start(kind, held_space=held_space)
        if isinstance(constraint, AutomatonConstraint):
            return max(1, constraint.automaton.distance(constraint.automaton.start))
        return 1

    def _automaton(self, kind: GenType, stop: tuple[str, ...], held_space: bool) -> tuple[Automaton, Dfa] | None:
        key = (kind, stop, held_space)
        if key not in self._automata:
            try:
                self._automata[key] = self._build(kind, stop, held_space)
            except automata.TooLarge:
                self._automata[key] = None
        return self._automata[key]

    def _build(self, kind: GenType, stop: tuple[str, ...], held_space: bool) -> tuple[Automaton, Dfa] | None:
        if isinstance(kind, LinesType):
            lines = LinesAutomaton(self.vocabulary, kind.least, kind.most, held_space=held_space)
            return lines, automata.to_dfa(automata.LINES)
        regex = regex_of(kind)
        if regex is None:
            return None
        value = automata.to_dfa(regex)
        around = (
            automata.to_dfa(automata.Seq((automata.optional(automata.literal(" ")), regex))) if held_space else value
        )
        return DfaAutomaton(self.vocabulary, automata.with_stops(around, stop) if stop else around), value

    def _matched(self, kind: JsonType | RegexType, held_space: bool, stop: tuple[str, ...]) -> MatcherConstraint:
        try:
            value = _grammar(kind, "", ())
            grammar = _grammar(kind, " " if held_space else "", stop)
            return MatcherConstraint(
                self.vocabulary, grammar, value, held_space=held_space, is_json=isinstance(kind, JsonType)
            )
        except (ValueError, RecursionError) as error:
            if isinstance(kind, RegexType):
                raise PlanError(Diagnostic("bad-regex", f"the pattern cannot be used: {error}")) from None
            raise PlanError(Diagnostic("bad-schema", f"the schema cannot be used: {error}")) from None


def regex_of(kind: GenType) -> automata.Regex | None:
    """The regex of a type's values; None where it is not regular, or not read by `parse_regex`."""
    match kind:
        case IntType():
            return automata.INT
        case FloatType():
            return automata.FLOAT
        case BoolType():
            return automata.BOOL
        case ChoiceType(options):
            return automata.any_of(options)
        case RegexType(pattern):
            return parse_regex(pattern)
        case LinesType():
            return automata.LINES
        case TextType() | JsonType():
            return None
        case _:
            assert_never(kind)


def _grammar(kind: JsonType | RegexType, before: str, stop: tuple[str, ...]) -> str:
    """An llguidance grammar: an optional space, the value, an optional stop."""
    if isinstance(kind, RegexType):
        tail = "(?:" + "|".join(map(_regex_literal, stop)) + ")?" if stop else ""
        around = f"{'(?: )?' if before else ''}(?:{kind.pattern}){tail}" if before or stop else kind.pattern
        return str(llguidance.LLMatcher.grammar_from_regex(around))
    schema = json.loads(kind.schema)
    if not isinstance(schema, dict):
        raise ValueError("a schema is a JSON object")
    # One way to lay a document out: a weak model spins on free white space.
    schema["x-guidance"] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    head = '" "? ' if before else ""
    tail = f" ({' | '.join(json.dumps(s) for s in stop)})?" if stop else ""
    return f"start: {head}value{tail}\nvalue: %json {json.dumps(schema)}\n"


def _regex_literal(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):X}}}" for c in text)
