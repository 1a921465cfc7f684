"""What storage and multiples cost, by the loss that is predicted."""

import numpy as np
import pytest
from test_allocation import brute_force, task

from fisherfold.allocators.allocation import Allocation, pose
from fisherfold.allocators.budget import parameters
from fisherfold.allocators.format_price import format_price
from fisherfold.allocators.limits import Limits
from fisherfold.run.params import RanksParams

SHAPES = [(12, 16), (16, 12), (8, 24)]


def posed(storage: str, round_to: int, ratio: float = 0.4, ceiling: float = 1.0) -> tuple[Allocation, Limits]:
    like = task(SHAPES, ratio)
    params = RanksParams(ratio=ratio, storage=storage, round_to=round_to, ceiling=ceiling)
    return pose(like.sites, like.spectra, params, Limits.of(params)), Limits.of(params)


def loss(each: Allocation) -> float:
    """The least predicted loss, by trying all ranks."""
    return 0.5 * (sum(float(np.square(sigma).sum()) for sigma in each.spectra) - brute_force(each))


@pytest.mark.parametrize(("storage", "round_to"), [("pivoted", 4), ("factors", 1), ("factors", 4)])
def test_the_price_is_that_of_the_best_ranks_of_both(storage, round_to):
    held, limits = posed(storage, round_to)
    freest, _ = posed("pivoted", 1)
    price = format_price(held, limits, parameters(held.sites))
    assert price == pytest.approx(loss(held) / loss(freest) - 1, rel=0.05)  # the last ranks are a knapsack's, not exact
    assert price > 0.05


def test_the_freest_format_has_none():
    held, limits = posed("pivoted", 1)
    assert format_price(held, limits, parameters(held.sites)) is None


def test_limits_that_only_this_format_fits():
    held, limits = posed(
        "factors", 1, ratio=0.25, ceiling=0.5
    )  # pivoted layers of half the ranks store less than is left
    assert format_price(held, limits, parameters(held.sites)) is None
