"""What each statement of a plan is called in paths and events.

    site = the name the statement binds, else its kind and place among the statements of its block, from 0: `fork3`

An `if` adds no component to a path, so the unnamed statements of its arms are told apart by a prefix, `if2.` or
`else2.`, which no bound name can hold. Where a block binds a name that another statement's kind and place would give,
the latter ends in a dot; where the body of a loop rebinds one name twice, the second is `x.4`, with its place.
"""

from __future__ import annotations

from typing import assert_never

from anabranch.dsl.ast import (
    Block,
    Branches,
    Call,
    Expand,
    Fork,
    Gen,
    If,
    Let,
    Loop,
    Map,
    Need,
    Reduce,
    Return,
    Stmt,
    Write,
)
from anabranch.dsl.scope import bound_name


def kind(stmt: Stmt) -> str:
    """The word a statement is written with; `let` for an assignment and `call` for a call of a plan."""
    match stmt:
        case Write(role=role):
            return role
        case Gen():
            return "gen"
        case Fork() | Branches():
            return "fork"
        case Map():
            return "map"
        case Reduce():
            return "reduce"
        case Loop():
            return "loop"
        case If():
            return "if"
        case Need():
            return "need"
        case Return():
            return "return"
        case Let():
            return "let"
        case Call():
            return "call"
        case Expand():
            return "expand"
        case _:
            assert_never(stmt)


def sites(block: Block, prefix: str = "") -> tuple[str, ...]:
    """The site of each statement of `block`, unique within it. `prefix` is that of the arm of an `if`, or empty."""
    names = {name for stmt in block.stmts if (name := bound_name(stmt)) is not None}
    found: list[str] = []
    seen: set[str] = set()
    for place, stmt in enumerate(block.stmts):
        site = bound_name(stmt)
        if site is None:
            site = f"{prefix}{kind(stmt)}{place}"
            if site in names:
                site += "."
        elif site in seen:
            site = f"{site}.{place}"
        seen.add(site)
        found.append(site)
    return tuple(found)


def arm_prefix(site: str, place: int, *, orelse: bool) -> str:
    """The prefix of an arm of the `if` at `site`, which stands at `place` of its block: `if2.` or `else2.`."""
    if not orelse:
        return f"{site}."
    stem = site.removesuffix(".").removesuffix(f"if{place}")
    return f"{stem}else{place}."
