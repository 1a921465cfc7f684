"""Rank and bits of every site together: one knapsack over bytes.

A site may have any of some ranks, in 16 bits or in any of some widths, in any format of its storage; full rank is the dense weight. An option costs its bytes and loses

    Σ_{i >= r} σ_i² (truncation)  +  the predicted loss of rounding (``fisherfold.linalg.rounding_losses``),

both in the unit of the metric, or as they were measured in nats (``loss_weights``), so that the least sum under the budget is one Lagrangian problem (``fisherfold.linalg.knapsack``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fisherfold.allocators.cost import ALLOWED_FORMATS, DENSE, FORMATS, SIXTEENTHS, Choice, Unit, is_rounded, unit_of
from fisherfold.allocators.loss_weights import UNWEIGHTED, LossWeights, truncation_losses
from fisherfold.linalg import knapsack
from fisherfold.linalg.knapsack import Knapsack
from fisherfold.linalg.rounding_losses import RoundingUnits
from fisherfold.network.sites import Site

UNROUNDED = 16
"""The width of numbers that are not rounded to whole ones; 32 is another."""
SHAPE_BYTES = 16
"""Of what a matrix of few bits stores besides its numbers: its shape."""


@dataclass(frozen=True)
class Option:
    """How a site may be kept: rank r (full: dense), storage, bits, cost in sixteenths of a byte, predicted loss."""

    rank: int
    storage: str
    bits: int
    cost: int
    loss: float


def options_of(
    site: Site,
    sigma: np.ndarray,
    units: RoundingUnits,
    widths: Sequence[int],
    ranks: np.ndarray,
    storage: str,
    weights: LossWeights = UNWEIGHTED,
) -> list[Option]:
    """Every option of a site; `ranks` are those it may have, multiples of GROUP below its full rank, and perhaps this."""
    truncation = weights.of_truncation(truncation_losses(sigma))
    return [
        option
        for bits in widths
        for option in _options(site, ranks, bits, truncation, weights.rounding * is_rounded(bits), units, storage)
    ]


def _options(
    site: Site, ranks: np.ndarray, bits: int, truncation: np.ndarray, weight: float, units: RoundingUnits, storage: str
) -> Iterator[Option]:
    """Every rank of a width in every format: plain factors take more bytes and round better; one that outgrows the matrix in as many bits is dense."""
    unit = unit_of(bits)
    shape = SHAPE_BYTES * SIXTEENTHS if is_rounded(bits) else 0
    dense = site.dense_numbers * unit.weight + shape
    whole = Option(site.full_rank, DENSE, bits, dense, weight * units.of_dense(bits))
    for name in ALLOWED_FORMATS[storage]:
        costs = FORMATS.lookup(name)(site, ranks).priced(unit) + 2 * shape * (ranks > 0)
        losses = truncation + weight * (units.of_plain(bits) if name == "factors" else units.of_pivoted(bits))
        for rank, cost in zip(ranks.tolist(), costs.tolist(), strict=True):
            if rank == site.full_rank or cost >= dense:
                yield whole
            elif rank or name == "factors":
                yield Option(rank, name, bits, int(cost), float(losses[rank]))


def as_choice(site: Site, option: Option) -> Choice:
    """An option as stage `ranks` writes it, its cost in whole bytes."""
    numbers = site.dense_numbers
    if option.storage != DENSE:
        numbers = int(FORMATS.lookup(option.storage)(site, np.array(option.rank)).priced(Unit()))
    bits = option.bits if is_rounded(option.bits) else None
    return Choice(option.rank, option.storage, (numbers,), option.cost // SIXTEENTHS, bits)


def cheapest_loss(options: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """One option for each site, of least loss together within `budget` sixteenths of a byte; the cheapest ones fit."""
    options = [_undominated(own) for own in options]
    shape = len(options), max(map(len, options))
    worth, cost = np.full(shape, -np.inf), np.zeros(shape, np.int64)
    for row, own in enumerate(options):
        worth[row, : len(own)] = [-option.loss for option in own]
        cost[row, : len(own)] = [option.cost for option in own]
    picks = knapsack.solve(Knapsack(worth, cost, budget))
    return [own[pick] for own, pick in zip(options, picks)]


def _undominated(options: Sequence[Option]) -> list[Option]:
    """Those that no other is both cheaper and better than, by cost: the knapsack takes a dearer option to be worth more."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept
