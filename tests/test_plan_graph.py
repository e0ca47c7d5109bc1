"""Plans as torch graphs: the engine's tokens and bits, the reference's logits, and what torch does with a graph.

The engine is asked to be deterministic, and so is the graph: their logits are then equal bit for bit, whatever runs
together. `ANABRANCH_GRAPHS` sets how many generated plans are made into graphs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_device
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from law_runs import COMMON, hold_against_reference, model
from torch import fx

import anabranch
from anabranch.dsl.diagnostics import PlanError
from anabranch.runtime import plan_ops
from anabranch.runtime.engine import Engine, EngineConfig, RunResult
from anabranch.runtime.events import BranchEnded, GenEnded, Joined
from anabranch.runtime.events import Path as ThreadPath
from anabranch.runtime.models import LoadedModel
from anabranch.runtime.plan_ops import attach, pack_inputs, read_result
from anabranch.testing import Plan, plans

GRAPHS = int(os.environ.get("ANABRANCH_GRAPHS", "300"))
PAGES = 2048
BYTES = torch.export.Dim("bytes", min=2)


def engine_run(plan: Plan, *, seed: int, deterministic: bool = True, of: LoadedModel | None = None) -> RunResult:
    engine = Engine(of or model(), EngineConfig(pages=PAGES, deterministic=deterministic, trace_logits=True))
    return engine.run(plan.program, plan.inputs, seed=seed, functions=plan.functions)[0]


def graph_of(plan: Plan | str, *, of: LoadedModel | None = None, **options: Any) -> fx.GraphModule:
    program = anabranch.parse_text(plan) if isinstance(plan, str) else plan.program
    compiled = anabranch.compile(program, functions=() if isinstance(plan, str) else tuple(plan.functions))
    return compiled.to_fx(of or model(), **({"pages": PAGES} | options))


def run_graph(graph: Any, inputs: Any, **options: Any) -> RunResult:
    with torch.no_grad():
        found = graph(pack_inputs(inputs, **options))
    return read_result(found) if isinstance(found, torch.Tensor) else read_result(*found)


def tries_of(path: ThreadPath) -> ThreadPath:
    """The path of a branch, whichever try of it `path` is."""
    return (*path[:-1], path[-1].partition("~")[0])


def told(result: RunResult, without: Sequence[ThreadPath] = ()) -> dict[ThreadPath, list[GenEnded | Joined]]:
    """What each thread drew and joined, but for those below `without`."""
    found: dict[ThreadPath, list[GenEnded | Joined]] = {}
    left_out = {tries_of(path) for path in without}
    for event in result.events:
        if not isinstance(event, GenEnded | Joined):
            continue
        # A branch that was cut off in one try may, in a graph, have another.
        if not any(tries_of(event.path[:depth]) in left_out for depth in range(1, len(event.path) + 1)):
            found.setdefault(event.path, []).append(event)
    return found


def cut_off(result: RunResult) -> list[ThreadPath]:
    """Threads that a join cut off: a graph lets them go on to their end."""
    return [e.path for e in result.events if isinstance(e, BranchEnded) and e.status == "cancelled"]


def hold_equal(engine: RunResult, graph: RunResult) -> int:
    """The same end, the same events, the same tokens, and bits of logits; returns how many draws were compared."""
    assert (graph.status, graph.value, graph.reason) == (engine.status, engine.value, engine.reason)
    cut = cut_off(engine)
    assert told(graph, cut) == told(engine, cut)
    of_graph = {(row.path, row.index): row for row in graph.logits}
    compared = [(row, of_graph[row.path, row.index]) for row in engine.logits if (row.path, row.index) in of_graph]
    for expected, found in compared:
        assert found.token == expected.token
        assert torch.equal(found.logits, expected.logits)
    assert len(compared) == sum(row.path not in cut for row in engine.logits) or cut
    return len(compared)


# What the host does with values in a graph, besides writing and reading text.
TEXT_WORK = ("assign", "split", "until")


def text_work(graph: fx.GraphModule) -> set[str]:
    """Which ops of a graph evaluate expressions between two steps of the model."""
    called = {
        str(node.target).split(".")[1]
        for module in graph.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function" and str(node.target).startswith("anabranch.")
    }
    return called & set(TEXT_WORK)


def test_generated_plans_run_as_the_engine_runs_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Engine, graph and reference agree on every plan that a graph can hold: values, events, tokens, bits."""
    seen: Counter[str] = Counter()

    @settings(COMMON, max_examples=4 * GRAPHS)
    @seed(3)
    @given(plans(deadlines=False), st.integers(0, 3), st.sampled_from([64, 2, 1]), st.sampled_from([512, 7, 1]))
    def hold(drawn: Plan, number: int, lanes: int, chunk: int) -> None:
        if seen["graphs"] >= GRAPHS:
            return
        # As a file has it, since reasons name lines.
        plan = Plan.parse(drawn.text, drawn.inputs, drawn.functions)
        try:
            graph = graph_of(plan, lanes=lanes, chunk=chunk, forced=True)
        except PlanError as error:
            assert {found.code for found in error.diagnostics} == {"not-in-graph"}
            seen["refused"] += 1
            return
        expected = engine_run(plan, seed=number)
        result = run_graph(graph, plan.inputs, seed=number)
        seen["draws"] += hold_equal(expected, result)
        hold_against_reference(plan, result)
        seen["graphs"] += 1
        seen[f"status {result.status}"] += 1
        seen["with expressions"] += bool(text_work(graph))
        seen["with votes"] += any(word in plan.text for word in ("vote(", "quorum(", "best("))
        seen["with interpolation"] += "#{" in plan.text

    hold()
    with capsys.disabled():
        print(f"\nplan graphs: {dict(seen)}")
    assert seen["graphs"] >= GRAPHS
    assert seen["draws"] > 5 * GRAPHS
    assert seen["status failed"] > 0
    assert seen["with expressions"] > GRAPHS // 3


EVERYTHING = """
half = plan(t) { a = gen("#{t} half: ", max=6); return(a); }

everything = plan(q) {
  system("Be brief."); user("#{q}");
  x = gen(max=8, stop=["a", "bc", "d "]);
  n = 3 + 1;
  loop(3) {
    text("Again. ");
    c = gen("Critique: ", max=5, repetition_penalty=1.4, presence_penalty=0.3);
    ok = gen("Good? ", type=choice("yes", "no"), max=3);
  } until(ok == "yes");
  if (ok == "no") {
    y = fork(i: 5, fallback=0) {
      t = gen(max=4, top_k=9, min_p=0.01);
      m = gen("n = ", type=int, max=4);
      need(m > i);
      return(m);
    } join(first(1), stitch);
  } else { y = 7; };
  p = fork() {
    short = branch("Short: ") { s = gen(max=3); b = gen(type=bool, max=4); return(s); };
    long = branch("Long: ", retry=1) { s = gen(max=9, top_p=0.9); need(len(s) > 2); return(s); };
  } join(all, stitch);
  z = reduce(g: [x, "second", "third", ok], by=2) { m = gen("merge #{g}: ", max=5); return(m); };
  k = gen("Pick ", type=choice("left", "right", by="logprob"), max=4);
  h = half(z);
  items = gen("List: ", type=lines(1, 3), max=12);
  w = map(s: items) { v = gen("#{s}: ", max=4, logprobs=1); return(v); } join(best(logprob), stitch(sum));
  last = gen(" so ", max=6, temperature=0);
  return([x, n, y, p.short, z, k, h, w, last]);
}
"""


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_plan_with_every_statement(number: int) -> None:
    """Stops, penalties, arms, rounds, retries, reductions, scored choices and calls, with what is stitched where."""
    plan = Plan.parse(EVERYTHING, {"q": "How many?"})
    expected = engine_run(plan, seed=number)
    result = run_graph(graph_of(plan, forced=True, lanes=3), plan.inputs, seed=number)
    assert hold_equal(expected, result) > 30
    hold_against_reference(plan, result)


def test_a_loaded_export_runs_in_another_process(tmp_path: Path) -> None:
    """`torch.export` takes a graph whole, loops and arms too; saved and loaded it runs without the plan's file."""
    plan = Plan.parse(EVERYTHING, {"q": "How many?"})
    graph = graph_of(plan)
    given_inputs = pack_inputs(plan.inputs, seed=2)
    with torch.no_grad():
        program = torch.export.export(graph, (given_inputs,), dynamic_shapes=({0: BYTES},), strict=False)
    torch.export.save(program, tmp_path / "plan.pt2")
    script = f"""
import torch, anabranch
from anabranch.runtime.plan_ops import attach, pack_inputs, read_result
torch.set_num_threads(1)
attach(anabranch.load("random", dtype=torch.float64))
program = torch.export.load({str(tmp_path / "plan.pt2")!r})
for question in ("How many?", "And how many legs has it?"):
    print(ascii(read_result(program.module()(pack_inputs({{"q": question}}, seed=2))).value))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    found = done.stdout.splitlines()
    for question, line in zip(("How many?", "And how many legs has it?"), found, strict=True):
        assert line == ascii(run_graph(graph, {"q": question}, seed=2).value)


def test_forced_to_the_engines_tokens_the_logits_agree() -> None:
    """An engine that is not deterministic batches otherwise; on its tokens a graph's logits are its own, rounded."""
    plan = Plan.parse(EVERYTHING, {"q": "How many?"})
    expected = engine_run(plan, seed=1, deterministic=False)
    tokens: dict[ThreadPath, list[int]] = {}
    for row in expected.logits:
        tokens.setdefault(row.path, []).append(row.token)
    graph = graph_of(plan, deterministic=False, forced=True)
    # Of another seed, so that nothing but the forced tokens makes it go the engine's way.
    result = read_result(*graph(pack_inputs(plan.inputs, seed=9, forced=tokens)))
    cut = cut_off(expected)
    of_graph = {(row.path, row.index): row for row in result.logits}
    compared = 0
    for row in expected.logits:
        if row.path not in cut:
            found = of_graph[row.path, row.index]
            assert found.token == row.token
            assert float((found.logits - row.logits).abs().max()) < 1e-9
            compared += 1
    assert compared > 30


@settings(COMMON, max_examples=30)
@seed(11)
@given(plans(deadlines=False), st.sampled_from([64, 2]))
def test_on_a_device_the_graph_steps_by_the_kernels(drawn: Plan, lanes: int) -> None:
    """With a model on a device (here by the kernels' definitions) graph and device engine draw the same."""
    plan = Plan.parse(drawn.text, drawn.inputs, drawn.functions)
    of = test_device.model()
    try:
        graph = graph_of(plan, of=of, lanes=lanes, chunk=64, pages=512)
    except PlanError:
        return
    engine = Engine(of, EngineConfig(lanes=8, pages=512, chunk=64, deterministic=True))
    [expected] = engine.run(plan.program, plan.inputs)
    result = run_graph(graph, plan.inputs)
    assert (result.status, result.value) == (expected.status, expected.value)
    cut = cut_off(expected)
    assert told(result, cut) == told(expected, cut)


@pytest.mark.parametrize(
    "text",
    [
        """p = plan() {
          a_x = gen("m ", type=choice("cat", "dog"), max=4);
          a = fork(2) { x = gen("n ", type=int, max=4); return(x); };
          return([a, a_x]);
        }""",
        """p = plan() {
          a_x = gen("m ", stop=["a", "e"], max=9);
          a = fork(2) { x = gen("n ", stop=["zq", "12"], max=14); return(x); };
          return([a, a_x]);
        }""",
        """p = plan() {
          self = gen("m ", type=int, max=3);
          state = gen("n ", max=3, stop=["e"]);
          return([self, state]);
        }""",
    ],
)
def test_names_that_read_alike_stay_apart(text: str) -> None:
    """`a_x`, and `x` in a fork `a`, have tables of their own; a gen may have the name that code gives the module."""
    plan = Plan.parse(text, {})
    hold_equal(engine_run(plan, seed=2), run_graph(graph_of(plan, forced=True), {}, seed=2))


def test_a_default_type_of_torch_changes_nothing() -> None:
    """A program that computes in doubles may run a graph."""
    graph = graph_of('p = plan() { x = gen("a", max=4, temperature=0); return(x); }')
    expected = run_graph(graph, {}).value
    torch.set_default_dtype(torch.float64)
    try:
        assert run_graph(graph, {}).value == expected
    finally:
        torch.set_default_dtype(torch.float32)


REFUSED = {
    "recursion": ("p = plan(q, depth=2) { if (len(q) > 2) { x = p(q); }; }", "`p` calls itself"),
    "json": ('p = plan() { x = gen("a", type=json(\'{"type": "object"}\'), max=20); }', "is paced by the host"),
    "function": ("p = plan() { x = half(3); return(x); }", "`half` is a function of the host"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_cannot_hold_is_named(name: str) -> None:
    """The error says which statement stops it, and what to do."""
    text, reason = REFUSED[name]
    compiled = anabranch.compile(text, functions=["half"] if name == "function" else ())
    with pytest.raises(PlanError) as caught:
        compiled.to_fx(model())
    [found] = caught.value.diagnostics
    assert found.code == "not-in-graph"
    assert reason in found.message
    assert found.span is not None
    assert found.help


def test_a_deadline_is_refused() -> None:
    """A graph reads no clock."""
    compiled = anabranch.compile('p = plan() { x = fork(2, deadline="1s") { y = gen("a", max=2); }; }')
    with pytest.raises(PlanError, match="wall-clock"):
        compiled.to_fx(model())


def test_calls_that_multiply_are_refused() -> None:
    """Twenty plans that call one another twice would be a million statements."""
    text = 'p0 = plan() { x = gen("a", max=1); return(x); }\n'
    for number in range(1, 21):
        text += f"p{number} = plan() {{ x = p{number - 1}(); y = p{number - 1}(); return(x); }}\n"
    with pytest.raises(PlanError, match="not-in-graph"):
        anabranch.compile(text).to_fx(model())


def test_a_full_pool_is_told() -> None:
    """The error says to give the graph more pages or fewer lanes, and the next run is as good as any."""
    text = 'p = plan(q) { user("#{q}"); x = fork(8) { y = gen(max=30, temperature=0); return(y); }; return(x); }'
    graph = graph_of(text, pages=8)
    with pytest.raises(PlanError, match="pool-too-small"):
        run_graph(graph, {"q": "a"})
    few = graph_of(text, pages=8, lanes=2)
    assert run_graph(few, {"q": "a"}).value == run_graph(graph_of(text), {"q": "a"}).value


def test_wrong_inputs_are_told() -> None:
    """A missing input is the same error as the engine's."""
    graph = graph_of('p = plan(q) { user("#{q}"); x = gen(max=3); return(x); }')
    with pytest.raises(PlanError, match="missing-input"):
        run_graph(graph, {})


def test_many_branches_hold_few_rows() -> None:
    """A thousand branches of a fork run `lanes` at a time, over a table of logits of that many rows."""
    text = 'p = plan(q) { user("#{q}"); x = fork(1000) { y = gen(max=1, temperature=0); return(y); }; return(len(x)); }'
    graph = graph_of(text, lanes=50)
    [table] = [node for node in graph.graph.nodes if node.name == "logits"]
    assert table.args[0][0] < 200
    assert run_graph(graph, {"q": "a"}).value == 1000


def test_a_model_that_is_not_attached_is_named() -> None:
    """A loaded graph says which model it wants."""
    graph = graph_of('p = plan() { x = gen("a", max=1); return(x); }')
    begin = next(node for node in graph.graph.nodes if node.name == "state")
    begin.args = (*begin.args[:2], "feed", *begin.args[3:])
    graph.recompile()
    with pytest.raises(ValueError, match="no model feed is attached"):
        run_graph(graph, {})
    assert attach(model()).startswith(model().fingerprint)


def test_a_graph_keeps_its_model() -> None:
    """The same weights under another template, dtype or way to attend are another model."""
    text = 'p = plan(q) { user("#{q}"); x = gen(max=5); return(x); }'
    graph = graph_of(text)
    before = run_graph(graph, {"q": "a"}).value
    others = [anabranch.load("random", dtype=torch.float64, template="raw"), anabranch.load("random")]
    raw, _ = (run_graph(graph_of(text, of=other), {"q": "a"}).value for other in others)
    assert raw != before
    assert run_graph(graph, {"q": "a"}).value == before
    assert len({attach(found) for found in (model(), *others)}) == 3


def test_what_is_no_input_is_told() -> None:
    """Other tensors, values that are none, and tokens that cannot be forced; a run that breaks is let go."""
    text = 'p = plan(q) { user("#{q}"); x = gen(max=5); return(x); }'
    graph, forced = graph_of(text), graph_of(text, forced=True)
    for wrong in (torch.zeros(0, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="pack_inputs"):
            graph(wrong)
    with pytest.raises(ValueError, match="the input `q`"):
        pack_inputs({"q": object()})
    with pytest.raises(ValueError, match="made without"):
        run_graph(graph, {"q": "a"}, forced={(): [1]})
    with pytest.raises(ValueError, match="outside the vocabulary"):
        run_graph(forced, {"q": "a"}, forced={(): [1_000_000]})
    few = graph_of('p = plan(q) { user("#{q}"); x = gen(max=90); return(x); }', pages=1)
    with pytest.raises(PlanError, match="pool-too-small"):
        run_graph(few, {"q": "a"})
    assert not plan_ops._RUNS


def test_an_error_names_the_plans_file() -> None:
    """What is refused is shown in the file that it came from."""
    source = replace(anabranch.read_source("examples/prove.plan"), name="prove.plan")
    with pytest.raises(PlanError, match=r"prove\.plan:"):
        anabranch.compile(source).to_fx(model())


def test_the_page_shows_the_graph_as_it_is() -> None:
    """docs/torch.md prints the graph of examples/vote.plan, with the plan's own names and lines."""
    root = Path(__file__).parent.parent
    source = anabranch.read_source(root / "examples" / "vote.plan")
    graph = anabranch.compile(replace(source, name="examples/vote.plan")).to_fx(anabranch.load("random"), pages=512)
    shown = graph.print_readable(print_output=False).partition("    class ")[0].rstrip()
    shown = re.sub(r";  (?:\w+ = )+None", "", shown)
    page = (root / "docs" / "torch.md").read_text(encoding="utf-8")
    expected = page.partition("<!-- the graph of examples/vote.plan -->\n```text\n")[2].partition("\n```")[0]
    assert shown == expected
