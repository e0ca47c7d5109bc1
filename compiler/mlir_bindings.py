"""torch-mlir's Python bindings, imported when they are wanted."""

from __future__ import annotations

import importlib
from typing import Any

from anabranch.dsl.diagnostics import Diagnostic, PlanError


def bindings(module: str) -> Any:
    """The module `torch_mlir.<module>`. Raises PlanError `no-mlir` where it cannot be imported."""
    try:
        return importlib.import_module(f"torch_mlir.{module}")
    except ImportError as error:
        raise PlanError(
            Diagnostic(
                "no-mlir",
                f"this needs torch-mlir, which cannot be imported: {error}",
                help="install it: `pip install 'anabranch[mlir]'`",
            )
        ) from None
