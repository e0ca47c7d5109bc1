"""One `gen` while it decodes: it takes drawn tokens, says when it is done, and what stays in the context.

A value ends before its stop, before its end-of-turn token, and never inside a UTF-8 character. The context keeps
exactly the bytes up to there: the tokens wholly before the end and, for a token that straddles it, the encoding of its
kept bytes. So a character that was cut short at `max` is in neither.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, assert_never

import torch
from torch import Tensor

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
from anabranch.runtime.automata import TokenizerLike, encode_longest
from anabranch.runtime.constrain import Constraint, ConstraintError

End: TypeAlias = Literal["max", "stop", "end_of_turn", "complete", "failed", "truncated", "cancelled"]


class Generation:
    """The state of one gen. Feed it each drawn token with `push`, until `done` says why it ended.

    After that, of the `drawn` tokens the first `kept` stay in the context and those of `replacement` follow them; the
    engine lowers its segment to the kept ones and feeds the replacement. The end-of-turn token is never kept.

    spec: the gen's type, stops and so on
    constraint: the type's, fresh from `Constraints.start`; None for text
    held_space: a space was held back before this gen, so its text may begin with one that is no part of the value
    limit: the most tokens that may be drawn, the end-of-turn token included; at least 1
    """

    def __init__(
        self,
        spec: GenSpec,
        tokenizer: TokenizerLike,
        *,
        constraint: Constraint | None = None,
        held_space: bool = False,
        limit: int,
    ) -> None:
        if limit < 1:
            raise ValueError(f"a gen draws at least 1 token, not {limit}")
        self.spec = spec
        self.done: End | None = None
        self.reason = ""
        self.value: Value = None
        self.replacement: tuple[int, ...] = ()
        self._tokenizer = tokenizer
        self._constraint = constraint
        self._held_space = held_space
        self._limit = limit
        self._stops = tuple(stop.encode() for stop in spec.stop)
        self._longest_stop = max(map(len, self._stops), default=0)
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._ends: list[int] = []  # where each token's bytes end in `_data`
        self._data = bytearray()
        self._end = 0  # where the kept bytes end, once done
        self._kept: int | None = None
        self._skipped = 0  # bytes of `_data` before the value: the held-back space
        self._shown = 0  # bytes of `_data` that `delta` has given out
        if constraint is not None and constraint.complete:
            self._finish("complete", 0)

    @property
    def constraint(self) -> Constraint | None:
        """The type's, where it is at; None for text."""
        return self._constraint

    @property
    def held_space(self) -> bool:
        """Whether a space was held back before this gen."""
        return self._held_space

    @property
    def drawn(self) -> int:
        """How many tokens were drawn, the end-of-turn token included."""
        return len(self._tokens)

    @property
    def left(self) -> int:
        """How many tokens may still be drawn."""
        return self._limit - len(self._tokens)

    def mask(self) -> Tensor | None:
        """The packed token mask of the next draw (see `Constraint.mask`); None if every token is allowed.

        Where no token is allowed the gen is `done` afterwards: it failed.
        """
        if self._constraint is None:
            return None
        try:
            mask = self._constraint.mask(self.left)
        except ConstraintError as error:
            self.cut("failed", str(error))
            return torch.zeros((self._tokenizer.vocab_size + 31) // 32, dtype=torch.int32)
        if not bool(mask.any()):
            self.cut("failed", f"no value of its type fits in the {self.left} tokens that are left")
        return mask

    @property
    def kept(self) -> int:
        """How many of the drawn tokens stay in the context as they are; until done, all."""
        return len(self._tokens) if self._kept is None else self._kept

    @property
    def kept_ids(self) -> tuple[int, ...]:
        """What stays in the context, the replacement included."""
        return (*self._tokens[: self.kept], *self.replacement)

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Of the kept drawn tokens, in order."""
        return tuple(self._logprobs[: self.kept])

    @property
    def drawn_logprobs(self) -> tuple[float, ...]:
        """Of all drawn tokens, in order."""
        return tuple(self._logprobs)

    @property
    def text(self) -> str:
        """The value as text, the held-back space left out; until done, what is known of it."""
        end = self._end if self.done else whole_characters(self._data)
        return self._data[min(self._skipped_so_far(), end) : end].decode(errors="replace")

    def push(self, token: int, logprob: float = 0.0) -> None:
        """Take a drawn token. Raises ValueError when already done, or if the type does not allow the token."""
        if self.done:
            raise ValueError("the gen is done")
        if token in self._tokenizer.eos_ids:
            if self._constraint is not None and not self._constraint.accepting:
                raise ValueError("the end-of-turn token is not allowed here")
            self._tokens.append(token)
            self._logprobs.append(logprob)
            self._ends.append(len(self._data))
            self._finish("end_of_turn", len(self._data))
            return
        stuck = ""
        if self._constraint is not None:
            try:
                self._constraint.advance(token)
            except ConstraintError as error:
                stuck = str(error) or "its type is too complex"
        before = len(self._data)
        self._data += self._tokenizer.token_bytes(token)
        self._tokens.append(token)
        self._logprobs.append(logprob)
        self._ends.append(len(self._data))
        if stuck:
            self.cut("failed", stuck)
            return
        stop = self._find_stop(before)
        if stop is not None:
            self._finish("stop", stop)
        elif self._constraint is not None and self._constraint.complete:
            self._finish("complete", len(self._data))
        elif self.left == 0:
            self._finish("max", len(self._data))

    def cut(self, end: Literal["truncated", "cancelled", "failed"], reason: str = "") -> None:
        """End the gen from outside, with the text it has."""
        if not self.done:
            self._keep(whole_characters(self._data))
            self.done, self.reason = end, reason

    def delta(self) -> str:
        """The text that became final since the last call: none that may yet be in a stop or half a character."""
        if self.done:
            end = self._end
        else:
            end = whole_characters(self._data) - self._may_be_stop()
            if isinstance(self.spec.type, LinesType):
                end -= self._data[:end].endswith(b"\n")
            end = whole_characters(self._data[:end])
        start = max(self._shown, self._skipped_so_far())
        if end <= start:
            return ""
        self._shown = end
        return self._data[start:end].decode(errors="replace")

    def _skipped_so_far(self) -> int:
        """Bytes before the value: 1 if the text begins with the held-back space."""
        if self.done:
            return self._skipped
        return 1 if self._held_space and self._data[:1] == b" " else 0

    def _find_stop(self, before: int) -> int | None:
        """Where a stop begins that ends in the bytes from `before` on: the first to be complete, the longest of those.

        What ends first counts, not what begins first: so the end does not depend on how the text is cut into tokens.
        """
        first = self._skipped_so_far()
        found: tuple[int, int] | None = None
        for stop in self._stops:
            at = self._data.find(stop, max(first, before - len(stop) + 1))
            if at >= 0 and (found is None or (at + len(stop), at) < found):
                found = (at + len(stop), at)
        return None if found is None else found[1]

    def _may_be_stop(self) -> int:
        """How many of the last bytes could begin a stop."""
        known = bytes(self._data[max(self._skipped_so_far(), len(self._data) - self._longest_stop + 1) :])
        return next((n for n in range(len(known), 0, -1) if any(s.startswith(known[-n:]) for s in self._stops)), 0)

    def _finish(self, end: End, at: int) -> None:
        at = whole_characters(self._data[:at])
        if isinstance(self.spec.type, LinesType) and self._data[:at].endswith(b"\n"):
            at -= 1
        starts = 0
        if self._constraint is not None:
            try:
                found = self._constraint.value_starts(bytes(self._data[:at]))
            except ConstraintError as error:
                self._keep(at)
                self._fail(str(error))
                return
            if found is None:
                self._keep(at)
                self._fail(f"its text is no value of its type after {self.drawn} tokens ({end})")
                return
            starts = found
        elif self._held_space and self._data[:1] == b" ":
            starts = 1
        self._keep(at)
        self._skipped = min(starts, at)
        self.done = end
        try:
            self.value = read_value(self.spec.type, self.text)
        except (ValueError, RecursionError) as error:
            self._fail(str(error))

    def _fail(self, reason: str) -> None:
        self.done, self.reason, self.value = "failed", reason, None

    def _keep(self, end: int) -> None:
        """Set what stays: the bytes to `end`."""
        self._skipped = min(self._skipped_so_far(), end)
        self._end = end
        kept = len(self._tokens)
        while kept and (self._ends[kept - 1] > end or self._tokens[kept - 1] in self._tokenizer.eos_ids):
            kept -= 1
        self._kept = kept
        start = self._ends[kept - 1] if kept else 0
        self.replacement = tuple(encode_bytes(self._tokenizer, bytes(self._data[start:end])))


MAX_DIGITS = 4300  # what Python turns into an int and back


def read_value(kind: GenType, text: str) -> Value:
    """The value that `text` stands for. Raises ValueError, with a reason for the user, if it is none of its type."""
    match kind:
        case TextType() | RegexType() | ChoiceType():
            if isinstance(kind, ChoiceType) and text not in kind.options:
                raise ValueError(f"{text!r} is none of the choices")
            return text
        case IntType():
            if len(text) > MAX_DIGITS:
                raise ValueError(f"an int of more than {MAX_DIGITS} digits")
            return int(text)
        case FloatType():
            number = float(text)
            if math.isinf(number):
                raise ValueError("a number too large for a float")
            return number
        case BoolType():
            if text not in ("true", "false"):
                raise ValueError(f"{text!r} is neither `true` nor `false`")
            return text == "true"
        case LinesType(least, most):
            lines = text.split("\n") if text else []
            if not least <= len(lines) <= most or not all(lines):
                raise ValueError(f"{len(lines)} lines where from {least} to {most} are wanted")
            return lines
        case JsonType():
            return json.loads(text)
        case _:
            assert_never(kind)


def whole_characters(data: bytes | bytearray) -> int:
    """How many bytes of `data` are left when UTF-8 characters that are only begun at its end are taken off."""
    end = len(data)
    while half := _begun(data[max(0, end - 3) : end]):
        end -= half
    return end


def _begun(data: bytes | bytearray) -> int:
    """How many of the last bytes of `data` begin a character without ending it."""
    for back in range(1, len(data) + 1):
        if data[-back] & 0xC0 != 0x80:
            return back if data[-back] >= 0xC2 and _is_begun(bytes(data[-back:])) else 0
    return 0


def _is_begun(part: bytes) -> bool:
    """Whether some character begins with `part` and goes on."""
    try:
        part.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def encode_bytes(tokenizer: TokenizerLike, data: bytes) -> list[int]:
    """Tokens that stand for exactly `data`: the tokenizer's own encoding, else the longest token at each place.

    `data` need not be whole characters. Raises ValueError if the vocabulary cannot spell it.
    """
    if not data:
        return []
    try:
        ids = tokenizer.encode([(data.decode(), False)])
        if b"".join(map(tokenizer.token_bytes, ids)) == data:
            return ids
    except UnicodeDecodeError:
        pass
    pieces: dict[bytes, int] = {}
    for token in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(token)
        if text and text in data and not tokenizer.is_special(token):
            pieces.setdefault(text, token)
    return encode_longest(pieces, data)


def recorded_ids(tokenizer: TokenizerLike, recorded: str | Sequence[str] | Sequence[int]) -> tuple[int, ...]:
    """The tokens that `recorded=` forces: a text, pieces of text each encoded apart, or the ids themselves.

    Raises ValueError for an id outside the vocabulary.
    """
    if isinstance(recorded, str):
        recorded = [recorded]
    ids: list[int] = []
    for item in recorded:
        if isinstance(item, str):
            ids.extend(tokenizer.encode([(item, False)]))
        elif 0 <= item < tokenizer.vocab_size:
            ids.append(item)
        else:
            raise ValueError(f"token {item} is outside the vocabulary of {tokenizer.vocab_size}")
    return tuple(ids)


def choice_encodings(tokenizer: TokenizerLike, kind: ChoiceType, *, held_space: bool) -> tuple[tuple[int, ...], ...]:
    """Each option as a forced continuation, for `choice(by="logprob")`; a held-back space goes before it."""
    return tuple(tuple(tokenizer.encode([(f" {option}" if held_space else option, False)])) for option in kind.options)
