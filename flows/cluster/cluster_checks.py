"""Checks of a cluster by `fisherfold doctor`, and before each run on engine `ray`: what its nodes say of themselves, compared.

A check is a small function of CLUSTER_CHECKS.
"""

import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

from fisherfold.run.errors import EngineError
from fisherfold.run.objects import store_url
from fisherfold.run.registry import Registry
from fisherfold.run.workspace import Workspace
from flows.cluster.node_report import PACKAGES, NodeReport, locked_probe, report_node
from flows.findings import Finding, Outcome
from flows.settings import Settings

CONNECT_SECONDS = 5.0  # to open a connection to the cluster's head
REPORT_SECONDS = 120.0  # for all nodes to answer; a cold one imports torch
CLOCK_SECONDS = 5.0  # difference between two nodes' clocks that a cache of file times would notice
INSTALL = "pip install 'fisherfold[cluster]'"
RAY_CURE = (
    "Start the head with `ray start --head` and open its ports (docs/cluster.md); the same RAY_AUTH_MODE and token on both sides; "
    "the same Ray and Python"
)
NO_GPU_CURE = "Ask for fewer with FISHERFOLD_NUM_GPUS, or start Ray on a node that has them"
GPU_CURE = (
    "Look at `nvidia-smi`; install the torch build for your CUDA; or set FISHERFOLD_DEVICE=cpu and ask for no GPU"
)


@dataclass(frozen=True)
class Cluster:
    """What a cluster says of itself.

    Attributes:
        head: the report of this process, made before the nodes were asked.
        nodes: theirs.
        answered: when the last of them was here, in seconds since the epoch by this process's clock.
        num_gpus: that a unit asks for.
    """

    head: NodeReport
    nodes: Sequence[NodeReport]
    answered: float
    num_gpus: float


CLUSTER_CHECKS: Registry[Callable[[Cluster], Outcome]] = Registry("check")


def check_cluster(settings: Settings, workspace: Workspace) -> list[Finding]:
    """Findings about the cluster that `settings` name; without an address, about the local Ray that would be started.

    Takes a few seconds. A Ray that this process is connected to already is used and left connected.
    """
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
        return [Finding("ray", "fail", str(error), RAY_CURE)]
    reached = Finding("ray", "ok", f"{len(cluster.nodes)} nodes at {settings.ray_address}")
    return [reached] + [Finding(name, *CLUSTER_CHECKS.lookup(name)(cluster)) for name in CLUSTER_CHECKS]


def _local_ray(num_gpus: float) -> Outcome:
    found = _local_gpus() if num_gpus else 0
    if num_gpus > found:
        return Outcome("fail", f"a unit asks for {num_gpus:g} GPUs and this machine has {found}", NO_GPU_CURE)
    return Outcome("ok", f"ray {version('ray')}, started on this machine for the run")


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
        return Outcome("fail", f"nothing answers at {address}: {error}", RAY_CURE)
    return None


def gather_reports(workspace: Workspace, settings: Settings) -> Cluster:
    """Ask every living node for its report, each while this process holds the lock of a probe file in artifacts/.

    Raises:
        EngineError: the cluster cannot be joined, or a node does not answer.
    """
    with locked_probe(workspace.artifacts) as probe, _connected(settings.ray_address) as ray:
        path = str(probe or workspace.artifacts)
        head = report_node("this process", path, 0.0, False)
        task = _report_task(ray)
        waiting = {
            _ask(ray, task, node, path, settings.num_gpus > 0): node["NodeManagerAddress"]
            for node in ray.nodes()
            if node["Alive"]
        }
        done, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=REPORT_SECONDS)
        if late:
            silent = ", ".join(waiting[reference] for reference in late)
            raise EngineError(f"no answer within {REPORT_SECONDS:.0f} s from {silent}")
        try:
            return Cluster(head, ray.get(done), time.time(), settings.num_gpus)
        except ray.exceptions.RayError as error:
            raise EngineError(f"a node could not report: {error}") from None


def _report_task(ray):
    """The remote form of `report_node`, sent with its source: a node may have another version of it, or none."""
    from flows.cluster import node_report
    from flows.cluster.ray_cluster import environment

    ray.cloudpickle.register_pickle_by_value(node_report)
    return ray.remote(num_cpus=0, max_retries=1, runtime_env=environment())(node_report.report_node)


def _ask(ray, task, node: dict, path: str, about_gpus: bool):
    """Give one node the task of reporting; its future."""
    gpus = node["Resources"].get("GPU", 0.0)
    there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return task.options(scheduling_strategy=there).remote(
        node["NodeManagerAddress"], path, gpus, about_gpus and gpus > 0
    )


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
        raise EngineError(f"Ray at {address} cannot be joined: {' '.join(str(error).split())}") from None
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


@CLUSTER_CHECKS.register("object storage")
def check_node_storage(cluster: Cluster) -> Outcome:
    """Every node writes, reads and removes an object, with credentials and a route of its own."""
    faults = [f"{node.node}: {node.store}" for node in cluster.nodes if node.store]
    if faults:
        return Outcome("fail", "; ".join(faults), "Give every node the credentials and the route (docs/storage.md)")
    return Outcome("ok", "all nodes write, read and remove objects" if store_url() else "not set")


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
    """Every node made its report, by its own clock, after it was asked and before its answer was here."""
    lag = {node.node: max(cluster.head.time - node.time, node.time - cluster.answered) for node in cluster.nodes}
    wrong = [f"{name} by {seconds:.0f} s" for name, seconds in lag.items() if seconds > CLOCK_SECONDS]
    if wrong:
        return Outcome(
            "warn", f"clocks differ from this one: {', '.join(wrong)}", "Run a time daemon (chrony) on all nodes"
        )
    return Outcome("ok", f"within {CLOCK_SECONDS:.0f} s")
