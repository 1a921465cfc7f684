"""`fisherfold status`: every stage with its state, as DVC and the scratch folders tell it."""

from rich.console import Console
from rich.table import Table

from fisherfold.run.locks import holder
from fisherfold.run.params import STAGES
from fisherfold.run.scratch import lock_file, scratch_folder
from fisherfold.run.workspace import Workspace
from flows.staleness import stale_reasons, summary


def print_status(workspace: Workspace) -> None:
    """Print one row a stage: up to date, stale (and why), interrupted (finished units) or running."""
    reasons = stale_reasons(workspace)
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "state", "why"):
        table.add_column(heading)
    for stage in STAGES:
        table.add_row(stage, _state(workspace, stage, stage in reasons), summary(reasons.get(stage, [])))
    Console().print(table)


def _state(workspace: Workspace, stage: str, stale: bool) -> str:
    if not stale:
        return "up to date"
    finished = sum(1 for _ in scratch_folder(workspace, stage).glob("*/units/[!.]*"))
    if running := holder(
        lock_file(workspace, stage)
    ):  # a look that took the lock would make a start at that moment fail
        return f"running ({running}), {finished} units finished"
    return f"interrupted, {finished} units finished" if finished else "stale"
