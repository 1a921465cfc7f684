"""What a plan proposes: parameters with which stage capture fits its devices, as a command to paste."""

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from fisherfold.run.params import Params
from fisherfold.statistics.placement import PLACEMENTS
from flows.planning.capture_costs import CAPTURE_MEMORY
from flows.planning.plan import USABLE, Hardware, StagePlan, plan_stage
from flows.planning.shapes import ModelShapes

Change = dict[str, Any]
STREAMED: Change = {"placement": "streamed"}
UNHEALED = "factorize.heal.passes=0"  # healing trains a whole model


def propose(
    shapes: ModelShapes,
    params: Params,
    hardware: Hardware,
    devices: int,
    stages: Sequence[StagePlan],
    disk: float | None = None,
) -> list[str] | None:
    """Assignments for ``--set`` with which stage capture fits, the fastest that are known; [] if all stages fit already.

    Args:
        disk: bytes that the stage may hold at most, if that is limited.

    Returns:
        None if no value is known to help, of stage capture or of another that does not fit.
    """
    capture = next(stage for stage in stages if stage.stage == "capture")
    fits = capture.seconds is not None and (disk is None or capture.disk <= disk)
    lost = incurable(shapes, params, hardware, devices, stages)
    others = [stage for stage in unfit(stages) if stage not in lost]
    if fits and not others:
        return None if lost else []
    families = [one_block(shapes, params)] if fits else [fewer_layers(shapes), one_block(shapes, params)]
    found = [
        (plan.seconds, changes)
        for family in families
        for changes, plan in _first_that_fits(shapes, params, hardware, devices, family, disk, others)
    ]
    if not found:
        return None
    _, changes = min(found, key=lambda one: one[0] or 0.0)
    unhealed = [UNHEALED] if _with(params, changes).factorize.heal.passes < params.factorize.heal.passes else []
    return [f"capture.{key}={value}" for key, value in changes.items()] + unhealed


def unfit(stages: Sequence[StagePlan]) -> list[str]:
    """The stages besides capture that do not fit."""
    return [stage.stage for stage in stages if stage.seconds is None and stage.stage != "capture"]


def incurable(
    shapes: ModelShapes, params: Params, hardware: Hardware, devices: int, stages: Sequence[StagePlan]
) -> list[str]:
    """Those that do not fit with one decoder block at a time either, so no parameter changes it."""
    streamed = _with(params, STREAMED)
    return unfit([plan_stage(stage, shapes, streamed, hardware, devices) for stage in unfit(stages)])


def _first_that_fits(
    shapes: ModelShapes,
    params: Params,
    hardware: Hardware,
    devices: int,
    candidates: Iterator[Change],
    disk: float | None,
    others: Sequence[str],
) -> Iterator[tuple[Change, StagePlan]]:
    """The first of changes to block capture with which its units fit, and those of other stages, and the plan; nothing if none does."""
    for changes in candidates:
        changed = _with(params, changes)
        if unfit([plan_stage(stage, shapes, changed, hardware, devices) for stage in others]):
            return  # it hangs on the placement alone
        spread = devices if changed.capture.placement == params.capture.placement else 1  # one block lies on one device
        if CAPTURE_MEMORY.lookup(changed.capture.placement)(shapes, changed) > USABLE * hardware.memory * spread:
            continue
        for cut in more_leaves(changed) if disk else ({},):
            plan = plan_stage("capture", shapes, _with(changed, cut), hardware, devices)
            if plan.seconds is not None and (disk is None or plan.disk <= disk):
                yield changes | cut, plan
                return
        return  # fewer layers or sequences at a time take no less disk


def _with(params: Params, changes: Change) -> Params:
    """The parameters with changes to block capture, and without healing where these keep no whole model."""
    factorize, capture = params.factorize, params.capture.model_copy(update=changes)
    if not PLACEMENTS.lookup(capture.placement).holds_model:
        factorize = factorize.model_copy(update={"heal": factorize.heal.model_copy(update={"passes": 0})})
    return params.model_copy(update={"capture": capture, "factorize": factorize})


def more_leaves(params: Params) -> Iterator[Change]:
    """The calibration in one leaf, in two and so on: one decoder block at a time, shorter leaves hand less on through the disk."""
    shards = -(-params.prepare.calibration_sequences // params.capture.sequences_per_shard)
    for leaves in sorted({1, *(shards // shorter for shorter in _halves(shards))}):
        yield {} if leaves == params.capture.leaves else {"leaves": leaves}


def fewer_layers(shapes: ModelShapes) -> Iterator[Change]:
    """The whole model with a half, a third and so on of all layers in one pass, the most first."""
    yield from ({"layers_per_pass": layers} for layers in _portions(len(shapes.layers)))


def one_block(shapes: ModelShapes, params: Params) -> Iterator[Change]:
    """One decoder block at a time: all its layers or some, then with smaller batches."""
    inside = [sum(layer.name.startswith(f"{block}.") for layer in shapes.layers) for block in shapes.block_sizes]
    if sum(inside) < len(shapes.layers):  # stage capture refuses to stream a layer that lies in none
        return
    most = max(inside)
    for batch in _halves(params.capture.batch_size):
        for layers in (None, *_portions(most)):
            smaller = {"batch_size": batch} if batch != params.capture.batch_size else {}
            yield STREAMED | ({"layers_per_pass": layers} if layers else {}) | smaller


def _portions(count: int) -> list[int]:
    """A half, a third and so on of `count`, down to one."""
    return list(dict.fromkeys(-(-count // parts) for parts in range(2, count + 1)))


def _halves(count: int) -> list[int]:
    """`count`, a half, a quarter and so on, down to one."""
    return [count >> shift for shift in range(count.bit_length())]


def command(assignments: Sequence[str], devices: int, on_gpus: bool) -> str:
    """The run that was planned."""
    engine = ["--engine", "ray", *(["--num-gpus", "1"] if on_gpus else [])] if devices > 1 else []
    chosen = [word for assignment in assignments for word in ("--set", assignment)]
    return shlex.join(["fisherfold", "run", *engine, *chosen])
