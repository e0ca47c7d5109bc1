"""Plans as Hypothesis draws them: valid, small, printable, and varied in what they hold.

Every plan passes the checker and prints as plan text. Widths are 0 to 4, `max` is 1 to 16, forks nest at most three
deep, and `fuel` bounds the tokens of a plan in the worst case, so that one dense forward pass over its run stays cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, TypeAlias, TypeVar

from hypothesis import strategies as st

from anabranch.dsl import ast
from anabranch.dsl.ast import Apply, Arg, Binary, Bool, Expr, Field, Float, Index, Int, List, Name, Option, Str
from anabranch.dsl.diagnostics import Span
from anabranch.dsl.spec import Value
from anabranch.testing._plan import Plan

Kind: TypeAlias = Literal["text", "word", "int", "float", "bool", "texts", "words", "ints", "floats", "bools", "other"]
"""What is known of a value: `word` is a text of a fixed form; plurals are lists; `other` can be interpolated alone."""

_LIST_OF: dict[Kind, Kind] = {"text": "texts", "word": "words", "int": "ints", "float": "floats", "bool": "bools"}
_ITEM_OF: dict[Kind, Kind] = {many: one for one, many in _LIST_OF.items()}

T = TypeVar("T")


def plans(*, fuel: int = 90, max_depth: int = 3, deadlines: bool = True) -> st.SearchStrategy[Plan]:
    """Plans with inputs and host functions: every statement, every join, nested, a few failures and cancellations.

    fuel: most tokens that a plan decodes in the worst case, roughly
    max_depth: how deep forks nest, a call of a plan not counted
    deadlines: whether forks may have one; a deterministic engine refuses such plans
    """
    return _plans(fuel, max_depth, deadlines)


@st.composite
def _plans(draw: st.DrawFn, fuel: int, max_depth: int, deadlines: bool) -> Plan:
    maker = _Maker(draw, fuel, max_depth, deadlines)
    main = maker.main()
    functions = {name: FUNCTIONS[name] for name in sorted(maker.called)}
    return Plan(ast.Program((*maker.helpers, main)), maker.inputs(param.name for param in main.params), functions)


def _half(n: int) -> int:
    if n % 2:
        raise ValueError(f"{n} is odd")
    return n // 2


def _first(text: str) -> str:
    if not text:
        raise IndexError("an empty text has no first character")
    return text[0]


FUNCTIONS: Mapping[str, Callable[..., Any]] = {"half": _half, "first_of": _first}
"""The host functions of generated plans: each is pure, and raises for some arguments."""


@cache
def _below(count: int) -> st.SearchStrategy[int]:
    return st.integers(0, count - 1)


_INPUT_WORDS = st.text(st.sampled_from("ab é1.\n#{"), max_size=5)


@st.composite
def _statement(draw: st.DrawFn, maker: _Maker, block: _Block) -> None:
    """One statement, as a unit that shrinking can take out whole."""
    maker.statement(block, draw(_below(100)))


@st.composite
def _main_fork(draw: st.DrawFn, maker: _Maker, block: _Block) -> None:
    """The fork that every plan has, as such a unit."""
    maker.forking(block, draw(_below(11)))


@st.composite
def _branch(draw: st.DrawFn, write: Callable[[int], None]) -> None:
    """One branch of several, as such a unit."""
    write(draw(_below(100)))


@dataclass
class _Frame:
    """What the blocks of one thread have in common.

    may_return: whether a `return` may stand before the end; returned: whether one does
    continues: whether at each of those there was something to go on from
    """

    may_return: bool = False
    returned: bool = False
    continues: bool = True


@dataclass
class _Block:
    """A block while it is written.

    names: what may be read here; own: what this block itself has bound
    fields: of the records among the names, field by field
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
    frame: _Frame = field(default_factory=_Frame)
    fields: dict[str, dict[str, Kind]] = field(default_factory=dict)
    stmts: list[ast.Stmt] = field(default_factory=list)
    own: dict[str, Kind] = field(default_factory=dict)

    def add(self, stmt: ast.Stmt) -> None:
        self.stmts.append(stmt)

    def arm(self) -> _Block:
        """A block inside this one, of the same thread."""
        return replace(self, names=dict(self.names), fields=dict(self.fields), stmts=[], own={})

    def bind(self, name: str, kind: Kind) -> None:
        self.names[name] = kind
        self.own[name] = kind

    def done(self) -> ast.Block:
        return ast.Block(tuple(self.stmts))


class _Maker:
    """Writes one plan file; every choice is drawn."""

    def __init__(self, draw: st.DrawFn, fuel: int, max_depth: int, deadlines: bool) -> None:
        self.draw = draw
        self.fuel = fuel
        self.max_depth = max_depth
        self.deadlines = deadlines
        self.num_names = 0
        self.helpers: list[ast.PlanDef] = []
        self.helper_kind: Kind | None = None
        self.in_helper = False
        self.inherits_max = False
        self.called: set[str] = set()

    # --- choices; the first of a list is the simplest, to which a failing example shrinks

    def chance(self, percent: int) -> bool:
        return self.draw(_below(100)) >= 100 - percent

    def pick(self, options: Sequence[T]) -> T:
        return options[self.draw(_below(len(options)))] if len(options) > 1 else options[0]

    def weighted(self, options: Sequence[tuple[int, T]]) -> T:
        left = self.draw(_below(sum(weight for weight, _ in options)))
        for weight, option in options:
            if left < weight:
                return option
            left -= weight
        raise AssertionError("the weights were summed otherwise")

    def number(self, least: int, most: int) -> int:
        return least + self.draw(_below(most - least + 1)) if most > least else least

    def name(self) -> str:
        self.num_names += 1
        return f"x{self.num_names}"

    def of_kind(self, block: _Block, *kinds: Kind) -> list[str]:
        return [name for name, kind in block.names.items() if kind in kinds]

    # --- plans

    def inputs(self, names: Iterable[str]) -> dict[str, Value]:
        """Values for those of the parameters that the plan has."""
        makers: dict[str, Callable[[], Value]] = {
            "q": lambda: self.draw(_INPUT_WORDS),
            "n": lambda: self.pick([2, 1, 3, 0]),
            "xs": lambda: [self.draw(_INPUT_WORDS) for _ in range(self.pick([2, 1, 3]))],
        }
        return {name: makers[name]() for name in names}

    def helper(self) -> Kind:
        """Write a small plan that others call, and that may call itself; the kind of its value."""
        self.in_helper = True
        inherited, self.inherits_max = self.inherits_max, False
        depth = 2 if self.chance(40) else 0
        block = _Block({"a": "text"}, False, 6 if depth else 2, 2)
        if depth:
            self.gen(block)
            again = block.arm()
            name = self.name()
            again.add(ast.Call(name, "aid", (Arg(None, self.text(again)),), ()))
            block.add(ast.If(self.test(block), again.done(), None))
        self.statements(block, 1, 2)
        body, kind = self.ended(block)
        options = (Option("depth", Int(depth)),) if depth else ()
        self.helpers.append(ast.PlanDef("aid", (ast.Param("a", _call("text", Int(12))),), options, body))
        self.in_helper, self.inherits_max = False, inherited
        return kind

    def main(self) -> ast.PlanDef:
        block = _Block({"q": "text", "n": "int", "xs": "texts"}, False, 1, 0)
        params = [
            ast.Param("q", _call("text", Int(12))),
            ast.Param("n", Name("int")),
            ast.Param("xs", _call("list", Int(3), _call("text", Int(12)))),
        ]
        options: list[Option] = []
        if self.chance(8):
            options.append(Option("budget", Int(self.number(1, 40))))
            block.budgeted = True
        if self.chance(8):
            options.append(Option("max", Int(self.number(1, 4))))
            self.inherits_max = True
        if self.chance(6):
            options.append(Option("temperature", Float(0.5)))
        if self.chance(50):
            block.add(ast.Write("user", self.text(block)))
            block.continues = block.chat = True
        self.statements(block, 0, 2)
        self.draw(_main_fork(self, block))
        self.statements(block, 0, 3)
        # Without a gen after it nothing would read what the fork left in view.
        if self.chance(88):
            self.gen(block)
        body = self.ended(block)[0]
        read: set[str] = set()
        _collect_names(body, read)
        return ast.PlanDef("main", tuple(param for param in params if param.name in read), tuple(options), body)

    def ended(self, block: _Block) -> tuple[ast.Block, Kind]:
        """The block with or without a `return`, and the kind of its value."""
        if not block.stmts and not self.chance(25):
            self.text_statement(block)
        known = [(name, kind) for name, kind in block.own.items() if kind != "other"]
        if block.frame.returned:
            # What a thread yields is of one type, wherever it returns.
            known = [(name, kind) for name, kind in known if kind == "text"]
        if known and self.chance(70):
            name, kind = self.pick(known)
            block.add(ast.Return(Name(name)))
            return block.done(), kind
        return block.done(), "text"

    # --- statements

    def statements(self, block: _Block, least: int, most: int) -> None:
        self.draw(st.lists(_statement(self, block), min_size=least, max_size=most))

    def statement(self, block: _Block, roll: int) -> None:
        """roll: 0 to 99, which statement it is; 0 is the simplest."""
        # A roll means the same whatever stands around it, so that taking something out before it changes nothing
        # here: what may not stand in this place is replaced by a gen.
        may_fork = block.depth < self.max_depth and block.inside <= 6 and self.fuel > 0
        may_nest = block.inside <= 6 and self.fuel > 0
        options: list[tuple[int, bool, Callable[[_Block], None]]] = [
            (10, True, self.text_statement),
            (18, True, self.gen),
            (8, True, self.let),
            (4, block.depth > 0, self.need),
            (4, block.chat, self.turn),
            (8, may_nest, self.condition),
            (4, may_nest, self.loop),
            (28, may_fork, self.forking),
            (8, may_fork, self.reduce),
            (8, may_fork and not self.in_helper, self.call),
        ]
        for weight, may, write in options:
            if roll < weight:
                (write if may else self.gen)(block)
                return
            roll -= weight

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
        name = None if self.chance(8) else self.name()
        kind, fields, options = self.typed(block)
        prompt = None if block.continues and self.chance(45) else self.text(block)
        self.spend(block, options)
        if self.inherits_max and kind == "text" and self.chance(50):
            options = [option for option in options if option.name != "max"]
        block.add(ast.Gen(name, prompt, tuple(options)))
        if name is not None:
            block.bind(name, kind)
            if fields:
                block.fields[name] = fields
        block.continues = True

    def typed(self, block: _Block) -> tuple[Kind, dict[str, Kind], list[Option]]:
        """A gen's kind, the fields of its value where that is a record, and its options."""
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
                # Its masks are the costly ones.
                (1 if block.inside <= 3 else 0, "json"),
            ]
        )
        fields: dict[str, Kind] = {}
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
            case "json":
                schema, kind, fields, least = self.pick(_SCHEMAS)
                most = least + 4
                options.append(Option("type", _call("json", Str((schema,)))))
        options.append(Option("max", Int(self.number(least, max(least, most)))))
        if self.chance(25):
            options.append(Option("temperature", self.pick(_TEMPERATURES)))
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
        if self.chance(6):
            options.append(Option("logprobs", Int(self.number(0, 2))))
        return kind, fields, options

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
        rarer: list[tuple[Expr, Kind]] = []
        for record, fields in block.fields.items():
            rarer += [(Field(Name(record), label), kind) for label, kind in fields.items()]
        for number in self.of_kind(block, "int")[-2:]:
            rarer += [(_call("half", Name(number)), "other"), (ast.Unary("-", Name(number)), "int")]
        for text in self.of_kind(block, "text")[-2:]:
            rarer += [(_call("lines", Name(text)), "other"), (_call("first_of", Name(text)), "other")]
        if rarer and self.chance(50):
            forms = rarer
        value, kind = self.pick(forms)
        if isinstance(value, Apply) and value.function in FUNCTIONS:
            self.called.add(value.function)
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
                    forms.append(_call("matches", Name(name), Str(("[a-m]*",))))
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
            arm = block.arm()
            self.statements(arm, 1, 2)
            arms.append(arm)
        if block.frame.may_return and self.chance(15):
            arms[-1].add(ast.Return(Str(("early",))))
            block.frame.returned = True
            block.frame.continues = block.frame.continues and arms[-1].continues
        block.add(ast.If(self.test(block), arms[0].done(), arms[1].done() if len(arms) == 2 else None))
        block.continues = block.continues and all(arm.continues for arm in arms)

    def loop(self, block: _Block) -> None:
        rounds = self.number(1, 3)
        body = block.arm()
        body.continues, body.inside = False, block.inside * rounds
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

    def forking(self, block: _Block, roll: int | None = None) -> None:
        roll = self.draw(_below(11)) if roll is None else roll
        (self.fork if roll < 4 else self.branches if roll < 8 else self.map)(block)

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
            fields=dict(block.fields),
        )

    def width(self, block: _Block) -> int:
        least = 2 if block.depth == 0 and self.chance(95) else 1
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
        join, key = self.join(width, fresh=fresh, several=not dynamic, outer=block.depth == 0)
        child.frame.may_return = key is None
        self.body(child)
        self.ensure_key(child, key)
        body, kind = self.ended(child)
        yields = self.yields(join, kind, child, labelled=False)
        options += self.fallback(yields)
        if dynamic:
            options.append(Option("upto", Int(3)))
        name = self.bound_name(join)
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
        written: list[ast.Branch] = []
        children: list[_Block] = []
        kinds: list[Kind] = []

        def write(roll: int) -> None:
            own = [Option("retry", Int(1))] if roll >= 88 else []
            if not block.budgeted and "budget" not in {option.name for option in options} and self.chance(4):
                own.append(Option("budget", Int(self.number(1, 6))))
            if (join is None or join.context is None or join.context.kind != "stitch") and self.chance(4):
                own.append(Option("fresh", Bool(True)))
            child = self.child(block, width, [*options, *own])
            prompt = self.text(child) if self.chance(60) else None
            child.continues = child.continues or prompt is not None
            child.frame.may_return = key is None
            children.append(child)
            if key is not None or not self.chance(4):
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
            written.append(ast.Branch(self.name(), prompt, tuple(own), body))

        for _ in range(width):
            self.draw(_branch(write))
        labels = [branch.label for branch in written if branch.label is not None]
        kind = kinds[0] if len(set(kinds)) == 1 else "other"
        yields = self.yields(join, kind, children[-1], labelled=True)
        options += self.fallback(yields)
        name = self.bound_name(join)
        if name is not None and (join is None or join.value is None or join.value.kind == "all"):
            block.fields[name] = dict(zip(labels, kinds, strict=True))
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
        # How many items there are is not known, so that no count above one may be asked for.
        join, key = self.join(
            1 if isinstance(over, Name) else width,
            fresh=fresh,
            several=not isinstance(over, Name),
            outer=block.depth == 0,
        )
        child.frame.may_return = key is None
        self.body(child)
        self.ensure_key(child, key)
        body, kind = self.ended(child)
        yields = self.yields(join, kind, child, labelled=False)
        options += self.fallback(yields)
        name = self.bound_name(join)
        block.add(ast.Map(name, index, item, over, tuple(options), body, join))
        self.joined(block, name, yields, join, width, [child], options)

    def bound_name(self, join: ast.Join | None) -> str | None:
        """A fork without a name is of use for its context alone."""
        keeps = join is not None and join.context is not None and join.context.kind != "drop"
        return None if keeps and self.chance(10) else self.name()

    def body(self, child: _Block) -> None:
        if child.depth == 1 and self.chance(60):
            # A branch without a token leaves nothing to stitch.
            self.gen(child)
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
        options += self.deadline(6)
        return fresh, options

    def deadline(self, percent: int) -> list[Option]:
        if not self.deadlines or not self.chance(percent):
            return []
        return [Option("deadline", Str((self.pick(["20s", "5s", "3m", "1s"]),)))]

    def join(self, width: int, *, fresh: bool, several: bool, outer: bool) -> tuple[ast.Join | None, str | None]:
        """A join, and the key that its branches must bind (None where it has none).

        several: whether a count above one may be asked for; outer: the fork is in no other, and stitches more often
        """
        context = self.weighted([(2, _DROP), (2, _TEXT), (0 if fresh else 76 if outer else 12, _STITCH)])
        if context.kind == "stitch" and self.chance(50):
            context = ast.JoinContext("stitch", "sum")
        many = 34 if outer else 6
        kind = self.weighted([(many, "all"), (3, "first"), (2, "vote"), (2, "best"), (1, "logprob"), (1, "quorum")])
        count: Expr | None = None
        match kind:
            case "all":
                if self.chance(80 if outer else 35):
                    count = Int(self.number(1, width))
                elif context.kind == "drop" and not self.chance(50):
                    return None, None
                return ast.Join(ast.JoinValue("all", count), context), None
            case "first":
                count = Int(self.number(1, width) if several else 1)
                return ast.Join(ast.JoinValue("first", count), context), None
            case "vote":
                key = self.name()
                return ast.Join(ast.JoinValue("vote", None, key, self.pick(_BY)), context), key
            case "best":
                key = self.name()
                return ast.Join(ast.JoinValue("best", None, key), context), key
            case "logprob":
                return ast.Join(ast.JoinValue("best", None, "logprob"), context), None
            case _:
                key = self.name()
                return ast.Join(ast.JoinValue("quorum", Int(self.number(1, width)), key), context), key

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
        name: str | None,
        kind: Kind,
        join: ast.Join | None,
        width: int,
        children: Sequence[_Block],
        options: Sequence[Option],
    ) -> None:
        has_fallback = any(option.name == "fallback" for option in options)
        if name is not None:
            block.bind(name, kind)
        # After `text` there may be nothing but what stood before, since the branches' text may be empty.
        if join is not None and join.context is not None and join.context.kind == "stitch":
            value = join.value
            picks = value is not None and value.kind in ("vote", "best", "quorum")
            first = value is not None and value.kind == "first" and value.count == Int(1)
            one = (picks or first or width == 1) and all(
                child.continues and child.frame.continues for child in children
            )
            # With a fallback the context may also be what it was before.
            block.continues = one and (block.continues or not has_fallback)

    def reduce(self, block: _Block) -> None:
        sources = self.of_kind(block, "texts", "words", "ints")
        if not sources:
            self.gen(block)
            return
        over = self.pick(sources)
        kind = _ITEM_OF[block.names[over]]
        _, options = self.fork_options(block, 2)
        options = [option for option in options if option.name != "limit" or self.chance(50)]
        child = self.child(block, 3, options)
        item = self.name()
        child.names[item] = block.names[over]
        child.add(ast.Write("text", Str(("m: ", Name(item)))))
        child.continues = True
        self.gen(child)
        if self.chance(25):
            self.need(child)
        merged = next(reversed(child.own), None)
        # The value must be of the items' kind, since it is an item of the next level.
        if merged is None or child.own[merged] != kind:
            merged = self.name()
            child.add(ast.Let(merged, Index(Name(item), Int(0))))
        child.add(ast.Return(Name(merged)))
        options += [Option("by", Int(self.number(2, 3))), Option("upto", Int(4)), *self.fallback(kind)]
        name = self.name()
        block.add(ast.Reduce(name, item, Name(over), tuple(options), child.done()))
        block.bind(name, kind)

    def call(self, block: _Block) -> None:
        kind = self.helper_kind = self.helper() if self.helper_kind is None else self.helper_kind
        name = self.name()
        options: list[Option] = []
        if self.chance(30):
            options.append(Option("fresh", Bool(True)))
        if self.chance(15):
            options.append(Option("retry", Int(1)))
        if not block.budgeted and self.chance(10):
            options.append(Option("budget", Int(self.number(1, 12))))
        options += self.deadline(8)
        options += self.fallback(kind)
        self.fuel -= 10 * block.inside
        block.add(ast.Call(name, "aid", (Arg(None, self.text(block)),), tuple(options)))
        block.bind(name, kind)


_TEMPERATURES: tuple[Expr, ...] = (Int(0), Float(0.7), Int(3))
_BY: tuple[Literal["casefold", "number"] | None, ...] = (None, "casefold", "number")
_DROP, _TEXT, _STITCH = ast.JoinContext("drop"), ast.JoinContext("text"), ast.JoinContext("stitch")

_SCHEMAS: tuple[tuple[str, Kind, dict[str, Kind], int], ...] = (
    ('{"type": "integer"}', "int", {}, 2),
    ('{"enum": ["a", "b"]}', "word", {}, 4),
    (
        '{"type": "object", "properties": {"a": {"type": "integer"}}, '
        '"required": ["a"], "additionalProperties": false}',
        "other",
        {"a": "int"},
        10,
    ),
    ('{"type": "array", "items": {"type": "integer"}, "maxItems": 3}', "ints", {}, 5),
)
"""Schemas with the kind of their values, the fields of records, and tokens that are enough for one."""


def _collect_names(node: object, found: set[str]) -> None:
    """Add every name that is read in a piece of syntax."""
    if isinstance(node, Name):
        found.add(node.id)
    elif isinstance(node, tuple):
        for item in node:
            _collect_names(item, found)
    elif hasattr(node, "__slots__") and not isinstance(node, Span):
        for name in node.__slots__:
            _collect_names(getattr(node, name), found)


def _call(function: str, *args: Expr) -> Apply:
    return Apply(function, tuple(Arg(None, arg) for arg in args))
