"""Experts' ranks in classes: few, within the budget, and the same where there is nothing to do."""

import itertools

import numpy as np
import pytest

from fisherfold.allocators.allocation import ALLOCATORS, allocate, pose
from fisherfold.allocators.expert_classes import cut, into_classes
from fisherfold.linalg.knapsack import pick
from fisherfold.network.layers import LinearLayer
from fisherfold.network.sites import Site
from fisherfold.run.params import RanksParams


def sites(experts: int = 8) -> list[Site]:
    names = [("q", None), *((f"experts.up.{e}", "experts.up") for e in range(experts))]
    return [Site(name, (LinearLayer(name, 24, 16, False, False, name, stack),)) for name, stack in names]


def task(storage: str = "factors", ratio: float = 0.4, seed: int = 0, **limits):
    generator = np.random.default_rng(seed)
    made = sites()
    spectra = [np.sort(generator.gamma(0.5, 3.0 ** generator.normal(), 16))[::-1] for _ in made]
    return pose(made, spectra, RanksParams(ratio=ratio, storage=storage, **limits))


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("most", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_few_ranks_within_the_budget_and_little_is_lost(storage, most, seed):
    asked = task(storage, seed=seed)
    free = allocate(asked, ALLOCATORS.lookup("fisher"))
    found = into_classes(asked, free, most)
    assert len(np.unique(free[1:])) > 2, "nothing to do in this test"
    assert len(np.unique(found[1:])) <= most and found[0] == free[0]
    assert pick(asked.allowed, found).all() and pick(asked.costs, found).sum() <= asked.budget
    assert asked.predicted_loss(found) >= asked.predicted_loss(free)
    same = into_classes(asked, free, len(np.unique(free[1:])))
    assert np.array_equal(same, free)


def test_more_classes_lose_less():
    asked = task()
    free = allocate(asked, ALLOCATORS.lookup("fisher"))
    one, four = (asked.predicted_loss(into_classes(asked, free, most)) for most in (1, 4))
    assert one > four


def test_experts_without_a_choice_keep_their_rank():
    asked = task(exclude=["experts.up.3"])
    free = allocate(asked, ALLOCATORS.lookup("fisher"))
    found = into_classes(asked, free, 2)
    assert found[4] == 16 and len(np.unique(np.delete(found[1:], 3))) <= 2


def test_runs_have_the_least_spread():
    values = np.array([1, 1, 2, 8, 9, 20, 21, 21])

    def spread(edges) -> float:
        return sum(((values[a:b] - values[a:b].mean()) ** 2).sum() for a, b in itertools.pairwise(edges))

    best = min(spread((0, *inner, 8)) for inner in itertools.combinations(range(1, 8), 2))
    assert list(cut(values, 3)) == [0, 3, 5, 8] and spread(cut(values, 3)) == pytest.approx(best)
