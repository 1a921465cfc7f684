"""dvc.yaml against the code: what each stage depends on, and what runs again when a parameter changes.

The stages themselves are stood in for by a command that writes outputs which depend on every declared dependency, so
that the graph of dvc.yaml is what is tested; tests/test_pipeline.py runs the real ones.
"""

import ast
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from project import ROOT, clone, command
from ruamel.yaml import YAML

from flows.overrides import override_params
from flows.staleness import release_dead_locks, stale_reasons
from stages.params import STAGES, Params
from stages.workspace import Workspace, code_modules

PIPELINE = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
AFFECTED = {stage: STAGES[STAGES.index(stage) :] for stage in STAGES}
OTHER_VALUES = {"bool": lambda value: not value, "int": lambda value: value + 1, "float": lambda value: value / 2}

STAND_IN = f"""#!{sys.executable}
import hashlib, pathlib, sys
from ruamel.yaml import YAML
stage = YAML(typ="safe").load(pathlib.Path("dvc.yaml"))["stages"][sys.argv[2]]
params = YAML(typ="safe").load(pathlib.Path("params.yaml"))[sys.argv[2]]
digest = hashlib.sha256(repr(sorted(params.items())).encode())
for dependency in sorted(stage["deps"]):
    path = pathlib.Path(dependency)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        digest.update(file.read_bytes() if file.is_file() else b"")
names = ["manifest.json", "model/weights", "prepare.json", "capture.json", "factorize.json"]
names += [f"{{table}}.parquet" for table in ("calibration", "tuning", "evaluation", "questions")]
for out in stage.get("outs", []) + stage.get("metrics", []):
    path = pathlib.Path(out)
    for file in [path] if path.suffix else [path / name for name in names]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(digest.hexdigest())
with open("ran", "a") as log:
    print(sys.argv[2], file=log)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = clone(tmp_path_factory.mktemp("project"))
    stand_in = folder / "commands" / "fisherfold"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN)
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    assert reproduce(folder) == list(STAGES)
    return folder


def reproduce(folder: Path) -> list[str]:
    """`dvc repro` with the stand-in; the stages that ran, in order."""
    (folder / "ran").unlink(missing_ok=True)
    path = os.pathsep.join([str(folder / "commands"), str(Path(sys.executable).parent), os.environ["PATH"]])
    result = command(folder, "dvc", "repro", "--no-run-cache", environment={"PATH": path})
    assert result.returncode == 0, result.stderr
    return (folder / "ran").read_text().split() if (folder / "ran").exists() else []


@pytest.mark.parametrize("stage", STAGES)
def test_stage_declares_its_own_block_and_all_its_code(stage):
    assert PIPELINE[stage]["params"] == [stage]
    assert PIPELINE[stage]["cmd"] == f"fisherfold stage {stage}"
    declared = {name for name in PIPELINE[stage]["deps"] if name.endswith(".py")}
    assert declared == {f"stages/{module}.py" for module in code_modules(stage)}


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
    path.write_text(json.dumps({"a": {"write": gone}, "b": {"write": mine}, "c": {"read": [gone, mine]}}))
    release_dead_locks(Workspace(tmp_path))
    assert json.loads(path.read_text()) == {"b": {"write": mine}, "c": {"read": [mine]}}
    dead.wait()


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_reruns_its_stage_and_those_after_it(project, stage):
    key = {"prepare": "seed", "capture": "seed", "kronecker": "iterations", "subspace": "asvd_alpha"}.get(stage)
    key = key or {"ranks": "ratio", "factorize": "dense_export", "evaluate": "batch_size", "report": "title"}[stage]
    override_params(project / "params.yaml", [f"{stage}.{key}={changed(getattr(getattr(Params(), stage), key))}"])
    assert reproduce(project) == list(AFFECTED[stage])


@pytest.mark.parametrize(
    "parameter", [f"{block}.{key}" for block, params in Params() for key in type(params).model_fields]
)
def test_every_parameter_makes_only_its_own_stage_stale(project, parameter):
    block, key = parameter.split(".")
    yaml, path = YAML(), project / "params.yaml"
    before = path.read_text()
    document = yaml.load(path)
    document[block][key] = changed(document[block][key])
    try:
        with path.open("w") as file:
            yaml.dump(document, file)
        assert list(stale_reasons(Workspace(project))) == [block]
    finally:
        path.write_text(before)


def changed(value: object) -> object:
    """Another value of the same kind (checked nowhere: only DVC sees it)."""
    return OTHER_VALUES.get(type(value).__name__, lambda value: f"{value}-other")(value)
