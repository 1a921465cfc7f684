"""The commands that tell: status, doctor, plan."""

import json as json_text
from typing import Annotated

from typer import Option

from fisherfold.run.errors import ParameterError
from flows.commands.options import (
    PARAMS_FILE,
    Assignments,
    EngineOptions,
    Json,
    project_here,
    shipped_data,
    with_engine,
    workspace_here,
)


def status(json: Json = False) -> int:
    """Show which stages are up to date, running, interrupted or stale, and why."""
    from flows.status import print_status, seconds_left, stage_states

    workspace = workspace_here()
    if json:
        states = stage_states(workspace)
        print(json_text.dumps({"stages": states, "seconds_left": seconds_left(workspace, states)}, indent=1))
    else:
        print_status(workspace)
    return 0


@with_engine
def doctor(engine_options: EngineOptions, json: Json = False) -> int:
    """Find what would stop a run, here and on the cluster, with the cure."""
    from flows.doctor import examine
    from flows.findings import any_stops, print_findings

    findings = examine(project_here(), engine_options.settings())
    if not json:
        return print_findings(findings)
    print(json_text.dumps([finding._asdict() for finding in findings], indent=1))
    return int(any_stops(findings))


def plan(
    model: Annotated[
        str | None, Option(metavar="NAME", help="Of data/shapes, a folder, a hub name (default: prepare.model).")
    ] = None,
    gpus: Annotated[str, Option(metavar="1,4,32", help="Numbers of devices to plan for.")] = "1",
    gpu: Annotated[str, Option(metavar="PROFILE", help="Of data/hardware.yaml: cpu, a100, h100.")] = "cpu",
    memory: Annotated[
        float | None, Option(metavar="GB", min=0, help="Of one device, instead of the profile's.")
    ] = None,
    disk: Annotated[float | None, Option(metavar="GB", min=0, help="That stage capture may take.")] = None,
    assignments: Assignments = [],  # noqa: B006
    json: Json = False,
) -> int:
    """Tell time, disk, network and memory of a run, on paper, what limits it, and a command that fits."""
    counts = _counts(gpus)
    project = project_here() if model else workspace_here()
    from fisherfold.run.params import load_params
    from flows.overrides import given, overridden
    from flows.planning.plan import as_json, plan_run, print_plans, read_hardware
    from flows.planning.proposal import command, incurable, propose
    from flows.planning.shapes import find_shapes

    if project:
        path = project.root / PARAMS_FILE
        params = overridden(path, assignments)[1] if assignments else load_params(path)
    else:
        params = given(assignments)
    data = project or shipped_data()
    shapes = find_shapes(data, model or params.prepare.model)
    hardware = read_hardware(data, gpu)
    hardware = hardware.model_copy(update={"memory": memory * 1e9}) if memory else hardware
    plans = {number: plan_run(shapes, params, hardware, number) for number in counts}
    if json:
        print(as_json(shapes, plans, gpu))
    else:
        print_plans(shapes, plans, gpu)
        for number, stages in plans.items():
            proposed = propose(shapes, params, hardware, number, stages, disk and disk * 1e9)
            if proposed is not None:
                print(f"{number} x {gpu}: {command([*assignments, *proposed], number, on_gpus=gpu != 'cpu')}")
            if others := incurable(shapes, params, hardware, number, stages):
                print(f"{number} x {gpu}: no parameter makes stage {', '.join(others)} fit")
    return 0


def _counts(text: str) -> list[int]:
    """Numbers of devices from a list such as ``1,4,32``."""
    numbers = text.split(",")
    if not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise ParameterError(f"--gpus {text}: expected positive numbers, for instance 1,4,32.")
    return [int(number) for number in numbers]
