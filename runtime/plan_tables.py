"""What ends a gen, and what it may draw, as dense tables that a graph holds as buffers.

The automaton of a regular type is that of `runtime/automata.py`. Stops have an automaton of their own over the bytes of
the text (Aho and Corasick 1975), carried over to tokens: `Generation` ends at the first token that completes a stop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.dsl.spec import GenSpec
from anabranch.runtime.automata import Automaton, DfaAutomaton, LinesAutomaton, TokenizerLike, TooLarge, tables
from anabranch.runtime.constrain import AutomatonConstraint, Constraints

MAX_BYTES = 64 << 20
"""Of the tables of one gen."""


class HostPaced(ValueError):
    """The gen's next tokens can only be told by the host; the message says why."""


@dataclass(frozen=True, slots=True)
class TypeTables:
    """The automaton of a type; with a held-back space before the value and without, one after the other.

    next_state: int32 [states, vocab], -1 where a token is not allowed; distance: int32 [states]
    accepting, final: bool [states]
    """

    next_state: Tensor
    distance: Tensor
    accepting: Tensor
    final: Tensor


@dataclass(frozen=True, slots=True)
class StopTables:
    """next_state: int32 [states, vocab]; hit: bool [states], whether a stop is complete

    State 0 begins a text, and the last state one before which a space was held back: where it begins with a space,
    that is no part of it.
    """

    next_state: Tensor
    hit: Tensor


@dataclass(frozen=True, slots=True)
class GenTables:
    """The tables of one gen. bases: the first state of each automaton that `typed` holds"""

    typed: TypeTables | None
    stops: StopTables | None
    bases: tuple[tuple[Automaton, int], ...]

    def state_of(self, constraint: AutomatonConstraint) -> int:
        """The number of the state that a gen's constraint is in."""
        for automaton, base in self.bases:
            if automaton is constraint.automaton:
                return base + constraint.state
        raise RuntimeError("the graph was made without this automaton")

    def first_stop_state(self, *, held_space: bool) -> int:
        """The state in which the text of a gen begins."""
        return len(self.stops.hit) - 1 if self.stops is not None and held_space else 0


def gen_tables(spec: GenSpec, constraints: Constraints, holds: bool | None, vocab: int) -> GenTables:
    """holds: whether a space is held back before the gen, None where only the run knows; vocab: tokens to draw from

    Raises HostPaced for a type that has no automaton, or one too large.
    """
    bases: list[tuple[Automaton, int]] = []
    parts: list[TypeTables] = []
    base = 0
    for held in (False, True) if holds is None else (holds,):
        constraint = constraints.start(spec.type, held_space=held, stop=spec.stop)
        if constraint is None:
            continue
        automaton = constraint.automaton if isinstance(constraint, AutomatonConstraint) else None
        if not isinstance(automaton, DfaAutomaton | LinesAutomaton):
            raise HostPaced("its next tokens are told by a parser on the host")
        try:
            found = tables(automaton, MAX_BYTES)
        except TooLarge as error:
            raise HostPaced(str(error)) from None
        moves = torch.from_numpy(found.next_state)[:, :vocab]
        parts.append(
            TypeTables(
                torch.where(moves >= 0, moves + base, moves).contiguous(),
                torch.from_numpy(found.distance),
                torch.from_numpy(found.accepting.copy()),
                torch.from_numpy(found.final.copy()),
            )
        )
        bases.append((automaton, base))
        base += len(found.distance)
    typed = None
    if parts:
        typed = TypeTables(
            torch.cat([part.next_state for part in parts]),
            torch.cat([part.distance for part in parts]),
            torch.cat([part.accepting for part in parts]),
            torch.cat([part.final for part in parts]),
        )
    stops = stop_tables(spec.stop, constraints.vocabulary.tokenizer, vocab) if spec.stop else None
    return GenTables(typed, stops, tuple(bases))


def stop_tables(stops: Sequence[str], tokenizer: TokenizerLike, vocab: int) -> StopTables:
    """The automaton of a gen's stops. Raises HostPaced if it is too large."""
    step, hit = _bytes_automaton([stop.encode() for stop in stops])
    if 4 * (len(step) + 1) * vocab > MAX_BYTES:
        raise HostPaced(f"its stops have {len(step)} bytes, whose tables take more than {MAX_BYTES} bytes")
    texts = [b"" if token in tokenizer.eos_ids else tokenizer.token_bytes(token) for token in range(vocab)]
    lengths = np.array([len(text) for text in texts])
    data = np.zeros((vocab, max(1, int(lengths.max(initial=0)))), dtype=np.uint8)
    for token, text in enumerate(texts):
        data[token, : len(text)] = np.frombuffer(text, dtype=np.uint8)
    # Of the held-back space: the text begins after it.
    begun = np.array([data[token, 0] == 0x20 and lengths[token] > 0 for token in range(vocab)])
    rows = [_walk(step, np.full(vocab, state), data, lengths, 0) for state in range(len(step))]
    rest = _walk(step, np.zeros(vocab, dtype=np.int64), data, lengths, 1)
    # A token without bytes leaves the text unbegun.
    rows.append(np.where(lengths == 0, len(step), np.where(begun, rest, rows[0])))
    return StopTables(
        torch.from_numpy(np.stack(rows).astype(np.int32)), torch.from_numpy(np.concatenate((hit, [False])))
    )


def _walk(
    step: NDArray[np.int64], state: NDArray[np.int64], data: NDArray[np.uint8], lengths: NDArray[np.int64], first: int
) -> NDArray[np.int64]:
    """Where each token leads from `state`, its bytes read from place `first` on."""
    state = state.astype(np.int64)
    for place in range(first, data.shape[1]):
        tokens = (lengths > place).nonzero()[0]
        state[tokens] = step[state[tokens], data[tokens, place]]
    return state


def _bytes_automaton(stops: Sequence[bytes]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Aho and Corasick's automaton: moves [states, 256], and which states have seen a stop; those stay."""
    moves: list[dict[int, int]] = [{}]
    ends = [False]
    for stop in stops:
        state = 0
        for byte in stop:
            if byte not in moves[state]:
                moves[state][byte] = len(moves)
                moves.append({})
                ends.append(False)
            state = moves[state][byte]
        ends[state] = True
    step = np.zeros((len(moves), 256), dtype=np.int64)
    fall = [0] * len(moves)
    waiting = deque([0])
    while waiting:
        state = waiting.popleft()
        ends[state] = ends[state] or ends[fall[state]]
        if state:
            step[state] = step[fall[state]]
        for byte, target in moves[state].items():
            fall[target] = int(step[fall[state], byte]) if state else 0
            step[state, byte] = target
            waiting.append(target)
    hit = np.array(ends)
    step[hit] = hit.nonzero()[0][:, None]
    return step, hit
