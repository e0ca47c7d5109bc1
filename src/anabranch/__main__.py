"""`anabranch` and `python -m anabranch`."""

from __future__ import annotations

import gc

# Imports and the grammar make many objects that stay; collecting among them costs a tenth of a short command's time.
gc.set_threshold(50_000)

from anabranch.cli.app import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    main()
