"""prefect.yaml: every deployment is one that a Prefect server takes, and its flow takes its parameters."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect_server import running_server
from project import ROOT
from ruamel.yaml import YAML
from tiny_project import tiny_project

from fisherfold.run.params import STAGES
from flows.pipeline import pipeline

DOCUMENT = YAML(typ="safe").load(ROOT / "prefect.yaml")
POOLS = ("fisherfold-cpu", "fisherfold-gpu")
CHAIN = os.environ.get("FISHERFOLD_CHAIN", "kronecker")
PATIENCE = 120  # seconds a stage; a busy machine fails no test
DEPLOYMENTS = {entry["name"]: entry for entry in DOCUMENT["deployments"]}


def test_the_pipeline_and_every_stage_can_be_deployed():
    assert list(DEPLOYMENTS) == ["pipeline", *STAGES]
    for name, entry in DEPLOYMENTS.items():
        assert entry["entrypoint"] == "flows/pipeline.py:pipeline"
        assert pipeline.validate_parameters(entry.get("parameters", {}))
        assert entry.get("parameters", {}).get("stages", [name]) == [name]
        assert entry["concurrency_limit"]["limit"] == 1


def test_each_stage_starts_the_next():
    for before, after in pairwise(STAGES):
        (trigger,) = DEPLOYMENTS[after]["triggers"]
        assert trigger["match_related"]["prefect.resource.name"] == before
    assert "triggers" not in DEPLOYMENTS["prepare"]


@pytest.fixture(scope="module")
def server(prefect_home, tmp_path_factory):
    """The environment that reaches a Prefect server with POOLS, of this module's own: what is deployed would answer to other
    tests' events."""
    home = prefect_home(tmp_path_factory.mktemp("server") / "home")
    with running_server(home) as url:
        environment = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_API_URL": url}
        for pool in POOLS:
            _prefect(environment, "work-pool", "create", pool, "--type", "process")
        yield environment


def _prefect(environment: dict, *words: str, folder: Path = ROOT) -> str:
    command = [sys.executable, "-m", "prefect", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_server_takes_every_deployment(server):
    _prefect(server, "--no-prompt", "deploy", "--all")
    listed = _prefect({**server, "COLUMNS": "200"}, "deployment", "ls")
    for name in DEPLOYMENTS:
        assert f"fisherfold/{name}" in listed
    assert _prefect({**server, "COLUMNS": "200"}, "automation", "ls").count("__automation") >= len(STAGES) - 1


@pytest.fixture
def deployed(server, tmp_path) -> Iterator[Path]:
    """A tiny project whose stages are deployed, with a worker for each pool, none of which has a Ray."""
    folder = tiny_project(tmp_path / "project")
    text = (ROOT / "prefect.yaml").read_text()
    without = re.sub(r"(name: fisherfold-gpu\n *job_variables: ).*", r"\1{env: {FISHERFOLD_ENGINE: inline}}", text)
    assert without != text
    (folder / "prefect.yaml").write_text(without)
    _prefect(server, "--no-prompt", "deploy", "--all", folder=folder)
    soon = {**server, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    words = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process", "--pool"]
    with (tmp_path / "workers.log").open("w") as log:
        workers = [psutil.Popen([*words, pool], cwd=folder, env=soon, stdout=log, stderr=log) for pool in POOLS]
    yield folder
    for worker in workers:
        for member in [*worker.children(recursive=True), worker]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        worker.wait()


@pytest.mark.slow
def test_prepare_sets_off_the_stages_after_it_one_by_one(server, deployed, tmp_path):
    """As far as CHAIN; the whole chain takes minutes: ``FISHERFOLD_CHAIN=report pytest tests/flows/test_prefect_yaml.py -k sets_off``."""
    expected = list(STAGES[: STAGES.index(CHAIN) + 1])
    with temporary_settings({PREFECT_API_URL: server["PREFECT_API_URL"]}), get_client(sync_client=True) as client:
        names = {each.id: each.name for each in client.read_deployments()}
        first = client.read_deployment_by_name("fisherfold/prepare")
        client.create_flow_run_from_deployment(first.id)
        deadline = time.monotonic() + PATIENCE * len(expected)
        runs = []
        while len(runs) < len(expected) or not runs[len(expected) - 1].state.is_final():
            assert time.monotonic() < deadline, (tmp_path / "workers.log").read_text()[-3000:]
            time.sleep(1)
            runs = sorted(client.read_flow_runs(), key=lambda run: run.created)
            assert not [run for run in runs if run.state.is_failed() or run.state.is_crashed()]
        runs = runs[: len(expected)]
    assert [names[run.deployment_id] for run in runs] == expected
    assert all(run.state.is_completed() for run in runs)
    assert all(before.end_time <= after.start_time for before, after in pairwise(runs))
    assert all((deployed / "artifacts" / stage / "manifest.json").exists() for stage in expected)
