"""Perplexity of every metric from one capture, on a project that has run stages prepare, capture and kronecker.

    python benchmarks/quality.py                                   # five metrics with uniform ranks, kfac with fisher ranks
    python benchmarks/quality.py --runs kfac:fisher,kfac:fermigrad --ratios 0.2,0.4,0.6
    python benchmarks/quality.py --quick                           # kfac:fisher alone, from the bases that the project has

The stages run in a copy of the project (files are linked, not copied); params.yaml gives every other parameter. Knowledge questions
are left out.
"""

import argparse
import json
import os
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

from stages import evaluate, factorize, ranks, subspace
from stages.params import EvaluateParams, Params, load_params
from stages.tables import QUESTIONS, write_table
from stages.workspace import Workspace

ORDER = ("svd", "asvd", "fwsvd", "svd_llm", "kfac")
RUNS = ",".join([*(f"{metric}:uniform" for metric in ORDER), "kfac:fisher"])
LIMIT = 1.8  # times the dense perplexity, kfac with fisher ranks at ratio 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--runs", default=RUNS, help="METRIC:ALLOCATOR,…")
    parser.add_argument("--ratios", default="0.2")
    parser.add_argument("--storage", default=None, help="factors or pivoted, instead of params.yaml's")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    project = options.project.resolve()
    params = load_params(project / "params.yaml")
    runs = [tuple(run.split(":")) for run in ("kfac:fisher" if options.quick else options.runs).split(",")]
    ratios = [float(ratio) for ratio in options.ratios.split(",")]
    with tempfile.TemporaryDirectory(dir=project, suffix=".partial") as folder:
        workspace = link_project(project, Path(folder), with_bases=options.quick)
        found = measure(workspace, params, runs, ratios, options.storage or params.ranks.storage)
    report(found, ratios[0])


def link_project(project: Path, folder: Path, with_bases: bool) -> Workspace:
    """A workspace with the project's finished stages up to kronecker (or subspace), and no questions."""
    workspace = Workspace(folder)
    for stage in ("prepare", "capture", "kronecker", *(["subspace"] if with_bases else [])):
        shutil.copytree(project / "artifacts" / stage, workspace.out(stage), copy_function=os.link)
    for table in ("calibration", "tuning", "evaluation"):
        workspace.table(table).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(project / "data" / "prepared" / f"{table}.parquet", workspace.table(table))
    write_table(workspace.table("questions"), QUESTIONS.empty_table(), 0)
    return workspace


def measure(workspace: Workspace, params: Params, runs: list[tuple], ratios: list[float], storage: str) -> dict:
    """Perplexities (dense, compressed) and KL by (metric, allocator, ratio), printed as they come."""
    print(f"{'metric':10} {'allocator':12} {'ratio':>5} {'removed':>8} {'dense':>8} {'compressed':>12} {'KL':>8}")
    found, last = {}, params.subspace.metric if workspace.out("subspace").exists() else None
    for metric, allocator in runs:
        if metric != last:
            subspace.run(workspace, params.subspace.model_copy(update={"metric": metric}))
            last = metric
        for ratio in ratios:
            update = {"allocator": allocator, "ratio": ratio, "storage": storage}
            ranks.run(workspace, params.ranks.model_copy(update=update))
            factorize.run(workspace, params.factorize)
            evaluate.run(workspace, EvaluateParams(dtype=params.evaluate.dtype, batch_size=params.evaluate.batch_size))
            metrics = json.loads((workspace.out("evaluate") / "metrics.json").read_text())
            found[metric, allocator, ratio] = metrics
            size = metrics["size"]
            removed = 1 - size["targeted_parameters_compressed"] / size["targeted_parameters_dense"]
            print(
                f"{metric:10} {allocator:12} {ratio:5.2f} {removed:8.4f} {metrics['dense']['perplexity']:8.2f} "
                f"{metrics['compressed']['perplexity']:12.2f} {metrics['compressed']['kl_to_dense']:8.4f}",
                flush=True,
            )
    return found


def report(found: dict, ratio: float) -> None:
    """The figures of the runs that were made, one line of JSON each."""
    uniform = [
        found[metric, "uniform", ratio]["compressed"]["perplexity"]
        for metric in ORDER
        if (metric, "uniform", ratio) in found
    ]
    if len(uniform) == len(ORDER):
        falling = all(worse > better for worse, better in pairwise(uniform))
        print_figure(
            f"perplexity falls along {' > '.join(ORDER)}, uniform ranks, ratio {ratio}", uniform, "", "falling", falling
        )
    if ("kfac", "fisher", ratio) in found:
        metrics = found["kfac", "fisher", ratio]
        value = metrics["compressed"]["perplexity"] / metrics["dense"]["perplexity"]
        print_figure(f"perplexity of kfac, fisher ranks, ratio {ratio}", value, "× dense", LIMIT, value <= LIMIT)


def print_figure(figure: str, value: object, unit: str, target: object, holds: bool) -> None:
    print(json.dumps({"figure": figure, "value": value, "unit": unit, "target": target, "holds": holds}))


if __name__ == "__main__":
    main()
