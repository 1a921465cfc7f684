"""`fisherfold serve`: runs of a workspace on a schedule, or when someone asks Prefect's API for one, until it is stopped.

Runs of one workspace never overlap: one that comes while another is at work waits for it, and finds up to date what that
one computed. Prefect lets one run of a deployment begin at a time (its concurrency limit, collisions enqueued); runs of
other deployments, other servers and the command line meet at the lock of the workspace (flows/exclusive.py).
"""

import asyncio
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import resource_tracker

import psutil
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.flows import EntrypointType
from prefect.runner import Runner
from pydantic import ValidationError

from fisherfold.run.errors import ParameterError
from fisherfold.run.progress import announce
from fisherfold.run.workspace import Workspace
from flows.api import exported, lasting_api
from flows.pipeline import PROJECT, pipeline
from flows.preflight import restrict
from flows.watch import GRACE

ENTRYPOINT = "PREFECT__FLOW_ENTRYPOINT"
"""Environment variable that Prefect prefers to what a deployment says, which whoever may write to the API can change."""


@dataclass(frozen=True)
class Timetable:
    """When runs begin: a cron expression in a time zone, or an interval in seconds; neither means when asked for."""

    cron: str | None = None
    interval: float | None = None
    timezone: str = "UTC"

    def schedule(self) -> CronSchedule | IntervalSchedule | None:
        """The same in Prefect's terms.

        Raises:
            ParameterError: the expression, the interval or the time zone is not valid.
        """
        try:
            if self.cron is not None:
                return CronSchedule(cron=self.cron, timezone=self.timezone)
            if self.interval is not None:
                return IntervalSchedule(interval=timedelta(seconds=self.interval), timezone=self.timezone)
        except (ValidationError, OverflowError) as error:
            reason = (
                error.errors()[0]["msg"].removeprefix("Value error, ")
                if isinstance(error, ValidationError)
                else str(error)
            )
            raise ParameterError(f"{self} is no schedule: {reason}. For instance: --cron '0 2 * * *'.") from None
        return None

    def __str__(self) -> str:
        if self.cron is not None:
            return f"--cron {self.cron!r} ({self.timezone})"
        return "when asked for" if self.interval is None else f"--interval {self.interval:g}"


def serve(
    workspace: Workspace, name: str, timetable: Timetable, stages: Sequence[str], overrides: Sequence[str]
) -> None:
    """Serve runs of `workspace` as deployment ``fisherfold/<name>`` until Ctrl-C or SIGTERM, which end a run at work.

    Whoever may use the API starts runs of this project alone, with this very flow, and switches no code from elsewhere on.

    Args:
        workspace: the project folder.
        name: of the deployment; serving under the same name again replaces its schedule.
        timetable: when runs begin.
        stages: what each run brings up to date.
        overrides: of parameters, for each run that is not given others.

    Raises:
        ParameterError: the schedule is not valid, or an override would let code from elsewhere run.
        EngineError: Prefect's API does not answer and none could be started.
    """
    schedule, root = timetable.schedule(), workspace.root.resolve()
    restrict(workspace, overrides)
    with lasting_api() as url, exported(PROJECT, str(root)), exported(ENTRYPOINT, "flows.pipeline.pipeline"):
        announce("serve", f"fisherfold/{name} runs {timetable} in {root}; Prefect: {url}; Ctrl-C ends it")
        runner = Runner(name=name, limit=1)  # pauses its schedule when it ends
        runner.handle_sigterm = lambda *_: signal.raise_signal(signal.SIGINT)  # Prefect 3.8's own ends nothing properly
        runner.add_flow(
            pipeline,
            name=name,
            schedules=[schedule] if schedule else None,
            parameters={"stages": list(stages), "overrides": list(overrides)},
            description=f"Compresses the model of {root} by {', '.join(stages)}; stages that are up to date are skipped.",
            tags=["fisherfold"],
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        with _runs_ended():
            asyncio.run(runner.start())


@contextmanager
def _runs_ended() -> Iterator[None]:
    """Prefect leaves a run at work to itself when the process that serves is told to end; this ends it, resumably."""
    before = set(psutil.Process().children())
    try:
        yield
    finally:
        tracker = resource_tracker._resource_tracker._pid  # multiprocessing's own helper ends only with this process
        runs = {child for child in psutil.Process().children() if child not in before and child.pid != tracker}
        for run in runs:
            with suppress(psutil.NoSuchProcess):
                run.terminate()
        _, alive = psutil.wait_procs(runs, timeout=GRACE + 10)
        for run in alive:  # its stage has ended; what it cannot tell Prefect, nobody waits for
            run.kill()
