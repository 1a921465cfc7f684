"""A real Ray of two hosts with addresses of their own, what can happen to them in mid-capture, and hosts that do not fit."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from uuid import uuid4

import pytest
from hosts import Host, make_bridge, reason_for_none, remove_bridge, wait_until
from project import QUIET, ROOT, clone
from ruamel.yaml import YAML
from tiny import tiny_workspace

from fisherfold.run.files import read_manifest
from fisherfold.run.workspace import Workspace

pytest.importorskip("prefect_ray", reason="needs the extra `cluster`")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why := reason_for_none()), reason=str(why))]
PYTHON = sys.executable
SHARDS = 24
ATTEMPTS = 5
TOKEN = uuid4().hex


@dataclass
class TwoHosts:
    """Ray on both hosts, one core each; the head's also has the Prefect API."""

    head: Host
    other: Host
    folder: Path
    sockets: Path  # short, for the length of a socket's path is bounded

    @property
    def environment(self) -> dict[str, str]:
        return {
            **QUIET,
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": str(self.folder / ".prefect"),
            "PREFECT_API_URL": f"http://{self.head.address}:4200/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self.sockets),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "FISHERFOLD_ENGINE": "ray",
            "FISHERFOLD_RAY_ADDRESS": f"{self.head.address}:6379",
            "FISHERFOLD_NUM_CPUS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def launch(
        self, host: Host, *words: str, folder: Path | None = None, log: str, **environment: str
    ) -> subprocess.Popen:
        path = self.folder / log
        return host.start(*words, folder=folder or self.folder, environment=self.environment | environment, log=path)

    def start_ray(self, host: Host, *where: str, before: tuple[str, ...] = (), **environment: str) -> None:
        """Start Ray on a host; again, if that did not end within the 30 s that Ray gives itself (a busy machine)."""
        sizes = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
        words = ["-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={host.address}"]
        for attempt in range(ATTEMPTS):
            log = f"{host.name}-{attempt}.log"
            process = self.launch(host, *before, PYTHON, *words, *where, *sizes, log=log, **environment)
            while process.poll() is None:
                if "will now block" in (self.folder / log).read_text():
                    return
                time.sleep(0.2)
        raise AssertionError((self.folder / log).read_text()[-3000:])

    def join(self, host: Host, before: tuple[str, ...] = (), **environment: str) -> None:
        """Start Ray on another host, which has joined when that is done."""
        self.start_ray(host, f"--address={self.head.address}:6379", before=before, **environment)

    def answers(self) -> bool:
        word = f"import httpx; httpx.get('{self.environment['PREFECT_API_URL']}/health').raise_for_status()"
        return self.launch(self.head, PYTHON, "-c", word, log="health.log").wait() == 0


@pytest.fixture(scope="module")
def hosts(prefect_home, tmp_path_factory):
    make_bridge()
    two = TwoHosts(Host(1), Host(2), tmp_path_factory.mktemp("hosts"), Path(mkdtemp(prefix="ff")))
    prefect_home(two.folder / ".prefect")
    try:
        server = ["-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--log-level", "error"]
        two.launch(two.head, PYTHON, *server, "--host", two.head.address, "--port", "4200", log="api.log")
        ports = ["--port=6379", "--include-dashboard=false"]
        two.start_ray(two.head, "--head", *ports)
        wait_until(two.answers, "the Prefect API")
        two.join(two.other)
        yield two
    finally:
        for host in (two.head, two.other):
            host.remove()
        remove_bridge()
        shutil.rmtree(two.sockets)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A project as stage `prepare` leaves it, with one sequence a shard."""
    folder = clone(tmp_path_factory.mktemp("prepared"))
    tiny_workspace(folder, sequences=SHARDS, length=48)
    yaml = YAML()
    document = yaml.load(folder / "params.yaml")
    document["capture"].update(
        {"sequences_per_shard": 1, "leaves": SHARDS, "batch_size": 1, "gradients": "sketch", "sketch_rank": 4}
    )
    yaml.dump(document, folder / "params.yaml")
    return folder


@pytest.fixture(scope="module")
def expected(prepared, tmp_path_factory) -> dict:
    """What `capture` publishes when this process alone does it all."""
    folder = copy(prepared, tmp_path_factory.mktemp("inline"))
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}
    subprocess.run([PYTHON, "-m", "fisherfold", "stage", "capture"], cwd=folder, env=environment, check=True)
    return published(folder)


@pytest.fixture
def project(prepared, tmp_path) -> Path:
    return copy(prepared, tmp_path)


def copy(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "project"))


def published(folder: Path) -> dict:
    return read_manifest(Workspace(folder).out("capture"))["files"]


def start(hosts: TwoHosts, folder: Path) -> subprocess.Popen:
    """`fisherfold stage capture` on the head; returns in mid-capture."""
    done = finished(folder)
    process = hosts.launch(hosts.head, PYTHON, "-m", "fisherfold", "stage", "capture", folder=folder, log="capture.log")
    wait_until(lambda: process.poll() is not None or finished(folder) >= done + 4, "the first units")
    assert process.poll() is None, (hosts.folder / "capture.log").read_text()[-3000:]
    return process


def finished(folder: Path) -> int:
    """How many units are listed."""
    listed = list(folder.glob("artifacts/capture.partial/*/manifest.jsonl"))
    return len(listed[0].read_text().splitlines()) if listed else 0


def ends_well(hosts: TwoHosts, process: subprocess.Popen) -> None:
    assert process.wait(300) == 0, (hosts.folder / "capture.log").read_text()[-3000:]


def test_the_network_is_cut_for_ten_seconds(hosts, project, expected):
    process = start(hosts, project)
    hosts.other.connect(False)
    time.sleep(10)
    hosts.other.connect(True)
    ends_well(hosts, process)
    assert published(project) == expected


def test_the_head_s_process_is_killed_then_cancelled_then_resumes(hosts, project, expected):
    killed = start(hosts, project)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    listed = finished(project)
    cancelled = start(hosts, project)
    os.killpg(cancelled.pid, signal.SIGINT)
    assert cancelled.wait(120) == 130
    wait_until(lambda: not any(host.processes("ray::run_unit") for host in (hosts.head, hosts.other)), "idle workers")
    assert finished(project) > listed
    ends_well(hosts, start(hosts, project))
    log = (hosts.folder / "capture.log").read_text()
    assert log.count("units are finished already") == 2
    assert published(project) == expected


def test_a_killed_host_costs_only_what_it_held(hosts, project, expected):
    process = start(hosts, project)
    for raylet in hosts.other.processes("raylet"):
        raylet.send_signal(signal.SIGKILL)
    ends_well(hosts, process)
    assert published(project) == expected


@pytest.fixture(scope="module")
def misfits(hosts, prepared, tmp_path_factory) -> Iterator[Path]:
    """A project, and two more hosts: the third has another version of this package, the fourth an empty folder for the project."""
    folder = copy(prepared, tmp_path_factory.mktemp("misfits"))
    third, fourth = Host(3), Host(4)
    try:
        hosts.join(third, PYTHONPATH=str(another_version(tmp_path_factory.mktemp("another"))))
        hosts.join(
            fourth, before=("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {folder} && exec "$@"', "sh")
        )
        yield folder
    finally:
        third.remove()
        fourth.remove()


def another_version(folder: Path) -> Path:
    """What `pip install --target` leaves of another version of this package; its source is nobody's concern, since workers take the project's."""
    metadata = folder / "fisherfold-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: fisherfold\nVersion: 9.9.9\n")
    return folder


def said(hosts: TwoHosts, folder: Path, *words: str) -> tuple[int, str]:
    """Exit status and output of `fisherfold` on the head."""
    log = f"{uuid4().hex}.log"
    process = hosts.launch(hosts.head, PYTHON, "-m", "fisherfold", *words, folder=folder, log=log, COLUMNS="1000")
    return process.wait(), (hosts.folder / log).read_text()


def test_hosts_that_do_not_fit_are_named_with_the_cure_before_anything_runs(hosts, misfits):
    before = sorted(misfits.glob("artifacts/**/*"))
    status, text = said(hosts, misfits, "doctor", "--num-gpus", "1")
    found = {
        name: line
        for line in text.splitlines()
        for name in ("versions", "shared store", "GPUs")
        if line.startswith(name)
    }
    assert status == 1 and all(" fail " in line for line in found.values()), text
    for name, expected in {
        "versions": (
            "10.77.0.3: fisherfold 9.9.9, here ",
            "Install the same environment",
        ),
        "shared store": ("is not seen on 10.77.0.4", "all nodes mount at the same path"),
        "GPUs": ("asks for 1 GPUs and no node has more than 0", "FISHERFOLD_NUM_GPUS"),
    }.items():
        assert all(words in found[name] for words in expected), found[name]
    assert "10.77.0.4" not in found["versions"] and "10.77.0.3" not in found["shared store"]
    status, text = said(hosts, misfits, "run", "--num-gpus", "1")
    assert status == 1 and text.count("error: ") == 1 and text.count("\n") == 2, text
    assert all(f"{name}: " in text for name in found)
    assert sorted(misfits.glob("artifacts/**/*")) == before


def test_a_cluster_that_cannot_be_reached_is_named_with_the_cure(hosts, project):
    for words in (("doctor",), ("run",)):
        status, text = said(hosts, project, *words, "--address", "10.77.0.9:6379")
        assert status == 1 and "nothing answers at 10.77.0.9:6379" in text and "ray start --head" in text
