"""`fisherfold plan`: what a run will cost, stage by stage, and what limits it, before anything runs and without weights.

Operations and bytes come from `stage_costs`, speeds from data/hardware.yaml, the order of units from a simulation of the engine's own
scheduling. Times are estimates; bytes of Zarr groups are exact.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from fisherfold.run.errors import ParameterError
from fisherfold.run.params import Params
from fisherfold.run.workspace import Workspace
from fisherfold.run.yaml_text import parse_yaml
from flows.planning.shapes import ModelShapes
from flows.planning.simulation import Schedule, Task, simulate
from flows.planning.stage_costs import STAGE_COSTS, Demand, StageCost
from flows.tables import print_table

USABLE = 0.9  # of a device's memory; the rest is the library's own
NEAR = 0.8  # share of a stage's time that makes something its limit
KINDS = {
    "model": "passes through the model",
    "products": "Gram products and sketches",
    "eigen": "eigendecompositions",
    "svd": "singular value decompositions",
    "host": "work on the processor (conversion, pivoted gauge)",
    "traffic": "the device's memory bandwidth",
    "read": "reading and checking",
    "written": "writing, checksums and digests",
}


class Hardware(BaseModel):
    """A profile of data/hardware.yaml, where every figure is described."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bfloat16: PositiveFloat
    float32: PositiveFloat
    tf32: PositiveFloat
    products: PositiveFloat
    eigen: PositiveFloat
    svd: PositiveFloat
    host: PositiveFloat
    traffic: PositiveFloat
    memory: PositiveFloat
    read: PositiveFloat
    write: PositiveFloat
    node: PositiveFloat
    store: PositiveFloat
    hash: PositiveFloat
    devices: PositiveInt
    unit: float
    start: float
    stage: float

    def seconds(self, demand: Demand, dtype: str, workers: int) -> dict[str, float]:
        """Seconds of each kind of work, with `workers` of them on the store at once."""
        share = min(self.node / min(workers, self.devices), self.store / workers)
        return {
            "model": demand.model / (self.bfloat16 if dtype != "float32" else self.float32),
            "products": demand.products / (self.tf32 if dtype != "float32" else self.products),
            "eigen": demand.eigen / self.eigen,
            "svd": demand.svd / self.svd,
            "host": demand.host / self.host,
            "traffic": demand.traffic / self.traffic,
            "read": demand.read / min(self.read, share),
            "written": demand.written / min(self.write, share),
        }


@dataclass(frozen=True)
class StagePlan:
    """What one stage will cost on some devices.

    Attributes:
        stage: its name.
        seconds: how long; None if it does not fit.
        units: how many pieces of work.
        workers: that work on them at once.
        devices: GPUs of one worker.
        disk: bytes held at most.
        published: bytes of the output.
        network: bytes between nodes and the store.
        memory: bytes that a unit holds on its devices.
        limit: what would have to change to make it faster, or to make it fit.
    """

    stage: str
    seconds: float | None
    units: int
    workers: int
    devices: int
    disk: float
    published: float
    network: float
    memory: float
    limit: str


def read_hardware(workspace: Workspace, name: str) -> Hardware:
    """One profile.

    Raises:
        ParameterError: there is none of this name.
    """
    profiles = parse_yaml(workspace.root / "data" / "hardware.yaml")
    if name not in profiles:
        raise ParameterError(f"--gpu {name!r} is unknown. data/hardware.yaml has {', '.join(profiles)}.")
    return Hardware.model_validate(profiles[name])


def plan_run(shapes: ModelShapes, params: Params, hardware: Hardware, devices: int) -> list[StagePlan]:
    """The plan of every stage on so many devices."""
    return [plan_stage(stage, shapes, params, hardware, devices) for stage in STAGE_COSTS]


def plan_stage(stage: str, shapes: ModelShapes, params: Params, hardware: Hardware, devices: int) -> StagePlan:
    """The plan of one stage: workers from its memory, times from its demands, the whole from the simulation."""
    memory = STAGE_COSTS.lookup(stage)(shapes, params, 1).memory
    each = max(1, -(-int(memory) // int(USABLE * hardware.memory)))
    workers = max(1, devices // each)
    cost = STAGE_COSTS.lookup(stage)(shapes, params, workers)
    moved = sum((demand.read + demand.written for demand, _ in cost.units.values()), start=0.0)
    busy = min(workers, len(cost.units))  # a worker without a unit reads nothing
    loads = cost.loads * min(busy, -(-busy * each // hardware.devices))
    plan = StagePlan(
        stage, None, len(cost.units), workers, each, cost.peak, cost.published, moved + loads, cost.memory, ""
    )
    if each > devices:
        return _changed(
            plan, limit=f"does not fit: a unit needs {each} devices ({cost.memory / 1e9:.0f} GB)" + _slices(stage)
        )
    spent = {name: hardware.seconds(demand, cost.dtype, busy) for name, (demand, _) in cost.units.items()}
    tasks = {name: Task(hardware.unit + sum(spent[name].values()), after) for name, (_, after) in cost.units.items()}
    start = hardware.start + hardware.seconds(Demand(read=cost.loads), cost.dtype, busy)["read"]
    schedule = simulate(tasks, workers, start)
    joined = sum(hardware.seconds(cost.serial, cost.dtype, 1).values())
    head = hardware.stage + joined + cost.published / hardware.hash
    kinds = {kind: sum(one[kind] for one in spent.values()) for kind in KINDS}
    return _changed(plan, seconds=schedule.makespan + head, limit=_limit(schedule, workers, start, head, kinds, cost))


def _changed(plan: StagePlan, **values: object) -> StagePlan:
    return StagePlan(**{**asdict(plan), **values})


def _slices(stage: str) -> str:
    return "; lower capture.layers_per_pass, or stream" if stage == "capture" else ""


def _limit(
    schedule: Schedule, workers: int, start: float, head: float, kinds: dict[str, float], cost: StageCost
) -> str:
    """The largest part of a stage's time, in words."""
    ideal = schedule.work / workers
    waits = max(0.0, schedule.makespan - start - ideal)
    most = max(kinds, key=kinds.__getitem__)
    parts = {
        f"head: digests and links of {cost.published / 1e9:.3g} GB"
        if cost.published > 1e8
        else "start of the stage": head,
        "start of the workers, which load the model": start,
        KINDS[most]: ideal,
        _waiting(schedule, workers): waits,
    }
    return max(parts, key=parts.__getitem__)


def _waiting(schedule: Schedule, workers: int) -> str:
    """Why workers are idle."""
    if schedule.longest_chain >= NEAR * schedule.makespan and schedule.units > workers:
        return "longest chain: the tree of sums, or the largest unit alone"
    return f"{schedule.units} units over {workers} workers"


def total(stages: Sequence[StagePlan]) -> float | None:
    """Seconds of all stages; None if one does not fit."""
    seconds = [stage.seconds for stage in stages]
    return None if None in seconds else sum(seconds)


def print_plans(shapes: ModelShapes, plans: dict[int, list[StagePlan]], profile: str) -> None:
    """For every number of devices a table of what each stage costs, and one of what limits it."""
    targeted = f"{shapes.targeted / 1e9:.3g} B in {len(shapes.layers)} targeted layers"
    active = f" ({shapes.active / shapes.parameters:.0%} of them active for a token)" if shapes.chosen else ""
    print(f"{shapes.name}: {shapes.parameters / 1e9:.3g} B parameters{active}, {targeted}")
    numbers = ("time", "units", "workers", "disk", "published", "network", "memory")
    for devices, stages in plans.items():
        moved = _bytes(sum(stage.network for stage in stages))
        whole = ("all", _time(total(stages)), "", "", _bytes(disk_needed(stages)), "", moved, "")
        rows = [*map(_cells, stages), whole]
        print_table(("stage", *numbers), rows, right=numbers, title=f"{devices} x {profile}, memory of one unit")
        print_table(("stage", "limit"), [(stage.stage, stage.limit) for stage in stages])


def disk_needed(stages: Sequence[StagePlan]) -> float:
    """Bytes of all outputs and of the scratch of the stage that needs most: outputs of earlier stages stay."""
    before, most = 0.0, 0.0
    for stage in stages:
        most = max(most, before + max(stage.disk, stage.published))
        before += stage.published
    return most


def _cells(one: StagePlan) -> tuple[str, ...]:
    workers = f"{one.workers}" if one.devices == 1 else f"{one.workers} x {one.devices}"
    sizes = (_bytes(one.disk), _bytes(one.published), _bytes(one.network), _bytes(one.memory))
    return (one.stage, _time(one.seconds), str(one.units), workers, *sizes)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return "-" if number < 1e5 else f"{number / 1e6:.1g} MB"


def as_json(shapes: ModelShapes, plans: dict[int, list[StagePlan]], profile: str) -> str:
    """The plans for machines: seconds and bytes."""
    return json.dumps(
        {
            "model": shapes.name,
            "parameters": shapes.parameters,
            "targeted_parameters": shapes.targeted,
            **({"active_parameters": shapes.active} if shapes.chosen else {}),
            "hardware": profile,
            "plans": {
                str(devices): {
                    "seconds": total(stages),
                    "disk": disk_needed(stages),
                    "stages": [asdict(stage) for stage in stages],
                }
                for devices, stages in plans.items()
            },
        },
        sort_keys=True,
    )
