"""Machines that public bug reports tell of: proxies, users without a name or a home, temporary folders with long paths, no git."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from project import ROOT, clone, command

from fisherfold.run.workspace import Workspace
from flows import surroundings
from flows.cluster.unit_channel import taking_units
from flows.staleness import stale_reasons, tool_environment

DEAD = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "ALL_PROXY": "socks5://127.0.0.1:9"}
NOBODY = 54321
ASK = """
import sys, flows
from prefect.client.orchestration import get_client
from flows.api import _answers
assert _answers(sys.argv[1])
with get_client(sync_client=True) as client:
    error = client.api_healthcheck()
print(error)
"""
SHOW_USER = "import flows, getpass, json, pathlib; print(json.dumps([getpass.getuser(), str(pathlib.Path.home())]))"


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def own_server():
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()


def test_proxies_are_not_asked_for_this_machines_own_server(own_server):
    environment = {**DEAD, "PREFECT_API_URL": own_server, "NO_PROXY": "", "no_proxy": ""}
    result = command(ROOT, sys.executable, "-c", ASK, own_server, environment=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "None"


def test_what_is_exempted_from_the_proxies_stays_so_and_no_proxy_needs_no_exemption():
    environment = {"https_proxy": "http://proxy:3128", "NO_PROXY": "intern.example, 127.0.0.1"}
    surroundings.reach_directly(environment, *surroundings.LOOPBACK)
    assert environment["NO_PROXY"] == environment["no_proxy"] == "intern.example,127.0.0.1,localhost,::1"
    without: dict[str, str] = {}
    surroundings.reach_directly(without, *surroundings.LOOPBACK)
    assert without == {}


def test_a_user_whom_the_machine_does_not_know_gets_a_name_and_a_home(monkeypatch, tmp_path):
    monkeypatch.setattr(surroundings.pwd, "getpwuid", lambda user: {}[user])
    monkeypatch.setattr(surroundings.tempfile, "tempdir", str(tmp_path))
    environment = {"HOME": "/"} if not os.access("/", os.W_OK) else {"HOME": "/nowhere"}
    surroundings.name_user(environment)
    assert environment["USER"] == environment["LOGNAME"] == f"user{os.getuid()}"
    home = Path(environment["HOME"])
    assert home.parent == tmp_path and home.stat().st_mode & 0o077 == 0
    again = {"USER": "me", "HOME": str(tmp_path)}
    surroundings.name_user(again)
    assert (again["USER"], again["HOME"]) == ("me", str(tmp_path))


def test_a_home_that_somebody_else_has_made_is_not_trusted(monkeypatch, tmp_path):
    monkeypatch.setattr(surroundings.tempfile, "tempdir", str(tmp_path))
    environment = {"HOME": "/nowhere"}
    taken = tmp_path / f"fisherfold-home-{os.getuid()}"
    taken.symlink_to(tmp_path)
    surroundings.name_user(environment)
    assert Path(environment["HOME"]) != taken and not Path(environment["HOME"]).is_symlink()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_commands_work_for_a_user_id_without_an_entry(tmp_path):
    tmp_path.chmod(0o777)
    environment = {"TMPDIR": "/tmp", "PYTHONPATH": str(ROOT)}
    reads = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # where this Python is root's alone
    other = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", *reads]
    words = [*other, "env", "-u", "HOME", "-u", "USER", "-u", "LOGNAME"]
    if command(ROOT, *words, sys.executable, "-c", "import fisherfold", environment=environment).returncode:
        pytest.skip("another user cannot read this Python")
    result = command(ROOT, *words, sys.executable, "-c", SHOW_USER, environment=environment)
    assert result.returncode == 0, result.stderr
    name, home = json.loads(result.stdout)
    assert name == f"user{NOBODY}"
    shutil.rmtree(home)


def test_a_folder_whose_name_is_no_text_in_the_locale_s_encoding_is_refused_in_a_line(tmp_path):
    """DVC hashes the names of folders as UTF-8."""
    folder = clone(tmp_path / "größe")
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = command(folder, sys.executable, "-m", "fisherfold", "status", environment=environment, errors="replace")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr and "LC_ALL=C.UTF-8" in result.stderr.splitlines()[-1]


def test_a_folder_s_name_may_have_a_new_line(tmp_path):
    folder = clone(tmp_path / "a b\nc")
    assert set(stale_reasons(Workspace(folder), "prepare")) == {"prepare"}


def test_stages_run_for_the_account_of_a_service_whose_shell_runs_nothing(monkeypatch):
    monkeypatch.setenv("SHELL", "/sbin/nologin")
    monkeypatch.setenv("PATH", "/nowhere")
    assert subprocess.run(["/bin/sh", "-c", "exec $SHELL -c true"], env=tool_environment()).returncode == 0
    assert Path(shutil.which("dvc", path=tool_environment()["PATH"])).parent == Path(sys.executable).parent


def test_a_socket_fits_below_a_temporary_folder_with_a_long_path(monkeypatch, tmp_path):
    long = tmp_path / ("long" * 30)
    long.mkdir()
    monkeypatch.setattr(surroundings.tempfile, "tempdir", str(long))
    monkeypatch.setenv("TMPDIR", str(long))
    with taking_units(lambda *_: None) as address:
        assert Path(address).is_socket()
    assert not Path(address).parent.exists()
    folder = surroundings.ray_folder()
    assert folder and surroundings.fits(folder, surroundings.RAYS)
    monkeypatch.setenv("RAY_TMPDIR", "/r")
    assert surroundings.ray_folder() is None


def test_a_project_that_was_downloaded_without_git_is_done_without(tmp_path, capfd):
    folder = clone(tmp_path / "project")
    shutil.rmtree(folder / ".git")
    assert "prepare" in stale_reasons(Workspace(folder))
    assert "git init" in capfd.readouterr().err
    assert command(folder, "dvc", "status").returncode == 0
