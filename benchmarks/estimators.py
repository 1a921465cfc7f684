"""Perplexity of gfwsvd's estimators against svd_llm with the same ranks, from one capture, damping chosen on the tuning split.

    python benchmarks/estimators.py --project P                          # all settings; minutes each
    python benchmarks/estimators.py --project P --settings 'svd_llm;token;sequence'
    python benchmarks/estimators.py --project P --quick                  # svd_llm and kfac at one damping, a few sequences
    python benchmarks/estimators.py --project P --blocks 4,12,20,28      # those blocks alone are compressed: a tenth of the time

The project has run stages prepare and capture (here: 256 calibration sequences, capture.sketch_rank 16, capture.tokens_per_sequence
16); its params.yaml is not read. Ranks are uniform (the same share of every layer, pivoted storage). Weights are replaced by their
truncations in place, all in float32; the stages decompose in float64 and give the same perplexity to its last digits. The damping of
least perplexity on the tuning sequences is chosen; the figures are of the evaluation sequences.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from figures import at_most

from fisherfold.allocators.cost import rank_costs
from fisherfold.fisher.estimators import ESTIMATORS, CapturedLayer
from fisherfold.network.layers import LinearLayer, linear_modules
from fisherfold.network.models import load_model
from fisherfold.network.sites import Site
from fisherfold.page.layer_views import place
from fisherfold.run.params import KroneckerParams
from fisherfold.run.tables import read_sequences
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.subspaces.shrinkage import SHRINKAGES, FactorSampling

RATIOS = (0.2, 0.4)
DAMPINGS = ((0.01, 0.1), (0.1, 0.3), ("ledoit_wolf", "ledoit_wolf"))
TUNING = 8  # tuning sequences that a damping is chosen on
TRIMMED = KroneckerParams(estimator="token", clip=3.0, trim_tokens=1)
SETTINGS = {
    "svd_llm": ("svd_llm", KroneckerParams()),
    "kfac": ("kfac", KroneckerParams()),
    "sequence": ("gfwsvd", KroneckerParams(estimator="sequence")),
    "token": ("gfwsvd", KroneckerParams(estimator="token")),
    "sequence, prior 0.7": ("gfwsvd", KroneckerParams(estimator="sequence", prior=0.7)),
    "token, clip 1": ("gfwsvd", KroneckerParams(estimator="token", clip=1.0)),
    "token, clip 3, trim 1": ("gfwsvd", TRIMMED),
    "token, clip 3, trim 1, prior 0.5": ("gfwsvd", TRIMMED.model_copy(update={"prior": 0.5})),
    "token, clip 3, trim 1, prior 0.8": ("gfwsvd", TRIMMED.model_copy(update={"prior": 0.8})),
}
BATCH = 4
Eigen = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Bench:
    """What was captured, the layers to compress, the model, its dense weights, and token ids by split."""

    statistics: Statistics
    layers: list[LinearLayer]
    model: torch.nn.Module
    weights: dict[str, torch.Tensor]
    ids: dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--settings", default=";".join(SETTINGS), help="names, between semicolons")
    parser.add_argument(
        "--blocks", default=None, help="numbers of the decoder blocks to compress, between commas; all by default"
    )
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    names = ["svd_llm", "kfac"] if options.quick else options.settings.split(";")
    blocks = "0" if options.quick else options.blocks
    bench = open_bench(
        options.project.resolve(),
        4 if options.quick else None,
        {int(block) for block in blocks.split(",")} if blocks else None,
    )
    dense = perplexity(bench, "evaluation")
    print(
        f"dense {dense:.2f}\n{'setting':32} ratio {'damping':30} {'used (median)':14} {'tuning':>10}",
        flush=True,
    )
    best = {name: compare_dampings(bench, name, DAMPINGS[1:2] if options.quick else DAMPINGS) for name in names}
    report(best)


def open_bench(project: Path, sequences: int | None, blocks: set[int] | None) -> Bench:
    workspace = Workspace(project)
    model = load_model(workspace.model, torch.float32)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    counts = {"tuning": sequences or TUNING, "evaluation": sequences}
    ids = {split: read_sequences(workspace.table(split), vocabulary)[:count] for split, count in counts.items()}
    weights = {name: module.weight.detach().clone() for name, module in linear_modules(model).items()}
    statistics = Statistics(workspace.out("capture"))
    layers = [layer for layer in statistics.layers if blocks is None or place(layer.name)[0] in blocks]
    return Bench(statistics, layers, model, weights, ids)


@torch.no_grad()
def perplexity(
    bench: Bench, split: str, layers: Sequence[LinearLayer] = (), weights: Sequence[torch.Tensor] = ()
) -> float:
    """exp of the mean next-token loss, with the weights of some layers replaced."""
    for layer, weight in zip(layers, weights):
        bench.model.get_submodule(layer.name).weight.data.copy_(weight)
    losses = []
    for ids in bench.ids[split].split(BATCH):
        logits = bench.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"))
    return math.exp(torch.cat(losses).mean().item())


def compare_dampings(bench: Bench, name: str, dampings: tuple) -> dict[float, tuple[float, tuple]]:
    """For each ratio, (evaluation perplexity, damping) of the damping that is best on the tuning split."""
    layers, known = bench.layers, {layer.name: estimated(bench, layer, *SETTINGS[name]) for layer in bench.layers}
    found: dict[float, tuple] = {ratio: (math.inf, None, None) for ratio in RATIOS}
    for damping in dampings:
        chosen = {module: resolved(damping, *sides) for module, sides in known.items()}
        cuts = [
            truncations(bench.weights[layer.name], layer, known[layer.name][0], chosen[layer.name]) for layer in layers
        ]
        for index, ratio in enumerate(RATIOS):
            cut = [parts[index] for parts in cuts]
            tuning = perplexity(bench, "tuning", layers, cut)
            found[ratio] = min(found[ratio], (tuning, damping, cut), key=lambda row: row[0])
            medians = [float(np.median([pair[side] for pair in chosen.values()])) for side in (0, 1)]
            used = f"{medians[0]:.2g}, {medians[1]:.2g}"
            print(f"{name:32} {ratio:5.2f} {damping!s:30} {used:14} {tuning:10.2f}", flush=True)
    best = {ratio: (perplexity(bench, "evaluation", layers, row[2]), row[1]) for ratio, row in found.items()}
    print(f"{name:32} on evaluation: {best}", flush=True)
    return best


def estimated(
    bench: Bench, layer: LinearLayer, metric: str, params: KroneckerParams
) -> tuple[list[Eigen | None], list[FactorSampling]]:
    """Eigenvalues and vectors of A and B (None for the identity) and what is known of their sampling."""
    estimate = ESTIMATORS.lookup(params.estimator).estimate(CapturedLayer(bench.statistics, layer, params))
    variances = estimate.variances or (None, None)
    eigen = [
        torch.linalg.eigh(estimate.A.float()),
        None if metric == "svd_llm" else torch.linalg.eigh(estimate.B.float()),
    ]
    return eigen, [FactorSampling(*pair) for pair in zip(estimate.samples, variances)]


def resolved(damping: tuple, eigen: list[Eigen | None], sampling: list[FactorSampling]) -> tuple[float, ...]:
    """δ of both sides as numbers; 0 for the identity."""
    return tuple(
        0.0
        if side is None
        else SHRINKAGES.lookup(rule)(side[0].double().clamp(min=0), known)
        if isinstance(rule, str)
        else rule
        for rule, side, known in zip(damping, eigen, sampling)
    )


def truncations(weight: torch.Tensor, layer: LinearLayer, eigen: list, damping: tuple) -> list[torch.Tensor]:
    """W_k = R_B⁻ᵀ U_k U_kᵀ R_Bᵀ W (or its mirror image on the shorter side) for the rank of each ratio, as in `weighted_svd`."""
    (A, A_inverse), (B, B_inverse) = (roots(*pair) for pair in zip(eigen, damping))
    M = times(times(weight, A).T, B).T
    short = weight.shape[0] <= weight.shape[1]
    gram = M @ M.T if short else M.T @ M
    vectors = torch.linalg.eigh(gram)[1].flip(1)
    cuts = []
    for ratio in RATIOS:
        top = vectors[:, : uniform_rank(layer, ratio)]
        if short:
            cuts.append(times(top.T, B_inverse, after=True).T @ (top.T @ times(weight.T, B).T))
        else:
            cuts.append((times(weight, A) @ top) @ times(top.T, A_inverse, after=True))
    return cuts


def roots(eigen: Eigen | None, damping: float) -> tuple[tuple | None, tuple | None]:
    """R = Q √λ and what undoes it on the right, R⁻¹ = √λ⁻¹ Qᵀ, of the damped metric."""
    if eigen is None:
        return None, None
    values, vectors = eigen
    values = values.clamp(min=0)
    scales = ((1 - damping) * values + damping * values.mean()).sqrt()
    return (vectors, scales), (vectors, 1 / scales)


def times(matrix: torch.Tensor, root: tuple | None, after: bool = False) -> torch.Tensor:
    """X Q s, or X s Qᵀ if `after`."""
    if root is None:
        return matrix
    vectors, scales = root
    return (matrix * scales) @ vectors.T if after else (matrix @ vectors) * scales


def uniform_rank(layer: LinearLayer, ratio: float) -> int:
    """The largest rank that stores no more than 1 − ratio of the layer."""
    costs = rank_costs(Site(layer.name, (layer,)), "pivoted")
    return int(np.flatnonzero(costs <= (1 - ratio) * layer.dense_numbers)[-1])


def report(best: dict[str, dict[float, tuple[float, tuple]]]) -> None:
    """One line of JSON for each ratio: the best estimator of gfwsvd against svd_llm."""
    for ratio in RATIOS:
        for name, rows in best.items():
            print(f"ratio {ratio}: {name:32} {rows[ratio][0]:8.2f}  damping {rows[ratio][1]}")
    ours = {name: rows for name, rows in best.items() if SETTINGS[name][0] == "gfwsvd"}
    for ratio in RATIOS if ours and "svd_llm" in best else ():
        name = min(ours, key=lambda key: ours[key][ratio][0])
        value, target = ours[name][ratio][0], best["svd_llm"][ratio][0]
        print(at_most(f"perplexity of gfwsvd ({name}), uniform ranks, ratio {ratio}", value, "", target))


if __name__ == "__main__":
    main()
