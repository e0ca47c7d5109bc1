"""The ahead-of-time builds: what their checks find, which builds stand for all, what is kept, and that all is well."""

from __future__ import annotations

import json
import linecache
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import import_module, invalidate_caches
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from anabranch.kernels import aot_build
from anabranch.kernels.aot import MODULES, TARGETS, Built, Target, build, problems, shipped_configs
from anabranch.kernels.aot_build import aligned, read_amdgcn, read_sass
from anabranch.kernels.aot_cache import Cache
from anabranch.kernels.aot_command import grouped, main, results
from anabranch.kernels.aot_cover import LIMIT, axes, cover, every, kernel, pairs, required
from anabranch.kernels.aot_workers import build_each
from anabranch.kernels.shipped import Config

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter builds nothing")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
SM_80, SM_90, SM_100, GFX942 = TARGETS
FINE = Built(64, 0, 0, 0, 4096, 0, "HMMA", None)

KERNELS = """
from __future__ import annotations

from anabranch.kernels.jit import HAS_TRITON, jit
from anabranch.kernels.shipped import Config

if HAS_TRITON:
    import triton.language as tl


    ONE = tl.constexpr(1)


@jit
def same(number):
    return number


@jit
def product_kernel(a_ptr, b_ptr, out_ptr, a_stride, SIZE: tl.constexpr, EXACT: tl.constexpr):
    at = tl.arange(0, SIZE)
    a = tl.load(a_ptr + at[:, None] * a_stride + at[None, :])
    b = tl.load(b_ptr + at[:, None] * SIZE + at[None, :])
    product = same(tl.dot(a, b, input_precision="ieee" if EXACT else "tf32")) * ONE
    tl.store(out_ptr + at[:, None] * SIZE + at[None, :], product)


@jit
def broken_kernel(out_ptr):
    tl.store(out_ptr, there_is_no_such_name)


def product(name, kind, size, num_warps, matrix, exact=True):
    signature = {"a_ptr": kind, "b_ptr": kind, "out_ptr": "*fp32", "a_stride": "i32"}
    return Config(name, product_kernel, signature, {"SIZE": size, "EXACT": exact}, num_warps, 1, matrix)


SHIPPED = (
    product("fine", "*fp16", 16, 1, "mma"),
    product("wide", "*fp16", 64, 4, "wgmma"),
    product("inexact", "*fp32", 32, 4, "none", exact=False),
    product("exact", "*fp32", 32, 4, "none"),
    Config("broken", broken_kernel, {"out_ptr": "*fp32"}, {}, 1, 1, "none"),
)
# Slow to build.
LARGE = (product("spilling", "*fp16", 128, 1, "mma"), product("fat", "*fp16", 256, 16, "mma"))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module of small kernels, most of which have something wrong."""
    name = f"kernels_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(KERNELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    invalidate_caches()
    yield import_module(name)
    del sys.modules[name]


def named(module: ModuleType, name: str) -> Config:
    """One of its configurations."""
    return next(config for config in module.SHIPPED + module.LARGE if config.name == name)


@needs_triton
def test_a_small_product_is_fine_everywhere(module: ModuleType) -> None:
    """A tile of 16 rows has each target's own matrix instruction, and no problem."""
    config = named(module, "fine")
    found = {}
    for target in TARGETS:
        built = build(config, target)
        assert problems(config, target, built) == []
        assert built.registers > 0 and built.shared_bytes <= target.shared_bytes
        assert built.binary is not None and built.binary.startswith(b"\x7fELF")
        found[target.name] = built.matrix
    assert found == {"sm_80": "HMMA", "sm_90": "HMMA", "sm_100": "HMMA", "gfx942": "MFMA"}


@needs_triton
@pytest.mark.parametrize(("name", "target"), [("spilling", SM_80), ("fat", GFX942)], ids=["sm_80", "gfx942"])
def test_spills_are_found(module: ModuleType, name: str, target: Target) -> None:
    """128 x 128 sums do not fit the registers of one warp of 32, nor two tiles of 256 x 256 those of 16 of 64."""
    config = named(module, name)
    built = build(config, target)
    assert built.spills > 0 and built.stack_bytes > 0
    problem = problems(config, target, built)[0]
    assert f"{built.spills} spills" in problem and f"`{name}` for {target.name}:" in problem


@needs_triton
def test_a_tile_of_64_rows_has_the_wide_instruction(module: ModuleType) -> None:
    """With four warps; what is expected of smaller tiles is then a problem, and the other way round."""
    config = named(module, "wide")
    for target, matrix in ((SM_90, "HGMMA"), (SM_100, "UTCHMMA")):
        built = build(config, target)
        assert built.matrix == matrix
        assert problems(config, target, built) == []
        [problem] = problems(config._replace(matrix="mma"), target, built)
        assert f"matrix instruction {matrix}, expected HMMA" in problem
        assert problems(config, target, replace(built, matrix="HMMA"))


@needs_triton
def test_inexact_products_are_found(module: ModuleType) -> None:
    """TF32 is a matrix instruction where none is expected."""
    config = named(module, "inexact")
    built = build(config, SM_80)
    assert built.matrix == "HMMA"
    [problem] = problems(config, SM_80, built)
    assert "matrix instruction HMMA, expected none" in problem


@needs_triton
def test_exact_products_have_no_matrix_instruction_but_amds(module: ModuleType) -> None:
    """fp32 with `ieee`: none on NVIDIA's chips, the fp32 one on AMD's."""
    config = named(module, "exact")
    built = {target.name: build(config, target) for target in (SM_80, GFX942)}
    assert (built["sm_80"].matrix, built["gfx942"].matrix) == ("none", "MFMA.F32")
    assert problems(config, SM_80, built["sm_80"]) == problems(config, GFX942, built["gfx942"]) == []


@needs_triton
def test_too_much_shared_memory_is_found(module: ModuleType) -> None:
    """Two tiles of 128 KiB are more than one block has."""
    config = named(module, "fat")
    built = build(config, GFX942)
    assert built.shared_bytes > GFX942.shared_bytes
    assert any(f"of which a block has {GFX942.shared_bytes}" in problem for problem in problems(config, GFX942, built))


def test_limits_are_inclusive() -> None:
    """What just fits is no problem, one more is."""
    config = Config("limits", None, {}, {}, 4, 2, "mma")
    for target in (SM_80, SM_90, SM_100):
        full = replace(FINE, shared_bytes=target.shared_bytes, tensor_memory=512)
        assert problems(config, target, full) == []
        assert len(problems(config, target, replace(full, shared_bytes=target.shared_bytes + 1))) == 1
        assert len(problems(config, target, replace(full, tensor_memory=513))) == 1
        assert len(problems(config, target, replace(full, stack_bytes=8))) == 1
        assert len(problems(config, target, replace(full, spills=1, matrix="none"))) == 2
        assert problems(config, target, replace(full, scalar_spills=9)) == []
        assert len(problems(config, target, replace(full, matrix="HGMMA+HMMA"))) == 1


def test_machine_code_is_read() -> None:
    """Spills behind a predicate count; what only looks like a matrix instruction does not."""
    head = " Function f:\n  REG:40 STACK:8 SHARED:0 LOCAL:0\n"
    lines = (
        "HFMA2.MMA R33, -RZ, RZ, 0, 0 ;",
        "@!P0 LDL.64 R2, [R1] ;",
        "@UP1 STL [R1], R2 ;",
        "LDSM.16.M88.4 R4, [R2] ;",
        "DFMA R2, R2, R4, R6 ;",
        "FFMA R1, R1, R1, R1 ;",
    )
    text = head + "".join(
        f"        /*{at:04x}*/   {line}  /* 0x00 */\n   /* 0x00 */\n" for at, line in enumerate(lines)
    )
    assert (read_sass(text).registers, read_sass(text).spills, read_sass(text).stack_bytes) == (40, 2, 8)
    assert read_sass(text).matrix == "none"
    more = "        /*00ff*/  @P0 DMMA.884 R2 ;  /* 0x00 */\n        /*0100*/  UTCHMMA gdesc[UR4] ;  /* 0x00 */\n"
    assert read_sass(text + more).matrix == "DMMA+UTCHMMA"
    with pytest.raises(ValueError, match="printed no kernel"):
        read_sass(head)


def test_assembly_is_read() -> None:
    """Each kind of spill apart; the type of the factors names the class, unless they have 16 bits."""
    figures = "\n".join(
        ("  - .agpr_count: 8", "    .vgpr_count:     264", "    .vgpr_spill_count: 2", "    .sgpr_spill_count: 3",
         "    .private_segment_fixed_size: 16")
    )  # fmt: skip
    code = read_amdgcn(figures)
    assert (code.registers, code.spills, code.scalar_spills, code.stack_bytes) == (264, 2, 3, 16)
    assert code.matrix == "none"
    for text, matrix in {
        "v_mfma_f32_32x32x8_f16 a[0:15], v[0:1]": "MFMA",
        "v_mfma_f32_16x16x16_bf16 v[0:3]": "MFMA",
        "v_mfma_f32_16x16x4_f32 v[0:3]": "MFMA.F32",
        "v_mfma_f32_16x16x8_xf32 v[0:3]": "MFMA.XF32",
        "v_mfma_f32_4x4x4_16b_f16 v[0:3]": "MFMA",
        "v_mfma_f64_16x16x4_f64 v[0:7]": "MFMA.F64",
        "v_mfma_f32_16x16x16_bf16 v[0:3]\n\tv_mfma_f32_16x16x4_f32 v[0:3]": "MFMA+MFMA.F32",
    }.items():
        assert read_amdgcn(f"{figures}\n\t{text}\n").matrix == matrix
    with pytest.raises(ValueError, match="vgpr_count"):
        read_amdgcn("nothing")


@needs_triton
def test_a_signature_that_does_not_fit_is_refused(module: ModuleType) -> None:
    """An argument too few, too many or twice."""
    config = named(module, "fine")
    less = {name: kind for name, kind in config.signature.items() if name != "a_stride"}
    for signature in (less, {**config.signature, "b_stride": "i32"}, {**config.signature, "SIZE": "i32"}):
        with pytest.raises(ValueError, match="`fine` must name each argument once"):
            build(config._replace(signature=signature), SM_80)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        build(config._replace(fn=test_limits_are_inclusive), SM_80)


def test_pointers_strides_and_widths_are_aligned() -> None:
    """As a launch finds them; other numbers may be anything."""
    assert aligned("q_ptr", "*fp16") and aligned("q_stride_row", "i32") and aligned("num_in", "i32")
    assert not aligned("num_positions", "i32") and not aligned("scale", "fp32")


def test_the_cover_has_every_required_pair() -> None:
    """Each kernel and target, and each two of type, head size and page size that any kernel has, in at most 60."""
    configs = shipped_configs()
    jobs = cover(configs)
    assert len(jobs) <= LIMIT == 60
    covered = set().union(*map(pairs, jobs))
    wanted = {pair for job in every(configs) for pair in pairs(job) if required(pair)}
    assert wanted <= covered
    # The same said without `pairs`, lest that lose some.
    for config in configs:
        assert {target.name for each, target in jobs if kernel(each) == kernel(config)} == {t.name for t in TARGETS}
    for kind in ("fp32", "fp16", "bf16"):
        for head_dim in (64, 80, 96, 128, 256):
            assert any((axes(j)["dtype"], axes(j).get("head_dim")) == (kind, head_dim) for j in jobs), (kind, head_dim)
        for page_size in (16, 64, 128):
            assert any((axes(j)["dtype"], axes(j).get("page_size")) == (kind, page_size) for j in jobs)


def test_the_cover_is_the_same_each_time() -> None:
    """And in the order in which the configurations are listed."""
    configs = shipped_configs()
    names = [(config.name, target.name) for config, target in cover(configs)]
    assert names == [(config.name, target.name) for config, target in cover(list(configs))]
    order = [(config.name, target.name) for config, target in every(configs)]
    assert names == sorted(names, key=order.index)


def test_a_cover_that_is_too_small_is_refused() -> None:
    """Rather than leave a kernel or a target out."""
    with pytest.raises(ValueError, match="3 builds cannot cover"):
        cover(shipped_configs(), limit=3)


def test_every_module_with_a_kernel_is_listed() -> None:
    """A kernel that `MODULES` forgets would never be built."""
    here = Path(__file__).parent.parent / "kernels"
    assert sorted(MODULES) == sorted(f"anabranch.kernels.{path.stem}" for path in here.glob("*_triton.py"))


def test_two_configurations_of_one_name_are_refused(module: ModuleType) -> None:
    """A name stands for one build."""
    with pytest.raises(ValueError, match="two configurations are named `fine`"):
        shipped_configs([module.__name__, module.__name__])


@needs_triton
def test_figures_are_kept(module: ModuleType, tmp_path: Path) -> None:
    """Without the binary, and for that target alone; a name or an expectation does not matter, a constant does."""
    cache = Cache(tmp_path / "figures")
    config = named(module, "fine")
    key = cache.key(config, SM_80)
    assert cache.get(key) is None
    assert cache.put(key, replace(FINE, binary=b"code")) == FINE
    assert Cache(tmp_path / "figures").get(key) == FINE
    assert cache.key(config._replace(name="other", matrix="none"), SM_80) == key
    others = {
        cache.key(config, SM_90),
        cache.key(config._replace(num_warps=2), SM_80),
        cache.key(config._replace(num_stages=2), SM_80),
        cache.key(config._replace(constexprs={"SIZE": 32, "EXACT": True}), SM_80),
        cache.key(config._replace(signature={**config.signature, "a_stride": "i64"}), SM_80),
        cache.key(named(module, "broken"), SM_80),
    }
    assert len(others | {key}) == 7


@needs_triton
@pytest.mark.parametrize(
    ("before", "after"),
    [("tl.store(out_ptr + at[:, None]", "tl.store(out_ptr + 0 + at[:, None]"), ("return number", "return number + 0"),
     ("constexpr(1)", "constexpr(2)")],
    ids=["kernel", "function", "constant"],
)  # fmt: skip
def test_a_changed_source_is_built_again(module: ModuleType, tmp_path: Path, before: str, after: str) -> None:
    """Be it the kernel's, that of a function it calls or a constant; another kernel's does not matter."""

    def key(text: str) -> str:
        name = f"{module.__name__}_again"
        Path(tmp_path, f"{name}.py").write_text(text)
        Path(tmp_path, "__pycache__", f"{name}.cpython-{sys.version_info[0]}{sys.version_info[1]}.pyc").unlink(True)
        invalidate_caches()
        linecache.clearcache()
        again = import_module(name)
        del sys.modules[name]
        return Cache(tmp_path).key(named(again, "fine"), SM_80)

    assert KERNELS.count(before) == 1
    whole = key(KERNELS)
    assert key(KERNELS) == key(KERNELS.replace("there_is_no_such_name", "nor_this")) == whole
    assert key(KERNELS.replace(before, after)) != whole


@needs_triton
def test_another_reading_is_made_again(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads the machine code is part of the key."""
    key = Cache(tmp_path).key(named(module, "fine"), SM_80)
    changed = tmp_path / "aot_build.py"
    changed.write_text(Path(aot_build.__file__).read_text() + "# changed\n")
    monkeypatch.setattr(aot_build, "__file__", str(changed))
    assert Cache(tmp_path).key(named(module, "fine"), SM_80) != key


@needs_triton
def test_a_corrupt_entry_counts_as_missing(module: ModuleType, tmp_path: Path) -> None:
    """Cut anywhere, a digit changed, another's name, or no entry at all: it is built again, and mended."""
    cache = Cache(tmp_path)
    key = cache.key(named(module, "fine"), SM_80)
    cache.put(key, FINE)
    file = tmp_path / f"{key}.json"
    whole = file.read_text()
    for cut in range(len(whole)):
        file.write_text(whole[:cut])
        assert cache.get(key) is None
    for text in (whole.replace("4096", "4097"), "[]", "null", "{}", '{"key": 1}', json.dumps({"key": key, "sum": 1})):
        file.write_text(text)
        assert cache.get(key) is None
    file.write_bytes(b"\xff\xfe")
    assert cache.get(key) is None
    (tmp_path / "other.json").write_text(whole)
    assert cache.get("other") is None
    cache.put(key, FINE)
    assert cache.get(key) == FINE
    assert not list(tmp_path.glob("*.tmp"))


@needs_triton
def test_the_command_names_each_problem(module: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And fails; what could not be built at all is one too, and is not kept."""
    table = tmp_path / "table.md"
    command = ["--full", "--jobs", "2", "--cache", str(tmp_path / "figures"), "--table", str(table)]
    assert main(command, [module.__name__]) == 1
    said = capsys.readouterr().out
    lines = said.splitlines()
    builds = len(module.SHIPPED) * len(TARGETS)
    assert [line.split()[:2] for line in lines[1 : 1 + builds]] == [
        [config.name, target.name] for config in module.SHIPPED for target in TARGETS
    ]
    assert said.count("problem: `broken` for") == said.count(" failed\n") == len(TARGETS)
    assert "there_is_no_such_name" in said
    assert "problem: `inexact` for sm_80: matrix instruction HMMA" in said and "problem: `fine`" not in said
    assert lines[-1] == f"{builds} builds, {said.count('problem: ')} problems"
    assert table.read_text().count("**1 failed**") == len(TARGETS)
    assert len(list((tmp_path / "figures").glob("*.json"))) == builds - len(TARGETS)


@needs_triton
def test_what_is_kept_is_not_built_again(module: ModuleType, tmp_path: Path) -> None:
    """A second run asks no worker, and finds the same; two names of one build are one build."""
    config = named(module, "fine")
    jobs = [(config, SM_80), (config._replace(name="twin"), SM_80)]
    first = list(results(jobs, Cache(tmp_path), [module.__name__], 1))
    assert first[0] == first[1] and isinstance(first[0], Built) and first[0].matrix == "HMMA"
    # No worker could import this module.
    assert list(results(jobs, Cache(tmp_path), ["no.such.module"], 1)) == first


@needs_triton
def test_a_compiler_that_dies_is_a_finding(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build at which it died is named, and the others go on in a new process."""
    source = Path(str(module.__file__))
    source.write_text(source.read_text().replace("SHIPPED = (", "import os\nSHIPPED = (os._exit(7),"))
    jobs = [(named(module, "fine"), target) for target in (SM_80, SM_90)]
    found = list(build_each(jobs, [module.__name__], 1))
    assert found == [(job, "the compiler ended its process, exit code 7") for job in jobs]


def descendants(mark: str) -> list[str]:
    """The processes that were started with `mark` in their environment."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in environ.read_bytes():
                found.append(environ.parent.name)
    return found


@needs_triton
def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    """At once, without a traceback, with its workers gone and what was built kept."""
    command = [sys.executable, "-m", "anabranch.kernels.aot", "--full", "--jobs", "1", "--cache", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "ABORTED": str(tmp_path)},
    )
    assert process.stdout is not None
    for _ in range(2):
        process.stdout.readline()
    assert len(descendants(str(tmp_path))) > 1
    # The whole group, as a terminal does.
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "interrupted; what was built is kept\n"
    assert list(tmp_path.glob("*.json"))
    # What multiprocessing keeps to clean up ends last, after the command itself.
    until = time.monotonic() + 30
    while left := descendants(str(tmp_path)):
        assert time.monotonic() < until, left


def test_without_triton_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what to install."""
    monkeypatch.setattr("anabranch.kernels.aot_command.HAS_TRITON", False)
    assert main([]) == 2
    assert "pip install 'anabranch[gpu]'" in capsys.readouterr().err


@needs_triton
def test_wrong_options_are_told_before_anything_is_built(
    module: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A number of workers, a folder that is missing, and one that cannot be made."""
    for options, said in ((["--jobs", "0"], "at least 1"), (["--table", str(tmp_path / "no" / "t")], "no folder")):
        with pytest.raises(SystemExit):
            main(options)
        assert said in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["--full", "--cache", str(tmp_path / "file" / "figures")], [module.__name__]) == 2
    assert "error: " in capsys.readouterr().err


def test_the_grouped_table_shows_the_worst() -> None:
    """Of each kernel, type and head size."""
    configs = [config for config in shipped_configs() if kernel(config) == "segment_attention"][:2]
    done = [
        ((configs[0], SM_80), FINE),
        (
            (configs[1], SM_80),
            replace(FINE, registers=200, shared_bytes=9000, matrix="HGMMA", spills=3, scalar_spills=5),
        ),
        ((configs[1], SM_90), "it broke"),
    ]
    [row] = grouped(list(done)).splitlines()[2:]
    cells = [cell.strip() for cell in row.split("|")[4:-1]]
    assert cells == ["2", "200 / 9 / HGMMA, HMMA; 5 scalar; **1 spill**", "**1 failed**", "", ""]


@needs_triton
def test_the_shipped_kernels_are_fine(capsys: pytest.CaptureFixture[str]) -> None:
    """The builds that stand for all have no problem. Figures of earlier runs are used, as on a developer's machine."""
    done = main(["--jobs", "2", "--cache", str(Path(__file__).parent.parent / "build" / "kernels")])
    assert done == 0, capsys.readouterr().out
