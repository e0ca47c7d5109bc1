"""Statements with their options read: what the checker has accepted, in the form the lower layers consume.

    type   = TextType | IntType | FloatType | BoolType | LinesType | ChoiceType | RegexType | JsonType
    gen    = GenSpec(type, max_tokens, stop, sampling, seed, logprobs, recorded)
    join   = JoinSpec(kind, count, key, by, context, positions)
    limits = Limits(limit, upto, budget, deadline_s, fallback, fresh, retry)

Numbers that bound a plan (`max`, `upto`, `limit`, `budget`, `depth`) are plain ints here; what may vary at run
time (a temperature, a width under `upto`) stays an expression.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from anabranch.dsl.ast import Expr


@dataclass(frozen=True, slots=True)
class TextType:
    """Free text: ends at `max`, a stop or the end-of-turn token."""


@dataclass(frozen=True, slots=True)
class IntType:
    """`-?(0|[1-9][0-9]*)`; the value is an int."""


@dataclass(frozen=True, slots=True)
class FloatType:
    """`-?(0|[1-9][0-9]*)(\\.[0-9]+)?`; the value is a float."""


@dataclass(frozen=True, slots=True)
class BoolType:
    """`true` or `false`; the value is a bool."""


@dataclass(frozen=True, slots=True)
class LinesType:
    """From `least` to `most` non-empty lines; the value is a list of strings, one a line, without newlines."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class ChoiceType:
    """One of `options`. `by="logprob"` scores every option as a continuation instead of sampling."""

    options: tuple[str, ...]
    by: Literal["sample", "logprob"] = "sample"


@dataclass(frozen=True, slots=True)
class RegexType:
    """The whole value matches `pattern` (Rust regex syntax, as llguidance reads it)."""

    pattern: str


@dataclass(frozen=True, slots=True)
class JsonType:
    """A JSON document under `schema` (JSON text, kept verbatim); the value is what `json.loads` gives."""

    schema: str


GenType: TypeAlias = TextType | IntType | FloatType | BoolType | LinesType | ChoiceType | RegexType | JsonType

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")


@dataclass(frozen=True, slots=True)
class GenSpec:
    """A `gen` with its options read.

    max_tokens: most tokens drawn (at least 1)
    stop: texts that end a text gen; none is empty
    sampling: the options of `SAMPLING` that were written, as expressions
    seed: overrides the plan's seed for this gen
    logprobs: above 0, the drawn tokens' log-probabilities are kept in the gen's event
    recorded: forced text (a string, a list of strings, or `ids(...)`), or None
    """

    type: GenType
    max_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Expr] = field(default_factory=dict)
    seed: Expr | None = None
    logprobs: int = 0
    recorded: Expr | None = None


@dataclass(frozen=True, slots=True)
class JoinSpec:
    """How a fork or map ends.

    kind: which value comes out
    count: n of `first(n)`, `quorum(n, _)`, `all(min=n)`; for `all` without `min`, None: every branch must be ok
    key: the name bound in the branch that `vote`, `best`, `quorum` read; "logprob" is built in for `best`
    context: what the parent's context becomes
    positions: where the parent goes on after `stitch`
    """

    kind: Literal["all", "vote", "best", "first", "quorum"] = "all"
    count: int | None = None
    key: str | None = None
    by: Literal["exact", "casefold", "number"] = "exact"
    context: Literal["drop", "text", "stitch"] = "drop"
    positions: Literal["max", "sum"] = "max"


@dataclass(frozen=True, slots=True)
class Limits:
    """The options that `fork`, `map`, `branch` and `reduce` share.

    limit: how many branches run at once; None for no limit
    upto: the most branches there can be, for a width known only at run time
    budget: tokens that may be decoded inside; None for no budget of its own
    deadline_s: seconds of wall clock from the start of the fork
    fallback: the value where too few branches succeed
    fresh: the branch starts from an empty view
    retry: how often a failed branch is run again
    """

    limit: int | None = None
    upto: int | None = None
    budget: int | None = None
    deadline_s: float | None = None
    fallback: Expr | None = None
    fresh: bool = False
    retry: int = 0


Value: TypeAlias = Any
"""A value of the language: int, float, bool, str, list of values, or dict (a record; JSON's null is None)."""
