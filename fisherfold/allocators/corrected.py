"""Allocator `corrected`: `fisher` with what a cut is predicted to cost corrected by what it was measured to cost, group of layers by group.

    w_g = √(KL(p ‖ p_g) / ½ Σ_{l in g} Σ_{i>r_l} σ_li²),   then the ranks of most Σ_l w_g(l) Σ_{i<=r_l} σ_li² for the budget

p is what the dense model predicts on tuning sequences, p_g what it predicts with the layers of one group g alone cut to the ranks r of `fisher`. A group
are the layers of one third of the depth whose names differ in numbers alone: the query projections of the first ten of thirty blocks, say. A Fisher matrix is
of the dense model: where curvature grows with the cut, as of queries, whose softmax is nearly settled, or where many blocks come after, it predicts too
little. The root halves what is corrected, since it is measured on little text; a w_g is held within MOST of that of all groups together, and a group
that `fisher` cuts nothing of has that of all.

Shapes: L sites.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from fisherfold.allocators.allocation import ALLOCATORS, Allocation, finite, fisher
from fisherfold.allocators.fermi_descent import SHARP, Softened, softened_model
from fisherfold.allocators.fermigrad import mean_divergence, set_ranks
from fisherfold.network.layers import NUMBER, kind_of
from fisherfold.network.sites import Site
from fisherfold.run.errors import NumericalError
from fisherfold.run.tables import read_table

MOST = 2.0  # how many times the weight of all groups together, or what part of it, that of one may be
PARTS = 3  # of the depth
SEQUENCES = 8  # of the tuning text, at most
DIVERGENCES = "divergences.json"

Group = tuple[str, int]
"""A kind of layer, and which part of the depth."""


@ALLOCATORS.register("corrected")
def corrected(allocation: Allocation) -> np.ndarray:
    """See the module. ``allocation.tables["corrections"]``: kind, part, predicted (in the unit of the metric), measured (nats a token), weight.

    Raises:
        NumericalError: a divergence is not finite; names the group.
    """
    ranks = fisher(allocation)
    groups = groups_of(allocation.sites)
    dropped = np.array([float(np.square(sigma[rank:]).sum()) for sigma, rank in zip(allocation.spectra, ranks)])
    predicted = {group: 0.5 * float(dropped[rows].sum()) for group, rows in groups.items()}
    measured = measure_groups(allocation, {group: groups[group] for group in groups if predicted[group] > 0}, ranks)
    weights = weights_of(predicted, measured)
    allocation.tables["corrections"] = pa.table(
        {
            "kind": [kind for kind, _ in groups],
            "part": [part for _, part in groups],
            "predicted": list(predicted.values()),
            "measured": [measured.get(group, 0.0) for group in groups],
            "weight": [weights[group] for group in groups],
        }
    )
    of_sites = np.ones(len(allocation.sites))
    for group, rows in groups.items():
        of_sites[rows] = weights[group]
    return allocation.spend(of_sites[:, None] * allocation.energies())


def groups_of(sites: Sequence[Site]) -> dict[Group, list[int]]:
    """The rows of every group, by kind (the name with each number as ``*``) and part of the depth (by the first number)."""
    numbers = [NUMBER.search(site.name) for site in sites]
    blocks = [int(number.group()) if number else 0 for number in numbers]
    groups: dict[Group, list[int]] = {}
    for row, (site, block) in enumerate(zip(sites, blocks, strict=True)):
        groups.setdefault((kind_of(site.name), block * PARTS // (1 + max(blocks))), []).append(row)
    return groups


def weights_of(predicted: dict[Group, float], measured: dict[Group, float]) -> dict[Group, float]:
    """w of every group, by that of all that were measured; 1 where nothing was, or nothing was lost."""
    together = sum(measured.values()) / (sum(predicted[group] for group in measured) or 1.0)
    if together <= 0:
        return dict.fromkeys(predicted, 1.0)
    own = {group: max(measured[group], 0.0) / predicted[group] / together for group in measured}
    return {group: float(np.clip(own.get(group, 1.0) ** 0.5, 1 / MOST, MOST)) for group in predicted}


def measure_groups(allocation: Allocation, groups: dict[Group, list[int]], ranks: np.ndarray) -> dict[Group, float]:
    """The divergence with the sites of each group alone at their ranks, in nats a token; a sequence is a restartable unit.

    Raises:
        NumericalError: one is not finite.
    """
    scratch, workspace = allocation.scratch, allocation.workspace
    assert scratch is not None and workspace is not None
    softened = Softened(workspace, allocation.params.measured.dtype, tuple(site.name for site in allocation.sites))
    sequences = min(SEQUENCES, len(read_table(workspace.table("tuning"))))
    units = {
        f"sequence-{number}": (softened, number, list(groups.values()), ranks.tolist()) for number in range(sequences)
    }
    folders = scratch.map("measuring groups of layers", measure_sequence, units)
    found = [json.loads((folder / DIVERGENCES).read_text(encoding="utf-8")) for folder in folders.values()]
    means = dict(zip(groups, np.array(found, float).mean(0).tolist(), strict=True)) if groups else {}
    for (kind, part), mean in means.items():
        if not np.isfinite(mean):
            raise NumericalError(
                f"Stage 'ranks', corrected: with {kind} alone cut in part {part + 1} of {PARTS} of the depth, what the model predicts is not "
                "finite. Set ranks.measured.dtype to float32, or use allocator 'fisher'."
            )
    return means


@torch.inference_mode()
def measure_sequence(
    folder: Path, softened: Softened, number: int, groups: Sequence[Sequence[int]], ranks: Sequence[int]
) -> None:
    """Unit of work: the divergence over one tuning sequence with the sites of each group at their ranks; null if not finite."""
    model, sites, _, table = softened_model(softened)
    set_ranks(sites, torch.tensor(ranks), SHARP)
    ids = table[number : number + 1].to(model.device)

    def predicted(cut: Collection[int]) -> torch.Tensor:
        for row, site in enumerate(sites):
            site.soft = row in cut and ranks[row] < site.full_rank
        return model(input_ids=ids, use_cache=False).logits

    dense = predicted(())
    divergences = [float(mean_divergence(dense, predicted(set(rows)), ids)) for rows in groups]
    (folder / DIVERGENCES).write_text(json.dumps([finite(value) for value in divergences]), encoding="utf-8")
