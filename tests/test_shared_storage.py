"""The whole pipeline on a tiny model with its shards on an S3 server, and DVC's remote there too."""

import importlib
import json
import subprocess
from pathlib import Path

import pytest
from object_storage import BUCKET, Storage
from project import command
from test_pipeline import copy, fresh  # noqa: F401

from stages.params import STAGES, load_params
from stages.shard import loaded_model
from stages.statistics import Statistics
from stages.workspace import Workspace, read_manifest, verify_output

pytestmark = pytest.mark.slow


def run_stages(folder: Path) -> dict[str, dict]:
    """Run every stage in this process; what each published."""
    workspace, params = Workspace(folder), load_params(folder / "params.yaml")
    for stage in STAGES:
        importlib.import_module(f"stages.{stage}").run(workspace, getattr(params, stage))
    loaded_model.cache_clear()
    return {stage: read_manifest(workspace.out(stage))["files"] for stage in STAGES}


def succeed(folder: Path, *words: str, environment: dict[str, str] | None = None) -> str:
    result = command(folder, *words, environment=environment)
    assert result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
    return result.stdout


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", folder, "-c", "user.name=t", "-c", "user.email=t@localhost", *words], check=True)


@pytest.fixture
def finished(storage: Storage, fresh: Path, tmp_path, monkeypatch) -> Path:  # noqa: F811
    """A finished project whose shards lie on the server, committed to git and to DVC."""
    folder = copy(fresh, tmp_path / "project")
    monkeypatch.chdir(folder)
    run_stages(folder)
    succeed(folder, "dvc", "commit", "--force", "--quiet")
    succeed(folder, "dvc", "remote", "add", "--default", "storage", f"s3://{BUCKET}/dvc")
    succeed(folder, "dvc", "remote", "modify", "storage", "endpointurl", storage.url)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "A finished run")
    return folder


def test_every_stage_has_the_same_bits_as_on_the_file_system(finished, fresh, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.delenv("FISHERFOLD_STORE")
    folder = copy(fresh, tmp_path / "local")
    monkeypatch.chdir(folder)
    local = run_stages(folder)
    assert {stage: read_manifest(Workspace(finished).out(stage))["files"] for stage in STAGES} == local
    assert list((finished / "artifacts/capture/gradients").glob("*.pointer.json"))
    assert not list((finished / "artifacts").rglob("shard-*.zarr.zip"))


def test_a_second_clone_pulls_everything_and_runs_nothing(storage, finished, tmp_path):
    succeed(finished, "dvc", "push", "--quiet")
    second = tmp_path / "second"
    git(finished, "clone", "--quiet", str(finished), str(second))
    succeed(second, "dvc", "pull", "--quiet")
    storage.requests.clear()
    assert "up to date" in succeed(second, "dvc", "repro")
    assert storage.requests == []
    capture = Workspace(second).out("capture")
    assert verify_output(capture) == verify_output(Workspace(finished).out("capture"))
    reader = Statistics(capture)
    assert all(reader.gradient_norms(layer).isfinite().all() for layer in reader.layers)
    assert json.loads(succeed(second, "dvc", "metrics", "show", "--json"))
    assert "0 faults" in succeed(
        second, "fisherfold", "store", "check", environment={"PYTHONPATH": str(Path(__file__).parents[1])}
    )
