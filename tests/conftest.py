"""Shared by all tests: where their helper modules lie, and `--update` for the documents in `tests/cases`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# With --import-mode=importlib a test's folder is not on the path, and tests share strategies.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update` writes what a document's plan gives now into the document."""
    parser.addoption("--update", action="store_true", help="rewrite the expectations in tests/cases/*.md")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left with one of them at the end."""
    longest = ("test_aliasing_", "test_schedules_", "test_device.py", "test_kernels_aot", "test_kernel_")
    items.sort(key=lambda item: not item.path.name.startswith(longest))
