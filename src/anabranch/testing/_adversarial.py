"""Plans of the shapes on which schedules go wrong."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from anabranch.testing._plan import Plan

MOST_WIDE = 1000
MOST_DEEP = 50


def adversarial_plans(*, wide: int = MOST_WIDE, deep: int = MOST_DEEP) -> st.SearchStrategy[Plan]:
    """Plans of the shapes on which schedules go wrong, each of which shrinks to its own smallest.

    Forks of one and of `wide` cheap branches; forks nested `deep`; nothing before a fork; nothing in a branch; branches
    that all fail, with a fallback and without; joins of joins, such as a stitch of stitches or a `sum` inside a `max`;
    branches that write more than all of them have pages for.
    wide: branches at most; deep: forks inside one another at most
    """
    if wide < 1 or not 1 <= deep <= MOST_DEEP:
        raise ValueError(f"forks of {wide} branches, {deep} deep: at least 1, and at most {MOST_DEEP} deep")
    return st.one_of(_fork_of_one(), _empty(), _all_fail(), _join_of_joins(), hungry_plans(), _deep(deep), _wide(wide))


_VALUES = ("all", "first(1)", "vote(v)", "best(v)", "best(logprob)", "quorum(1, v)")
_CONTEXTS = ("drop", "text", "stitch", "stitch(sum)")
_BODIES = ("", 'text("b");', "gen(max=3);", 'gen("b", max=3);', 'text("b"); gen(max=1);')
_PREFIXES = ("", 'text("a");', 'user("a");', 'g = gen("a", max=2);')
# A stitch of several branches leaves no token to go on from, so what follows begins with text.
_AFTER = ("", 'text("z");', 'gen("z", max=2);')

_values = st.sampled_from(_VALUES)
_contexts = st.sampled_from(_CONTEXTS)
_bodies = st.sampled_from(_BODIES)
_prefixes = st.sampled_from(_PREFIXES)
_afters = st.sampled_from(_AFTER)


def _plan(*statements: str) -> Plan:
    return Plan.parse("main = plan() { " + " ".join(statements) + " }")


def _fork(width: int | str, body: str, value: str, context: str, options: str = "", *, level: int = 0) -> str:
    """A fork whose branches bind `v`, where its join asks for one. level: tells the `v` of nested forks apart."""
    if "v)" in value:
        body, value = f"v{level} = 1; {body}", value.replace("v)", f"v{level})")
    return f"fork({width}{options}) {{ {body} }} join({value}, {context});"


@st.composite
def _fork_of_one(draw: st.DrawFn) -> Plan:
    """A fork of one branch, which is the identity under `stitch`."""
    return _plan(draw(_prefixes), _fork(1, draw(_bodies), draw(_values), draw(_contexts)), draw(_afters))


@st.composite
def _empty(draw: st.DrawFn) -> Plan:
    """A fork before which nothing stands, branches in which nothing does, or both, or no branches at all."""
    options = draw(st.sampled_from(["", ", fresh=true"]))
    context = draw(st.sampled_from(["drop", "text"]) if options else _contexts)
    body, after = draw(st.sampled_from(["", "gen(max=2);"])), draw(_afters)
    if draw(st.booleans()):
        # How many branches there are is known only when it runs: perhaps none.
        fork = _fork("n", body, draw(_values), context, ", upto=3" + options)
        plan = Plan.parse(f"main = plan(n: int) {{ {fork} {after} }}")
        return replace(plan, inputs={"n": draw(st.integers(0, 3))})
    return _plan(_fork(draw(st.integers(1, 3)), body, draw(_values), context, options), after)


@st.composite
def _all_fail(draw: st.DrawFn) -> Plan:
    """Every branch fails: before its first token, between two, or at the end; the join falls back, or fails too."""
    width = draw(st.integers(1, 5))
    value = draw(_values)
    body = draw(st.sampled_from(["", "gen(max=3);", 'gen("b", max=2); gen(max=2);']))
    rest = draw(st.sampled_from(["", "gen(max=2);"]))
    yields = "1" if value.startswith(("vote", "quorum")) else '["none"]' if value == "all" else '"none"'
    options = "".join(
        draw(st.sampled_from(["", option])) for option in (f", fallback={yields}", ", retry=2", ", limit=1")
    )
    return _plan(
        draw(_prefixes), _fork(width, f"{body} need(false); {rest}", value, draw(_contexts), options), draw(_afters)
    )


@st.composite
def _join_of_joins(draw: st.DrawFn) -> Plan:
    """Joins inside branches that are joined, two or three deep."""
    body = draw(_bodies)
    for level in range(draw(st.integers(2, 3))):
        before = draw(st.sampled_from(["", 'text("p");', 'gen("p", max=2);']))
        fork = _fork(draw(st.integers(1, 3)), body, draw(_values), draw(_contexts), level=level)
        body = f"{before} {fork} {draw(_afters)}"
    return _plan(draw(_prefixes), body)


@st.composite
def hungry_plans(draw: st.DrawFn) -> Plan:
    """Equal branches that may all write much, on as many pages as they find."""
    width, long = draw(st.integers(2, 6)), draw(st.integers(4, 20))
    inner = draw(st.sampled_from(["", 'fork(2) { gen("k", max=4); } join(all, stitch);']))
    fork = _fork(width, f"gen(max={long}); {inner}", draw(_values), draw(_contexts))
    return _plan('text("a");', fork, draw(_afters))


@st.composite
def _deep(draw: st.DrawFn, deep: int) -> Plan:
    """Forks inside one another, one branch each but for one of two."""
    depth = draw(st.integers(1, deep) | st.just(deep))
    doubled = draw(st.integers(0, depth - 1))
    value, context, between = draw(_values), draw(_contexts), draw(_bodies)
    body = draw(_bodies)
    for level in range(depth):
        body = f"{between} {_fork(1 + (level == doubled), body, value, context, level=level)}"
    return _plan(draw(_prefixes), body)


@st.composite
def _wide(draw: st.DrawFn, wide: int) -> Plan:
    """A fork of many cheap branches."""
    width = draw(st.integers(1, wide) | st.just(wide))
    limit = draw(st.sampled_from(["", f", limit={max(1, width // 3)}"]))
    body = draw(st.sampled_from(["", 'text("b");', "gen(max=1);", "gen(max=2); need(false);"]))
    value = draw(st.sampled_from([*_VALUES, "all(min=1)", f"first({max(1, width // 2)})"]))
    return _plan(draw(_prefixes), _fork(width, body, value, draw(_contexts), limit), draw(_afters))
