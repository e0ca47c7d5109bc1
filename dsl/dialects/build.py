"""From the events of a trace to a plan that replays it.

What the model wrote becomes `gen(recorded=...)`, what the system wrote becomes `text(...)`, and the threads become the
branches of a fork. A thread that writes a call which it will not keep becomes a plan of its own (APR): a call of a plan
sees the context of its caller and leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

from anabranch.dsl import ast
from anabranch.dsl.dialects.events import Began, Calling, Ended, Event, Joined, Returned, Spawned, Wrote
from anabranch.dsl.dialects.literals import literal

PLAN: Final = "trace"
"""The name of the plan that replays a trace."""

GEN_MAX: Final = 4096
"""The `max` of each `gen`. Recorded text is not held to it: it is there for whoever lets the model write again."""


@dataclass(frozen=True, slots=True)
class Build:
    """How the threads of a system fork and join.

    context: what a join makes of its branches; "told" where they start from a message, and their results are text
    seed: how much of a thread's first text the system writes, in characters
    """

    context: Literal["stitch", "text", "told"]
    seed: Callable[[str], int]


@dataclass(slots=True)
class _Thread:
    """A thread on its way to a block.

    text: what it wrote since its last statement, by `by`; parts that are no text are results of its children
    branches: of the fork that is open
    seeded: the system has written its first text already, or does not
    command: what the children of the last call were called with, until their results are known
    """

    stmts: list[ast.Stmt] = field(default_factory=list)
    text: list[str | ast.Name | ast.Index] = field(default_factory=list)
    by: Literal["model", "system"] = "model"
    branches: list[list[ast.Stmt]] = field(default_factory=list)
    seeded: bool = True
    command: _Thread | None = None
    number: int = 0


class PlanBuilder:
    """Takes the events of one trace in order; `finish` gives the program."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self._plans: list[ast.PlanDef] = []
        self._threads = [_Thread()]
        self._num_calls = 0

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            thread = self._threads[-1]
            match event:
                case Wrote(text, _, by):
                    self._write(thread, text, by)
                case Calling():
                    self._flush(thread)
                    self._num_calls += 1
                    self._threads.append(_Thread(number=self._num_calls))
                case Spawned():
                    pass
                case Began():
                    self._flush(thread)
                    self._threads.append(_Thread(seeded=False))
                case Ended():
                    self._flush(thread)
                    self._threads.pop()
                    self._threads[-1].branches.append(thread.stmts)
                case Joined():
                    self._join(thread)
                case Returned(index, text):
                    assert thread.command is not None
                    thread.command.branches[index].append(ast.Return(literal(text)))
                    thread.text.append(ast.Index(ast.Name(f"found{thread.command.number}"), ast.Int(index)))

    def finish(self) -> ast.Program:
        [thread] = self._threads
        self._flush(thread)
        return ast.Program((*self._plans, _plan(PLAN, thread.stmts)))

    def _write(self, thread: _Thread, text: str, by: Literal["model", "system"]) -> None:
        if by != thread.by:
            if thread.command is not None and by == "model":
                # The line end behind the results is the system's too.
                length = 2 if text.startswith("\r\n") else int(text.startswith("\n"))
                thread.text.append(text[:length])
                text = text[length:]
            self._flush(thread)
            thread.by = by
        thread.text.append(text)

    def _flush(self, thread: _Thread) -> None:
        """A statement of what the thread has written."""
        parts = [part for part in thread.text if part]
        thread.text = []
        if thread.command is not None:
            self._call(thread, thread.command)
            thread.command = None
        if not parts:
            return
        if thread.by == "system":
            thread.stmts.append(ast.Write("text", literal(parts)))
            return
        text = "".join(part for part in parts if isinstance(part, str))
        if not thread.seeded:
            thread.seeded = True
            length = self._build.seed(text)
            thread.stmts += self._seed(text[:length])
            text = text[length:]
        if text:
            thread.stmts.append(ast.Gen(None, None, (ast.Option("recorded", literal(text)),)))

    def _seed(self, text: str) -> list[ast.Stmt]:
        if self._build.context != "told":
            return [ast.Write("text", literal(text))]
        # Interpolated, since it is data: what is written as a literal may form a special token.
        return [ast.Let("told", literal(text)), ast.Write("text", ast.Str((ast.Name("told"),)))]

    def _join(self, thread: _Thread) -> None:
        self._flush(thread)
        if self._build.context == "told":
            self._threads.pop()
            caller = self._threads[-1]
            caller.command = thread
            caller.by = "system"
            return
        context = ast.JoinContext(self._build.context)
        branches = tuple(ast.Branch(None, None, (), ast.Block(tuple(stmts))) for stmts in thread.branches)
        thread.branches = []
        thread.stmts.append(ast.Branches(None, (), branches, ast.Join(ast.JoinValue("all"), context)))

    def _call(self, caller: _Thread, command: _Thread) -> None:
        name, found = f"spawn{command.number}", "found"
        branches = tuple(ast.Branch(None, None, (), ast.Block(tuple(stmts))) for stmts in command.branches)
        fresh = (ast.Option("fresh", ast.Bool(True)),)
        join = ast.Join(ast.JoinValue("all"), ast.JoinContext("drop"))
        stmts = [*command.stmts, ast.Branches(found, fresh, branches, join), ast.Return(ast.Name(found))]
        self._plans.append(_plan(name, stmts))
        caller.stmts.append(ast.Call(f"{found}{command.number}", name, (), ()))


def _plan(name: str, stmts: list[ast.Stmt]) -> ast.PlanDef:
    return ast.PlanDef(name, (), (ast.Option("max", ast.Int(GEN_MAX)),), ast.Block(tuple(stmts)))
