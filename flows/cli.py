"""The command `fisherfold`. Heavy imports happen inside the subcommand that needs them."""

import argparse
import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from stages.errors import FisherfoldError, ParameterError
from stages.params import STAGES, load_params
from stages.workspace import Workspace

PARAMS_FILE = "params.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; return its exit status: 0 well, 1 failed, 2 bad command line or parameters, 130 interrupted."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return options.command(options)
    except FisherfoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ParameterError) else 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: the disk is full ({error}). Finished units are kept: make room and run again.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: finished units are kept; run again to go on.", file=sys.stderr)
        return 130


def _interrupt(*_: object) -> NoReturn:
    """A request to end is what Ctrl-C is: what was started is ended, what is finished is kept."""
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fisherfold", description="Low-rank compression of language models, weighted by the Fisher information."
    )
    commands = parser.add_subparsers(title="commands", required=True)

    run = commands.add_parser("run", help="run the whole pipeline; stages that are up to date are skipped")
    run.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="STAGE.KEY=VALUE",
        help="change params.yaml first, e.g. ranks.ratio=0.4",
    )
    run.add_argument("--until", choices=STAGES, default=STAGES[-1], help="stop after this stage")
    run.set_defaults(command=_run)

    stage = commands.add_parser("stage", help="run one stage in this process (what dvc.yaml calls)")
    stage.add_argument("name", choices=STAGES)
    stage.set_defaults(command=_stage)

    status = commands.add_parser("status", help="show which stages are up to date, interrupted or stale")
    status.set_defaults(command=_status)
    return parser


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
    path = workspace.root / PARAMS_FILE
    if options.assignments:
        overridden(path, options.assignments)  # a mistake is found before a server starts, not after
    else:
        params = load_params(path)
        if stale_reasons(workspace):
            check_methods(params)  # imports the methods, seconds that a run with nothing to do need not spend

    from flows.pipeline import run_pipeline

    return run_pipeline(workspace, STAGES[: STAGES.index(options.until) + 1], options.assignments)


def _stage(options: argparse.Namespace) -> int:
    workspace = workspace_here()
    params = getattr(load_params(workspace.root / PARAMS_FILE), options.name)
    _compute_deterministically()
    from stages.scratch import clear_scratch

    for earlier in STAGES[: STAGES.index(options.name)]:
        clear_scratch(workspace, earlier)  # their outputs are committed by now
    importlib.import_module(f"stages.{options.name}").run(workspace, params)
    return 0


def _compute_deterministically() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def _status(_: argparse.Namespace) -> int:
    from flows.status import print_status

    print_status(workspace_here())
    return 0


if __name__ == "__main__":
    sys.exit(main())
