"""`fisherfold sweep`: one compressed model a combination of ratio, metric, allocator and seed, each a DVC experiment.

What combinations have in common is computed once: a stage whose parameters, and those of the stages before it, equal those
of another combination is restored from DVC's run-cache; while one combination computes such a stage, others wait for it.
A combination that is an experiment of this commit already is not run again, so a killed sweep goes on where it was.

artifacts/sweep/results.parquet, results.csv    one row a combination
artifacts/sweep/perplexity.png                  perplexity over the ratio, a line a metric and allocator
"""

import itertools
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from prefect import State, flow, task
from prefect.artifacts import create_image_artifact, create_table_artifact
from prefect.futures import wait
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from fisherfold.evaluation.verdict import worst_source
from fisherfold.run.errors import FisherfoldError
from fisherfold.run.files import digest_json
from fisherfold.run.params import STAGES, load_params
from fisherfold.run.progress import announce
from fisherfold.run.workspace import Workspace
from flows.api import prefect_api
from flows.artifacts import address
from flows.checked import record_check
from flows.engine_choice import ending_engine
from flows.exclusive import exclusive
from flows.experiments import Project
from flows.methods import metric_settings
from flows.settings import read_settings
from flows.stage_run import run_stage
from flows.tables import print_table
from flows.watch import ENDING

DIGITS = 7  # of an experiment's name, from the digest of all that determines it
SHOWN = {
    "experiment": "experiment",
    "kept": "kept",
    "perplexity": "perplexity",
    "kl_to_dense": "KL to dense",
    "knowledge_accuracy": "knowledge",
}
"""Columns in the terminal and their headings: the experiment's name begins with metric, allocator and ratio."""


@dataclass(frozen=True)
class Cell:
    """One combination; a seed of None leaves params.yaml's."""

    metric: str
    allocator: str
    ratio: float
    seed: int | None = None

    def overrides(self, others: Sequence[str] = ()) -> list[str]:
        """Parameters as ``--set`` takes them; `others` win over what the metric would need."""
        chosen = {f"subspace.metric={self.metric}", f"ranks.allocator={self.allocator}", f"ranks.ratio={self.ratio}"}
        needs = [f"{key}={value}" for key, value in metric_settings([self.metric]).items()]
        seeds = [f"{stage}.seed={self.seed}" for stage in ("prepare", "capture") if self.seed is not None]
        return [*needs, *others, *seeds, *sorted(chosen)]

    def __str__(self) -> str:
        return f"{self.metric}-{self.allocator}-{self.ratio:g}" + ("" if self.seed is None else f"-seed{self.seed}")


def cells(metrics: Sequence[str], allocators: Sequence[str], ratios: Sequence[float], seeds: Sequence[int | None]):
    """All combinations, those that share the most next to each other."""
    return [Cell(*values) for values in itertools.product(metrics, allocators, ratios, seeds)]


class StageLocks:
    """Locks of stages by what determines them: one combination at a time computes a stage that several have in common."""

    def __init__(self) -> None:
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def of(self, workspace: Workspace, stage: str) -> threading.Lock:
        """The lock of a stage with the parameters that it and the stages before it have in `workspace`."""
        params = load_params(workspace.root / "params.yaml").model_dump(mode="json")
        before = {name: params[name] for name in STAGES[: STAGES.index(stage) + 1]}
        return self._locks[digest_json(before)]


_stage_locks = StageLocks()


@task(task_run_name="{name}")
def run_cell(project: Project, name: str, overrides: list[str]) -> State:
    """Run one combination in a clone of the project, and make it a DVC experiment."""
    announce("sweep", f"{name} begins")
    clone = project.clone(name, overrides)
    record_check(clone)
    for stage in STAGES:
        with _stage_locks.of(clone, stage):
            state = run_stage(clone, stage, return_state=True)
        if not state.is_completed():
            return (Cancelled if state.is_cancelled() else Failed)(message=f"{name}: {state.message}")
    project.save(name, clone)
    announce("sweep", f"{name} is finished")
    return Completed(message=f"experiment {name}")


@flow(name="fisherfold-sweep")
def sweep_flow(workspace: Path, combinations: list[Cell], others: list[str]) -> list[dict] | State:
    """Run the combinations that are not finished, side by side; return the rows of all, in their order.

    Raises:
        FisherfoldError: the workspace is not in git.
    """
    project = Project.of(Workspace(workspace))
    names = {cell: f"{cell}-{project.digest(cell.overrides(others))[:DIGITS]}" for cell in combinations}
    with exclusive(project.workspace, lambda message: announce("sweep", message), "sweep"), ending_engine():
        failed = _run_unfinished(project, {name: cell.overrides(others) for cell, name in names.items()})
    if failed:
        end = Cancelled if any(state.is_cancelled() for state in failed) else Failed
        return end(message="; ".join(state.message or state.name for state in failed))
    metrics = project.metrics(names.values())
    rows = [row(cell, name, metrics[name]) for cell, name in names.items()]
    create_table_artifact(rows, "sweep", f"Combinations of {workspace}")
    create_image_artifact(address("image/png", draw(rows)), "sweep-perplexity", f"Perplexity over ratio, {workspace}")
    return rows


def _run_unfinished(project: Project, runs: dict[str, list[str]]) -> list[State]:
    """Run what is no experiment yet (overrides by name); return how those ended that failed."""
    kinds = {name[: -DIGITS - 1] for name in runs}
    project.forget(
        lambda name: name not in runs and name[: -DIGITS - 1] in kinds
    )  # of files or parameters that changed
    waiting = runs.keys() - project.metrics(runs).keys()
    if len(waiting) < len(runs):
        announce("sweep", f"{len(runs) - len(waiting)} of {len(runs)} combinations are finished already")
    futures = [run_cell.submit(project, name, overrides) for name, overrides in runs.items() if name in waiting]
    try:
        wait(futures)
    except BaseException:
        ENDING.set()
        raise
    return [future.state for future in futures if not future.state.is_completed()]


def sweep(workspace: Workspace, combinations: Sequence[Cell], others: Sequence[str] = (), jobs: int = 1) -> list[dict]:
    """Run combinations and return one row of results each, in their order.

    Args:
        workspace: the project; neither its files nor its outputs change.
        combinations: what to run.
        others: overrides of parameters that all have.
        jobs: combinations at a time.

    Raises:
        ParameterError: a parameter is not valid.
        FisherfoldError: a combination failed (those that are finished stay), or the workspace is not in git.
    """
    project = Project.of(workspace)
    others = [*_capture(combinations), *others]  # one capture serves all
    for cell in combinations:
        project.digest(cell.overrides(others))  # a mistake is found before a server starts, not after
    runner = ThreadPoolTaskRunner(max_workers=jobs)
    flow_here = sweep_flow.with_options(task_runner=runner)
    with prefect_api(read_settings().api_host):
        state = flow_here(workspace.root, list(combinations), list(others), return_state=True)
    result = state.result(raise_on_failure=False)
    if isinstance(result, FisherfoldError):
        raise result
    if not state.is_completed():
        raise FisherfoldError(f"The sweep is not finished; run it again to go on. {state.message}")
    return result


def _capture(combinations: Sequence[Cell]) -> list[str]:
    """What stage capture must keep for all combinations, as ``--set`` takes it."""
    needs = metric_settings(cell.metric for cell in combinations)
    return [f"{key}={value}" for key, value in needs.items() if key.startswith("capture.")]


def row(cell: Cell, name: str, metrics: dict) -> dict:
    """One row of the results: the combination, its experiment, and metrics.json laid flat."""
    size = metrics["size"]
    return {
        **asdict(cell),
        "experiment": name,
        "kept": size["targeted_parameters_compressed"] / size["targeted_parameters_dense"],
        "times_dense": next((ratio for _, ratio in worst_source(metrics)), None),
        **metrics["compressed"],
        **{f"{key}_dense": value for key, value in metrics["dense"].items()},
        **size,
    }


def write_results(workspace: Workspace, rows: Sequence[dict]) -> Path:
    """Write the table and the picture; return their folder."""
    folder = workspace.artifacts / "sweep"
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows))
    pq.write_table(table, folder / "results.parquet")
    pyarrow.csv.write_csv(table, folder / "results.csv")
    (folder / "perplexity.png").write_bytes(draw(rows))
    return folder


def draw(rows: Sequence[dict]) -> bytes:
    """A PNG picture: perplexity over ratio, as measured; a line a metric and allocator goes through means over seeds."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for each in rows:
        found[f"{each['metric']}, {each['allocator']}"][each["ratio"]].append(each["perplexity"])
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in found.items():
        ratios = sorted(points)
        (line,) = axes.plot(ratios, [sum(points[ratio]) / len(points[ratio]) for ratio in ratios], label=name)
        dots = [(ratio, value) for ratio in ratios for value in points[ratio]]
        axes.plot(*zip(*dots, strict=True), "o", color=line.get_color())
    axes.axhline(rows[0]["perplexity_dense"], color="grey", linestyle="--", label="dense")
    axes.set(xlabel="share of the targeted parameters removed", ylabel="perplexity", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    picture = BytesIO()
    figure.savefig(picture, dpi=120)
    return picture.getvalue()


def print_results(rows: Sequence[dict]) -> None:
    """The table in the terminal."""
    shown = [["–" if each[key] is None else _text(each[key]) for key in SHOWN] for each in rows]
    print_table([*SHOWN.values()], shown, right=[*SHOWN.values()][1:])


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
