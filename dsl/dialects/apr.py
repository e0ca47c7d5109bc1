"""APR, Adaptive Parallel Reasoning: a thread calls sub searches, each of which starts from a message alone, and reads
what they give back.

    trace    = (text | call)*
    call     = <Calling Sub Searches> start+ <End Calling Sub Searches> child+ <Sub Searches> result+ <End Sub Searches>
    start    = <Start Sub Search N at level L> message      the message on the line of the tag
    child    = trace                                        begins with a line that is its message
    result   = (<Goal Reached in Sub Search N at level L at Node X> | <No Solution in Sub Search N ...>) text

What was published is one text for each request: the parent's up to its call, each child's, and the parent's again
without the call and with the results. Here they stand in one text in the order in which they come to be, as in figure 3
of the paper. No tag says where a child ends: the next one begins at the first line that is its message, as the call
gives it; a budget may stand before it on the line (`Token Budget: 512 Moving to Node #0,1`).

The parent does not keep the call, so after `Joined` its context is that before `Calling`. The system writes a child's
message, the results and the tags around them.

Source: Pan et al. 2025, "Learning Adaptive Parallel Reasoning with Language Models" (arXiv 2504.15466), section 3.2 and
figure 3, and the format of the data and prompts in its repository.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final, Literal, NoReturn, TypeAlias

from anabranch.dsl.diagnostics import Span
from anabranch.dsl.dialects.events import Began, Calling, Child, Ended, Joined, Returned, Spawned
from anabranch.dsl.dialects.reader import Reader, check_nesting, refuse, refuse_text
from anabranch.dsl.dialects.scanner import NODE, NUMBER, Scanner, Shape, Tag

_OPEN: Final = "<Calling Sub Searches>"
_START: Final = "<Start Sub Search"
_CLOSE: Final = "<End Calling Sub Searches>"
_BACK: Final = "<Sub Searches>"
_GOAL: Final = "<Goal Reached in Sub Search"
_NONE: Final = "<No Solution in Sub Search"
_END: Final = "<End Sub Searches>"

_LEVEL: Final = (" ", NUMBER, " at level ", NUMBER)
SHAPES: Final = (
    *(Shape(kind, (kind,)) for kind in (_OPEN, _CLOSE, _BACK, _END)),
    Shape(_START, (_START, *_LEVEL, ">")),
    *(Shape(kind, (kind, *_LEVEL, " at Node ", NODE, ">")) for kind in (_GOAL, _NONE)),
)

BUDGET: Final = re.compile(r"(?:Token Budget|Sub Call Budget): [0-9]{1,9} ")
"""What may stand before the first line of a thread: the published models are told so how much they may do."""

_TOLD: Final = re.compile(r"[^\r\n]*(?:\r?\n[ \t]*Current State:[^\r\n]*)?")


@dataclass(slots=True)
class _Search:
    """A thread that is being read, or the trace itself.

    awaited: the message of the sibling that begins next; None where none is left
    line: the line that is being read, as far as it has come; kept only while a sibling is awaited
    is_whole: it began where a line begins
    """

    index: int = 0
    awaited: str | None = None
    line: list[str] = field(default_factory=list)
    line_start: int = 0
    is_whole: bool = False


@dataclass(slots=True)
class _Call:
    """A call that is open.

    state: "starts" in the command; "first" behind it, before the first child; "passed" when the children ran elsewhere
    message: the text behind the last tag of the command
    result: the text of the result that is being read, and where it starts
    """

    opener: Tag
    state: Literal["starts", "first", "passed", "results"] = "starts"
    starts: list[Tag] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    message: list[str] = field(default_factory=list)
    by_number: dict[str, int] = field(default_factory=dict)
    num_begun: int = 0
    line: list[str] = field(default_factory=list)
    line_start: int = 0
    results: dict[int, Tag] = field(default_factory=dict)
    result: list[str] = field(default_factory=list)


_Frame: TypeAlias = _Search | _Call


class AprReader(Reader):
    """A push parser of APR's text."""

    def __init__(self) -> None:
        super().__init__(Scanner(SHAPES))
        self._frames: list[_Frame] = [_Search()]
        self._depth = 0

    @classmethod
    def child(cls) -> AprReader:
        """A reader of one sub search. It has no end of its own: the model ends its turn."""
        return cls()

    def pass_children(self) -> list[Joined]:  # type: ignore[override]
        """Go on before `<Sub Searches>`."""
        call = self._frames[-1]
        if not isinstance(call, _Call) or call.state != "first" or call.line:
            raise ValueError("no sub searches are due here")
        call.state = "passed"
        return [Joined(self._here())]

    # --- text

    def _text(self, text: str, start: int) -> None:
        match self._frames[-1]:
            case _Search(awaited=None):
                self._wrote(text, start)
            case _Search() as search:
                self._lines(search, text, start)
            case _Call(state="starts") as call:
                if call.starts:
                    call.message.append(text)
                elif text.strip():
                    refuse_text(text, start, f"after `{_OPEN}`", f"`{_START} ...>`")
                self._wrote(text, start)
            case _Call(state="first") as call:
                self._lines(call, text, start)
            case _Call(state="passed"):
                if text.strip():
                    refuse_text(text, start, "after the sub searches", f"`{_BACK}`")
                self._wrote(text, start, "system")
            case _Call() as call:
                if call.results:
                    call.result.append(text)
                elif text.strip():
                    refuse_text(text, start, f"after `{_BACK}`", "a result")
                else:
                    self._wrote(text, start, "system")

    def _lines(self, frame: _Search | _Call, text: str, start: int) -> None:
        """Whole lines, as they are complete. One of them may end a thread, so that the frame is another one."""
        while text:
            cut = text.find("\n") + 1 or len(text)
            if not frame.line:
                frame.line_start = start
            frame.line.append(text[:cut])
            if text[cut - 1] != "\n":
                return
            self._end_line()
            text, start = text[cut:], start + cut
            inner = self._frames[-1]
            if isinstance(inner, _Search) and inner.awaited is None:
                if text:
                    self._wrote(text, start)
                return
            frame = inner

    def _end_line(self) -> None:
        """The line of the frame that is open is complete: by its end, by a tag or by the end of the text."""
        frame = self._frames[-1]
        if (isinstance(frame, _Call) and frame.state != "first") or not frame.line:
            return
        line, start = "".join(frame.line), frame.line_start
        frame.line.clear()
        ends = line.endswith("\n")
        if isinstance(frame, _Call):
            self._first_line(frame, line, start)
        else:
            is_next = frame.is_whole and frame.awaited is not None and _is_message(line, frame.awaited)
            frame.is_whole = ends
            if is_next:
                self._end_search(frame, start)
                self._begin_search(start, len(line))
            self._wrote(line, start)
        if isinstance(inner := self._frames[-1], _Search):
            inner.is_whole = ends

    def _first_line(self, call: _Call, line: str, start: int) -> None:
        if not line.strip():
            self._wrote(line, start)
        elif _is_message(line, call.messages[0]):
            self._begin_search(start, len(line))
            self._wrote(line, start)
        else:
            self._missing(call, 0)

    # --- tags

    def _tag(self, tag: Tag) -> None:
        self._end_line()
        frame = self._frames[-1]
        if tag.kind == _OPEN and isinstance(frame, _Search):
            frame.is_whole = False
            self._out.append(Calling(tag.span))
            self._frames.append(_Call(tag))
        elif tag.kind == _START and isinstance(frame, _Call) and frame.state == "starts":
            self._start(frame, tag)
        elif tag.kind == _CLOSE and isinstance(frame, _Call) and frame.state == "starts":
            self._wrote(tag.text, tag.span.start)
            self._spawn(frame, tag)
            return
        elif tag.kind == _BACK:
            self._back(tag)
            return
        elif tag.kind in (_GOAL, _NONE) and isinstance(frame, _Call) and frame.state == "results":
            self._begin_result(frame, tag)
            return
        elif tag.kind == _END and isinstance(frame, _Call) and frame.state == "results":
            self._end_results(frame, tag)
            return
        else:
            self._stray(tag)
        self._wrote(tag.text, tag.span.start)

    def _start(self, call: _Call, tag: Tag) -> None:
        self._end_message(call)
        number = tag.fields[0]
        if number in call.by_number:
            refuse(
                "trace-repeated-number",
                f"the number {number} stands here for the second time",
                tag.span,
                help="the numbers in a call are different from one another",
            )
        call.by_number[number] = len(call.starts)
        call.starts.append(tag)

    def _end_message(self, call: _Call) -> None:
        """The text since the last `<Start ...>` is what that sub search is told: one line."""
        if not call.starts:
            return
        text = "".join(call.message)
        call.message.clear()
        message = text.strip()
        span = call.starts[-1].span
        if not message:
            refuse(
                "trace-no-message",
                "this sub search is told nothing",
                span,
                help="a message follows on the line, such as `Moving to Node #0,1`",
            )
        if "\n" in message:
            _, _, rest = text.lstrip().partition("\n")
            refuse_text(rest, span.end + len(text) - len(rest), "behind a message", f"`{_START} ...>` or `{_CLOSE}`")
        call.messages.append(message)

    def _spawn(self, call: _Call, tag: Tag) -> None:
        self._end_message(call)
        if not call.starts:
            refuse(
                "trace-no-outline",
                "this call starts no sub search",
                call.opener.span,
                help="write `<Start Sub Search 0 at level 1> Moving to Node #0,0` in it",
            )
        call.state = "first"
        children = zip(call.starts, call.messages, strict=True)
        self._out.append(
            Spawned(tuple(Child(start.fields[0], message, start.span) for start, message in children), tag.span)
        )

    def _begin_search(self, start: int, length: int) -> None:
        """The child that is next of the call that is open begins with a line of `length` characters."""
        call = self._frames[-1]
        assert isinstance(call, _Call)
        index = call.num_begun
        span = Span(start, start + length)
        self._depth += 1
        check_nesting(self._depth, span)
        call.num_begun += 1
        awaited = call.messages[index + 1] if index + 1 < len(call.messages) else None
        self._out.append(Began(index, span))
        self._frames.append(_Search(index, awaited))

    def _end_search(self, search: _Search, start: int) -> None:
        self._out.append(Ended(search.index, Span(start, start)))
        self._frames.pop()
        self._depth -= 1

    def _back(self, tag: Tag) -> None:
        """`<Sub Searches>` ends the child that is open, which must be the last one of its call."""
        frame = self._frames[-1]
        if isinstance(frame, _Search) and len(self._frames) > 1:
            self._end_search(frame, tag.span.start)
            frame = self._frames[-1]
        if not isinstance(frame, _Call) or frame.state not in ("first", "passed"):
            self._stray(tag)
        if frame.state == "first":
            if frame.num_begun < len(frame.starts):
                self._missing(frame, frame.num_begun)
            self._out.append(Joined(tag.span))
        frame.state = "results"
        self._wrote(tag.text, tag.span.start, "system")

    def _begin_result(self, call: _Call, tag: Tag) -> None:
        self._end_result(call)
        number = tag.fields[0]
        index = call.by_number.get(number)
        if index is None:
            refuse(
                "trace-unknown-number",
                f"no sub search {number} was called",
                tag.span,
                help="a result has the number of its sub search",
            )
        if index in call.results:
            refuse(
                "trace-repeated-number",
                f"the number {number} stands here for the second time",
                tag.span,
                help="each sub search gives one result back",
            )
        call.results[index] = tag
        call.result.append(tag.text)

    def _end_result(self, call: _Call) -> None:
        if not call.results:
            return
        text = "".join(call.result)
        call.result.clear()
        index = next(reversed(call.results))
        start = call.results[index].span.start
        self._out.append(Returned(index, text, Span(start, start + len(text))))

    def _end_results(self, call: _Call, tag: Tag) -> None:
        self._end_result(call)
        for index, start in enumerate(call.starts):
            if index not in call.results:
                refuse(
                    "trace-no-result",
                    "this sub search gives nothing back",
                    start.span,
                    help=f"between `{_BACK}` and `{_END}` each of them has a result",
                )
        self._wrote(tag.text, tag.span.start, "system")
        self._frames.pop()

    # --- what is wrong

    def _missing(self, call: _Call, index: int) -> NoReturn:
        refuse(
            "trace-outline-without-path",
            "this sub search has no text",
            call.starts[index].span,
            help=f"its text begins, behind `{_CLOSE}` and the sub searches before it, with a line that is its message: "
            f"`{call.messages[index]}`",
        )

    def _stray(self, tag: Tag) -> NoReturn:
        frame = self._frames[-1]
        if isinstance(frame, _Search):
            ends = f", and `{_BACK}` ends the sub searches" if len(self._frames) > 1 else ""
            help = f"`{_OPEN}` opens a call{ends}"
        elif frame.state == "starts":
            help = f"`{_START} ...>` or `{_CLOSE}` comes next"
        elif frame.state == "results":
            help = f"a result or `{_END}` comes next"
        else:
            help = f"the text of the sub searches comes next, then `{_BACK}`"
        refuse("trace-stray-tag", f"`{tag.text}` can't stand here", tag.span, help=help)

    def _finish(self) -> None:
        self._end_line()
        calls = [frame for frame in self._frames if isinstance(frame, _Call)]
        if calls:
            call = calls[-1]
            tag, close = call.opener, _BACK
            if call.state == "starts":
                close = _CLOSE
            elif call.state == "results":
                close = _END
            refuse("trace-unclosed-tag", f"`{tag.text}` is never closed", tag.span, help=f"`{close}` is missing")


def _is_message(line: str, message: str) -> bool:
    """Whether a line is what a sub search is told, a budget before it left out."""
    told = line.strip()
    if told != message and (budget := BUDGET.match(told)):
        told = told[budget.end() :].strip()
    return told == message


def seed(text: str) -> int:
    """How much of a sub search's text it is told: its first line, and the state of its node if that comes next."""
    found = _TOLD.match(text)
    # A space before a `gen` would be held back, and offered to it.
    return len(found[0].rstrip(" ")) if found else 0
