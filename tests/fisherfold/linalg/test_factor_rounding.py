"""Factors of few bits against rounding them to nearest, and their products against what the stored layer computes."""

import numpy as np
import pytest

from fisherfold.linalg.factor_rounding import (
    LayerMetric,
    rotated_gauge,
    round_inputs_pivoted,
    round_outputs_pivoted,
    round_plain,
)
from fisherfold.linalg.group_grid import round_nearest
from fisherfold.linalg.pivoted import Pivoted, pivot_factors

N, M, RANK = 128, 96, 32


@pytest.fixture
def layer():
    """W of falling spectrum, correlated A and B, and the factors of its best approximation under them, balanced."""
    generator = np.random.default_rng(0)
    roots = [generator.standard_normal((size, size)) * np.exp(0.7 * generator.standard_normal(size)) for size in (M, N)]
    A, B = (root @ root.T / len(root) + 0.05 * np.eye(len(root)) for root in roots)
    W = generator.standard_normal((N, 60)) * 0.9 ** np.arange(60) @ generator.standard_normal((60, M))
    R_A, R_B = np.linalg.cholesky(A), np.linalg.cholesky(B)
    U, sigma, Vh = np.linalg.svd(R_B.T @ W @ R_A, full_matrices=False)
    root = np.sqrt(sigma[:RANK])
    left = np.linalg.solve(R_B.T, U[:, :RANK] * root)
    right = np.linalg.solve(R_A.T, (root[:, None] * Vh[:RANK]).T).T
    return W, left, right, LayerMetric(A, B)


def rounded_product(side, left, right, W, bits, metric):
    """(feedback, nearest): the products [n, m] of the stored matrices."""
    if side == "plain":
        found = round_plain(left, right, W, bits, metric)
        nearest = round_nearest(left, bits).values @ round_nearest(right, bits).values
        return found.up.values @ found.down.values, nearest
    exact = pivot_factors(left, right, side)
    rounding = round_outputs_pivoted if side == "outputs" else round_inputs_pivoted
    found = rounding(exact.pivot, exact.rest, exact.order, W, bits, metric)
    pivot, rest = (found.down, found.up) if side == "outputs" else (found.up, found.down)
    nearest = Pivoted(
        side, exact.order, round_nearest(exact.pivot, bits).values, round_nearest(exact.rest, bits).values
    )
    return Pivoted(side, exact.order, pivot.values, rest.values).product(), nearest.product()


@pytest.mark.parametrize("side", ["plain", "outputs", "inputs"])
@pytest.mark.parametrize(("bits", "share"), [(8, 0.3), (4, 0.35)])
def test_feedback_loses_a_fraction_of_nearest(layer, side, bits, share):
    """The loss that rounding adds to that of truncation."""
    W, left, right, metric = layer
    cut = metric.loss(left @ right - W)
    mine, nearest = (metric.loss(product - W) - cut for product in rounded_product(side, left, right, W, bits, metric))
    assert mine < share * nearest


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_rotated_gauge_is_balanced_and_the_same_product(layer, scale):
    W, left, right, metric = layer
    turned = rotated_gauge(left * scale, right / scale, metric)
    np.testing.assert_allclose(turned[0] @ turned[1], left @ right, atol=1e-8 * np.abs(W).max())
    of_left, of_right = turned[0].T @ metric.B @ turned[0], turned[1] @ metric.A @ turned[1].T
    np.testing.assert_allclose(of_left, of_right, atol=1e-6 * np.trace(of_left) / RANK)
    assert np.diag(of_left).max() < 0.5 * np.linalg.eigvalsh(of_left)[-1]


def test_factors_of_a_product_of_less_rank_are_rounded_all_the_same(layer):
    _, left, right, metric = layer
    left[:, 20:], right[20:] = 0, 0
    found = round_plain(left, right, left @ right, 8, metric)
    product = left @ right
    assert metric.loss(found.up.values @ found.down.values - product) < 1e-3 * metric.loss(product)
