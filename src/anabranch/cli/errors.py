"""How a command ends badly: a clear message on stderr, and the exit code. Never a traceback for a user's mistake."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

import typer

from anabranch.cli.text import printable
from anabranch.dsl.diagnostics import Diagnostic, PlanError

DONE: Final = 0
FAILED: Final = 1
"""The plan is wrong or failed, or what was given with it is."""
USAGE: Final = 2
"""The command line itself is wrong."""


def fail(code: str, message: str, help: str = "") -> NoReturn:
    """Raise a PlanError that has no place in a plan's text."""
    raise PlanError(Diagnostic(code, message, help=help))


def report(error: PlanError) -> None:
    """Show every diagnostic of `error` on stderr."""
    typer.echo(printable(error.render()), err=True)


@contextmanager
def reporting() -> Iterator[None]:
    """Turn what a command raises into a message and an exit code.

    A broken pipe ends quietly. What nobody foresaw is called a bug of ours, its traceback shown under
    `ANABRANCH_DEBUG=1` alone.
    """
    try:
        yield
    except PlanError as error:
        report(error)
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(FAILED) from None
    except BrokenPipeError:
        # The interpreter flushes stdout on its way out, which would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except OSError as error:
        where = f" `{error.filename}`" if error.filename else ""
        typer.echo(printable(f"error[system]:{where} {error.strerror or error}"), err=True)
        raise typer.Exit(FAILED) from None
    except MemoryError:
        typer.echo("error[out-of-memory]: there is not enough memory\nhelp: lower `--pages` or `--lanes`", err=True)
        raise typer.Exit(FAILED) from None
    except (typer.Exit, typer.BadParameter, typer.Abort):
        raise
    except Exception as error:
        if os.environ.get("ANABRANCH_DEBUG") == "1":
            traceback.print_exc()
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        typer.echo(
            printable(f"error[internal]: this is a bug in anabranch: {said}")
            + "\nhelp: run it again with ANABRANCH_DEBUG=1 for the traceback, and report it",
            err=True,
        )
        raise typer.Exit(FAILED) from None
