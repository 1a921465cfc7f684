"""A Prefect server that tests share where it is not what they test: a run with one of its own takes seconds longer."""

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPException
from pathlib import Path

import pytest

QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
DATABASE = "prefect.db"
PATIENCE = 240.0  # seconds; a busy machine fails no test
PORTS = 3  # to try


@contextmanager
def running_server(home: Path, **variables: str) -> Iterator[str]:
    """Inside, a server on the loopback interface that keeps what it knows in `home`; the address of its API.

    `variables` are further ones of its environment.
    """
    environment = {**os.environ, **QUIET, "PREFECT_HOME": str(home), "PREFECT_UI_ENABLED": "0", **variables}
    for _ in range(PORTS):
        port = str(free_port())
        words = ["--factory", "prefect.server.api.server:create_app", "--port", port, "--log-level", "error"]
        command = [sys.executable, "-m", "uvicorn", *words]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        try:
            if answers(process, url := f"http://127.0.0.1:{port}/api"):
                yield url
                return
        finally:
            process.terminate()
            process.wait()
    raise AssertionError(f"no Prefect server started, of {PORTS}")


def free_port() -> int:
    """A port of the loopback interface where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def answers(process: subprocess.Popen, url: str) -> bool:
    """Whether the server comes up there: another process may take its port between our choice and its start, and say what it likes."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return process.poll() is None
        except (OSError, HTTPException):
            time.sleep(0.1)
    return False


@pytest.fixture(scope="session")
def first_server(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The API of a server, and its database as it was before anything ran."""
    home, kept = (tmp_path_factory.mktemp(name) for name in ("prefect", "kept"))
    with running_server(home) as url:
        with closing(sqlite3.connect(home / DATABASE)) as source, closing(sqlite3.connect(kept / DATABASE)) as target:
            source.backup(target)
        yield url, kept / DATABASE


@pytest.fixture(scope="session")
def prefect_url(first_server) -> str:
    """The API of one server for the whole session."""
    return first_server[0]


@pytest.fixture(scope="session")
def prefect_home(first_server) -> Callable[[Path], Path]:
    """Makes a folder a PREFECT_HOME with an empty database; a server that has to make that itself takes 4 s longer."""

    def make(folder: Path) -> Path:
        folder.mkdir()
        shutil.copy(first_server[1], folder / DATABASE)
        return folder

    return make
