"""A Prefect server that tests share where it is not what they test: a run with one of its own takes seconds longer."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
PATIENCE = 240.0  # seconds; a busy machine fails no test


@contextmanager
def running_server(home: Path, **variables: str) -> Iterator[str]:
    """Inside, a server on the loopback interface that keeps what it knows in `home`; the address of its API.

    `variables` are further ones of its environment.
    """
    port = str(free_port())
    words = ["--factory", "prefect.server.api.server:create_app", "--port", port, "--log-level", "error"]
    environment = {**os.environ, **QUIET, "PREFECT_HOME": str(home), "PREFECT_UI_ENABLED": "0", **variables}
    process = subprocess.Popen([sys.executable, "-m", "uvicorn", *words], env=environment, stderr=subprocess.DEVNULL)
    try:
        _wait(process, url := f"http://127.0.0.1:{port}/api")
        yield url
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """A port of the loopback interface where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def _wait(process: subprocess.Popen, url: str) -> None:
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no Prefect server at {url}")


@pytest.fixture(scope="session")
def prefect_url(tmp_path_factory) -> Iterator[str]:
    """The API of one server for the whole session."""
    with running_server(tmp_path_factory.mktemp("prefect")) as url:
        yield url
