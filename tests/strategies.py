"""Plans as Hypothesis draws them: valid, small enough for the random test model, and varied in what they join.

    cases()            plans with their inputs
    classify(program)  what a plan holds: a stitch of several branches, nested forks, a way to fail or be cancelled

Every plan passes the checker and prints as plan text. Widths are 1 to 4, `max` 1 to 6, forks nest at most three deep,
and `fuel` bounds the tokens of a plan in the worst case, so that one dense forward pass over its run stays cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypeVar

from hypothesis import strategies as st

from anabranch.dsl import ast
from anabranch.dsl.ast import Apply, Arg, Binary, Bool, Expr, Float, Index, Int, List, Name, Option, Str
from anabranch.dsl.printer import print_plan
from anabranch.dsl.spec import Value

Kind: TypeAlias = Literal["text", "word", "int", "float", "bool", "texts", "words", "ints", "floats", "bools", "other"]
"""What is known of a value: `word` is a text of a fixed form; plurals are lists; `other` can be interpolated alone."""

_LIST_OF: dict[Kind, Kind] = {"text": "texts", "word": "words", "int": "ints", "float": "floats", "bool": "bools"}
_ITEM_OF: dict[Kind, Kind] = {many: one for one, many in _LIST_OF.items()}

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """A plan file (the last plan is the one to run) and inputs for it."""

    program: ast.Program
    inputs: dict[str, Value]

    def __repr__(self) -> str:
        return f"inputs = {self.inputs!r}\n{print_plan(self.program)}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How Hypothesis shows a failing example."""
        printer.text(repr(self))


@dataclass(frozen=True)
class Traits:
    """What a plan's text holds. Whether it comes to pass is for the run's events to say."""

    stitches_several: bool
    nests_forks: bool
    may_fail: bool


@st.composite
def cases(draw: st.DrawFn, *, fuel: int = 90, max_depth: int = 3) -> Case:
    """Plans with inputs. fuel: most tokens that a plan decodes in the worst case, roughly."""
    maker = _Maker(draw, fuel, max_depth)
    plans = []
    if maker.chance(25):
        plans.append(maker.helper())
    plans.append(maker.main())
    return Case(ast.Program(tuple(plans)), maker.inputs())


def classify(program: ast.Program) -> Traits:
    """The traits of the last plan of `program` and of those it calls."""
    joins = [stmt for plan in program.plans for stmt in _walk(plan.body) if isinstance(stmt, _FORKS)]
    return Traits(
        stitches_several=any(_stitches_several(stmt) for stmt in joins),
        nests_forks=any(isinstance(inner, _FORKS) for stmt in joins for body in _bodies(stmt) for inner in _walk(body)),
        may_fail=any(_may_fail(stmt) for plan in program.plans for stmt in _walk(plan.body)),
    )


_FORKS = (ast.Fork, ast.Branches, ast.Map)


def _bodies(stmt: ast.Stmt) -> tuple[ast.Block, ...]:
    match stmt:
        case ast.Fork(body=body) | ast.Map(body=body) | ast.Reduce(body=body) | ast.Loop(body=body):
            return (body,)
        case ast.Branches(branches=branches):
            return tuple(branch.body for branch in branches)
        case ast.If(then=then, orelse=orelse):
            return (then,) if orelse is None else (then, orelse)
        case _:
            return ()


def _walk(block: ast.Block) -> Iterator[ast.Stmt]:
    for stmt in block.stmts:
        yield stmt
        for body in _bodies(stmt):
            yield from _walk(body)


def _width(stmt: ast.Stmt) -> int:
    match stmt:
        case ast.Fork(width=Int(value=width)):
            return width
        case ast.Branches(branches=branches):
            return len(branches)
        case _:
            return 2  # known at run time alone


def _stitches_several(stmt: ast.Fork | ast.Branches | ast.Map) -> bool:
    join = stmt.join
    if join is None or join.context is None or join.context.kind != "stitch" or _width(stmt) < 2:
        return False
    value = join.value
    if value is None or value.kind == "all":
        return True
    return value.kind == "first" and value.count != Int(1)


def _may_fail(stmt: ast.Stmt) -> bool:
    match stmt:
        case ast.Need():
            return True
        case (
            ast.Fork(join=ast.Join(value=value))
            | ast.Branches(join=ast.Join(value=value))
            | ast.Map(join=ast.Join(value=value))
        ):
            return value is not None and value.kind in ("first", "quorum")
        case _:
            return False


@dataclass
class _Block:
    """A block while it is written.

    names: what may be read here; own: what this block itself has bound
    continues: whether a gen without a prompt has something to go on from
    inside: product of the widths and rounds around the block
    depth: forks around it; budgeted: whether a budget is set around it
    chat: whether the context has an assistant's turn that another turn may close and a text open again
    """

    names: dict[str, Kind]
    continues: bool
    inside: int
    depth: int
    budgeted: bool = False
    chat: bool = False
    stmts: list[ast.Stmt] = field(default_factory=list)
    own: dict[str, Kind] = field(default_factory=dict)

    def add(self, stmt: ast.Stmt) -> None:
        self.stmts.append(stmt)

    def bind(self, name: str, kind: Kind) -> None:
        self.names[name] = kind
        self.own[name] = kind

    def done(self) -> ast.Block:
        return ast.Block(tuple(self.stmts))


class _Maker:
    """Writes one plan file; every choice is drawn."""

    def __init__(self, draw: st.DrawFn, fuel: int, max_depth: int) -> None:
        self.draw = draw
        self.fuel = fuel
        self.max_depth = max_depth
        self.num_names = 0
        self.helpers: list[ast.PlanDef] = []

    # --- choices; the first of a list is the simplest, to which a failing example shrinks

    def chance(self, percent: int) -> bool:
        return self.draw(st.integers(0, 99)) >= 100 - percent

    def pick(self, options: Sequence[T]) -> T:
        return self.draw(st.sampled_from(options))

    def weighted(self, options: Sequence[tuple[int, T]]) -> T:
        return self.pick([option for weight, option in options for _ in range(weight)])

    def number(self, least: int, most: int) -> int:
        return self.draw(st.integers(least, max(least, most)))

    def name(self) -> str:
        self.num_names += 1
        return f"x{self.num_names}"

    def of_kind(self, block: _Block, *kinds: Kind) -> list[str]:
        return [name for name, kind in block.names.items() if kind in kinds]

    # --- plans

    def inputs(self) -> dict[str, Value]:
        words = st.text(st.sampled_from("ab é1.\n#{"), max_size=5)
        return {
            "q": self.draw(words),
            "n": self.number(1, 3),
            "xs": self.draw(st.lists(words, min_size=self.pick([2, 1]), max_size=3)),
        }

    def helper(self) -> ast.PlanDef:
        """A small plan that others call."""
        block = _Block({"a": "text"}, False, 2, 2)
        self.statements(block, 1, 2)
        plan = ast.PlanDef("aid", (ast.Param("a", _call("text", Int(12))),), (), self.ended(block)[0])
        self.helpers.append(plan)
        return plan

    def main(self) -> ast.PlanDef:
        block = _Block({"q": "text", "n": "int", "xs": "texts"}, False, 1, 0)
        params = (
            ast.Param("q", _call("text", Int(12))),
            ast.Param("n", Name("int")),
            ast.Param("xs", _call("list", Int(3), _call("text", Int(12)))),
        )
        options: list[Option] = []
        if self.chance(8):
            options.append(Option("budget", Int(self.number(1, 40))))
            block.budgeted = True
        if self.chance(50):
            block.add(ast.Write("user", self.text(block)))
            block.continues = block.chat = True
        self.statements(block, 0, 2)
        self.forking(block)
        self.statements(block, 1, 3)
        if self.chance(60):
            self.gen(block)
        return ast.PlanDef("main", params, tuple(options), self.ended(block)[0])

    def ended(self, block: _Block) -> tuple[ast.Block, Kind]:
        """The block with or without a `return`, and the kind of its value."""
        if not block.stmts:
            self.text_statement(block)
        known = [(name, kind) for name, kind in block.own.items() if kind != "other"]
        if known and self.chance(70):
            name, kind = self.pick(known)
            block.add(ast.Return(Name(name)))
            return block.done(), kind
        return block.done(), "text"

    # --- statements

    def statements(self, block: _Block, least: int, most: int) -> None:
        for _ in range(self.number(least, most)):
            self.statement(block)

    def statement(self, block: _Block) -> None:
        may_fork = block.depth < self.max_depth and block.inside <= 6 and self.fuel > 0
        options: list[tuple[int, Callable[[_Block], None]]] = [(5, self.gen), (3, self.text_statement), (1, self.let)]
        if may_fork:
            options += [(7, self.forking), (2, self.reduce)]
        if block.inside <= 6 and self.fuel > 0:
            options += [(1, self.loop), (2, self.condition)]
        if block.depth:
            options.append((1, self.need))
        if block.chat:
            options.append((1, self.turn))
        if self.helpers and may_fork:
            options.append((2, self.call))
        self.weighted(options)(block)

    def text_statement(self, block: _Block) -> None:
        block.add(ast.Write("text", self.text(block)))
        block.continues = True

    def turn(self, block: _Block) -> None:
        """A whole turn in the middle, and the assistant's opened again behind it."""
        block.add(ast.Write(self.pick(["user", "system", "assistant"]), self.text(block)))
        self.text_statement(block)

    def text(self, block: _Block) -> Str:
        """A string that is never empty and whose first character is no space."""
        parts: list[Any] = [self.pick(["a", "So: ", "The é", "x\n", "go on", "1.", "q  "])]
        names = [name for name, kind in block.names.items()]
        if names and self.chance(45):
            name = self.pick(names)
            link: Any = Name(name)
            if block.names[name] in _ITEM_OF and self.chance(25):
                link = Index(link, Int(0))
            parts.append(link)
            if self.chance(40):
                parts.append(self.pick([" ", ".", " and "]))
        return Str(tuple(parts))

    def gen(self, block: _Block) -> None:
        name = self.name()
        kind, options = self.typed()
        prompt = None if block.continues and self.chance(45) else self.text(block)
        self.spend(block, options)
        block.add(ast.Gen(name, prompt, tuple(options)))
        block.bind(name, kind)
        block.continues = True

    def typed(self) -> tuple[Kind, list[Option]]:
        """A gen's kind and its options."""
        form = self.weighted(
            [
                (8, "text"),
                (3, "int"),
                (3, "choice"),
                (1, "bool"),
                (1, "float"),
                (2, "lines"),
                (1, "regex"),
                (1, "logprob"),
            ]
        )
        options: list[Option] = []
        kind: Kind = "text"
        least, most = 1, 5
        match form:
            case "text":
                self.text_options(options)
            case "int":
                kind, least = "int", 2
                options.append(Option("type", Name("int")))
            case "choice":
                kind, least = "word", 3
                options.append(Option("type", _call("choice", Str(("yes",)), Str(("no",)))))
            case "logprob":
                kind, least = "word", 3
                by = Arg("by", Str(("logprob",)))
                options.append(Option("type", Apply("choice", (Arg(None, Str(("a",))), Arg(None, Str(("the",))), by))))
            case "bool":
                kind, least = "bool", 5
                options.append(Option("type", Name("bool")))
            case "float":
                kind, least = "float", 3
                options.append(Option("type", Name("float")))
            case "lines":
                kind, least, most = "texts", 5, 6
                options.append(Option("type", _call("lines", Int(1), Int(self.number(1, 3)))))
            case "regex":
                kind, least = "word", 3
                options.append(Option("type", _call("regex", Str(("[ab]{1,3}",)))))
        options.append(Option("max", Int(self.number(least, max(least, most)))))
        if self.chance(25):
            options.append(Option("temperature", self.pick([Int(0), Float(0.7), Int(3)])))
        if self.chance(10):
            options.append(
                self.pick([Option("top_k", Int(5)), Option("top_p", Float(0.9)), Option("min_p", Float(0.05))])
            )
        if self.chance(8):
            options.append(
                self.pick([Option("repetition_penalty", Float(1.3)), Option("presence_penalty", Float(0.5))])
            )
        if self.chance(5):
            options.append(Option("seed", Int(7)))
        return kind, options

    def text_options(self, options: list[Option]) -> None:
        if self.chance(25):
            stops = self.pick([("e",), ("\n",), (". ",), ("a", " s"), ("the",)])
            value: Expr = Str((stops[0],)) if len(stops) == 1 else List(tuple(Str((stop,)) for stop in stops))
            options.append(Option("stop", value))
        elif self.chance(12):
            forced: list[Expr] = [Str(("ok",)), List((Str(("a",)), Str((" b",)))), _call("ids", Int(97), Int(98))]
            options.append(Option("recorded", self.pick(forced)))

    def spend(self, block: _Block, options: Sequence[Option]) -> None:
        most = next(o.value.value for o in options if o.name == "max" and isinstance(o.value, Int))
        self.fuel -= most * block.inside

    def let(self, block: _Block) -> None:
        name = self.name()
        forms: list[tuple[Expr, Kind]] = [(Int(2), "int"), (Str(("t",)), "text")]
        for number in self.of_kind(block, "int"):
            forms.append((Binary("+", Name(number), Int(1)), "int"))
            forms.append((Binary("*", Int(2), Binary("-", Name(number), Int(3))), "int"))
            forms.append((Binary("/", Int(6), Name(number)), "float"))
        for text in self.of_kind(block, "text", "word"):
            forms.append((Binary("+", Name(text), Str(("!",))), "text"))
        for items in self.of_kind(block, *_ITEM_OF):
            forms.append((_call("len", Name(items)), "int"))
            forms.append((Index(Name(items), Int(0)), _ITEM_OF[block.names[items]]))
        value, kind = self.pick(forms)
        block.add(ast.Let(name, value))
        block.bind(name, kind)

    def test(self, block: _Block) -> Expr:
        """A bool."""
        forms: list[Expr] = [Bool(True)]
        for name, kind in block.names.items():
            match kind:
                case "int" | "float":
                    forms.append(Binary(self.pick([">", "<=", "!="]), Name(name), Int(self.number(0, 2))))
                case "bool":
                    forms.append(Name(name))
                case "word":
                    forms.append(Binary("==", Name(name), Str(("yes",))))
                case "text":
                    forms.append(Binary("!=", Name(name), Str(("e",))))
                case "texts" | "words":
                    forms.append(Binary("<", _call("len", Name(name)), Int(2)))
                    forms.append(_call("in", Str(("a",)), Name(name)))
                case _:
                    pass
        # The latest name is the most telling; it stands last.
        found = forms[-1] if self.chance(50) else self.pick(forms)
        if self.chance(20):
            other = self.pick(forms)
            found = Binary(self.pick(["&&", "||"]), found, other)
        return ast.Unary("!", found) if self.chance(15) and not isinstance(found, Binary) else found

    def need(self, block: _Block) -> None:
        block.add(ast.Need(self.test(block)))

    def condition(self, block: _Block) -> None:
        arms = []
        for _ in range(2 if self.chance(50) else 1):
            arm = replace(block, names=dict(block.names), stmts=[], own={})
            self.statements(arm, 1, 2)
            arms.append(arm)
        block.add(ast.If(self.test(block), arms[0].done(), arms[1].done() if len(arms) == 2 else None))
        block.continues = block.continues and all(arm.continues for arm in arms)

    def loop(self, block: _Block) -> None:
        rounds = self.number(1, 3)
        body = replace(block, continues=False, inside=block.inside * rounds, stmts=[], own={})
        body.names = dict(block.names)
        self.statements(body, 1, 2)
        again = self.of_kind(block, "int")
        carried = [name for name in again if name in block.own]
        if carried and self.chance(50):
            body.add(ast.Let(carried[0], Binary("+", Name(carried[0]), Int(1))))
        until = self.test(body) if self.chance(60) else None
        block.add(ast.Loop(Int(rounds), body.done(), until))
        for name, kind in body.own.items():
            block.bind(name, kind)
        block.continues = body.continues

    # --- forks

    def forking(self, block: _Block) -> None:
        self.weighted([(4, self.fork), (4, self.branches), (3, self.map)])(block)

    def child(self, block: _Block, width: int, options: Sequence[Option] = ()) -> _Block:
        written = {option.name for option in options}
        fresh = "fresh" in written
        return _Block(
            names=dict(block.names),
            continues=block.continues and not fresh,
            inside=block.inside * width,
            depth=block.depth + 1,
            budgeted=block.budgeted or "budget" in written,
            chat=block.chat and not fresh,
        )

    def width(self, block: _Block) -> int:
        least = 2 if block.depth == 0 and self.chance(80) else 1
        return self.number(least, max(least, min(4, 8 // block.inside)))

    def fork(self, block: _Block) -> None:
        width = self.width(block)
        dynamic = self.chance(12) and block.inside <= 2
        if dynamic:
            width = 3
        fresh, options = self.fork_options(block, width)
        child = self.child(block, width, options)
        index = self.name() if self.chance(30) else None
        if index is not None:
            child.names[index] = "int"
        self.body(child)
        join, key = self.join(width, fresh=fresh, several=not dynamic, outer=block.depth == 0)
        self.ensure_key(child, key)
        body, kind = self.ended(child)
        yields = self.yields(join, kind, child, labelled=False)
        options += self.fallback(yields)
        if dynamic:
            options.append(Option("upto", Int(3)))
        name = self.name()
        size: Expr = Name("n") if dynamic and "n" in block.names else Int(width)
        if dynamic and "n" not in block.names:
            options = [option for option in options if option.name != "upto"]
        block.add(ast.Fork(name, index, size, tuple(options), body, join))
        self.joined(block, name, yields, join, width, [child], options)

    def branches(self, block: _Block) -> None:
        width = self.width(block)
        fresh, options = self.fork_options(block, width)
        join, key = self.join(width, fresh=fresh, several=True, outer=block.depth == 0)
        share = self.weighted([(2, False), (1, True)])
        written = []
        children = []
        kinds = []
        for _ in range(width):
            child = self.child(block, width, options)
            prompt = self.text(child) if self.chance(60) else None
            if prompt is not None:
                child.continues = True
            children.append(child)
            self.body(child)
            if key is not None:
                self.ensure_key(child, key)
                child.add(ast.Return(Name(key)))
                body, kind = child.done(), child.names[key]
            elif share or (join is not None and join.value is not None and join.value.kind != "all"):
                # What is picked among branches must be of one type, whichever is picked.
                body, kind = child.done(), "text"
            else:
                body, kind = self.ended(child)
            kinds.append(kind)
            options_here = (Option("retry", Int(1)),) if self.chance(12) else ()
            written.append(ast.Branch(self.name(), prompt, options_here, body))
        kind = kinds[0] if len(set(kinds)) == 1 else "other"
        yields = self.yields(join, kind, child, labelled=True)
        options += self.fallback(yields)
        name = self.name()
        block.add(ast.Branches(name, tuple(options), tuple(written), join))
        self.joined(block, name, yields, join, width, children, options)

    def map(self, block: _Block) -> None:
        sources = self.of_kind(block, "texts", "words", "ints")
        if sources and self.chance(70):
            over: Expr = Name(self.pick(sources))
            item_kind = _ITEM_OF[block.names[over.id]] if isinstance(over, Name) else "text"
            width = 3
        else:
            width = self.width(block)
            over, item_kind = List(tuple(Str((c,)) for c in "abcd"[:width])), "word"
        fresh, options = self.fork_options(block, width)
        if isinstance(over, Name):
            options.append(Option("upto", Int(4)))
        child = self.child(block, width, options)
        item = self.name()
        child.names[item] = item_kind
        index = self.name() if self.chance(25) else None
        if index is not None:
            child.names[index] = "int"
        self.body(child)
        # How many items there are is not known, so that no count above one may be asked for.
        join, key = self.join(
            1 if isinstance(over, Name) else width,
            fresh=fresh,
            several=not isinstance(over, Name),
            outer=block.depth == 0,
        )
        self.ensure_key(child, key)
        body, kind = self.ended(child)
        yields = self.yields(join, kind, child, labelled=False)
        options += self.fallback(yields)
        name = self.name()
        block.add(ast.Map(name, index, item, over, tuple(options), body, join))
        self.joined(block, name, yields, join, width, [child], options)

    def body(self, child: _Block) -> None:
        self.statements(child, 1, 2 if child.depth > 1 else 3)

    def fork_options(self, block: _Block, width: int) -> tuple[bool, list[Option]]:
        """(whether the branches start fresh, the options)."""
        options: list[Option] = []
        fresh = self.chance(6 if block.depth == 0 else 12)
        if fresh:
            options.append(Option("fresh", Bool(True)))
        if width > 1 and self.chance(20):
            options.append(Option("limit", Int(self.number(1, width))))
        if not block.budgeted and self.chance(8):
            options.append(Option("budget", Int(self.number(width, 6 * width))))
        if self.chance(12):
            options.append(Option("retry", Int(self.number(1, 2))))
        return fresh, options

    def join(self, width: int, *, fresh: bool, several: bool, outer: bool) -> tuple[ast.Join | None, str | None]:
        """A join, and the key that its branches must bind (None where it has none).

        several: whether a count above one may be asked for; outer: the fork is in no other, and stitches more often
        """
        stitch = 20 if outer else 6
        context = self.weighted([(2, "drop"), (2, "text")] if fresh else [(2, "drop"), (2, "text"), (stitch, "stitch")])
        positions = self.pick(["max", "sum"]) if context == "stitch" else "max"
        many = 20 if outer else 6
        kind = self.weighted([(many, "all"), (3, "first"), (2, "vote"), (2, "best"), (1, "logprob"), (1, "quorum")])
        key: str | None = None
        count: Expr | None = None
        by: Any = None
        match kind:
            case "all":
                if self.chance(60 if outer else 35):
                    count = Int(self.number(1, width))
            case "first":
                count = Int(self.number(1, width) if several else 1)
            case "vote":
                key, by = self.name(), self.pick([None, "casefold", "number"])
            case "best":
                key = self.name()
            case "logprob":
                return (
                    ast.Join(ast.JoinValue("best", None, "logprob"), ast.JoinContext(_context(context), positions)),
                    None,
                )
            case "quorum":
                key, count = self.name(), Int(self.number(1, width))
        if kind == "all" and count is None and context == "drop" and self.chance(50):
            return None, None
        value = ast.JoinValue(kind, count, key, by)  # type: ignore[arg-type]
        return ast.Join(value, ast.JoinContext(_context(context), positions)), key

    def ensure_key(self, child: _Block, key: str | None) -> None:
        """Bind the join's key: a small number, so that votes agree and scores differ."""
        if key is None or key in child.own:
            return
        if self.chance(30):
            numbers = self.of_kind(child, "int")
            value: Expr = Name(self.pick(numbers)) if numbers else Int(1)
            child.add(ast.Let(key, value))
        else:
            prompt = None if child.continues else Str(("k: ",))
            options = (Option("type", Name("int")), Option("max", Int(2)))
            self.spend(child, options)
            child.add(ast.Gen(key, prompt, options))
            child.continues = True
        child.bind(key, "int")

    def yields(self, join: ast.Join | None, kind: Kind, child: _Block, *, labelled: bool) -> Kind:
        value = None if join is None else join.value
        if value is None or value.kind == "all":
            return "other" if labelled else _LIST_OF.get(kind, "other")
        if value.kind in ("vote", "quorum"):
            return child.names[value.key or ""]
        if value.kind == "first" and value.count != Int(1):
            return _LIST_OF.get(kind, "other")
        return kind

    def fallback(self, kind: Kind) -> list[Option]:
        literals: dict[Kind, Expr] = {
            "text": Str(("none",)),
            "word": Str(("no",)),
            "int": Int(0),
            "float": Float(0.5),
            "bool": Bool(False),
            "texts": List((Str(("none",)),)),
            "words": List((Str(("no",)),)),
            "ints": List((Int(0),)),
        }
        return [Option("fallback", literals[kind])] if kind in literals and self.chance(45) else []

    def joined(
        self,
        block: _Block,
        name: str,
        kind: Kind,
        join: ast.Join | None,
        width: int,
        children: Sequence[_Block],
        options: Sequence[Option],
    ) -> None:
        has_fallback = any(option.name == "fallback" for option in options)
        block.bind(name, kind)
        # After `text` there may be nothing but what stood before, since the branches' text may be empty.
        if join is not None and join.context is not None and join.context.kind == "stitch":
            value = join.value
            picks = value is not None and value.kind in ("vote", "best", "quorum")
            first = value is not None and value.kind == "first" and value.count == Int(1)
            one = (picks or first or width == 1) and all(child.continues for child in children)
            # With a fallback the context may also be what it was before.
            block.continues = one and (block.continues or not has_fallback)

    def reduce(self, block: _Block) -> None:
        sources = self.of_kind(block, "texts", "words", "ints")
        if not sources:
            self.gen(block)
            return
        over = self.pick(sources)
        child = self.child(block, 3)
        item = self.name()
        child.names[item] = block.names[over]
        child.add(ast.Write("text", Str(("m: ", Name(item)))))
        child.continues = True
        self.gen(child)
        merged = next(reversed(child.own))
        # The value must be of the items' kind, since it is an item of the next level.
        if child.own[merged] != _ITEM_OF[block.names[over]]:
            child.add(ast.Let(self.name(), Index(Name(item), Int(0))))
            merged = f"x{self.num_names}"
        child.add(ast.Return(Name(merged)))
        name = self.name()
        options = [Option("by", Int(self.number(2, 3))), Option("upto", Int(4))]
        block.add(ast.Reduce(name, item, Name(over), tuple(options), child.done()))
        block.bind(name, _ITEM_OF[block.names[over]])

    def call(self, block: _Block) -> None:
        plan = self.pick(self.helpers)
        name = self.name()
        options: list[Option] = []
        if self.chance(30):
            options.append(Option("fresh", Bool(True)))
        if self.chance(15):
            options.append(Option("retry", Int(1)))
        self.fuel -= 10 * block.inside
        block.add(ast.Call(name, plan.name, (Arg(None, self.text(block)),), tuple(options)))
        block.bind(name, "other")


def _context(word: str) -> Any:
    return word


def _call(function: str, *args: Expr) -> Apply:
    return Apply(function, tuple(Arg(None, arg) for arg in args))
