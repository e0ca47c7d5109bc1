"""A recorded schedule: what a run of one or more plans did, call by call and page by page, with the decisions of time.

    recording = Recording(machine, run*, step*)
    run       = Source(text, plan, inputs, seed, functions)
    control   = Begin(thread, run, path, parent?, fork?, index, fresh)   a thread starts, seeing what `parent` sees
              | Enter(thread, node)                                      it comes to a node of its plan's graph
              | Round(thread, node, number)                              it begins a round of the loop it came to
              | Arm(thread, node, place)                                 it takes an arm: 0 then, 1 else, -1 neither
              | Write(thread, ids)                                       known tokens, not yet fed
              | Token(thread, id)                                        a drawn token, not yet fed
              | Trim(thread, count)                                      its last tokens, fed or not, are taken back
              | Forked(thread, node, width)                              it waits for `width` branches
              | Joined(thread, node, ok, winners, failed)                the join is read
              | Stitch(thread, winners)                                  winners' own segments enter its view
              | End(thread, status)                                      it is over
    memory    = Open(segment, thread, start)                             the segment that `thread` writes from now on
              | Page(segment, page)                                      the segment's next page
              | Shrink(segment, count)                                   its last `count` pages go back
              | Seal(segment)                                            nothing more is written to it
              | Adopt(segment, thread, ids, pages)                       a sealed segment over pages of the prefix cache
              | Free(segment)                                            nobody sees it; its pages have an owner less
              | Cache(page) | Uncache(page)                              the prefix cache is (no longer) an owner
              | SwapOut(segment) | SwapIn(segment, pages)                its content goes to host memory, and comes back
              | Lose(thread)                                             its open segment is emptied, to be fed again
    call      = Call(seats, block*)                                      one call of the model
    block     = Block(thread, segment, first, position, kinds, reads)    rows that one thread feeds, in order

Threads and segments are numbered from 0 in order of use over the whole recording. A node is (plan name, its `dst`).
A token is drawn from the logits of the last token of its thread's context, which some call before it has computed.

As JSON a recording is an object: `format` "anabranch-schedule", `version` 1, `kind` "recorded", `machine`, `runs`, and
`steps`, in which each step is a list: its name in lower case (`swap_out` for `SwapOut`), then its fields in order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from anabranch.compiler.json_values import as_object, as_tagged, bad_schedule, dump, from_object, from_tagged, load
from anabranch.compiler.schedule import Ref
from anabranch.compiler.scheduler import Machine

Kinds: TypeAlias = tuple[tuple[str, int], ...]
"""Rows of a block by kind, run by run: `prefill`, `reprefill`, `decode`, `flush`, `recompute`."""

Read: TypeAlias = tuple[int, int, int]
"""(first slot, how many slots, shift): keys that a row attends to; slot = page * page_size + offset."""


@dataclass(frozen=True, slots=True)
class Source:
    """A run's plan and inputs. plan: the name of the plan that runs; functions: names of the host's functions."""

    text: str
    plan: str
    inputs: Mapping[str, Any]
    seed: int
    functions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Begin:
    """A thread starts. `parent`, `fork`, `index`: whose branch it is, of which node, and its place there."""

    thread: int
    run: int
    path: tuple[str, ...]
    parent: int | None
    fork: Ref | None
    index: int
    fresh: bool


@dataclass(frozen=True, slots=True)
class Enter:
    """The thread comes to `node`."""

    thread: int
    node: Ref


@dataclass(frozen=True, slots=True)
class Round:
    """It begins round `number`, from 0, of the loop `node`."""

    thread: int
    node: Ref
    number: int


@dataclass(frozen=True, slots=True)
class Arm:
    """It takes an arm of the condition `node`: 0 then, 1 else, -1 where there is none."""

    thread: int
    node: Ref
    place: int


@dataclass(frozen=True, slots=True)
class Write:
    """Known tokens stand at the end of its context, and are not fed yet."""

    thread: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """A drawn token stands there, and is not fed yet."""

    thread: int
    id: int


@dataclass(frozen=True, slots=True)
class Trim:
    """The last `count` tokens of its context, fed or not, are taken back."""

    thread: int
    count: int


@dataclass(frozen=True, slots=True)
class Forked:
    """A `Reduce` forks once for each level."""

    thread: int
    node: Ref
    width: int


@dataclass(frozen=True, slots=True)
class Joined:
    """ok, winners: branch indices, ascending; winners only where the join keeps a context."""

    thread: int
    node: Ref
    ok: tuple[int, ...]
    winners: tuple[int, ...]
    failed: bool


@dataclass(frozen=True, slots=True)
class Stitch:
    """winners: thread numbers, in branch order."""

    thread: int
    winners: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class End:
    """status: ok, failed, truncated, cancelled or late."""

    thread: int
    status: str


@dataclass(frozen=True, slots=True)
class Open:
    """start: the position of its first token."""

    segment: int
    thread: int
    start: int


@dataclass(frozen=True, slots=True)
class Page:
    """The segment's next page."""

    segment: int
    page: int


@dataclass(frozen=True, slots=True)
class Shrink:
    """The last `count` pages of the segment go back."""

    segment: int
    count: int


@dataclass(frozen=True, slots=True)
class Seal:
    """The segment is not written any more, and enters its thread's view."""

    segment: int


@dataclass(frozen=True, slots=True)
class Adopt:
    """The first tokens that `thread` was to feed stand in `pages` already; they are full."""

    segment: int
    thread: int
    ids: tuple[int, ...]
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Free:
    """Nobody sees the segment any more: each of its pages has an owner less."""

    segment: int


@dataclass(frozen=True, slots=True)
class Cache:
    """The prefix cache owns the page too."""

    page: int


@dataclass(frozen=True, slots=True)
class Uncache:
    """The prefix cache lets go of the page."""

    page: int


@dataclass(frozen=True, slots=True)
class SwapOut:
    """The segment's content goes to host memory, and its pages go back."""

    segment: int


@dataclass(frozen=True, slots=True)
class SwapIn:
    """The content comes back, into `pages`."""

    segment: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Lose:
    """The thread's open segment is emptied, and its tokens are to be fed again."""

    thread: int


@dataclass(frozen=True, slots=True)
class Block:
    """thread: whose context it is; first: index in `segment` of the first row; position: of the first row.

    reads: for each row, every key that it attends to, itself included, as the kernels are told
    """

    thread: int
    segment: int
    first: int
    position: int
    kinds: Kinds
    reads: tuple[tuple[Read, ...], ...]


@dataclass(frozen=True, slots=True)
class Call:
    """seats: threads that hold a lane and take part. A thread may draw from logits at hand, and feed nothing."""

    seats: tuple[int, ...]
    blocks: tuple[Block, ...]


Step: TypeAlias = (
    Begin | Enter | Round | Arm | Write | Token | Trim | Forked | Joined | Stitch | End
    | Open | Page | Shrink | Seal | Adopt | Free | Cache | Uncache | SwapOut | SwapIn | Lose | Call
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recording:
    """deterministic: joins were ordered by (tokens decoded, branch index)."""

    machine: Machine
    deterministic: bool
    runs: tuple[Source, ...]
    steps: tuple[Step, ...]


FORMAT, VERSION = "anabranch-schedule", 1


def to_json(recording: Recording) -> str:
    """The recording as one JSON document, a step a line."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "kind": "recorded",
        "machine": as_object(recording.machine),
        "deterministic": recording.deterministic,
        "runs": [as_object(run) for run in recording.runs],
    }
    lines = ",\n".join(dump(as_tagged(step)) for step in recording.steps)
    return f'{dump(head)[:-1]},"steps":[\n{lines}\n]}}\n'


def from_json(text: str | bytes) -> Recording:
    """Read what `to_json` wrote. Raises PlanError `bad-schedule`, saying where and what, for anything else."""
    return from_document(load(text))


def from_document(document: Any) -> Recording:
    """Read a parsed document. Raises PlanError `bad-schedule`."""
    check_head(document, "recorded", {"machine", "deterministic", "runs", "steps"})
    if not isinstance(document["runs"], list) or not isinstance(document["steps"], list):
        raise bad_schedule("`runs` and `steps` must be lists")
    if not isinstance(document["deterministic"], bool):
        raise bad_schedule("`deterministic` must be a truth value")
    machine = from_object(Machine, document["machine"], "machine")
    runs = tuple(from_object(Source, run, f"runs[{place}]") for place, run in enumerate(document["runs"]))
    steps = tuple(from_tagged(Step, step, f"steps[{place}]") for place, step in enumerate(document["steps"]))
    return Recording(machine, document["deterministic"], runs, steps)


def check_head(document: Any, kind: str, others: Collection[str]) -> None:
    """What every schedule file begins with. Raises PlanError `bad-schedule`."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise bad_schedule(f'it has no `"format": "{FORMAT}"`')
    if type(document.get("version")) is not int or document["version"] != VERSION or document.get("kind") != kind:
        raise bad_schedule(f"only version {VERSION} of kind `{kind}` is read here")
    known = {"format", "version", "kind", *others}
    if set(document) != known:
        raise bad_schedule(f"its fields must be {', '.join(sorted(known))}")
