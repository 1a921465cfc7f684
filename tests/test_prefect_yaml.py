"""prefect.yaml: every deployment is one that a Prefect server takes, and its flow takes its parameters."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from itertools import pairwise

import pytest
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
    """A Prefect server of its own on the loopback interface; the environment that reaches it."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    home = {"PREFECT_HOME": str(tmp_path), "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    environment = {**os.environ, **home, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for_health(environment["PREFECT_API_URL"])
        yield environment
    finally:
        process.terminate()
        process.wait()


def _wait_for_health(url: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


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
