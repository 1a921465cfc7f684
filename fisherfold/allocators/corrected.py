"""Allocator `corrected`: `fisher` with what a cut is predicted to cost corrected by what it was measured to cost, kind of layer by kind of layer.

    w_k = KL(p ‖ p_k) / ½ Σ_{l in k} Σ_{i>r_l} σ_li²,   then the ranks of most Σ_l w_k(l) Σ_{i<=r_l} σ_li² for the budget

p is what the dense model predicts on the tuning sequences, p_k what it predicts with the layers of one kind k alone cut to the ranks r of `fisher`. A kind
are the layers whose names differ in numbers alone: all query projections, say. A Fisher matrix is of the dense model: where curvature grows
with the cut, as of queries, whose softmax is nearly settled, it predicts too little. Each w_k is held within MOST of that of all kinds together, since it is
measured on little text; a kind that `fisher` cuts nothing of has that of all.

Shapes: L sites.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from fisherfold.allocators.allocation import ALLOCATORS, Allocation, fisher
from fisherfold.allocators.fermi_descent import SHARP, Softened, softened_model
from fisherfold.allocators.fermigrad import mean_divergence, set_ranks
from fisherfold.run.errors import NumericalError

MOST = 4.0  # how many times the weight of all kinds together, or what part of it, that of one may be
DIVERGENCE = "divergence.json"


@ALLOCATORS.register("corrected")
def corrected(allocation: Allocation) -> np.ndarray:
    """See the module. Leaves kind, predicted (in the unit of the metric), measured (nats a token) and weight in ``allocation.tables["corrections"]``.

    Raises:
        NumericalError: a divergence is not finite; names the kind.
    """
    ranks = fisher(allocation)
    kinds = [kind_of(site.name) for site in allocation.sites]
    dropped = np.array([float(np.square(sigma[rank:]).sum()) for sigma, rank in zip(allocation.spectra, ranks)])
    members = {kind: [row for row, own in enumerate(kinds) if own == kind] for kind in dict.fromkeys(kinds)}
    predicted = {kind: 0.5 * float(dropped[rows].sum()) for kind, rows in members.items()}
    cut = {kind: rows for kind, rows in members.items() if predicted[kind] > 0}
    measured = measure_kinds(allocation, cut, ranks)
    weights = weights_of(predicted, measured)
    allocation.tables["corrections"] = pa.table(
        {
            "kind": list(members),
            "predicted": list(predicted.values()),
            "measured": [measured.get(kind, 0.0) for kind in members],
            "weight": [weights[kind] for kind in members],
        }
    )
    return allocation.spend(np.array([weights[kind] for kind in kinds])[:, None] * allocation.energies())


def kind_of(name: str) -> str:
    """The name of a layer with every number in it as ``*``: ``model.layers.*.mlp.up_proj``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def weights_of(predicted: dict[str, float], measured: dict[str, float]) -> dict[str, float]:
    """w of every kind, by that of all kinds that were measured; 1 where nothing was, or nothing was lost."""
    together = sum(measured.values()) / (sum(predicted[kind] for kind in measured) or 1.0)
    if together <= 0:
        return dict.fromkeys(predicted, 1.0)
    own = {kind: measured[kind] / predicted[kind] / together for kind in measured}
    return {kind: float(np.clip(own.get(kind, 1.0), 1 / MOST, MOST)) for kind in predicted}


def measure_kinds(allocation: Allocation, kinds: dict[str, list[int]], ranks: np.ndarray) -> dict[str, float]:
    """The divergence with the sites of each kind alone at their ranks, in nats a token; a kind is a restartable unit.

    Raises:
        NumericalError: one is not finite.
    """
    scratch, workspace = allocation.scratch, allocation.workspace
    assert scratch is not None and workspace is not None
    softened = Softened(workspace, allocation.params.measured.dtype, tuple(site.name for site in allocation.sites))
    units = {f"kind-{number}": (softened, rows, ranks[rows].tolist()) for number, rows in enumerate(kinds.values())}
    folders = scratch.map("measuring kinds of layers", measure_kind, units)
    found = {}
    for kind, folder in zip(kinds, folders.values(), strict=True):
        found[kind] = json.loads((folder / DIVERGENCE).read_text(encoding="utf-8"))
        if found[kind] is None:
            raise NumericalError(
                f"Stage 'ranks', corrected: with {kind} alone cut, what the model predicts is not finite. Set ranks.measured.dtype to "
                "float32, or use allocator 'fisher'."
            )
    return found


@torch.inference_mode()
def measure_kind(folder: Path, softened: Softened, rows: Sequence[int], ranks: Sequence[int]) -> None:
    """Unit of work: the mean divergence over the tuning sequences with the sites of these numbers at these ranks; null if not finite."""
    model, sites, _, table = softened_model(softened)
    own = [sites[row] for row in rows]
    set_ranks(own, torch.tensor(ranks), SHARP)

    def predicted(ids: torch.Tensor, cut: bool) -> torch.Tensor:
        for site in sites:
            site.soft = False
        for site, rank in zip(own, ranks, strict=True):
            site.soft = cut and rank < site.full_rank
        return model(input_ids=ids.to(model.device), use_cache=False).logits

    total = sum(float(mean_divergence(predicted(ids, False), predicted(ids, True), ids)) for ids in table.split(1))
    mean = total / len(table)
    (folder / DIVERGENCE).write_text(json.dumps(mean if np.isfinite(mean) else None), encoding="utf-8")
