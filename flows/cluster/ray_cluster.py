"""The Ray cluster of a run: one of this host alone, or one that is running already."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

import flows
from fisherfold.run.errors import EngineError
from fisherfold.run.progress import announce
from flows import DEFAULTS
from flows.settings import Settings
from flows.surroundings import ray_folder

HERE = {"address": "local", "_node_ip_address": "127.0.0.1", "include_dashboard": False}
"""A new Ray, whatever runs on this host already; nothing of it can be reached from outside."""
OURS = {"namespace": "fisherfold", "log_to_driver": False, "logging_level": "ERROR"}
KNOCK_SECONDS = 10.0
PASSED_ON = (
    *DEFAULTS,
    "PREFECT_API_URL",
    "FISHERFOLD_DEVICE",
    "FISHERFOLD_STORE",
    "FISHERFOLD_CACHE",
    "HF_HUB_OFFLINE",
)
"""What workers know of this process's environment. Ray shows it to all who may look; so no secret is among it: keys of a store are
each node's own, and those of the API travel with Prefect's own settings, task by task."""


def environment() -> dict[str, dict[str, str]]:
    """PASSED_ON as Ray takes it for a job or a task, and the folder of this very code, before a node's own of that name."""
    known = {name: value for name, value in os.environ.items() if name in PASSED_ON}
    return {"env_vars": known | {"PYTHONPATH": f"{CODE}{os.pathsep}${{PYTHONPATH}}"}}


CODE = Path(flows.__file__).parents[1]
_joining = threading.Lock()  # stages of a sweep run side by side


@contextmanager
def joined_cluster(settings: Settings) -> Iterator[None]:
    """Inside, this process belongs to a cluster; see `join`."""
    join(settings)
    try:
        yield
    finally:
        ray.shutdown()


def join(settings: Settings) -> None:
    """Make this process belong to the cluster at `settings.ray_address`, or to a Ray of this host that it starts, if it does not yet.

    That is one job of Ray, with workers of its own, which get the settings of this run and the address of its Prefect API. A Ray
    that is started here ends with the thread that did it at the latest, however that ends.

    Raises:
        EngineError: the cluster does not answer or runs other versions.
    """
    with _joining:
        if not ray.is_initialized():
            _join(settings)
            announce("fisherfold", f"Ray at {settings.ray_address or 'this host, for this run alone'}")


def _join(settings: Settings) -> None:
    where = {"address": settings.ray_address} if settings.ray_address else {**HERE, "_temp_dir": ray_folder()}
    try:
        _knock(settings.ray_address)
        with _kept_signals():
            ray.init(**where, **OURS, runtime_env=environment())
    except (OSError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"The Ray cluster at {settings.ray_address or 'this host'} cannot be used: {error}. Look at `ray status "
            "--address HOST:PORT`; a cluster with a token wants RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here, too; "
            "`fisherfold doctor` looks for the cause."
        ) from error


def _knock(address: str | None) -> None:
    """Raise OSError if nobody listens at host:port; Ray itself would try for minutes. Other forms are left to Ray."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdecimal() and "://" not in host:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()


@contextmanager
def _kept_signals() -> Iterator[None]:
    """Ray's own handler of SIGTERM would end this process before it has cleaned up."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
