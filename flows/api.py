"""One Prefect API for a run: the configured one, else a temporary server that ends with it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import httpx
from prefect.client.orchestration import get_client
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_DATABASE_CONNECTION_URL,
    PREFECT_API_URL,
    PREFECT_SERVER_API_HOST,
    PREFECT_SERVER_API_PORT,
    temporary_settings,
)

from fisherfold.run.errors import EngineError
from fisherfold.run.progress import announce
from flows.api_secret import lasting_secret, new_secret, where_it_is
from flows.surroundings import reach_directly

START_SECONDS = 300.0
DIE_WITH_PARENT = "import ctypes; ctypes.CDLL(None).prctl(1, 15); from uvicorn import main; main()"  # PR_SET_PDEATHSIG


@contextmanager
def prefect_api(host: str) -> Iterator[str]:
    """The address of the Prefect API, which children of this process are told as well.

    Args:
        host: where a temporary server listens.

    Raises:
        EngineError: the configured API does not answer, or a temporary one does not start.
    """
    configured = PREFECT_API_URL.value()
    if configured:
        _require_answer(configured)
        announce("fisherfold", f"Prefect API at {configured}")
        yield configured
        return
    secret = new_secret()
    with _temporary_server(host, secret) as url, _using(url, secret):
        announce("fisherfold", f"Prefect API at {url}, for this run alone, on {_database()}")
        try:
            yield url
        finally:
            _send_what_waits()  # of an interrupted run too: Prefect would try a server that is gone for minutes


@contextmanager
def lasting_api() -> Iterator[str]:
    """The address of the configured Prefect API; else of this user's own server, which is started if it does not run.

    A server that is started here listens where PREFECT_SERVER_API_HOST and _PORT say, by default on the loopback
    interface alone, wants the password of `api_secret`, serves Prefect's pages, keeps what it knows, and ends with this block.

    Raises:
        EngineError: neither answers, or a server of somebody else does.
    """
    configured = PREFECT_API_URL.value()
    if configured:
        _require_answer(configured)
        yield configured
        return
    url = f"http://{PREFECT_SERVER_API_HOST.value()}:{PREFECT_SERVER_API_PORT.value()}/api"
    secret = lasting_secret()
    running = _answers(url)
    if running:
        _require_ours(url, secret)
    with nullcontext() if running else _own_server(url, secret), _using(url, secret):
        announce("fisherfold", f"Prefect's user and password: {where_it_is()}")
        yield url


@contextmanager
def _using(url: str, secret: str) -> Iterator[None]:
    """Inside, this process and its children speak to this API."""
    settings = {PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: secret}
    with temporary_settings(settings), exported("PREFECT_API_URL", url), exported("PREFECT_API_AUTH_STRING", secret):
        yield


@contextmanager
def _own_server(url: str, secret: str) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start"],
        env={**os.environ, "PREFECT_SERVER_API_AUTH_STRING": secret},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the run, which still has to tell the server of its end
    )
    try:
        _await_health(process, url)
        yield
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return _get(url, "health").is_success
    except httpx.TransportError:
        return False


def _get(url: str, what: str, auth: tuple[str, str] | None = None) -> httpx.Response:
    """An answer of a server of ours, which no proxy of the environment knows."""
    return httpx.get(f"{url}/{what}", auth=auth, trust_env=False)


def _require_ours(url: str, secret: str) -> None:
    """Raise EngineError unless the server that runs there already wants a password, and this one."""
    user, _, password = secret.partition(":")
    told = f"set PREFECT_API_URL={url} to use it all the same, or PREFECT_SERVER_API_PORT to another port"
    if _get(url, "admin/version").is_success:
        raise EngineError(
            f"A Prefect server at {url} wants no password, so every local user could start runs here. End it, {told}."
        )
    if not _get(url, "admin/version", (user, password)).is_success:
        raise EngineError(f"The Prefect server at {url} wants another password than ours, {where_it_is()}: {told}.")


def _require_answer(url: str) -> None:
    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    if error is not None:
        raise EngineError(
            f"The Prefect API at {url} does not answer ({error}). Start it with `prefect server start`, correct PREFECT_API_URL, "
            "or unset it to have a temporary one."
        )


@contextmanager
def _temporary_server(host: str, secret: str) -> Iterator[str]:
    port = _free_port(host)
    reach_directly(os.environ, host)
    url = f"http://{host}:{port}/api"
    where = ["--host", host, "--port", str(port), "--log-level", "error", "--lifespan", "on"]
    own = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", DIE_WITH_PARENT, "--factory", "prefect.server.api.server:create_app", *where],
        env={**os.environ, **own, "PREFECT_SERVER_API_AUTH_STRING": secret},
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the run, which still has to tell the server of its end
    )
    try:
        _await_health(process, url)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _send_what_waits() -> None:
    """Prefect sends logs and events from threads of its own, in batches; what waits is sent before the server ends."""
    for sender in (APILogWorker, EventsWorker):
        sender.drain_all(timeout=5)


def _await_health(process: subprocess.Popen, url: str) -> None:
    """Wait until a server that was started answers.

    Raises:
        EngineError: it ended, or does not answer within START_SECONDS.
    """
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if _answers(url):
            return
        time.sleep(0.1)
    raise EngineError(
        f"A Prefect API did not start at {url} (on {_database()}). Look at what `prefect server start` says, then "
        "set PREFECT_API_URL to its address."
    )


def _free_port(host: str) -> int:
    try:
        with socket.create_server((host, 0)) as server:
            return server.getsockname()[1]
    except OSError as error:
        raise EngineError(
            f"FISHERFOLD_API_HOST={host}: this host cannot listen there ({error}). Give one of its addresses."
        ) from None


def _database() -> str:
    url = str(PREFECT_API_DATABASE_CONNECTION_URL.value() or "")
    return "PostgreSQL" if url.startswith("postgresql") else "SQLite"


@contextmanager
def exported(variable: str, value: str) -> Iterator[None]:
    """Inside, a variable of the environment has a value."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        os.environ.pop(variable) if before is None else os.environ.update({variable: before})
