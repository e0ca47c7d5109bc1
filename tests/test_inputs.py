"""What a caller may give a plan: values of the language, within what its parameters state."""

from __future__ import annotations

from typing import Any

import pytest

from anabranch.compiler.pipeline import Compiled, compile_plan
from anabranch.dsl.diagnostics import PlanError
from anabranch.dsl.parse import parse_text
from anabranch.runtime.engine import Engine, EngineConfig
from anabranch.runtime.models import load

PLAN = """
p = plan(n: int, f: float, xs: list(2), ts: list(3, text(4)), t: text(4), any) {
  text("#{t}");
  a = gen(max=2);
  return(a);
}
"""
GOOD: dict[str, Any] = {"n": 1, "f": 2, "xs": [1, "a"], "ts": ["a"], "t": "abc", "any": {"x": [None, 1.5]}}


def compiled() -> Compiled:
    return compile_plan(parse_text(PLAN))


def endless() -> list[Any]:
    """A list that holds itself."""
    made: list[Any] = []
    made.append(made)
    return made


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("n", "seven", "takes int, and this is text"),
        ("n", True, "this is true or false"),
        ("n", 1.0, "this is a number"),
        ("f", None, "null"),
        ("xs", [1, 2, 3], "this has 3 items"),
        ("xs", (1, 2), "a tuple"),
        ("ts", ["a", 1], "in one item this is a whole number"),
        ("t", b"abc", "bytes"),
        ("t", "\ud800", "UTF-8"),
        ("any", {1, 2}, "set"),
        ("any", {"x": [(1,)]}, "a tuple"),
        ("any", {"x": b""}, "bytes"),
        ("any", float("nan"), "nan"),
        ("any", {1: 2}, "a field whose name is an int"),
        ("any", endless(), "nests deeper"),
    ],
)
def test_a_wrong_value_is_refused(name: str, value: object, said: str) -> None:
    """What is no value of the language, or does not fit its bound, is an error that names the parameter."""
    with pytest.raises(PlanError) as caught:
        compiled().check_inputs({**GOOD, name: value})
    (found,) = caught.value.diagnostics
    assert found.code == "bad-input"
    assert f"`{name}`" in found.message and said in found.message
    assert (found.span is None) == (name == "any")


def test_values_within_their_bounds_pass() -> None:
    """Every kind of value that fits is accepted, and a text's length is no matter where no tokenizer is known."""
    compiled().check_inputs({**GOOD, "t": "abcdefgh"})


def test_every_wrong_value_is_told_at_once() -> None:
    """One error carries a finding for each parameter."""
    with pytest.raises(PlanError) as caught:
        compiled().check_inputs({**GOOD, "n": "seven", "xs": [1, 2, 3]})
    assert [found.code for found in caught.value.diagnostics] == ["bad-input", "bad-input"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    """On the random test model, whose tokens are mostly bytes."""
    return Engine(load("random"), EngineConfig(lanes=4, pages=256))


@pytest.mark.parametrize(("name", "value"), [("t", "#!?%&"), ("ts", ["a", "#!?%&"])])
def test_a_text_past_its_bound_is_refused(engine: Engine, name: str, value: object) -> None:
    """With a tokenizer at hand a text of more tokens than its bound is refused, also inside a list."""
    with pytest.raises(PlanError) as caught:
        engine.submit(PLAN, {**GOOD, name: value})
    (found,) = caught.value.diagnostics
    tokens = engine.sizes.tokens([("#!?%&", False)])
    assert tokens > 4
    assert found.code == "bad-input"
    assert found.message == f"a text of the input `{name}` takes {tokens} tokens, and its bound is 4"
    assert not engine.step()


def test_a_text_of_just_its_bound_runs(engine: Engine) -> None:
    """The bound itself is permitted."""
    text = "#!?%"
    assert engine.sizes.tokens([(text, False)]) == 4
    (result,) = engine.run(PLAN, {**GOOD, "t": text, "ts": [text]})
    assert result.status == "ok"
