"""`anabranch fmt`: plan files in canonical form, comments kept."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import typer

from anabranch.cli.errors import FAILED, report
from anabranch.cli.files import write_whole
from anabranch.cli.text import printable
from anabranch.dsl.diagnostics import PlanError
from anabranch.dsl.parse import read_source
from anabranch.dsl.printer import format_source


def format_files(files: Sequence[str], *, only_check: bool, diff: bool) -> None:
    """Rewrite each file that is not in canonical form; a file with an error stays as it is.

    only_check: write nothing, and exit with code 1 if a file would change
    diff: write nothing, and show what would change
    Raises typer.Exit with code 1 where a file has an error, or, under `only_check`, would change.
    """
    good = True
    for file in files:
        try:
            changed = _format_file(file, write=not (only_check or diff), diff=diff)
        except PlanError as error:
            report(error)
            good = False
            continue
        if changed and only_check:
            good = False
            typer.echo(printable(f"would reformat {file}"), err=True)
        elif changed and not diff:
            typer.echo(printable(f"reformatted {file}"), err=True)
    if not good:
        raise typer.Exit(FAILED)


def _format_file(file: str, *, write: bool, diff: bool) -> bool:
    source = read_source(file)
    text = format_source(source)
    # The bytes are compared, since reading drops a byte-order mark and carriage returns.
    changed = Path(file).read_bytes() != text.encode()
    if changed and diff:
        for line in difflib.unified_diff(
            source.text.splitlines(), text.splitlines(), f"{file} (as it is)", f"{file} (canonical)", lineterm=""
        ):
            typer.echo(printable(line))
    if changed and write:
        write_whole(file, text.encode())
    return changed
