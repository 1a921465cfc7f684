"""Perplexity of every metric from one capture, in a sweep of the project (flows/sweep.py), which stays as it is.

    python benchmarks/quality.py                                   # five metrics with uniform ranks, kfac with fisher ranks
    python benchmarks/quality.py --runs kfac:fisher,kfac:fermigrad --ratios 0.2,0.4,0.6
    python benchmarks/quality.py --runs kfac:fisher,kfac:fermigrad --ratios 0.2,0.4,0.6 --seeds 0,1,2     # calibration draws
    python benchmarks/quality.py --quick                           # kfac:fisher alone, which a project that has run has already

params.yaml gives every other parameter; what a run or a sweep has computed before is not computed again. With --seeds, which wants a
project that has run stage prepare, the texts are drawn and captured anew for every seed, from the project's prepared model, and the perplexity is
that of the truncated network itself: no checkpoint is written, as the pivoted gauge loses nothing (benchmarks/pivga.py).
"""

import argparse
import json
import math
import os
import shutil
import tempfile
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import torch
from figures import at_most, figure

from fisherfold.allocators.cost import DENSE
from fisherfold.allocators.fermi_descent import Softened, softened_model
from fisherfold.allocators.fermigrad import next_token_loss
from fisherfold.inputs.corpora import find_corpora
from fisherfold.inputs.questions import find_questions
from fisherfold.inputs.written_text import WrittenText
from fisherfold.network.models import load_model
from fisherfold.run.params import Params, load_params
from fisherfold.run.tables import read_sequences
from fisherfold.run.workspace import Workspace
from flows.sweep import Cell, print_results, sweep
from stages import capture, kronecker, prepare, ranks, subspace

ORDER = ("svd", "asvd", "fwsvd", "svd_llm", "kfac")
RUNS = ",".join([*(f"{metric}:uniform" for metric in ORDER), "kfac:fisher"])
LIMIT = 1.8  # times the dense perplexity, kfac with fisher ranks at ratio 0.2
BEST = {0.2: 1.2, 0.4: 2.0}  # times the dense perplexity, kfac with the best allocator
AGAINST_FISHER = {0.2: 1.0, 0.4: 0.95, 0.6: 0.95}  # perplexity with fermigrad ranks over that with fisher ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--runs", default=RUNS, help="METRIC:ALLOCATOR,…")
    parser.add_argument("--ratios", default="0.2")
    parser.add_argument("--storage", default=None, help="factors or pivoted, instead of params.yaml's")
    parser.add_argument("--seeds", default=None, help="calibration draws (prepare.seed), such as 0,1,2")
    parser.add_argument("--calibration", type=int, default=None, help="sequences of a draw, instead of params.yaml's")
    parser.add_argument("--tuning", type=int, default=None, help="tuning sequences of a draw, likewise")
    parser.add_argument(
        "--draws", type=Path, default=None, help="folder to keep the draws in, for a run that goes on from them"
    )
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    project = options.project.resolve()
    params = load_params(project / "params.yaml")
    runs = [tuple(run.split(":")) for run in ("kfac:fisher" if options.quick else options.runs).split(",")]
    ratios = [float(ratio) for ratio in options.ratios.split(",")]
    if options.seeds:
        seeds = [int(seed) for seed in options.seeds.split(",")]
        sizes = {"calibration_sequences": options.calibration, "tuning_sequences": options.tuning}
        drawn = params.prepare.model_copy(update={name: size for name, size in sizes.items() if size})
        stored = params.ranks.model_copy(update={"storage": options.storage or params.ranks.storage})
        params = params.model_copy(update={"prepare": drawn, "ranks": stored})
        with keeping(options.draws, project) as folder:
            return report_draws(measure_draws(project, folder, params, runs, ratios, seeds))
    combinations = [Cell(metric, allocator, ratio) for metric, allocator in runs for ratio in ratios]
    rows = sweep(Workspace(project), combinations, [f"ranks.storage={options.storage}"] if options.storage else [])
    print_results(rows)
    report({(row["metric"], row["allocator"], row["ratio"]): row for row in rows}, ratios[0])


def keeping(folder: Path | None, project: Path) -> AbstractContextManager[str]:
    """A folder for the draws: `folder`, or one in the project that goes away."""
    return nullcontext(str(folder.resolve())) if folder else tempfile.TemporaryDirectory(dir=project, suffix=".partial")


def measure_draws(
    project: Path, folder: str, params: Params, runs: list[tuple], ratios: list[float], seeds: list[int]
) -> dict[tuple, float]:
    """Perplexity over that of the dense model by (metric, allocator, ratio, seed), printed as they come."""
    print(f"{'seed':>4} {'metric':10} {'allocator':12} {'ratio':>5} {'dense':>8} {'compressed':>12} {'× dense':>8}")
    found: dict[tuple, float] = {}
    for seed in seeds:
        drawn = params.prepare.model_copy(update={"seed": seed})
        workspace = draw(project, Path(folder) / f"seed-{seed}", params.model_copy(update={"prepare": drawn}))
        dense, last = perplexity(workspace, {}), None
        for metric, allocator in runs:
            if metric != last:
                subspace.run(workspace, params.subspace.model_copy(update={"metric": metric}))
                last = metric
            for ratio in ratios:
                ranks.run(workspace, params.ranks.model_copy(update={"allocator": allocator, "ratio": ratio}))
                compressed = perplexity(workspace, read_ranks(workspace))
                found[metric, allocator, ratio, seed] = compressed / dense
                print(
                    f"{seed:4} {metric:10} {allocator:12} {ratio:5.2f} {dense:8.2f} {compressed:12.2f} {compressed / dense:8.3f}",
                    flush=True,
                )
    return found


def draw(project: Path, folder: Path, params: Params) -> Workspace:
    """A workspace with the project's model, tables drawn by ``params.prepare.seed``, and the stages up to kronecker."""
    source, workspace = Workspace(project), Workspace(folder)
    if not workspace.table("tuning").exists():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source.out("prepare"), workspace.out("prepare"), copy_function=os.link)
        corpora, questions = find_corpora(source, params.prepare), find_questions(source, params.prepare)
        facts = json.loads((source.out("prepare") / "prepare.json").read_text(encoding="utf-8"))
        (folder / "facts.json").write_text(json.dumps(facts["model"]), encoding="utf-8")
        (folder / "model").symlink_to(workspace.model)  # beside its facts, where the stage has it too
        texts = prepare.Texts(folder / "model", corpora, questions, params.prepare, WrittenText({}, {}))
        (folder / "drawn").mkdir()
        prepare.draw_texts(folder / "drawn", texts)
        prepare.write_tables(folder, texts, folder / "drawn")
        shutil.copytree(folder / "tables", workspace.table("tuning").parent)
    sums = {"gradients": "none", "knowledge_questions": 0, "tokens_per_sequence": 0}
    capture.run(workspace, params.capture.model_copy(update=sums))
    kronecker.run(workspace, params.kronecker.model_copy(update={"diagnostics": "none", "dependence_draws": 0}))
    return workspace


def read_ranks(workspace: Workspace) -> dict[str, int]:
    """Rank of every site."""
    rows = pq.read_table(workspace.out("ranks") / "ranks.parquet").to_pylist()
    return {row["site"]: row["rank"] for row in rows if row["storage"] != DENSE and row["module"] == row["site"]}


@torch.inference_mode()
def perplexity(workspace: Workspace, ranks: dict[str, int]) -> float:
    """exp(mean loss) over the evaluation sequences with these sites truncated and all others dense, in float32."""
    softened = Softened(workspace, "float32", (), tuple(sorted(ranks.items())))
    model = softened_model(softened).model if ranks else load_model(workspace.model, torch.float32)
    sequences = read_sequences(workspace.table("evaluation"), model.get_input_embeddings().num_embeddings)
    losses = []
    for ids in sequences.split(2):
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        losses += [float(next_token_loss(logits, logits, ids.to(model.device)))] * len(ids)
    softened_model.cache_clear()
    return math.exp(sum(losses) / len(losses))


def report_draws(found: dict[tuple, float]) -> None:
    """The figures over all draws, the worst of them, one line of JSON each."""
    seeds, ratios = (sorted({key[position] for key in found}) for position in (3, 2))
    for ratio in ratios:
        best = [min(value for key, value in found.items() if key[2:] == (ratio, seed)) for seed in seeds]
        if limit := BEST.get(ratio):
            name = f"perplexity with the best allocator, ratio {ratio}, draws {seeds}"
            print(figure(name, best, "× dense", limit, max(best) <= limit))
    for ratio in ratios:
        pairs = [[("kfac", name, ratio, seed) for name in ("fermigrad", "fisher")] for seed in seeds]
        shares = [found[mine] / found[other] for mine, other in pairs if {mine, other} <= found.keys()]
        if shares and (limit := AGAINST_FISHER.get(ratio)):
            name = f"perplexity with fermigrad over fisher ranks, ratio {ratio}, draws {seeds}"
            print(figure(name, shares, "", limit, max(shares) <= limit))


def report(found: dict, ratio: float) -> None:
    """The figures of the runs that were made, one line of JSON each."""
    uniform = [found[metric, "uniform", ratio]["perplexity"] for metric in ORDER if (metric, "uniform", ratio) in found]
    if len(uniform) == len(ORDER):
        falling = all(worse > better for worse, better in pairwise(uniform))
        name = f"perplexity falls along {' > '.join(ORDER)}, uniform ranks, ratio {ratio}"
        print(figure(name, uniform, "", "falling", falling))
    if ("kfac", "fisher", ratio) in found:
        row = found["kfac", "fisher", ratio]
        value = row["perplexity"] / row["perplexity_dense"]
        print(at_most(f"perplexity of kfac, fisher ranks, ratio {ratio}", value, "× dense", LIMIT))


if __name__ == "__main__":
    main()
