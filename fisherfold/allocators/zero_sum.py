"""Allocator `zero_sum`: drop components whose first-order effects on the loss cancel (ZS-SVD 2026)."""

import numpy as np
import torch

from fisherfold.allocators.allocation import ALLOCATORS, Allocation
from fisherfold.network.sites import Site
from fisherfold.run.progress import track
from fisherfold.statistics.layer_statistics import Statistics


@ALLOCATORS.register("zero_sum")
def zero_sum(allocation: Allocation) -> np.ndarray:
    """Lower one site at a time to its next allowed rank, the one whose first-order loss change keeps their sum nearest zero.

    Dropping component i changes the loss by δ_i = −Σ_c ⟨Ḡ_c, left_ci right_i⟩ to first order, Ḡ_c [n_c, m] the mean gradient of
    layer c of the site. What is left of the budget goes where σ² per number is largest.
    """
    assert allocation.workspace is not None
    statistics = Statistics(allocation.workspace.out("capture"))
    effects = [
        first_order_effects(allocation, statistics, site)
        for site in track("ranks", "first-order effects", allocation.sites, len(allocation.sites))
    ]
    steps = [_steps(allowed, effect) for allowed, effect in zip(allocation.allowed, effects, strict=True)]
    return allocation.fill_from(lower_to_budget(allocation.costs, allocation.budget, steps))


def first_order_effects(allocation: Allocation, statistics: Statistics, site: Site) -> np.ndarray:
    """δ_i of every component, float64 [k]."""
    assert allocation.workspace is not None
    lefts, right = site.read_basis(allocation.workspace.out("subspace") / "bases")
    gain = torch.zeros_like(right, dtype=torch.float64)
    for layer, left in zip(site.layers, lefts, strict=True):
        gain += left.double().T @ statistics.gradient_sum(layer).double()
    return -(gain * right).sum(1).numpy() / statistics.sequences


def _steps(allowed: np.ndarray, effects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The allowed ranks from the largest down, and the effect of each step from one to the next."""
    ranks = np.flatnonzero(allowed)[::-1]
    kept = np.concatenate(([0.0], np.cumsum(effects)))
    return ranks, kept[ranks[:-1]] - kept[ranks[1:]]


def lower_to_budget(costs: np.ndarray, budget: int, steps: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Ranks [L] after lowering, always the site that brings the running sum of effects nearest to zero, until they fit."""
    position = np.zeros(len(steps), int)
    ranks = np.array([layer_ranks[0] for layer_ranks, _ in steps])
    upcoming = np.array([effects[0] if len(effects) else np.inf for _, effects in steps])
    spent, running = int(costs[np.arange(len(steps)), ranks].sum()), 0.0
    while spent > budget:
        row = int(np.argmin(np.abs(running + upcoming)))
        layer_ranks, effects = steps[row]
        running += effects[position[row]]
        position[row] += 1
        lower = layer_ranks[position[row]]
        spent += int(costs[row, lower] - costs[row, ranks[row]])
        ranks[row] = lower
        upcoming[row] = effects[position[row]] if position[row] < len(effects) else np.inf
    return ranks
