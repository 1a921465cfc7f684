"""Ranks and bits in one knapsack, against all combinations, and predicted losses against those of rounding."""

from itertools import product

import numpy as np
import pytest

from fisherfold.allocators.cost import DENSE, unit_of
from fisherfold.allocators.loss_weights import (
    KINDS,
    UNWEIGHTED,
    Foreseen,
    LossWeights,
    foresee,
    power_of,
    site_weights,
    weight_of,
)
from fisherfold.allocators.widths import UNROUNDED, cheapest_loss, options_of
from fisherfold.linalg.factor_rounding import LayerMetric, round_plain
from fisherfold.linalg.group_grid import GROUP, stored_bytes
from fisherfold.linalg.kronecker_rounding import round_under, side_of
from fisherfold.linalg.rounding_losses import PIVOTED, ROTATED, rounding_units
from fisherfold.network.layers import LinearLayer
from fisherfold.network.sites import Site

N, M = 128, 96
WIDTHS = (UNROUNDED, 8, 4)


def layer(seed: int):
    """W, its balanced components and σ, and its metric."""
    generator = np.random.default_rng(seed)
    roots = [generator.standard_normal((size, size)) / np.sqrt(size) + np.eye(size) for size in (M, N)]
    A, B = (root @ root.T + 0.3 * np.eye(len(root)) for root in roots)
    W = generator.standard_normal((N, M)) * 0.95 ** np.arange(M) @ generator.standard_normal((M, M))
    R_A, R_B = np.linalg.cholesky(A), np.linalg.cholesky(B)
    U, sigma, Vh = np.linalg.svd(R_B.T @ W @ R_A, full_matrices=False)
    left = np.linalg.solve(R_B.T, U * np.sqrt(sigma))
    right = np.linalg.solve(R_A.T, (np.sqrt(sigma)[:, None] * Vh).T).T
    return W, left, right, sigma, LayerMetric(A, B)


def site(name: str) -> Site:
    return Site(name, (LinearLayer(name, N, M, False, False, name),))


def options(seed: int, weights: LossWeights = UNWEIGHTED, storage: str = "pivoted"):
    W, left, right, sigma, metric = layer(seed)
    units = rounding_units(W, left, right, sigma, metric.inputs, metric.outputs)
    return options_of(site(f"l{seed}"), sigma, units, WIDTHS, np.arange(0, M + 1, GROUP), storage, weights)


def test_the_knapsack_finds_the_best_of_all_combinations():
    own = [options(seed) for seed in range(3)]
    dense = N * M * unit_of(UNROUNDED).weight * 3
    for share in (0.15, 0.3, 0.5):
        budget = int(share * dense)
        chosen = cheapest_loss(own, budget)
        fitting = [picks for picks in product(*own) if sum(option.cost for option in picks) <= budget]
        assert sum(option.cost for option in chosen) <= budget
        least = min(sum(option.loss for option in picks) for picks in fitting)
        assert sum(option.loss for option in chosen) == pytest.approx(least)


def test_costs_are_the_bytes_of_what_is_stored():
    for option in options(0):
        if option.bits == UNROUNDED:
            continue
        rank, order = option.rank, 8 * M  # the inputs, which are fewer, are pivoted
        shapes = {
            DENSE: [(N, M)],
            "factors": [(rank, M), (N, rank)],
            "pivoted": [(rank, M - rank), (N, rank)],
        }[option.storage]
        bytes_ = sum(stored_bytes(*shape, option.bits) for shape in shapes) + order * (option.storage == "pivoted")
        assert option.cost == 16 * (bytes_ + 16 * len(shapes) * (rank > 0))  # each matrix has its shape


@pytest.mark.parametrize("bits", [4, 8])
def test_predicted_losses_are_near_those_of_rounding(bits):
    W, left, right, sigma, metric = layer(1)
    units = rounding_units(W, left, right, sigma, metric.inputs, metric.outputs)
    dense = metric.loss(round_under(W, bits, side_of(metric.A, M), side_of(metric.B, N)).values - W)
    assert dense == pytest.approx(units.of_dense(bits), rel=0.35)
    rank = 64
    cut = left[:, :rank] @ right[:rank]
    found = round_plain(left[:, :rank], right[:rank], cut, bits, metric)
    measured = metric.loss(found.up.values @ found.down.values - cut)
    assert measured == pytest.approx(units.of_plain(bits)[rank], rel=0.5)


def test_units_are_their_formula_number_by_number():
    W, left, right, sigma, metric = layer(2)
    units = rounding_units(W, left, right, sigma, metric.inputs, metric.outputs)
    D_A, D_B = metric.inputs.weights, metric.outputs.weights
    k, group = 40, slice(GROUP, 2 * GROUP)
    of_left = sum(D_B[i] * max(abs(left[i, group])) ** 2 for i in range(N))
    of_right = sum(D_A[j] * max(abs(right[k, j // GROUP * GROUP :][:GROUP])) ** 2 for j in range(M))
    assert units.components[k] == pytest.approx(sigma[k] * (of_left + of_right) / 12)
    ranges = sum(
        D_B[i] * D_A[j] * max(abs(W[i, j // GROUP * GROUP :][:GROUP])) ** 2 for i in range(N) for j in range(M)
    )
    assert units.dense == pytest.approx(ranges / 12)
    assert units.of_dense(4) == pytest.approx(units.dense / 64)
    assert units.of_pivoted(8)[[0, 2]].tolist() == pytest.approx([0, PIVOTED * units.components[:2].sum() / 4**7])
    ranges = units.components / sigma
    mean = np.prod(sigma[:3]) ** (1 / 3)
    assert units.of_plain(4)[[0, 3]].tolist() == pytest.approx([0, ROTATED * mean * ranges[:3].sum() / 4**3])


def test_an_option_loses_what_is_cut_and_what_is_rounded():
    W, left, right, sigma, metric = layer(0)
    units = rounding_units(W, left, right, sigma, metric.inputs, metric.outputs)
    for option in options(0):
        cut = float(np.sum(sigma[option.rank :] ** 2))
        of_ranks = {"factors": units.of_plain, "pivoted": units.of_pivoted}.get(option.storage)
        rounded = of_ranks(option.bits)[option.rank] if of_ranks else units.of_dense(option.bits)
        assert option.loss == pytest.approx(cut + (0.0 if option.bits == UNROUNDED else rounded))
    assert {option.storage for option in options(0)} >= {DENSE, "pivoted"}


def test_weights_count_what_is_cut_and_what_is_rounded_for_more():
    plain, weighted = options(0), options(0, LossWeights(3.0, 7.0, power=2.0, shallow=0.5))
    sigma = layer(0)[3]
    for one, other in zip(plain, weighted, strict=True):
        cut = float(np.sum(sigma[one.rank :] ** 2))
        assert other.loss == pytest.approx(6 * cut**2 + 7 * (one.loss - cut))


def test_weights_are_half_of_what_is_measured_over_what_is_predicted():
    """In logarithms, around the middle of all roundings; a group of which nothing is measured has the middle."""
    groups = {("a", 0): [0], ("b", 0): [1, 2], ("c", 0): [3]}
    losses = dict(zip(KINDS, (2.0, 16.0, 4.0)))
    nothing = dict.fromkeys(KINDS, 0.0)
    foreseen = {site: Foreseen((8, 4), nothing if site == 3 else losses) for site in range(4)}
    measured = {
        ("a", 0): dict(zip(KINDS, (1.0, 16.0, 4.0))),  # quotients 1, 2, 2
        ("b", 0): dict(zip(KINDS, (8.0, 64.0, 32.0))),  # 4, 4, 8
        ("c", 0): dict(zip(KINDS, (1.0, 1.0, 1.0))),
    }
    found = site_weights(groups, foreseen, measured)
    assert found.of_sites[0] == LossWeights(pytest.approx(2.0), pytest.approx(8**0.5), pytest.approx(4 / 3), 2.0)
    assert found.of_sites[1] == found.of_sites[2] == LossWeights(4.0, pytest.approx(32**0.5), 1.0, 2.0)
    assert found.of_sites[3] == LossWeights(4.0, 4.0)
    assert len(found.table) == 9 and weight_of(1e9, 2.0) == pytest.approx(2 * 32**0.5)


def test_a_power_fits_both_measured_losses():
    """Eight times the predicted loss, thirty-two times the measured one, is 8^(5/3)."""
    weights = LossWeights(2.0, power=power_of(8.0, 4.0), shallow=0.1)
    assert weights.of_truncation(np.array([0.0, 0.1, 0.8])) == pytest.approx([0.0, 0.2, 0.2 * 32])
    assert [power_of(8.0, 0.1), power_of(8.0, 1e9), power_of(1.0, 5.0)] == [1.0, 3.0, 1.0]


def test_cuts_that_are_measured_lose_what_rounding_does_and_more():
    W, left, right, sigma, metric = layer(0)
    units = rounding_units(W, left, right, sigma, metric.inputs, metric.outputs)
    found = foresee(sigma, np.arange(0, M + 1, 4), units, 4)
    shallow, deep = found.ranks
    tails = [float(np.sum(sigma[rank:] ** 2)) for rank in (*found.ranks, shallow + 4, deep + 4)]
    assert list(found.losses.values()) == pytest.approx([*tails[:2], units.of_dense(4)])
    assert tails[2] < units.of_dense(4) <= tails[0] and tails[3] < 8 * tails[0] <= tails[1]
    assert foresee(sigma, np.array([64, 96]), units, 2).ranks == (64, 64)
