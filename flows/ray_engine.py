"""Engine `ray`: a Prefect flow a stage, a task a unit, spread over a Ray cluster by prefect-ray's RayTaskRunner.

Workers write units into the scratch folder on the file system that all nodes share; the process of the stage alone lists
them. A unit that dies with its worker is given out again, after a while; one that fails by itself ends the stage.

Ray keeps the worker processes of one stage for all its units, so a model is loaded once a process; processes of one node map the
same safetensors file, so its weights are read once a node (the system's page cache).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from uuid import UUID, uuid4

import ray
from httpx import HTTPError
from prefect import Flow, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.flow_engine import run_flow
from prefect.states import Crashed, Pending
from prefect.tasks import Task
from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RaySystemError,
    WorkerCrashedError,
)

from flows.api import prefect_api
from flows.cluster import joined_cluster
from flows.settings import PREFIX, Settings
from stages.determinism import compute_deterministically
from stages.engine import Files, Unit, use_engine
from stages.errors import EngineError
from stages.progress import announce

LOST = (LocalRayletDiedError, NodeDiedError, ObjectLostError, OutOfMemoryError, RaySystemError, WorkerCrashedError)
"""What Ray says when a worker or its host died, and not the unit's own code failed."""
PAUSES = (1.0, 5.0, 20.0)  # seconds before a lost unit is given out again; one lost once more than this ends the stage
POLL = 1.0  # seconds


def run_stage_flow(stage: str, work: Callable[[], None], settings: Settings, threads: int | None) -> None:
    """Run one stage as a Prefect flow, a subflow of `settings.flow_run`, its units on Ray.

    Raises:
        EngineError: cluster or API cannot be used, or a unit died too often; and whatever the stage raises.
    """

    @flow(name=f"stage {stage}", task_runner=RayTaskRunner(), validate_parameters=False, persist_result=False)
    def stage_flow() -> None:
        engine = RayEngine(stage, settings, threads)
        with use_engine(engine):
            work()

    with prefect_api(settings.api_host, told=settings.flow_run is not None), joined_cluster(settings):
        run_flow(stage_flow, flow_run=_subflow_run(stage_flow, settings.flow_run))


def _subflow_run(stage_flow: Flow, parent: UUID | None):
    """A run of `stage_flow` below the flow run of another process, as Prefect makes it within one: by a task of its name."""
    if parent is None:
        return None
    with get_client(sync_client=True) as client:
        twin = Task(fn=stage_flow.fn, name=stage_flow.name)
        tracking = client.create_task_run(twin, parent, dynamic_key=str(uuid4()), name=stage_flow.name, state=Pending())
        return client.create_flow_run(stage_flow, parent_task_run_id=tracking.id, state=Pending())


class RayEngine:
    """See `stages.engine.Engine`. To be used inside a flow whose task runner is a RayTaskRunner.

    Args:
        stage: for messages.
        settings: what a unit asks of the cluster.
        threads: of a unit; the cores it asks for if the settings say nothing, as far as one node has them.

    Raises:
        EngineError: no node offers what a unit asks for.
    """

    def __init__(self, stage: str, settings: Settings, threads: int | None) -> None:
        self.stage = stage
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = settings.num_cpus or min(threads or 1, max(node.get("CPU", 0) for node in nodes))
        asked = {"CPU": cores, "GPU": settings.num_gpus, "memory": settings.memory or 0}
        self.slots = sum(_fitting(node, asked) for node in nodes)
        if not self.slots:
            raise EngineError(
                f"Stage {stage!r}: no node of the Ray cluster offers what a unit asks for ({_listed(asked)}); they offer "
                f"{'; '.join(_listed(node, asked) for node in nodes)}. Set {PREFIX}NUM_CPUS, _NUM_GPUS and _MEMORY to what "
                "there is."
            )
        self._options = {"num_cpus": cores, "num_gpus": settings.num_gpus, "max_retries": 0}
        if settings.memory:
            self._options["memory"] = int(settings.memory)
        announce(stage, f"on Ray: {len(nodes)} nodes, {self.slots} units at once, each asks for {_listed(asked)}")

    def run(self, write: Callable[[str, Unit], Files], units: Mapping[str, Unit]) -> Iterator[tuple[str, Files]]:
        batch = _Batch(self, write, units)
        try:
            yield from batch.results()
        finally:
            batch.cancel()

    def submit(self, write: Callable[[str, Unit], Files], name: str, unit: Unit):
        """Give out one unit; its Prefect future."""
        with remote_options(**self._options):
            return run_unit.submit(write, name, unit)


class _Batch:
    """The units of one call of `RayEngine.run`: waiting, in work, and lost ones that are due again at some time."""

    def __init__(self, engine: RayEngine, write: Callable[[str, Unit], Files], units: Mapping[str, Unit]) -> None:
        self.engine, self.write, self.units = engine, write, units
        self.waiting = dict(units)
        self.working: dict[ray.ObjectRef, tuple[str, UUID]] = {}
        self.unfinished = set(units)
        self.losses: dict[str, int] = {}
        self.due: dict[str, float] = {}
        self.untold: dict[UUID, State] = {}
        # a queue in front of the workers hides the time between two units; where units wait for others, order matters more
        self.window = engine.slots * (1 if any(unit.after for unit in units.values()) else 2)

    def results(self) -> Iterator[tuple[str, Files]]:
        while self.unfinished:
            self._submit()
            finished, _ = ray.wait(list(self.working), timeout=POLL) if self.working else ((), time.sleep(POLL / 10))
            for reference in finished:
                name, task_run = self.working.pop(reference)
                try:
                    state: State = ray.get(reference)
                except LOST as error:
                    state = Crashed(message=f"{type(error).__name__}: {error}")
                    if not _tell(task_run, state):
                        self.untold[task_run] = state
                if state.is_crashed():
                    self._lose(name, state.message)
                    continue
                files = state.result()
                yield name, files
                self.unfinished.discard(name)

    def _submit(self) -> None:
        now = time.monotonic()
        for name in [name for name, when in self.due.items() if when <= now]:
            del self.due[name]
            self._give_out(name)
        while len(self.working) + len(self.due) < self.window and (name := self._possible()) is not None:
            del self.waiting[name]
            self._give_out(name)

    def _possible(self) -> str | None:
        """The first waiting unit that needs nothing unfinished."""
        return next((name for name, unit in self.waiting.items() if self.unfinished.isdisjoint(unit.after)), None)

    def _give_out(self, name: str) -> None:
        future = self.engine.submit(self.write, name, self.units[name])
        self.working[future.wrapped_future] = (name, future.task_run_id)

    def _lose(self, name: str, message: str) -> None:
        losses = self.losses[name] = self.losses.get(name, 0) + 1
        if losses > len(PAUSES):
            raise EngineError(
                f"Stage {self.engine.stage!r}, unit {name!r}: its worker died {losses} times, the last time with: {message}. "
                f"If it ran out of memory, let a unit ask for more ({PREFIX}MEMORY). Finished units are kept."
            )
        pause = PAUSES[losses - 1]
        announce(self.engine.stage, f"unit {name} was lost ({message.splitlines()[0]}); again in {pause:g} s")
        self.due[name] = time.monotonic() + pause

    def cancel(self) -> None:
        """Stop what is still in work: the stage ended early. Tell of lost tasks that Prefect did not know of when they were."""
        for task_run, state in self.untold.items():
            _tell(task_run, state)
        for reference, (_, task_run) in self.working.items():
            ray.cancel(reference, force=True)
            _tell(task_run, Crashed(message="the stage ended"))


@task(task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False, result_serializer="json", log_prints=True)
def run_unit(write: Callable[[str, Unit], Files], name: str, unit: Unit) -> Files:
    """Run one unit on a worker."""
    return work_on(write, name, unit)  # Prefect ships this function's text, and imports that one


def work_on(write: Callable[[str, Unit], Files], name: str, unit: Unit) -> Files:
    """Write one unit in this worker process, which keeps what it has loaded for its next units."""
    _prepare_process()
    return write(name, unit)


@cache
def _prepare_process() -> None:
    compute_deterministically()


def _tell(task_run: UUID, state: State) -> bool:
    """Tell the Prefect API how a task ended that cannot tell it any more; whether it is there and knows of that task.

    A worker's last events can arrive there after the news of its death.
    """
    with suppress(HTTPError, ObjectNotFound), get_client(sync_client=True) as client:
        client.set_task_run_state(task_run, state, force=True)
        return True
    return False


def _fitting(offered: Mapping[str, float], asked: Mapping[str, float]) -> int:
    """How many units fit a node at a time."""
    return int(min(offered.get(name, 0) // amount for name, amount in asked.items() if amount))


def _listed(resources: Mapping[str, float], among: Mapping[str, float] | None = None) -> str:
    named = {"CPU": "cores", "GPU": "GPUs", "memory": "bytes of memory"}
    return ", ".join(
        f"{resources.get(name, 0):.12g} {named[name]}" for name in among or resources if resources.get(name)
    )
