"""How strings are written: raw, in one of three quotes, with `#{...}` for a value.

In a run of `#` directly before a `{`, each `##` stands for one `#`, and a last odd `#` opens an interpolation:
`#{x}` is the value of x, `##{x}` the text `#{x}`, `###{x}` a `#` and the value of x. Anywhere else `#` is itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from anabranch.dsl.ast import Expr, Field, Index, Int, Name, Str
from anabranch.dsl.diagnostics import Diagnostic, Span

_HASHES = re.compile(r"(#+)\{")
_CHAIN = re.compile(r"[a-z_][a-z0-9_]*(?:\.[a-z_][a-z0-9_]*|\[-?[0-9]{1,18}\])*\}")
_LINK = re.compile(r"\.?([a-z_][a-z0-9_]*)|\[(-?[0-9]+)\]")

_MAX_LINKS = 16
"""The longest chain of fields and indices in an interpolation; JSON values are not nested deeper in practice."""

_NEAR = 200
"""How far the `}` of a malformed interpolation is looked for, in characters."""

_MAX_MISTAKES = 20
"""How many malformed interpolations of one string are reported."""

Report = Callable[[Diagnostic], None]


def read_string(quoted: str, start: int, report: Report) -> Str:
    """The string written as `quoted` (quotes included) at offset `start` of its source.

    A malformed interpolation is told to `report` and left out.
    """
    span = Span(start, start + len(quoted))
    width = 3 if quoted.startswith('"""') else 1
    raw = quoted[width:-width]
    if "#{" not in raw:
        return Str((raw,) if raw else (), span)
    parts: list[str | Name | Field | Index] = []
    literal: list[str] = []
    done = 0
    mistakes = 0
    for hashes in _HASHES.finditer(raw):
        pairs, opens = divmod(len(hashes[1]), 2)
        literal.append(raw[done : hashes.start()] + "#" * pairs)
        done = hashes.end() - 1
        if not opens:
            continue
        at = start + width + hashes.end()
        chain = _CHAIN.match(raw, hashes.end())
        value = _chain(chain[0], at) if chain is not None else None
        if chain is None or value is None:
            report(_malformed(raw, hashes.end(), at) if chain is None else _too_long(at))
            mistakes += 1
            if mistakes == _MAX_MISTAKES:
                break
            continue
        done = chain.end()
        if text := "".join(literal):
            parts.append(text)
        literal.clear()
        parts.append(value)
    literal.append(raw[done:])
    if text := "".join(literal):
        parts.append(text)
    return Str(tuple(parts), span)


def _too_long(at: int) -> Diagnostic:
    return Diagnostic(
        "bad-interpolation",
        f"more than {_MAX_LINKS} links in an interpolation",
        Span(at - 2, at),
        help="bind a part of it to a name first",
    )


def _chain(text: str, at: int) -> Name | Field | Index | None:
    """`a.b[0]}` as an expression, or None when it has too many links."""
    value: Name | Field | Index | None = None
    links = 0
    for link in _LINK.finditer(text):
        span = Span(at, at + link.end())
        if value is None:
            value = Name(link[1], span)
        elif link[1] is not None:
            value = Field(value, link[1], span)
        else:
            index = Int(int(link[2]), Span(at + link.start(2), at + link.end(2)))
            value = Index(value, index, span)
        links += 1
    return value if links <= _MAX_LINKS else None


def _malformed(raw: str, inside: int, at: int) -> Diagnostic:
    """What is wrong with the interpolation whose inside begins at `raw[inside]`, offset `at` of the source."""
    # Looking no further than this keeps a text of many such mistakes linear.
    near = raw[inside : inside + _NEAR].partition("\n")[0]
    inner, closed, _ = near.partition("}")
    if not closed:
        return Diagnostic(
            "bad-interpolation",
            "`#{` is never closed",
            Span(at - 2, at),
            help="close it with `}`, or write `##{` for the text `#{`",
        )
    return Diagnostic(
        "bad-interpolation",
        f"`#{{{_clip(inner)}}}` can't be interpolated",
        Span(at - 2, at + len(inner) + 1),
        note="a name, with fields and indices, may stand here",
        help="bind the value to a name first: `#{name}`, `#{x.field}`, `#{x[0]}`; write `##{` for the text `#{`",
    )


def _clip(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "..."


def write_string(string: Str) -> str:
    """`string` as plan text, in the first of `"..."`, `'...'` and triple quotes that can hold it.

    Raises ValueError where none can, and for parts that no interpolation can be.
    """
    raw = "".join(_raw_parts(string))
    if "\n" not in raw:
        if '"' not in raw:
            return f'"{raw}"'
        if "'" not in raw:
            return f"'{raw}'"
    if '"""' not in raw and not raw.endswith('"'):
        return f'"""{raw}"""'
    raise ValueError('no quotes can hold this string: it has both kinds, or ends in `"`, or contains `"""`')


def _raw_parts(string: Str) -> list[str]:
    out: list[str] = []
    for i, part in enumerate(string.parts):
        if not isinstance(part, str):
            out.append("#{" + interpolated(part) + "}")
            continue
        text = _HASHES.sub(lambda m: m[1] * 2 + "{", part)
        if i + 1 < len(string.parts):
            # The run of `#` at the end meets the `#{` of the interpolation that follows.
            bare = text.rstrip("#")
            text += "#" * (len(text) - len(bare))
        out.append(text)
    return out


def interpolated(value: Expr) -> str:
    """A name with its fields and indices, as it stands between `#{` and `}`. Raises ValueError for anything else."""
    links: list[str] = []
    while not isinstance(value, Name):
        match value:
            case Field(inner, name):
                links.append("." + name)
            case Index(inner, Int(number)):
                links.append(f"[{number}]")
            case _:
                raise ValueError("only a name with fields and integer indices can be interpolated")
        value = inner
    links.append(value.id)
    return "".join(reversed(links))
