"""Any text as an expression of the language, and back.

A string is raw: no quotes hold every text, and of a `\\r\\n` the `\\r` is lost when a plan's file is read. What one
string can't say, several do, joined with `+`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from anabranch.dsl import ast

_ALONE: Final = re.compile(r'"{3,}|"+\Z|\r(?=\n)')
"""What ends a string: quotes that no triple quotes hold, and the first half of a line end."""

_TERMS: Final = 8
"""How many terms of a sum stand side by side. A sum of n terms then nests log8(n) brackets, and 7 operators in each:
1.5 million terms, more than 16 MiB can hold, stay below the limits of a plan, on top of 24 nested threads."""

Value = str | list[str]


class NotText(ValueError):
    """The expression has no text that is known from the plan alone."""


def literal(parts: str | Sequence[str | ast.Name | ast.Index]) -> ast.Expr:
    """An expression whose value is `parts`, one after the other, and which `print_plan` can write."""
    strings: list[list[str | ast.Name | ast.Index]] = [[]]
    for part in [parts] if isinstance(parts, str) else parts:
        if not isinstance(part, str):
            strings[-1].append(part)
            continue
        done = 0
        for alone in _ALONE.finditer(part):
            if before := part[done : alone.start()]:
                strings[-1].append(before)
            if "\r" in alone[0]:
                strings[-1].append(alone[0])
                strings.append([])
            else:
                strings += [[alone[0]], []]
            done = alone.end()
        if done < len(part):
            strings[-1].append(part[done:])
    terms: list[ast.Expr] = [_string(string) for string in strings if string]
    while len(terms) > 1:
        terms = [_sum(terms[i : i + _TERMS]) for i in range(0, len(terms), _TERMS)]
    return terms[0] if terms else ast.Str(())


def _string(parts: Sequence[str | ast.Name | ast.Index]) -> ast.Str:
    """Adjacent text becomes one part."""
    merged: list[str | ast.Name | ast.Field | ast.Index] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(last := merged[-1], str):
            merged[-1] = last + part
        else:
            merged.append(part)
    return ast.Str(tuple(merged))


def _sum(terms: Sequence[ast.Expr]) -> ast.Expr:
    total = terms[0]
    for term in terms[1:]:
        total = ast.Binary("+", total, term)
    return total


def text_of(expr: ast.Expr, names: Mapping[str, Value]) -> str:
    """The text that `expr` is worth, where `names` holds what is bound. Raises NotText."""
    out: list[str] = []
    waiting: list[ast.Expr] = [expr]
    while waiting:
        match waiting.pop():
            case ast.Str(parts):
                waiting.extend(reversed([ast.Str((p,)) if isinstance(p, str) else p for p in parts[1:]]))
                match parts[:1]:
                    case (str() as text,):
                        out.append(text)
                    case (ast.Name() | ast.Index() | ast.Field() as place,):
                        waiting.append(place)
                    case _:
                        pass
            case ast.Binary("+", left, right):
                waiting += [right, left]
            case ast.Name(name):
                found = names.get(name)
                if not isinstance(found, str):
                    raise NotText(f"`{name}` is no text that the plan tells")
                out.append(found)
            case ast.Index(ast.Name(name), ast.Int(index)):
                items = names.get(name)
                if not isinstance(items, list) or not 0 <= index < len(items):
                    raise NotText(f"`{name}[{index}]` is no text that the plan tells")
                out.append(items[index])
            case _:
                raise NotText("this is no text that the plan tells")
    return "".join(out)
