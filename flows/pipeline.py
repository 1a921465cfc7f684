"""The Prefect flow: one task a stage, each run through DVC.

Prefect decides when and shows what happens; DVC decides what is stale. A stage that DVC calls up to date ends in state
*Cached*. With no Prefect API configured, a temporary server on the loopback interface serves this run alone. The
process of this flow keeps the engine that the settings name; those of the stages hand their units to it.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from httpx import HTTPError
from prefect import State, flow, get_client, task
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed

from fisherfold.run.errors import FisherfoldError
from fisherfold.run.files import MANIFEST, digest_file
from fisherfold.run.params import STAGES
from fisherfold.run.progress import announce
from fisherfold.run.scratch import clear_scratch
from fisherfold.run.workspace import Workspace
from flows.api import prefect_api
from flows.artifacts import StageProgress, announce_event, show_results
from flows.engine_choice import ending_engine, offered_engine
from flows.exclusive import exclusive
from flows.overrides import override_params
from flows.settings import read_settings
from flows.staleness import reproduce, stale_reasons, summary
from flows.watch import Stopped

CANCEL_INTERVAL = 5.0  # seconds between questions to Prefect whether the run is to be cancelled
StageName = Literal[STAGES]


class StageView:
    """Shows in Prefect what the process of a stage does, and tells it when the run is cancelled there."""

    def __init__(self, stage: str) -> None:
        self._log = get_run_logger()
        self._progress = StageProgress(stage)
        self._asked = time.monotonic()
        self._run = FlowRunContext.get().flow_run.id

    def line(self, text: str) -> None:
        """A finished line of the stage, to Prefect's log."""
        (self._log.error if text.lower().startswith("error") else self._log.info)(text)

    def progress(self, entry: dict) -> None:
        """A count of the stage, to Prefect's progress artifact."""
        with suppress(HTTPError):  # an API that is away for a moment stops no computation
            self._progress.show(entry)

    def cancelled(self) -> bool:
        """Whether Prefect was told to cancel this run; asked every CANCEL_INTERVAL seconds."""
        if time.monotonic() - self._asked < CANCEL_INTERVAL:
            return False
        self._asked = time.monotonic()
        with suppress(HTTPError), get_client(sync_client=True) as client:
            state = client.read_flow_run(self._run).state
            return state is not None and (state.is_cancelling() or state.is_cancelled())
        return False


@task(task_run_name="{stage}")
def run_stage(workspace: Workspace, stage: str) -> State:
    """Bring one stage up to date; state *Cached* if it is, *Failed* if DVC could not run it."""
    reasons = stale_reasons(workspace, stage).get(stage)
    if not reasons:
        return _ended(workspace, stage, Completed(name="Cached", message=f"up to date, {_digest(workspace, stage)}"))
    _say(stage, f"runs: {summary(reasons)}")
    announce_event(workspace, stage, "started", summary(reasons))
    try:
        with offered_engine(stage) as variables:
            status = reproduce(workspace, stage, StageView(stage), variables)
    except Stopped:
        return _ended(workspace, stage, Cancelled(message=f"stage {stage!r} was cancelled; finished units are kept"))
    if status:
        message = f"stage {stage!r} failed: `dvc repro --single-item {stage}` ended with status {status}"
        return _ended(workspace, stage, Failed(message=message))
    return _ended(workspace, stage, Completed(message=_digest(workspace, stage)))


def _ended(workspace: Workspace, stage: str, state: State) -> State:
    """Tell of a stage's end, and show its results if it has any."""
    if state.name == "Cached":
        _say(stage, "is up to date")
    if state.is_completed():
        show_results(workspace, stage)
    announce_event(workspace, stage, state.name.lower(), state.message or "")
    return state


def _say(stage: str, message: str) -> None:
    """One line in the terminal and in Prefect's log."""
    announce(stage, message)
    get_run_logger().info("%s: %s", stage, message)


@flow(name="fisherfold")
def pipeline(workspace: Path, stages: list[StageName] = list(STAGES), overrides: list[str] = []) -> State:  # noqa: B006
    """Bring `stages` up to date in their order; the first failure ends the flow and keeps all that is finished.

    Args:
        workspace: the project folder, which holds params.yaml and dvc.yaml.
        stages: what to bring up to date, in the pipeline's order.
        overrides: ``STAGE.KEY=VALUE``, written into params.yaml first, as by ``fisherfold run --set``.

    Raises:
        ParameterError: an override is not valid.
    """
    place = Workspace(Path(workspace).resolve())
    with exclusive(place, lambda message: _say("fisherfold", message)), ending_engine():
        if overrides:
            override_params(place.root / "params.yaml", overrides)
        for stage in stages:
            state = run_stage(place, stage, return_state=True)
            if not state.is_completed():
                return (Cancelled if state.is_cancelled() else Failed)(message=state.message)
        for stage in stages:
            clear_scratch(place, stage)
    return Completed(message=f"{len(stages)} stages are up to date")


def run_pipeline(workspace: Workspace, stages: Sequence[str], overrides: Sequence[str] = ()) -> int:
    """Run the flow; return the exit status of the command line.

    Raises:
        FisherfoldError: the flow could not begin.
    """
    with prefect_api(read_settings().api_host):
        state = pipeline(workspace.root, list(stages), list(overrides), return_state=True)
    if not state.is_completed():
        error = state.result(raise_on_failure=False)
        if isinstance(error, FisherfoldError):
            raise error
    announce("fisherfold", state.message)
    return 0 if state.is_completed() else 1


def _digest(workspace: Workspace, stage: str) -> str:
    return f"manifest {digest_file(workspace.out(stage) / MANIFEST)[:16]}"
