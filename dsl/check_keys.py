"""On which paths of a branch the key of its join is bound."""

from __future__ import annotations

from dataclasses import dataclass

from anabranch.dsl.ast import (
    Apply,
    Block,
    Bool,
    Expr,
    Float,
    Gen,
    If,
    Int,
    Loop,
    Name,
    Return,
    Str,
)
from anabranch.dsl.scope import bound_name


@dataclass(frozen=True, slots=True)
class KeyPaths:
    """always: bound at every end; sometimes: bound somewhere; gen: the first `gen` that binds it, if one does."""

    always: bool
    sometimes: bool
    gen: Gen | None


def key_paths(block: Block, key: str) -> KeyPaths:
    """Where a branch with the body `block` binds `key` in its own scope."""
    walk = _Walk(key)
    bound = walk.block(block, False)
    return KeyPaths(bound is not False and not walk.missed, walk.found, walk.gen)


class _Walk:
    def __init__(self, key: str) -> None:
        self._key = key
        self.missed = False  # a return was reached without the key
        self.found = False
        self.gen: Gen | None = None

    def block(self, block: Block, bound: bool) -> bool | None:
        """Whether the key is bound after the block, given whether it was before; None where nothing gets there."""
        for stmt in block.stmts:
            if bound_name(stmt) == self._key:
                bound = self.found = True
                if self.gen is None and isinstance(stmt, Gen):
                    self.gen = stmt
            match stmt:
                case Return():
                    self.missed = self.missed or not bound
                    return None
                case Loop(body=body):
                    after = self.block(body, bound)
                    if after is None:
                        return None
                    bound = after
                case If(then=then, orelse=orelse):
                    one = self.block(then, bound)
                    other = bound if orelse is None else self.block(orelse, bound)
                    if one is None and other is None:
                        return None
                    bound = one is not False and other is not False
                case _:
                    pass
        return bound


def show_gen(key: str, gen: Gen | None) -> str:
    """The statement that would bind `key`, after the example of `gen`."""
    written = {} if gen is None else {option.name: _show(option.value) for option in gen.options}
    options = [f"{name}={written[name]}" for name in ("type", "max") if written.get(name)]
    return f"{key} = gen({', '.join(options) if options else 'type=int, max=12'});"


def _show(expr: Expr) -> str:
    """A short option value as it was written; "" for one that a suggestion need not repeat."""
    match expr:
        case Name(id=name):
            return name
        case Int(value=value) | Float(value=value):
            return str(value)
        case Bool(value=value):
            return "true" if value else "false"
        case Str(parts=(str() as text,)) if len(text) < 20 and '"' not in text and "\n" not in text:
            return f'"{text}"'
        case Apply(function=function, args=args) if len(args) <= 4:
            shown = [_show(arg.value) for arg in args]
            if all(shown):
                return f"{function}({', '.join(shown)})"
            return ""
        case _:
            return ""
