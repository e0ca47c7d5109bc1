"""`anabranch` and `python -m anabranch`."""

from __future__ import annotations

from anabranch.cli.app import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
