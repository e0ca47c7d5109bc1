"""Many runs in one row of tokens, what they share once.

A row is a forest: the place of a token in it is what it sees, its position and its id. Two runs whose tokens agree in
these share the token, from the first one on, so runs of one plan on one prompt share the prompt. Within a run nothing
is shared, since a thread that a stitch lets see two equal branches attends to both.

A label says what the logits of a token are to predict, which in a tree is not the token that stands next in the row.
Where more than one token is to be predicted at one place (siblings that begin with a draw, runs that share a prompt),
each further one has an echo: the same token once more, at the same position and with the same view, that nothing
else sees, so that its logits are those of the token that it echoes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from anabranch.runtime.traces import Example, Target

IGNORED: Final = -100
"""The label of a token after which nothing is to be predicted, which torch's losses leave out."""

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """One row of `num_tokens` tokens.

    ids, positions, labels: [num_tokens], int32
    weights: [num_tokens], int32, in how many runs the label was written; 0 where there is none
    starts: [num_segments], int32, ascending from 0: the first token of each segment, which ends where the next begins
    spans: [num_spans, 4], int32: (segment, first token, end, shift): every token of that segment sees all tokens from
        the first to before the end, at that shift. By segment, then ascending. Besides, each token of a segment sees
        those before it in the segment, and itself
    """

    ids: Ints
    positions: Ints
    labels: Ints
    weights: Ints
    starts: Ints
    spans: Ints

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Fit:
    """How an example would stand in a row.

    rows: for each segment, the tokens of the row that its first tokens are; those after them would be new
    num_new: tokens that the row would grow by, echoes included
    """

    rows: tuple[tuple[int, ...], ...]
    num_new: int

    @property
    def num_shared(self) -> int:
        return sum(map(len, self.rows))


class RowBuilder:
    """A row while examples are added. Tokens are numbered in the order in which they came; echoes come last.

    What a token sees is a chain: an empty one (0), or a chain and one more (token, shift) that is seen after it.
    """

    def __init__(self) -> None:
        self.num_echoes = 0
        self._ids: list[int] = []
        self._positions: list[int] = []
        # The chain that a token sees before itself, and that with itself at its end.
        self._before: list[int] = []
        self._after: list[int] = []
        self._labels: dict[int, dict[int, int]] = {}
        # Of each chain: the one before its last (token, shift), these, and the chain at which its last span begins.
        self._chains: list[tuple[int, int, int, int]] = [(0, -2, 0, 0)]
        self._grown: dict[tuple[int, int, int], int] = {}
        # The tokens of a place: more than one where a run has several that are equal.
        self._at: dict[tuple[int, int, int], list[int]] = {}

    @property
    def num_tokens(self) -> int:
        return len(self._ids) + self.num_echoes

    def fit(self, example: Example) -> Fit:
        """Find what of `example` is there already. Nothing changes."""
        # Of the tokens of a place, those before this one are taken by other tokens of the example.
        taken: dict[tuple[int, int, int], int] = {}
        found: list[tuple[int, ...]] = []
        seen: dict[tuple[int, int, int], int | None] = {}
        for segment in example.segments:
            chain = self._known_view(segment.view, found, example, seen)
            rows: list[int] = []
            for position, token_id in enumerate(segment.ids, segment.start):
                if chain is None:
                    break
                place = (chain, token_id, position)
                number = taken.get(place, 0)
                there = self._at.get(place, ())
                if number == len(there):
                    break
                taken[place] = number + 1
                rows.append(there[number])
                chain = self._after[there[number]]
            found.append(tuple(rows))
        num_new = example.num_tokens - sum(map(len, found)) + self._num_new_echoes(example.targets, found)
        return Fit(tuple(found), num_new)

    def add(self, example: Example, fit: Fit) -> tuple[tuple[int, ...], ...]:
        """Add `example` as `fit`, which was found since the last `add`, says. Returns the tokens of each segment."""
        placed: list[tuple[int, ...]] = []
        seen: dict[tuple[int, int, int], int] = {}
        for segment, shared in zip(example.segments, fit.rows, strict=True):
            rows = list(shared)
            if len(rows) < len(segment.ids):
                chain = self._after[rows[-1]] if rows else self._view(segment.view, placed, seen)
                for place in range(len(rows), len(segment.ids)):
                    rows.append(self._append(chain, segment.ids[place], segment.start + place))
                    chain = self._after[-1]
            placed.append(tuple(rows))
        for target in example.targets:
            labels = self._labels.setdefault(placed[target.segment][target.place], {})
            self.num_echoes += bool(labels) and target.token not in labels
            labels[target.token] = labels.get(target.token, 0) + 1
        return tuple(placed)

    def finish(self) -> tuple[PackedRow, dict[tuple[int, int], int]]:
        """The row, and where each label stands in it: by (token as `add` numbered it, label)."""
        ids, positions, before = list(self._ids), list(self._positions), list(self._before)
        labels, weights = [IGNORED] * len(ids), [0] * len(ids)
        where: dict[tuple[int, int], int] = {}
        for row in sorted(self._labels):
            for number, (label, count) in enumerate(self._labels[row].items()):
                at = row
                if number:
                    at = len(ids)
                    ids.append(ids[row])
                    positions.append(positions[row])
                    before.append(before[row])
                    labels.append(label)
                    weights.append(count)
                else:
                    labels[row], weights[row] = label, count
                where[row, label] = at
        starts = [
            row for row in range(len(ids)) if row == 0 or row >= len(self._ids) or before[row] != self._after[row - 1]
        ]
        spans = [(number, *span) for number, row in enumerate(starts) for span in self._spans(before[row])]
        return (
            PackedRow(
                np.array(ids, np.int32),
                np.array(positions, np.int32),
                np.array(labels, np.int32),
                np.array(weights, np.int32),
                np.array(starts, np.int32),
                np.array(spans, np.int32).reshape(-1, 4),
            ),
            where,
        )

    def _num_new_echoes(self, targets: Sequence[Target], found: Sequence[Sequence[int]]) -> int:
        at_new: dict[tuple[int, int], set[int]] = {}
        at_known: dict[int, set[int]] = {}
        for target in targets:
            rows = found[target.segment]
            if target.place >= len(rows):
                at_new.setdefault((target.segment, target.place), set()).add(target.token)
            else:
                at_known.setdefault(rows[target.place], set()).add(target.token)
        count = sum(len(tokens) - 1 for tokens in at_new.values())
        for row, tokens in at_known.items():
            there = self._labels.get(row, {})
            count += len(tokens - there.keys()) - (not there)
        return count

    def _append(self, chain: int, token_id: int, position: int) -> int:
        row = len(self._ids)
        self._ids.append(token_id)
        self._positions.append(position)
        self._before.append(chain)
        self._at.setdefault((chain, token_id, position), []).append(row)
        self._after.append(self._grow(chain, row, 0))
        return row

    def _view(
        self,
        view: Sequence[tuple[int, int]],
        placed: Sequence[Sequence[int]],
        seen: dict[tuple[int, int, int], int],
    ) -> int:
        chain = 0
        for other, shift in view:
            key = (chain, other, shift)
            if key not in seen:
                grown = chain
                for row in placed[other]:
                    grown = self._grow(grown, row, shift)
                seen[key] = grown
            chain = seen[key]
        return chain

    def _known_view(
        self,
        view: Sequence[tuple[int, int]],
        found: Sequence[Sequence[int]],
        example: Example,
        seen: dict[tuple[int, int, int], int | None],
    ) -> int | None:
        """The chain of a view; None if some of it is not there."""
        chain: int | None = 0
        for other, shift in view:
            if chain is None:
                return None
            key = (chain, other, shift)
            if key not in seen:
                whole = len(found[other]) == len(example.segments[other].ids)
                seen[key] = self._known(chain, found[other], shift) if whole else None
            chain = seen[key]
        return chain

    def _known(self, chain: int, rows: Iterable[int], shift: int) -> int | None:
        for row in rows:
            grown = self._grown.get((chain, row, shift))
            if grown is None:
                return None
            chain = grown
        return chain

    def _grow(self, chain: int, row: int, shift: int) -> int:
        key = (chain, row, shift)
        grown = self._grown.get(key)
        if grown is None:
            grown = self._grown[key] = len(self._chains)
            _, last, at, head = self._chains[chain]
            goes_on = last == row - 1 and at == shift
            self._chains.append((chain, row, shift, head if goes_on else grown))
        return grown

    def _spans(self, chain: int) -> list[tuple[int, int, int]]:
        """What a chain holds, as (first token, end, shift), ascending."""
        spans: list[tuple[int, int, int]] = []
        while chain:
            _, last, shift, head = self._chains[chain]
            chain, first, _, _ = self._chains[head]
            spans.append((first, last + 1, shift))
        spans.sort()
        merged: list[tuple[int, int, int]] = []
        for first, end, shift in spans:
            if merged and merged[-1][1:] == (first, shift):
                first = merged.pop()[0]
            merged.append((first, end, shift))
        return merged


class Packer:
    """Fills rows of at most `length` tokens with examples, as they come.

    An example goes into the open row with which it shares the most of those that it fits in, else into the first that
    it fits in. There are at most `open_rows`; when there is room for one more in none of them, the fullest is closed.

    num_shared: tokens of examples that were in their row already; num_echoes: in the rows that are closed
    """

    def __init__(self, length: int, *, open_rows: int = 16) -> None:
        """Raises ValueError unless both are at least 1."""
        if length < 1 or open_rows < 1:
            raise ValueError(f"rows of {length} tokens, {open_rows} of them open, hold nothing")
        self.length = length
        self.open_rows = open_rows
        self.num_shared = 0
        self.num_echoes = 0
        self._open: list[RowBuilder] = []

    def add(self, example: Example) -> list[PackedRow]:
        """Take an example with targets in; returns the rows that this closes.

        Raises ValueError if no row holds it; nothing has changed then.
        """
        closed: list[PackedRow] = []
        found = self._best(example)
        if found is None:
            builder = RowBuilder()
            fit = builder.fit(example)
            if fit.num_new > self.length:
                raise ValueError(f"{fit.num_new} tokens do not fit a row of {self.length}")
            if len(self._open) == self.open_rows:
                closed.append(self._close(max(self._open, key=lambda each: each.num_tokens)))
            self._open.append(builder)
        else:
            builder, fit = found
        builder.add(example, fit)
        self.num_shared += fit.num_shared
        return closed

    def finish(self) -> Iterator[PackedRow]:
        """The rows that are open."""
        while self._open:
            yield self._close(self._open[0])

    def _best(self, example: Example) -> tuple[RowBuilder, Fit] | None:
        best: tuple[RowBuilder, Fit] | None = None
        for builder in self._open:
            free = self.length - builder.num_tokens
            # No more can be shared than is there.
            if example.num_tokens - builder.num_tokens > free:
                continue
            fit = builder.fit(example)
            if fit.num_new <= free and (best is None or fit.num_shared > best[1].num_shared):
                best = builder, fit
        return best

    def _close(self, builder: RowBuilder) -> PackedRow:
        self._open.remove(builder)
        self.num_echoes += builder.num_echoes
        return builder.finish()[0]
