"""Rank allocation: one budget, shared out over the sites (see ``fisherfold.network.sites``). Methods of allocation are entries of ALLOCATORS."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from fisherfold.allocators.budget import Budget, parameters
from fisherfold.allocators.cost import SIXTEENTHS, rank_costs, unit_of
from fisherfold.allocators.limits import Limits
from fisherfold.linalg import knapsack
from fisherfold.linalg.knapsack import Knapsack, pick
from fisherfold.network.sites import Site
from fisherfold.run.errors import NumericalError, ParameterError
from fisherfold.run.params import RanksParams
from fisherfold.run.registry import Registry
from fisherfold.run.scratch import Scratch
from fisherfold.run.workspace import Workspace


@dataclass(frozen=True)
class Allocation:
    """The task of an allocator.

    Attributes:
        sites: L sites in model order.
        spectra: σ of every site, float64 [k_l], descending.
        costs: the cost at each rank, int64 [L, R], R = 1 + the largest k.
        allowed: which ranks each site may have, bool [L, R]; none that costs as much as the dense site and keeps less.
        budget: what all sites together may cost; the ranks of least cost fit.
        params: the stage's parameters.
        settled: ranks of the sites that have no choice, by name.
        workspace, scratch: the project folder, and the stage's restartable units, for allocators that measure the model.
        tables: what an allocator leaves beside the ranks, published as <name>.parquet.
    """

    sites: Sequence[Site]
    spectra: Sequence[np.ndarray]
    costs: np.ndarray
    allowed: np.ndarray
    budget: int
    params: RanksParams = field(default_factory=RanksParams)
    settled: Mapping[str, int] = field(default_factory=dict)
    workspace: Workspace | None = None
    scratch: Scratch | None = None
    tables: dict[str, pa.Table] = field(default_factory=dict)

    @property
    def dense_costs(self) -> np.ndarray:
        """The cost of every site left dense, int64 [L]."""
        return self.costs.max(axis=1)

    def energies(self) -> np.ndarray:
        """Σ_{i<r} σ_i² of every site at every rank, float64 [L, R]."""
        energies = np.zeros(self.costs.shape)
        for row, sigma in zip(energies, self.spectra):
            row[1 : len(sigma) + 1] = np.cumsum(np.square(sigma))
        return energies

    def predicted_loss(self, ranks: Sequence[int]) -> float:
        """½ Σ of the σ² that `ranks` [L] drop, in the unit of the metric."""
        dropped = [float(np.square(sigma[rank:]).sum()) for sigma, rank in zip(self.spectra, ranks)]
        return 0.5 * float(np.sum(dropped))

    def spend(self, worth: np.ndarray) -> np.ndarray:
        """The allowed ranks [L] of most `worth` [L, R] in total under the budget; see ``knapsack.solve``."""
        return knapsack.solve(Knapsack(np.where(self.allowed, worth, -np.inf), self.costs, self.budget))

    def fill_from(self, ranks: np.ndarray) -> np.ndarray:
        """The allowed ranks, none below `ranks` [L], of most kept σ² in total under the budget."""
        higher = np.arange(self.costs.shape[1]) >= ranks[:, None]
        return self.spend(np.where(higher, self.energies(), -np.inf))


Allocator = Callable[[Allocation], np.ndarray]
ALLOCATORS: Registry[Allocator] = Registry("ranks.allocator")
"""Allocation -> ranks, int64 [L], each allowed, their cost within the budget and less than one rank of one site below it."""


@ALLOCATORS.register("fisher")
def fisher(allocation: Allocation) -> np.ndarray:
    """Most kept σ² for the budget: r_l(λ) = argmax_r Σ_{i<r} σ_i² − λ cost_l(r), with one λ for all sites.

    σ² must be comparable across sites, as it is under a metric that carries the scale of the loss (kfac, gfwsvd).
    """
    return allocation.spend(allocation.energies())


@ALLOCATORS.register("uniform")
def uniform(allocation: Allocation) -> np.ndarray:
    """The same share removed from every site, to within a rank; spectra are not looked at.

    With s the kept share of the dense cost, the worth dense (s − s²/2) has the same marginal, 1 − s, in every site, so its
    Lagrangian optimum has one s for all: the budget, floors, ceilings and the last few ranks are then settled as for `fisher`.
    """
    dense = allocation.dense_costs[:, None]
    share = allocation.costs / dense
    return allocation.spend(dense * (share - share**2 / 2))


def pose(
    sites: Sequence[Site],
    spectra: Sequence[np.ndarray],
    params: RanksParams,
    limits: Limits | None = None,
    budget: Budget | None = None,
) -> Allocation:
    """The task of removing ``params.ratio`` of the stored numbers of `sites`, or of what `budget` counts.

    Raises:
        ParameterError: no allowed allocation meets the ratio (the message has the nearest that one does), or a pattern of the
            limits matches nothing.
    """
    limits = limits or Limits.of(params)
    limits.check_patterns(sites)
    budget = budget or parameters(sites)
    shape = len(sites), max(site.full_rank for site in sites) + 1
    costs, allowed = np.zeros(shape, np.int64), np.zeros(shape, bool)
    for row, site in enumerate(sites):
        cost = rank_costs(site, params.storage, budget.unit)
        useful = cost < cost[-1]
        useful[-1] = True
        costs[row, : len(cost)] = cost
        allowed[row, : len(cost)] = useful & limits.allowed(site)
        if not allowed[row].any():
            raise _no_rank(site, limits.allowed(site))
    task = Allocation(sites, spectra, costs, allowed, budget.left(params.ratio), params)
    _check_ratio(task, budget)
    return task


def allocate(task: Allocation, allocator: Allocator) -> np.ndarray:
    """Ranks [L] by `allocator`, which sees only the sites that have a choice; the others take their one allowed rank.

    Raises:
        NumericalError: the allocator's ranks cost more than the budget, or one of them is not allowed; names the module.
    """
    free = task.allowed.sum(1) > 1
    ranks = np.argmax(task.allowed, axis=1)
    spent = int(pick(task.costs, ranks)[~free].sum())
    chosen, settled = np.flatnonzero(free).tolist(), np.flatnonzero(~free).tolist()
    part = replace(
        task,
        sites=[task.sites[index] for index in chosen],
        spectra=[task.spectra[index] for index in chosen],
        costs=task.costs[free],
        allowed=task.allowed[free],
        budget=task.budget - spent,
        settled={task.sites[index].name: int(ranks[index]) for index in settled},
    )
    ranks[free] = allocator(part)
    _check_ranks(task, ranks)
    return ranks


def finite(value: float) -> float | None:
    """What a unit writes of a measured number: null where it is none, which JSON has no word for."""
    return value if np.isfinite(value) else None


def _check_ranks(task: Allocation, ranks: np.ndarray) -> None:
    """Refuse ranks that break a promise to the user, whatever allocator they come from."""
    broken = np.flatnonzero(~pick(task.allowed, ranks))
    spent = int(pick(task.costs, ranks).sum())
    if len(broken):
        site = task.sites[broken[0]]
        problem = (
            f"gives module {site.name!r} rank {ranks[broken[0]]} of {site.full_rank}, which the limits do not allow"
        )
    elif spent > task.budget:
        problem = f"spends {spent} of {task.budget}"
    else:
        return
    raise NumericalError(
        f"Stage 'ranks': allocator {task.params.allocator!r} {problem}, so nothing is written. Use ranks.allocator = 'fisher', which "
        "meets every budget and limit, or widen ranks.floor, ranks.ceiling and ranks.round_to."
    )


def _no_rank(site: Site, wanted: np.ndarray) -> ParameterError:
    """The error of a site that no rank is left for: the limits rule out all, or all but some that would outgrow the matrix."""
    outgrown = np.flatnonzero(wanted)
    if len(outgrown):
        reason = (
            f"rank {outgrown[0]} would store more than the {site.outputs} × {site.inputs} matrix itself. Use a lower rank, or the "
            f"full rank {site.full_rank} (dense)"
        )
    else:
        reason = (
            f"no rank from 0 to {site.full_rank} is left by ranks.floor, ranks.ceiling, ranks.round_to, ranks.fixed and "
            "ranks.exclude. Widen them"
        )
    return ParameterError(f"Stage 'ranks', module {site.name!r}: {reason}.")


def beyond_reach(ratio: float, least: int, left: int, budget: Budget) -> ParameterError:
    """The error that targeted layers need at `least` more than what is `left` for them."""
    return ParameterError(
        f"Stage 'ranks': ranks.ratio = {ratio} leaves {left + budget.untargeted} of {budget.whole} {budget.what}, but the "
        f"smallest possible allocation needs {least + budget.untargeted} (ratio {budget.ratio(least):.6f}). Lower ranks.ratio, "
        "ranks.floor or ranks.fixed, or exclude fewer modules."
    )


def _check_ratio(task: Allocation, budget: Budget) -> None:
    ratio = task.params.ratio
    least = int(np.where(task.allowed, task.costs, np.iinfo(np.int64).max).min(axis=1).sum())
    most = int(np.where(task.allowed, task.costs, -1).max(axis=1).sum())
    if task.params.widths:  # at least, were all in the narrowest; what is met is known when widths are chosen
        least = least * unit_of(min(task.params.widths)).weight // (SIXTEENTHS * budget.unit.weight)
    if least > task.budget:
        raise beyond_reach(ratio, least, task.budget, budget)
    if most <= task.budget:
        raise ParameterError(
            f"Stage 'ranks': ranks.ratio = {ratio} is met already: the largest allowed allocation stores {most + budget.untargeted} "
            f"of {budget.whole} {budget.what} (ratio {budget.ratio(most):.6f}). Raise ranks.ratio, ranks.ceiling or ranks.fixed."
        )
