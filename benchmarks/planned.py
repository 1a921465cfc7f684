"""What stages took and wrote, beside what `fisherfold plan` says of them."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from figures import at_most

from fisherfold.run.params import Params
from fisherfold.run.workspace import Workspace
from flows.planning.plan import StagePlan, plan_run, read_hardware
from flows.planning.shapes import find_shapes

BYTES, TIME = 1.15, 2.0  # how far a plan may be off
LEAST_BYTES, LEAST_SECONDS = 1e7, 10.0  # that are worth a comparison
ROOT = Path(__file__).parents[1]


def planned_stages(workspace: Workspace, params: Params) -> dict[str, StagePlan]:
    """The plan of every stage on two cores, of the prepared model."""
    shapes = find_shapes(workspace, str(workspace.model))
    return {plan.stage: plan for plan in plan_run(shapes, params, read_hardware(Workspace(ROOT), "cpu"), 1)}


def published_bytes(workspace: Workspace, stage: str) -> int:
    """Of the output of a stage."""
    return sum(path.stat().st_size for path in workspace.out(stage).rglob("*") if path.is_file())


def against_plan(
    plans: Mapping[str, StagePlan], published: Mapping[str, int], seconds: Mapping[str, float]
) -> Iterator[str]:
    """How far the plan is off, the most of all stages.

    Args:
        plans: by stage.
        published: bytes of outputs, by stage.
        seconds: by stage, of two cores that do nothing else.
    """
    bytes_off = {
        stage: _ratio(held, plans[stage].published)
        for stage, held in published.items()
        if plans[stage].published > LEAST_BYTES
    }
    times_off = {
        stage: _ratio(spent, planned)
        for stage, spent in seconds.items()
        if (planned := plans[stage].seconds) and max(spent, planned) > LEAST_SECONDS
    }
    for what, off, most in (("bytes of an output", bytes_off, BYTES), ("time", times_off, TIME)):
        if off:
            worst = max(off, key=lambda stage: off[stage])
            yield at_most(f"{what} against the plan, the worst of {len(off)} stages ({worst})", off[worst], "x", most)
    planned = sum(plans[stage].seconds or 0.0 for stage in seconds)
    yield at_most("time of all stages against the plan", _ratio(sum(seconds.values()), planned), "x", TIME)


def _ratio(one: float, other: float) -> float:
    """The larger by the smaller."""
    return max(one, other) / max(min(one, other), 1e-9)
