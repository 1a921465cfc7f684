"""The layout: what lies where, and who imports whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT

from fisherfold.run.params import STAGES

ROOMS = sorted(path.parent for path in (ROOT / "fisherfold").glob("*/__init__.py"))


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
