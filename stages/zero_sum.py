"""Allocator `zero_sum`: drop components whose first-order effects on the loss cancel (ZS-SVD 2026)."""

import numpy as np

from stages.allocation import ALLOCATORS, Allocation
from stages.layers import LinearLayer
from stages.progress import track
from stages.statistics import Statistics
from stages.store import read_array


@ALLOCATORS.register("zero_sum")
def zero_sum(allocation: Allocation) -> np.ndarray:
    """Lower one layer at a time to its next allowed rank, the one whose first-order loss change keeps their sum nearest zero.

    Dropping component i changes the loss by δ_i = −⟨Ḡ, left_i right_i⟩ to first order, Ḡ [n, m] the mean gradient. What
    is left of the budget goes where σ² per number is largest.
    """
    statistics = Statistics(allocation.workspace.out("capture"))
    effects = [
        first_order_effects(allocation, statistics, layer)
        for layer in track("ranks", "first-order effects", allocation.layers, len(allocation.layers))
    ]
    steps = [_steps(allowed, effect) for allowed, effect in zip(allocation.allowed, effects, strict=True)]
    return allocation.fill_from(lower_to_budget(allocation.costs, allocation.budget, steps))


def first_order_effects(allocation: Allocation, statistics: Statistics, layer: LinearLayer) -> np.ndarray:
    """δ_i of every component, float64 [k]."""
    bases = allocation.workspace.out("subspace") / "bases"
    left, right = (read_array(bases, f"{layer.name}/{side}").double() for side in ("left", "right"))
    gradient = statistics.gradient_sum(layer).double() / statistics.sequences
    return -((left.T @ gradient) * right).sum(1).numpy()


def _steps(allowed: np.ndarray, effects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The allowed ranks from the largest down, and the effect of each step from one to the next."""
    ranks = np.flatnonzero(allowed)[::-1]
    kept = np.concatenate(([0.0], np.cumsum(effects)))
    return ranks, kept[ranks[:-1]] - kept[ranks[1:]]


def lower_to_budget(costs: np.ndarray, budget: int, steps: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Ranks [L] after lowering, always the layer that brings the running sum of effects nearest to zero, until they fit."""
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
