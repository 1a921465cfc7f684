"""A run whose Prefect server keeps its state in a real PostgreSQL, in a temporary folder."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from uuid import uuid4

import pytest
from prefect_server import free_port, running_server
from project import command
from stand_in import clone_with_stand_in

from fisherfold.run.params import STAGES

USERS = ("postgres", "nobody")  # PostgreSQL refuses to run as root


def program(name: str) -> str | None:
    return shutil.which(name) or next(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), None)


def reason_for_none() -> str | None:
    """Why this machine cannot run it, if it cannot."""
    if not (program("initdb") and program("postgres")):
        return "PostgreSQL is not installed: no initdb or postgres"
    if find_spec("asyncpg") is None:
        return "asyncpg, Prefect's driver for PostgreSQL, is not installed"
    if os.geteuid() == 0 and user() is None:
        return f"PostgreSQL refuses to run as root, and there is no user {' or '.join(USERS)}"
    return None


def user() -> str | None:
    """Whom to run it as; None: as whoever runs the test."""
    import pwd

    for name in USERS if os.geteuid() == 0 else ():
        with suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return None


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why := reason_for_none()), reason=str(why))]


@pytest.fixture
def database() -> Iterator[str]:
    """The URL of an empty database that asks for a password and listens on loopback alone."""
    folder, port, password = Path(mkdtemp(prefix="ff")), free_port(), uuid4().hex
    (folder / "password").write_text(password)
    for path in (folder, folder / "password"):
        shutil.chown(path, user() or os.getuid())
    words = [program("initdb"), "-D", "data", "-U", "prefect", "-A", "scram-sha-256", "--pwfile", "password", "-N"]
    subprocess.run(words, cwd=folder, user=user(), check=True, capture_output=True)
    where = ["-p", str(port), "-c", "listen_addresses=127.0.0.1", "-k", str(folder), "-c", "fsync=off"]
    server = subprocess.Popen(
        [program("postgres"), "-D", "data", *where], cwd=folder, user=user(), stderr=subprocess.DEVNULL
    )
    try:
        yield f"postgresql+asyncpg://prefect:{password}@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # SIGTERM would wait until nobody is connected any more
        server.wait()
        shutil.rmtree(folder)


def rows(database: str, query: str) -> list[tuple]:
    """What PostgreSQL itself says; it may have just begun."""
    import asyncpg

    async def ask() -> list[tuple]:
        connection = await asyncpg.connect(database.replace("+asyncpg", ""))
        try:
            return [tuple(row) for row in await connection.fetch(query)]
        finally:
            await connection.close()

    deadline = time.monotonic() + 60
    while True:
        try:
            return asyncio.run(ask())
        except (OSError, asyncpg.CannotConnectNowError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_a_run_on_a_server_with_postgresql_behind_it(database, tmp_path):
    folder = clone_with_stand_in(tmp_path / "project")
    assert rows(database, "select count(*) from pg_tables where tablename = 'flow_run'") == [(0,)]
    words = [sys.executable, "-m", "fisherfold", "run"]
    behind = {"PREFECT_API_DATABASE_CONNECTION_URL": database}
    home = {"PREFECT_HOME": str(tmp_path / "home")}
    with running_server(tmp_path / "home", **behind) as url:
        first = command(folder, *words, environment={**home, "PREFECT_API_URL": url})
        assert first.returncode == 0, first.stderr
        assert f"Prefect API at {url}\n" in first.stderr
    second = command(folder, *words, environment={**behind, **home})
    assert second.returncode == 0, second.stderr
    assert "for this run alone, on PostgreSQL" in second.stderr
    assert [f"{stage}: is up to date" in second.stderr for stage in STAGES] == [True] * len(STAGES)
    found = rows(database, "select state_type::text from flow_run")
    assert found == [("COMPLETED",)] * 2
    assert rows(database, "select count(*) from task_run where state_name = 'Cached'") == [(len(STAGES),)]
