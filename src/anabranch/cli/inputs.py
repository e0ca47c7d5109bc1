"""`--input k=v`, `--input k=@file` and `--inputs FILE.jsonl`: the values a plan is given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from anabranch.cli.errors import fail
from anabranch.dsl.ast import PlanDef
from anabranch.dsl.diagnostics import did_you_mean
from anabranch.dsl.spec import Value
from anabranch.dsl.types import AnyType, Text, Type, fits, of_bound, show
from anabranch.dsl.types import of_value as type_of

_JSON_HELP = 'write it as JSON, such as \'xs=["a", "b"]\' or \'n=3\''
