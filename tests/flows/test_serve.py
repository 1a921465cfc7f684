"""`fisherfold serve` on a real Prefect server of its own, whose runs are asked for through the API."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling
from prefect_server import free_port
from project import QUIET, command
from stand_in import clone_with_stand_in
from tiny_project import set_params, tiny_project

from fisherfold.run.errors import ParameterError
from fisherfold.run.workspace import Workspace
from flows.api_secret import FILE
from flows.exclusive import exclusive
from flows.schedule import Timetable

SHARDS = 100  # so many that the stage takes several times as long as Prefect needs to notice
PATIENCE = 240  # seconds; a busy machine fails no test


@pytest.mark.parametrize(
    ("timetable", "said"),
    [
        (Timetable(cron="0 25 * * *"), "0 25"),
        (Timetable(cron="nightly"), "nightly"),
        (Timetable(cron="0 2 * * *", timezone="Mars/Base"), "Mars/Base"),
        (Timetable(interval=-3), "-3"),
        (Timetable(interval=1e300), "1e+300"),
    ],
)
def test_an_impossible_schedule_is_one_clear_error(timetable, said):
    with pytest.raises(ParameterError, match="is no schedule") as error:
        timetable.schedule()
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_workspace_is_held_by_one_run_at_a_time(tmp_path):
    script = (
        "import sys; from pathlib import Path; from flows.exclusive import exclusive; from fisherfold.run.workspace import Workspace\n"
        "with exclusive(Workspace(Path(sys.argv[1])), lambda text: print(text, flush=True)): print('held', flush=True)"
    )
    with exclusive(Workspace(tmp_path), lambda _: pytest.fail("nobody else is here")):
        words = [sys.executable, "-c", script, str(tmp_path)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == f"waits for another run in {tmp_path} (process {os.getpid()})\n"
        assert process.poll() is None
    assert process.communicate(timeout=60)[0] == "held\n"


class Served:
    """A project that is served: `name` is the deployment's."""

    def __init__(self, folder: Path, process: subprocess.Popen, client: SyncPrefectClient, environment: dict) -> None:
        self.folder, self.process, self.client, self.environment = folder, process, client, environment
        self.deployment = wait_for(self._find, process)

    def _find(self):
        try:
            return self.client.read_deployment_by_name("fisherfold/nightly")
        except ObjectNotFound:
            return None

    def trigger(self, *overrides: str):
        return self.client.create_flow_run_from_deployment(
            self.deployment.id, parameters={"overrides": list(overrides)} if overrides else None
        )

    def wait(self, run, reached):
        return wait_for(
            lambda: (state := self.client.read_flow_run(run.id).state) and reached(state) and state, self.process
        )

    @property
    def spans(self) -> list[str]:
        path = self.folder / "ran.spans"
        return path.read_text().split() if path.exists() else []


def wait_for(condition, process: subprocess.Popen):
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert process.poll() is None, "the server has ended"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def served(prefect_home, tmp_path_factory) -> Iterator[Served]:
    folder = clone_with_stand_in(tmp_path_factory.mktemp("served"))
    prefect_home(folder / ".prefect")
    words = ["--cron", "0 2 * * *", "--until", "prepare", "--set", "prepare.seed=3"]
    with serving(folder, *words, STAND_IN_PAUSE="prepare=4") as found:
        yield found


@contextmanager
def serving(folder: Path, *words: str, **variables: str) -> Iterator[Served]:
    port = free_port()
    environment = {
        "PREFECT_HOME": str(folder / ".prefect"),
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        **variables,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "fisherfold", "serve", "--name", "nightly", *words],
        cwd=folder,
        env={**os.environ, **QUIET, **environment},
    )
    url = f"http://127.0.0.1:{port}/api"
    try:
        wait_for(lambda: listening(port), process)
        secret = (folder / ".prefect" / FILE).read_text().strip()
        settings = {PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: secret}
        with temporary_settings(settings), get_client(sync_client=True) as client:
            wait_for(lambda: client.api_healthcheck() is None, process)
            reached = {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": secret}
            yield Served(folder, process, client, {**environment, **reached})
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_the_schedule_is_kept_and_the_server_is_the_hosts_own(served):
    (schedule,) = served.deployment.schedules
    assert (schedule.schedule.cron, schedule.active) == ("0 2 * * *", True)
    addresses = {
        c.laddr.ip for child in psutil.Process(served.process.pid).children(recursive=True) for c in listeners(child)
    }
    assert addresses == {"127.0.0.1"}


def listeners(process: psutil.Process) -> list:
    return [c for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]


@pytest.mark.slow
def test_the_server_wants_the_password_of_a_file_that_its_user_alone_can_read(served):
    url = served.environment["PREFECT_API_URL"]
    assert httpx.get(f"{url}/admin/version").status_code == 401
    assert httpx.post(f"{url}/deployments/{served.deployment.id}/create_flow_run", json={}).status_code == 401
    assert (served.folder / ".prefect" / FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_the_api_chooses_neither_a_folder_nor_code_from_elsewhere(served, tmp_path):
    (tmp_path / "dvc.yaml").write_text("stages: {prepare: {cmd: 'touch stolen', outs: [artifacts]}}")
    (tmp_path / "params.yaml").touch()
    before = (served.folder / "params.yaml").read_text()
    attacker = served.client
    attacker.update_deployment(
        served.deployment.id, DeploymentUpdate(entrypoint="os.system", enforce_parameter_schema=False)
    )
    runs = [
        attacker.create_flow_run_from_deployment(served.deployment.id, parameters=asked)
        for asked in ({"workspace": str(tmp_path)}, {"overrides": ["evaluate.trust_task_code=true"]})
    ]
    folder, code = (served.wait(run, lambda state: state.is_final()) for run in runs)
    assert folder.is_crashed()  # the flow has no such parameter
    assert code.is_failed() and "evaluate.trust_task_code is on" in code.message
    assert (served.folder / "params.yaml").read_text() == before
    assert not (tmp_path / "stolen").exists()


@pytest.mark.slow
def test_runs_asked_for_through_the_api_never_overlap(served):
    """Two of the deployment, and one of the command line, all of which change the same workspace."""
    first, second = served.trigger(), served.trigger("prepare.seed=4")
    wait_for(lambda: served.spans, served.process)
    mine = command(
        served.folder,
        sys.executable,
        *["-m", "fisherfold", "run", "--until", "prepare", "--set", "prepare.seed=5"],
        environment=served.environment,
    )
    assert mine.returncode == 0, mine.stderr
    for run in (first, second):
        state = served.wait(run, lambda state: state.is_final())
        assert state.is_completed(), state
    assert served.spans == ["begin", "end"] * 3
    seeds = {run.id: served.client.read_flow_run(run.id).parameters["overrides"] for run in (first, second)}
    assert seeds == {first.id: ["prepare.seed=3"], second.id: ["prepare.seed=4"]}


@pytest.mark.slow
def test_a_run_cancelled_through_the_api_ends_its_stage_and_can_be_run_again(served):
    before = len(served.spans)
    run = served.trigger("prepare.seed=6")
    wait_for(lambda: len(served.spans) > before, served.process)
    served.client.set_flow_run_state(run.id, Cancelling(), force=True)
    assert served.wait(run, lambda state: state.is_final()).is_cancelled()
    assert not [
        p for p in psutil.Process(served.process.pid).children(recursive=True) if "stand-in" in " ".join(cmdline(p))
    ]
    assert served.spans[before:] == ["begin"]
    again = served.trigger("prepare.seed=6")
    assert served.wait(again, lambda state: state.is_final()).is_completed()
    assert served.spans[before:] == ["begin", "begin", "end"]
    logs = served.client.read_logs()
    assert "prepare: stands in" in [log.message for log in logs]  # the stage's own words


@pytest.mark.slow
def test_a_run_on_ray_cancelled_through_the_api_stops_the_workers_and_goes_on_later(prefect_home, tmp_path):
    pytest.importorskip("prefect_ray", reason="needs the extra `cluster`")
    folder = tiny_project(tmp_path / "project", articles=SHARDS)
    prefect_home(folder / ".prefect")
    sequences = {"calibration_sequences": SHARDS, "tuning_sequences": 2, "evaluation_sequences": 4}
    set_params(folder, {"prepare": sequences, "capture": {"sequences_per_shard": 1, "leaves": SHARDS, "batch_size": 1}})
    with serving(folder, "--engine", "ray", "--num-cpus", "1", "--until", "capture") as served:
        run = served.trigger()
        finished = wait_for(lambda: units(folder), served.process)
        family = psutil.Process(served.process.pid).children(recursive=True)
        on_ray = [
            member for member in family if "ray" in member.name() or "fisherfold stage" in " ".join(cmdline(member))
        ]
        assert len(on_ray) > 3  # its two servers, workers and the stage
        served.client.set_flow_run_state(run.id, Cancelling(), force=True)
        assert served.wait(run, lambda state: state.is_final()).is_cancelled()
        assert not psutil.wait_procs(on_ray, timeout=60)[1]
        left = units(folder)
        assert finished <= left < SHARDS
        time.sleep(3)
        assert units(folder) == left  # nobody writes any more
        tasks = {task.name: task.state for task in served.client.read_task_runs()}
        assert not [name for name, state in tasks.items() if state.is_running()]
        words = [sys.executable, "-m", "fisherfold", "run", "--until", "capture"]
        again = command(folder, *words, environment=served.environment)
    assert again.returncode == 0, again.stderr
    assert f"{left} of {SHARDS + 1} units are finished already" in again.stderr


def units(folder: Path) -> int:
    """How many are listed of stage capture."""
    return sum(len(path.read_text().splitlines()) for path in folder.glob("artifacts/capture.partial/*/manifest.jsonl"))


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
