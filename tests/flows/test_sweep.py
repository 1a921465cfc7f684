"""A sweep of two metrics by two ratios, killed in the middle and run again: who ran how often shows what was shared."""

import csv
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from project import QUIET, command
from ruamel.yaml import YAML
from stand_in import clone_with_stand_in

from fisherfold.run.errors import FisherfoldError
from fisherfold.run.params import STAGES
from fisherfold.run.workspace import Workspace
from flows.experiments import Project
from flows.sweep import Cell, StageLocks, cells, draw, row

SWEEP = ("-m", "fisherfold", "sweep", "--ratios", "0.2,0.4", "--metrics", "kfac,gfwsvd")
ONCE_EACH = {"prepare": 1, "capture": 1, "kronecker": 2, "subspace": 2}  # gfwsvd wants another estimator
METRICS = {
    "dense": {"perplexity": 20.0, "knowledge_accuracy": None},
    "compressed": {"perplexity": 25.0, "knowledge_accuracy": None, "kl_to_dense": 0.1},
    "size": {"targeted_parameters_dense": 10, "targeted_parameters_compressed": 8},
}


@pytest.fixture
def project(tmp_path) -> Path:
    (tmp_path / "project").mkdir()
    return clone_with_stand_in(tmp_path / "project")


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_computes_nothing_twice(project, prefect_url, tmp_path):
    before = contents(project)
    ran = tmp_path / "ran"
    environment = {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": prefect_url, "STAND_IN_RAN": str(ran)}
    process = subprocess.Popen(
        [sys.executable, *SWEEP, "--jobs", "2"],
        cwd=project,
        env={**os.environ, **QUIET, **environment},
        stderr=subprocess.DEVNULL,
    )
    while not (ran.exists() and "factorize" in ran.read_text()):
        assert process.poll() is None, "the sweep ended before it could be killed"
        time.sleep(0.05)
    for member in [*(leader := psutil.Process(process.pid)).children(recursive=True), leader]:
        member.kill()
    process.wait()
    killed = Counter(ran.read_text().split())
    result = command(project, sys.executable, *SWEEP, environment=environment)
    assert result.returncode == 0, result.stderr
    found = Counter(ran.read_text().split())
    assert {stage: found[stage] for stage in ONCE_EACH} == ONCE_EACH
    assert all(4 <= found[stage] <= 4 + killed[stage] for stage in STAGES if stage not in ONCE_EACH)
    again = command(project, sys.executable, *SWEEP, environment=environment)
    assert "4 of 4 combinations are finished already" in again.stderr
    assert Counter(ran.read_text().split()) == found
    assert contents(project) == before  # neither files nor outputs of the workspace changed
    assert_results(project)


def assert_results(project: Path) -> None:
    rows = pq.read_table(project / "artifacts/sweep/results.parquet").to_pylist()
    assert [(each["metric"], each["ratio"]) for each in rows] == [
        (metric, ratio) for metric in ("kfac", "gfwsvd") for ratio in (0.2, 0.4)
    ]
    assert len({each["perplexity"] for each in rows}) == 4
    with (project / "artifacts/sweep/results.csv").open() as file:
        assert [float(each["perplexity"]) for each in csv.DictReader(file)] == [each["perplexity"] for each in rows]
    shown = json.loads(command(project, "dvc", "exp", "show", "--json").stdout)
    experiments = {each["name"]: each["revs"][0]["data"] for each in shown[-1]["experiments"]}
    assert set(experiments) == {each["experiment"] for each in rows}
    for each in rows:
        data = experiments[each["experiment"]]
        assert (
            data["metrics"]["artifacts/evaluate/metrics.json"]["data"]["compressed"]["perplexity"] == each["perplexity"]
        )
        assert data["params"]["params.yaml"]["data"]["ranks"]["ratio"] == each["ratio"]


def contents(project: Path) -> dict[str, bytes]:
    """Every file of the workspace but what the sweep may write: its results, and what git and DVC keep for themselves."""
    return {
        path.relative_to(project).as_posix(): path.read_bytes()
        for path in sorted(project.rglob("*"))
        if path.is_file()
        and path.relative_to(project).parts[:1] not in [(".git",), (".dvc",)]
        and "sweep" not in path.parts
    }


def test_combinations_carry_what_their_metric_needs():
    (kfac, gfwsvd) = cells(["kfac", "gfwsvd"], ["fisher"], [0.2], [None])
    assert not [word for word in kfac.overrides() if word.startswith("kronecker")]
    assert "kronecker.estimator=sequence" in gfwsvd.overrides()
    chosen = gfwsvd.overrides(["kronecker.estimator=token"])
    assert chosen.index("kronecker.estimator=token") > chosen.index(
        "kronecker.estimator=sequence"
    )  # the last one holds
    assert {"prepare.seed=3", "capture.seed=3"} <= set(Cell("kfac", "fisher", 0.2, 3).overrides())


def test_a_clone_has_the_workspace_as_it_is_and_its_own_parameters(project):
    (project / "untracked").mkdir()
    (project / "untracked" / "corpus.txt").write_text("text")
    (project / "data" / "README.md").write_text("changed since the commit")
    owner = Project.of(Workspace(project))
    before, digest = contents(project), owner.digest(["ranks.ratio=0.3"])
    clone = owner.clone("name", ["ranks.ratio=0.3"])
    assert YAML(typ="safe").load(clone.root / "params.yaml")["ranks"]["ratio"] == 0.3
    assert (clone.root / "untracked" / "corpus.txt").read_text() == "text"
    assert (clone.root / "data" / "README.md").read_text() == "changed since the commit"
    assert contents(project) == before
    assert owner.digest(["ranks.ratio=0.4"]) != digest
    (project / "stages" / "ranks.py").write_text("# changed")
    assert owner.digest(["ranks.ratio=0.3"]) != digest


def test_a_project_without_a_commit_is_one_clear_error(tmp_path):
    with pytest.raises(FisherfoldError, match="no git commit"):
        Project.of(Workspace(tmp_path))


def test_combinations_that_share_a_stage_share_its_lock(tmp_path):
    locks, folders = StageLocks(), []
    for metric, ratio in (("kfac", 0.2), ("kfac", 0.4), ("svd", 0.2)):
        folder = tmp_path / f"{metric}{ratio}"
        folder.mkdir()
        (folder / "params.yaml").write_text(f"subspace: {{metric: {metric}}}\nranks: {{ratio: {ratio}}}\n")
        folders.append(Workspace(folder))
    first, second, other = ([locks.of(folder, stage) for stage in STAGES] for folder in folders)
    shared = [stage for stage, one, two in zip(STAGES, first, second, strict=True) if one is two]
    assert shared == ["prepare", "capture", "kronecker", "subspace"]
    assert [stage for stage, one, two in zip(STAGES, first, other, strict=True) if one is two] == shared[:3]


def test_the_picture_is_drawn_whatever_is_missing():
    rows = [row(cell, str(cell), METRICS) for cell in cells(["kfac", "svd"], ["fisher"], [0.2], [0, 1])]
    assert draw(rows).startswith(b"\x89PNG")
    assert rows[0]["kept"] == 0.8
