"""Types as automata over tokens: which tokens may come next, where each leads, and how far a value is.

    regex -> byte NFA -> byte DFA (minimal)  x  the vocabulary's trie  ->  token automaton

`int float bool choice lines` and the regexes of `runtime/regexes.py` are regular, so for each of them the least number
of tokens to a value is known in each state, and a gen can be steered to end inside its budget.

    regex = Chars(bytes) | Seq(regex*) | Either(regex*) | Repeat(regex, least, most?)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, Protocol, TypeAlias, assert_never

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int32]

MAX_STATES = 20_000  # a byte DFA of this many states takes 20 MB
MAX_EDGES = 1 << 22  # (state, token) pairs of one automaton: 32 MB and about half a second
MAX_WORK = 2_000_000  # places of the regex over all moves of the DFA, about a second
MAX_REFINED = 2_000_000  # entries of the DFA over all rounds of its minimization, about a second
_SLICE = 64  # states walked at once
FAR = 1 << 30  # the distance of a state from which no value can be reached


class TooLarge(ValueError):
    """The type needs more states or transitions than this runtime builds."""


class TokenizerLike(Protocol):
    """What constraints and generation need of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a turn."""
        ...

    def token_bytes(self, token: int, /) -> bytes:
        """The bytes a token stands for."""
        ...

    def is_special(self, token: int, /) -> bool: ...

    def encode(self, pieces: Sequence[tuple[str, bool]], /) -> list[int]:
        """Token ids of the pieces' text, in one call; special tokens are split out of pieces marked True alone."""
        ...

    def ll_tokenizer(self) -> Any:
        """The `llguidance.LLTokenizer` of this vocabulary."""
        ...


# The algebra of regular expressions over bytes.


@dataclass(frozen=True, slots=True)
class Chars:
    """One byte out of `allowed`."""

    allowed: frozenset[int]


@dataclass(frozen=True, slots=True)
class Seq:
    parts: tuple[Regex, ...]


@dataclass(frozen=True, slots=True)
class Either:
    parts: tuple[Regex, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`part` from `least` to `most` times; `most` None for no limit."""

    part: Regex
    least: int
    most: int | None


Regex: TypeAlias = Chars | Seq | Either | Repeat


def literal(text: str) -> Regex:
    return Seq(tuple(Chars(frozenset((b,))) for b in text.encode()))


def byte_range(first: int, last: int) -> Regex:
    return Chars(frozenset(range(first, last + 1)))


def optional(part: Regex) -> Regex:
    return Repeat(part, 0, 1)


_TAIL = byte_range(0x80, 0xBF)
NON_ASCII: Regex = Either(
    (
        Seq((byte_range(0xC2, 0xDF), _TAIL)),
        Seq((byte_range(0xE0, 0xE0), byte_range(0xA0, 0xBF), _TAIL)),
        Seq((Chars(frozenset((*range(0xE1, 0xED), 0xEE, 0xEF))), _TAIL, _TAIL)),
        Seq((byte_range(0xED, 0xED), byte_range(0x80, 0x9F), _TAIL)),
        Seq((byte_range(0xF0, 0xF0), byte_range(0x90, 0xBF), _TAIL, _TAIL)),
        Seq((byte_range(0xF1, 0xF3), _TAIL, _TAIL, _TAIL)),
        Seq((byte_range(0xF4, 0xF4), byte_range(0x80, 0x8F), _TAIL, _TAIL)),
    )
)
"""Any character of two or more bytes in well-formed UTF-8 (Unicode, table 3-7)."""


def any_char_but(excluded: str) -> Regex:
    """Any Unicode character except those of `excluded`, which are ASCII."""
    return Either((Chars(frozenset(range(0x80)) - frozenset(excluded.encode("ascii"))), NON_ASCII))


DIGIT = byte_range(0x30, 0x39)
INT: Regex = Seq(
    (optional(literal("-")), Either((literal("0"), Seq((byte_range(0x31, 0x39), Repeat(DIGIT, 0, None))))))
)
FLOAT: Regex = Seq((INT, optional(Seq((literal("."), Repeat(DIGIT, 1, None))))))
BOOL: Regex = Either((literal("true"), literal("false")))
LINE: Regex = Seq((any_char_but(" \t\r\n"), Repeat(any_char_but("\r\n"), 0, None)))
"""A line begins with what is no blank, so none is empty."""
LINES: Regex = Seq((Repeat(Seq((LINE, literal("\n"))), 0, None), optional(LINE)))
"""Any number of lines, the last with or without its line end."""


def any_of(texts: Iterable[str]) -> Regex:
    """One of `texts`."""
    return Either(tuple(map(literal, texts)))


# Bytes: from a regex to a minimal DFA.


@dataclass(frozen=True, eq=False)
class Dfa:
    """A deterministic automaton over bytes, state 0 first; every state can reach an accepting one.

    step: int32 [states, 256], -1 where no value can follow
    accepting: bool [states]
    """

    step: Ints
    accepting: NDArray[np.bool_]

    @cached_property
    def final(self) -> NDArray[np.bool_]:
        """bool [states]: accepting, and nothing can follow."""
        return self.accepting & (self.step < 0).all(axis=1)

    def matches(self, data: bytes) -> bool:
        state = 0
        for byte in data:
            state = int(self.step[state, byte])
            if state < 0:
                return False
        return bool(self.accepting[state])


class _Nfa:
    """Thompson's construction; states are numbers, `empty` holds the moves that read nothing."""

    def __init__(self) -> None:
        self.empty: list[list[int]] = []
        self.reads: list[list[tuple[frozenset[int], int]]] = []

    def state(self) -> int:
        if len(self.empty) > 5 * MAX_STATES:
            raise TooLarge("the type needs too many states")
        self.empty.append([])
        self.reads.append([])
        return len(self.empty) - 1

    def add(self, regex: Regex, start: int) -> int:
        """Build `regex` from `start`; returns its one end."""
        match regex:
            case Chars(allowed):
                end = self.state()
                self.reads[start].append((allowed, end))
                return end
            case Seq(parts):
                return reduce(lambda at, part: self.add(part, at), parts, start)
            case Either(parts):
                end = self.state()
                for part in parts:
                    first = self.state()
                    self.empty[start].append(first)
                    self.empty[self.add(part, first)].append(end)
                return end
            case Repeat(part, least, most):
                for _ in range(least):
                    start = self.add(part, start)
                if most is None:
                    loop = self.state()
                    self.empty[start].append(loop)
                    self.empty[self.add(part, loop)].append(loop)
                    end = self.state()
                    self.empty[loop].append(end)
                    return end
                end = self.state()
                for _ in range(most - least):
                    self.empty[start].append(end)
                    first = self.state()
                    self.empty[start].append(first)
                    start = self.add(part, first)
                self.empty[start].append(end)
                return end
            case _:
                assert_never(regex)

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        seen = set(states)
        todo = list(seen)
        while todo:
            for other in self.empty[todo.pop()]:
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        return frozenset(seen)


def to_dfa(regex: Regex) -> Dfa:
    """The minimal DFA of `regex`. Raises TooLarge above `MAX_STATES` states."""
    nfa = _Nfa()
    start = nfa.state()
    end = nfa.add(regex, start)
    return _determinize(nfa, start, {end})


def with_stops(dfa: Dfa, stops: Sequence[str]) -> Dfa:
    """`dfa` with one of `stops` allowed after a value, except where a value ends by itself since nothing can follow."""
    nfa = _Nfa()
    for state in range(len(dfa.step)):
        nfa.state()
        by_target: dict[int, set[int]] = {}
        for byte, target in enumerate(dfa.step[state].tolist()):
            if target >= 0:
                by_target.setdefault(target, set()).add(byte)
        nfa.reads[state].extend((frozenset(allowed), target) for target, allowed in by_target.items())
    tail = nfa.state()
    stopped = nfa.add(any_of(stops), tail)
    for state in (dfa.accepting & ~dfa.final).nonzero()[0].tolist():
        nfa.empty[state].append(tail)
    return _determinize(nfa, 0, {stopped, *dfa.accepting.nonzero()[0].tolist()})


def _determinize(nfa: _Nfa, start: int, ends: set[int]) -> Dfa:
    """The subset construction, then minimization."""
    kinds = _byte_kinds(allowed for reads in nfa.reads for allowed, _ in reads)
    kinds_of = {allowed: sorted({kinds[b] for b in allowed}) for reads in nfa.reads for allowed, _ in reads}
    num_kinds = max(kinds) + 1
    first = nfa.closure((start,))
    number = {first: 0}
    order = [first]
    rows: list[list[int]] = []
    work = 0
    for states in order:
        targets: dict[int, set[int]] = {}
        for state in states:
            for allowed, other in nfa.reads[state]:
                work += len(kinds_of[allowed])
                for kind in kinds_of[allowed]:
                    targets.setdefault(kind, set()).add(other)
        row = [-1] * num_kinds
        for kind, reached in targets.items():
            closed = nfa.closure(reached)
            work += len(closed)
            if work > MAX_WORK:
                raise TooLarge("the type needs too many states")
            if closed not in number:
                if len(order) >= MAX_STATES:
                    raise TooLarge("the type needs too many states")
                number[closed] = len(order)
                order.append(closed)
            row[kind] = number[closed]
        rows.append(row)
    by_kind = np.array(rows, dtype=np.int32)
    accepting = np.array([not ends.isdisjoint(states) for states in order])
    by_kind, accepting = _minimize(*_trim(by_kind, accepting))
    return Dfa(by_kind[:, np.array(kinds)], accepting)


def _byte_kinds(sets: Iterable[frozenset[int]]) -> list[int]:
    """For each byte a number, equal for bytes that no set tells apart."""
    signature: list[list[int]] = [[] for _ in range(256)]
    for i, allowed in enumerate(set(sets)):
        for byte in allowed:
            signature[byte].append(i)
    numbers: dict[tuple[int, ...], int] = {}
    return [numbers.setdefault(tuple(s), len(numbers)) for s in signature]


def _trim(step: Ints, accepting: NDArray[np.bool_]) -> tuple[Ints, NDArray[np.bool_]]:
    """Without the states from which nothing accepts; the first state stays."""
    alive = _moves_to(accepting, *_moves_of(step)) < FAR
    alive[0] = True
    number = np.full(len(step) + 1, -1, dtype=np.int32)
    number[:-1][alive] = np.arange(int(alive.sum()), dtype=np.int32)
    return number[step[alive]], accepting[alive]


def _moves_of(step: Ints) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(origin, target) of every move."""
    origin, column = (step >= 0).nonzero()
    return origin, step[origin, column].astype(np.int64)


def _moves_to(accepting: NDArray[np.bool_], origin: NDArray[np.int64], target: NDArray[np.int64]) -> NDArray[np.int64]:
    """The fewest moves from each state to an accepting one, `FAR` where there are none. Each move is walked once."""
    states = len(accepting)
    order = np.argsort(target, kind="stable")
    origin = origin[order]
    start = np.concatenate(([0], np.bincount(target, minlength=states).cumsum()))
    out = np.where(accepting, 0, FAR).astype(np.int64)
    reached = accepting.nonzero()[0]
    moves = 0
    while len(reached):
        moves += 1
        before = origin[_spread(start, reached)[1]]
        reached = np.unique(before[out[before] == FAR])
        out[reached] = moves
    return out


def _minimize(step: Ints, accepting: NDArray[np.bool_]) -> tuple[Ints, NDArray[np.bool_]]:
    """Moore's partition refinement; the block of the first state is 0.

    It takes as many rounds as the longest texts that tell two states apart. A long counted repetition may need one for
    each count, so after `MAX_REFINED` the automaton stays as it is: it is right, and has more states than it needs.
    """
    # Equal states are equally far from a value, so those of a chain are told apart at once.
    block = np.unique(_moves_to(accepting, *_moves_of(step)), return_inverse=True)[1].reshape(-1).astype(np.int32)
    done = 0
    while True:
        done += step.size
        if done > MAX_REFINED:
            return step, accepting
        signature = np.column_stack([block, np.where(step < 0, -1, block[step])])
        _, first, refined = np.unique(signature, axis=0, return_index=True, return_inverse=True)
        refined = refined.reshape(-1)
        if len(first) == len(np.unique(block)):
            break
        block = refined.astype(np.int32)
    # Blocks are numbered by their first state, so the start's is 0.
    order = np.argsort(first, kind="stable")
    number = np.empty(len(first), dtype=np.int32)
    number[order] = np.arange(len(first), dtype=np.int32)
    heads = first[order]
    moved = step[heads]
    return np.where(moved < 0, -1, number[refined[moved]]).astype(np.int32), accepting[heads]


# Tokens: the vocabulary's trie, walked from every state at once.


@dataclass(frozen=True, eq=False)
class _Level:
    """The trie's nodes of one depth. A node's children are consecutive nodes of the next level.

    byte: uint8 [nodes], the last byte of the node's prefix
    children: int64 [nodes + 1], where each node's children begin in the next level
    ends: int64 [nodes + 1], where each node's tokens begin in `tokens`
    tokens: int32, ids of the tokens that end here
    """

    byte: NDArray[np.uint8]
    children: NDArray[np.int64]
    ends: NDArray[np.int64]
    tokens: Ints


class Vocabulary:
    """A tokenizer's tokens as a byte trie. Special tokens and those without bytes are left out.

    size: number of token ids; bits: that of a packed mask, a multiple of 32
    eos_ids: the end-of-turn tokens
    texts: the bytes of each token, b"" for those left out; lengths: int32 [size], how many
    by_text: the lowest id of each text; single_bytes: those of one byte
    newlines: int32 [size], how many line ends each token holds
    """

    def __init__(self, tokenizer: TokenizerLike) -> None:
        self.tokenizer = tokenizer
        self.size = tokenizer.vocab_size
        self.eos_ids = frozenset(tokenizer.eos_ids)
        texts = {
            token: data
            for token in range(self.size)
            if token not in self.eos_ids and not tokenizer.is_special(token) and (data := tokenizer.token_bytes(token))
        }
        self.texts = [texts.get(token, b"") for token in range(self.size)]
        self.bits = (self.size + 31) // 32 * 32
        self.lengths = np.array([len(t) for t in self.texts], dtype=np.int32)
        self.by_text: dict[bytes, int] = {}
        for token, data in texts.items():
            self.by_text.setdefault(data, token)
        self.single_bytes = [token for text, token in self.by_text.items() if len(text) == 1]
        order = sorted(texts, key=texts.__getitem__)
        self.newlines = np.zeros(self.size, dtype=np.int32)
        for token, data in texts.items():
            self.newlines[token] = data.count(b"\n")
        self._holding: dict[bytes, NDArray[np.uint8]] = {}
        self.levels = _levels([texts[t] for t in order], np.array(order, dtype=np.int32))

    def holding(self, any_of_these: bytes) -> NDArray[np.uint8]:
        """uint8 [32 * ceil(size/32)]: 1 for the tokens that hold one of these bytes."""
        if any_of_these not in self._holding:
            bits = np.zeros(self.bits, dtype=np.uint8)
            bits[: self.size] = [any(b in any_of_these for b in text) for text in self.texts]
            self._holding[any_of_these] = bits
        return self._holding[any_of_these]

    def walk(self, dfa: Dfa) -> Edges:
        """Every token's move from every state of `dfa`. Raises TooLarge above `MAX_EDGES` moves."""
        parts: list[tuple[Ints, Ints, Ints]] = []
        total = 0
        # In slices, so that the widest level of the trie is never laid out for all states at once.
        for low in range(0, len(dfa.step), _SLICE):
            part = self._walk_from(dfa, np.arange(low, min(low + _SLICE, len(dfa.step)), dtype=np.int32))
            parts.append(part)
            total += len(part[0])
            if total > MAX_EDGES:
                raise TooLarge("the type allows too many tokens in too many states")
        origin, token, target = (np.concatenate(part) for part in zip(*parts, strict=True))
        counts = np.bincount(origin, minlength=len(dfa.step))
        return Edges(np.concatenate(([0], counts.cumsum())), token, target)

    def _walk_from(self, dfa: Dfa, states: Ints) -> tuple[Ints, Ints, Ints]:
        """(origin, token, target) of the moves from consecutive `states`, ordered by origin and token."""
        origin, state, node = states, states, np.zeros(len(states), dtype=np.int64)
        found: list[tuple[Ints, Ints, Ints]] = []
        for above, level in zip(self.levels, self.levels[1:], strict=False):
            picks, child = _spread(above.children, node)
            state = dfa.step[state[picks], level.byte[child]]
            alive = state >= 0
            origin, state, node = origin[picks][alive], state[alive], child[alive]
            if not len(node):
                break
            picks, at = _spread(level.ends, node)
            found.append((origin[picks], level.tokens[at], state[picks]))
        if not found:
            return (np.zeros(0, np.int32),) * 3
        origin, token, target = (np.concatenate(part) for part in zip(*found, strict=True))
        if len(token) * 16 < len(states) * self.size:
            order = np.lexsort((token, origin))
            return origin[order], token[order], target[order]
        # Dense: laying the moves out in a table costs less than sorting them.
        table = np.full((len(states), self.size), -1, dtype=np.int32)
        table[origin - states[0], token] = target
        rows, columns = (table >= 0).nonzero()
        return rows.astype(np.int32) + states[0], columns.astype(np.int32), table[rows, columns]


@dataclass(frozen=True, eq=False)
class Edges:
    """The moves of each state, by token id: those of state s are at start[s] to start[s + 1].

    start: int64 [states + 1]; token, target: int32 [moves]
    """

    start: NDArray[np.int64]
    token: Ints
    target: Ints

    def of(self, state: int) -> slice:
        return slice(int(self.start[state]), int(self.start[state + 1]))

    def find(self, state: int, token: int) -> int | None:
        """Where the move of `token` from `state` is."""
        moves = self.of(state)
        at = moves.start + int(np.searchsorted(self.token[moves], token))
        return at if at < moves.stop and self.token[at] == token else None

    @property
    def origin(self) -> NDArray[np.int64]:
        """int64 [moves]: the state that each leaves."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))


def _spread(start: NDArray[np.int64], node: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All items of each of `node`, whose items are at start[node] to start[node + 1]: (which of `node`, item)."""
    counts = start[node + 1] - start[node]
    picks = np.repeat(np.arange(len(node)), counts)
    offset = np.arange(len(picks)) - np.repeat(counts.cumsum() - counts, counts)
    return picks, start[node][picks] + offset


def _levels(texts: Sequence[bytes], tokens: Ints) -> list[_Level]:
    """The trie of `texts`, which are sorted. Level 0 is the root."""
    lengths = np.array([len(t) for t in texts], dtype=np.int64)
    depth = int(lengths.max(initial=0))
    table = np.zeros((len(texts), depth), dtype=np.uint8)
    for i, text in enumerate(texts):
        table[i, : len(text)] = np.frombuffer(text, dtype=np.uint8)
    differs = np.ones((len(texts), depth), dtype=bool)
    if len(texts) > 1:
        within = np.arange(depth) < np.minimum(lengths[1:], lengths[:-1])[:, None]
        differs[1:] = np.maximum.accumulate((table[1:] != table[:-1]) | ~within, axis=1)
    levels: list[_Level] = []
    node_of = np.zeros(len(texts), dtype=np.int64)
    num_nodes, byte = 1, np.zeros(1, dtype=np.uint8)
    for d in range(depth + 1):
        ending = (lengths == d).nonzero()[0]
        ends = np.concatenate(([0], np.bincount(node_of[ending], minlength=num_nodes).cumsum()))
        reaching = (lengths > d).nonzero()[0]
        new = differs[reaching, d] if d < depth else np.zeros(0, dtype=bool)
        heads = reaching[new]
        children = np.concatenate(([0], np.bincount(node_of[heads], minlength=num_nodes).cumsum()))
        levels.append(_Level(byte, children, ends, tokens[ending]))
        if d < depth:
            byte, num_nodes = table[heads, d], len(heads)
            node_of[reaching] = new.cumsum() - 1
    return levels


def encode_longest(by_text: Mapping[bytes, int], data: bytes) -> list[int]:
    """Tokens that stand for exactly `data`: the longest at each place. Raises ValueError if there is none at one."""
    widest = max(map(len, by_text), default=0)
    out: list[int] = []
    at = 0
    while at < len(data):
        for end in range(min(len(data), at + widest), at, -1):
            if data[at:end] in by_text:
                out.append(by_text[data[at:end]])
                at = end
                break
        else:
            raise ValueError(f"no token of the vocabulary begins {data[at : at + 8]!r}")
    return out


class Automaton(Protocol):
    """A type over tokens. States are numbers; `start` is the first."""

    @property
    def start(self) -> int: ...

    def mask(self, state: int, left: int) -> Ints:
        """The tokens after which a value can still be had, when `left` may be drawn, that one included.

        Packed, int32 [ceil(vocab/32)]; the end-of-turn tokens are in it where `accepting`. Not to be changed.
        """
        ...

    def step(self, state: int, token: int) -> int | None:
        """The state after `token`, or None if no value begins so."""
        ...

    def accepting(self, state: int) -> bool: ...

    def final(self, state: int) -> bool:
        """Accepting, and nothing can follow."""
        ...

    def distance(self, state: int) -> int:
        """The fewest tokens from `state` to a value; `FAR` if there is none."""
        ...


class DfaAutomaton:
    """A byte DFA over the vocabulary. `final` marks the states that end a gen: by default the DFA's own."""

    start = 0

    def __init__(self, vocabulary: Vocabulary, dfa: Dfa) -> None:
        self.vocabulary = vocabulary
        self.dfa = dfa
        self.edges = vocabulary.walk(dfa)
        self.distances = _distances(dfa.accepting, self.edges)
        self._masks = _Masks(vocabulary)

    def mask(self, state: int, left: int) -> Ints:
        return self._masks.get(state, left, lambda: self._moves(state), self.accepting(state))

    def _moves(self, state: int) -> tuple[Ints, NDArray[np.int64]]:
        moves = self.edges.of(state)
        return self.edges.token[moves], self.distances[self.edges.target[moves]]

    def step(self, state: int, token: int) -> int | None:
        at = self.edges.find(state, token)
        return None if at is None else int(self.edges.target[at])

    def accepting(self, state: int) -> bool:
        return bool(self.dfa.accepting[state])

    def final(self, state: int) -> bool:
        return bool(self.dfa.final[state])

    def distance(self, state: int) -> int:
        return int(self.distances[state])


class LinesAutomaton:
    """From `least` to `most` lines; a state is (lines ended, state in the line), so its size does not grow with `most`.

    The last line may end with a line end, which is no part of the value; after `most` of them nothing follows.
    """

    start = 0

    def __init__(self, vocabulary: Vocabulary, least: int, most: int, *, held_space: bool = False) -> None:
        self.vocabulary = vocabulary
        self.least, self.most = least, most
        self.dfa = to_dfa(Seq((optional(literal(" ")), LINES)) if held_space else LINES)
        self.width = len(self.dfa.step)
        self.edges = vocabulary.walk(self.dfa)
        self.ended = vocabulary.newlines[self.edges.token]
        inside = int(self.dfa.step[0, ord("a")])
        self.fresh = int(self.dfa.step[inside, ord("\n")])
        # A state between lines: where a line end leads, and (with a held-back space) the start and what follows it.
        self.between = np.array(
            [bool(a) and s[ord("\n")] < 0 for a, s in zip(self.dfa.accepting, self.dfa.step, strict=True)]
        )
        self.in_line = self.dfa.accepting & ~self.between
        self.distances = self._measure()
        self._masks = _Masks(vocabulary)

    def _measure(self) -> NDArray[np.int64]:
        """[least + 1, width]: the fewest tokens to a value when so many more lines must end, or be begun at the last.

        A move that ends more lines than `most` leaves is not taken; beyond `need` that is always most - least lines.
        """
        moves = _distinct(self.edges.origin, self.ended, self.edges.target)
        out = np.full((self.least + 1, self.width), FAR, dtype=np.int64)
        for need in range(self.least + 1):
            room = need + self.most - self.least
            ends = moves[:, 1]
            fits = (ends < room) | ((ends == room) & (moves[:, 2] == self.fresh))
            away = moves[fits & (ends > 0)]
            here = moves[fits & (ends == 0)]
            row = out[need]
            if need == 0:
                row[self.dfa.accepting] = 0
            elif need == 1:
                row[self.in_line] = 0
            np.minimum.at(row, away[:, 0], out[np.maximum(need - away[:, 1], 0), away[:, 2]] + 1)
            for _ in range(self.width):
                np.minimum.at(row, here[:, 0], row[here[:, 2]] + 1)
        return out

    def _split(self, state: int) -> tuple[int, int]:
        return divmod(state, self.width)

    def _moves(self, state: int) -> tuple[Ints, NDArray[np.int64]]:
        done, at = self._split(state)
        moves, target = self.moves(done, self.edges.of(at))
        done_then, at_then = np.divmod(target, self.width)
        return self.edges.token[moves], self.distances[np.maximum(self.least - done_then, 0), at_then]

    def moves(self, done: int, of: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of the edges `of` may be taken when `done` lines have ended, and the state that each leads to."""
        ended, at_then = self.ended[of].astype(np.int64), self.edges.target[of]
        done_then = done + ended
        fits = (done_then < self.most) | ((done_then == self.most) & (at_then == self.fresh))
        taken = fits.nonzero()[0]
        first = of.start or 0
        return taken + first, done_then[taken] * self.width + at_then[taken]

    def mask(self, state: int, left: int) -> Ints:
        return self._masks.get(state, left, lambda: self._moves(state), self.accepting(state))

    def step(self, state: int, token: int) -> int | None:
        done, at = self._split(state)
        found = self.edges.find(at, token)
        if found is None:
            return None
        done, at = done + int(self.ended[found]), int(self.edges.target[found])
        if done > self.most or (done == self.most and at != self.fresh):
            return None
        return done * self.width + at

    def accepting(self, state: int) -> bool:
        return self.distance(state) == 0

    def final(self, state: int) -> bool:
        return self._split(state)[0] == self.most

    def distance(self, state: int) -> int:
        done, at = self._split(state)
        return int(self.distances[max(self.least - done, 0), at])


def pack(tokens: Iterable[int] | Ints, size: int, more: Iterable[int] = ()) -> Ints:
    """A token mask, int32 [ceil(size/32)], with the bits of `tokens` and `more`."""
    bits = np.zeros((size + 31) // 32 * 32, dtype=np.uint8)
    bits[np.asarray(tokens, dtype=np.int64)] = 1
    for token in more:
        bits[token] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


class _Masks:
    """The packed masks of an automaton's states. Budgets above a state's farthest move share one."""

    KEPT = 1024  # 6 MB at a vocabulary of 49,152

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._farthest: dict[int, int] = {}
        self._packed: dict[tuple[int, int], Ints] = {}

    def get(self, state: int, left: int, moves: Callable[[], tuple[Ints, NDArray[np.int64]]], accepting: bool) -> Ints:
        """`moves` gives the tokens that may follow and the distance after each."""
        farthest = self._farthest.get(state)
        found = None if farthest is None else self._packed.get((state, min(left - 1, farthest)))
        if found is None:
            tokens, far = moves()
            farthest = int(far[far < FAR].max(initial=0))
            if len(self._packed) >= self.KEPT:
                self._farthest.clear()
                self._packed.clear()
            reach = min(left - 1, farthest)
            found = pack(tokens[far <= reach], self.vocabulary.size, self.vocabulary.eos_ids if accepting else ())
            self._farthest[state] = farthest
            self._packed[state, reach] = found
        return found


def _distinct(*columns: NDArray[Any]) -> NDArray[np.int64]:
    """The distinct rows of `columns` (numbers from 0), [rows, columns]."""
    shape = tuple(int(column.max(initial=0)) + 1 for column in columns)
    return np.column_stack(np.unravel_index(np.unique(np.ravel_multi_index(columns, shape)), shape))


def _distances(accepting: NDArray[np.bool_], edges: Edges) -> NDArray[np.int64]:
    """The fewest tokens from each state to an accepting one."""
    moves = _distinct(edges.origin, edges.target)
    return _moves_to(accepting, moves[:, 0], moves[:, 1])


@dataclass(frozen=True, eq=False)
class Tables:
    """An automaton laid out for `automaton_mask`; its states keep their numbers.

    next_state: int32 [states, vocab], -1 where a token is not allowed
    distance: int32 [states]
    accepting, final: bool [states]
    """

    next_state: Ints
    distance: Ints
    accepting: NDArray[np.bool_]
    final: NDArray[np.bool_]


MAX_TABLE_BYTES = 64 << 20  # 340 states at a vocabulary of 49,152


def tables(automaton: DfaAutomaton | LinesAutomaton, max_bytes: int = MAX_TABLE_BYTES) -> Tables:
    """`automaton` as dense tables, 4 bytes a state and token; the lines that were ended are unrolled into states.

    Raises TooLarge above `max_bytes`: such a type's masks are made on the host.
    """
    size = automaton.vocabulary.size
    states = len(automaton.dfa.step)
    if isinstance(automaton, LinesAutomaton):
        states *= automaton.most + 1
    if 4 * states * size > max_bytes:
        raise TooLarge(f"the type has {states} states, whose tables take more than {max_bytes} bytes")
    next_state = np.full((states, size), -1, dtype=np.int32)
    if isinstance(automaton, DfaAutomaton):
        next_state[automaton.edges.origin, automaton.edges.token] = automaton.edges.target
        distance, final = automaton.distances, automaton.dfa.final
        return Tables(next_state, distance.astype(np.int32), automaton.dfa.accepting, final)
    origin = automaton.edges.origin
    for done in range(automaton.most + 1):
        moves, target = automaton.moves(done, slice(None))
        next_state[done * automaton.width + origin[moves], automaton.edges.token[moves]] = target
    need = np.maximum(automaton.least - np.arange(automaton.most + 1), 0)
    distance = automaton.distances[need].reshape(-1)
    final = np.repeat(np.arange(automaton.most + 1) == automaton.most, automaton.width)
    return Tables(next_state, distance.astype(np.int32), distance == 0, final)
