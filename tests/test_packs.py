"""Packs and traces as files: whole or not there, read in any process; and the commands that make and read them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from law_runs import model
from torch import Tensor
from torch.utils.data import DataLoader
from training_runs import ROOMY, SHARED, STOPS, build, header, traced
from typer.testing import CliRunner

from anabranch.cli.app import app
from anabranch.dsl.diagnostics import PlanError
from anabranch.runtime import pack_files
from anabranch.runtime.engine import Engine, RunResult
from anabranch.runtime.events import GenEnded
from anabranch.runtime.journal import Journal, read_journal
from anabranch.runtime.trace_stats import stats_of
from anabranch.runtime.traces import Trace, example_of
from anabranch.runtime.training import PackedDataset, collate, pack, read_traces
from anabranch.testing import Plan


def some_traces(count: int = 4, plan: str = SHARED) -> list[Trace]:
    return [traced(Plan.parse(plan, {"q": f"question {s}"}), seed=s)[1] for s in range(count)]


def test_a_dataset_reads_rows_in_any_process(tmp_path: Path) -> None:
    """Loaded in two workers, in one batch or another: the rows that were packed, over several files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_files, "SHARD_TOKENS", 200)
        manifest = pack(some_traces(8), tmp_path / "pack", length=150, model=model())
    assert len(manifest.shards) >= 2
    assert manifest.traces == 8
    dataset = PackedDataset(tmp_path / "pack")
    rows = [dataset[n] for n in range(len(dataset))]
    assert manifest.rows == len(rows)
    assert torch.equal(dataset[-1]["input_ids"], rows[-1]["input_ids"])
    with pytest.raises(IndexError):
        dataset[len(rows)]
    found: list[Tensor] = []
    for batch in DataLoader(dataset, batch_size=2, collate_fn=collate, num_workers=2, multiprocessing_context="spawn"):
        assert batch["spans"].shape[2] == 4
        found.extend(batch["input_ids"])
    assert torch.equal(torch.stack(found), torch.stack([row["input_ids"] for row in rows]))


def test_a_pack_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, ctrl-C or a bad trace leave nothing behind; what is there is not written over."""
    traces = some_traces(2)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(pack_files.os, "fsync", full)
        with pytest.raises(PlanError, match=r"error\[unwritable-file\].*No space left"):
            pack(traces, tmp_path / "pack", length=500, model=model())
    assert not list(tmp_path.iterdir())

    def interrupted() -> Iterator[Trace]:
        yield traces[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(interrupted(), tmp_path / "pack", length=500, model=model())
    other = replace(traces[1], header=replace(traces[1].header, fingerprint="0" * 16))
    with pytest.raises(PlanError, match=r"error\[bad-trace\].*fingerprint 0000000000000000"):
        pack([traces[0], other], tmp_path / "pack", length=500, model=model())
    assert not list(tmp_path.iterdir())
    pack(traces, tmp_path / "pack", length=500, model=model())
    before = {path.name: path.read_bytes() for path in (tmp_path / "pack").iterdir()}
    with pytest.raises(PlanError, match="error\\[pack-exists\\]"):
        pack(traces, tmp_path / "pack", length=500, model=model())
    assert {path.name: path.read_bytes() for path in (tmp_path / "pack").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]
    # The same traces give the same bytes.
    pack(traces, tmp_path / "again", length=500)
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == before


def test_a_broken_pack_is_told(tmp_path: Path) -> None:
    """A manifest or file that was cut, changed or taken away is an error by name, never other rows."""
    folder = tmp_path / "pack"
    pack(some_traces(2), folder, length=500, model=model())
    shard = folder / "00000.safetensors"
    manifest, content = (folder / "manifest.json").read_bytes(), shard.read_bytes()

    def refused(code: str) -> None:
        with pytest.raises(PlanError, match=f"error\\[{code}\\]"):
            PackedDataset(folder)[0]

    changes = (
        (b'"version": 1', b'"version": 2'),
        (b'"rows": 1', b'"rows": 2'),
        (b": 500", b': "500"'),
        (b"000.", b"/0."),
    )
    for text in (b"", b"[]", b"{}", *(manifest.replace(*change, 1) for change in changes)):
        assert text != manifest
        (folder / "manifest.json").write_bytes(text)
        refused("bad-pack")
    (folder / "manifest.json").write_bytes(manifest)
    for cut in (0, 7, len(content) // 2, len(content) - 1):
        shard.write_bytes(content[:cut])
        refused("bad-pack")
    shard.write_bytes(content)
    good = PackedDataset(folder).row(0)
    for name, place, value in (("spans", -2, 1 << 20), ("starts", -1, 1 << 20), ("weights", -1, -1)):
        array = getattr(good, name).copy()
        array.flat[place] = value
        shard.write_bytes(pack_files.save(pack_files._arrays([replace(good, **{name: array})])))
        refused("bad-pack")
    shard.unlink()
    refused("no-such-file")
    shutil.rmtree(folder)
    with pytest.raises(PlanError, match="there is no pack in"):
        PackedDataset(folder)


def test_a_trace_that_does_not_fit_its_plan_is_refused(tmp_path: Path) -> None:
    """The reference finds events that the plan does not mean."""
    [trace] = some_traces(1)
    number = next(n for n, e in enumerate(trace.entries) if isinstance(e.event, GenEnded))
    event = trace.entries[number].event
    assert isinstance(event, GenEnded)
    changed = replace(trace.entries[number], event=replace(event, text=event.text + "x"))
    entries = (*trace.entries[:number], changed, *trace.entries[number + 1 :])
    with pytest.raises(PlanError, match=r"error\[bad-trace\].*not what its plan means"):
        pack([replace(trace, entries=entries)], tmp_path / "pack", length=500, model=model())


# --- journals and commands


def write_journal(path: Path, text: str, inputs: Sequence[Mapping[str, Any]], **changed: Any) -> list[RunResult]:
    """Run `text` on all inputs in one batch, with a journal."""
    engine = Engine(model(), ROOMY)
    with Journal.create(str(path)) as journal:
        runs = [engine.submit(text, v, seed=1, input_index=n, log=journal.log(n)) for n, v in enumerate(inputs)]
        journal.begin(header(text, inputs=tuple(inputs), many=len(inputs) > 1, **changed))
        while any(run.result is None for run in runs):
            engine.step()
            journal.commit()
    return [run.result for run in runs if run.result is not None]


def test_runs_are_read_from_a_journal_as_they_end(tmp_path: Path) -> None:
    """Of a batch's journal each run is whole; of one that is cut short, the runs that are not over come last."""
    path = tmp_path / "j.jsonl"
    inputs = [{"q": f"question {n}" * (1 + 2 * (n % 2))} for n in range(5)]
    results = write_journal(path, SHARED, inputs)
    found = list(read_traces([str(path)]))
    assert all(trace.over for trace in found)
    whole = read_journal(str(path)).entries
    assert [trace.entries for trace in sorted(found, key=lambda trace: trace.inputs["q"][9])] == list(whole)
    by_input = {trace.inputs["q"]: trace for trace in found}
    for values, result in zip(inputs, results, strict=True):
        trace = by_input[values["q"]]
        drawn = [e.event.drawn for e in trace.entries if isinstance(e.event, GenEnded)]
        assert sum(drawn) == result.counts["tokens_decoded"]
    lines = path.read_bytes().splitlines(keepends=True)
    last = max(n for n, line in enumerate(lines) if b'"run_ended"' in line)
    path.write_bytes(b"".join(lines[:last]))
    cut = list(read_traces([str(path)]))
    assert [trace.over for trace in cut] == [True] * 4 + [False]
    assert cut[:4] == found[:4]
    manifest = pack(cut, tmp_path / "pack", length=500)
    assert (manifest.traces, manifest.unfinished) == (4, 1)


def test_a_run_that_was_killed_and_went_on_packs_as_one_that_was_not() -> None:
    """Cut anywhere and gone on with, under `deterministic`: the same row."""
    plan = Plan.parse(STOPS, {"q": "why?"})
    config = replace(ROOMY, deterministic=True)
    _, whole, _ = traced(plan, config, seed=3)
    row, _, _ = build([example_of(whole, model())])
    for cut in range(2, len(whole.entries) - 1, 5):
        _, again, _ = traced(plan, config, seed=3, replayed=whole.entries[:cut])
        other, _, _ = build([example_of(again, model())])
        assert sorted(other.ids.tolist()) == sorted(row.ids.tolist())
        assert sorted(zip(other.positions.tolist(), other.labels.tolist(), strict=True)) == sorted(
            zip(row.positions.tolist(), row.labels.tolist(), strict=True)
        )


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


def test_pack_and_stats_from_the_command_line(tmp_path: Path) -> None:
    """Folders and files of journals; figures as JSON and as lines; refusals with their codes."""
    traces = tmp_path / "traces"
    traces.mkdir()
    write_journal(traces / "a.jsonl", SHARED, [{"q": "one"}, {"q": "two"}])
    write_journal(traces / "b.jsonl", 'p = plan() { g = gen("k", max=3); }', [{}])
    done = invoke("pack", str(traces), "-o", str(tmp_path / "pack"), "--length", "256", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["traces"], document["rows"], document["model"]) == (3, 1, "random")
    assert len(PackedDataset(tmp_path / "pack")) == 1
    done = invoke(
        "pack", str(traces / "a.jsonl"), "-o", str(tmp_path / "some"), "--without", "trimmed", "--without", "drawn"
    )
    assert done.exit_code == 1
    assert "error[no-traces]" in done.stderr and "2 untrained" in done.stderr
    done = invoke("pack", str(traces), "-o", str(tmp_path / "short"), "--length", "10")
    assert done.exit_code == 1
    assert "error[trace-too-long]" in done.stderr and "run 1 of" in done.stderr
    done = invoke("pack", str(traces), "-o", str(tmp_path / "short"), "--length", "10", "--skip-long")
    assert done.exit_code == 0
    assert "1 traces, 2 too long; 1 rows of 10" in done.stdout
    done = invoke("pack", str(traces / "a.jsonl"), "-o", str(tmp_path / "pack"))
    assert "error[pack-exists]" in done.stderr
    (tmp_path / "none").mkdir()
    assert "error[no-traces]" in invoke("stats", str(tmp_path / "none")).stderr
    done = invoke("stats", str(traces), "--json")
    report = json.loads(done.stdout)
    assert (report["traces"], report["forked"], report["unfinished"]) == (3, 2, 0)
    assert report["width"]["counts"] == {"3": 2}
    done = invoke("stats", str(traces))
    assert "activation ratio       0.667 (2 forked)" in done.stdout


def test_stats_are_what_the_runs_did() -> None:
    """Widths, depths, tokens and the critical path of plans whose runs have only one shape."""
    nested = """
    p = plan() {
      a = fork(3) { b = fork(2) { g = gen(recorded="ab", max=9); } join(all, stitch); } join(all, stitch);
      c = fork(1) { h = gen("c", recorded="c", max=9); };
      z = gen("k", recorded="xyz", max=9);
    }
    """
    plain = 'p = plan() { g = gen("k", recorded="hello", max=9); }'
    traces = [traced(Plan.parse(text))[1] for text in (nested, plain)]
    unfinished = replace(traces[1], entries=traces[1].entries[:-1])
    report = stats_of([*traces, unfinished])
    assert (report["traces"], report["unfinished"], report["forked"]) == (2, 1, 1)
    assert report["activation_ratio"] == 0.5
    assert report["width"] == {"count": 4, "mean": 9 / 4, "most": 3, "counts": {2: 3, 3: 1}}
    assert report["depth"] == {"count": 2, "mean": 1.0, "most": 2, "counts": {0: 1, 2: 1}}
    assert report["total_tokens"]["sum"] == (6 * 2 + 1 + 3) + 5
    # The fork of one binds nothing that is read on: but its join is waited for.
    assert report["critical_path_tokens"]["sum"] == (2 + 1 + 3) + 5
    assert report["parallelism_ratio"] == 21 / 11
    assert report["acceleration_ratio"] == 1 - 11 / 21
    # Each inner stitch takes in two branches of two tokens, the outer one three times that.
    assert report["tokens_stitched"] == 3 * 4 + 12
    assert stats_of([])["activation_ratio"] is None
