"""Canonical text, formatting and the syntax tree's dump."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.dsl import ast
from anabranch.dsl.diagnostics import Source
from anabranch.dsl.parse import parse_text
from anabranch.dsl.printer import dump_ast, format_source, print_plan
from tests import strategies_ast as strategies

_SETTINGS = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@given(strategies.programs())
@_SETTINGS
def test_printed_programs_read_back(program: ast.Program) -> None:
    """parse(print(p)) == p, and printing again gives the same text."""
    text = print_plan(program)
    again = parse_text(text)
    assert again == program
    assert print_plan(again) == text
