"""What a thread has read and written: a view, an open segment, tokens not yet fed, and the logits of its last token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from anabranch.compiler import recording
from anabranch.runtime.pages import Entry, PagePool, Segment, View


class Row(IntEnum):
    """Why a row is fed to the model; each row of a run is counted under exactly one.

    PREFILL: a token that was not sampled
    REPREFILL: a PREFILL of text that a thread of this run had generated before
    DECODE: a sampled token, fed so that its thread can go on
    FLUSH: a sampled token, fed only because its segment seals and a later view reads it
    RECOMPUTE: a token that had been fed before
    """

    PREFILL = 0
    REPREFILL = 1
    DECODE = 2
    FLUSH = 3
    RECOMPUTE = 4


@dataclass(frozen=True, slots=True)
class Unfed:
    """A token of the context whose K and V are not written yet. sampled: whether it was drawn, the first time too."""

    token: int
    row: Row
    sampled: bool


class Context:
    """One thread's context.

    position: of the next token to be written; the unfed ones come before it
    role: None before any chat turn, "between" turns, or "assistant" while that turn stands open
    logits: [vocab] of the last token, or None where they are not at hand
    forks: the views that ancestors handed to the forks this thread stands in, outermost first, from a `fresh` one on
    owner: number of the thread whose context it is; None once it is over, so that nothing more is recorded of it
    """

    __slots__ = ("expect", "forks", "logits", "owner", "pool", "position", "role", "segment", "unfed", "view")

    def __init__(self, pool: PagePool, view: View | None, position: int, role: str | None) -> None:
        self.pool = pool
        self.view = view.hold() if view is not None else None
        self.segment: Segment | None = None
        self.position = position
        self.role = role
        self.unfed: list[Unfed] = []
        self.logits: Tensor | None = None
        self.expect = 1
        self.forks: tuple[View, ...] = ()
        self.owner: int | None = None

    def push(self, token_ids: Iterable[int], row: Row, *, sampled: bool | None = None) -> None:
        """Write tokens; they are fed when something needs them. sampled: those of DECODE by default."""
        before = len(self.unfed)
        drawn = row is Row.DECODE if sampled is None else sampled
        self.unfed.extend(Unfed(token, row, drawn) for token in token_ids)
        self.position += len(self.unfed) - before
        recorder = self.pool.recorder
        if recorder is not None and self.owner is not None and len(self.unfed) > before:
            ids = tuple(unfed.token for unfed in self.unfed[before:])
            if row is Row.DECODE:
                for token in ids:
                    recorder.note(recording.Token(self.owner, token))
            else:
                recorder.note(recording.Write(self.owner, ids))

    def take(self, count: int) -> tuple[list[Unfed], Segment, int]:
        """The next `count` unfed tokens, given slots of the open segment: (tokens, segment, index of the first)."""
        fed = self.unfed[:count]
        if self.segment is None:
            start = self.position - len(self.unfed)
            self.segment = Segment(self.pool, start, expect=self.expect)
            if self.pool.recorder is not None and self.owner is not None:
                self.pool.recorder.note(recording.Open(self.segment.number, self.owner, start))
        del self.unfed[:count]
        slots = self.segment.append([u.token for u in fed], [u.sampled for u in fed])
        self.logits = None
        return fed, self.segment, slots.start

    def discard(self, count: int) -> None:
        """Forget the last `count` unfed tokens."""
        if count > len(self.unfed):
            raise ValueError(f"only {len(self.unfed)} tokens are unfed, not {count}")
        del self.unfed[len(self.unfed) - count :]
        self.position -= count
        self._note_trim(count)

    def trim(self, count: int) -> None:
        """Take the last `count` fed tokens of the open segment back out."""
        segment = self.segment
        if segment is None or count > segment.length or self.unfed:
            raise ValueError(f"{count} tokens cannot be taken back")
        self._note_trim(count)
        segment.trim(segment.length - count)
        self.position -= count

    def reopen(self) -> None:
        """The last fed token of the open segment is to be fed once more."""
        if self.segment is None or not self.segment.length:
            raise ValueError("nothing was fed")
        token, sampled = self.segment.ids[-1], bool(self.segment.sampled[-1])
        self.trim(1)
        self.push([token], Row.RECOMPUTE, sampled=sampled)

    def lose(self) -> None:
        """The open segment is emptied: its tokens are to be fed again."""
        if self.segment is not None:
            if self.pool.recorder is not None and self.owner is not None:
                self.pool.recorder.note(recording.Lose(self.owner))
            sampled = list(self.segment.sampled)
            tokens = self.segment.empty()
            self.unfed[:0] = [
                Unfed(token, Row.RECOMPUTE, bool(drawn)) for token, drawn in zip(tokens, sampled, strict=True)
            ]

    def pages_for(self, count: int) -> int:
        """Pages that it takes beside those at hand to feed `count` tokens."""
        size = self.pool.page_size
        if self.segment is None:
            return -(-count // size)
        return max(0, -(-(self.segment.length + count) // size) - len(self.segment.pages))

    def seal(self) -> View | None:
        """Close the open segment into the view, and return the view. Nothing may be unfed."""
        if self.unfed:
            raise RuntimeError(f"{len(self.unfed)} tokens would be lost from the view")
        segment = self.segment
        if segment is not None:
            segment.seal()
            self._link([Entry(segment)])
            segment.drop()
            self.segment = None
        return self.view

    def alias(self, entries: Sequence[Entry], position: int) -> None:
        """The view goes on with `entries`, which others wrote; the next token stands at `position`."""
        self._link(entries)
        self.position = position
        self.logits = None

    def num_pages(self) -> int:
        """Pages of the open segment that hold tokens."""
        segment = self.segment
        return 0 if segment is None else min(segment.num_pages, len(segment.pages))

    def drop(self) -> None:
        """Let go of everything."""
        if self.segment is not None:
            self.segment.drop()
            self.segment = None
        if self.view is not None:
            self.view.drop()
            self.view = None
        self.unfed.clear()
        self.logits = None

    def _note_trim(self, count: int) -> None:
        if self.pool.recorder is not None and self.owner is not None and count:
            self.pool.recorder.note(recording.Trim(self.owner, count))

    def _link(self, entries: Sequence[Entry]) -> None:
        old = self.view
        self.view = View(old, entries)
        if old is not None:
            old.drop()
