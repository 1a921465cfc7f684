"""`fisherfold doctor`: what would stop a run, found before it starts, each with the cure.

A check is a small function of one of two registries: of the project on this machine (WORKSPACE_CHECKS), or of the reports that the
nodes of a cluster give of themselves (CLUSTER_CHECKS).
"""

import base64
import fcntl
import secrets
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from flows.methods import check_methods
from flows.node_report import PACKAGES, NodeReport, is_excluded, report_node
from flows.settings import Settings
from stages.errors import EngineError, FisherfoldError, ParameterError
from stages.params import load_params
from stages.registry import Registry
from stages.workspace import Workspace

CONNECT_SECONDS = 5.0  # to open a connection to the cluster's head, or to the Prefect API
REPORT_SECONDS = 120.0  # for all nodes to answer; a cold one imports torch
CLOCK_SECONDS = 5.0  # difference between two nodes' clocks that a cache of file times would notice
FIRST_REFUSING_FASTAPI = (0, 151)  # answers 422 to `prefect deploy`
FIRST_BROKEN_FASTAPI = (0, 155)  # does not start
MOST_FREE = 10 * 2**30  # bytes below which a disk is worth a warning; the demo takes six
INSTALL = "pip install 'fisherfold[cluster]'"

Level = Literal["ok", "warn", "fail"]


class Outcome(NamedTuple):
    """What a check found: nothing (ok), something to know (warn), something that stops a run (fail)."""

    level: Level
    says: str
    cure: str = ""


class Finding(NamedTuple):
    """An outcome with the name of its check."""

    check: str
    level: Level
    says: str
    cure: str = ""


@dataclass(frozen=True)
class Cluster:
    """What a cluster says of itself: the head's report (this process), the nodes', and the GPUs a unit asks for."""

    head: NodeReport
    nodes: Sequence[NodeReport]
    num_gpus: float


WORKSPACE_CHECKS: Registry[Callable[[Workspace], Outcome]] = Registry("check")
CLUSTER_CHECKS: Registry[Callable[[Cluster], Outcome]] = Registry("check")


def examine(workspace: Workspace, settings: Settings) -> list[Finding]:
    """Every finding, of this machine and, for engine `ray`, of the cluster."""
    local = [Finding(name, *_outcome(WORKSPACE_CHECKS.lookup(name), workspace)) for name in WORKSPACE_CHECKS]
    return local + (check_cluster(settings, workspace) if settings.engine == "ray" else [])


def check_cluster(settings: Settings, workspace: Workspace | None = None) -> list[Finding]:
    """Findings about the cluster that `settings` name; without an address, about the local Ray that would be started.

    Takes a few seconds. A Ray that this process is connected to already is used and left connected.

    Args:
        settings: where the run is asked to run.
        workspace: the project folder; the current folder if None.
    """
    workspace = workspace or Workspace(Path.cwd())
    if find_spec("ray") is None:
        return [Finding("ray", "fail", "engine ray is asked for and Ray is not installed", f"{INSTALL}, on every node")]
    if settings.ray_address is None:
        return [Finding("ray", *_local_ray(settings.num_gpus))]
    unreachable = _unreachable(settings.ray_address)
    if unreachable:
        return [Finding("ray", *unreachable)]
    try:
        cluster = gather_reports(workspace, settings)
    except EngineError as error:
        return [Finding("ray", "fail", str(error), _cure_of_ray(settings.ray_address))]
    reached = Finding("ray", "ok", f"{len(cluster.nodes)} nodes at {settings.ray_address}")
    return [reached] + [Finding(name, *CLUSTER_CHECKS.lookup(name)(cluster)) for name in CLUSTER_CHECKS]


def require(findings: Sequence[Finding]) -> None:
    """Raise EngineError if one of the findings stops a run; it holds all of them, with their cures."""
    stops = [f"{finding.check}: {finding.says}. {finding.cure}." for finding in findings if finding.level == "fail"]
    if stops:
        raise EngineError("; ".join(stops) + " `fisherfold doctor` checks again.")


def print_findings(findings: Sequence[Finding]) -> int:
    """Print a table; return the exit status, 1 if something stops a run."""
    from rich.console import Console
    from rich.table import Table

    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "", "what", "cure"):
        table.add_column(heading, overflow="fold")
    for check, level, says, cure in findings:
        table.add_row(check, f"[{styles[level]}]{level}[/]", says, cure)
    Console().print(table)
    return int(any(finding.level == "fail" for finding in findings))


def _outcome(check: Callable[[Workspace], Outcome], workspace: Workspace) -> Outcome:
    try:
        return check(workspace)
    except FisherfoldError as error:
        return Outcome("fail", str(error))
    except OSError as error:
        return Outcome(
            "fail", f"{type(error).__name__}: {error}", "See to it that this process may read and write here"
        )


# This machine and this project


@WORKSPACE_CHECKS.register("parameters")
def check_parameters(workspace: Workspace) -> Outcome:
    """params.yaml is valid, down to the names of methods."""
    try:
        check_methods(load_params(workspace.root / "params.yaml"))
    except ParameterError as error:
        return Outcome("fail", str(error), "Correct params.yaml")
    return Outcome("ok", "params.yaml is valid")


@WORKSPACE_CHECKS.register("dvc")
def check_dvc(workspace: Workspace) -> Outcome:
    """DVC opens the repository and reads dvc.yaml."""
    if not (workspace.root / ".dvc").is_dir():
        return Outcome("fail", f"{workspace.root} is not a DVC repository", "dvc init (with --no-scm outside of git)")
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(workspace.root)) as repo:
            stages = len(repo.index.stages)
    except DvcException as error:
        return Outcome("fail", f"DVC cannot read the pipeline: {error}", "Correct dvc.yaml, or take it from git again")
    return Outcome("ok", f"{stages} stages in dvc.yaml")


@WORKSPACE_CHECKS.register("fastapi")
def check_fastapi(workspace: Workspace) -> Outcome:
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


@WORKSPACE_CHECKS.register("prefect")
def check_prefect(workspace: Workspace) -> Outcome:
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


@WORKSPACE_CHECKS.register("device")
def check_device(workspace: Workspace) -> Outcome:
    """The device that FISHERFOLD_DEVICE asks for is there."""
    import torch

    from stages.models import DEVICE_VARIABLE, chosen_device

    device = chosen_device()
    if device.startswith("cuda") and not torch.cuda.is_available():
        return Outcome("fail", f"{DEVICE_VARIABLE}={device} and torch {torch.__version__} reaches no GPU", GPU_CURE)
    if device == "mps" and not torch.backends.mps.is_available():
        return Outcome("fail", f"{DEVICE_VARIABLE}=mps and torch finds no Metal device", f"Unset {DEVICE_VARIABLE}")
    return Outcome("ok", f"{device}, torch {torch.__version__}")


GPU_CURE = (
    "Look at `nvidia-smi`; install the torch build for your CUDA; or set FISHERFOLD_DEVICE=cpu and ask for no GPU"
)


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
    with _locked_probe(workspace) as probe:
        if probe is None or not is_excluded(probe):
            return Outcome(
                "fail",
                f"the file system of {workspace.artifacts} does not keep locks",
                "Mount it with locks (NFS: version 4, or 3 with a lock daemon; Lustre: -o flock), or put the project elsewhere",
            )
    return Outcome("ok", "flock keeps a second holder out")


@contextmanager
def _locked_probe(workspace: Workspace) -> Iterator[Path | None]:
    """A file in artifacts/ with a text of its own, locked while the block runs; None if it cannot be locked."""
    workspace.artifacts.mkdir(parents=True, exist_ok=True)
    path = workspace.artifacts / f"doctor-{secrets.token_hex(8)}.partial"
    path.write_text(path.stem)
    try:
        with path.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield None
            else:
                yield path
    finally:
        path.unlink(missing_ok=True)


# The cluster


def _local_ray(num_gpus: float) -> Outcome:
    found = _local_gpus() if num_gpus else 0
    if num_gpus > found:
        return Outcome("fail", f"a unit asks for {num_gpus:g} GPUs and this machine has {found}", NO_GPU_CURE)
    return Outcome("ok", f"ray {version('ray')}, started on this machine for the run")


NO_GPU_CURE = "Ask for fewer with FISHERFOLD_NUM_GPUS, or start Ray on a node that has them"


def _local_gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0


def _unreachable(address: str) -> Outcome | None:
    """Why nothing can listen at the address of a head; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return None
    if not (colon and port.isdigit()):
        return Outcome(
            "fail", f"{address!r} is not the address of a Ray cluster", "Give HOST:6379, ray://HOST:10001 or auto"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        return Outcome("fail", f"nothing answers at {address}: {error}", _cure_of_ray(address))
    return None


def _cure_of_ray(address: str) -> str:
    return (
        "Start the head with `ray start --head` and open its ports (docs/cluster.md); the same RAY_AUTH_MODE and token on both sides; "
        "the same Ray and Python"
    )


def gather_reports(workspace: Workspace, settings: Settings) -> Cluster:
    """Ask every living node for its report, each while this process holds the lock of a probe file in artifacts/.

    Raises:
        EngineError: the cluster cannot be joined, or a node does not answer.
    """
    with _locked_probe(workspace) as probe, _connected(settings.ray_address) as ray:
        path = str(probe or workspace.artifacts)
        ask = settings.num_gpus > 0
        head = report_node("this process", path, 0.0, False)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        task = _report_task(ray)
        waiting = {
            task.options(
                scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], False)
            ).remote(
                node["NodeManagerAddress"], path, node["Resources"].get("GPU", 0.0), ask and "GPU" in node["Resources"]
            ): node
            for node in nodes
        }
        done, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=REPORT_SECONDS)
        if late:
            silent = ", ".join(waiting[reference]["NodeManagerAddress"] for reference in late)
            raise EngineError(f"no answer within {REPORT_SECONDS:.0f} s from {silent}")
        try:
            return Cluster(head, ray.get(done), settings.num_gpus)
        except ray.exceptions.RayError as error:
            raise EngineError(f"a node could not report: {error}") from None


def _report_task(ray):
    """The remote form of `report_node`, sent with its source: a node may have another version of it, or none."""
    from flows import node_report

    ray.cloudpickle.register_pickle_by_value(node_report)
    return ray.remote(num_cpus=0, max_retries=1)(node_report.report_node)


@contextmanager
def _connected(address: str):
    """Ray, connected to the cluster; disconnected again if this did it."""
    import ray
    import ray.util.scheduling_strategies

    ours = not ray.is_initialized()
    try:
        if ours:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except Exception as error:  # Ray raises what it likes: ConnectionError, RuntimeError, its own
        raise EngineError(f"Ray at {address} cannot be joined: {error}") from None
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


@CLUSTER_CHECKS.register("versions")
def check_versions(cluster: Cluster) -> Outcome:
    """Every node runs this Python, these packages and this very source: else its bits, or its protocol, may differ."""
    wrong = [f"{node.node}: {text}" for node in cluster.nodes for text in _differences(cluster.head, node)]
    if wrong:
        return Outcome(
            "fail", "; ".join(wrong), "Install the same environment on every node, e.g. from one lock file or image"
        )
    return Outcome("ok", f"Python {cluster.head.python} and the same packages and source on all")


def _differences(head: NodeReport, node: NodeReport) -> list[str]:
    if not node.code:
        return ["fisherfold is not installed"]
    found = [f"Python {node.python}, here {head.python}"] if node.python != head.python else []
    found += [
        f"{name} {node.packages.get(name) or 'missing'}, here {head.packages.get(name) or 'missing'}"
        for name in (*PACKAGES, "fisherfold")
        if node.packages.get(name) != head.packages.get(name)
    ]
    return found + (["fisherfold has other source text than here"] if node.code != head.code else [])


@CLUSTER_CHECKS.register("GPUs")
def check_gpus(cluster: Cluster) -> Outcome:
    """Some node has the GPUs that a unit asks for, and torch reaches them."""
    if not cluster.num_gpus:
        return Outcome("ok", "none asked for")
    useful = [node for node in cluster.nodes if node.gpus >= cluster.num_gpus]
    if not useful:
        most = max((node.gpus for node in cluster.nodes), default=0)
        return Outcome(
            "fail", f"a unit asks for {cluster.num_gpus:g} GPUs and no node has more than {most:g}", NO_GPU_CURE
        )
    blind = [node.node for node in useful if node.cuda is False]
    if blind:
        return Outcome("fail", f"torch reaches no GPU on {', '.join(blind)}", GPU_CURE)
    without = len(cluster.nodes) - len(useful)
    level = "warn" if without else "ok"
    return Outcome(level, f"{len(useful)} nodes have them, {without} do not", "Those stay idle" if without else "")


@CLUSTER_CHECKS.register("shared store")
def check_store(cluster: Cluster) -> Outcome:
    """Every node reads, below artifacts/, the file that the head has just written, and may write beside it."""
    blind = [node.node for node in cluster.nodes if node.probe is None or node.probe != cluster.head.probe]
    if blind:
        return Outcome(
            "fail",
            f"a file written to artifacts/ is not seen on {', '.join(blind)}",
            "Put the project on a file system that all nodes mount at the same path (docs/cluster.md)",
        )
    mute = [node.node for node in cluster.nodes if not node.writes]
    if mute:
        return Outcome(
            "fail", f"artifacts/ is read-only on {', '.join(mute)}", "Give the workers' user the right to write there"
        )
    return Outcome("ok", "all nodes read and write artifacts/")


@CLUSTER_CHECKS.register("shared locks")
def check_shared_locks(cluster: Cluster) -> Outcome:
    """A lock that the head holds keeps the nodes out."""
    loose = [node.node for node in cluster.nodes if node.probe is not None and not node.excluded]
    if loose:
        return Outcome(
            "warn",
            f"a lock held here is not seen on {', '.join(loose)}",
            "Start runs of one project from one node only; mount NFS 4, or Lustre with -o flock",
        )
    return Outcome("ok", "a lock held here keeps the nodes out")


@CLUSTER_CHECKS.register("clocks")
def check_clocks(cluster: Cluster) -> Outcome:
    """The nodes' clocks agree, reports having been made at about the same time."""
    early = min(node.time for node in cluster.nodes) if cluster.nodes else 0.0
    spread = max((node.time for node in cluster.nodes), default=0.0) - early
    if spread > CLOCK_SECONDS:
        return Outcome(
            "warn", f"clocks or answers are up to {spread:.0f} s apart", "Run a time daemon (chrony) on all nodes"
        )
    return Outcome("ok", f"within {max(spread, 0.1):.1f} s")
