"""What a plan proposes: parameters with which every stage fits its devices, as a command to paste."""

import shlex
from collections.abc import Sequence

from fisherfold.run.params import Params
from flows.planning.plan import Hardware, StagePlan, plan_stage
from flows.planning.shapes import ModelShapes


def propose(
    shapes: ModelShapes, params: Params, hardware: Hardware, devices: int, stages: Sequence[StagePlan]
) -> list[str] | None:
    """Assignments for ``--set`` with which all stages of a plan fit; [] if they do already, None if no value is known to help."""
    tight = [stage.stage for stage in stages if stage.seconds is None]
    if not tight:
        return []
    layers = fewer_layers(shapes, params, hardware, devices) if tight == ["capture"] else None
    return None if layers is None else [f"capture.layers_per_pass={layers}"]


def fewer_layers(shapes: ModelShapes, params: Params, hardware: Hardware, devices: int) -> int | None:
    """The most layers in one pass of stage capture, of halves, thirds and so on of all, whose unit fits."""
    count = len(shapes.layers)
    for layers in dict.fromkeys(-(-count // passes) for passes in range(2, count + 1)):
        capture = params.capture.model_copy(update={"layers_per_pass": layers})
        if plan_stage("capture", shapes, params.model_copy(update={"capture": capture}), hardware, devices).seconds:
            return layers
    return None


def command(assignments: Sequence[str], devices: int, on_gpus: bool) -> str:
    """The run that was planned."""
    engine = ["--engine", "ray", *(["--num-gpus", "1"] if on_gpus else [])] if devices > 1 else []
    chosen = [word for assignment in assignments for word in ("--set", assignment)]
    return shlex.join(["fisherfold", "run", *engine, *chosen])
