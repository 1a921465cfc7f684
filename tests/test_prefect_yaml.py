"""prefect.yaml: every deployment is one that a Prefect server takes, and its flow takes its parameters."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
from prefect_server import running_server
from project import ROOT
from ruamel.yaml import YAML

from flows.pipeline import pipeline
from stages.params import STAGES

DOCUMENT = YAML(typ="safe").load(ROOT / "prefect.yaml")
DEPLOYMENTS = {entry["name"]: entry for entry in DOCUMENT["deployments"]}


def test_the_pipeline_and_every_stage_can_be_deployed():
    assert list(DEPLOYMENTS) == ["pipeline", *STAGES]
    for name, entry in DEPLOYMENTS.items():
        assert entry["entrypoint"] == "flows/pipeline.py:pipeline"
        assert pipeline.validate_parameters({**entry["parameters"], "workspace": str(ROOT)})
        assert entry["parameters"].get("stages", [name]) == [name]
        assert entry["concurrency_limit"]["limit"] == 1


def test_each_stage_starts_the_next():
    for before, after in pairwise(STAGES):
        (trigger,) = DEPLOYMENTS[after]["triggers"]
        assert trigger["match_related"]["prefect.resource.name"] == before
    assert "triggers" not in DEPLOYMENTS["prepare"]


@pytest.fixture
def server(tmp_path):
    """The environment that reaches a Prefect server of this test's own: what is deployed would answer to other tests' events."""
    with running_server(tmp_path) as url:
        yield {**os.environ, "PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": url}


def _prefect(environment: dict, *words: str) -> str:
    command = [sys.executable, "-m", "prefect", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_server_takes_every_deployment(server):
    for pool in ("fisherfold-cpu", "fisherfold-gpu"):
        _prefect(server, "work-pool", "create", pool, "--type", "process")
    _prefect(server, "--no-prompt", "deploy", "--all")
    listed = _prefect({**server, "COLUMNS": "200"}, "deployment", "ls")
    for name in DEPLOYMENTS:
        assert f"fisherfold/{name}" in listed
    assert _prefect({**server, "COLUMNS": "200"}, "automation", "ls").count("__automation") >= len(STAGES) - 1
