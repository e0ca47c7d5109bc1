"""A run on disk, as it happens: a write-ahead log of its events, from which a killed run goes on.

    journal = header line, entry line *
    line    = ["<sum>", <JSON object>]
    header  = what a continuation must know: the plan's text, inputs, seed, machine, model
    entry   = {"run": index of the input, "is": event, "thread": path, ... fields of the event and of its `LogEntry`}

Each line's sum is BLAKE2b-64 of the sum before it and the bytes of its object, so what was cut short, changed, moved,
doubled or put in from another journal breaks the chain there, and all before it stands. The sums are against accidents
and mix-ups; they keep nobody from writing a journal of his own.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from hashlib import blake2b
from types import TracebackType
from typing import Any, Final, Literal, NoReturn, TypeAlias

from anabranch.dsl.diagnostics import Diagnostic, PlanError
from anabranch.dsl.spec import Value
from anabranch.runtime.events import BranchEnded, BranchStarted, GenEnded, HostCalled, Joined, RunEnded
from anabranch.runtime.joins import Ended
from anabranch.runtime.replay import Log, LogEntry, Recorded

FORMAT: Final = "anabranch-journal"
VERSION: Final = 1

_SUM: Final = 16  # hex digits of a line's sum
_OPEN: Final = len('["') + _SUM + len('",')  # characters of a line before its object
# What one line may take: above the longest value and text that a branch may have.
MAX_LINE_BYTES: Final = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a run was started with.

    anabranch: the version that wrote it
    source, text, plan: the plan file's name and text, and the plan of it that runs
    inputs: of each run, in order
    threads: of torch, on which the last bits of a number may depend
    pages: None for as many as the engine takes by itself
    model, fingerprint, dtype, device, template: as in `load`; the fingerprint is that of the loaded model
    functions: the module of the host's functions, as `--functions` takes it
    id: 16 random hex digits, so that no two journals have a line in common
    """

    anabranch: str
    source: str
    text: str
    plan: str
    inputs: tuple[Mapping[str, Value], ...]
    many: bool
    seed: int
    deterministic: bool
    lanes: int
    pages: int | None
    page_size: int
    chunk: int
    preempt: Literal["swap", "recompute", "never"]
    threads: int
    model: str
    fingerprint: str
    dtype: str
    device: str | None
    template: str | None
    functions: str | None
    id: str = field(default_factory=lambda: os.urandom(8).hex())


@dataclass(frozen=True, slots=True)
class Contents:
    """What a journal holds.

    entries: of each run, in order
    num_bytes: up to the end of the last whole line
    num_dropped: lines after it that are torn or changed, and that nothing can be taken from
    """

    header: Header
    entries: tuple[tuple[LogEntry, ...], ...]
    num_bytes: int
    num_dropped: int


class Journal:
    """A journal that is open for writing, by this process alone.

    What the runs log is kept in memory until `commit`, which writes and fsyncs it if a branch has ended since, or the
    plan's own thread has come further.
    """

    def __init__(self, path: str, descriptor: int, sum: str, num_bytes: int) -> None:
        """sum, num_bytes: of what it holds; an empty one is removed by `close` unless it was begun"""
        self.path = path
        self._descriptor = descriptor
        self._sum = sum
        self._num_bytes = num_bytes
        self._lines: list[bytes] = []
        self._due = False
        self._begun = bool(num_bytes)

    @classmethod
    def create(cls, path: str) -> Journal:
        """A new journal; `begin` writes its first line.

        Raises PlanError: journal-exists, journal-write.
        """
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
        except FileExistsError:
            _refuse(
                "journal-exists",
                f"`{path}` exists already",
                f"`anabranch resume {path}` goes on with it; a new journal takes a new name",
            )
        except (OSError, ValueError) as error:
            _refuse("journal-write", f"`{path}` can't be made: {_reason(error)}", "check the path and its permissions")
        _lock(path, descriptor)
        return cls(path, descriptor, "", 0)

    @classmethod
    def open(cls, path: str) -> tuple[Journal, Contents]:
        """A journal to go on with, and what it holds. What comes after its last whole line is cut off by `begin`.

        Raises PlanError: no-such-file, unreadable-file, journal-busy, bad-journal.
        """
        descriptor = _opened(path, os.O_RDWR)
        try:
            _lock(path, descriptor)
            contents, last = _read(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, last, contents.num_bytes), contents

    def begin(self, header: Header | None = None) -> None:
        """Make the journal ready for entries.

        header: of a new journal; None for one that was opened
        Raises PlanError `journal-write`.
        """
        if header is None:
            try:
                os.ftruncate(self._descriptor, self._num_bytes)
                os.lseek(self._descriptor, 0, os.SEEK_END)
                os.fsync(self._descriptor)
            except OSError as error:
                _cannot_write(self.path, error)
            return
        self._add({"format": FORMAT, "version": VERSION, **_object(header)})
        self._due = True
        self.commit()
        self._begun = True
        _sync_folder(self.path)

    def log(self, run: int) -> Log:
        """What takes the entries of the run of input `run`."""

        def add(entry: LogEntry) -> None:
            self._add({"run": run, **_encode(entry)})
            event = entry.event
            over = isinstance(event, RunEnded) or (
                isinstance(event, BranchEnded) and event.status not in ("cancelled", "late")
            )
            self._due = self._due or over or (not entry.thread and not isinstance(event, BranchStarted))

        return add

    def commit(self, *, all_of_it: bool = False) -> None:
        """Make what was logged durable. Raises PlanError `journal-write`; what was durable before stays so.

        all_of_it: also what no branch has ended after, as before a run is given up
        """
        if not self._due and not (all_of_it and self._lines):
            return
        data = memoryview(b"".join(self._lines))
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
            os.fsync(self._descriptor)
        except OSError as error:
            _cannot_write(self.path, error)
        self._lines.clear()
        self._due = False

    def close(self) -> None:
        """Let go of the file. What was not committed is lost, and so is a new file that was never begun."""
        if self._descriptor < 0:
            return
        if not self._begun:
            with suppress(OSError):
                os.unlink(self.path)
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, document: Mapping[str, Any]) -> None:
        text = json.dumps(document, separators=(",", ":")).encode()
        self._sum = _chain(self._sum, text)
        self._lines.append(b'["%s",%s]\n' % (self._sum.encode(), text))


def read_journal(path: str) -> Contents:
    """What the journal at `path` holds, also while another process writes it. Raises PlanError as `Journal.open`."""
    descriptor = _opened(path, os.O_RDONLY)
    try:
        return _read(path, descriptor)[0]
    finally:
        os.close(descriptor)


def read_runs(path: str) -> Iterator[tuple[Header, int, tuple[LogEntry, ...]]]:
    """Each run of the journal at `path`, as (header, which input it is of, its entries), in the order of their ends.

    Runs that are not over come last. Only the entries of runs that go on at one time are in memory together.
    Raises PlanError as `read_journal`.
    """
    descriptor = _opened(path, os.O_RDONLY)
    try:
        with os.fdopen(descriptor, "rb") as file:
            lines = _Lines(path, iter(lambda: file.readline(MAX_LINE_BYTES), b""))
            going_on: dict[int, list[LogEntry]] = {}
            over = bytearray(len(lines.header.inputs))
            for run, entry in lines:
                going_on.setdefault(run, []).append(entry)
                if isinstance(entry.event, RunEnded):
                    over[run] = True
                    yield lines.header, run, tuple(going_on.pop(run))
            for run, is_over in enumerate(over):
                if not is_over:
                    yield lines.header, run, tuple(going_on.pop(run, ()))
    except OSError as error:
        _refuse("unreadable-file", f"`{path}` can't be read: {_reason(error)}", "check the path")


_BINARY: Final = getattr(os, "O_BINARY", 0)


def _chain(before: str, text: bytes) -> str:
    return blake2b(before.encode() + text, digest_size=_SUM // 2).hexdigest()


def _opened(path: str, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | _BINARY)
    except FileNotFoundError:
        _refuse("no-such-file", f"there is no file `{path}`", "check the path")
    except (OSError, ValueError) as error:
        _refuse("unreadable-file", f"`{path}` can't be opened: {_reason(error)}", "check its permissions")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        _refuse("unreadable-file", f"`{path}` is no regular file", "a journal is a file on a disk")
    return descriptor


def _lock(path: str, descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:
        return  # a system without them: two writers are then not told apart
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _refuse("journal-busy", f"another process writes `{path}`", "wait for it to end, or end it")
    except OSError:
        # A file system without locks.
        pass


def _sync_folder(path: str) -> None:
    """The name of a new file is durable once its folder is."""
    try:
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    except OSError:
        return  # a system that opens no folders
    try:
        os.fsync(folder)
    except OSError as error:
        _cannot_write(path, error)
    finally:
        os.close(folder)


def _read(path: str, descriptor: int) -> tuple[Contents, str]:
    try:
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return _parse(path, iter(lambda: file.readline(MAX_LINE_BYTES), b""))
    except OSError as error:
        _refuse("unreadable-file", f"`{path}` can't be read: {_reason(error)}", "check the path")


class _Lines:
    """The header of a journal, and then its entries with the run that each is of, as far as its lines are whole.

    sum, num_bytes: of what was read; num_dropped: lines after the last whole one, once all are read
    """

    def __init__(self, path: str, lines: Iterator[bytes]) -> None:
        first = next(lines, b"")
        text = _text(first, "")
        if text is None:
            _bad(path, "its first line is " + ("torn or changed" if first else "not there"))
        self.header = _header(path, _load(path, text, 1))
        self.sum = _chain("", text)
        self.num_bytes = len(first)
        self.num_dropped = 0
        self._path = path
        self._lines = lines

    def __iter__(self) -> Iterator[tuple[int, LogEntry]]:
        for number, line in enumerate(self._lines, 2):
            text = _text(line, self.sum)
            if text is None:
                self.num_dropped = 1 + sum(1 for _ in self._lines)
                return
            document = _load(self._path, text, number)
            run = document.pop("run", None)
            if type(run) is not int or not 0 <= run < len(self.header.inputs):
                _bad(self._path, f"line {number} is of no run")
            entry = _decode(self._path, document, number)
            self.sum, self.num_bytes = _chain(self.sum, text), self.num_bytes + len(line)
            yield run, entry


def _parse(path: str, lines: Iterator[bytes]) -> tuple[Contents, str]:
    """The contents of a journal, and the sum of its last whole line."""
    whole = _Lines(path, lines)
    entries: list[list[LogEntry]] = [[] for _ in whole.header.inputs]
    for run, entry in whole:
        entries[run].append(entry)
    return Contents(whole.header, tuple(map(tuple, entries)), whole.num_bytes, whole.num_dropped), whole.sum


def _text(line: bytes, before: str) -> bytes | None:
    """The object of a line as it was written; None if its sum does not follow on `before`."""
    text = line[_OPEN:-2]
    whole = line == b'["%s",%s]\n' % (_chain(before, text).encode(), text)
    return text if whole else None


def _load(path: str, text: bytes, number: int) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        _bad(path, f"line {number} is no JSON: {error}")
    if not isinstance(document, dict):
        _bad(path, f"line {number} is no object")
    return document


# --- fields


Check: TypeAlias = Callable[[Any], Any]


def _is(*kinds: type) -> Check:
    def check(value: Any) -> Any:
        if type(value) not in kinds:
            raise ValueError
        return value

    return check


def _many(item: Check) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not list:
            raise ValueError
        return tuple(map(item, value))

    return check


def _one_of(*known: str) -> Check:
    def check(value: Any) -> Any:
        if value not in known:
            raise ValueError
        return value

    return check


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError
    return value


def _threads(value: Any) -> int:
    # More than any machine has would be a strange journal, and are not to be started for one.
    if type(value) is not int or not 1 <= value <= 1024:
        raise ValueError
    return value


def _any(value: Any) -> Any:
    return value


_STR, _DICT, _FLOAT, _BOOL, _INT = _is(str), _is(dict), _is(float), _is(bool), _is(int)
_STR_OR_NONE, _COUNT_OR_NONE = _is(str, type(None)), lambda value: None if value is None else _count(value)
_STATUS = _one_of("ok", "failed", "truncated", "cancelled", "late")
_ENDS = ("max", "stop", "end_of_turn", "complete", "recorded", "failed", "truncated", "cancelled")

_ENDED: Final[dict[str, Check]] = {
    "index": _count, "status": _STATUS, "value": _any, "reason": _STR, "names": _DICT,
    "logprob": _is(float, type(None)), "tokens": _count, "critical": _count,
}  # fmt: skip


def _counts(value: Any) -> dict[str, int | float]:
    if type(value) is not dict or not all(type(count) in (int, float) for count in value.values()):
        raise ValueError
    return value


def _ended(value: Any) -> Ended:
    if type(value) is not dict:
        raise ValueError
    ended: Ended = _built(Ended, _ENDED, value)
    return ended


_EVENTS: Final[dict[str, tuple[type[Recorded], dict[str, Check]]]] = {
    "started": (BranchStarted, {"label": _STR_OR_NONE}),
    "gen": (
        GenEnded,
        {
            "site": _STR, "name": _STR_OR_NONE, "ids": _many(_count), "drawn": _count, "text": _STR, "value": _any,
            "end": _one_of(*_ENDS), "logprobs": _many(_FLOAT), "reason": _STR,
        },
    ),
    "host": (HostCalled, {"function": _STR, "value": _any, "error": _STR}),
    "joined": (
        Joined,
        {"site": _STR, "ok": _many(_count), "winners": _many(_count), "value": _any, "failed": _STR},
    ),
    "ended": (
        BranchEnded,
        {"status": _STATUS, "text": _STR, "value": _any, "reason": _STR, "tokens": _count, "label": _STR_OR_NONE},
    ),
    "run_ended": (RunEnded, {"status": _STATUS, "value": _any, "reason": _STR, "counts": _counts}),
}  # fmt: skip
_NAMES: Final = {kind: name for name, (kind, _) in _EVENTS.items()}

_BESIDES: Final[dict[str, Check]] = {"drawn_ids": _many(_count), "logprob_sum": _FLOAT, "ended": _ended}
# An event may have a field of that name, so what goes with it has one of its own in a line.
_BESIDES_AS: Final = {"drawn_ids": "drawn_ids", "logprob_sum": "logprob_sum", "ended": "told"}

_HEADER: Final[dict[str, Check]] = {
    "anabranch": _STR, "source": _STR, "text": _STR, "plan": _STR, "inputs": _many(_DICT), "many": _BOOL, "seed": _INT,
    "deterministic": _BOOL, "lanes": _count, "pages": _COUNT_OR_NONE, "page_size": _count, "chunk": _count,
    "preempt": _one_of("swap", "recompute", "never"),
    "threads": _threads,
    "model": _STR, "fingerprint": _STR, "dtype": _one_of("float32", "float64", "float16", "bfloat16"),
    "device": _STR_OR_NONE,
    "template": lambda value: None if value is None else _one_of("raw")(value),
    "functions": _STR_OR_NONE, "id": _STR,
}  # fmt: skip


def _encode(entry: LogEntry) -> dict[str, Any]:
    event = entry.event
    document: dict[str, Any] = {"is": _NAMES[type(event)], "thread": entry.thread}
    if not isinstance(event, RunEnded) and len(event.path) > len(entry.thread):
        document["rounds"] = event.path[len(entry.thread) :]
    document |= {name: value for name, value in _object(event).items() if name != "path"}
    if entry.drawn_ids:
        document["drawn_ids"] = entry.drawn_ids
    if entry.logprob_sum:
        document["logprob_sum"] = entry.logprob_sum
    if entry.ended is not None:
        document["told"] = _object(entry.ended)
    return document


def _object(record: Any) -> dict[str, Any]:
    """The fields of a record by name, less those that are as they are by default."""
    found: dict[str, Any] = {}
    for each in fields(record):
        value = getattr(record, each.name)
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if type(value) is not type(default) or value != default:
            found[each.name] = value
    return found


def _header(path: str, document: dict[str, Any]) -> Header:
    if document.pop("format", None) != FORMAT:
        _bad(path, f'its first line has no `"format": "{FORMAT}"`')
    version = document.pop("version", None)
    if version != VERSION:
        _bad(path, f"it is of version {version}, and this is version {VERSION}")
    try:
        header: Header = _built(Header, _HEADER, document)
    except ValueError as error:
        _bad(path, f"its first line is not right: {error}")
    if not header.inputs or min(header.lanes, header.page_size, header.chunk) < 1 or header.pages == 0:
        _bad(path, "its first line is not right: it has no inputs or no machine")
    return header


def _decode(path: str, document: dict[str, Any], number: int) -> LogEntry:
    try:
        kind, checks = _EVENTS[_one_of(*_EVENTS)(document.pop("is", None))]
        thread = _many(_STR)(document.pop("thread", None))
        rounds = _many(_STR)(document.pop("rounds", []))
        besides: dict[str, Any] = {}
        for field_name, written in _BESIDES_AS.items():
            if written in document:
                besides[field_name] = document.pop(written)
        event = _built(kind, checks, document, **({} if kind is RunEnded else {"path": (*thread, *rounds)}))
        entry: LogEntry = _built(LogEntry, _BESIDES, besides, thread=thread, event=event)
    except ValueError as error:
        _bad(path, f"line {number} is not right{': ' if str(error) else ''}{error}")
    return entry


def _built(kind: Callable[..., Any], checks: Mapping[str, Check], given: Mapping[str, Any], **known: Any) -> Any:
    """A record of checked fields. Raises ValueError naming the field."""
    values = dict(known)
    for name, value in given.items():
        if name not in checks:
            raise ValueError(f"there is no field `{name[:40]}`")
        try:
            values[name] = checks[name](value)
        except (ValueError, TypeError) as error:
            raise ValueError(str(error) or f"`{name}`") from None
    try:
        return kind(**values)
    except TypeError:
        raise ValueError("fields are missing") from None


# --- errors


def _refuse(code: str, message: str, help: str) -> NoReturn:
    raise PlanError(Diagnostic(code, message, help=help)) from None


def _bad(path: str, what: str) -> NoReturn:
    _refuse("bad-journal", f"`{path}` is no journal that a run can go on from: {what}", "run the plan anew")


def _cannot_write(path: str, error: Exception) -> NoReturn:
    _refuse(
        "journal-write",
        f"the journal `{path}` can't be written: {_reason(error)}",
        f"what it holds is good: make room, then `anabranch resume {path}`",
    )


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


__all__ = ["Contents", "Header", "Journal", "read_journal", "read_runs"]
