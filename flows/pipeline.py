"""The Prefect flow: one task a stage, each run through DVC.

Prefect decides when and shows what happens; DVC decides what is stale. A stage that DVC calls up to date ends in state
*Cached*. With no Prefect API configured, a temporary server on the loopback interface serves this run alone.
"""

from collections.abc import Sequence

from prefect import State, flow, task
from prefect.states import Completed, Failed

from flows.staleness import reproduce, stale_reasons, summary
from stages.progress import announce
from stages.scratch import clear_scratch
from stages.workspace import MANIFEST, Workspace, digest_file


@task(task_run_name="{stage}")
def run_stage(workspace: Workspace, stage: str) -> State:
    """Bring one stage up to date; state *Cached* if it is, *Failed* if DVC could not run it."""
    reasons = stale_reasons(workspace, stage).get(stage)
    if not reasons:
        announce(stage, "is up to date")
        return Completed(name="Cached", message=f"up to date, manifest {_digest(workspace, stage)[:16]}")
    announce(stage, f"runs: {summary(reasons)}")
    status = reproduce(workspace, stage)
    if status:
        return Failed(message=f"stage {stage!r} failed: `dvc repro --single-item {stage}` ended with status {status}")
    return Completed(message=f"manifest {_digest(workspace, stage)[:16]}")


@flow(name="fisherfold")
def pipeline(workspace: Workspace, stages: Sequence[str]) -> State:
    """Bring `stages` up to date in their order; the first failure ends the flow and keeps all that is finished."""
    for stage in stages:
        state = run_stage(workspace, stage, return_state=True)
        if not state.is_completed():
            return Failed(message=state.message)
    return Completed(message=f"{len(stages)} stages are up to date")


def run_pipeline(workspace: Workspace, stages: Sequence[str]) -> int:
    """Run the flow; return the exit status of the command line."""
    state = pipeline(workspace, stages, return_state=True)
    if state.is_completed():
        for stage in stages:
            clear_scratch(workspace, stage)
    announce("fisherfold", state.message)
    return 0 if state.is_completed() else 1


def _digest(workspace: Workspace, stage: str) -> str:
    return digest_file(workspace.out(stage) / MANIFEST)
