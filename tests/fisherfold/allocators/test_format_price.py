"""What storage and multiples cost, by the loss that is predicted."""

import itertools

import numpy as np
import pytest

from fisherfold.allocators.allocation import Allocation, pose
from fisherfold.allocators.budget import parameters
from fisherfold.allocators.format_price import format_price
from fisherfold.allocators.limits import Limits
from fisherfold.network.layers import LinearLayer
from fisherfold.network.sites import Site
from fisherfold.run.params import RanksParams

SHAPES = {"a": (12, 16), "b": (16, 12), "c": (8, 24)}
SITES = [Site(name, (LinearLayer(name, n, m, False, False, name),)) for name, (n, m) in SHAPES.items()]
SPECTRA = [0.8 ** np.arange(site.full_rank) * scale for site, scale in zip(SITES, (1.0, 2.0, 0.7))]


def posed(storage: str, round_to: int, ratio: float = 0.4, ceiling: float = 1.0) -> tuple[Allocation, Limits]:
    params = RanksParams(ratio=ratio, storage=storage, round_to=round_to, ceiling=ceiling)
    return pose(SITES, SPECTRA, params, Limits.of(params)), Limits.of(params)


def least_loss(task: Allocation) -> float:
    """Of all allowed ranks within the budget, by trying each."""
    options = itertools.product(*(np.flatnonzero(row) for row in task.allowed))
    rows = range(len(SITES))
    return min(task.predicted_loss(ranks) for ranks in options if task.costs[rows, ranks].sum() <= task.budget)


@pytest.mark.parametrize(("storage", "round_to"), [("pivoted", 4), ("factors", 1), ("factors", 4)])
def test_the_price_is_that_of_the_best_ranks_of_both(storage, round_to):
    (held, limits), (freest, _) = posed(storage, round_to), posed("pivoted", 1)
    price = format_price(held, limits, parameters(SITES))
    assert price == pytest.approx(
        least_loss(held) / least_loss(freest) - 1, rel=0.1
    )  # a Lagrangian: the last rank may be lost
    assert price > 0.001


def test_the_freest_format_has_none():
    held, limits = posed("pivoted", 1)
    assert format_price(held, limits, parameters(SITES)) is None


def test_limits_that_only_this_format_fits():
    held, limits = posed(
        "factors", 1, ratio=0.25, ceiling=0.5
    )  # pivoted layers of half the ranks store less than is left
    assert format_price(held, limits, parameters(SITES)) is None
