"""Allocators that measure the network with one layer truncated at a time: `sensitivity` (ASVD) and `ilp` (LEMS).

Both read one table of losses [L, K]: the network's cross-entropy on the tuning sequences with site l alone cut to its
K-th candidate rank. A site is a restartable unit, and costs at most ranks.measured.levels forward passes.
"""

import json
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from fisherfold.allocators.allocation import ALLOCATORS, Allocation, finite
from fisherfold.allocators.fermi_descent import SHARP, Softened, softened_model
from fisherfold.allocators.fermigrad import SoftRank, next_token_loss, set_ranks
from fisherfold.run.errors import NumericalError

LOSSES = "losses.json"
UNFIT = (
    "at the lowest candidate ranks the loss of some layers alone is not finite, and those that are left do not meet the budget. Set "
    "ranks.measured.dtype to float32, raise ranks.floor or lower ranks.ratio, or use another allocator."
)


@ALLOCATORS.register("sensitivity")
def sensitivity(allocation: Allocation) -> np.ndarray:
    """One bound on the loss for every site alone: each takes its cheapest candidate below the bound (arXiv 2312.05821).

    The bound is the smallest that meets the budget; what is left of the budget goes where σ² per number is largest.

    Raises:
        NumericalError: no candidates of finite loss meet the budget.
    """
    candidates, losses = measure_losses(allocation)
    costs = candidate_costs(allocation, candidates)

    def picks(bound: float) -> np.ndarray:
        return np.argmin(np.where(losses <= np.maximum(bound, losses.min(1))[:, None], costs, np.inf), axis=1)

    bounds = np.unique(losses[np.isfinite(losses)])
    fits = [costs[np.arange(len(costs)), picks(bound)].sum() <= allocation.budget for bound in bounds]
    if not any(fits):
        raise NumericalError(f"Stage 'ranks', sensitivity: {UNFIT}")
    chosen = picks(bounds[int(np.argmax(fits))])
    return allocation.fill_from(candidates[np.arange(len(candidates)), chosen])


@ALLOCATORS.register("ilp")
def ilp(allocation: Allocation) -> np.ndarray:
    """Least sum of the measured losses, one candidate a site, as a 0-1 programme (LEMS 2026; ``scipy.optimize.milp``).

        minimise Σ_lk loss_lk x_lk   subject to   Σ_k x_lk = 1,   Σ_lk cost_lk x_lk <= budget

    What is left of the budget goes where σ² per number is largest.

    Raises:
        NumericalError: no candidates of finite loss meet the budget, or the programme was not solved.
    """
    candidates, losses = measure_losses(allocation)
    costs = candidate_costs(allocation, candidates)
    usable = np.isfinite(costs) & np.isfinite(losses)
    if np.where(usable, costs, np.inf).min(1).sum() > allocation.budget:
        raise NumericalError(f"Stage 'ranks', ilp: {UNFIT}")
    layer, column = np.nonzero(usable)
    one_each = csr_array((np.ones(len(layer)), (layer, np.arange(len(layer)))))
    solution = milp(
        losses[usable] - losses[usable].min(),
        integrality=np.ones(len(layer)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs[usable][None], 0, allocation.budget)],
    )
    if solution.x is None:
        raise NumericalError(
            f"Stage 'ranks', ilp: the programme was not solved ({solution.message}). Use another allocator."
        )
    taken = solution.x > 0.5
    ranks = np.zeros(len(candidates), np.int64)
    ranks[layer[taken]] = candidates[layer[taken], column[taken]]
    return allocation.fill_from(ranks)


def candidate_ranks(allowed: np.ndarray, levels: int) -> np.ndarray:
    """At most `levels` + 1 of the allowed ranks, evenly spread, the smallest and the largest among them."""
    ranks = np.flatnonzero(allowed)
    return np.unique(ranks[np.linspace(0, len(ranks) - 1, levels + 1).round().astype(int)])


def candidate_costs(allocation: Allocation, candidates: np.ndarray) -> np.ndarray:
    """Stored numbers of every candidate, float64 [L, K]; infinite where there is none (−1)."""
    costs = np.take_along_axis(allocation.costs, np.maximum(candidates, 0), axis=1).astype(float)
    return np.where(candidates < 0, np.inf, costs)


def measure_losses(allocation: Allocation) -> tuple[np.ndarray, np.ndarray]:
    """Candidate ranks int64 [L, K] (−1: none) and the loss with that site alone cut to it, float64 [L, K].

    Raises:
        NumericalError: every candidate of a site has a loss that is not finite; names the module.
    """
    params, scratch, workspace = allocation.params.measured, allocation.scratch, allocation.workspace
    assert scratch is not None and workspace is not None
    names = tuple(site.name for site in allocation.sites)
    softened = Softened(workspace, params.dtype, names)
    offered = [candidate_ranks(allowed, params.levels).tolist() for allowed in allocation.allowed]
    units = {
        f"losses-{name}": (softened, params.sequences, index, ranks)
        for index, (name, ranks) in enumerate(zip(names, offered, strict=True))
    }
    folders = scratch.map("measuring layers", measure_site, units)
    shape = len(names), params.levels + 1
    candidates, losses = np.full(shape, -1, np.int64), np.full(shape, np.inf)
    for row, (name, folder, ranks) in enumerate(zip(names, folders.values(), offered, strict=True)):
        measured = json.loads((folder / LOSSES).read_text(encoding="utf-8"))
        candidates[row, : len(ranks)] = ranks
        losses[row, : len(ranks)] = [np.inf if loss is None else loss for loss in measured]
        if not np.isfinite(losses[row]).any():
            raise NumericalError(f"Stage 'ranks', module {name!r}: no candidate rank has a finite loss.")
    return candidates, losses


def measure_site(folder: Path, softened: Softened, sequences: int, index: int, ranks: list[int]) -> None:
    """Unit of work: the mean loss over the first tuning sequences for each rank of one site, all others dense; null if not finite."""
    model, sites, _, table = softened_model(softened)
    for site in sites:
        site.soft = False
    losses = [_loss_at(model, sites[index], table[:sequences], rank) for rank in ranks]
    (folder / LOSSES).write_text(json.dumps([finite(loss) for loss in losses]), encoding="utf-8")


@torch.inference_mode()
def _loss_at(model: torch.nn.Module, site: SoftRank, sequences: torch.Tensor, rank: int) -> float:
    set_ranks([site], torch.tensor([rank]), SHARP)
    site.soft = rank < site.full_rank
    try:
        parts = [_sequence_loss(model, ids[None].to(model.device)) for ids in sequences]
    finally:
        site.soft = False
    return sum(parts) / len(parts)


def _sequence_loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    logits = model(input_ids=ids, use_cache=False).logits
    return float(next_token_loss(logits, logits, ids))
