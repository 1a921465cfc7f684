"""The real stages on a tiny model, driven as a user drives them: `fisherfold run`, `dvc repro`, kills and mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from project import QUIET, command
from tiny_project import copy, fisherfold, published

from fisherfold.run.params import STAGES
from fisherfold.run.scratch import lock_stage
from fisherfold.run.workspace import Workspace

OFFLINE = (
    ("unshare", "--net")
    if subprocess.run(["unshare", "--net", "true"], stderr=subprocess.DEVNULL).returncode == 0
    else ()
)


def stages_that(verb: str, text: str) -> list[str]:
    return [stage for stage in STAGES if any(line.startswith(f"{stage}: {verb}") for line in text.splitlines())]


def test_the_stages_compress_and_report(finished):
    metrics = json.loads((finished / "artifacts/evaluate/metrics.json").read_text())
    assert {"dense", "compressed", "by_source", "answers", "size"} <= set(metrics)
    assert metrics["size"]["targeted_parameters_compressed"] <= 0.8 * metrics["size"]["targeted_parameters_dense"]
    assert "<html" in (finished / "artifacts/report/index.html").read_text()


def test_a_second_run_finds_everything_cached(finished, prefect_url):
    before = published(finished)
    result = fisherfold(finished, "run", url=prefect_url)
    assert stages_that("is up to date", result.stderr) == list(STAGES)
    assert published(finished) == before
    assert "up to date" in command(finished, "dvc", "repro").stdout


def test_metrics_and_plots_are_dvc_s(finished):
    shown = json.loads(command(finished, "dvc", "metrics", "show", "--json").stdout)
    assert "perplexity" in json.dumps(shown)
    plots = command(finished, "dvc", "plots", "show")
    assert plots.returncode == 0, plots.stderr


@pytest.mark.slow
def test_a_run_from_its_first_line_to_its_last_gives_the_same_bits(fresh, finished, prefect_home, tmp_path):
    """With a Prefect API of its own."""
    folder = copy(fresh, tmp_path / "project")
    prefect_home(folder / ".prefect")
    result = fisherfold(folder, "run")
    assert result.returncode == 0, result.stderr
    assert published(folder) == published(finished)
    assert not list(folder.glob("artifacts/*.partial"))


@pytest.mark.slow
def test_set_reruns_only_what_it_affects_and_back_restores(finished, prefect_url, tmp_path):
    folder = copy(finished, tmp_path / "project")
    before = published(folder)
    result = fisherfold(folder, "run", "--set", "ranks.ratio=0.4", url=prefect_url)
    assert result.returncode == 0, result.stderr
    assert stages_that("is up to date", result.stderr) == list(STAGES[: STAGES.index("ranks")])
    assert published(folder)["ranks"] != before["ranks"]
    back = fisherfold(folder, "run", "--set", "ranks.ratio=0.2", url=prefect_url)
    assert back.returncode == 0, back.stderr
    assert published(folder) == before


@pytest.mark.slow
def test_dvc_repro_alone_and_offline_gives_the_same_bits(fresh, finished, tmp_path):
    """Without Prefect, without Ray and, where namespaces can be made, without any network: not even loopback is up."""
    folder = copy(fresh, tmp_path / "project")
    result = command(folder, *OFFLINE, "dvc", "repro")
    assert result.returncode == 0, result.stderr
    assert published(folder) == published(finished)


@pytest.mark.slow
def test_ray_gives_the_same_bits_in_every_stage_though_the_run_was_killed(
    fresh, finished, prefect_home, prefect_url, tmp_path
):
    """Its own process alone is killed: nothing that it started lives on, neither Ray nor stage."""
    pytest.importorskip("prefect_ray", reason="needs the extra `cluster`")
    folder = copy(fresh, tmp_path / "project")
    prefect_home(folder / ".prefect")
    on_ray = ("--engine", "ray", "--num-cpus", "1")
    process = started(folder, "capture", *on_ray)
    family = psutil.Process(process.pid).children(recursive=True)
    assert {"raylet", "gcs_server"} <= {member.name() for member in family}
    process.kill()
    process.wait()
    assert not psutil.wait_procs(family, timeout=90)[1]
    result = fisherfold(folder, "run", *on_ray)
    assert result.returncode == 0, result.stderr
    assert stages_that("on Ray: 1 nodes", result.stderr) == list(STAGES[1:])
    assert result.stderr.count("for this run alone") == 2  # one Prefect API and one Ray
    assert published(folder) == published(finished)
    assert stages_that("is up to date", fisherfold(folder, "run", url=prefect_url).stderr) == list(STAGES)


@pytest.mark.slow
def test_a_run_that_is_killed_or_told_to_end_resumes_with_the_same_bits(
    fresh, finished, prefect_home, prefect_url, tmp_path
):
    """In stage after stage, each time as soon as the stage has begun to write."""
    folder = copy(fresh, tmp_path / "project")
    prefect_home(folder / ".prefect")
    assert not psutil.wait_procs(kill(started(folder, "prepare")), timeout=60)[1]  # its Prefect API ends, too
    kill(started(folder, "capture", url=prefect_url))
    told = started(folder, "kronecker")
    family = psutil.Process(told.pid).children(recursive=True)
    told.terminate()  # what Prefect's runner sends when a run is cancelled, to the flow's process alone
    assert told.wait(60) == 130
    assert not [member for member in family if member.is_running()]
    kill(started(folder, "evaluate", url=prefect_url))
    result = fisherfold(folder, "run", url=prefect_url)
    assert result.returncode == 0, result.stderr
    assert published(folder) == published(finished)


def test_a_second_run_in_the_same_folder_is_refused(fresh, tmp_path):
    folder = copy(fresh, tmp_path / "project")
    with lock_stage(Workspace(folder), "prepare"):
        second = fisherfold(folder, "stage", "prepare")
        assert (second.returncode, second.stdout) == (1, "")
        assert second.stderr.startswith("error: Stage 'prepare' is already running")
    assert not (folder / "artifacts" / "prepare").exists()


def started(folder: Path, stage: str, *options: str, url: str = "") -> subprocess.Popen:
    """`fisherfold run` in the background, in a process group of its own, once that stage has begun to write."""
    environment = {**os.environ, **QUIET, "PREFECT_HOME": str(folder / ".prefect"), "PREFECT_API_URL": url}
    words = [sys.executable, "-m", "fisherfold", "run", *options]
    process = subprocess.Popen(words, cwd=folder, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    while not list(folder.glob(f"artifacts/{stage}.partial/*/units/*")):
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.02)
    return process


def kill(process: subprocess.Popen) -> list[psutil.Process]:
    """Kill a run and its children in one blow; what that leaves to end by itself."""
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return family


def test_status_tells_state_and_reason(finished, tmp_path):
    folder = copy(finished, tmp_path / "project")
    fisherfold_set = (folder / "params.yaml").read_text().replace("ratio: 0.2", "ratio: 0.3")
    (folder / "params.yaml").write_text(fisherfold_set)
    rows = {line.split()[0]: line for line in fisherfold(folder, "status").stdout.splitlines() if line.strip()}
    assert "up to date" in rows["capture"]
    assert "stale" in rows["ranks"]
    assert "params.yaml" in rows["ranks"]


def test_corrupt_shard_stops_the_next_stage_with_one_clear_error(finished, tmp_path):
    folder = copy(finished, tmp_path / "project")
    shard = min((folder / "artifacts/capture/gradients").iterdir())
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 3] ^= 1
    shard.unlink()
    shard.write_bytes(damaged)
    result = fisherfold(folder, "stage", "kronecker")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "checksum" in result.stderr
    assert "Traceback" not in result.stderr


def test_wrong_parameter_and_wrong_folder(finished, tmp_path):
    result = fisherfold(finished, "run", "--set", "ranks.ratoi=0.4")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "did you mean 'ratio'?" in result.stderr
    assert "not inside a Fisherfold project" in fisherfold(tmp_path, "run").stderr


def test_unknown_method_is_named_before_anything_runs(finished, tmp_path):
    folder = copy(finished, tmp_path / "project")
    result = fisherfold(folder, "run", "--set", "subspace.metric=kfca")
    assert result.returncode == 2
    assert "Did you mean 'kfac'?" in result.stderr
    assert "kfca" not in (folder / "params.yaml").read_text()
