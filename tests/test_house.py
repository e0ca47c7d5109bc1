"""The house holds: the checkers see what they are there for, a package holds what it should, the docs tell all."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import anabranch
from anabranch.cli.app import app

ROOT = Path(__file__).parent.parent


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The code in a folder of its own, links and all, to be spoilt."""
    for name in ("dsl", "compiler", "kernels", "runtime", "src"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def tool(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a Python tool on the code in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "MYPY_CACHE_DIR": str(folder / ".cache")}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def spoil(path: Path, text: str) -> None:
    """Add `text` to a module."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_the_type_checker_sees_a_type_error(copy: Path) -> None:
    """mypy follows the links and is strict: right code passes, and an error seeded behind a link is found."""
    # The house's own configuration, but for one module: the whole takes a minute, and `make test` checks it anyway.
    settings = copy / "pyproject.toml"
    whole = settings.read_text(encoding="utf-8")
    assert 'packages = ["anabranch"]' in whole
    one = 'modules = ["anabranch.dsl.diagnostics"]\nfollow_imports = "skip"'
    settings.write_text(whole.replace('packages = ["anabranch"]', one), encoding="utf-8")
    command = ("-m", "mypy")
    before = tool(copy, *command)
    assert before.returncode == 0, before.stdout
    spoil(copy / "dsl" / "diagnostics.py", '\n\ndef length(word: str) -> int:\n    return word + "s"\n')
    after = tool(copy, *command)
    assert after.returncode == 1
    assert 'Incompatible return value type (got "str", expected "int")' in after.stdout
    assert "anabranch/dsl/diagnostics.py" in after.stdout


def test_the_arrows_are_held(copy: Path) -> None:
    """lint-imports finds an import against the arrows."""
    command = ("-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache")
    before = tool(copy, *command)
    assert before.returncode == 0, before.stdout
    spoil(copy / "dsl" / "spec.py", "\nimport anabranch.runtime.events\n")
    spoil(copy / "kernels" / "norms.py", "\nimport anabranch.dsl.spec\n")
    after = tool(copy, *command)
    assert after.returncode == 1
    assert "The house's arrows point down BROKEN" in after.stdout
    assert "kernels imports no sibling folder BROKEN" in after.stdout


def test_folders_are_not_imported_past_the_package(copy: Path) -> None:
    """ruff refuses `import dsl`, by which each class would exist twice."""
    spoil(copy / "runtime" / "events.py", "\nimport dsl.spec\n")
    done = tool(copy, "-m", "ruff", "check", "--no-cache", "runtime/events.py")
    assert done.returncode == 1
    assert "TID251" in done.stdout


def test_the_package_is_whole(copy: Path) -> None:
    """A wheel, made from the tree or from an sdist, holds one package with every module and the grammar, once."""
    build = "import sys, hatchling.build as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"

    def names(folder: Path) -> list[str]:
        done = tool(folder, "-c", build, "build_wheel", str(folder))
        assert done.returncode == 0, done.stderr
        return sorted(zipfile.ZipFile(folder / done.stdout.strip()).namelist())

    found = names(copy)
    modules = {
        path.relative_to(copy / "src").as_posix() for path in (copy / "src").glob("anabranch/*.py")
    } | {f"anabranch/{path.relative_to(copy).as_posix()}" for name in ("dsl", "compiler", "kernels", "runtime")
         for path in (copy / name).rglob("*.py")}  # fmt: skip
    assert len(found) == len(set(found))
    assert modules | {"anabranch/dsl/plan.lark", "anabranch/py.typed"} <= set(found)
    assert {name.split("/")[0] for name in found} == {"anabranch", f"anabranch-{anabranch.__version__}.dist-info"}
    archive = tool(copy, "-c", build, "build_sdist", str(copy)).stdout.strip()
    shutil.unpack_archive(copy / archive, copy / "sdist", filter="data")
    [unpacked] = (copy / "sdist").iterdir()
    assert names(unpacked) == found


def test_every_public_name_is_there_and_documented() -> None:
    """What `__all__` lists exists and says what it is."""
    for name in anabranch.__all__:
        value = getattr(anabranch, name)
        assert name.startswith("__") or inspect.getdoc(value), name
    with pytest.raises(AttributeError, match="no attribute `nope`"):
        anabranch.nope  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_package_is_cheap() -> None:
    """`import anabranch` imports nothing heavy, and neither does parsing."""
    code = (
        "import sys, anabranch; anabranch.parse_text('a = plan() { text(\"x\"); }');"
        "print(sorted({'torch', 'numpy', 'typer', 'rich'} & set(sys.modules)))"
    )
    assert tool(ROOT, "-c", code).stdout.strip() == "[]"


def commands(group: typer.core.TyperGroup, path: str = "") -> Iterator[tuple[str, typer.core.TyperCommand]]:
    """Every command with the words that call it."""
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, f"{path}{name} ")
        elif isinstance(command, typer.core.TyperCommand):
            yield path + name, command


def test_the_docs_tell_every_option() -> None:
    """docs/cli.md has a section for each command, which names each of its options."""
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    sections = {
        part.split("\n", 1)[0]: part for part in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").split("\n## ")
    }
    found = dict(commands(group))
    assert set(found) == {
        "build",
        "check",
        "convert",
        "explain",
        "fmt",
        "model get",
        "pack",
        "resume",
        "run",
        "show",
        "stats",
        "verify",
    }
    for name, command in found.items():
        for param in command.params:
            for option in param.opts:
                assert not option.startswith("--") or f"{option}" in sections[name], f"{name} {option}"


def test_the_docs_link_to_what_is_there() -> None:
    """Relative links of the README and the docs lead to files."""
    import re

    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
