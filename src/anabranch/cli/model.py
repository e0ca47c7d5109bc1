"""`anabranch model get`: fetch a model that has a name here."""

from __future__ import annotations

import typer

from anabranch.cli.errors import fail
from anabranch.dsl.diagnostics import did_you_mean

KNOWN = ("smollm2",)


def get(name: str) -> None:
    """Fetch and convert the model called `name`, and print its folder. Raises PlanError."""
    if name not in KNOWN:
        fail("no-model", f"there is no model `{name}` to get", did_you_mean(name, KNOWN) or "`smollm2`")
    from anabranch.runtime.smollm2 import get_smollm2

    typer.echo(str(get_smollm2()))
