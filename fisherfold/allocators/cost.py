"""What a site costs: the one model that allocation plans with and the checkpoint is counted against.

n outputs (of all layers of the site), m inputs, k = min(n, m), rank r. Weights and index arrays count, biases do not (no method
changes them).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from fisherfold.linalg.group_grid import GROUP, SCALE_BYTES
from fisherfold.network.sites import Site
from fisherfold.run.registry import Registry

DENSE = "dense"
MOST_BITS = 8
"""Of a number that is rounded to a whole one."""
SIXTEENTHS = 16
"""Costs are counted in sixteenths of a byte: a number of b bits and its share of a scale take 2 b + 1 of them."""


@dataclass(frozen=True)
class Unit:
    """What a budget is counted in: the price of a weight and of an entry of an index array."""

    weight: int = 1
    index: int = 1


def is_rounded(bits: int) -> bool:
    """Whether numbers of so many bits are rounded to whole ones."""
    return bits <= MOST_BITS


def unit_of(bits: int, index_bytes: int = 8) -> Unit:
    """The price of a number of so many bits, with its share of a scale, and of an index."""
    scale = SCALE_BYTES * SIXTEENTHS // GROUP if is_rounded(bits) else 0
    return Unit(bits * SIXTEENTHS // 8 + scale, index_bytes * SIXTEENTHS)


@dataclass(frozen=True)
class Stored:
    """Weights and index entries of a site at some ranks, int64 of the shape of the ranks."""

    weights: np.ndarray
    indices: np.ndarray

    def priced(self, unit: Unit) -> np.ndarray:
        """What every rank costs in this unit, by rank."""
        return self.weights * unit.weight + self.indices * unit.index


Format = Callable[[Site, np.ndarray], Stored]
FORMATS: Registry[Format] = Registry("ranks.storage")
"""What a site of rank r stores, by format: (site, ranks) -> Stored."""
PIVOTED_SIDES = {"pivoted": None, "pivoted_outputs": "outputs", "pivoted_inputs": "inputs"}
"""Formats in the pivoted gauge, and their side; None is the shorter one, whose order is the smaller. Layers that share inputs pivot those."""
ALLOWED_FORMATS = {"factors": ("factors",)} | {name: (name, "factors") for name in PIVOTED_SIDES}
"""Formats that a value of ``ranks.storage`` may use: for few ranks a pivot order costs more than it saves."""


@FORMATS.register("factors")
def plain_factors(site: Site, ranks: np.ndarray) -> Stored:
    """The factors [n, r] and [r, m]: r(n + m)."""
    return Stored(ranks * (site.outputs + site.inputs), np.zeros_like(ranks))


def pivoted_factors(site: Site, ranks: np.ndarray, side: str | None) -> Stored:
    """Pivoted factors and the order of their side: r(n + m − r) + n, m or k; nothing at rank 0. See ``fisherfold.linalg.pivoted``."""
    orders = {"outputs": site.outputs, "inputs": site.inputs, None: site.full_rank}
    order = orders["inputs" if len(site.layers) > 1 else side]
    return Stored(ranks * (site.outputs + site.inputs - ranks), np.where(ranks > 0, order, 0))


for _name, _side in PIVOTED_SIDES.items():
    FORMATS.register(_name)(partial(pivoted_factors, side=_side))


@dataclass(frozen=True)
class Choice:
    """How one site is kept.

    Attributes:
        rank: r; of a dense site k.
        storage: "dense" or a name of FORMATS.
        numbers: what each of its layers stores, the shared factor and its order with the first.
        cost: of the whole site, in the unit of the budget.
        bits: of its numbers, where ranks.widths has rounded them; None: those of factorize.dtype or factorize.bits.
    """

    rank: int
    storage: str
    numbers: tuple[int, ...]
    cost: int
    bits: int | None = None


def choose_storage(site: Site, rank: int, storage: str, unit: Unit = Unit()) -> Choice:
    """The cheapest format for `rank`; full rank, and any rank whose factors outgrow the matrix, is dense."""
    ranks = np.array(rank)
    cost, name = min((int(FORMATS.lookup(name)(site, ranks).priced(unit)), name) for name in ALLOWED_FORMATS[storage])
    dense = site.dense_numbers * unit.weight
    if rank == site.full_rank or cost >= dense:
        numbers = tuple(layer.outputs * site.inputs for layer in site.layers)
        return Choice(site.full_rank, DENSE, numbers, dense)
    stored = FORMATS.lookup(name)(site, ranks).priced(Unit())
    own = [rank * layer.outputs for layer in site.layers]
    return Choice(rank, name, (int(stored) - sum(own[1:]), *own[1:]), cost)


def rank_costs(site: Site, storage: str, unit: Unit = Unit()) -> np.ndarray:
    """The cost at every rank 0 … k, int64 [k + 1], never more than the dense nm (which is the cost at k)."""
    dense = site.dense_numbers * unit.weight
    ranks = np.arange(site.full_rank + 1, dtype=np.int64)
    costs = np.min([FORMATS.lookup(name)(site, ranks).priced(unit) for name in ALLOWED_FORMATS[storage]], axis=0)
    costs[-1] = dense
    return np.minimum(costs, dense)
