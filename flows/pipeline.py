"""The Prefect flow: one task a stage, each run through DVC.

Prefect decides when and shows what happens; DVC decides what is stale. A stage that DVC calls up to date ends in state
*Cached*, one that it restores in *Restored*. With no Prefect API configured, a temporary server on the loopback interface serves
this run alone. The process of this flow keeps the engine that the settings name; those of the stages hand their units to it.

The flow has no parameter that says where the project lies: whoever may ask the API for a run may not choose a folder, whose dvc.yaml
would then be executed.
"""

import os
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Literal

from prefect import State, flow
from prefect.context import FlowRunContext
from prefect.states import Cancelled, Completed, Failed

from fisherfold.run.errors import FisherfoldError
from fisherfold.run.progress import announce
from fisherfold.run.scratch import clear_scratch
from fisherfold.run.workspace import STAGES, Workspace
from flows.api import exported, prefect_api
from flows.checked import CHECK, record_check
from flows.engine_choice import ending_engine
from flows.exclusive import exclusive
from flows.overrides import overridden, override_params
from flows.preflight import preflight, restrict
from flows.settings import read_settings
from flows.stage_run import CACHED, RESTORED, is_told, run_stage, say
from flows.staleness import stale_reasons
from flows.time_left import TimeLeft

StageName = Literal[STAGES]
PROJECT = "FISHERFOLD_PROJECT"  # environment variable: the project of the runs that this process and its children make


@flow(name="fisherfold")
def pipeline(stages: list[StageName] = list(STAGES), overrides: list[str] = []) -> State:  # noqa: B006
    """Bring `stages` up to date in their order; the first failure ends the flow and keeps all that is finished.

    Args:
        stages: what to bring up to date, in the pipeline's order.
        overrides: ``STAGE.KEY=VALUE``, written into params.yaml first, as by ``fisherfold run --set``; of a run that is asked for through
            Prefect's API, none that lets code from elsewhere run.

    Raises:
        ParameterError: an override is not valid, or not allowed.
        InputError: what the parameters name cannot be had.
    """
    place = project_of_runs()
    with exclusive(place, lambda message: say("fisherfold", message)), ending_engine():
        if FlowRunContext.get().flow_run.deployment_id:  # else the command line has looked
            restrict(place, overrides)
            preflight(place, overridden(place.root / "params.yaml", overrides)[1])
        for change in override_params(place.root / "params.yaml", overrides) if overrides else ():
            say("fisherfold", f"params.yaml: {change}")
        stale = stale_reasons(place)
        if CHECK in stale:
            record_check(place)
        with TimeLeft(place, _ahead(stages, stale)) as time_left:
            states = _run_stages(place, stages, time_left)
        for state in states:
            if not state.is_completed():
                return (Cancelled if state.is_cancelled() else Failed)(message=state.message)
        for stage in stages:
            clear_scratch(place, stage)
    return Completed(message=_account(states))


def _ahead(stages: Sequence[str], stale: Collection[str]) -> list[str]:
    """The stages that will run: the first that DVC calls stale now, and what comes after it."""
    return list(dropwhile(lambda stage: stage not in stale, stages))


def _run_stages(place: Workspace, stages: Sequence[str], time_left: TimeLeft) -> list[State]:
    """How each ended, up to the first that failed."""
    states: list[State] = []
    for number, stage in enumerate(stages, start=1):
        time_left.begin()
        where = f"stage {number} of {len(stages)}{time_left.text()}"
        states.append(run_stage(place, stage, where, time_left, return_state=True))
        if not states[-1].is_completed():
            break
        time_left.end(stage, computed=states[-1].name not in (CACHED, RESTORED))
    return states


def _account(states: Sequence[State]) -> str:
    """What was done for the stages, in words."""
    counts = Counter(state.name for state in states)
    done = {"computed": len(states) - counts[CACHED] - counts[RESTORED], "restored from the cache": counts[RESTORED]}
    told = [f"{count} {what}" for what, count in done.items() if count]
    return f"{len(states)} stages are up to date: {', '.join(told) or 'nothing was to do'}"


def project_of_runs() -> Workspace:
    """The project that this process's runs are bound to: that of `fisherfold run` or `serve`, else the one that holds this code."""
    return Workspace(Path(os.environ.get(PROJECT) or Path(__file__).parents[1]).resolve())


def run_pipeline(workspace: Workspace, stages: Sequence[str], overrides: Sequence[str] = ()) -> int:
    """Run the flow; return the exit status of the command line.

    Raises:
        FisherfoldError: the flow could not begin.
    """
    with prefect_api(read_settings().api_host), exported(PROJECT, str(workspace.root.resolve())):
        state = pipeline(list(stages), list(overrides), return_state=True)
    message = state.message or ""
    if state.is_completed():
        announce("fisherfold", message)
        return 0
    error = state.result(raise_on_failure=False)
    if isinstance(error, FisherfoldError):
        raise error
    if not is_told(message):
        print(f"error: {message}", file=sys.stderr)
    return 1
