"""All that needs a GPU, in stages: builds, checks and measurements of the kernels and of the executor.

    python benchmarks/gpu.py [--stage NAME ...] [--out DIR] [--again] [--triton-cache DIR]

It needs torch, Triton, numpy and this tree; a stage that needs more is skipped by name where that is not installed.
Each stage runs in a process of its own and writes to DIR/STAGE.json what it finds, as it finds it. A stage that is done
is not run again; one that was cut off goes on where it was. At the end a table is printed and DIR/summary.json written.
The exit status is 1 if a stage failed or did not come to its end.

`--device cpu --small` runs the stages at tiny sizes by the kernels' torch definitions: it tries the script, and its
timings mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 540
GRACE_S = 60
"""A stage looks at the time between two cases. One that goes on so long after its limit is killed: ten minutes."""


@dataclass(frozen=True, slots=True)
class Stage:
    """needs: packages beside torch."""

    name: str
    what: str
    needs: tuple[str, ...] = ()


STAGES = (
    Stage("build", "every shipped configuration, compiled for the card", ("triton",)),
    Stage("correct", "every kernel against its torch definition; the draw against its known answers"),
    Stage("tests", "the repository's tests of the executor, on the device, in fp32 and bf16",
          ("pytest", "hypothesis", "lark", "llguidance", "tokenizers", "safetensors")),
    Stage("graphs", "waves in captured graphs against the same run eagerly; run-ahead 0, 1 and 2"),
    Stage("bitwise", "a row's logits alone and in company, to the bit"),
    Stage("sanitizer", "compute-sanitizer's memcheck and racecheck over small cases of `correct`"),
    Stage("attention", "decode attention against SDPA, FlexAttention and FlashInfer's cascade, cold"),
    Stage("prefill", "prefill attention against SDPA"),
    Stage("step", "a decode step of an 8B-shaped and a 0.6B-shaped model against the roofline"),
    Stage("fork", "from the last token known to the next launch, at a fork and at a join"),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; returns the exit status."""
    options = arguments(argv)
    if options.list:
        for stage in STAGES:
            print(f"{stage.name:<10} {stage.what}")
        return 0
    if options.worker is not None:
        return work(options)
    if options.facts:
        prepare()
        from gpu_stages.facts import facts

        print(json.dumps(facts(options.device)))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    asked = subprocess.run([*command(options), "--facts"], capture_output=True, text=True, check=False)
    if asked.returncode:
        print(asked.stderr.strip() or "torch does not run", file=sys.stderr)
        return 2
    found = json.loads(asked.stdout.splitlines()[-1])
    print(", ".join(f"{name} {value}" for name, value in found.items() if name != "source"), flush=True)
    for stage in STAGES:
        if stage.name in (options.stage or [each.name for each in STAGES]):
            supervise(stage, options, settings(found, options))
    return report(options, found)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stage", action="append", choices=names, metavar="NAME", help="repeatable; all by default")
    parser.add_argument("--list", action="store_true", help="name the stages and end")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", metavar="DIR", help="build/gpu by default")
    parser.add_argument("--again", action="store_true", help="forget what the chosen stages found before")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, metavar="S", help=f"for each stage; {LIMIT_S}")
    parser.add_argument(
        "--triton-cache", type=Path, metavar="DIR", help="Triton's compiled kernels, kept for later runs"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cuda by default: the first card")
    parser.add_argument("--small", action="store_true", help="tiny sizes: they try the script and measure nothing")
    parser.add_argument("--worker", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--facts", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    # Stages run in the tree's folder.
    options.out = options.out.resolve()
    return options


def command(options: argparse.Namespace) -> list[str]:
    """This script again, with the same options but for the stages."""
    same = ["--out", str(options.out), "--device", options.device, "--limit-s", str(options.limit_s)]
    return [sys.executable, str(Path(__file__).resolve()), *same, *(["--small"] if options.small else [])]


def supervise(stage: Stage, options: argparse.Namespace, current: dict[str, Any]) -> None:
    """Run a stage in its own process, and write down what became of it where it could not.

    current: the settings of this run
    """
    file = options.out / f"{stage.name}.json"
    if options.again:
        file.unlink(missing_ok=True)
    missing = [name for name in stage.needs if find_spec(name) is None]
    if missing:
        reason = f"needs {', '.join(missing)}"
        write(file, {"stage": stage.name, "status": "skipped", "reason": reason, "settings": current})
        print(f"{stage.name}: skipped - {reason}", flush=True)
        return
    # The first card alone is seen, whatever the process does.
    environment = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ
    if options.triton_cache is not None:
        options.triton_cache.mkdir(parents=True, exist_ok=True)
        environment["TRITON_CACHE_DIR"] = str(options.triton_cache.resolve())
    print(f"{stage.name}: {stage.what}", flush=True)
    started = time.monotonic()
    # A group of its own, so that what it starts ends with it.
    process = subprocess.Popen(
        [*command(options), "--worker", stage.name], env=environment, start_new_session=True, cwd=ROOT
    )
    try:
        reason = f"its process ended with status {process.wait(options.limit_s + GRACE_S)}"
    except subprocess.TimeoutExpired:
        reason = f"it did not end within {options.limit_s + GRACE_S:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = read(file)
    if found.get("settings") != current:
        # It died before it could drop what an earlier run had found.
        found = {}
    if not found or (process.returncode and found["status"] != "failed"):
        found |= {"stage": stage.name, "status": "failed", "reason": reason, "settings": current}
        found.setdefault("elapsed_s", round(time.monotonic() - started, 1))
        write(file, found)
    print(f"{stage.name}: {found['status']}{' - ' * bool(found.get('reason'))}{found.get('reason', '')}", flush=True)


def work(options: argparse.Namespace) -> int:
    """One stage, in this process."""
    prepare()
    from gpu_stages.facts import facts
    from gpu_stages.log import Log, OutOfTime

    [stage] = (each for each in STAGES if each.name == options.worker)
    file = options.out / f"{stage.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    log = Log(
        stage.name,
        file,
        settings(facts(options.device), options),
        device=options.device,
        small=options.small,
        limit_s=options.limit_s,
    )
    if not log.is_done:
        log.begin()
        try:
            reason = importlib.import_module(f"gpu_stages.{stage.name}").run(log)
        except OutOfTime:
            log.end("unfinished", f"{options.limit_s:.0f} s are over: run it again, and it goes on from here")
        except Exception as error:
            log.end("failed", f"{type(error).__name__}: {error}")
            raise
        else:
            log.end("skipped" if reason else "failed" if log.failures else "ok", reason or "; ".join(log.failures[:3]))
    return int(bool(log.failures))


def settings(found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What findings depend on: those under others are not gone on with."""
    return {key: found[key] for key in ("card", "torch", "triton", "source")} | {"small": options.small}


def prepare() -> None:
    """The tree is imported as it lies here, whether or not it is installed."""
    sys.path.insert(0, str(ROOT / "src"))
    if find_spec("llguidance") is None:
        # Imported beside the executor for types that the host paces, of which no stage has one.
        sys.modules["llguidance"] = ModuleType("llguidance")


def report(options: argparse.Namespace, found: dict[str, Any]) -> int:
    """Print the table and write the summary of all stages that were run so; returns the exit status."""
    stages = {stage.name: read(options.out / f"{stage.name}.json") for stage in STAGES}
    stages = {name: stage for name, stage in stages.items() if stage.get("settings") == settings(found, options)}
    print(f"\n{'stage':<10} {'status':<10} {'s':>6}  cases")
    for name, stage in stages.items():
        line = f"{name:<10} {stage['status']:<10} {stage.get('elapsed_s', 0):>6.0f}  {len(stage.get('rows', {}))}"
        print(line + (f"  {stage['reason']}" if stage.get("reason") else ""))
    targets = [target for stage in stages.values() for target in stage.get("targets", {}).values()]
    if targets:
        width = max(len(target["name"]) for target in targets)
        print(f"\n{'target':<{width}} {'found':>9} {'wanted':>18}")
        for target in targets:
            wanted = f"{target['sense']} {target['limit']:g}"
            verdict = "tiny" if options.small else "met" if target["met"] else "missed"
            print(f"{target['name']:<{width}} {target['found']:>9.3f} {wanted:>18}  {verdict}")
    keep = ("status", "reason", "elapsed_s", "settings", "failures", "headlines")
    summary = {name: {key: stage[key] for key in keep if key in stage} for name, stage in stages.items()}
    write(options.out / "summary.json", {"facts": found, "stages": summary, "targets": targets})
    chosen = options.stage or [stage.name for stage in STAGES]
    return int(any(stages.get(name, {}).get("status") not in ("ok", "skipped") for name in chosen))


def read(file: Path) -> dict[str, Any]:
    """What a stage wrote; nothing where it wrote nothing that can be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(file: Path, content: dict[str, Any]) -> None:
    """All of it or nothing."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


if __name__ == "__main__":
    sys.exit(main())
