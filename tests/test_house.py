"""The layout: what lies where, who imports whom, how long modules are, what is documented."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import ROOT

from fisherfold.run.params import STAGES

SOURCES = sorted(path for building in ("fisherfold", "stages", "flows") for path in (ROOT / building).rglob("*.py"))
ROOMS = sorted(path.parent for path in (ROOT / "fisherfold").glob("*/__init__.py"))
LONGEST = 350  # lines of a module
OWN_FILE = 250  # lines of the file that a checkpoint carries
DOCUMENTED = 0.95  # share of public definitions


def test_stages_holds_the_eight_stages_and_nothing_else():
    assert {path.stem for path in (ROOT / "stages").iterdir() if path.suffix == ".py"} == {*STAGES, "__init__"}
    assert {path.name for path in (ROOT / "stages").iterdir() if path.is_dir()} <= {"__pycache__"}


def test_import_contracts_hold():
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_says_what_it_is_and_what_it_may_import(room):
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    assert text and "mport" in text


def test_no_module_is_long():
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}
    assert lengths["fisherfold/runtime/modeling_fisherfold.py"] < OWN_FILE


def test_the_types_of_the_whole_library_are_checked():
    """By mypy, strict, before every commit: no module of ours is left out."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["strict"] and settings["packages"] == ["fisherfold"]
    assert not settings.keys() & {"overrides", "exclude", "ignore_errors"}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import_what_is_there(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("fisherfold", "stages", "flows")):
            exec(ast.unparse(node), {})


def test_there_is_no_dead_code():
    """What vulture finds unused, but for entries of registries and what other libraries call by name."""
    told = subprocess.run([sys.executable, "-m", "vulture"], cwd=ROOT, capture_output=True, text=True)
    assert not told.stderr
    assert not [line for line in told.stdout.splitlines() if line.startswith(("fisherfold/", "stages/", "flows/"))]


def test_public_names_are_documented():
    public = [(path, node) for path in SOURCES for node in _public(ast.parse(path.read_text()))]
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}" for path, node in public if not ast.get_docstring(node)
    ]
    assert len(bare) <= (1 - DOCUMENTED) * len(public), bare


def _public(tree: ast.Module) -> Iterator[ast.AST]:
    """Public functions and classes of a module, and the public methods of its public classes."""
    kinds = ast.FunctionDef | ast.ClassDef
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_"))
