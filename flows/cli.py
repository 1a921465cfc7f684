"""The command `fisherfold`. Heavy imports happen inside the subcommand that needs them."""

import argparse
import errno
import importlib
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fisherfold.run.errors import FisherfoldError, ParameterError
from fisherfold.run.params import STAGES, load_params
from fisherfold.run.workspace import Workspace

if TYPE_CHECKING:
    from flows.settings import Settings

PARAMS_FILE = "params.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; return its exit status: 0 well, 1 failed, 2 bad command line or parameters, 130 interrupted."""
    options = _parser().parse_args(arguments)
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: _interrupt(signals, received))
    try:
        return options.command(options)
    except Exception as error:
        if not signals:
            return _explain(error)
    except KeyboardInterrupt:
        pass
    print("interrupted: finished units are kept; run again to go on.", file=sys.stderr)
    return 130


def _explain(error: Exception) -> int:
    """Tell the user of an error that is theirs to read; any other goes on."""
    try:
        raise error
    except FisherfoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ParameterError) else 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: the disk is full ({error}). Finished units are kept: make room and run again.", file=sys.stderr)
        return 1


def _interrupt(signals: list[int], received: int) -> NoReturn:
    """A request to end is what Ctrl-C is: what was started is ended, what is finished is kept.

    It is noted, for an interruption inside some libraries' compiled code comes out as another exception.
    """
    signals.append(received)
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fisherfold", description="Low-rank compression of language models, weighted by the Fisher information."
    )
    commands = parser.add_subparsers(title="commands", required=True)
    _add_running(commands)
    _add_looking(commands)
    return parser


def _add_running(commands: argparse._SubParsersAction) -> None:
    """The commands that compute: run, serve, sweep, stage."""
    run = commands.add_parser("run", help="run the whole pipeline; stages that are up to date are skipped")
    _add_assignments(run, "change params.yaml first, e.g. ranks.ratio=0.4")
    run.add_argument("--until", choices=STAGES, default=STAGES[-1], help="stop after this stage")
    _add_engine_options(run)
    run.set_defaults(command=_run)

    serve = commands.add_parser("serve", help="run on a schedule, or when Prefect's API is asked for a run")
    when = serve.add_mutually_exclusive_group()
    when.add_argument("--cron", metavar="EXPRESSION", help="for instance '0 2 * * *'")
    when.add_argument("--interval", type=float, metavar="SECONDS", help="time between the starts of two runs")
    serve.add_argument("--timezone", default="UTC", help="of --cron (default: UTC)")
    serve.add_argument("--name", help="of the deployment (default: the folder's name)")
    _add_assignments(serve, "change params.yaml before each run, unless the run is given other overrides")
    serve.add_argument("--until", choices=STAGES, default=STAGES[-1], help="stop each run after this stage")
    _add_engine_options(serve)
    serve.set_defaults(command=_serve)

    sweep = commands.add_parser("sweep", help="compare combinations of methods and ratios as DVC experiments")
    sweep.add_argument("--ratios", type=_numbers, required=True, metavar="R,R,…", help="shares removed: 0.2,0.4,0.6")
    sweep.add_argument("--metrics", type=_names, metavar="NAME,…", help="(default: params.yaml's)")
    sweep.add_argument("--allocators", type=_names, metavar="NAME,…", help="(default: params.yaml's)")
    sweep.add_argument("--seeds", type=_numbers, metavar="N,…", help="of prepare and capture (default: params.yaml's)")
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="combinations at a time (default: 1)")
    _add_assignments(sweep, "a parameter of all combinations; params.yaml stays as it is")
    _add_engine_options(sweep)
    sweep.set_defaults(command=_sweep)

    stage = commands.add_parser("stage", help="run one stage in this process (what dvc.yaml calls)")
    stage.add_argument("name", choices=STAGES)
    stage.set_defaults(command=_stage)


def _add_looking(commands: argparse._SubParsersAction) -> None:
    """The commands that tell or tidy: status, store, doctor, plan."""
    status = commands.add_parser("status", help="show which stages are up to date, interrupted or stale")
    status.set_defaults(command=_status)
    store = commands.add_parser("store", help="look after what FISHERFOLD_STORE holds of this project")
    actions = store.add_subparsers(required=True)
    check = actions.add_parser(
        "check", help="can it be written and read, and is every object that artifacts/ names there in full?"
    )
    check.set_defaults(command=_check_store)
    clean = actions.add_parser("gc", help="list objects that neither artifacts/ nor DVC's cache names, or delete them")
    clean.add_argument("--delete", action="store_true", help="delete them for good")
    clean.add_argument("--days", type=float, default=7, help="leave what is younger (default: 7)")
    clean.add_argument(
        "--project", type=Path, action="append", default=[], help="another project that shares the prefix"
    )
    clean.set_defaults(command=_clean_store)

    doctor = commands.add_parser("doctor", help="find what would stop a run, here and on the cluster, with the cure")
    _add_engine_options(doctor)
    doctor.set_defaults(command=_doctor)

    plan = commands.add_parser("plan", help="time, disk, network and memory of a run, on paper, with what limits it")
    plan.add_argument("--model", metavar="NAME", help="of data/shapes, a folder, a hub name (default: prepare.model)")
    plan.add_argument("--gpus", default="1", metavar="1,4,32", help="numbers of devices to plan for")
    plan.add_argument("--gpu", default="cpu", metavar="PROFILE", help="of data/hardware.yaml: cpu, a100, h100")
    _add_assignments(plan, "plan with this instead of what params.yaml says")
    plan.add_argument("--json", action="store_true", help="for machines")
    plan.set_defaults(command=_plan)


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Options that stand for variables of the environment; see `flows.settings`."""
    engine = parser.add_argument_group(
        "engine", "where work runs; the same as FISHERFOLD_ENGINE and so on; changes no result"
    )
    engine.add_argument("--engine", choices=("inline", "ray"), help="this process (default), or a Ray cluster")
    engine.add_argument(
        "--address", metavar="HOST:PORT", help="of a running Ray; without it, one of this host is started"
    )
    engine.add_argument("--num-cpus", metavar="N", help="cores of a unit (default: the stage's parameter `threads`)")
    engine.add_argument("--num-gpus", metavar="N", help="GPUs of a unit (default: 0)")
    engine.add_argument("--memory", metavar="BYTES", help="memory of a unit, such as 16GB")


def _read_engine_options(options: argparse.Namespace) -> "Settings":
    from flows.settings import read_settings, set_environment

    set_environment(
        engine=options.engine,
        ray_address=options.address,
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        memory=options.memory,
    )
    return read_settings()


def _choose_engine(options: argparse.Namespace) -> None:
    from flows.cluster.cluster_checks import check_cluster
    from flows.engine_choice import require_engine
    from flows.findings import require

    settings = _read_engine_options(options)
    require_engine(settings)
    if settings.engine == "ray":
        require(check_cluster(settings, workspace_here()))


def _add_assignments(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="STAGE.KEY=VALUE", help=text)


def workspace_here() -> Workspace:
    """The project folder: the nearest one upwards that holds params.yaml and dvc.yaml.

    Raises:
        ParameterError: there is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / PARAMS_FILE).exists() and (folder / "dvc.yaml").exists():
            return Workspace(folder)
    raise ParameterError(
        f"{here} is not inside a Fisherfold project: no {PARAMS_FILE} beside a dvc.yaml here or above."
    )


def _run(options: argparse.Namespace) -> int:
    from flows.methods import check_methods
    from flows.overrides import overridden
    from flows.staleness import stale_reasons

    workspace = workspace_here()
    _choose_engine(options)
    path = workspace.root / PARAMS_FILE
    if options.assignments:
        overridden(path, options.assignments)  # a mistake is found before a server starts, not after
    else:
        params = load_params(path)
        if stale_reasons(workspace):
            check_methods(params)  # imports the methods, seconds that a run with nothing to do need not spend

    from flows.pipeline import run_pipeline

    return run_pipeline(workspace, STAGES[: STAGES.index(options.until) + 1], options.assignments)


def _serve(options: argparse.Namespace) -> int:
    from flows.overrides import overridden
    from flows.schedule import Timetable, serve

    _choose_engine(options)
    workspace = workspace_here()
    overridden(workspace.root / PARAMS_FILE, options.assignments)
    timetable = Timetable(options.cron, options.interval, options.timezone)
    stages = STAGES[: STAGES.index(options.until) + 1]
    serve(workspace, options.name or workspace.root.name, timetable, stages, options.assignments)
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from flows.overrides import overridden

    _choose_engine(options)
    workspace = workspace_here()
    _, params = overridden(workspace.root / PARAMS_FILE, options.assignments)
    metrics, allocators = options.metrics or [params.subspace.metric], options.allocators or [params.ranks.allocator]

    from flows.sweep import cells, print_results, sweep, write_results

    combinations = cells(metrics, allocators, options.ratios, [int(seed) for seed in options.seeds or ()] or [None])
    rows = sweep(workspace, combinations, options.assignments, options.jobs)
    folder = write_results(workspace, rows)
    print_results(rows)
    print(f"{folder}: results.parquet, results.csv, perplexity.png; also `dvc exp show`")
    return 0


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _stage(options: argparse.Namespace) -> int:
    workspace = workspace_here()
    params = getattr(load_params(workspace.root / PARAMS_FILE), options.name)
    from fisherfold.run.determinism import compute_deterministically
    from fisherfold.run.scratch import clear_scratch
    from flows.engine_choice import run_on_engine
    from flows.settings import read_settings

    settings = read_settings()
    compute_deterministically()
    for earlier in STAGES[: STAGES.index(options.name)]:
        clear_scratch(workspace, earlier)  # their outputs are committed by now
    stage = importlib.import_module(f"stages.{options.name}")
    run_on_engine(options.name, partial(stage.run, workspace, params), settings, getattr(params, "threads", None))
    return 0


def _status(_: argparse.Namespace) -> int:
    from flows.status import print_status

    print_status(workspace_here())
    return 0


def _check_store(_: argparse.Namespace) -> int:
    from flows.storage import check_store

    return check_store(workspace_here())


def _clean_store(options: argparse.Namespace) -> int:
    from flows.storage import clean_store

    return clean_store([workspace_here(), *map(Workspace, options.project)], options.days, options.delete)


def _doctor(options: argparse.Namespace) -> int:
    from flows.doctor import examine
    from flows.findings import print_findings

    return print_findings(examine(workspace_here(), _read_engine_options(options)))


def _plan(options: argparse.Namespace) -> int:
    from flows.overrides import overridden
    from flows.planning.plan import as_json, plan_run, print_plans, read_hardware
    from flows.planning.shapes import find_shapes

    workspace = workspace_here()
    path = workspace.root / PARAMS_FILE
    params = overridden(path, options.assignments)[1] if options.assignments else load_params(path)
    hardware = read_hardware(workspace, options.gpu)
    shapes = find_shapes(workspace, options.model or params.prepare.model)
    plans = {number: plan_run(shapes, params, hardware, number) for number in _counts(options.gpus)}
    if options.json:
        print(as_json(shapes, plans, options.gpu))
    else:
        print_plans(shapes, plans, options.gpu)
    return 0


def _counts(text: str) -> list[int]:
    """Numbers of devices from a list such as ``1,4,32``."""
    numbers = text.split(",")
    if not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise ParameterError(f"--gpus {text}: expected positive numbers, for instance 1,4,32.")
    return [int(number) for number in numbers]


if __name__ == "__main__":
    sys.exit(main())
