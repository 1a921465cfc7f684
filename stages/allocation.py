"""Rank allocation: one budget of stored numbers, shared out over the layers. METHODS of allocation are entries of ALLOCATORS."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import pyarrow as pa

from stages import knapsack
from stages.cost import rank_costs
from stages.errors import ParameterError
from stages.knapsack import Knapsack
from stages.layers import LinearLayer
from stages.params import RanksParams
from stages.registry import Registry
from stages.scratch import Scratch
from stages.workspace import Workspace


@dataclass(frozen=True)
class Limits:
    """Which ranks a layer may have; k = min(n, m).

    Attributes:
        round_to: a rank below k is a multiple of this.
        floor, ceiling: least and largest rank as a share of k; a ceiling below 1 also rules out staying dense.
        exclude: names of layers that stay dense; they count, so the others give up more.
    """

    round_to: int = 1
    floor: float = 0.0
    ceiling: float = 1.0
    exclude: frozenset[str] = frozenset()

    def allowed(self, layer: LinearLayer) -> np.ndarray:
        """Whether each rank 0 … k is allowed, bool [k + 1]. Rank k is the dense layer."""
        full = min(layer.outputs, layer.inputs)
        ranks = np.arange(full + 1)
        if layer.name in self.exclude:
            return ranks == full
        multiples = (ranks % self.round_to == 0) | (ranks == full)
        return multiples & (ranks >= self.floor * full) & (ranks <= self.ceiling * full)


@dataclass(frozen=True)
class Allocation:
    """The task of an allocator.

    Attributes:
        layers: L layers in model order.
        spectra: σ of every layer, float64 [k_l], descending.
        costs: stored numbers at each rank, int64 [L, R], R = 1 + the largest k.
        allowed: which ranks each layer may have, bool [L, R]; none that costs as much as the dense layer and keeps less.
        budget: stored numbers that all layers together may use; the ranks of least cost fit.
        params: the stage's parameters.
        workspace, scratch: the project folder, and the stage's restartable units, for allocators that measure the model.
        tables: what an allocator leaves beside the ranks, published as <name>.parquet.
    """

    layers: Sequence[LinearLayer]
    spectra: Sequence[np.ndarray]
    costs: np.ndarray
    allowed: np.ndarray
    budget: int
    params: RanksParams = field(default_factory=RanksParams)
    workspace: Workspace | None = None
    scratch: Scratch | None = None
    tables: dict[str, pa.Table] = field(default_factory=dict)

    @property
    def dense_numbers(self) -> np.ndarray:
        """nm of every layer, int64 [L]."""
        return np.array([layer.outputs * layer.inputs for layer in self.layers])

    def energies(self) -> np.ndarray:
        """Σ_{i<r} σ_i² of every layer at every rank, float64 [L, R]."""
        energies = np.zeros(self.costs.shape)
        for row, sigma in zip(energies, self.spectra):
            row[1 : len(sigma) + 1] = np.cumsum(np.square(sigma))
        return energies

    def spend(self, worth: np.ndarray) -> np.ndarray:
        """The allowed ranks [L] of most `worth` [L, R] in total under the budget; see ``knapsack.solve``."""
        return knapsack.solve(Knapsack(np.where(self.allowed, worth, -np.inf), self.costs, self.budget))

    def fill_from(self, ranks: np.ndarray) -> np.ndarray:
        """The allowed ranks, none below `ranks` [L], of most kept σ² in total under the budget."""
        higher = np.arange(self.costs.shape[1]) >= ranks[:, None]
        return self.spend(np.where(higher, self.energies(), -np.inf))


Allocator = Callable[[Allocation], np.ndarray]
ALLOCATORS: Registry[Allocator] = Registry("ranks.allocator")
"""Allocation -> ranks, int64 [L], each allowed, their cost within the budget and less than one rank of one layer below it."""


@ALLOCATORS.register("fisher")
def fisher(allocation: Allocation) -> np.ndarray:
    """Most kept σ² for the budget: r_l(λ) = argmax_r Σ_{i<r} σ_i² − λ cost_l(r), with one λ for all layers.

    σ² must be comparable across layers, as it is under a metric that carries the scale of the loss (kfac, gfwsvd).
    """
    return allocation.spend(allocation.energies())


@ALLOCATORS.register("uniform")
def uniform(allocation: Allocation) -> np.ndarray:
    """The same share removed from every layer, to within a rank; spectra are not looked at.

    With s the kept share of nm, the worth nm (s − s²/2) has the same marginal, 1 − s, in every layer, so its Lagrangian
    optimum has one s for all: the budget, floors, ceilings and the last few ranks are then settled as for `fisher`.
    """
    dense = allocation.dense_numbers[:, None]
    share = allocation.costs / dense
    return allocation.spend(dense * (share - share**2 / 2))


def pose(
    layers: Sequence[LinearLayer], spectra: Sequence[np.ndarray], params: RanksParams, limits: Limits
) -> Allocation:
    """The task of removing ``params.ratio`` of the stored numbers of `layers`.

    Raises:
        ParameterError: no allowed allocation meets the ratio (the message has the nearest that one does).
    """
    shape = len(layers), max(min(layer.outputs, layer.inputs) for layer in layers) + 1
    costs, allowed = np.zeros(shape, np.int64), np.zeros(shape, bool)
    for row, layer in enumerate(layers):
        cost = rank_costs(layer, params.storage)
        useful = cost < cost[-1]
        useful[-1] = True
        costs[row, : len(cost)] = cost
        allowed[row, : len(cost)] = useful & limits.allowed(layer)
    dense = sum(layer.outputs * layer.inputs for layer in layers)
    task = Allocation(layers, spectra, costs, allowed, budget_of(dense, params.ratio), params)
    _check_ratio(task, dense, params.ratio)
    return task


def allocate(task: Allocation, allocator: Allocator) -> np.ndarray:
    """Ranks [L] by `allocator`, which sees only the layers that have a choice; the others take their one allowed rank."""
    free = task.allowed.sum(1) > 1
    ranks = np.argmax(task.allowed, axis=1)
    settled = int(np.take_along_axis(task.costs, ranks[:, None], 1)[~free].sum())
    chosen = np.flatnonzero(free)
    part = replace(
        task,
        layers=[task.layers[index] for index in chosen],
        spectra=[task.spectra[index] for index in chosen],
        costs=task.costs[free],
        allowed=task.allowed[free],
        budget=task.budget - settled,
    )
    ranks[free] = allocator(part)
    return ranks


def budget_of(dense: int, ratio: float) -> int:
    """Stored numbers that may remain of `dense` after removing `ratio`: ⌊(1 − ratio) dense⌋, in exact decimal arithmetic."""
    return math.floor((1 - Fraction(str(ratio))) * dense)


def _check_ratio(task: Allocation, dense: int, ratio: float) -> None:
    for layer, allowed in zip(task.layers, task.allowed):
        if not allowed.any():
            raise ParameterError(
                f"Stage 'ranks', module {layer.name!r}: no rank is left by ranks.floor, ranks.ceiling and ranks.round_to. Widen them."
            )
    least = int(np.where(task.allowed, task.costs, np.iinfo(np.int64).max).min(axis=1).sum())
    most = int(np.where(task.allowed, task.costs, -1).max(axis=1).sum())
    if least > task.budget:
        raise ParameterError(
            f"Stage 'ranks': ranks.ratio = {ratio} leaves {task.budget} of {dense} stored numbers, but the smallest possible "
            f"allocation needs {least} (ratio {1 - least / dense:.6f}). Lower ranks.ratio or ranks.floor, or exclude fewer modules."
        )
    if most <= task.budget:
        raise ParameterError(
            f"Stage 'ranks': ranks.ratio = {ratio} is met already: the largest allowed allocation stores {most} of {dense} numbers "
            f"(ratio {1 - most / dense:.6f}). Raise ranks.ratio or ranks.ceiling."
        )
