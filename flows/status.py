"""`fisherfold status`: every stage with its state, as DVC and the scratch folders tell it."""

from collections.abc import Sequence
from typing import Any

from fisherfold.run.locks import holder
from fisherfold.run.scratch import lock_file, scratch_folder
from fisherfold.run.workspace import STAGES, Workspace
from flows.staleness import stale_reasons, summary
from flows.tables import print_table
from flows.time_left import TimeLeft, in_words


def stage_states(workspace: Workspace) -> list[dict[str, Any]]:
    """For every stage ``{"stage", "state", "units", "running", "reasons"}``: state is up to date, stale, interrupted or running,
    `units` counts those that are finished of an unfinished run, `running` names the process.
    """
    reasons = stale_reasons(workspace)
    return [_state(workspace, stage, reasons.get(stage, [])) for stage in STAGES]


def _state(workspace: Workspace, stage: str, reasons: Sequence[str]) -> dict[str, Any]:
    # a look that took the lock would make a start at that moment fail
    running = holder(lock_file(workspace, stage)) if reasons else None
    units = sum(1 for _ in scratch_folder(workspace, stage).glob("*/units/[!.]*")) if reasons else 0
    state = "running" if running else "interrupted" if units else "stale" if reasons else "up to date"
    return {"stage": stage, "state": state, "units": units, "running": running, "reasons": list(reasons)}


def seconds_left(workspace: Workspace, states: Sequence[dict[str, Any]]) -> float | None:
    """What bringing all up to date will take, by what it took here before; None if that is not known."""
    first = next((number for number, each in enumerate(states) if each["state"] != "up to date"), len(states))
    return TimeLeft(workspace, STAGES[first:]).seconds() if first < len(states) else 0.0


def print_status(workspace: Workspace) -> None:
    """Print one row a stage: up to date, stale (and why), interrupted (finished units) or running, and the time that is left."""
    states = stage_states(workspace)
    print_table(("stage", "state", "why"), [(each["stage"], _told(each), summary(each["reasons"])) for each in states])
    seconds = seconds_left(workspace, states)
    if seconds:
        print(f"about {in_words(seconds)} to do, by what it took here before: fisherfold run")


def _told(state: dict[str, Any]) -> str:
    units = f", {state['units']} units finished" if state["state"] in ("running", "interrupted") else ""
    process = f" ({state['running']})" if state["running"] else ""
    return f"{state['state']}{process}{units}"
