"""The rules that keep the house in order: who imports whom, and what is named how."""

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import ROOT

PACKAGES = ("pipelines", "stages", "models", "shards", "benchmarks")
MAY_IMPORT = {
    "pipelines": {"pipelines", "stages", "models", "shards"},
    "stages": {"stages", "models", "shards"},
    "models": {"models"},
    "shards": {"shards"},
    "benchmarks": set(PACKAGES),
}
ONLY_HERE = {"deepspeed": "stages/engine.py", "ray": "stages/execute.py"}
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module or ""


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    tops = {name.partition(".")[0] for name in imports(path)}
    assert not (tops & set(PACKAGES)) - MAY_IMPORT[package]
    for library, home in ONLY_HERE.items():
        assert library not in tops or path == ROOT / home


def test_no_command_hides_a_library() -> None:
    """``deepspeed pipelines/train.py`` puts pipelines/ first on the path."""
    names = {path.stem for path in (ROOT / "pipelines").glob("*.py")} - {"__init__"}
    assert "train" in names
    assert not names & set(sys.stdlib_module_names)
    ours = {*PACKAGES, "tests"}
    assert not names & (set(importlib.metadata.packages_distributions()) - ours)


def test_the_top_level_holds_nothing_else() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what is tracked cannot be told")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {name.partition("/")[0] for name in tracked.stdout.splitlines()}
    assert found <= {
        "pipelines", "stages", "models", "shards", "configs", "tests", "benchmarks", "docs", ".ci", "README.md",
        "setup.cfg", "pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "CHANGELOG.md", ".gitignore",
    }  # fmt: skip
