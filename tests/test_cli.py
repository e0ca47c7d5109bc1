"""The command line, from the outside: what it prints, where, and how it ends."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from anabranch.cli import live
from anabranch.cli.app import app
from anabranch.cli.explain import model_shape
from anabranch.cli.text import json_text, one_line, printable
from anabranch.compiler.cost import SMOLLM2
from anabranch.dsl.printer import format_source
from anabranch.runtime.config import ModelConfig, RopeConfig
from anabranch.runtime.events import BranchEnded, BranchStarted, Event, GenEnded, Joined, TextDelta
from anabranch.runtime.events import Path as ThreadPath

ROOT = Path(__file__).parent.parent

GOOD = """# what it is for
ask = plan(q) {
  user("#{q}");
  a = fork(3) {
    n = gen("It is ", type=int, max=4);
    return(n);
  } join(vote(n), stitch);
  return(a);
}
"""

TYPED = """
typed = plan(xs: list(4, int), n: int, f: float, t: text(100), any) {
  text("#{t}");
  a = gen(max=2);
  return([len(xs), n, f, t, any]);
}
"""

SMOLLM2_CONFIG = ModelConfig(
    architecture="llama",
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
    max_context=8192,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=1e5),
    sliding_window=(None,) * 30,
    tied_embeddings=True,
)

COUNTS = {
    "tokens_decoded", "tokens_trimmed", "tokens_prefilled", "tokens_reprefilled", "tokens_flushed", "tokens_cached",
    "tokens_recomputed", "tokens_aliased", "critical_path_tokens", "total_tokens", "pages_peak", "pages_bound", "steps",
    "steps_bound", "elapsed_s",
}  # fmt: skip


def cli(*args: str) -> Any:
    """Run the command line in this process."""
    return CliRunner().invoke(app, list(args))


def child(*args: str, **options: Any) -> subprocess.Popen[str]:
    """Run the command line in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "anabranch", *args],
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


@pytest.fixture
def plan(tmp_path: Path) -> str:
    """A plan that is right."""
    return write(tmp_path, GOOD)


def write(folder: Path, text: str | bytes, name: str = "a.plan") -> str:
    """A file in `folder`; its path."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def run_random(file: str, *args: str) -> Any:
    """`run` on the random model, in a pool that takes no time to make."""
    return cli("run", file, "--model", "random", "--pages", "2048", *args)


def document(result: Any) -> Any:
    """The one JSON document on stdout."""
    return json.loads(result.stdout)


# --- check


def test_check_says_ok_and_what_it_skipped(plan: str) -> None:
    """A right plan gives exit 0, its worst case, and what needs a model."""
    result = cli("check", plan)
    assert result.exit_code == 0
    assert f"{plan}: ok" in result.stdout
    assert "ask: at most 12 tokens decoded" in result.stdout
    assert "skipped: whether prompts" in result.stdout


def test_check_imports_neither_torch_nor_numpy(plan: str) -> None:
    """Checking a plan must be quick, so nothing heavy is on its path."""
    code = (
        "import sys\nfrom anabranch.cli.app import app\n"
        f"app(['check', {plan!r}], standalone_mode=False)\n"
        "print(sorted({'torch', 'numpy', 'rich', 'transformers'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (b"", "empty-file", "is empty"),
        (b"a = plan() { text(\"\xff\"); }", "not-utf-8", "byte 0xff"),
        ("a = plan(q) { frok(4) { b = gen(max=3); }; }", "", "did you mean `fork`?"),
        ("a = plan(q) { b = gen(max=3, tempratur=0); }", "unknown-option", "did you mean `temperature`?"),
        ("a = plan(q) { b = gen(max=3); ", "", "}"),
        ("a = plan(q) { b = gen(); return(b); }", "", "max"),
        ("a = plan(q) { " + "fork(2) { " * 500 + "b = gen(max=1);" + "};" * 500 + " }", "", ""),
    ],
)  # fmt: skip
def test_check_refuses(tmp_path: Path, text: str | bytes, code: str, said: str) -> None:
    """What is wrong is said on stderr with a code, exit 1, no traceback, and nothing on stdout."""
    result = cli("check", write(tmp_path, text))
    assert result.exit_code == 1
    assert f"error[{code}" in result.stderr
    assert said in result.stderr
    assert "internal" not in result.stderr
    assert result.stdout == ""


def test_check_shows_carets(tmp_path: Path) -> None:
    """An error shows the line and points at the place."""
    result = cli("check", write(tmp_path, "a = plan() {\n  return(nope);\n}\n"))
    assert ":2:10" in result.stderr
    assert "2 |   return(nope);" in result.stderr
    assert "^^^^" in result.stderr


def test_check_goes_on_after_a_wrong_file(tmp_path: Path, plan: str) -> None:
    """Every file is checked, and one wrong file makes the exit code 1."""
    result = cli("check", str(tmp_path / "missing.plan"), plan)
    assert result.exit_code == 1
    assert "error[no-such-file]" in result.stderr
    assert f"{plan}: ok" in result.stdout


def test_check_shows_warnings(tmp_path: Path) -> None:
    """A warning is shown and does not fail the check."""
    result = cli("check", write(tmp_path, "a = plan() { b = fork(1) { c = gen(max=3); return(c); }; return(b); }"))
    assert result.exit_code == 0
    assert "warning[" in result.stderr


def test_check_with_a_model_knows_its_context(tmp_path: Path) -> None:
    """With a model, a worst case longer than its context is an error, which without one is only said to be skipped."""
    file = write(tmp_path, 'a = plan() { text("x"); b = gen(max=70000); return(b); }')
    assert cli("check", file).exit_code == 0
    result = cli("check", file, "--model", "random")
    assert result.exit_code == 1
    assert "context" in result.stderr
    assert "skipped" not in result.stdout


def test_check_with_a_model_knows_how_long_a_type_is(tmp_path: Path) -> None:
    """A `max` below what a type takes in the model's tokens is an error, in every plan of the file."""
    text = """
short = plan() { text("x"); b = gen(max=2, type=choice("#!?%", "&*#!?%")); return(b); }
main = plan() { text("x"); b = gen(max=4, type=choice("#!?%")); return(b); }
"""
    assert cli("check", write(tmp_path, text)).exit_code == 0
    result = cli("check", write(tmp_path, text), "--model", "random")
    assert result.exit_code == 1
    assert "error[max-too-small]: `max=2` is too short for `choice(...)`, which takes at least 4" in result.stderr
    assert "a.plan:2:" in result.stderr
    assert cli("check", write(tmp_path, text.replace("max=2", "max=4")), "--model", "random").exit_code == 0


def test_check_names_no_such_plan(plan: str) -> None:
    """`--plan` with a name that is not there suggests the one that is."""
    result = cli("check", plan, "--plan", "aks")
    assert result.exit_code == 1
    assert "error[no-such-plan]" in result.stderr
    assert "did you mean `ask`?" in result.stderr


# --- fmt


def test_fmt_rewrites_in_place_and_keeps_comments(tmp_path: Path) -> None:
    """The file becomes canonical, keeps its comments and its mode, and a second run changes nothing."""
    file = write(tmp_path, GOOD.replace("  ", " ").replace("\n", "\r\n"))
    os.chmod(file, 0o640)
    assert cli("fmt", file).exit_code == 0
    text = Path(file).read_bytes().decode()
    assert text == GOOD
    assert os.stat(file).st_mode & 0o777 == 0o640
    assert cli("fmt", "--check", file).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.plan"]


def test_fmt_check_and_diff_write_nothing(tmp_path: Path) -> None:
    """`--check` exits 1 where something would change, `--diff` shows it; neither touches the file."""
    before = GOOD.replace("  user", "      user")
    file = write(tmp_path, before)
    checked = cli("fmt", "--check", file)
    assert (checked.exit_code, "would reformat" in checked.stderr) == (1, True)
    shown = cli("fmt", "--diff", file)
    assert (shown.exit_code, '+  user("#{q}");' in shown.stdout) == (0, True)
    assert Path(file).read_text() == before


def test_fmt_leaves_a_link_a_link(tmp_path: Path) -> None:
    """Formatting through a link rewrites what it points to."""
    write(tmp_path, GOOD.replace("  user", "    user"), "real.plan")
    link = tmp_path / "link.plan"
    link.symlink_to("real.plan")
    assert cli("fmt", str(link)).exit_code == 0
    assert link.is_symlink()
    assert (tmp_path / "real.plan").read_text() == GOOD


def test_fmt_on_a_full_disk_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the new text can't be written, the old one stays and nothing is left beside it."""
    before = GOOD.replace("  user", "    user")
    file = write(tmp_path, before)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = cli("fmt", file)
    assert result.exit_code == 1
    assert "error[unwritable-file]" in result.stderr
    assert Path(file).read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.plan"]


def test_fmt_leaves_a_wrong_file(tmp_path: Path) -> None:
    """A file that does not parse stays as it is."""
    file = write(tmp_path, "a = plan( {")
    assert cli("fmt", file).exit_code == 1
    assert Path(file).read_text() == "a = plan( {"


# --- show


@pytest.mark.parametrize(
    ("stage", "said"), [("ast", "PlanDef ask"), ("graph", "ask = plan(q)"), ("schedule", "schedule ask")]
)
def test_show_prints_each_stage(plan: str, stage: str, said: str) -> None:
    """Each form of a plan is readable text on stdout."""
    result = cli("show", plan, "--stage", stage)
    assert result.exit_code == 0
    assert said in result.stdout


def test_show_is_quiet_when_its_reader_leaves(plan: str) -> None:
    """A pipe that nobody reads gives no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    process = child("show", plan, stdout=writer)
    os.close(writer)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 1


# --- explain


def test_explain_tells_the_worst_case(plan: str) -> None:
    """The published figures are there by name, for a person and as JSON."""
    text = cli("explain", plan, "--baseline", "24").stdout
    for name in ("parallelism ratio", "acceleration ratio", "token latency speedup", "pages, depth first", "steps"):
        assert name in text
    found = document(cli("explain", plan, "--baseline", "24", "--json"))
    assert (found["total_tokens"], found["critical_path_tokens"]) == (12, 4)
    assert (found["parallelism_ratio"], found["token_latency_speedup"]) == (3, 6)
    assert found["acceleration_ratio"] == pytest.approx(2 / 3)
    assert found["tokens_reprefilled"] == 0


def test_explain_counts_what_a_model_and_inputs_make_known(plan: str) -> None:
    """With a model and the inputs the tokens are counted by its tokenizer, not bounded by bytes."""
    found = document(cli("explain", plan, "--model", "random", "--pages", "64", "--input", "q=why", "--json"))
    longer = document(cli("explain", plan, "--model", "random", "--pages", "64", "--input", "q=why not", "--json"))
    assert found["exact_sizes"] is True
    assert found["unbounded"] == []
    assert found["tokens_prefilled"] < longer["tokens_prefilled"] <= found["tokens_prefilled"] + 4


def test_explain_bounds_what_a_run_takes(plan: str) -> None:
    """A run never exceeds what was explained."""
    bound = document(cli("explain", plan, "--model", "random", "--pages", "2048", "--input", "q=why", "--json"))
    counts = document(run_random(plan, "--input", "q=why", "--json"))["counts"]
    for name in ("total_tokens", "critical_path_tokens", "tokens_prefilled", "tokens_aliased", "tokens_flushed"):
        assert counts[name] <= bound[name]
    assert counts["steps"] <= bound["steps_bound"]


def test_explain_predicts_for_the_shape_of_the_model(plan: str) -> None:
    """The time is the model's own where one is known; without one it is said whose shape was taken."""
    assert "with SmolLM2's shape" in cli("explain", plan).stdout
    unknown = document(cli("explain", plan, "--input", "q=why", "--json"))
    text = cli("explain", plan, "--input", "q=why", "--model", "random", "--pages", "64").stdout
    assert "predicted time" in text and "SmolLM2" not in text
    small = document(cli("explain", plan, "--input", "q=why", "--model", "random", "--pages", "64", "--json"))
    assert small["predicted_s"] < unknown["predicted_s"] / 10


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": False},
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "qk_norm": True},
    ],
)
def test_a_model_shape_counts_what_a_decoder_reads(changes: dict[str, bool]) -> None:
    """SmolLM2's config gives the constant of the cost model, and each option of a config its own weights."""
    config = replace(SMOLLM2_CONFIG, **changes)
    found = model_shape(config, 4)
    more = 0
    if config.qk_norm:
        more = 30 * (2 * 64 + (9 + 2 * 3) * 64 + 576 + 2 * 1536 + 576)
    assert found.num_parameters == SMOLLM2.num_parameters + more
    assert found.weight_bytes == 4 * found.num_parameters
    assert found.kv_bytes_per_token == SMOLLM2.kv_bytes_per_token


def test_explain_holds_a_text_to_its_bound(tmp_path: Path) -> None:
    """With a model a given text is counted against the bound that its parameter states."""
    file = write(tmp_path, 'a = plan(q: text(4)) { text("#{q}"); b = gen(max=2); return(b); }')
    args = ("explain", file, "--model", "random", "--pages", "64", "--input")
    assert cli(*args, "q=#!?%").exit_code == 0
    result = cli(*args, "q=#!?%&*")
    assert result.exit_code == 1
    assert "error[bad-input]: a text of the input `q` takes 6 tokens, and its bound is 4" in result.stderr


def test_explain_refuses_a_pool_that_is_too_small(plan: str) -> None:
    """A pool below the depth-first peak is refused here too."""
    result = cli("explain", plan, "--pages", "1")
    assert result.exit_code == 1
    assert "error[pool-too-small]" in result.stderr


# --- run


def test_run_prints_one_json_object(plan: str) -> None:
    """`--json` gives one object with exactly the promised fields and counts, which add up."""
    result = run_random(plan, "--input", "q=why", "--json")
    assert result.exit_code == 0
    found = document(result)
    assert set(found) == {"value", "status", "reason", "branches", "counts"}
    assert isinstance(found["value"], int)
    assert [branch["path"] for branch in found["branches"]] == ["a[0]", "a[1]", "a[2]"]
    assert {"path", "status", "text", "reason", "tokens"} <= set(found["branches"][0])
    counts = found["counts"]
    assert set(counts) >= COUNTS
    assert counts["tokens_aliased"] > 0
    assert counts["tokens_reprefilled"] == 0
    assert sum(branch["tokens"] for branch in found["branches"]) == counts["tokens_decoded"]
    assert counts["pages_peak"] <= counts["pages_bound"]
    assert counts["steps"] <= counts["steps_bound"]


def test_run_prints_the_value_and_plain_lines(plan: str) -> None:
    """Without a terminal the value alone is on stdout, and a line for each gen, join and branch on stderr."""
    result = run_random(plan, "--input", "q=why")
    assert result.exit_code == 0
    assert result.stdout.strip().lstrip("-").isdigit()
    lines = result.stderr.splitlines()
    assert sum(line.startswith("a[") and " tokens, " in line for line in lines) == 3
    assert any(line.startswith("a: joined, 3 ok") for line in lines)
    assert lines[-1].startswith("ok: 3 branches")


def test_run_repeats_itself(plan: str) -> None:
    """One seed gives one result; another may not."""
    first, second, other = (
        document(run_random(plan, "--input", "q=why", "--json", "--seed", seed, "--deterministic"))["branches"]
        for seed in ("7", "7", "8")
    )
    assert first == second
    assert first != other


def test_run_reads_many_inputs(tmp_path: Path, plan: str) -> None:
    """`--inputs` gives a list, one object for each line, `--input` holding for all."""
    lines = write(tmp_path, '{"q": "one"}\n\n{"q": "two"}\n', "in.jsonl")
    found = document(run_random(plan, "--inputs", lines, "--json"))
    assert [run["status"] for run in found] == ["ok", "ok"]
    same = document(run_random(plan, "--inputs", lines, "--input", "q=one", "--json", "--lanes", "2"))
    assert same[0]["branches"] == found[0]["branches"]


def test_run_reads_values_by_their_bounds(tmp_path: Path) -> None:
    """Numbers and lists are JSON, the rest text; `@` reads a file less its last newline; `@@` is an `@`."""
    file = write(tmp_path, TYPED)
    note = write(tmp_path, "from a file\n", "note.txt")
    result = run_random(
        file, "--json", "--input", "xs=[1, 2]", "--input", "n=3", "--input", "f=2", "--input", f"t=@{note}",
        "--input", "any=@@3=4",
    )  # fmt: skip
    assert document(result)["value"] == [2, 3, 2, "from a file", "@3=4"]


@pytest.mark.parametrize(
    ("inputs", "code", "said"),
    [
        (["n=3"], "missing-input", "`xs`, `f`, `t`, `any`"),
        (["m=3"], "unknown-input", "`m`"),
        (["n=three"], "bad-input", "not JSON"),
        (["n=3.5"], "bad-input", "a number"),
        (["n=true"], "bad-input", "true or false"),
        (["n=NaN"], "bad-input", "not JSON"),
        (["xs={}"], "bad-input", "an object"),
        (["xs=[1,2,3,4,5]"], "bad-input", "5 items"),
        (['xs=["a"]'], "bad-input", "in one item this is text"),
        (["xs=" + "[" * 100_000], "bad-input", "JSON"),
        (["t=@/nowhere/at/all"], "unreadable-input", "No such file"),
        (["t=\udcff"], "bad-input", "not UTF-8"),
    ],
)  # fmt: skip
def test_run_refuses_inputs(tmp_path: Path, inputs: list[str], code: str, said: str) -> None:
    """An input that the plan can't take is an error before any model is loaded."""
    given = dict(pair.split("=", 1) for pair in ["xs=[1]", "n=1", "f=1.5", "t=x", "any=y"])
    if code == "bad-input":
        inputs = inputs + [f"{k}={v}" for k, v in given.items() if k != inputs[0].split("=")[0]]
    result = cli("run", write(tmp_path, TYPED), "--model", "/no/model", *(x for i in inputs for x in ("--input", i)))
    assert result.exit_code == 1
    assert f"error[{code}]" in result.stderr
    assert said in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [(b"", "holds no inputs"), (b"[1]\n", "no JSON object"), (b"{\n", "not JSON"), (b"\xff", "not UTF-8"),
     (b'{"q": "a"}\n{"p": "b"}\n', "line 2")],
)  # fmt: skip
def test_run_refuses_an_inputs_file(tmp_path: Path, plan: str, text: bytes, said: str) -> None:
    """A wrong line of the inputs file is named."""
    result = run_random(plan, "--inputs", write(tmp_path, text, "in.jsonl"))
    assert result.exit_code == 1
    assert said in result.stderr
    assert "internal" not in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["--lanes", "0"], ["--lanes", "many"], ["--pages", "-1"], ["--page-size", "0"], ["--chunk", "0"],
        ["--dtype", "float8"], ["--template", "chatml"], ["--input", "q"], ["--nope"], ["--seed", "x"],
    ],
)  # fmt: skip
def test_run_usage_errors_exit_2(plan: str, args: list[str]) -> None:
    """A wrong command line is told apart from a wrong plan."""
    result = run_random(plan, *args)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


def test_run_without_the_model(plan: str) -> None:
    """A model that is not there is an error with what to do."""
    result = cli("run", plan, "--input", "q=x", "--model", "smolm2")
    assert result.exit_code == 1
    assert "error[no-model]" in result.stderr
    assert "did you mean `smollm2`?" in result.stderr


def test_run_refuses_a_pool_that_is_too_small(plan: str) -> None:
    """A pool below the depth-first peak is refused, with the number of pages that would do."""
    result = run_random(plan, "--input", "q=x", "--pages", "1")
    assert result.exit_code == 1
    assert "error[pool-too-small]" in result.stderr


def test_run_says_why_a_plan_failed(tmp_path: Path) -> None:
    """A failed run exits 1, says why, and still prints its JSON object."""
    file = write(tmp_path, 'a = plan() { text("x"); n = gen(type=int, max=3); need(n == n + 1); return(n); }')
    result = run_random(file, "--json")
    assert result.exit_code == 1
    found = document(result)
    assert (found["status"], found["value"]) == ("failed", None)
    assert "need" in found["reason"]
    plain = run_random(file)
    assert plain.exit_code == 1
    assert "error[run-failed]" in plain.stderr
    assert plain.stdout == ""


def test_run_calls_host_functions(tmp_path: Path) -> None:
    """A module's public functions can be called; one that raises fails its branch and says how."""
    module = write(
        tmp_path, "def double(x):\n    return 2 * x\ndef fail(x):\n    raise RuntimeError('no luck')\n", "f.py"
    )
    good = write(tmp_path, 'a = plan(n: int) { text("x"); g = gen(max=1); m = double(n); return(m); }')
    assert document(run_random(good, "--functions", module, "--input", "n=4", "--json"))["value"] == 8
    assert cli("check", good, "--functions", module).exit_code == 0
    assert cli("check", good).exit_code == 1
    bad = write(tmp_path, 'a = plan(n: int) { text("x"); m = fail(n); return(m); }', "b.plan")
    failed = run_random(bad, "--functions", module, "--input", "n=4", "--json")
    assert failed.exit_code == 1
    assert "no luck" in document(failed)["reason"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("raise ValueError('at import')", "at import"), ("import sys; sys.exit(3)", "SystemExit"),
     ("x = 1", "defines no function"), ("def (", "SyntaxError"), (None, "cannot import")],
)  # fmt: skip
def test_run_refuses_functions(tmp_path: Path, plan: str, text: str | None, said: str) -> None:
    """A module of functions that can't be imported is the user's error, not ours."""
    module = "no_such_module_anywhere" if text is None else write(tmp_path, text, "f.py")
    result = run_random(plan, "--functions", module, "--input", "q=x")
    assert result.exit_code == 1
    assert "error[bad-functions]" in result.stderr
    assert said in result.stderr


LONG = """
long = plan() {
  text("x");
  a = fork(2) {
    quick = gen(type=int, max=2);
    ready = started(quick);
    loop(6000) { rest = gen(max=8); };
    return(quick);
  } join(all, drop);
  return(a);
}
"""


@pytest.mark.parametrize("as_json", [True, False])
def test_run_stops_cleanly_on_an_interrupt(tmp_path: Path, as_json: bool) -> None:
    """Ctrl-C ends the run with what was finished: exit 1, one JSON object, no traceback."""
    functions = write(
        tmp_path,
        "import sys\ndef started(x):\n    print('started', file=sys.stderr, flush=True)\n    return x\n",
        "f.py",
    )
    args = ["run", write(tmp_path, LONG), "--model", "random", "--pages", "8192", "--functions", functions]
    process = child(*args, *(["--json"] if as_json else []))
    assert process.stderr is not None
    # A line from each of the two branches, by way of the host function.
    waiting = 2
    for line in process.stderr:
        waiting -= line.startswith("started")
        if not waiting:
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in stderr
    assert "interrupted" in stderr
    if as_json:
        found = json.loads(stdout)
        assert found["status"] == "cancelled"
        assert [branch["status"] for branch in found["branches"]] == ["cancelled", "cancelled"]
        assert found["counts"]["tokens_decoded"] > 0


# --- the rest


def test_a_bug_of_ours_is_called_one(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error nobody foresaw is called a bug; its traceback is for those who ask."""

    def broken(source: object) -> str:
        raise RuntimeError("the works\nare jammed")

    monkeypatch.setattr("anabranch.cli.fmt.format_source", broken)
    result = cli("fmt", plan)
    assert result.exit_code == 1
    assert "this is a bug in anabranch: RuntimeError: the works" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("ANABRANCH_DEBUG", "1")
    assert "Traceback" in cli("fmt", plan).stderr
    assert format_source is not broken


def test_model_get_knows_its_models() -> None:
    """A model that has no name here is refused with a suggestion."""
    result = cli("model", "get", "smollm")
    assert result.exit_code == 1
    assert "did you mean `smollm2`?" in result.stderr


def test_version() -> None:
    """`--version` says the package's version."""
    import anabranch

    assert cli("--version").stdout == f"anabranch {anabranch.__version__}\n"


def test_json_text_is_strict() -> None:
    """NaN and infinities are null, a lone surrogate is U+FFFD, and no int is too long."""
    text = json_text({"a": [float("nan"), float("inf"), 1.5], "b\ud800": "\ud800ü", "c": 10**5000}).decode()
    found = json.loads(text)
    assert found["a"] == [None, None, 1.5]
    assert found["b\ufffd"] == "\ufffdü"
    assert int(found["c"], 16) == 10**5000


def test_printable_text_moves_no_cursor() -> None:
    """Control characters of a model's text never reach the terminal as such."""
    assert printable("a\x1b[2Jb\tc\nd\x9b\ud800\u202e") == "a\\x1b[2Jb\tc\nd\\x9b\ufffd\\x202e"
    assert one_line("one\ntwo " + "x" * 50, 10) == "…" + "x" * 9


def thousand() -> list[Event]:
    """A thousand branches have begun, and every third has ended."""
    events: list[Event] = [BranchStarted(())]
    for i in range(1000):
        path: ThreadPath = (f"a[{i}]",)
        events += [BranchStarted(path), TextDelta(path, None, f"text of {i}")]
    for i in range(0, 1000, 3):
        path = (f"a[{i}]",)
        events.append(GenEnded(path, "g", None, (1,), 1, "over", "over", "stop"))
        events.append(BranchEnded(path, "ok" if i % 2 else "failed", "over", None, "why", 1))
    return events


def test_the_tree_shows_a_bounded_number_of_branches() -> None:
    """Of a thousand branches a screenful is shown, those that run first, under their parent."""
    tree = live.Branches()
    for event in thousand():
        tree.take(0, event)
    rows = tree.rows(20)
    assert len(rows) == 20
    assert [row.name for row in rows[:3]] == ["#0", "a[1]", "a[2]"]
    assert all(row.status is None for row in rows)
    assert tree.num_running == 1 + 666
    assert tree.ended == {"ok": 167, "failed": 167}


def test_the_tree_shows_what_ended_where_there_is_room() -> None:
    """Rounds of a loop are no threads, and ended branches are shown after those that run."""
    tree = live.Branches()
    for event in (
        BranchStarted(()),
        BranchStarted(("loop0[1]", "a[0]"), "left"),
        BranchStarted(("loop0[1]", "a[1]")),
        TextDelta(("loop0[1]", "a[1]", "loop2[0]"), None, "inside a loop"),
        BranchEnded(("loop0[1]", "a[0]"), "late", "", None, "the deadline passed", 3),
    ):
        tree.take(0, event)
    assert [(row.name, row.status, row.tail) for row in tree.rows(10)] == [
        ("#0", None, ""),
        ("a[0]", "late", ""),
        ("a[1]", None, "inside a loop"),
    ]


def test_the_tree_is_drawn_and_cleared() -> None:
    """On a terminal the tree is drawn no more often than it must, with the rest counted, and then cleared."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, height=12, color_system=None)
    now = [0.0]
    tree = live.LiveTree(console, clock=lambda: now[0])
    for event in thousand():
        tree.show(0, event)
        now[0] += 0.001
    tree.close()
    text = out.getvalue()
    assert "more not shown; " in text
    assert text.count("running") <= len(thousand()) * 0.001 / live.REFRESH_S + 2
    assert max(len(line) for line in text.splitlines() if "\x1b" not in line) <= 60


def test_lines_describe_what_ended() -> None:
    """Plain lines name the place, the end and the reason, on one line each."""
    assert live.describe(Joined((), "a", (0, 2), (0,), 1)) == "a: joined, 2 ok"
    assert live.describe(BranchEnded(("a[1]",), "failed", "", None, "no luck", 4)) == "a[1]: failed, 4 tokens; no luck"
    assert live.describe(TextDelta((), None, "x")) == ""
