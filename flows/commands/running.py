"""The commands that compute: run, stage, check, sweep, serve."""

import importlib
import sys
import time
from functools import partial
from typing import Annotated

from typer import Argument, BadParameter, Option

from fisherfold.run.workspace import STAGES
from flows.commands.options import (
    PARAMS_FILE,
    Assignments,
    EngineOptions,
    StageName,
    Until,
    stages_until,
    with_engine,
    workspace_here,
)


@with_engine
def run(
    engine_options: EngineOptions,
    assignments: Assignments = [],  # noqa: B006
    until: Until = STAGES[-1],
    dry: Annotated[bool, Option("--dry", help="Only tell which stages would run, and why.")] = False,
    quiet: Annotated[bool, Option("-q", "--quiet", help="Tell errors and the outcome alone.")] = False,
    verbose: Annotated[bool, Option("-v", "--verbose", help="Let DVC and the libraries speak, too.")] = False,
) -> int:
    """Run the whole pipeline; stages that are up to date are skipped."""
    workspace, start = workspace_here(), time.monotonic()
    from fisherfold.run.presets import own_values
    from flows.overrides import assigned

    stages = stages_until(until)
    _, params = assigned(workspace.root / PARAMS_FILE, assignments)
    if not quiet:  # what follows imports for seconds
        own = ", ".join(own_values(params.preset, params.model_dump(mode="json")))
        preset = f"preset {params.preset}{own and f', but {own}'}"
        print(f"fisherfold: looks at what is to do in {workspace.root} ({preset})", file=sys.stderr, flush=True)
    from fisherfold.run.progress import be_quiet
    from flows.dry_run import print_dry_run
    from flows.outcome import tell_outcome
    from flows.preflight import preflight
    from flows.staleness import stale_reasons
    from flows.verbosity import be_verbose, silence_libraries

    be_quiet(quiet)
    be_verbose(verbose)
    silence_libraries()
    engine_options.require(workspace)
    if assignments or stale_reasons(workspace):
        preflight(workspace, params)  # a mistake is found before a server starts, and before DVC removes an output
    if dry:
        print_dry_run(workspace, stages, assignments)
        return 0
    from flows.pipeline import run_pipeline

    status = run_pipeline(workspace, stages, assignments)
    if not status:
        tell_outcome(workspace, params, stages, time.monotonic() - start)
    return status


@with_engine
def serve(
    engine_options: EngineOptions,
    cron: Annotated[str | None, Option(metavar="EXPRESSION", help="When runs start: '0 2 * * *'.")] = None,
    interval: Annotated[
        float | None, Option(metavar="SECONDS", help="Or the time between the starts of two runs.")
    ] = None,
    timezone: Annotated[str, Option(help="Of --cron.")] = "UTC",
    name: Annotated[str | None, Option(help="Of the deployment (default: the folder's name).")] = None,
    assignments: Assignments = [],  # noqa: B006
    until: Until = STAGES[-1],
) -> int:
    """Run on a schedule, or when Prefect's API is asked for a run."""
    if cron is not None and interval is not None:
        raise BadParameter("--cron and --interval exclude each other.")
    workspace = workspace_here()
    engine_options.require(workspace)
    from flows.overrides import overridden
    from flows.schedule import Timetable
    from flows.schedule import serve as serve_runs

    overridden(workspace.root / PARAMS_FILE, assignments)
    timetable = Timetable(cron, interval, timezone)
    serve_runs(workspace, name or workspace.root.name, timetable, stages_until(until), assignments)
    return 0


def _names(text: str | None) -> list[str]:
    return text.split(",") if text else []


def _numbers(text: str | None) -> list[float]:
    try:
        return [float(number) for number in _names(text)]
    except ValueError:
        raise BadParameter(f"{text!r}: expected numbers, for instance 0.2,0.4.") from None


@with_engine
def sweep(
    engine_options: EngineOptions,
    ratios: Annotated[str, Option(metavar="R,R,…", help="Shares removed: 0.2,0.4,0.6.")],
    metrics: Annotated[str | None, Option(metavar="NAME,…", help="(default: params.yaml's)")] = None,
    allocators: Annotated[str | None, Option(metavar="NAME,…", help="(default: params.yaml's)")] = None,
    seeds: Annotated[str | None, Option(metavar="N,…", help="Of prepare and capture (default: params.yaml's).")] = None,
    jobs: Annotated[int, Option(min=1, help="Combinations at a time.")] = 1,
    assignments: Assignments = [],  # noqa: B006
) -> int:
    """Compare combinations of methods and ratios as DVC experiments; params.yaml stays as it is."""
    shares, draws = _numbers(ratios), [int(seed) for seed in _numbers(seeds)] or [None]
    workspace = workspace_here()
    engine_options.require(workspace)
    from flows.overrides import overridden

    _, params = overridden(workspace.root / PARAMS_FILE, assignments)

    from flows.sweep import cells, print_results, write_results
    from flows.sweep import sweep as run_sweep

    chosen = _names(metrics) or [params.subspace.metric], _names(allocators) or [params.ranks.allocator]
    rows = run_sweep(workspace, cells(*chosen, shares, draws), assignments, jobs)
    folder = write_results(workspace, rows)
    print_results(rows)
    print(f"{folder}: results.parquet, results.csv, perplexity.png; also `dvc exp show`")
    return 0


def check() -> int:
    """Check parameters and inputs (the first stage of dvc.yaml)."""
    from fisherfold.run.params import load_params
    from flows.checked import write_checked
    from flows.preflight import preflight
    from flows.verbosity import silence_libraries

    workspace = workspace_here()
    silence_libraries()
    preflight(workspace, load_params(workspace.root / PARAMS_FILE))
    write_checked(workspace)
    return 0


def stage(name: Annotated[StageName, Argument(help="Which.", show_choices=True)]) -> int:
    """Run one stage in this process (what dvc.yaml calls)."""
    from fisherfold.run.determinism import compute_deterministically, placed
    from fisherfold.run.params import load_params
    from fisherfold.run.progress import begin
    from fisherfold.run.scratch import clear_scratch, forget_output
    from fisherfold.run.times import timed
    from flows.engine_choice import run_on_engine
    from flows.forced import is_forced
    from flows.foresight import foresee
    from flows.settings import read_settings
    from flows.verbosity import silence_libraries

    workspace = workspace_here()
    every = load_params(workspace.root / PARAMS_FILE)
    params = getattr(every, name)
    settings = read_settings()
    compute_deterministically()
    for earlier in stages_until(name)[:-1]:
        clear_scratch(workspace, earlier)  # their outputs are committed by now
    if is_forced():
        forget_output(workspace, name)
    silence_libraries()
    begin(name)
    module = importlib.import_module(f"stages.{name}")
    further = {"look_ahead": partial(foresee, every)} if name == "prepare" else {}
    with timed(workspace, name), placed(every.capture.placement):  # changes no bit of any stage's output
        run_on_engine(
            name, partial(module.run, workspace, params, **further), settings, getattr(params, "threads", None)
        )
    return 0
