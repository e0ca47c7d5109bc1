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

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, TypeAlias, Union, get_args, get_origin, get_type_hints

from anabranch.compiler.schedule import Ref
from anabranch.compiler.scheduler import Machine
from anabranch.dsl.diagnostics import Diagnostic, PlanError

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
    thread: int
    node: Ref


@dataclass(frozen=True, slots=True)
class Round:
    thread: int
    node: Ref
    number: int


@dataclass(frozen=True, slots=True)
class Arm:
    thread: int
    node: Ref
    place: int


@dataclass(frozen=True, slots=True)
class Write:
    thread: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Token:
    thread: int
    id: int


@dataclass(frozen=True, slots=True)
class Trim:
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
    segment: int
    page: int


@dataclass(frozen=True, slots=True)
class Shrink:
    segment: int
    count: int


@dataclass(frozen=True, slots=True)
class Seal:
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
    segment: int


@dataclass(frozen=True, slots=True)
class Cache:
    page: int


@dataclass(frozen=True, slots=True)
class Uncache:
    page: int


@dataclass(frozen=True, slots=True)
class SwapOut:
    segment: int


@dataclass(frozen=True, slots=True)
class SwapIn:
    segment: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Lose:
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
        "machine": _plain(recording.machine, named=True),
        "deterministic": recording.deterministic,
        "runs": [_plain(run, named=True) for run in recording.runs],
    }
    lines = ",\n".join(_dump([_TAGS[type(step)], *_plain(step)]) for step in recording.steps)
    return f'{_dump(head)[:-1]},"steps":[\n{lines}\n]}}\n'


def from_json(text: str | bytes) -> Recording:
    """Read what `to_json` wrote. Raises PlanError `bad-schedule`, saying where and what, for anything else."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad_schedule(f"it is no JSON: {error}") from None
    return from_document(document)


def from_document(document: Any) -> Recording:
    """Read a parsed document. Raises PlanError `bad-schedule`."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise bad_schedule(f'it has no `"format": "{FORMAT}"`')
    if document.get("version") != VERSION or document.get("kind") != "recorded":
        raise bad_schedule(f"only version {VERSION} of kind `recorded` is read here")
    known = {"format", "version", "kind", "machine", "deterministic", "runs", "steps"}
    if set(document) != known:
        raise bad_schedule(f"its fields must be {sorted(known)}")
    if not isinstance(document["runs"], list) or not isinstance(document["steps"], list):
        raise bad_schedule("`runs` and `steps` must be lists")
    machine = _named(Machine, document["machine"], "machine")
    deterministic = _value(bool, document["deterministic"], "deterministic")
    runs = tuple(_named(Source, run, f"runs[{place}]") for place, run in enumerate(document["runs"]))
    steps = tuple(_step(step, f"steps[{place}]") for place, step in enumerate(document["steps"]))
    return Recording(machine, deterministic, runs, steps)


def bad_schedule(what: str) -> PlanError:
    return PlanError(
        Diagnostic("bad-schedule", f"this is no schedule: {what}", help="`anabranch run --schedule FILE` writes one")
    )


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _plain(value: Any, *, named: bool = False) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if is_dataclass(value):
        names = [field.name for field in fields(value)]
        items = [_plain(getattr(value, name)) for name in names]
        return dict(zip(names, items, strict=True)) if named else items
    return value


def _tag(kind: type) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in kind.__name__).lstrip("_")


_TAGS: dict[type, str] = {kind: _tag(kind) for kind in get_args(Step)}
_KINDS: dict[str, type] = {tag: kind for kind, tag in _TAGS.items()}


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _named(kind: type, value: Any, where: str) -> Any:
    hints = _hints(kind)
    if not isinstance(value, dict) or set(value) != set(hints):
        raise bad_schedule(f"`{where}` must have the fields {', '.join(hints)}")
    return _built(kind, {name: _value(hint, value[name], f"{where}.{name}") for name, hint in hints.items()}, where)


def _step(value: Any, where: str) -> Step:
    if not isinstance(value, list) or not value or not isinstance(value[0], str) or value[0] not in _KINDS:
        raise bad_schedule(f"`{where}` must be a list that begins with the name of a step")
    step: Step = _listed(_KINDS[value[0]], value[1:], f"{where} ({value[0]})")
    return step


def _listed(kind: type, items: list[Any], where: str) -> Any:
    hints = _hints(kind)
    if len(items) != len(hints):
        raise bad_schedule(f"`{where}` takes {len(hints)} fields ({', '.join(hints)}), not {len(items)}")
    pairs = zip(hints.items(), items, strict=True)
    return _built(kind, {name: _value(hint, item, f"{where}.{name}") for (name, hint), item in pairs}, where)


def _built(kind: type, values: dict[str, Any], where: str) -> Any:
    try:
        return kind(**values)
    except ValueError as error:
        raise bad_schedule(f"`{where}`: {error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` says. Integers are below 2**63, so that no arithmetic on them is slow."""
    origin = get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise bad_schedule(f"`{where}` must be a list")
        args = get_args(hint)
        if args[-1] is Ellipsis:
            return tuple(_value(args[0], item, where) for item in value)
        if len(value) != len(args):
            raise bad_schedule(f"`{where}` must be a list of {len(args)}")
        return tuple(_value(arg, item, where) for arg, item in zip(args, value, strict=True))
    if origin in (Union, UnionType):
        (only,) = (arg for arg in get_args(hint) if arg is not type(None))
        return None if value is None else _value(only, value, where)
    if hint is Block:
        if not isinstance(value, list):
            raise bad_schedule(f"`{where}` must be a list")
        return _listed(Block, value, where)
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int) or not -(1 << 63) <= value < 1 << 63:
            raise bad_schedule(f"`{where}` must be a whole number")
        return value
    if hint in (bool, str):
        if not isinstance(value, hint):
            raise bad_schedule(f"`{where}` must be a {'truth value' if hint is bool else 'text'}")
        return value
    if not isinstance(value, dict):
        raise bad_schedule(f"`{where}` must be an object")
    return value
