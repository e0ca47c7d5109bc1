"""Builds in processes of their own: Triton's compiler is not thread safe, and may end the process that it runs in."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeAlias

from anabranch.kernels.aot import TARGETS, Built, build, shipped_configs
from anabranch.kernels.aot_cover import Job
from anabranch.kernels.shipped import Config

Source: TypeAlias = Sequence[str] | Callable[[], Iterable[Config]]
"""Where a worker finds the configurations, which cannot be sent: modules, or what gives them."""


def _serve(connection: Connection, source: Source, directory: str, keeps_binary: bool) -> None:
    """Answer each (configuration, target), by their names, with its figures or with what went wrong."""
    # A group of its own: Ctrl-C is the parent's, which ends the worker together with the assembler that it runs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgrp()
    # Kernels are imported below: with this set they would be the interpreter's.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = tempfile.tempdir = directory
    configs = {config.name: config for config in (source() if callable(source) else shipped_configs(source))}
    targets = {target.name: target for target in TARGETS}
    while True:
        try:
            name, target = connection.recv()
        except EOFError:
            return
        try:
            # Where the assembler fails Triton prints all of its input; the error says enough.
            with redirect_stdout(io.StringIO()):
                built = build(configs[name], targets[target])
            answer: Built | str = built if keeps_binary else replace(built, binary=None)
        except Exception as error:  # whatever the compiler raises is the finding
            answer = f"{type(error).__name__}: {error}"
        connection.send(answer)


def build_each(
    jobs: Iterable[Job], source: Source, num_workers: int, *, keeps_binary: bool = False
) -> Generator[tuple[Job, Built | str]]:
    """Each job with its figures, or with what went wrong; in the order in which they end.

    source: where the workers find the configurations. Close the iterator to end the workers.
    keeps_binary: whether the machine code comes too
    """
    context = multiprocessing.get_context("spawn")
    left = deque(jobs)
    workers: dict[Connection, BaseProcess] = {}
    busy: dict[Connection, Job] = {}

    def give(connection: Connection) -> None:
        config, target = busy[connection] = left.popleft()
        # A worker that has just died is noticed where its answer is read.
        with suppress(BrokenPipeError):
            connection.send((config.name, target.name))

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        try:
            while left or busy:
                while left and len(workers) < num_workers:
                    ours, theirs = context.Pipe()
                    workers[ours] = context.Process(
                        target=_serve, args=(theirs, source, directory, keeps_binary), daemon=True
                    )
                    workers[ours].start()
                    theirs.close()
                    give(ours)
                ready = wait(list(busy))
                for connection in [each for each in busy if each in ready]:
                    job = busy.pop(connection)
                    try:
                        answer: Built | str = connection.recv()
                    except (EOFError, ConnectionError):
                        ended = workers.pop(connection)
                        ended.join()
                        answer = f"the compiler ended its process, exit code {ended.exitcode}"
                    else:
                        if left:
                            give(connection)
                    yield job, answer
        finally:
            for process in workers.values():
                # It may not have come to its own group yet.
                if process.pid is not None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                process.kill()
            for process in workers.values():
                process.join()
