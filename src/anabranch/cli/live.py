"""What a person sees while a plan decodes: a live tree of branches on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import typer

from anabranch.cli.text import one_line, printable
from anabranch.runtime.events import (
    BranchEnded,
    BranchStarted,
    Event,
    GenEnded,
    HostCalled,
    Joined,
    Path,
    RunEnded,
    Status,
    TextDelta,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

REFRESH_S: Final = 0.1
"""Between two drawings of the tree. A terminal over a network keeps up, and a step's own work is 50 ms or more."""

_TAIL: Final = 400
"""Characters kept of a branch's text: more than any row shows."""

_MARKS: Final[dict[Status | None, tuple[str, str]]] = {
    None: ("●", "yellow"),
    "ok": ("✓", "green"),
    "failed": ("✗", "red"),
    "truncated": ("✂", "red"),
    "cancelled": ("–", "dim"),
    "late": ("◷", "red"),
}


class View(Protocol):
    """Shows events as they come."""

    def show(self, input_index: int, event: Event) -> None:
        """Take in one event."""

    def close(self) -> None:
        """No event follows."""


class Silent:
    """Shows nothing."""

    def show(self, input_index: int, event: Event) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """A line on stderr as each gen, join and branch ends."""

    def __init__(self, num_inputs: int) -> None:
        self._num_inputs = num_inputs

    def show(self, input_index: int, event: Event) -> None:
        """One line, if the event is worth one."""
        said = describe(event)
        if said:
            lead = f"#{input_index} " if self._num_inputs > 1 else ""
            typer.echo(f"{lead}{said}", err=True)

    def close(self) -> None:
        """Nothing is left to write."""


def describe(event: Event) -> str:
    """An event as one plain line; "" for those that say nothing new."""
    match event:
        case GenEnded(path=path, site=site, text=text, drawn=drawn, end=end):
            return f"{_place((*path, site))}: {one_line(text, 100)!r} ({drawn} tokens, {end})"
        case HostCalled(path=path, function=function, error=error) if error:
            return f"{_place(path)}: {function} failed: {one_line(error, 200)}"
        case Joined(path=path, site=site, ok=ok, failed=failed):
            return f"{_place((*path, site))}: joined, {len(ok)} ok" + (f"; {printable(failed)}" if failed else "")
        case BranchEnded(path=path, status=status, reason=reason, tokens=tokens) if path:
            return f"{_place(path)}: {status}, {tokens} tokens" + (f"; {printable(reason)}" if reason else "")
        case _:
            return ""


def _place(path: Path) -> str:
    return printable("/".join(path))


@dataclass(slots=True)
class _Branch:
    """One thread as the tree shows it."""

    name: str
    parent: _Branch | None
    depth: int
    label: str | None = None
    status: Status | None = None
    tail: str = ""
    tokens: int = 0
    reason: str = ""
    children: list[_Branch] = field(default_factory=list)


class Branches:
    """The threads of the runs as a tree, and the few of them that fit on a screen."""

    def __init__(self) -> None:
        self.roots: dict[int, _Branch] = {}
        self.ended: dict[Status, int] = {}
        self.num_branches = 0
        self.tokens = 0
        self._all: dict[tuple[int, Path], _Branch] = {}
        # Ordered sets: what runs, oldest first, and what ended, latest last.
        self._running: dict[int, _Branch] = {}
        self._over: dict[int, _Branch] = {}

    def take(self, input_index: int, event: Event) -> None:
        """Move one thread on by what happened in it."""
        match event:
            case BranchStarted(path=path, label=label):
                self._open(input_index, path, label)
            case TextDelta(path=path, text=text):
                branch = self._thread(input_index, path)
                branch.tail = (branch.tail + text)[-_TAIL:]
            case GenEnded(path=path, text=text, drawn=drawn):
                branch = self._thread(input_index, path)
                branch.tokens += drawn
                self.tokens += drawn
                branch.tail = text[-_TAIL:]
            case BranchEnded(path=path, status=status, reason=reason, tokens=tokens):
                branch = self._thread(input_index, path)
                branch.status, branch.reason, branch.tokens = status, reason, tokens
                self._running.pop(id(branch), None)
                self._over[id(branch)] = branch
                if path:
                    self.ended[status] = self.ended.get(status, 0) + 1
            case HostCalled() | Joined() | RunEnded():
                pass

    def rows(self, most: int) -> list[_Branch]:
        """At most `most` threads, in the tree's order: those that run, then those that ended last, with parents."""
        chosen: dict[int, _Branch] = {}

        def choose(branch: _Branch) -> bool:
            line: list[_Branch] = []
            step: _Branch | None = branch
            while step is not None and id(step) not in chosen:
                line.append(step)
                step = step.parent
            if len(chosen) + len(line) > most:
                return False
            chosen.update((id(b), b) for b in line)
            return True

        for pool in (self._running.values(), reversed(self._over.values())):
            for branch in pool:
                if len(chosen) >= most or not choose(branch):
                    break
        shown: list[_Branch] = []
        waiting = [root for root in reversed(self.roots.values()) if id(root) in chosen]
        while waiting:
            branch = waiting.pop()
            shown.append(branch)
            waiting.extend(child for child in reversed(branch.children) if id(child) in chosen)
        return shown

    @property
    def num_running(self) -> int:
        """Threads that have begun and not ended."""
        return len(self._running)

    def _open(self, input_index: int, path: Path, label: str | None) -> _Branch:
        parent = self._thread(input_index, path[:-1]) if path else None
        name = path[-1] if path else f"#{input_index}"
        branch = _Branch(name, parent, parent.depth + 1 if parent else 0, label)
        if parent is None:
            self.roots[input_index] = branch
        else:
            parent.children.append(branch)
            self.num_branches += 1
        self._all[input_index, path] = branch
        self._running[id(branch)] = branch
        return branch

    def _thread(self, input_index: int, path: Path) -> _Branch:
        """The thread in which something at `path` happens: a round of a loop is none of its own."""
        for end in range(len(path), -1, -1):
            branch = self._all.get((input_index, path[:end]))
            if branch is not None:
                return branch
        return self._open(input_index, (), None)


class LiveTree:
    """The tree, drawn over itself on a terminal."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.live import Live

        self.branches = Branches()
        self._clock = clock
        self._due = clock()
        self._started = clock()
        self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False)
        self._console = console
        self._live.start()

    def show(self, input_index: int, event: Event) -> None:
        """Take the event in, and draw if the last drawing is old enough."""
        self.branches.take(input_index, event)
        now = self._clock()
        if now >= self._due:
            self._live.update(self._draw(), refresh=True)
            self._due = now + REFRESH_S

    def close(self) -> None:
        """Clear the tree away."""
        self._live.stop()

    def _draw(self) -> RenderableType:
        from rich.text import Text

        width, height = self._console.size
        out = Text(no_wrap=True, overflow="ellipsis", end="")
        for line in self._lines(width, max(3, height - 3)):
            out.append_text(line)
        return out

    def _lines(self, width: int, most: int) -> Iterator[Text]:
        from rich.text import Text

        rows = self.branches.rows(most)
        for branch in rows:
            mark, style = _MARKS[branch.status]
            head = f"{'  ' * min(branch.depth, 12)}{mark} "
            title = printable(branch.name) + f"  {branch.tokens} tok  "
            tail = branch.reason if branch.status not in (None, "ok") else branch.tail
            line = Text(head, style=style, no_wrap=True, end="")
            line.append(title, style="bold" if branch.status is None else "")
            line.append(one_line(tail, max(0, width - len(head) - len(title) - 1)), style="dim")
            line.append("\n")
            yield line
        yield Text(self._summary(len(rows)), style="dim", end="")

    def _summary(self, num_rows: int) -> str:
        b = self.branches
        total = b.num_branches + len(b.roots)
        rest = f"{total - num_rows} more not shown; " if total > num_rows else ""
        ended = ", ".join(f"{count} {status}" for status, count in sorted(b.ended.items()))
        return f"{rest}{b.num_running} running{', ' + ended if ended else ''}; {self._clock() - self._started:.1f} s"
