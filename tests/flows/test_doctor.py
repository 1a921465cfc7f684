"""What `fisherfold doctor` finds on this machine and in this project."""

import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from project import clone

from fisherfold.run.workspace import Workspace
from flows import doctor
from flows.cluster import node_report
from flows.doctor import MACHINE_CHECKS, WORKSPACE_CHECKS
from flows.findings import print_findings, require
from flows.settings import Settings


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Workspace:
    folder = clone(tmp_path_factory.mktemp("project"))
    (folder / "artifacts").mkdir()
    return Workspace(folder)


def test_a_sound_project_passes_every_check(project, capsys, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("U", (), {"free": doctor.MOST_FREE}))
    findings = doctor.examine(project, Settings(engine="inline", ray_address=None, num_gpus=0))
    assert [finding.level for finding in findings] == ["ok"] * len([*MACHINE_CHECKS, *WORKSPACE_CHECKS]), findings
    require(findings)
    assert print_findings(findings) == 0 and "locks" in capsys.readouterr().out
    assert os.listdir(project.artifacts) == []


def _local(name: str, workspace: Workspace) -> tuple[str, str, str]:
    outcome = MACHINE_CHECKS.lookup(name)() if name in MACHINE_CHECKS else WORKSPACE_CHECKS.lookup(name)(workspace)
    assert outcome.level == "ok" or outcome.cure
    return tuple(outcome)


def test_bad_parameters_and_no_dvc(project, tmp_path):
    (tmp_path / "params.yaml").write_text("subspace: {metric: kfca}\n")
    level, says, _ = _local("parameters", Workspace(tmp_path))
    assert level == "fail" and "'kfac'" in says
    level, says, cure = _local("dvc", Workspace(tmp_path))
    assert level == "fail" and cure.startswith("dvc init")
    shutil.copytree(project.root, tmp_path / "copy")
    (tmp_path / "copy" / "dvc.yaml").write_text("stages: 3\n")
    assert _local("dvc", Workspace(tmp_path / "copy"))[0] == "fail"


@pytest.mark.parametrize(
    ("version", "level"), [("0.150.9", "ok"), ("0.151.0", "warn"), ("0.155.0", "fail"), ("1.0", "fail")]
)
def test_a_fastapi_that_breaks_prefect(project, monkeypatch, version, level):
    monkeypatch.setattr(doctor, "version", lambda name: version)
    assert _local("fastapi", project)[0] == level


def test_locks_that_do_nothing_and_locks_that_are_refused(project, monkeypatch):
    monkeypatch.setattr(node_report.fcntl, "flock", lambda *_: None)
    level, _, cure = _local("locks", project)
    assert level == "fail" and "NFS" in cure

    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(node_report.fcntl, "flock", refuse)
    assert _local("locks", project)[0] == "fail"
    assert os.listdir(project.artifacts) == []


def test_a_device_that_is_not_there_and_a_full_disk(project, monkeypatch):
    import torch

    monkeypatch.setenv("FISHERFOLD_DEVICE", "cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _local("device", project)[0] == "fail"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("U", (), {"free": 10**9}))
    assert _local("disk", project)[:2] == ("warn", "1.0 GB free")


def test_object_storage_is_probed_when_it_is_set(project, storage, monkeypatch):
    level, says, _ = _local("object storage", project)
    assert level == "ok" and "removed a probe" in says and storage.objects() == {}
    storage.break_next("PUT", "403")
    level, says, cure = _local("object storage", project)
    assert level == "fail" and "refused" in says and "rights" in cure
    monkeypatch.setenv("FISHERFOLD_STORE", "s3://no-such-bucket/here")
    assert "Create the bucket" in _local("object storage", project)[1]
    monkeypatch.delenv("FISHERFOLD_STORE")
    storage.requests.clear()
    assert _local("object storage", project)[0] == "ok" and storage.requests == []


class PrefectLike(BaseHTTPRequestHandler):
    def do_GET(self):
        allowed = self.headers.get("Authorization") == "Basic dXNlcjpwYXNz"  # user:pass
        self.send_response(200 if allowed and self.path == "/api/admin/version" else 401)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_prefect_api_that_is_down_or_wants_a_password(project):
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    server = HTTPServer(("127.0.0.1", 0), PrefectLike)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/api"
    with temporary_settings({PREFECT_API_URL: url}):
        level, says, cure = _local("prefect", project)
        assert level == "fail" and "401" in says and "AUTH_STRING" in cure
        with temporary_settings({PREFECT_API_AUTH_STRING: "user:pass"}):
            assert _local("prefect", project)[0] == "ok"
        server.shutdown()
        server.server_close()
        level, says, cure = _local("prefect", project)
        assert level == "fail" and url in says and "prefect server start" in cure
