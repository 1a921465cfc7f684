"""Engine `ray`: a Prefect flow a stage, a task a unit, spread over a Ray cluster by prefect-ray's RayTaskRunner.

Workers write units into the scratch folder on the file system that all nodes share; the process of the stage alone lists
them. A unit that dies with its worker is given out again, after a while; one that fails by itself ends the stage.

All stages of a run are one job of Ray, which keeps its worker processes: they import once a run, and load a model once a stage.
Processes of one node map the same safetensors file, so its weights are read once a node (the system's page cache).
"""

import gc
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from multiprocessing.connection import Connection
from threading import current_thread, main_thread
from uuid import UUID, uuid4

import ray
from httpx import HTTPError
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Completed, Crashed
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

from fisherfold.run.determinism import compute_deterministically, describe_machine
from fisherfold.run.engine import Files, Unit, use_engine
from fisherfold.run.errors import EngineError
from fisherfold.run.progress import announce
from flows.api import prefect_api
from flows.cluster.ray_cluster import join, joined_cluster
from flows.cluster.unit_channel import answer, taking_units
from flows.settings import PREFIX, Settings, variable

LOST = (LocalRayletDiedError, NodeDiedError, ObjectLostError, OutOfMemoryError, RaySystemError, WorkerCrashedError)
"""What Ray says when a worker or its host died, and not the unit's own code failed."""
PAUSES = (1.0, 5.0, 20.0)  # seconds before a lost unit is given out again; one lost once more than this ends the stage
POLL = 1.0  # seconds
LATE = 30.0  # seconds that a worker may keep the news of a finished unit, at most


def run_stage_flow(stage: str, work: Callable[[], None], settings: Settings, threads: int | None) -> None:
    """Run one stage that belongs to no run as a Prefect flow, its units on Ray.

    Raises:
        EngineError: cluster or API cannot be used, or a unit died too often; and whatever the stage raises.
    """

    def on_engine() -> None:
        with use_engine(RayEngine(stage, settings, threads)):
            work()

    with prefect_api(settings.api_host), joined_cluster(settings):
        _run_as_flow(stage, on_engine)


@contextmanager
def taking_stage(stage: str, settings: Settings) -> Iterator[str]:
    """Join the cluster, if this process has not; the address at which a process of `stage` may hand over its units.

    They run in a subflow of the flow that this is called in.

    Raises:
        EngineError: the cluster cannot be used.
    """
    join(settings)
    lane = current_thread().name

    def take(connection: Connection, threads: int | None) -> None:
        def on_engine() -> State | None:
            try:
                answer(connection, RayEngine(stage, settings, threads, lane, connection.poll))
            except (EOFError, ConnectionError):
                return Cancelled(message="the stage's process has ended; finished units are kept")

        _run_as_flow(stage, on_engine)

    with taking_units(take) as address:
        yield address


def _run_as_flow(stage: str, work: Callable[[], State | None]) -> None:
    here = _Here(work)

    @flow(name=f"stage {stage}", task_runner=RayTaskRunner(), validate_parameters=False, persist_result=False)
    def stage_flow() -> State | None:
        return here.work()

    stage_flow()


class _Here:
    """Holds what has no meaning in another process, such as an open socket: Prefect sends every task its flow's function."""

    def __init__(self, work: Callable[[], State | None] | None = None) -> None:
        self.work = work

    def __reduce__(self) -> tuple:
        return _Here, ()


class RayEngine:
    """See `fisherfold.run.engine.Engine`. To be used inside a flow whose task runner is a RayTaskRunner.

    Args:
        stage: for messages.
        settings: what a unit asks of the cluster.
        threads: of a unit; the cores it asks for if the settings say nothing, as far as one node has them.
        lane: units of stages that run side by side, each in its lane, have workers of their own, which need not load by turns.
        ended: whether nobody waits for units any more.

    Raises:
        EngineError: no node offers what a unit asks for.
    """

    def __init__(
        self,
        stage: str,
        settings: Settings,
        threads: int | None,
        lane: str = "",
        ended: Callable[[], bool] = lambda: False,
    ) -> None:
        self.stage, self.ended = stage, ended
        self._id = uuid4().hex
        self.finished: deque[tuple[float, UUID]] = deque(maxlen=1000)  # when, and which task
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
        if lane != main_thread().name:
            self._options["runtime_env"] = {"env_vars": {variable("lane"): lane}}
        if settings.memory:
            self._options["memory"] = int(settings.memory)
        announce(stage, f"on Ray: {len(nodes)} nodes, {self.slots} units at once, each asks for {_listed(asked)}")

    def machine(self) -> dict[str, str]:
        """What one worker computes with; every worker compares itself with it (`fisherfold.run.unit_work.require_same`)."""
        options = {**self._options, "max_retries": 3}
        return ray.get(ray.remote(describe_machine).options(**options).remote())

    def run(self, write: Callable[[str, Unit], Files], units: Mapping[str, Unit]) -> Iterator[tuple[str, Files]]:
        """See `fisherfold.run.engine.Engine.run`; what is still in work when the caller stops is cancelled."""
        batch = _Batch(self, write, units)
        try:
            yield from batch.results()
        finally:
            batch.cancel()

    def submit(self, write: Callable[[str, Unit], Files], name: str, unit: Unit):
        """Give out one unit; its Prefect future."""
        with remote_options(**self._options):
            return run_unit.submit(self._id, write, name, unit)


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
        while self.unfinished and not self.engine.ended():
            self._submit()
            finished, _ = ray.wait(list(self.working), timeout=POLL) if self.working else ((), time.sleep(POLL / 10))
            for reference in finished:
                name, task_run = self.working.pop(reference)
                try:
                    state: State = ray.get(reference)
                except LOST as error:
                    state = Crashed(message=f"{type(error).__name__}: {error}")
                    _tell(task_run, state)
                    # once more at the end: the worker's last events may arrive after this
                    self.untold[task_run] = state
                if state.is_crashed():
                    self._lose(name, state.message)
                    continue
                files = state.result()
                self.engine.finished.append((time.monotonic(), task_run))
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
        # the worker may have died before it told of the units that it finished last
        since = time.monotonic() - LATE
        self.untold |= {task_run: Completed() for when, task_run in self.engine.finished if when > since}
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
        """Stop what is still in work: the stage ended early. Tell again of lost tasks, which Prefect may not have known of yet."""
        for task_run, state in self.untold.items():
            _tell(task_run, state)
        for reference, (_, task_run) in self.working.items():
            ray.cancel(reference, force=True)
            _tell(task_run, Crashed(message="the stage ended"))


@task(task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False, result_serializer="json", log_prints=True)
def run_unit(stage: str, write: Callable[[str, Unit], Files], name: str, unit: Unit) -> Files:
    """Run one unit on a worker; `stage` differs between any two runs of stages."""
    return work_on(stage, write, name, unit)  # Prefect ships this function's text, and imports that one


def work_on(stage: str, write: Callable[[str, Unit], Files], name: str, unit: Unit) -> Files:
    """Write one unit in this worker process, which keeps what it has loaded for its next units of the stage."""
    _begin_stage(stage)
    return write(name, unit)


@lru_cache(maxsize=1)
def _begin_stage(stage: str) -> None:
    """Forget what an earlier stage has loaded: models above all, which would crowd this one's out of memory."""
    for module in [module for name, module in sys.modules.items() if name.startswith(("stages.", "fisherfold."))]:
        for kept in vars(module).values():
            if hasattr(kept, "cache_clear"):
                kept.cache_clear()
    gc.collect()
    compute_deterministically()


def _tell(task_run: UUID, state: State) -> None:
    """Tell the Prefect API how a task ended that cannot tell it any more, if it is there and knows of that task."""
    with suppress(HTTPError, ObjectNotFound), get_client(sync_client=True) as client:
        client.set_task_run_state(task_run, state, force=True)


def _fitting(offered: Mapping[str, float], asked: Mapping[str, float]) -> int:
    """How many units fit a node at a time."""
    return int(min(offered.get(name, 0) // amount for name, amount in asked.items() if amount))


def _listed(resources: Mapping[str, float], among: Mapping[str, float] | None = None) -> str:
    named = {"CPU": "cores", "GPU": "GPUs", "memory": "bytes of memory"}
    return ", ".join(
        f"{resources.get(name, 0):.12g} {named[name]}" for name in among or resources if resources.get(name)
    )
