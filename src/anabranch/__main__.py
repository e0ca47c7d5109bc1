"""`anabranch` and `python -m anabranch`."""

from __future__ import annotations

import gc
import os

# Imports and the grammar make many objects that stay; collecting among them costs a tenth of a short command's time.
gc.set_threshold(50_000)
# torch's OpenMP spins at every barrier for longer than a step's work when something else holds a core: a demo of 1.2 s
# took up to 30 s beside one busy process, and mostly 1.2 to 1.5 s with this, on 2 cores.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from anabranch.cli.app import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    main()
