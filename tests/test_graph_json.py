"""Graphs as JSON: read back equal, and hostile documents refused with a clear error."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

import anabranch
from anabranch.compiler.graph_json import from_json, to_json
from anabranch.compiler.pipeline import compile_plan, from_graph
from anabranch.compiler.typed_json import from_table, to_table
from anabranch.compiler.verify_graph import VerifyError
from anabranch.dsl.diagnostics import PlanError
from anabranch.testing import Plan, plans

EXAMPLES = Path(__file__).parent.parent / "examples"

SMALL = """main = plan(q: text(40), n: int) {
  user("a #{q} b");
  a = fork(2) { x = gen("It is ", type=choice("yes", "no"), max=4, temperature=0.5);
    y = gen(max=2, stop=["k"]); return(x); }
    join(vote(x), stitch(sum));
  if (n > 2.5 && !(a == "no")) { b = gen(max=3); } else { c = [1, "two"]; };
  loop(2) { d = gen("x", max=3); } until(d == "k");
  return([a, -n, len(q)]);
}"""


@given(plans())
@settings(max_examples=300, derandomize=True, deadline=None)
def test_a_graph_is_read_back_equal(plan: Plan) -> None:
    """Of 300 generated plans: the graph, and the text that is written of it again."""
    graph = plan.compiled.graph
    text = to_json(graph)
    read = from_json(text)
    assert read == graph
    assert to_json(read) == text


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.plan")), ids=lambda path: path.stem)
def test_a_graph_of_a_file_keeps_its_places(path: Path) -> None:
    """Spans of nodes and of expressions come back, which do not count in the equality of expressions."""
    compiled = compile_plan(anabranch.parse(anabranch.read_source(path)))
    read = from_graph(from_json(to_json(compiled.graph)), compiled.program.source)
    assert repr(to_table(read.graph)) == repr(to_table(compiled.graph))
    assert read.reads_logprobs == compiled.reads_logprobs


@pytest.mark.parametrize(
    "body",
    [
        "fork(1) { " * 62 + "g = gen(max=1);" + " };" * 62,
        "if (n > 1) { " * 62 + "g = gen(max=1);" + " };" * 62,
        "fork() { b = branch() { " * 31 + "g = gen(max=1);" + " }; };" * 31,
        f"return(n{' + n' * 150});",
        f"return({'!' * 150}true);",
        "fork(1) { " * 40 + f"return(n{' + n' * 60});" + " };" * 40,
    ],
    ids=["forks", "ifs", "branches", "sums", "nots", "both"],
)
def test_the_deepest_plans_are_read(body: str) -> None:
    """What nests about as deep as the parser takes is not refused by the reader, nor does it recurse."""
    graph = compile_plan(anabranch.parse_text(f'p = plan(n: int) {{ text("a"); {body} }}')).graph
    assert from_json(to_json(graph)) == graph


def small() -> list[Any]:
    found = json.loads(to_json(compile_plan(anabranch.parse_text(SMALL)).graph))["records"]
    assert isinstance(found, list)
    return found


def refusal(records: Any) -> str:
    """What the reader, or then the verifier, says of a table."""
    text = json.dumps({"format": "anabranch-graph", "version": 1, "records": records})
    try:
        from_graph(from_json(text), anabranch.parse_text(SMALL).source)
    except PlanError as error:
        assert error.code == "bad-build"
        return str(error.diagnostics[0].message)
    except VerifyError as error:
        return str(error)
    return ""


def first(records: list[Any], name: str) -> tuple[int, list[Any]]:
    place = next(i for i, record in enumerate(records) if record[0] == name)
    return place, records[place]


def test_what_no_graph_holds_is_refused_by_name() -> None:
    """Another class, another type, a shared or lost record, a circle, a wrong word: each says where and what."""
    assert refusal(small()) == ""

    def changed(name: str, field: int, value: Any) -> str:
        records = small()
        first(records, name)[1][field] = value
        return refusal(records)

    assert "`value`: a Return can't stand there" in changed("Write", 5, first(small(), "Return")[0])
    assert "must be a whole number" in changed("Write", 1, 1.0)
    assert "must be a whole number" in changed("Write", 1, True)
    assert "must be a text" in changed("Write", 3, None)
    assert "must be one of 'text', 'user'" in changed("Write", 4, "robot")
    assert "must be a truth value" in changed("Write", 6, 0)
    assert "must be a list of 2" in changed("Write", 7, [1])
    assert "takes 7 fields, not 6" in refusal([r[:-1] if r[0] == "Write" else r for r in small()])
    assert "name of a record" in changed("Write", 0, "Popen")
    assert "name of a record" in changed("Write", 0, ["Write"])
    assert "further on that nothing else holds" in changed("Write", 5, 10**9)
    assert "further on that nothing else holds" in changed("Write", 5, 0)
    assert "no record holds it" in refusal([*small(), ["Name", "a", [0, 0]]])
    assert "record 0: it must be a Graph" in refusal(small()[1:][-1:])
    twice = small()
    fork = first(twice, "Fork")[1]
    fork[7] = [fork[7][0], fork[7][0]]
    assert "nothing else holds" in refusal(twice)
    pairs = small()
    sampling = first(pairs, "GenSpec")[1]
    sampling[4] = [["temperature", None]]
    assert "must be the place of a record" in refusal(pairs)
    same = small()
    first(same, "Graph")[1][2] *= 2
    assert "nothing else holds" in refusal(same) or "name of its own" in refusal(same)
    for document in (
        "",
        "[]",
        "nul",
        "[" * 10**5,
        '{"format": 1}',
        '{"format":"anabranch-graph","version":1,"records":{}}',
    ):
        with pytest.raises(PlanError, match="bad-build"):
            from_json(document)
    with pytest.raises(PlanError, match="no number"):
        from_json('{"format":"anabranch-graph","version":1,"records":[["Float",NaN]]}')
    with pytest.raises(PlanError, match="bad-build"):
        from_json(b"\xff\xfe")


def test_a_graph_that_breaks_a_rule_is_no_plan() -> None:
    """Records of the right kinds are not enough: a name that nothing binds is found."""
    records = small()
    first(records, "Return")[1][1] = "twice"
    name = next(record for record in records if record[0] == "Name" and record[1] == "a")
    name[1] = "nobody"
    assert "`nobody` is read and not bound" in refusal(records)


def test_depth_is_bounded() -> None:
    """A table of any length is read without recursion, and what nests too deep is refused."""
    tower: list[Any] = [["Not", 1]]

    @dataclass(frozen=True)
    class Not:
        of: Not | None

    # The class is a local one, whose hint names itself.
    Not.__annotations__["of"] = Not | None
    tower = [["Not", i + 1] for i in range(10**4)] + [["Not", None]]
    with pytest.raises(ValueError, match="more than 50 records"):
        from_table(Not, tower, ValueError, max_depth=50)
    found = from_table(Not, tower, ValueError, max_depth=10**5)
    count = 0
    while found is not None:
        found, count = found.of, count + 1
    assert count == 10**4 + 1


def test_any_change_of_a_document_is_an_error_or_a_graph() -> None:
    """2,000 documents with a value replaced, dropped, moved or repeated: refused, or a graph that keeps the rules."""
    pick = random.Random(7)
    base = small()
    outcomes = {"refused": 0, "read": 0}
    for _ in range(2000):
        records = json.loads(json.dumps(base))
        for _ in range(pick.choice((1, 1, 2))):
            record = pick.choice(records)
            if not record:
                continue
            place = pick.randrange(len(record))
            match pick.randrange(5):
                case 0:
                    values = (None, True, -1, 0, 1, 2, 10**30, 0.5, 1e999, "", "Name", "é\x00", [], [[]], {}, [0, 0])
                    record[place] = pick.choice(values)
                case 1:
                    del record[place]
                case 2:
                    record.insert(place, pick.choice(record))
                case 3:
                    other = pick.choice(records)
                    record[place] = pick.choice(other) if other else None
                case _:
                    records.insert(pick.randrange(len(records)), records.pop(pick.randrange(len(records))))
        outcomes["refused" if refusal(records) else "read"] += 1
    assert outcomes["refused"] > 1500 and outcomes["read"] > 10
