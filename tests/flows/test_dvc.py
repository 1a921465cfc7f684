"""dvc.yaml against the code: what each stage depends on, and what runs again when a parameter changes.

The stages themselves are stood in for by a command that writes outputs which depend on every declared dependency, so
that the graph of dvc.yaml is what is tested; tests/flows/test_pipeline.py runs the real ones.
"""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from project import ROOT, command
from ruamel.yaml import YAML
from stand_in import clone_with_stand_in

from fisherfold.run.params import STAGES, Params
from fisherfold.run.source import code_modules, module_file
from fisherfold.run.workspace import Workspace
from flows.overrides import override_params
from flows.staleness import release_dead_locks, stale_reasons

PIPELINE = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
AFFECTED = {stage: STAGES[STAGES.index(stage) :] for stage in STAGES}
OTHER_VALUES = {"bool": lambda value: not value, "int": lambda value: value + 1, "float": lambda value: value / 2}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = clone_with_stand_in(tmp_path_factory.mktemp("project"))
    assert reproduce(folder) == list(STAGES)
    return folder


def reproduce(folder: Path) -> list[str]:
    """`dvc repro` with the stand-in; the stages that ran, in order."""
    (folder / "ran").unlink(missing_ok=True)
    result = command(folder, "dvc", "repro", "--no-run-cache")
    assert result.returncode == 0, result.stderr
    return (folder / "ran").read_text().split() if (folder / "ran").exists() else []


@pytest.mark.parametrize("stage", STAGES)
def test_stage_declares_its_own_block_and_all_its_code(stage):
    assert PIPELINE[stage]["params"] == [stage]
    assert PIPELINE[stage]["cmd"] == f"fisherfold stage {stage}"
    declared = {name for name in PIPELINE[stage]["deps"] if name.endswith(".py")}
    assert declared == {module_file(module).relative_to(ROOT).as_posix() for module in code_modules(stage)}


@pytest.mark.parametrize("path", sorted((ROOT / "stages").rglob("*.py")), ids=lambda path: path.stem)
def test_stages_import_no_orchestrator(path):
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names} | {
        getattr(node, "module", None) or "" for node in imports
    }
    assert not {"prefect", "dvc", "flows", "ray"} & {name.partition(".")[0] for name in names}


def test_nothing_runs_twice(project):
    assert reproduce(project) == []
    assert stale_reasons(Workspace(project)) == {}


def test_locks_of_dead_processes_are_taken_back_and_others_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])  # a zombie until it is waited for
    while psutil.Process(dead.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    path = tmp_path / ".dvc" / "tmp" / "rwlock"
    path.parent.mkdir(parents=True)
    mine, gone = {"pid": os.getpid(), "cmd": "mine"}, {"pid": dead.pid, "cmd": "gone"}
    path.write_text(json.dumps({"write": {"a": gone, "b": mine}, "read": {"c": [gone, mine], "d": [gone]}}))
    release_dead_locks(Workspace(tmp_path))
    assert json.loads(path.read_text()) == {"write": {"b": mine}, "read": {"c": [mine]}}
    dead.wait()


@pytest.mark.parametrize("left", ["", '{"write": {"artifacts/prepare": {"pid'])
def test_a_list_of_locks_that_a_killed_process_left_half_written_stops_nothing(project, left):
    (project / ".dvc" / "tmp" / "rwlock").write_text(left)
    assert stale_reasons(Workspace(project)) == {}
    assert reproduce(project) == []


@pytest.mark.parametrize(
    "stage",
    [stage if stage in ("kronecker", "report") else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES],
)
def test_a_parameter_reruns_its_stage_and_those_after_it(project, stage):
    key = {"prepare": "seed", "capture": "seed", "kronecker": "iterations", "subspace": "asvd_alpha"}.get(stage)
    key = key or {"ranks": "ratio", "factorize": "dense_export", "evaluate": "batch_size", "report": "title"}[stage]
    override_params(project / "params.yaml", [f"{stage}.{key}={changed(getattr(getattr(Params(), stage), key))}"])
    assert reproduce(project) == list(AFFECTED[stage])


def test_every_parameter_makes_only_its_own_stage_stale(project):
    """With a key of every block changed at once, and then the next, each stage gives its own block as the one reason."""
    path = project / "params.yaml"
    before = path.read_text()
    keys = {block: list(type(getattr(Params(), block)).model_fields) for block in STAGES}
    try:
        for which in (0, -1):
            change(path, {block: own[which] for block, own in keys.items()})
            reasons = stale_reasons(Workspace(project))
            assert reasons.pop("check") == [f"params.yaml {' modified '.join(STAGES)} modified"]
            assert reasons == {block: [f"params.yaml {block} modified"] for block in STAGES}
            path.write_text(before)
    finally:
        path.write_text(before)


def change(path: Path, keys: dict[str, str]) -> None:
    """Give one key of every block another value."""
    yaml = YAML()
    document = yaml.load(path)
    for block, key in keys.items():
        document[block][key] = changed(document[block][key])
    with path.open("w") as file:
        yaml.dump(document, file)


def changed(value: object) -> object:
    """Another value of the same kind (checked nowhere: only DVC sees it)."""
    return OTHER_VALUES.get(type(value).__name__, lambda value: f"{value}-other")(value)
