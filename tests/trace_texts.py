"""Traces as the three systems write them, made at random, each with the tree of threads that it was made from.

    thread = (text | System(text) | fork)*
    fork   = Fork(command, thread+)

What the threads write, one after the other, is the trace. Only these tests' own generator knows the tree: it shares no
code with the readers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TypeAlias

DIALECTS = ("multiverse", "threadweaver", "apr")

MOST_DEEP = 4
MOST_WIDE = 16


class System(str):
    """What the system around the model writes: it is encoded apart from what the model writes beside it."""


@dataclass(frozen=True)
class Fork:
    """command: what the parent writes and does not keep (APR), else "" """

    children: tuple[Thread, ...]
    command: str = ""


Node: TypeAlias = str | Fork
Thread: TypeAlias = tuple[Node, ...]


@dataclass(frozen=True)
class TraceText:
    dialect: str
    thread: Thread
    text: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", text_of(self.thread))

    @property
    def depth(self) -> int:
        return _depth(self.thread)

    @property
    def width(self) -> int:
        return _width(self.thread)


def text_of(thread: Thread) -> str:
    """All that is written in the trace by the thread and those below it."""
    out = []
    for node in thread:
        out += [node] if isinstance(node, str) else [node.command, *map(text_of, node.children)]
    return "".join(out)


def _depth(thread: Thread) -> int:
    return max((1 + max(map(_depth, node.children)) for node in thread if isinstance(node, Fork)), default=0)


def _width(thread: Thread) -> int:
    forks = [node for node in thread if isinstance(node, Fork)]
    return max((max(len(fork.children), *map(_width, fork.children)) for fork in forks), default=0)


def trace_texts(dialect: str, count: int, seed: int) -> list[TraceText]:
    """`count` traces, the same for the same seed. The first ones are plain text, as deep and as wide as any may be."""
    made = []
    for index in range(count):
        rng = random.Random(f"{dialect} {seed} {index}")
        shape = {0: (0, 0), 1: (MOST_DEEP, 2), 2: (1, MOST_WIDE)}.get(
            index, (rng.choice((1, 1, 2, 2, 3, 4)), rng.choice((2, 2, 3, 3, 4, 5, 8)))
        )
        made.append(TraceText(dialect, _Maker(dialect, rng, *shape, is_full=index < 3).trace()))
    return made


_WORDS = (
    "so",
    "we",
    "see",
    "that",
    "each",
    "case",
    "holds",
    "then",
    "the",
    "sum",
    "of",
    "both",
    "is",
    "even",
    "x",
    "n",
)
_ODD = (
    'he said "no"', "it's", "\\frac{1}{2}", "#{x}", "##{y}", "#", "\r\n", "\r", '"""', "'''", "é ∑ 漢字 🧵",
    "<path>", "< Parallel >", "</think>", "<|im_end|>", "\t", "a < b > c", "<Pa", "<Calling", '"', "{}", "3.14",
    "\x00", "\u2028", "\ufeff", "  ",
)  # fmt: skip


class _Maker:
    """Makes one trace, of about as many threads as are `left`. is_full: each fork is as wide as it may be."""

    def __init__(self, dialect: str, rng: random.Random, depth: int, width: int, *, is_full: bool) -> None:
        self.dialect = dialect
        self.rng = rng
        self.depth = depth
        self.width = width
        self.left = 7
        self.is_full = is_full

    def trace(self) -> Thread:
        if self.dialect == "apr":
            budget = self.rng.choice(["", "Token Budget: 1024 ", "Sub Call Budget: 10 "])
            return self.search(f"{budget}Moving to Node #0", "#0", self.depth)
        opening = "<think>\n" if self.dialect == "threadweaver" and self.rng.random() < 0.6 else ""
        nodes: list[Node] = [opening + self.words()]
        for _ in range(self.rng.choice((1, 1, 2)) if self.depth else 0):
            nodes += self.block(self.depth, "")
            nodes.append(self.words())
        return joined(nodes)

    def words(self) -> str:
        words = self.rng.choices(_WORDS, k=self.rng.randint(1, 3))
        if self.rng.random() < 0.4:
            words.insert(self.rng.randrange(len(words) + 1), self.rng.choice(_ODD))
        return self.rng.choice(("", " ", "\n", "\n\n")) + " ".join(words) + self.rng.choice(("", ".", "\n", " "))

    def fan(self, depth: int) -> list[int]:
        """How many children there are, and how deep each of them forks."""
        width = min(self.width, max(1, self.left)) if self.rng.random() < 0.8 else self.rng.randint(1, 2)
        if self.is_full:
            width = self.width
        self.left -= width
        # One child goes as deep as it may, so that the trace is as deep as it was asked to be.
        deepest = self.rng.randrange(width)
        return [depth - 1 if i == deepest else self.rng.randrange(depth) if self.left > 0 else 0 for i in range(width)]

    # --- Multiverse and ThreadWeaver

    def block(self, depth: int, prefix: str) -> list[Node]:
        multiverse = self.dialect == "multiverse"
        head, tag = ("Goal", "Path") if multiverse else ("Outlines", "Thread")
        gap = self.rng.choice(("\n", "\n", "", " ", "\n\n  ", "\r\n"))
        space = self.rng.choice((" ", "", "\n")) if not multiverse else self.rng.choice((" ", " ", ""))
        mark = self.rng.choice((":", ": ", ". "))
        is_numbered = not multiverse or self.rng.random() < 0.8
        is_closed = multiverse or self.rng.random() < 0.7
        depths = self.fan(depth)
        numbers = [f"{prefix}{i + 1}" for i in range(len(depths))]
        opening = f"{gap}<Parallel>{gap}<{head}>{gap}"
        if multiverse:
            opening += self.words()
        for number in numbers:
            label = f"{space}{number}{mark}" if is_numbered else " "
            opening += f"<Outline>{label}{self.words()}" + (f"</Outline>{gap}" if is_closed else "\n")
        nodes: list[Node] = [f"{opening}</{head}>"]
        children = []
        for number, below in zip(numbers, depths, strict=True):
            label = f"{space}{number}{mark}" if is_numbered else " "
            seed = f"{gap}<{tag}>"
            if is_numbered:
                seed += space + number + ("" if multiverse or mark == ". " else ":")
            thread: list[Node] = [System(seed), f"{gap}<{tag}>{label}"[len(seed) :] + self.words()]
            if below > 0:
                thread += self.block(below, f"{number}." if self.rng.random() < 0.5 else "")
                thread.append(self.words())
            thread.append(f"</{tag}>")
            children.append(joined(thread))
        nodes.append(Fork(tuple(children)))
        if multiverse or self.rng.random() < 0.2:
            nodes += [System(f"{gap}<Conclusion>"), self.words()]
            if multiverse and self.left > 0 and self.rng.random() < 0.1:
                nodes += self.block(1, "")
            nodes.append(f"</Conclusion>{gap}</Parallel>")
        else:
            nodes.append(System(f"{gap}</Parallel>"))
        return nodes

    # --- APR

    def search(self, first: str, node: str, depth: int, end: str = "\n") -> Thread:
        state = f"24:[{self.rng.randint(1, 9)}, {self.rng.randint(1, 9)}]"
        told = f"{first}{end}Current State: {state}, Operations: []"
        nodes: list[Node] = [told if node == "#0" else System(told), end, self.lines()]
        if depth > 0:
            nodes += self.call(node, depth, end)
            nodes.append(self.lines())
        nodes.append(self.rng.choice(("No solution found.", "24,24 equal: Goal Reached")) + end)
        return joined(nodes)

    def lines(self) -> str:
        return "".join(f"Exploring Operation: {self.words().strip()}\n" for _ in range(self.rng.choice((0, 0, 1))))

    def call(self, node: str, depth: int, end: str) -> list[Node]:
        level = 1 + self.depth - depth
        depths = self.fan(depth)
        names = [f"{node},{i}" for i in range(len(depths))]
        command = f"<Calling Sub Searches>{end}"
        for i, name in enumerate(names):
            command += f"<Start Sub Search {i} at level {level}> Moving to Node {name}{end}"
        command += f"<End Calling Sub Searches>{end}"
        budget = self.rng.choice(("", "", "Token Budget: 512 "))
        children = tuple(
            self.search(f"{budget}Moving to Node {name}", name, below, end)
            for name, below in zip(names, depths, strict=True)
        )
        results = f"<Sub Searches>{end}"
        order = list(enumerate(names))
        if self.rng.random() < 0.2:
            self.rng.shuffle(order)
        for i, name in order:
            kind = self.rng.choice(("No Solution", "Goal Reached"))
            found = f"Moving to Node {name}{end}" if kind == "Goal Reached" else ""
            results += f"<{kind} in Sub Search {i} at level {level} at Node {name}>{end}{found}"
        return [Fork(children, command), System(f"{results}<End Sub Searches>{end}")]


def joined(nodes: list[Node]) -> Thread:
    """What the model writes in one piece becomes one text."""
    out: list[Node] = []
    for node in nodes:
        if type(node) is str and out and type(last := out[-1]) is str:
            out[-1] = last + node
        elif node:
            out.append(node)
    return tuple(out)
