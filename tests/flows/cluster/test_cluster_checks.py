"""What `fisherfold doctor` finds about a cluster: checks on made-up reports, and on a real Ray of two nodes.

Real nodes that do not fit are in test_two_hosts.py.
"""

import os
import socket
import sys
from contextlib import closing
from dataclasses import replace

import pytest
from project import clone

from fisherfold.run.errors import EngineError
from fisherfold.run.workspace import Workspace
from flows.cluster import cluster_checks, node_report
from flows.cluster.cluster_checks import CLOCK_SECONDS, CLUSTER_CHECKS, Cluster, check_cluster
from flows.cluster.node_report import NodeReport, code_digest, locked_probe, report_node
from flows.findings import require
from flows.settings import Settings

HEAD = NodeReport(
    "head", "3.11.7", {"torch": "2.13.0", "fisherfold": "0.1.0"}, "abc", 100.0, probe="x", writes=True, excluded=True
)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Workspace:
    folder = clone(tmp_path_factory.mktemp("project"))
    (folder / "artifacts").mkdir()
    return Workspace(folder)


def found(name: str, *nodes: NodeReport, num_gpus: float = 0) -> tuple[str, str, str]:
    return tuple(CLUSTER_CHECKS.lookup(name)(Cluster(HEAD, nodes, HEAD.time + 1, num_gpus)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"python": "3.12.1"}, "worker: Python 3.12.1, here 3.11.7"),
        ({"packages": {**HEAD.packages, "torch": "2.12.0"}}, "torch 2.12.0, here 2.13.0"),
        ({"packages": {**HEAD.packages, "torch": ""}}, "torch missing, here 2.13.0"),
        ({"packages": {**HEAD.packages, "fisherfold": "0.2.0"}}, "fisherfold 0.2.0, here 0.1.0"),
        ({"code": "def"}, "fisherfold has other source text"),
        ({"code": ""}, "fisherfold is not installed"),
    ],
)
def test_a_node_with_another_version_is_named(change, says):
    level, text, cure = found("versions", HEAD, replace(HEAD, node="worker", **change))
    assert level == "fail" and says in text and "same environment" in cure
    assert found("versions", HEAD, replace(HEAD, node="worker"))[0] == "ok"


@pytest.mark.parametrize(
    ("asked", "nodes", "level", "says"),
    [
        (0, [(0, None)], "ok", "none asked for"),
        (1, [(0, None)], "fail", "no node has more than 0"),
        (2, [(1, True), (1, True)], "fail", "no node has more than 1"),
        (1, [(4, True), (4, False)], "fail", "torch reaches no GPU on node-1"),
        (1, [(4, True), (0, None)], "warn", "1 nodes have them, 1 do not"),
        (0.5, [(1, True), (4, True)], "ok", "2 nodes have them"),
    ],
)
def test_gpus_that_are_not_there(asked, nodes, level, says):
    reports = [replace(HEAD, node=f"node-{i}", gpus=gpus, cuda=cuda) for i, (gpus, cuda) in enumerate(nodes)]
    outcome = found("GPUs", *reports, num_gpus=asked)
    assert outcome[0] == level and says in outcome[1]


@pytest.mark.parametrize(
    ("check", "change", "level", "says"),
    [
        ("shared store", {"probe": None}, "fail", "is not seen on worker"),
        ("shared store", {"probe": "y"}, "fail", "is not seen on worker"),
        ("shared store", {"writes": False}, "fail", "read-only on worker"),
        ("object storage", {"store": "StoreError: no route"}, "fail", "worker: StoreError: no route"),
        ("shared locks", {"excluded": False}, "warn", "not seen on worker"),
        ("shared locks", {"excluded": None}, "warn", "not seen on worker"),
        ("clocks", {"time": HEAD.time + CLOCK_SECONDS + 8}, "warn", "worker by 12 s"),
        ("clocks", {"time": HEAD.time - CLOCK_SECONDS - 7}, "warn", "worker by 12 s"),
    ],
)
def test_a_node_that_shares_no_store_no_locks_or_no_time(check, change, level, says):
    outcome = found(check, HEAD, replace(HEAD, node="worker", **change))
    assert outcome[0] == level and says in outcome[1] and outcome[2]
    assert found(check, HEAD, HEAD)[0] == "ok"


def test_a_node_reports_what_it_sees(tmp_path):
    with locked_probe(tmp_path) as probe:
        report = report_node("here", str(probe), 2.0, False)
    assert (report.probe, report.writes, report.excluded, report.gpus) == (probe.stem, True, True, 2.0)
    assert os.listdir(tmp_path) == []
    probe.write_text("")
    assert node_report.is_excluded(probe) is False
    probe.unlink()
    missing = report_node("here", str(probe), 0, False)
    assert (missing.probe, missing.writes, missing.excluded) == (None, False, None)
    assert report.python == ".".join(map(str, sys.version_info[:3])) and report.packages["torch"]


def test_a_node_says_what_keeps_it_from_the_object_storage(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHERFOLD_STORE", "s3://bucket/prefix")
    monkeypatch.setattr("flows.storage.file_system", lambda url: (_ for _ in ()).throw(OSError("no route")))
    assert report_node("here", str(tmp_path / "none"), 0, False).store == "OSError: no route"
    monkeypatch.delenv("FISHERFOLD_STORE")
    assert report_node("here", str(tmp_path / "none"), 0, False).store == ""


def test_the_digest_of_the_source_changes_with_it(tmp_path, monkeypatch):
    here = code_digest()
    for package in ("fisherfold", "stages", "flows"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "x.py").write_text("")
    monkeypatch.setattr(node_report, "find_spec", lambda name: None)
    assert code_digest() == ""
    monkeypatch.setattr(
        node_report, "find_spec", lambda name: type("S", (), {"submodule_search_locations": [tmp_path / name]})
    )
    first = code_digest()
    (tmp_path / "flows" / "x.py").write_text("1")
    assert len({here, first, code_digest()}) == 3


def _free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_cluster_that_cannot_be(project, monkeypatch):
    for address, says in [(f"127.0.0.1:{_free_port()}", "nothing answers"), ("nowhere", "not the address")]:
        (finding,) = check_cluster(Settings(engine="ray", ray_address=address, num_gpus=0), project)
        assert finding.level == "fail" and says in finding.says and finding.cure
        with pytest.raises(EngineError, match="doctor"):
            require([finding])
    monkeypatch.setattr(cluster_checks, "_local_gpus", lambda: 0)
    (finding,) = check_cluster(Settings(engine="ray", ray_address=None, num_gpus=1), project)
    assert finding.level == "fail" and "this machine has 0" in finding.says
    monkeypatch.setattr(cluster_checks, "find_spec", lambda name: None)
    (finding,) = check_cluster(Settings(engine="ray", ray_address=None, num_gpus=0), project)
    assert finding.level == "fail" and "fisherfold[cluster]" in finding.cure


@pytest.fixture(scope="module")
def two_nodes():
    """The address of a real Ray of two nodes on this host, without GPUs."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1, num_gpus=0)
    yield cluster.address
    cluster.shutdown()


@pytest.mark.slow
def test_two_nodes_of_a_real_cluster_pass_every_check(project, two_nodes):
    findings = check_cluster(Settings(engine="ray", ray_address=two_nodes), project)
    assert {finding.check: finding.level for finding in findings} == dict.fromkeys(["ray", *CLUSTER_CHECKS], "ok")
    assert "2 nodes" in findings[0].says
