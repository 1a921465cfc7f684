"""What `fisherfold run` says: how far it is, what was computed, restored or failed, once each; and how little with -q."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from project import command
from stand_in import clone_with_stand_in

from fisherfold.run.workspace import Workspace
from flows import cli, time_left
from flows.stage_run import _failure, is_told
from flows.status import seconds_left
from flows.time_left import TimeLeft, in_words


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return clone_with_stand_in(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def tell(project, prefect_url):
    """Run as far as stage capture; exit status, standard output and lines of standard error."""

    def run(*words: str, **variables: str) -> tuple[int, str, list[str]]:
        environment = {"PREFECT_API_URL": prefect_url, "HF_HUB_OFFLINE": "1", **variables}
        words = (sys.executable, "-m", "fisherfold", "run", "--until", "capture", *words)
        result = command(project, *words, environment=environment)
        return result.returncode, result.stdout, result.stderr.splitlines()

    return run


def test_a_run_is_told_from_its_first_line_to_its_outcome(project, tell):
    """One after the other: a failure, then the rest with another parameter."""
    status, out, lines = tell(STAND_IN_FAIL="capture")
    assert (status, out) == (1, "")
    assert lines[0] == f"fisherfold: looks at what is to do in {project} (preset balanced)"
    assert "prepare: stage 1 of 2 (never run)" in lines
    assert [line for line in lines if "fails" in line] == ["error: capture fails, as asked"] == lines[-1:]

    status, out, lines = tell("--set", "capture.seed=1")
    assert "fisherfold: params.yaml: capture.seed: 0 → 1" in lines
    assert lines[-1] == "fisherfold: 2 stages are up to date: 1 computed"


@pytest.mark.slow
def test_what_a_quiet_run_keeps_to_itself_and_what_was_restored_is_told(project, tell):
    """One after the other: quietly, with another parameter, with the first one again, and a failure that is told quietly."""
    status, out, lines = tell("--quiet", "--set", "capture.seed=0")
    assert (status, lines) == (0, []) and "took" in out

    status, out, lines = tell("--set", "capture.seed=3")
    assert any(line.startswith("capture: stage 2 of 2, about ") for line in lines)  # it took some time before

    status, out, lines = tell("--set", "capture.seed=0")
    assert "capture: restored from the cache, nothing was computed" in lines
    assert lines[-1] == "fisherfold: 2 stages are up to date: 1 restored from the cache"

    status, out, lines = tell("-q", "--set", "capture.seed=2", STAND_IN_FAIL="capture")
    assert (status, out, lines) == (1, "", ["error: stage 'capture' failed: capture fails, as asked"])


def test_what_would_run_and_why_is_told_and_nothing_is_changed(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FISHERFOLD_VERBOSE", "1")  # this process's warnings stay as they are
    before = (project / "params.yaml").read_text()
    assert cli.main(["run", "--dry", "--until", "kronecker", "--set", "prepare.seed=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(maxsplit=2) for line in lines if line.startswith(("prepare", "capture", "kronecker"))]
    assert [row[:2] for row in rows] == [["prepare", "runs"], ["capture", "runs"], ["kronecker", "runs"]]
    assert "--set prepare.seed: 0 → 7" in rows[0][2] and "never run" in rows[2][2]
    assert (project / "params.yaml").read_text() == before
    assert cli.main(["status", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["seconds_left"] is None  # stages that have never run are not timed
    assert {each["stage"]: each["state"] for each in shown["stages"]}["prepare"] == "up to date"


def test_time_left_is_what_stages_took_before(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text("prepare: {model: mine}\n")
    workspace = Workspace(tmp_path)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(time_left.time, "monotonic", lambda: next(clock))
    with TimeLeft(workspace, ["prepare", "capture"]) as left:
        assert left.text() == ""
        for stage in ("prepare", "capture"):
            left.begin()
            left.end(stage, computed=True)
    again = TimeLeft(workspace, ["prepare", "capture"])
    assert again.text() == ", about 20 s left in all"
    assert TimeLeft(workspace, ["prepare", "ranks"]).seconds() is None  # nobody has seen stage ranks
    states = [{"state": "up to date", "stage": "prepare"}, {"state": "stale", "stage": "capture"}]
    monkeypatch.setattr("flows.status.STAGES", ("prepare", "capture"))
    assert seconds_left(workspace, states) == 10 and seconds_left(workspace, states[:1]) == 0
    (tmp_path / "params.yaml").write_text("prepare: {model: other}\n")
    assert TimeLeft(workspace, ["capture"]).seconds() is None


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "1 s"), (90, "90 s"), (540, "9 min"), (10800, "3.0 h")])
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words


def test_only_what_a_stage_said_itself_is_not_said_again(monkeypatch):
    own, other = "stage 'ranks' failed: no such ratio", "Task run encountered an exception KeyError: 'done'"
    assert is_told(own) and not is_told(other) and not is_told("stage 'ranks' failed and did not say why")
    monkeypatch.setattr("flows.stage_run.is_quiet", lambda: True)
    assert not is_told(own)


@pytest.mark.parametrize(
    ("error", "last", "said"),
    [
        ("no such ratio", ["error: no such ratio"], "failed: no such ratio"),
        ("", ["ranks: FermiGrad step 1 of 40", "Killed"], "was killed by the system (signal 9), most likely for want of memory"),
        ("", ["ranks: FermiGrad step 1 of 40"], "failed and did not say why"),
    ],
)
def test_a_failure_in_words(error, last, said):
    assert said in _failure("ranks", SimpleNamespace(error=error, last=last))


def test_what_tells_the_time_left_goes_wherever_units_run(project):
    with TimeLeft(Workspace(project), ["prepare"]) as left:
        left._planning = subprocess.Popen([sys.executable, "-c", ""])
        assert pickle.loads(pickle.dumps(left)).__dict__ == left.__dict__ | {"_planning": None}
