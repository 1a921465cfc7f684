"""The whole pipeline on a tiny model with its shards on an S3 server, and DVC's remote there too."""

import importlib
import json
import subprocess
from pathlib import Path

import pytest
from object_storage import BUCKET, Storage
from project import ROOT, command
from tiny_project import copy, published

from fisherfold.run.files import verify_output
from fisherfold.run.params import STAGES, load_params
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.statistics.shard import loaded_model
from flows.checked import write_checked

pytestmark = pytest.mark.slow


def run_stages(folder: Path) -> None:
    """Run every stage in this process."""
    workspace, params = Workspace(folder), load_params(folder / "params.yaml")
    write_checked(workspace)
    for stage in STAGES:
        importlib.import_module(f"stages.{stage}").run(workspace, getattr(params, stage))
    loaded_model.cache_clear()


def succeed(folder: Path, *words: str, environment: dict[str, str] | None = None) -> str:
    result = command(folder, *words, environment=environment)
    assert result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
    return result.stdout


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", folder, "-c", "user.name=t", "-c", "user.email=t@localhost", *words], check=True)


@pytest.fixture
def stored(storage: Storage, fresh: Path, tmp_path, monkeypatch) -> Path:
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


def test_same_bits_as_on_the_file_system_and_a_second_clone_pulls_everything(storage, stored, finished, tmp_path):
    assert published(stored) == published(finished)
    assert list((stored / "artifacts/capture/gradients").glob("*.pointer.json"))
    assert not list((stored / "artifacts").rglob("shard-*.zarr.zip"))
    succeed(stored, "dvc", "push", "--quiet")
    second = tmp_path / "second"
    git(stored, "clone", "--quiet", str(stored), str(second))
    succeed(second, "dvc", "pull", "--quiet")
    storage.requests.clear()
    assert "up to date" in succeed(second, "dvc", "repro")
    assert storage.requests == []
    capture = Workspace(second).out("capture")
    assert verify_output(capture) == verify_output(Workspace(stored).out("capture"))
    reader = Statistics(capture)
    assert all(reader.gradient_norms(layer).isfinite().all() for layer in reader.layers)
    assert json.loads(succeed(second, "dvc", "metrics", "show", "--json"))
    assert "0 faults" in succeed(second, "fisherfold", "store", "check", environment={"PYTHONPATH": str(ROOT)})
