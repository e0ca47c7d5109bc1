"""Which words are statements, and what shape each has.

The grammar reads `word(args) {block} join(...)` whatever the word; here it becomes a statement, or an error that says
what the word wants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, cast

from anabranch.dsl import ast
from anabranch.dsl.diagnostics import Diagnostic, Span, did_you_mean


@dataclass(frozen=True, slots=True)
class Bind:
    """`name: value`, an argument of `fork`, `map` and `reduce` alone."""

    name: str
    value: ast.Expr
    span: Span


@dataclass(frozen=True, slots=True)
class RawCall:
    """A call that is a statement, or has a `name: value`: no expression."""

    word: str
    args: tuple[ast.Arg | Bind, ...]
    span: Span

    @property
    def word_span(self) -> Span:
        return Span(self.span.start, self.span.start + len(self.word))


@dataclass(frozen=True, slots=True)
class BareCall:
    """`f(x);`: a call of a plan, or of nothing known. Which it is shows when the whole file is read."""

    call: ast.Apply
    span: Span


Item: TypeAlias = ast.Stmt | ast.Branch | BareCall
"""What a block of the text holds; a `Branch` is at home in a fork alone."""


@dataclass(frozen=True, slots=True)
class RawBlock:
    items: tuple[Item, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class After:
    """What follows a block: `join(args)`, `else {block}` or `until(expr)`."""

    word: Literal["join", "else", "until"]
    span: Span
    args: tuple[ast.Arg | Bind, ...] = ()
    block: RawBlock | None = None
    expr: ast.Expr | None = None

    @property
    def word_span(self) -> Span:
        return Span(self.span.start, self.span.start + len(self.word))


@dataclass(frozen=True, slots=True)
class Tail:
    block: RawBlock
    after: After | None


_T = TypeVar("_T")
_Kept: TypeAlias = Literal["block", "no block"]

EXAMPLES = {
    "text": 'text("...");',
    "user": 'user("...");',
    "system": 'system("...");',
    "assistant": 'assistant("...");',
    "gen": 'x = gen("...", max=100);',
    "fork": "x = fork(4) { ... } join(all, drop);",
    "branch": 'a = branch("...") { ... };',
    "map": "x = map(item: items) { ... } join(all, drop);",
    "reduce": "x = reduce(group: items, by=3) { ... };",
    "loop": "loop(3) { ... } until(done);",
    "if": "if (x > 0) { ... } else { ... };",
    "need": "need(x > 0);",
    "return": "return(x);",
    "expand": 'x = expand("...", max=200, depth=1);',
}
"""Every word that is a statement, with how it is written."""

_OWNER = {"join": "`fork` and `map`", "else": "`if`", "until": "`loop`"}
_TAKES = {"fork": "join", "map": "join", "if": "else", "loop": "until"}
_JOIN_VALUES = ("all", "vote", "best", "first", "quorum")
_JOIN_CONTEXTS = ("drop", "text", "stitch")
_BY = ("exact", "casefold", "number")


class Shaper:
    """Turns calls and blocks into statements. What is wrong goes to `report`, and the statement is left out."""

    def __init__(self, report: Callable[[Diagnostic], None]) -> None:
        self._report = report
        self.unresolved: list[ast.Block] = []
        """Blocks with a call that may turn out to call a plan of the file."""

    def block(self, raw: RawBlock) -> ast.Block:
        """A block of statements; a branch in it is out of place."""
        kept: list[ast.Stmt] = []
        unresolved = False
        for item in raw.items:
            if isinstance(item, ast.Branch):
                self._error(
                    "branch-outside-fork",
                    "a `branch` stands directly in a `fork`",
                    Span(item.span.start, item.span.start + len(item.label or "branch")),
                    help="put it in the block of a fork without a width: `x = fork() { a = branch() { ... }; };`",
                )
                continue
            unresolved = unresolved or isinstance(item, BareCall | ast.Let)
            # A bare call stands among the statements until `resolve` has read the whole file.
            kept.append(cast(ast.Stmt, item))
        block = ast.Block(tuple(kept), raw.span)
        if unresolved:
            self.unresolved.append(block)
        return block

    def resolve(self, plans: dict[str, ast.PlanDef]) -> None:
        """Make a `Call` of each call of a plan of the file."""
        for block in self.unresolved:
            stmts = tuple(s for stmt in block.stmts if (s := self._resolved(stmt, plans)) is not None)
            # The block is not yet seen by anyone else: this completes its construction.
            object.__setattr__(block, "stmts", stmts)

    def _resolved(self, stmt: ast.Stmt | BareCall, plans: dict[str, ast.PlanDef]) -> ast.Stmt | None:
        match stmt:
            case BareCall(call, span):
                if call.function in plans:
                    return _plan_call(None, call, plans[call.function], span)
                close = did_you_mean(call.function, [*EXAMPLES, *plans])
                self._error(
                    "unknown-statement",
                    f"`{call.function}` is no statement",
                    Span(call.span.start, call.span.start + len(call.function)),
                    help=close or f"to call a function, bind its value: `x = {call.function}(...);`",
                )
                return None
            case ast.Let(name, ast.Apply() as call, span) if call.function in plans:
                return _plan_call(name, call, plans[call.function], span)
            case _:
                return stmt

    def statement(self, name: str | None, call: RawCall, tail: Tail | None, span: Span) -> Item | None:
        """The statement `name = call tail;`, or None where its shape is wrong (and reported)."""
        word = call.word
        if word == "plan":
            self._error(
                "nested-plan",
                "a plan can't stand inside another plan",
                call.word_span,
                help="is a `}` missing above it?",
            )
            return None
        if word not in EXAMPLES:
            self._error(
                "misplaced-binder",
                f"`{word}` takes no `name: value`",
                _first_bind(call).span,
                help=did_you_mean(word, ("fork", "map", "reduce")) or "only `fork`, `map` and `reduce` do",
            )
            return None
        if not self._tail_fits(call, tail):
            return None
        match word:
            case "text" | "user" | "system" | "assistant":
                value = self._sole_value(name, call)
                return ast.Write(word, value, span) if value is not None else None
            case "need":
                value = self._sole_value(name, call)
                return ast.Need(value, span) if value is not None else None
            case "return":
                value = self._sole_value(name, call)
                return ast.Return(value, span) if value is not None else None
            case "gen" | "expand":
                return self._gen(name, call, span)
            case "loop":
                return self._loop(name, call, _given(tail), span)
            case "if":
                return self._if(name, call, _given(tail), span)
            case "fork":
                return self._fork(name, call, _given(tail), span)
            case "branch":
                return self._branch(name, call, _given(tail), span)
            case "map":
                return self._map(name, call, _given(tail), span)
            case _:
                return self._reduce(name, call, _given(tail), span)

    def _gen(self, name: str | None, call: RawCall, span: Span) -> ast.Stmt | None:
        args = self._args(call, most=1)
        if args is None:
            return None
        prompt = args.values[0] if args.values else None
        if call.word == "gen":
            return ast.Gen(name, prompt, args.options, span)
        return ast.Expand(name, prompt, args.options, span)

    def _loop(self, name: str | None, call: RawCall, tail: Tail, span: Span) -> ast.Stmt | None:
        count = self._sole_value(name, call)
        body = self.block(tail.block)
        if count is None:
            return None
        return ast.Loop(count, body, tail.after.expr if tail.after else None, span)

    def _if(self, name: str | None, call: RawCall, tail: Tail, span: Span) -> ast.Stmt | None:
        cond = self._sole_value(name, call)
        then = self.block(tail.block)
        orelse = self.block(tail.after.block) if tail.after and tail.after.block else None
        return ast.If(cond, then, orelse, span) if cond is not None else None

    def _fork(self, name: str | None, call: RawCall, tail: Tail, span: Span) -> ast.Stmt | None:
        args = self._args(call, most=1, binds=1)
        join = self._join(tail.after)
        if args is None:
            return None
        branches = tuple(item for item in tail.block.items if isinstance(item, ast.Branch))
        if branches:
            self._only_branches(tail.block)
            if args.values or args.binds:
                width = args.binds[0].span if args.binds else args.values[0].span
                self._error(
                    "width-and-branches",
                    "a `fork` has a width or named branches, not both",
                    width,
                    note="this is the width",
                    help="leave the width out: the branches say how many there are",
                )
                return None
            return ast.Branches(name, args.options, branches, join, span)
        body = self.block(tail.block)
        if args.binds and not args.values:
            return ast.Fork(name, args.binds[0].name, args.binds[0].value, args.options, body, join, span)
        if args.values and not args.binds:
            return ast.Fork(name, None, args.values[0], args.options, body, join, span)
        if args.values:
            self._shape("`fork` has one width", call)
        else:
            self._error(
                "bad-arguments",
                "a `fork` needs a width or named branches",
                call.word_span,
                help="write `fork(4) { ... }`, or `fork() { a = branch() { ... }; b = branch() { ... }; }`",
            )
        return None

    def _only_branches(self, block: RawBlock) -> None:
        for item in block.items:
            if not isinstance(item, ast.Branch):
                self._error(
                    "bad-fork",
                    "only branches stand in a `fork` of named branches",
                    item.span,
                    help="move it into a branch, or before the fork",
                )

    def _branch(self, name: str | None, call: RawCall, tail: Tail, span: Span) -> ast.Branch | None:
        args = self._args(call, most=1)
        body = self.block(tail.block)
        if args is None:
            return None
        return ast.Branch(name, args.values[0] if args.values else None, args.options, body, span)

    def _map(self, name: str | None, call: RawCall, tail: Tail, span: Span) -> ast.Stmt | None:
        args = self._args(call, most=1, binds=1)
        join = self._join(tail.after)
        body = self.block(tail.block)
        if args is None:
            return None
        index = args.values[0] if args.values else None
        if not args.binds or not (index is None or isinstance(index, ast.Name)):
            self._shape("`map` names its item: `map(item: items)`, or `map(i, item: items)` with the index", call)
            return None
        item = args.binds[0]
        return ast.Map(name, index.id if index else None, item.name, item.value, args.options, body, join, span)

    def _reduce(self, name: str | None, call: RawCall, tail: Tail, span: Span) -> ast.Stmt | None:
        args = self._args(call, most=0, binds=1)
        body = self.block(tail.block)
        if args is None:
            return None
        if not args.binds:
            self._shape("`reduce` names its group: `reduce(group: items, by=3)`", call)
            return None
        group = args.binds[0]
        return ast.Reduce(name, group.name, group.value, args.options, body, span)

    def _tail_fits(self, call: RawCall, tail: Tail | None) -> bool:
        """Whether a block, and what follows it, are there exactly where the word wants them."""
        word = call.word
        blocks = ("fork", "map", "reduce", "loop", "if", "branch")
        if tail is None and word in blocks:
            self._error("missing-block", f"`{word}` needs a block", call.word_span, help=f"write `{EXAMPLES[word]}`")
            return False
        if tail is not None and word not in blocks:
            self._error(
                "unexpected-block",
                f"`{word}` takes no block",
                Span(tail.block.span.start, tail.block.span.start + 1),
                help=f"write `{EXAMPLES[word]}`; is a `;` missing?",
            )
            return False
        if tail is not None and tail.after is not None and _TAKES.get(word) != tail.after.word:
            after = tail.after
            self._error(
                "misplaced-tail",
                f"`{after.word}` follows {_OWNER[after.word]}, not `{word}`",
                after.word_span,
                help=f"write `{EXAMPLES[word]}`",
            )
            return False
        return True

    def _sole_value(self, name: str | None, call: RawCall) -> ast.Expr | None:
        """The one argument of a statement that has neither a value nor options."""
        word = call.word
        if name is not None:
            self._error(
                "no-value",
                f"`{word}` yields no value to bind to `{name}`",
                call.word_span,
                help=f"write `{EXAMPLES[word]}`",
            )
            return None
        args = self._args(call, most=1)
        if args is None:
            return None
        if args.options:
            option = args.options[0]
            self._error(
                "unknown-option",
                f"`{word}` has no option `{option.name}`",
                option.span,
                help=f"write `{EXAMPLES[word]}`",
            )
            return None
        if not args.values:
            self._shape(f"`{word}` needs one argument", call)
            return None
        return args.values[0]

    def _args(self, call: RawCall, *, most: int, binds: int = 0) -> _Args | None:
        args = _Args([], [], ())
        options: dict[str, ast.Option] = {}
        for arg in call.args:
            if isinstance(arg, Bind):
                args.binds.append(arg)
            elif arg.name is None:
                args.values.append(arg.value)
            elif arg.name in options:
                self._error(
                    "repeated-option",
                    f"option `{arg.name}` is given twice",
                    arg.span,
                    help="keep one of them",
                )
                return None
            else:
                options[arg.name] = ast.Option(arg.name, arg.value, arg.span)
        if len(args.binds) > binds:
            what = f"`{call.word}` takes no `name: value`" if not binds else f"`{call.word}` takes one `name: value`"
            self._error("bad-arguments", what, args.binds[binds].span, help=f"write `{EXAMPLES[call.word]}`")
            return None
        if len(args.values) > most:
            what = f"`{call.word}` takes at most one unnamed argument" if most else f"`{call.word}` takes options alone"
            if binds and not most:
                what = f"`{call.word}` takes no unnamed argument"
            extra = args.values[most]
            self._error("bad-arguments", what, extra.span, help=f"write `{EXAMPLES[call.word]}`")
            return None
        args.options = tuple(options.values())
        return args

    def _join(self, after: After | None) -> ast.Join | None:
        if after is None:
            return None
        value: ast.JoinValue | None = None
        context: ast.JoinContext | None = None
        for arg in after.args:
            if isinstance(arg, Bind) or arg.name is not None:
                self._error(
                    "bad-join",
                    "`join` takes a value and a context, no options",
                    arg.span,
                    help="options such as `limit=` and `deadline=` stand with the `fork` or `map`",
                )
                return None
            word, args = _join_word(arg.value)
            if word in _JOIN_VALUES and value is None and context is None:
                value = self._join_value(word, args, arg.span)
                if value is None:
                    return None
            elif word in _JOIN_CONTEXTS and context is None:
                context = self._join_context(word, args, arg.span)
                if context is None:
                    return None
            else:
                self._join_refused(word, arg.span)
                return None
        return ast.Join(value, context, after.span)

    def _join_refused(self, word: str | None, span: Span) -> None:
        usage = "write `join(value, context)`: `all`, `vote(x)`, `best(x)`, `first(n)` or `quorum(n, x)`, then "
        usage += "`drop`, `text` or `stitch`; either may be left out"
        if word in _JOIN_VALUES or word in _JOIN_CONTEXTS:
            self._error(
                "bad-join", f"`{word}` is out of place: a join has one value, then one context", span, help=usage
            )
            return
        close = did_you_mean(word, (*_JOIN_VALUES, *_JOIN_CONTEXTS)) if word else ""
        what = f"`{word}` is no join" if word else "this is no join"
        self._error("unknown-join", what, span, help=close or usage)

    def _join_value(self, word: str, args: tuple[ast.Arg, ...], span: Span) -> ast.JoinValue | None:
        options = {arg.name: arg for arg in args if arg.name is not None}
        values = [arg.value for arg in args if arg.name is None]
        count: ast.Expr | None = None
        key: ast.Expr | None = None
        by: ast.Expr | None = None
        usage = {
            "all": "`all`, or `all(min=n)` when n of the branches are enough",
            "vote": "`vote(x)` with the name to vote on, or `vote(x, by=casefold)`",
            "best": "`best(x)` with the name that holds the score, or `best(logprob)`",
            "first": "`first(n)` with how many must succeed",
            "quorum": "`quorum(n, x)` with how many must agree, and on which name",
        }[word]
        known = {"all": ("min",), "vote": ("by",), "quorum": ("by",)}.get(word, ())
        match word, values:
            case "all", []:
                count = options["min"].value if "min" in options else None
            case "vote" | "best", [one]:
                key = one
            case "first", [one]:
                count = one
            case "quorum", [one, other]:
                count, key = one, other
            case _:
                self._error("bad-join", f"`{word}` has the wrong arguments", span, help=f"write {usage}")
                return None
        if "by" in options:
            by = options["by"].value
        stray = [name for name in options if name not in known]
        if stray or len(options) + len(values) != len(args):
            what = f"`{word}` has no option `{stray[0]}`" if stray else f"`{word}` has an option twice"
            self._error("bad-join", what, span, help=f"write {usage}")
            return None
        if key is not None and not isinstance(key, ast.Name):
            self._error("bad-join", f"`{word}` reads a name that each branch binds", key.span, help=f"write {usage}")
            return None
        if by is not None and not (isinstance(by, ast.Name) and by.id in _BY):
            close = did_you_mean(by.id, _BY) if isinstance(by, ast.Name) else ""
            self._error(
                "bad-join",
                "`by` is `exact`, `casefold` or `number`",
                by.span,
                help=close or "votes are compared as they stand, without regard to case, or as numbers",
            )
            return None
        return ast.JoinValue(
            word,
            count,
            key.id if key is not None else None,
            cast(Literal["exact", "casefold", "number"], by.id) if by is not None else None,
            span,
        )

    def _join_context(self, word: str, args: tuple[ast.Arg, ...], span: Span) -> ast.JoinContext | None:
        positions: Literal["max", "sum"] = "max"
        if args:
            match args[0].value:
                case ast.Name("max" | "sum" as chosen) if word == "stitch" and len(args) == 1 and args[0].name is None:
                    positions = chosen
                case _:
                    self._error(
                        "bad-join",
                        f"`{word}` has the wrong arguments",
                        span,
                        help="write `drop`, `text`, `stitch`, `stitch(max)` or `stitch(sum)`",
                    )
                    return None
        return ast.JoinContext(cast(Literal["drop", "text", "stitch"], word), positions, span)

    def _shape(self, message: str, call: RawCall) -> None:
        self._error("bad-arguments", message, call.word_span, help=f"write `{EXAMPLES[call.word]}`")

    def _error(self, code: str, message: str, span: Span, *, note: str = "", help: str = "") -> None:
        self._report(Diagnostic(code, message, span, note=note, help=help))


@dataclass(slots=True)
class _Args:
    values: list[ast.Expr]
    binds: list[Bind]
    options: tuple[ast.Option, ...]


def _given(tail: Tail | None) -> Tail:
    """The tail of a statement that `_tail_fits` has seen to have one."""
    if tail is None:
        raise ValueError("a statement with a block has none")
    return tail


def _first_bind(call: RawCall) -> Bind:
    return next(arg for arg in call.args if isinstance(arg, Bind))


def _join_word(value: ast.Expr | RawCall) -> tuple[str | None, tuple[ast.Arg, ...]]:
    """The word of `word` or `word(args)`, with its arguments."""
    match value:
        case ast.Name(id):
            return id, ()
        case ast.Apply(function, args):
            return function, args
        case _:
            return None, ()


def _plan_call(name: str | None, call: ast.Apply, plan: ast.PlanDef, span: Span) -> ast.Call:
    """A named argument is the parameter of that name if the plan has one, else an option."""
    params = {param.name for param in plan.params}
    args = tuple(arg for arg in call.args if arg.name is None or arg.name in params)
    options = tuple(
        ast.Option(arg.name, arg.value, arg.span)
        for arg in call.args
        if arg.name is not None and arg.name not in params
    )
    return ast.Call(name, call.function, args, options, span)
