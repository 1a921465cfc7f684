"""Engine `ray` on a real local Ray of two workers, with a real temporary Prefect API."""

import os
import time
from pathlib import Path

import psutil
import pytest
from project import ROOT
from pydantic import BaseModel

pytest.importorskip("prefect_ray", reason="needs the extra `cluster`")

import ray_units
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from fisherfold.run.errors import EngineError, NumericalError
from fisherfold.run.scratch import Scratch
from fisherfold.run.workspace import Workspace
from flows import api
from flows.cluster import ray_engine
from flows.engine_choice import run_on_engine
from flows.settings import Settings

pytestmark = pytest.mark.slow


class NoParams(BaseModel):
    pass


@pytest.fixture(scope="module")
def prefect(prefect_home, tmp_path_factory):
    """A Prefect API for the runs of this module; how many servers run besides."""
    others = servers()
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests" / "support"), str(ROOT)]))
    patch.setenv("PREFECT_HOME", str(prefect_home(tmp_path_factory.mktemp("prefect") / "home")))
    with api.prefect_api("127.0.0.1"):
        yield others
    patch.undo()


def run(folder: Path, *calls: tuple) -> dict[str, Path]:
    """Maps of one stage, (work, units) each, with two units at a time."""
    folders = {}

    def stage() -> None:
        with Scratch(Workspace(folder), "report", NoParams(), {}) as scratch:
            for work, units in calls:
                folders.update(scratch.map("units", work, units))

    run_on_engine("report", stage, Settings(engine="ray", num_cpus=1), None)
    return folders


@pytest.fixture
def marks(tmp_path) -> Path:
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


def test_workers_are_kept_speak_to_one_api_and_lost_ones_are_replaced(prefect, tmp_path, marks, monkeypatch):
    monkeypatch.setattr(ray_engine, "PAUSES", (0.1,))
    units = {f"unit-{i}": (marks,) for i in range(8)}
    folders = run(tmp_path, (ray_units.describe_worker, units), (ray_units.die_at_first, {"dies": (marks,)}))
    workers, apis = zip(*((folders[name] / "worker").read_text().split() for name in units))
    assert 1 <= len(set(workers)) <= 2 and len(list(marks.glob("loaded-*"))) == len(set(workers))
    assert set(apis) == {PREFECT_API_URL.value()}
    assert servers() - prefect == 1
    assert (folders["dies"] / "attempts").read_text() == "2"
    assert ended({"dies", *units})


def ended(names: set[str], seconds: float = 20.0) -> bool:
    """Whether Prefect knows each of these as completed once, and none as running; news of workers that live on come late."""
    until = time.monotonic() + seconds
    with get_client(sync_client=True) as client:
        while time.monotonic() < until:
            states = [(task.name, task.state_type.value) for task in client.read_task_runs() if task.name in names]
            completed = sorted(name for name, state in states if state == "COMPLETED")
            if completed == sorted(names) and not any(state == "RUNNING" for _, state in states):
                return True
            time.sleep(0.5)
    return False


def test_a_unit_s_own_fault_is_not_tried_again(prefect, tmp_path, marks):
    with pytest.raises(NumericalError, match="data is bad"):
        run(tmp_path, (ray_units.fail, {"bad": (marks,)}))
    assert len(list(marks.glob("failed-*"))) == 1


def test_more_than_the_cluster_offers_is_named(prefect, tmp_path):
    with pytest.raises(EngineError, match=r"no node of the Ray cluster offers .*GPUs"):
        run_on_engine("report", lambda: None, Settings(engine="ray", num_gpus=1), None)


def test_a_cluster_that_is_not_there_is_named(prefect):
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9 cannot be used"):
        run_on_engine("report", lambda: None, Settings(engine="ray", ray_address="127.0.0.1:9"), None)


def servers() -> int:
    """Prefect servers that this process and its children run."""
    family = psutil.Process().children(recursive=True)
    return sum("prefect.server.api.server:create_app" in " ".join(member.cmdline()) for member in family)
