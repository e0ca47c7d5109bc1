"""Builds: a folder runs as the plan and the model do that it was made of, and is refused when it is not as it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import anabranch
from anabranch.cli.app import app
from anabranch.dsl.diagnostics import PlanError
from anabranch.runtime.artefact import MANIFEST, ModelParts, is_build, open_build, read_manifest
from anabranch.runtime.artefact_write import write_build
from anabranch.runtime.config import ModelConfig
from anabranch.runtime.engine import Engine, EngineConfig
from anabranch.runtime.model import Decoder
from anabranch.runtime.models import load
from anabranch.runtime.programs import ProgramDecoder
from anabranch.runtime.random_model import random_config, random_weights
from anabranch.runtime.smollm2 import hf_config, write_safetensors
from anabranch.runtime.step_graph import export_step, save
from anabranch.runtime.tokenizer import byte_tokenizer

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SMALL = """ask = plan(q) {
  user("#{q}");
  a = fork(3) { n = gen("It is ", type=int, max=4); return(n); } join(vote(n), stitch);
  why = gen("since ", max=12, temperature=0.8);
  return([a, why]);
}
"""
POOL = ("--pages", "512")


def cli(*args: str | Path) -> Any:
    """Run the command line in this process."""
    return CliRunner().invoke(app, list(map(str, args)))


def write_model(folder: Path) -> None:
    """The random test model, with heads of a size that the kernels have, as a folder in Hugging Face's layout."""
    tokenizer = byte_tokenizer()
    config = replace(random_config(tokenizer), head_dim=64)
    names = {**tokenizer.template_names, "add_bos_token": True, "chat_template": tokenizer.chat_template}
    documents = {"config.json": hf_config(config), "tokenizer.json": tokenizer.spec, "tokenizer_config.json": names}
    folder.mkdir()
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    with (folder / "model.safetensors").open("wb") as file:
        write_safetensors(random_weights(config, tokenizer, 0), file)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a plan `small.plan`, and its build `small`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("builds")
    write_model(folder / "model")
    (folder / "small.plan").write_text(SMALL, encoding="utf-8")
    done = cli("build", folder / "small.plan", "--model", folder / "model", "-o", folder / "small")
    assert done.exit_code == 0, done.stderr
    assert "plan `ask`, 8 files" in done.stdout
    return folder


@pytest.fixture
def build(place: Path, tmp_path: Path) -> Path:
    """A copy of the build, to be spoilt."""
    return Path(shutil.copytree(place / "small", tmp_path / "small"))


def document(result: Any) -> dict[str, Any]:
    """A run as JSON, without what time decides."""
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    del found["counts"]["elapsed_s"]
    return found


def refused(result: Any) -> str:
    """The error of a command that ended with one; the first line."""
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    return str(result.stderr.splitlines()[0])


# --- what it runs


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vote", ["--input", "problem=How many legs?", "--seed", "3"]),
        ("survey", ["--input", "question=Why?", "--lanes", "3", "--chunk", "7"]),
        ("nested", ["--input", "problem=x", "--deterministic", "--preempt", "recompute", "--run-ahead", "0"]),
    ],
)
def test_a_build_runs_as_the_plan_does(place: Path, tmp_path: Path, name: str, options: list[str]) -> None:
    """The values, texts, branches and counts of `run PLAN --device cpu`, whose steps have the same definitions."""
    plan = EXAMPLES / f"{name}.plan"
    deterministic = [option for option in options if option == "--deterministic"]
    done = cli("build", plan, "--model", place / "model", "--out", tmp_path / "built", *deterministic)
    assert done.exit_code == 0, done.stderr
    found = document(cli("run", tmp_path / "built", *options, *POOL, "--json", "--verify"))
    assert found == document(cli("run", plan, "--model", place / "model", "--device", "cpu", *options, *POOL, "--json"))
    assert found["counts"]["tokens_decoded"] > 20


NO_COMPILER = """
import sys
from pathlib import Path
from anabranch.compiler import lower, pipeline
from anabranch.dsl import check, parse
from anabranch.runtime import models, step_graph, weights
from anabranch.cli.app import app

def never(*args, **kwargs):
    raise SystemError("this must not be called")

lark = "lark" in sys.modules
for module in list(sys.modules.values()):
    for name in ("parse", "parse_text", "check", "lower", "compile_plan", "export_step"):
        if getattr(module, "__name__", "").startswith("anabranch") and callable(getattr(module, name, None)):
            setattr(module, name, never)
pipeline.PASSES = (never,)
weights.SafetensorsFolder.__getitem__ = weights.SafetensorsFolder.__init__ = never
app(sys.argv[1:], standalone_mode=False)
assert lark or "lark" not in sys.modules
"""


def test_running_parses_compiles_loads_and_exports_nothing(place: Path, build: Path) -> None:
    """In a process of its own, away from the plan and the model, with those functions out of order."""
    command = [sys.executable, "-c", NO_COMPILER, "run", str(build), "--input", "q=hi", "--json", *POOL]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=build.parent, check=False)
    assert done.returncode == 0, done.stderr
    expected = document(cli("run", place / "small", "--input", "q=hi", "--json", *POOL))
    found = json.loads(done.stdout)
    assert (found["value"], found["branches"]) == (expected["value"], expected["branches"])


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def test_the_other_options_of_run_work(place: Path, tmp_path: Path) -> None:
    """Many inputs, a schedule that `verify` takes, no template; bounds are checked with the inputs."""
    (tmp_path / "in.jsonl").write_text('{"q": "a"}\n{"q": "b"}\n', encoding="utf-8")
    small, plan = place / "small", place / "small.plan"
    options = ["--inputs", tmp_path / "in.jsonl", "--template", "raw", "--json", *POOL]
    done = cli("run", small, *options, "--schedule", tmp_path / "s.json")
    expected = cli("run", plan, "--model", place / "model", "--device", "cpu", *options)
    assert [run["value"] for run in json.loads(done.stdout)] == [run["value"] for run in json.loads(expected.stdout)]
    assert cli("verify", tmp_path / "s.json").exit_code == 0
    assert cli("verify", small / "schedule.json").exit_code == 0
    assert "missing-input" in refused(cli("run", small, *POOL))
    assert "unknown-input" in refused(cli("run", small, "--input", "r=1", *POOL))
    assert "prompt-too-long" in refused(cli("run", small, "--input", f"q={'x' * 70000}", *POOL))
    assert "pool-too-small" in refused(cli("run", small, "--input", "q=x", "--pages", "2"))


def test_what_a_build_cannot_take_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    """Options that are the build's own, a journal, and determinism that it was not built for; nothing is written."""
    small, journal = place / "small", tmp_path / "j.jsonl"
    for option in (
        ("--plan", "ask"), ("--model", "smollm2"), ("--dtype", "float32"), ("--device", "cpu"), ("--page-size", "16"),
        ("--journal", str(journal)),
    ):  # fmt: skip
        said = refused(cli("run", small, "--input", "q=x", *option))
        assert said.startswith("error[bad-build]") and f"`{option[0]}`" in said
    assert not journal.exists()
    assert "not-deterministic" in refused(cli("run", small, "--input", "q=x", "--deterministic"))
    assert "is-a-directory" in refused(cli("run", place, "--input", "q=x"))


def test_host_functions_are_asked_for(place: Path, tmp_path: Path) -> None:
    """The manifest names those that the plan calls, and the run takes them from `--functions`."""
    (tmp_path / "mine.py").write_text("def twice(n):\n    return 2 * n\n\n\ndef unused(n):\n    return n\n")
    (tmp_path / "other.py").write_text("def thrice(n):\n    return 3 * n\n")
    plan = tmp_path / "f.plan"
    plan.write_text('p = plan(n: int) { text("a"); g = gen(max=1); return(twice(n)); }')
    functions, out = ("--functions", tmp_path / "mine.py"), tmp_path / "built"
    assert cli("build", plan, "--model", place / "model", "-o", out, *functions).exit_code == 0
    assert read_manifest(out).functions == ("twice",)
    assert "calls `twice`" in refused(cli("run", out, "--input", "n=4", *POOL))
    assert "bad-functions" in refused(cli("run", out, "--input", "n=4", "--functions", tmp_path / "other.py", *POOL))
    assert document(cli("run", out, "--input", "n=4", "--json", *functions, *POOL))["value"] == 8


def test_the_programs_hold_each_weight_once(place: Path) -> None:
    """On the disk each program has its own; in memory the second takes the first's."""
    build = open_build(place / "small")
    decoder = build.model().decoder
    assert isinstance(decoder, ProgramDecoder)
    addresses = [
        {name: weight.data_ptr() for name, weight in step.state_dict().items()}  # type: ignore[attr-defined]
        for step in (decoder.run_decode, decoder.run_prefill)
    ]
    assert addresses[0] == addresses[1] and len(addresses[0]) > 10


# --- what is refused


def test_one_changed_byte_is_refused(place: Path, build: Path) -> None:
    """In each file of the build, at its begin, middle and end; a longer file, a shorter one, and none."""
    names = sorted(path.name for path in build.iterdir())
    assert len(names) == 9 - 1 and MANIFEST in names
    for name in names:
        content = (build / name).read_bytes()
        for at in (0, len(content) // 2, len(content) - 1):
            spoilt = bytearray(content)
            spoilt[at] ^= 1
            (build / name).write_bytes(spoilt)
            if name == MANIFEST and not is_build(build):
                # A folder whose manifest is no manifest any more is a folder like any other.
                assert "is-a-directory" in refused(cli("run", build, "--input", "q=x"))
                with pytest.raises(PlanError, match="bad-build"):
                    open_build(build)
                continue
            said = refused(cli("run", build, "--input", "q=x"))
            assert said.startswith("error[bad-build]") and name in said
        for other in (content + b"\n", content[:-1]):
            (build / name).write_bytes(other)
            with pytest.raises(PlanError, match="bad-build") as raised:
                open_build(build)
            assert name in raised.value.diagnostics[0].message
        (build / name).unlink()
        with pytest.raises(PlanError, match="bad-build") as raised:
            open_build(build)
        assert name in raised.value.diagnostics[0].message
        (build / name).write_bytes(content)
    assert open_build(build).manifest == read_manifest(place / "small")


def sealed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest, and seal it as a build does."""
    found = json.loads((folder / MANIFEST).read_text())
    del found["sha256"]
    change(found)
    found["sha256"] = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(found, indent=1) + "\n")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("version", 2, "version 2 of the build's format"),
        ("anabranch", "0.0.9", f"version 0.0.9 of anabranch, and this is {anabranch.__version__}"),
        ("torch", "2.11.0", f"version 2.11.0 of torch, and this is {torch.__version__}"),
        ("plan", "other", "is of the plan `ask`, not `other`"),
        ("fingerprint", "f00d", "not f00d"),
        ("files", {}, "names no `plan.plan`"),
        ("files", {"../x": {"bytes": 1, "sha256": ""}}, "lacks what a manifest says"),
        ("files", {"/etc/passwd": {"bytes": 1, "sha256": ""}}, "lacks what a manifest says"),
        ("files", {"a\x00b": {"bytes": 1, "sha256": ""}}, "lacks what a manifest says"),
        ("files", [], "lacks what a manifest says"),
        ("torch", [], "and this is"),
        ("functions", 5, "lacks what a manifest says"),
        ("model", None, "lacks what a manifest says"),
    ],
)
def test_another_version_is_refused(build: Path, name: str, value: Any, said: str) -> None:
    """Of the format, of Anabranch and of torch, however well the manifest is sealed; and what names other files."""
    sealed(build, lambda manifest: manifest.update({name: value}))
    assert said in refused(cli("run", build, "--input", "q=x"))


def replaced(build: Path, name: str, content: bytes) -> None:
    """Put something else into a build, with its size and hash."""
    (build / name).write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    sealed(build, lambda manifest: manifest["files"].update({name: entry}))


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("graph.json", b"{}", "bad-build"),
        ("graph.json", b'{"format":"anabranch-graph","version":1,"records":[["Graph","a",[]]]}', "bad-build"),
        ("model.json", b"[]", "bad-build"),
        ("model.json", b'[["ModelParts"]]', "bad-build"),
        ("model.json", b"\xff", "bad-build"),
        ("model.json", {"num_kv_heads": 0}, "bad-build"),
        ("model.json", {"num_heads": 3}, "bad-build"),
        ("model.json", {"vocab_size": 2}, "bad-build"),
        ("model.json", {"block_m": 7}, "bad-build"),
        ("model.json", {"eos_ids": [-1]}, "bad-build"),
        ("model.json", {"page_size": 3}, "bad-device"),
        ("model.json", {"device": "cuda:99"}, "bad-device"),
        ("model.json", {"device": "floppy"}, "bad-device"),
        ("model.json", {"dtype": "int8"}, "bad-build"),
        ("tokenizer.json", b"[" * 10**5, "bad-build"),
        ("tokenizer.json", b"{}", "bad-model"),
        ("decode.pt2", b"PK", "bad-program"),
    ],
)
def test_what_is_in_a_file_is_not_trusted(build: Path, name: str, content: bytes | dict[str, Any], code: str) -> None:
    """A file that a manifest vouches for, and that holds something else: an error, and no crash."""
    if isinstance(content, dict):
        records = json.loads((build / name).read_bytes())
        kinds = {"ModelParts": ModelParts, "ModelConfig": ModelConfig}
        for record in records:
            names = [field.name for field in fields(kinds[record[0]])] if record[0] in kinds else []
            for field, value in content.items():
                if field in names:
                    record[1 + names.index(field)] = value
        content = json.dumps(records).encode()
    replaced(build, name, content)
    assert refused(cli("run", build, "--input", "q=x", *POOL)).startswith(f"error[{code}]")


def test_a_program_of_another_model_is_refused(place: Path, build: Path) -> None:
    """The program's own manifest names the model too."""
    decoder = load(str(place / "model"), device="cpu").decoder
    assert isinstance(decoder, Decoder)
    save(export_step(decoder, "decode"), build / "decode.pt2", fingerprint="f00d")
    replaced(build, "decode.pt2", (build / "decode.pt2").read_bytes())
    assert "bad-program" in refused(cli("run", build, "--input", "q=x", *POOL))


# --- how it is written


def test_nothing_but_a_build_is_replaced(place: Path, tmp_path: Path) -> None:
    """What is there is left alone without `--force`, and with it where it is no build; all before the model is read."""
    model = ("--model", place / "no-such-model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary").write_text("x")
    (tmp_path / "file").write_text("x")
    for out, force, said in (
        ("mine", ("--force",), "something else than a build"),
        ("file", ("--force",), "is no folder"),
        ("none/built", (), "there is no directory"),
    ):
        assert said in refused(cli("build", place / "small.plan", *model, "-o", tmp_path / out, *force))
    assert "is there already" in refused(cli("build", place / "small.plan", *model, "-o", place / "small"))
    assert (tmp_path / "mine" / "diary").read_text() == "x"
    assert "no-model" in refused(cli("build", place / "small.plan", *model, "-o", tmp_path / "new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]


def test_a_build_is_replaced_whole(place: Path, build: Path) -> None:
    """With `--force` another plan takes its place; files of the old one are gone, and nothing lies beside it."""
    (build / "stray").write_text("x")
    plan = build.parent / "other.plan"
    plan.write_text('other = plan() { text("a"); g = gen(max=2); }')
    assert cli("build", plan, "--model", place / "model", "-o", build, "--force").exit_code == 0
    assert open_build(build).manifest.plan == "other" and not (build / "stray").exists()
    assert sorted(path.name for path in build.parent.iterdir()) == ["other.plan", "small"]


CHILD = """
import os, resource, signal, sys
from anabranch.cli.app import main
mode = sys.argv.pop(1)
if mode == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))
if mode == "ctrl-c":
    def interrupt(event, args):
        if event == "open" and str(args[0]).endswith("prefill.pt2"):
            os.kill(os.getpid(), signal.SIGINT)
    sys.addaudithook(interrupt)
main()
"""


@pytest.mark.parametrize(("mode", "said"), [("full", "error[unwritable-file]"), ("ctrl-c", "interrupted")])
def test_a_build_that_stops_leaves_what_was_there(place: Path, build: Path, mode: str, said: str) -> None:
    """A full disk and ctrl-C while the programs are written: no half folder, and the old build runs on."""
    before = (build / MANIFEST).read_bytes()
    command = [sys.executable, "-c", CHILD, mode, "build", str(place / "small.plan"), "--model", str(place / "model")]
    done = subprocess.run(
        [*command, "-o", str(build), "--force"], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in build.parent.iterdir()] == ["small"]
    assert (build / MANIFEST).read_bytes() == before
    assert open_build(build).manifest.plan == "ask"


def test_a_plan_or_model_that_is_wrong_is_told(place: Path, tmp_path: Path) -> None:
    """As `check` tells it; a model whose heads the kernels do not have; a target that there is none of."""
    wrong = tmp_path / "wrong.plan"
    wrong.write_text("p = plan() { g = gen(max=2); return(h); }")
    out = ("-o", tmp_path / "built")
    assert "undefined-name" in refused(cli("build", wrong, "--model", place / "model", *out))
    wrong.write_text('p = plan() { text("a"); g = gen(max=99999999); }')
    assert "context-too-long" in refused(cli("build", wrong, "--model", place / "model", *out))
    assert "head size of 16" in refused(cli("build", place / "small.plan", "--model", "random", *out))
    target = cli("build", place / "small.plan", "--model", place / "model", *out, "--target", "sm_91")
    assert target.exit_code == 2 and "sm_90" in target.stderr
    timed = tmp_path / "timed.plan"
    timed.write_text('p = plan() { text("a"); f = fork(2, deadline="5s") { g = gen(max=2); }; }')
    assert "wall-clock" in refused(cli("build", timed, "--model", place / "model", *out, "--deterministic"))
    assert not (tmp_path / "built").exists()


def test_a_plan_without_a_static_schedule_is_built(place: Path, tmp_path: Path) -> None:
    """The manifest says why there is none, and the plan runs all the same."""
    plan = tmp_path / "wide.plan"
    plan.write_text(
        'p = plan(xs: list) { text("a"); m = map(x: xs, upto=1000000) { g = gen(max=1); }; return(len(m)); }'
    )
    done = cli("build", plan, "--model", place / "model", "-o", tmp_path / "wide")
    assert done.exit_code == 0, done.stderr
    assert "there is no static schedule" in done.stderr
    assert read_manifest(tmp_path / "wide").schedule and not (tmp_path / "wide" / "schedule.json").exists()
    assert document(cli("run", tmp_path / "wide", "--input", "xs=[1, 2]", "--json", *POOL))["value"] == 2


# --- kernels


@pytest.mark.skipif(find_spec("triton") is not None, reason="Triton is installed")
def test_without_triton_no_kernels_are_built(place: Path, tmp_path: Path) -> None:
    """And the manifest and the command say so."""
    done = cli("build", place / "small.plan", "--model", place / "model", "-o", tmp_path / "b", "--target", "sm_90")
    assert done.exit_code == 0 and "no kernels were built: Triton is not installed" in done.stderr
    manifest = read_manifest(tmp_path / "b")
    assert manifest.kernels == () and "not installed" in manifest.kernels_missing


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_are_built_for_a_target(place: Path, tmp_path: Path) -> None:
    """Each kernel that the model launches, as a cubin with its constants, among the files that are checked."""
    done = cli("build", place / "small.plan", "--model", place / "model", "-o", tmp_path / "b", "--target", "sm_90")
    assert done.exit_code == 0, done.stderr
    build = open_build(tmp_path / "b")
    assert build.manifest.kernels == ("sm_90",) and build.manifest.kernels_missing == ""
    folder = tmp_path / "b" / "kernels" / "sm_90"
    index = json.loads((folder / "index.json").read_text())["kernels"]
    assert {path.name for path in folder.glob("*.cubin")} == {entry["file"] for entry in index}
    by_name = {entry["kernel"]: entry for entry in index}
    assert by_name["segment_attention_kernel"]["constants"]["NUM_KV_HEADS"] == 2
    assert by_name["swiglu_kernel"]["constants"]["SIZE"] == 128
    assert all((folder / entry["file"]).read_bytes()[:4] == b"\x7fELF" for entry in index)
    cubin = folder / index[0]["file"]
    cubin.write_bytes(cubin.read_bytes()[:-1] + b"?")
    assert "bad-build" in refused(cli("run", tmp_path / "b", "--input", "q=x", *POOL))


def test_write_build_takes_a_decoder_that_can_be_exported(place: Path, tmp_path: Path) -> None:
    """Programs themselves, and packed weights, have no step to export; nothing is left."""
    compiled = anabranch.compile_plan(anabranch.parse_text(SMALL))
    with pytest.raises(ValueError, match="no exported step"):
        write_build(tmp_path / "b", compiled, open_build(place / "small").model())
    with pytest.raises(ValueError, match="head size of 16"):
        write_build(tmp_path / "b", compiled, load("random"))
    assert list(tmp_path.iterdir()) == []


def test_a_build_runs_from_python(place: Path) -> None:
    """`open_build` gives what an engine takes."""
    build = open_build(place / "small")
    engine = Engine(build.model(), EngineConfig(pages=512))
    [result] = engine.run(build.compiled, {"q": "hi"})
    assert result.status == "ok"
