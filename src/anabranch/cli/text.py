"""Text on its way out: values as a person or a machine reads them, and nothing that moves a terminal's cursor."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

import typer

# C0 and C1 controls but tab and newline, and the marks that turn the direction of text. A model may write any of
# them, and a terminal obeys.
_CONTROLS: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SURROGATES: Final = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with control characters shown as `\\x1b` and the like, and lone surrogates as U+FFFD."""
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub(lambda m: f"\\x{ord(m[0]):02x}", text))


def one_line(text: str, width: int) -> str:
    """The end of `text` on one line of at most `width` characters: what is being written is what one wants to see."""
    # A line never needs more than this of a long text.
    line = " ".join(printable(text[-4 * width :]).split())
    return line if len(line) <= width else "…" + line[-(width - 1) :] if width > 1 else ""


def json_text(document: Any) -> bytes:
    """One JSON document in UTF-8 and a newline.

    JSON has no NaN and no infinity: they become null. A lone surrogate becomes U+FFFD, and an int too long for Python
    to write in decimal its hexadecimal text.
    """
    return json.dumps(_plain(document), ensure_ascii=False, allow_nan=False, indent=1).encode() + b"\n"


def write_json(document: Any) -> None:
    """Write one JSON document to stdout."""
    typer.echo(json_text(document), nl=False)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATES.sub("\ufffd", value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        # Python refuses to write ints of more than 4,300 digits, which is 14,284 bits.
        return value if value.bit_length() < 14_000 else hex(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_plain(str(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return _plain(str(value))
