"""Decoding without the host in the loop: lanes that only draw are stepped on the device, ahead of the host.

A lane is *seated* in a row with its state on the device: token, position, length, draws that are left, automaton. A
*launch* feeds every due lane's token and draws the next; on a GPU it replays a captured graph. The host asks for one
token of each lane at a time and finds most of them drawn already: it runs `run_ahead` launches behind. What a lane drew
past its end is dropped. Since a row's result depends on nothing but its own state, running ahead changes no token.

Pages are laid out for a horizon, and lists planned again when who is seated, or what they see, has changed. A launch
that is under way may still write to pages that the host has given back; whatever reuses them is launched later on the
same stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from anabranch.kernels.sample_device import automaton_mask, sample
from anabranch.runtime.attention import Block
from anabranch.runtime.automata import Automaton, DfaAutomaton, LinesAutomaton, TooLarge, tables
from anabranch.runtime.constrain import AutomatonConstraint
from anabranch.runtime.device import Device, DeviceLists, Reads, runs_read
from anabranch.runtime.drawing import bitmap, penal, upload
from anabranch.runtime.graphs import Graphs
from anabranch.runtime.pages import Segment
from anabranch.runtime.task_plan import Overflow, Row
from anabranch.runtime.tasks import Draw

HORIZON = 64
"""Tokens that a lane's pages are laid out for at a time."""
AUTOMATON_BYTES = 128 << 20
"""Memory for the automata of regular types; a lane whose type does not fit is paced by the host."""


class _Int(IntEnum):
    """Rows of the lanes' whole numbers."""

    TOKEN = 0  # to be fed next
    POSITION = 1
    LENGTH = 2  # tokens of the open segment that are written
    LEFT = 3  # draws that are left
    INDEX = 4  # draws before this one
    STATE = 5  # of the automata, all in one table; -1 for none
    RUNS = 6  # 1 until the lane has come to an end that the device sees
    DUE = 7  # 1 where the next launch steps the lane
    TOP_K = 8
    KEY_0 = 9
    KEY_1 = 10


class _Float(IntEnum):
    """Rows of the lanes' sampling options."""

    TEMPERATURE = 0
    TOP_P = 1
    MIN_P = 2
    REPETITION = 3
    PRESENCE = 4


@dataclass(frozen=True, slots=True)
class LaneStep:
    """One lane's next token is wanted. block: the row that its sampled token is fed in; the segment holds its slot.

    drawn: how many tokens its thread has drawn; drawn_ids: those that penalties apply to
    """

    draw: Draw
    block: Block
    token: int
    drawn: int
    drawn_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a lane drew. token: -1 where nothing was allowed; logits: fp32 [vocab_size], which it was drawn from.

    reads: what its row attended to, where that is recorded
    """

    token: int
    logprob: float
    logits: Tensor
    reads: list[tuple[int, int, int]]


@dataclass(slots=True)
class _Launch:
    tokens: Tensor
    logprob: Tensor
    logits: Tensor
    reads: Reads
    event: torch.cuda.Event | None
    found: tuple[list[int], list[float]] | None = None

    def results(self) -> tuple[list[int], list[float]]:
        """The tokens and log-probabilities of every row, waited for once."""
        if self.found is None:
            if self.event is not None:
                self.event.synchronize()
            self.found = self.tokens.tolist(), self.logprob.tolist()
        return self.found


@dataclass(slots=True)
class _Seat:
    """A seated lane.

    block: the row that it was seated with
    taken: tokens of its segment that the host knows; most: tokens that it may ever hold
    epoch: of its segment; pages: how many were laid out
    """

    row: int
    draw: Draw
    block: Block
    taken: int
    most: int
    epoch: int
    pages: int = 0
    waiting: deque[_Launch] = field(default_factory=deque)

    @property
    def fed(self) -> int:
        """Tokens of the segment that the device holds once all launches are done."""
        return self.taken + len(self.waiting)


class Waves:
    """The lanes of an engine that the device steps by itself.

    device: where
    lanes: most of them
    vocab_size: tokens that may be drawn; end_tokens: those that end a turn
    run_ahead: launches that may be under way while the host handles what came before
    num_free: pages that the pool can give away now
    keeps_reads: whether `Drawn.reads` is wanted
    """

    def __init__(
        self,
        device: Device,
        *,
        lanes: int,
        vocab_size: int,
        end_tokens: Sequence[int],
        run_ahead: int,
        num_free: Callable[[], int],
        keeps_reads: bool,
    ) -> None:
        if run_ahead < 0:
            raise ValueError(f"run_ahead={run_ahead} is at least 0")
        self.num_launches = 0
        self.rows_dropped = 0
        self._device = device
        self._lanes = lanes
        self._vocab_size = vocab_size
        self._run_ahead = run_ahead
        self._num_free = num_free
        self._keeps_reads = keeps_reads
        where = device.device
        self._ints = torch.zeros(len(_Int), lanes, dtype=torch.int64, device=where)
        self._floats = torch.ones(len(_Float), lanes, dtype=torch.float32, device=where)
        self._seen = torch.zeros(lanes, -(-vocab_size // 32), dtype=torch.int32, device=where)
        self._end_tokens = torch.tensor(sorted(end_tokens), dtype=torch.int64, device=where)
        # As wide as any context: graphs hold its address.
        columns = min(-(-device.config.max_context // device.page_size), device.store.k[0].shape[0])
        self._page_table = torch.zeros(lanes, columns, dtype=torch.int64, device=where)
        self._logits = torch.empty(lanes, vocab_size, dtype=torch.float32, device=where)
        self._lists = DeviceLists(device.capacity, where)
        self._automata = _Automata(vocab_size, where)
        self._graphs = Graphs(where)
        self._seats: dict[int, _Seat] = {}  # by row
        self._by_draw: dict[int, _Seat] = {}  # by the identity of the draw, which the seat holds
        self._due: list[int] | None = []
        self._left: set[int] = set()  # rows that the device has not been told are free
        self._overflow: frozenset[int] = frozenset()
        self._typed = False  # whether a lane of the coming step needs its automaton
        self._stale = True

    def takes(self, draw: Draw, segment: Segment | None) -> bool:
        """Whether the device can draw for it: host-paced types and a thread's first row are the host's."""
        if segment is None or segment.sealed:
            return False
        constraint = draw.generation.constraint
        if constraint is None:
            return True
        if not isinstance(constraint, AutomatonConstraint):
            return False
        in_use = self._typed or any(seat.draw.generation.constraint is not None for seat in self._seats.values())
        found = self._automata.base(constraint.automaton, make_room=not in_use) is not None
        self._typed = self._typed or found
        return found

    def step(self, wanted: Sequence[LaneStep]) -> list[Drawn] | None:
        """The next token of each lane; None, with nobody seated, if they do not fit the device's lists."""
        lanes = frozenset(id(lane.draw) for lane in wanted)
        self._typed = False
        if lanes == self._overflow:
            return None
        seats = self._seat(wanted)
        # A lane's first launch of this call has its slot; those ahead of the host take pages only while there are some.
        if not self._launch([seat for seat in seats if not seat.waiting]):
            self.leave()
            self._overflow = lanes
            return None
        self._overflow = frozenset()
        for _ in range(self._run_ahead):
            due = [seat for seat in seats if len(seat.waiting) <= self._run_ahead and self._has_room(seat)]
            if not due or not self._launch(due):
                break
        found = []
        for seat in seats:
            launch = seat.waiting.popleft()
            seat.taken += 1
            tokens, logprobs = launch.results()
            row = seat.row
            reads = launch.reads[row] if launch.reads else []
            found.append(Drawn(tokens[row], logprobs[row], launch.logits[row], reads))
        return found

    def leave(self) -> None:
        """Nobody is seated any more."""
        self._unseat(list(self._seats.values()))

    def _seat(self, wanted: Sequence[LaneStep]) -> list[_Seat]:
        """The seat of each lane; who is not wanted, or has changed, loses its own."""
        kept = {id(lane.draw): lane for lane in wanted}
        gone = [seat for key, seat in self._by_draw.items() if key not in kept or not self._fits(seat, kept[key])]
        self._unseat(gone)
        if self._seats and 4 * (len(self._seats) + 1) < max(self._seats) and len(self._seats) == len(wanted):
            # A few lanes in high rows: seated anew they take a smaller graph.
            self._unseat(list(self._seats.values()))
        free = [row for row in range(self._lanes) if row not in self._seats]
        fresh: list[tuple[_Seat, LaneStep]] = []
        for lane in wanted:
            if id(lane.draw) not in self._by_draw:
                taken = lane.block.first
                most = taken + lane.draw.generation.left
                seat = _Seat(free[len(fresh)], lane.draw, lane.block, taken, most, lane.block.segment.epoch)
                fresh.append((seat, lane))
        for seat, _ in fresh:
            self._seats[seat.row] = seat
            self._by_draw[id(seat.draw)] = seat
        if fresh:
            self._write(fresh)
            self._stale = True
        return [self._by_draw[id(lane.draw)] for lane in wanted]

    def _fits(self, seat: _Seat, lane: LaneStep) -> bool:
        """Whether a seated lane is where its thread is now."""
        block = lane.block
        return (
            seat.draw is lane.draw
            and seat.block.segment is block.segment
            and seat.block.view is block.view
            and seat.taken == block.first
            and seat.epoch == block.segment.epoch
        )

    def _unseat(self, seats: Sequence[_Seat]) -> None:
        if not seats:
            return
        for seat in seats:
            self.rows_dropped += len(seat.waiting)
            del self._seats[seat.row], self._by_draw[id(seat.draw)]
        self._left.update(seat.row for seat in seats)
        self._stale = True

    def _write(self, fresh: Sequence[tuple[_Seat, LaneStep]]) -> None:
        """Bring the state of new lanes to the device."""
        ints: list[list[int]] = []
        floats: list[list[float]] = []
        for seat, lane in fresh:
            draw, block = lane.draw, lane.block
            options = draw.parameters
            constraint = draw.generation.constraint
            state = -1
            if isinstance(constraint, AutomatonConstraint):
                base = self._automata.base(constraint.automaton)
                if base is None:
                    raise RuntimeError("an automaton that is not on the device")
                state = base + constraint.state
            position = block.segment.start + block.first
            ints.append([
                lane.token, position, block.first, draw.generation.left, lane.drawn, state, 1, 0,
                int(options["top_k"]), draw.key[0], draw.key[1],
            ])  # fmt: skip
            floats.append([
                options["temperature"], options["top_p"], options["min_p"], options["repetition_penalty"],
                options["presence_penalty"],
            ])  # fmt: skip
            if penal(draw):
                self._seen[seat.row].copy_(upload(bitmap(lane.drawn_ids, self._vocab_size), self._seen.device))
        where = self._ints.device
        rows = upload(torch.tensor([seat.row for seat, _ in fresh]), where)
        self._ints.index_copy_(1, rows, upload(torch.tensor(ints, dtype=torch.int64).T.contiguous(), where))
        self._floats.index_copy_(1, rows, upload(torch.tensor(floats, dtype=torch.float32).T.contiguous(), where))
        self._left.difference_update(seat.row for seat, _ in fresh)
        # Nobody new is due yet, who may sit where somebody who was due sat.
        self._due = None

    def _has_room(self, seat: _Seat) -> bool:
        """Whether a lane may be launched once more ahead of the host."""
        if seat.fed >= seat.most:
            return False
        size = self._device.page_size
        return seat.fed < len(seat.block.segment.pages) * size or self._num_free() > 2 * self._lanes

    def _launch(self, due: Sequence[_Seat]) -> bool:
        """Step the lanes `due`; False if the lists have no room for those that are seated."""
        if not due:
            return True
        if not self._lay_out(due):
            return False
        count = min(1 << max(self._seats).bit_length(), self._lanes)
        seated = self._seats.values()
        typed = any(seat.draw.generation.constraint is not None for seat in seated)
        penalized = any(penal(seat.draw) for seat in seated)
        self._graphs.prepare(self._step, count, typed, penalized, quiet=lambda: self._mark([]))
        self._mark(sorted(seat.row for seat in due))
        reads: Reads = []
        if self._keeps_reads:
            lengths = [self._seats[row].fed + 1 if row in self._seats else 0 for row in range(count)]
            reads = runs_read(self._lists, lengths, self._device.page_size)
        tokens, logprob, logits = self._graphs.run(self._step, count, typed, penalized)
        launch = self._fetch(tokens, logprob, logits, reads)
        for seat in due:
            seat.waiting.append(launch)
        self.num_launches += 1
        return True

    def _mark(self, rows: list[int]) -> None:
        """Those that the next launch steps."""
        if self._left:
            left = torch.tensor(sorted(self._left))
            self._ints[_Int.RUNS].index_fill_(0, upload(left, self._ints.device), 0)
            self._left.clear()
        if rows != self._due:
            flags = torch.zeros(self._lanes, dtype=torch.int64)
            flags[rows] = 1
            self._ints[_Int.DUE].copy_(upload(flags, self._ints.device))
            self._due = rows

    def _fetch(self, tokens: Tensor, logprob: Tensor, logits: Tensor, reads: Reads) -> _Launch:
        """Start bringing the results of a launch to the host: the next one writes where they stand."""
        if tokens.device.type != "cuda":
            return _Launch(tokens, logprob, logits.clone(), reads, None)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True).copy_(tokens, non_blocking=True)
        logs = torch.empty(logprob.shape, dtype=logprob.dtype, pin_memory=True).copy_(logprob, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return _Launch(host, logs, logits.clone(), reads, event)

    def _lay_out(self, due: Sequence[_Seat]) -> bool:
        """Pages for what a launch feeds, and lists that hold them; False if these overflow."""
        size = self._device.page_size
        short = [seat for seat in due if seat.fed + 1 > len(seat.block.segment.pages) * size]
        if short and self._num_free() > self._lanes * (2 + HORIZON // size):
            # Pages are plenty: those of a horizon, and for all who come to need some soon, so that plans are few.
            for seat in self._seats.values():
                if seat.fed + HORIZON // 2 > len(seat.block.segment.pages) * size:
                    seat.block.segment.reserve(min(seat.fed + HORIZON, seat.most))
        for seat in short:
            seat.block.segment.reserve(seat.fed + 1)
        if any(len(seat.block.segment.pages) != seat.pages for seat in self._seats.values()):
            self._stale = True
        if not self._stale:
            return True
        count = max(self._seats) + 1
        rows: list[Row | None] = [None] * count
        for row, seat in self._seats.items():
            rows[row] = Row(seat.block.view, seat.block.segment, seat.block.forks)
        if isinstance(self._lists.plan(self._device.planner, rows), Overflow):
            return False
        self._stale = False
        for row, seat in self._seats.items():
            pages = seat.block.segment.pages
            if len(pages) != seat.pages:
                new = torch.tensor(pages[seat.pages :])
                self._page_table[row, seat.pages : len(pages)].copy_(upload(new, self._page_table.device))
                seat.pages = len(pages)
        return True

    def _step(self, count: int, typed: bool, penalized: bool) -> tuple[Tensor, Tensor, Tensor]:
        """One launch over `count` rows: tokens int64 [count], their log-probability fp32 [count], and the logits that
        they were drawn from, fp32 [count, vocab].

        Only device work of fixed shapes, on buffers that stay where they are; a row that is not due changes nothing.
        """
        device, size = self._device, self._device.page_size
        ints, floats = self._ints[:, :count], self._floats[:, :count]
        active = (ints[_Int.RUNS] & ints[_Int.DUE]) > 0
        step = active.to(torch.int64)
        length = ints[_Int.LENGTH]
        page = (length // size).clamp(max=self._page_table.shape[1] - 1)
        slot = self._page_table[:count].gather(1, page[:, None])[:, 0] * size + length % size
        slot = torch.where(active, slot, -1)
        length += step
        lengths = length.to(torch.int32)
        positions = ints[_Int.POSITION].to(torch.int32)
        tokens = ints[_Int.TOKEN].contiguous()
        # A captured graph holds its sizes for good; the torch definitions fill all that they are given.
        parts = device.capacity.parts if ints.is_cuda else max(1, self._lists.planned.parts)
        logits = device.decode(tokens, positions, slot, self._lists, lengths, parts)
        mask: Tensor | None = None
        state = ints[_Int.STATE]
        if typed:
            automata = self._automata
            mask = automaton_mask(
                automata.next_state,
                automata.distance,
                automata.accepting,
                state.to(torch.int32),
                ints[_Int.LEFT].to(torch.int32),
                self._end_tokens,
            )
        seen = self._seen[:count] if penalized else None
        drawn, logprob = sample(
            logits,
            floats[_Float.TEMPERATURE],
            ints[_Int.TOP_K],
            floats[_Float.TOP_P],
            floats[_Float.MIN_P],
            ints[_Int.KEY_0 : _Int.KEY_1 + 1].T.contiguous(),
            ints[_Int.INDEX],
            mask,
            seen,
            floats[_Float.REPETITION] if penalized else None,
            floats[_Float.PRESENCE] if penalized else None,
        )
        able = active & (drawn >= 0)
        safe = drawn.clamp(min=0)
        ints[_Int.TOKEN].copy_(torch.where(able, safe, ints[_Int.TOKEN]))
        ints[_Int.POSITION].add_(step)
        ints[_Int.INDEX].add_(step)
        ints[_Int.LEFT].sub_(step)
        goes_on = able & (ints[_Int.LEFT] > 0) & ~(drawn[:, None] == self._end_tokens[None, :]).any(dim=1)
        if typed:
            at = self._automata.next_state[state.clamp(min=0), safe].to(torch.int64)
            at = torch.where(able & (state >= 0), at, state)
            goes_on &= ~self._automata.final[at.clamp(min=0)] | (at < 0)
            state.copy_(at)
        if penalized:
            word, bit = safe // 32, torch.ones_like(safe) << (safe % 32)
            # Bit 31 is the sign.
            bit = torch.where(bit > 0x7FFFFFFF, bit - (1 << 32), bit).to(torch.int32)
            old = self._seen[:count].gather(1, word[:, None])
            self._seen[:count].scatter_(1, word[:, None], torch.where(able[:, None], old | bit[:, None], old))
        ints[_Int.RUNS].copy_(torch.where(active, goes_on.to(torch.int64), ints[_Int.RUNS]))
        # In memory of its own: each graph would keep its output for good.
        kept = self._logits[:count].copy_(logits)
        return drawn, logprob, kept


class _Automata:
    """The automata of regular types in tables of a fixed size, one after another. When they are full and nobody uses
    them, they begin anew.

    next_state: int32 [states, vocab], numbered over all of them, -1 where nothing leads; distance: int32 [states];
    accepting, final: bool [states]
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._most = max(1, AUTOMATON_BYTES // (4 * vocab_size))
        self._device = device
        self._bases: dict[int, tuple[Automaton, int | None]] = {}
        self._used = 0
        self.next_state = torch.full((1, 1), -1, dtype=torch.int32, device=device)
        self.distance = torch.zeros(1, dtype=torch.int32, device=device)
        self.accepting = torch.zeros(1, dtype=torch.bool, device=device)
        self.final = torch.zeros(1, dtype=torch.bool, device=device)

    def base(self, automaton: Automaton, *, make_room: bool = False) -> int | None:
        """The number of its first state, brought to the device the first time; None if there is no room for it.

        make_room: forget the others if need be
        """
        known = self._bases.get(id(automaton))
        if known is None or (known[1] is None and make_room):
            base = self._add(automaton)
            if base is None and make_room:
                self._bases.clear()
                self._used = 0
                base = self._add(automaton)
            known = self._bases[id(automaton)] = (automaton, base)
        return known[1]

    def _add(self, automaton: Automaton) -> int | None:
        if not isinstance(automaton, DfaAutomaton | LinesAutomaton):
            return None
        try:
            found = tables(automaton, max_bytes=AUTOMATON_BYTES)
        except TooLarge:
            return None
        if self._used + len(found.distance) > self._most:
            return None
        if self.next_state.shape[0] != self._most:
            # Of a size for good: captured graphs hold the address.
            self.next_state = torch.full((self._most, self._vocab_size), -1, dtype=torch.int32, device=self._device)
            self.distance = torch.zeros(self._most, dtype=torch.int32, device=self._device)
            self.accepting = torch.zeros(self._most, dtype=torch.bool, device=self._device)
            self.final = torch.zeros(self._most, dtype=torch.bool, device=self._device)
        base, count = self._used, len(found.distance)
        part = slice(base, base + count)
        moves = torch.from_numpy(found.next_state)
        self.next_state[part] = torch.where(moves >= 0, moves + base, moves).to(self._device)
        self.distance[part] = torch.from_numpy(found.distance).to(self._device)
        self.accepting[part] = torch.from_numpy(found.accepting).to(self._device)
        self.final[part] = torch.from_numpy(found.final).to(self._device)
        self._used += count
        return base
