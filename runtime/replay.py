"""What a journal holds of one run, as the threads of its continuation take it.

The plan is walked again from its start. A thread that comes to a `gen` takes the recorded tokens instead of drawing
(they are fed only where something needs their K and V), a host function is answered and not called, a join takes the
recorded decision, and a branch that had ended is not started again: only one whose own segments a `stitch` needs is.
What a thread does again is held against its entries; the first thing that differs is an error, never another value.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from anabranch.dsl.diagnostics import Diagnostic, PlanError
from anabranch.runtime.events import BranchEnded, BranchStarted, Event, GenEnded, HostCalled, Joined, Path, RunEnded
from anabranch.runtime.joins import Ended

Recorded: TypeAlias = BranchStarted | GenEnded | HostCalled | Joined | BranchEnded | RunEnded


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One event of a thread, with what a continuation needs besides.

    thread: path of the thread; that of the event may go on with rounds of its loops
    drawn_ids: of a gen, every token that was drawn for it, also those that do not stay
    logprob_sum: of a gen, over all tokens that its thread had drawn by then
    ended: of a branch's end, what its join is told; None for the plan's own thread, and where it is run again
    """

    thread: Path
    event: Recorded
    drawn_ids: tuple[int, ...] = ()
    logprob_sum: float = 0.0
    ended: Ended | None = None


Log: TypeAlias = Callable[[LogEntry], None]
"""Takes each entry of a run as it happens."""


class Replay:
    """The entries of one run; each is taken once."""

    def __init__(self, entries: Iterable[LogEntry]) -> None:
        self._threads: dict[Path, deque[tuple[int, LogEntry]]] = {}
        # The tries of each branch by (path it was forked at, its component), and the threads right below each thread.
        self._tries: dict[tuple[Path, str], list[Path]] = {}
        self._below: dict[Path, list[Path]] = {}
        # Of each fork that had begun, by (path, site): the branches that ended, in the order of their ends.
        self._ends: dict[tuple[Path, str], dict[str, tuple[Ended, BranchEnded]]] = {}
        for number, entry in enumerate(entries):
            self._file(number, entry)

    def thread(self, path: Path) -> deque[tuple[int, LogEntry]]:
        """What is left of the thread at `path`, in order; the caller pops what it comes to."""
        return self._threads.get(path) or deque()

    def ends(self, here: Path, site: str, components: Container[str]) -> list[tuple[str, Ended, BranchEnded]]:
        """How those branches ended that the fork of `site` at `here` had and that are over, in the order of their ends.

        components: of the branches of this fork, such as `x[0]`; a `reduce` forks at one site more than once
        Returns (component, what the join was told, the event) for each.
        """
        found = self._ends.get((here, site), {})
        return [(component, *end) for component, end in found.items() if component in components]

    def has_begun(self, here: Path, site: str) -> bool:
        """Whether a branch of a fork of `site` at `here` had begun."""
        return (here, site) in self._ends

    def take(self, here: Path, components: Iterable[str]) -> tuple[list[Recorded], list[BranchEnded]]:
        """All that is left of these branches of a fork at `here`, and of what is below them, in recorded order.

        With it, an end for each of those threads that has none: the process was killed before it was told.
        """
        return self._take([path for component in components for path in self._tries.get((here, component), ())])

    def take_thread(self, path: Path) -> tuple[list[Recorded], list[BranchEnded]]:
        """All that is left of the thread at `path` and of what is below it, as `take` gives it."""
        return self._take([path])

    def _take(self, threads: list[Path]) -> tuple[list[Recorded], list[BranchEnded]]:
        taken: list[tuple[int, LogEntry]] = []
        while threads:
            path = threads.pop()
            left = self._threads.get(path)
            if left:
                taken.extend(left)
                left.clear()
            threads.extend(self._below.get(path, ()))
        taken.sort(key=lambda numbered: numbered[0])
        events: list[Recorded] = []
        open_threads: dict[Path, _Cut] = {}
        for _, entry in taken:
            event = entry.event
            events.append(event)
            match event:
                case BranchStarted(label=label):
                    open_threads[entry.thread] = _Cut(label)
                case GenEnded() if entry.thread in open_threads:
                    open_threads[entry.thread].add(event)
                case BranchEnded():
                    open_threads.pop(entry.thread, None)
        # A thread starts after the one that it is below of.
        return events, [cut.ended(path) for path, cut in reversed(open_threads.items())]

    def _file(self, number: int, entry: LogEntry) -> None:
        path = entry.thread
        left = self._threads.get(path)
        if left is None:
            left = self._threads[path] = deque()
            if path:
                component = branch_of(path[-1])
                self._tries.setdefault((path[:-1], component), []).append(path)
                self._ends.setdefault((path[:-1], site_of(component)), {})
                parent = next(path[:n] for n in range(len(path) - 1, -1, -1) if not n or path[:n] in self._threads)
                self._below.setdefault(parent, []).append(path)
        left.append((number, entry))
        if path and entry.ended is not None and isinstance(entry.event, BranchEnded):
            component = branch_of(path[-1])
            self._ends[path[:-1], site_of(component)][component] = (entry.ended, entry.event)


class _Cut:
    """What a thread that was not told to end had come to."""

    def __init__(self, label: str | None) -> None:
        self.label = label
        self.text = ""
        self.tokens = 0

    def add(self, gen: GenEnded) -> None:
        self.text += gen.text
        self.tokens += gen.drawn

    def ended(self, path: Path) -> BranchEnded:
        reason = "the join closed without it"
        return BranchEnded(path, "cancelled", self.text, None, reason, self.tokens, self.label)


def branch_of(component: str) -> str:
    """The branch that a thread's last path component names, whichever try of it this is."""
    return component.partition("~")[0]


def site_of(component: str) -> str:
    """The site of the fork that a path component names a branch of."""
    return component.rpartition("[")[0]


def check_same(recorded: Event, event: Event) -> None:
    """Raises PlanError `bad-journal` unless what was recorded happened again."""
    if recorded != event:
        raise misfit(getattr(event, "path", ()), f"it holds {_shown(recorded)}, and now there was {_shown(event)}")


def misfit(path: Path, what: str) -> PlanError:
    """The journal is whole, and not of this run."""
    where = "/".join(path) or "the plan itself"
    return PlanError(
        Diagnostic(
            "bad-journal",
            f"the journal does not fit the run at {where}: {what}",
            help="the host's functions or the model may have changed since; run the plan anew",
        )
    )


def finished_events(entries: Sequence[LogEntry]) -> list[Event]:
    """The events of a run that is over, less those of threads that a kill cut off and nothing needed any more."""
    lost = {entry.thread for entry in entries}
    lost -= {entry.thread for entry in entries if isinstance(entry.event, BranchEnded)}
    lost.discard(())
    return [e.event for e in entries if not any(e.thread[:n] in lost for n in range(len(e.thread) + 1))]


def _shown(event: Event) -> str:
    text = repr(event)
    return text if len(text) <= 300 else text[:300] + "..."
