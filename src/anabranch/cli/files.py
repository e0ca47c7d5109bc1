"""Files that a command writes: whole, or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from anabranch.cli.errors import fail

_READABLE = 0o666


def check_writable(file: str) -> None:
    """Find out before long work whether `file` could be written after it. Raises PlanError `unwritable-file`."""
    target = Path(os.path.realpath(file))
    if target.is_dir():
        fail("unwritable-file", f"`{file}` is a directory", "name a file")
    if not target.parent.is_dir():
        fail("unwritable-file", f"`{file}` can't be written: there is no directory `{target.parent}`", "make it first")
    if not os.access(target if _is_special(target) else target.parent, os.W_OK):
        fail("unwritable-file", f"`{file}` can't be written: permission denied", "check the path and its permissions")


def write_whole(file: str, content: bytes) -> None:
    """Put `content` in place of what `file` holds, whole or not at all; a link stays a link, and so does a device.

    Raises PlanError `unwritable-file`.
    """
    target = Path(os.path.realpath(file))
    scratch = ""
    try:
        if _is_special(target):
            with open(target, "wb") as out:
                out.write(content)
            return
        handle, scratch = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        with os.fdopen(handle, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(scratch, target.stat().st_mode & 0o7777 if target.exists() else _READABLE & ~_umask())
        os.replace(scratch, target)
    except OSError as error:
        fail("unwritable-file", f"`{file}` can't be written: {error.strerror or error}", "it is as it was")
    finally:
        # After the rename there is nothing of that name.
        if scratch and os.path.exists(scratch):
            os.unlink(scratch)


def _is_special(target: Path) -> bool:
    """Whether it is there and no plain file: a terminal, a pipe, `/dev/null`."""
    return target.exists() and not stat.S_ISREG(target.stat().st_mode)


def _umask() -> int:
    # It can be read only by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
