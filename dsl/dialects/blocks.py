"""The format that Multiverse and ThreadWeaver share, and what each has of its own.

    trace   = (text | block)*
    block   = <Parallel> head thread+ [conclusion] </Parallel>
    head    = <Head> outline+ </Head>                       Goal, with text between the outlines; or Outlines
    outline = <Outline> [number] text </Outline>
    thread  = <Thread> [number] trace </Thread>             Path, or Thread
    conclusion = <Conclusion> trace </Conclusion>

Between these stands white space alone, also where the grammar above has none. That before a `<Thread>` is the first of
the thread's own text, so every thread writes what follows the fork, from the same position.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final, Literal, NoReturn, TypeAlias

from anabranch.dsl.diagnostics import Span
from anabranch.dsl.dialects.events import Began, Child, Ended, Joined, Spawned
from anabranch.dsl.dialects.reader import NUMBER_LENGTH, Reader, check_nesting, refuse, refuse_text
from anabranch.dsl.dialects.scanner import Scanner, Shape, Tag

_NUMBER: Final = (
    r"[ \t\r\n]{0,16}([0-9]{1,9}(?:\.[0-9]{1,9}){0,15})"
    r"(?=:|\)|\.(?![0-9])|[ \t]{0,16}(?:\r?\n|<|\Z))"
)
"""`1:`, `1.`, `1)`, or a number alone, each also as `2.1`. `3.14 is pi` and `3 apples` begin with none."""

_LEADING: Final = re.compile(_NUMBER)


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """What the formats differ in.

    head, thread: the names of those tags
    head_text: text may stand between the outlines
    open_outlines: an outline may end without a tag of its own, at the next tag of the head
    seed_colon: of the number of a thread, the system writes the colon too
    """

    head: str
    thread: str
    head_text: bool
    open_outlines: bool
    seed_colon: bool

    def scanner(self) -> Scanner:
        """Finds the tags of this format; a tag's kind is its own text."""
        names = ("Parallel", self.head, "Outline", self.thread, "Conclusion")
        kinds = [f"<{slash}{name}>" for name in names for slash in ("", "/")]
        return Scanner([Shape(kind, (kind,)) for kind in kinds])

    def seed(self) -> re.Pattern[str]:
        """Matches what the system writes of a thread before the model goes on: up to its number, if it has one."""
        return re.compile(rf"\s*<{self.thread}>(?:{_NUMBER}{':?' if self.seed_colon else ''})?")


@dataclass(slots=True)
class _Thread:
    """A thread that is being read, or the trace itself.

    begun: the first of its text, in which its number stands
    is_begun: a block has come, so that what follows is not the first
    """

    opener: Tag | None
    index: int = 0
    begun: str = ""
    is_begun: bool = False


@dataclass(slots=True)
class _Outline:
    span: Span
    begun: str = ""


@dataclass(slots=True)
class _Block:
    """A `<Parallel>` that is open.

    state: "passed" when its threads ran elsewhere; "tail" once the parent goes on
    gap: white space of which it is not known yet whose it is
    """

    opener: Tag
    state: Literal["start", "head", "outline", "threads", "passed", "tail"] = "start"
    head: Tag | None = None
    outlines: list[_Outline] = field(default_factory=list)
    numbers: frozenset[str] = frozenset()
    seen: dict[str, Span] = field(default_factory=dict)
    num_begun: int = 0
    gap: list[tuple[str, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Conclusion:
    opener: Tag


_Frame: TypeAlias = _Thread | _Block | _Conclusion


class BlockReader(Reader):
    """Reads either format; a subclass says which."""

    FORMAT: BlockFormat

    def __init__(self) -> None:
        super().__init__(self.FORMAT.scanner())
        self._frames: list[_Frame] = [_Thread(None)]
        self._depth = 0

    @classmethod
    def child(cls) -> BlockReader:
        """A reader of one thread, from behind its opening tag and number to its closing tag."""
        reader = cls()
        thread = cls.FORMAT.thread
        reader._frames.append(_Thread(Tag(f"<{thread}>", "", Span(0, 0))))
        reader._depth = 1
        return reader

    def pass_children(self) -> list[Joined]:  # type: ignore[override]
        """Go on behind the last thread of the block that is open."""
        block = self._frames[-1]
        if not isinstance(block, _Block) or block.state != "threads":
            raise ValueError("no threads are due here")
        block.num_begun = len(block.outlines)
        block.state = "passed"
        return [Joined(self._here())]

    def _text(self, text: str, start: int) -> None:
        match self._frames[-1]:
            case _Thread() as inner:
                if not inner.is_begun and len(inner.begun) < NUMBER_LENGTH:
                    inner.begun += text[:NUMBER_LENGTH]
                self._wrote(text, start)
            case _Conclusion():
                self._wrote(text, start)
            case _Block(state="start"):
                if text.strip():
                    refuse_text(text, start, "after `<Parallel>`", f"`<{self.FORMAT.head}>`")
                self._wrote(text, start)
            case _Block(state="head"):
                if text.strip() and not self.FORMAT.head_text:
                    refuse_text(text, start, f"in `<{self.FORMAT.head}>`", "`<Outline>`")
                self._wrote(text, start)
            case _Block(state="outline") as block:
                outline = block.outlines[-1]
                if len(outline.begun) < NUMBER_LENGTH:
                    outline.begun += text[:NUMBER_LENGTH]
                self._wrote(text, start)
            case _Block() as block:
                if text.strip():
                    thread = f"`<{self.FORMAT.thread}>`, "
                    expected = f"{thread if block.state == 'threads' else ''}`<Conclusion>` or `</Parallel>`"
                    refuse_text(text, start, f"beside `<{self.FORMAT.thread}>`", expected)
                block.gap.append((text, start))

    def _tag(self, tag: Tag) -> None:
        match self._frames[-1]:
            case _Thread() as thread:
                if tag.kind == "<Parallel>":
                    thread.is_begun = True
                    self._open_block(tag)
                elif thread.opener is not None and tag.kind == f"</{self.FORMAT.thread}>":
                    self._wrote(tag.text, tag.span.start)
                    self._end_thread(thread, tag)
                else:
                    self._stray(tag)
            case _Conclusion():
                if tag.kind == "<Parallel>":
                    self._open_block(tag)
                elif tag.kind == "</Conclusion>":
                    self._wrote(tag.text, tag.span.start)
                    self._frames.pop()
                else:
                    self._stray(tag)
            case _Block() as block:
                self._tag_of_block(block, tag)

    def _open_block(self, tag: Tag) -> None:
        self._wrote(tag.text, tag.span.start)
        self._frames.append(_Block(tag))

    def _tag_of_block(self, block: _Block, tag: Tag) -> None:
        head, thread = self.FORMAT.head, self.FORMAT.thread
        if block.state == "outline" and self.FORMAT.open_outlines and tag.kind in ("<Outline>", f"</{head}>"):
            block.state = "head"
        match block.state, tag.kind:
            case "start", kind if kind == f"<{head}>":
                block.state, block.head = "head", tag
            case "head", "<Outline>":
                block.state = "outline"
                block.outlines.append(_Outline(tag.span))
            case "outline", "</Outline>":
                block.state = "head"
            case "head", kind if kind == f"</{head}>":
                self._wrote(tag.text, tag.span.start)
                self._spawn(block, tag)
                return
            case "threads", kind if kind == f"<{thread}>":
                self._begin_thread(block, tag)
                return
            case "threads" | "passed", "<Conclusion>":
                self._join(block, tag)
                self._frames.append(_Conclusion(tag))
                return
            case "threads" | "passed" | "tail", "</Parallel>":
                self._join(block, tag)
                self._frames.pop()
                return
            case _:
                self._stray(tag)
        self._wrote(tag.text, tag.span.start)

    def _spawn(self, block: _Block, tag: Tag) -> None:
        if not block.outlines:
            refuse(
                "trace-no-outline",
                f"this `<{self.FORMAT.head}>` has no `<Outline>`",
                block.head.span if block.head else tag.span,
                help=f"there is a `<{self.FORMAT.thread}>` for each `<Outline>`",
            )
        children = []
        seen: dict[str, Span] = {}
        for outline in block.outlines:
            number = _number(outline.begun)
            self._check_number(number, outline.span, seen)
            children.append(Child(number, outline.begun[:NUMBER_LENGTH].strip(), outline.span))
        if all(child.number for child in children):
            block.numbers = frozenset(seen)
        block.state = "threads"
        self._out.append(Spawned(tuple(children), tag.span))

    def _begin_thread(self, block: _Block, tag: Tag) -> None:
        if block.num_begun == len(block.outlines):
            refuse(
                "trace-path-without-outline",
                f"this `<{self.FORMAT.thread}>` has no `<Outline>`",
                tag.span,
                help=f"there is a `<{self.FORMAT.thread}>` for each `<Outline>`, and there are {len(block.outlines)}",
            )
        self._depth += 1
        check_nesting(self._depth, tag.span)
        self._out.append(Began(block.num_begun, tag.span))
        self._fill_gap(block)
        self._wrote(tag.text, tag.span.start)
        self._frames.append(_Thread(tag, block.num_begun))
        block.num_begun += 1

    def _end_thread(self, thread: _Thread, tag: Tag) -> None:
        self._frames.pop()
        self._depth -= 1
        block = self._frames[-1]
        if isinstance(block, _Block) and thread.opener is not None:
            number = _number(thread.begun)
            self._check_number(number, thread.opener.span, block.seen)
            if number and block.numbers and number not in block.numbers:
                refuse(
                    "trace-unknown-number",
                    f"there is no `<Outline>` {number}",
                    thread.opener.span,
                    help="a thread has the number of its outline",
                )
        self._out.append(Ended(thread.index, tag.span))

    def _join(self, block: _Block, tag: Tag) -> None:
        """A tag behind the threads. The first one, which brings the parent on again, is the system's."""
        if block.num_begun < len(block.outlines):
            refuse(
                "trace-outline-without-path",
                f"this `<Outline>` has no `<{self.FORMAT.thread}>`",
                block.outlines[block.num_begun].span,
                help=f"there is a `<{self.FORMAT.thread}>` for each `<Outline>`, and there are {block.num_begun}",
            )
        if block.state == "threads":
            self._out.append(Joined(tag.span))
        by: Literal["model", "system"] = "model" if block.state == "tail" else "system"
        block.state = "tail"
        self._fill_gap(block, by)
        self._wrote(tag.text, tag.span.start, by)

    def _fill_gap(self, block: _Block, by: Literal["model", "system"] = "model") -> None:
        for text, start in block.gap:
            self._wrote(text, start, by)
        block.gap.clear()

    def _check_number(self, number: str, span: Span, seen: dict[str, Span]) -> None:
        if number in seen:
            refuse(
                "trace-repeated-number",
                f"the number {number} stands here for the second time",
                span,
                help="the numbers in a `<Parallel>` are different from one another",
            )
        if number:
            seen[number] = span

    def _stray(self, tag: Tag) -> NoReturn:
        inner = self._frames[-1]
        refuse(
            "trace-stray-tag",
            f"`{tag.kind}` can't stand here",
            tag.span,
            note=f"inside of `{inner.opener.kind}`" if inner.opener is not None else "inside of no block",
            help=self._expected(inner),
        )

    def _expected(self, frame: _Frame) -> str:
        head, thread = self.FORMAT.head, self.FORMAT.thread
        match frame:
            case _Thread(opener=None):
                return "outside of a block only `<Parallel>` may stand"
            case _Thread():
                return f"`</{thread}>` closes it, and `<Parallel>` opens a block in it"
            case _Conclusion():
                return "`</Conclusion>` closes it, and `<Parallel>` opens a block in it"
            case _Block(state="start"):
                return f"`<{head}>` comes first in a block"
            case _Block(state="head"):
                return f"`<Outline>` or `</{head}>` comes next"
            case _Block(state="outline"):
                return "`</Outline>` comes next"
            case _Block(state="threads" | "passed"):
                return f"`<{thread}>` comes next, or `<Conclusion>` or `</Parallel>` behind the last one"
            case _Block():
                return "`</Parallel>` closes the block"

    def _finish(self) -> None:
        inner = self._frames[-1]
        if inner.opener is None:
            return
        in_head = isinstance(inner, _Block) and inner.state in ("head", "outline")
        open_tag = inner.head if isinstance(inner, _Block) and in_head and inner.head else inner.opener
        refuse(
            "trace-unclosed-tag",
            f"`{open_tag.kind}` is never closed",
            open_tag.span,
            help=f"close it with `</{open_tag.kind[1:]}`",
        )


def _number(begun: str) -> str:
    """The number with which the text behind an opening tag begins; "" where it begins with none."""
    found = _LEADING.match(begun[:NUMBER_LENGTH])
    return found[1] if found else ""
