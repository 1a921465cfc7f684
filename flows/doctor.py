"""`fisherfold doctor`: what would stop a run, found before it starts, each with the cure.

A check is a small function: of MACHINE_CHECKS what needs no project, of WORKSPACE_CHECKS what looks at one; those of a cluster are in
flows/cluster/cluster_checks.py.
"""

import base64
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

from fisherfold.run.errors import CorruptArtifact, FisherfoldError, InputError, ParameterError, StoreError
from fisherfold.run.objects import SETTING, store_url
from fisherfold.run.params import load_params
from fisherfold.run.registry import Registry
from fisherfold.run.workspace import Workspace
from flows.cluster.cluster_checks import GPU_CURE, check_cluster
from flows.cluster.node_report import is_excluded, locked_probe
from flows.commands.options import GET_ONE
from flows.findings import Finding, Outcome
from flows.preflight import preflight
from flows.repository import repository
from flows.settings import Settings
from flows.storage import probe_store

CONNECT_SECONDS = 5.0  # to open a connection to the Prefect API
FIRST_REFUSING_FASTAPI = (0, 151)  # answers 422 to `prefect deploy`
FIRST_BROKEN_FASTAPI = (0, 155)  # does not start
MOST_FREE = 10 * 2**30  # bytes below which a disk is worth a warning; the demo takes six

MACHINE_CHECKS: Registry[Callable[[], Outcome]] = Registry("check")
WORKSPACE_CHECKS: Registry[Callable[[Workspace], Outcome]] = Registry("check")


def examine(workspace: Workspace | None, settings: Settings) -> list[Finding]:
    """Every finding, of this machine, of the project if there is one and, for engine `ray`, of the cluster that it would use."""
    found = [Finding(name, *_outcome(MACHINE_CHECKS.lookup(name))) for name in MACHINE_CHECKS]
    if workspace is None:
        return [
            *found,
            Finding("project", "warn", "this folder is in none, so only the machine was looked at", GET_ONE),
        ]
    found += [Finding(name, *_outcome(partial(WORKSPACE_CHECKS.lookup(name), workspace))) for name in WORKSPACE_CHECKS]
    return found + (check_cluster(settings, workspace) if settings.engine == "ray" else [])


def _outcome(check: Callable[[], Outcome]) -> Outcome:
    try:
        return check()
    except FisherfoldError as error:
        return Outcome("fail", str(error))
    except OSError as error:
        return Outcome(
            "fail", f"{type(error).__name__}: {error}", "See to it that this process may read and write here"
        )


@WORKSPACE_CHECKS.register("parameters")
def check_parameters(workspace: Workspace) -> Outcome:
    """params.yaml is valid: names of methods, pairs of parameters, the budget; model and texts can be had, if they are wanted anew."""
    try:
        preflight(workspace, load_params(workspace.root / "params.yaml"))
    except (ParameterError, InputError) as error:
        return Outcome("fail", str(error), "Correct params.yaml")
    return Outcome("ok", "params.yaml is valid, and what it names is there")


@WORKSPACE_CHECKS.register("dvc")
def check_dvc(workspace: Workspace) -> Outcome:
    """DVC opens the repository and reads dvc.yaml."""
    if not (workspace.root / ".dvc").is_dir():
        return Outcome("fail", f"{workspace.root} is not a DVC repository", "dvc init (with --no-scm outside of git)")
    from dvc.exceptions import DvcException

    try:
        with repository(workspace) as repo:
            stages = len(repo.index.stages)
    except DvcException as error:
        return Outcome("fail", f"DVC cannot read the pipeline: {error}", "Correct dvc.yaml, or take it from git again")
    return Outcome("ok", f"{stages} stages in dvc.yaml")


@MACHINE_CHECKS.register("fastapi")
def check_fastapi() -> Outcome:
    """Prefect's own server starts with this fastapi; pip does not notice when it cannot."""
    found = version("fastapi")
    release = tuple(int(part) for part in found.split(".")[:2])
    if release >= FIRST_BROKEN_FASTAPI:
        return Outcome("fail", f"fastapi {found} breaks Prefect's server", FASTAPI_CURE)
    if release >= FIRST_REFUSING_FASTAPI:
        return Outcome(
            "warn", f"with fastapi {found} `prefect deploy` ends with 422; runs are not affected", FASTAPI_CURE
        )
    return Outcome("ok", found)


FASTAPI_CURE = "pip install 'fastapi<0.151'"


@MACHINE_CHECKS.register("prefect")
def check_prefect() -> Outcome:
    """The Prefect API that is configured answers; without one a run starts a temporary server."""
    from prefect.settings import get_current_settings

    settings = get_current_settings().api
    if not settings.url:
        return Outcome("ok", "no API configured: a run starts a temporary server on the loopback interface")
    cure = "Start it with `prefect server start`, correct PREFECT_API_URL, or unset it"
    secret = settings.auth_string or settings.key
    try:
        status = _get(f"{settings.url}/admin/version", secret.get_secret_value() if secret else None)
    except urllib.error.HTTPError as error:
        refused = "Set PREFECT_API_AUTH_STRING to the server's PREFECT_SERVER_API_AUTH_STRING"
        return Outcome("fail", f"{settings.url} answers {error.code}", refused if error.code in (401, 403) else cure)
    except (OSError, ValueError) as error:
        return Outcome("fail", f"no Prefect API at {settings.url}: {error}", cure)
    return Outcome("ok", f"{settings.url} answers {status}")


def _get(url: str, secret: str | None) -> int:
    """The status of an answer; the secret goes as the password of a server (user:password) or the key of Prefect Cloud."""
    encoded = base64.b64encode((secret or "").encode()).decode()
    headers = {"Authorization": f"Basic {encoded}" if ":" in (secret or "") else f"Bearer {secret}"} if secret else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=CONNECT_SECONDS) as answer:
        return answer.status


@MACHINE_CHECKS.register("device")
def check_device() -> Outcome:
    """The device that FISHERFOLD_DEVICE asks for is there."""
    import torch

    from fisherfold.run.determinism import usable_device

    try:
        device = usable_device()
    except ParameterError as error:
        return Outcome("fail", str(error), GPU_CURE)
    return Outcome("ok", f"{device}, torch {torch.__version__}")


@WORKSPACE_CHECKS.register("disk")
def check_disk(workspace: Workspace) -> Outcome:
    """There is room for a run; the stages themselves refuse to start when their own formula does not fit."""
    free = shutil.disk_usage(workspace.root).free
    if free < MOST_FREE:
        return Outcome(
            "warn", f"{free / 1e9:.1f} GB free", "See `fisherfold plan`; `dvc gc --workspace` frees old results"
        )
    return Outcome("ok", f"{free / 1e9:.0f} GB free")


@WORKSPACE_CHECKS.register("locks")
def check_locks(workspace: Workspace) -> Outcome:
    """A lock on a file in artifacts/ keeps a second holder out: without it two processes could run one stage."""
    with locked_probe(workspace.artifacts) as probe:
        if probe is None or not is_excluded(probe):
            return Outcome(
                "fail",
                f"the file system of {workspace.artifacts} does not keep locks",
                "Mount it with locks (NFS: version 4, or 3 with a lock daemon; Lustre: -o flock), or put the project elsewhere",
            )
    return Outcome("ok", "flock keeps a second holder out")


@WORKSPACE_CHECKS.register("object storage")
def check_object_storage(workspace: Workspace) -> Outcome:
    """What FISHERFOLD_STORE names, if it is set, takes a small object, gives it back and removes it."""
    try:
        probe_store()
        url = store_url()
    except (StoreError, CorruptArtifact) as error:
        return Outcome("fail", str(error), "docs/storage.md has the settings and the rights that a run needs")
    return Outcome(
        "ok", f"{url}: wrote, read and removed a probe" if url else f"no {SETTING}: shards stay in artifacts/"
    )
