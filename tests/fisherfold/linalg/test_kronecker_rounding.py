"""Rounding under A ⊗ B against the rule written out number by number, against GPTQ's recursion, and against all codes there are."""

from itertools import product

import numpy as np
import pytest
import torch

from fisherfold.linalg.group_grid import GROUP, Rounded, fit_grid, round_nearest, stored_bytes
from fisherfold.linalg.kronecker_rounding import (
    BLOCK,
    expected_loss,
    kronecker_loss,
    round_under,
    rounding_errors,
    side_of,
)


def metric(size: int, seed: int) -> np.ndarray:
    """Positive definite, with a spectrum that spans some orders of magnitude."""
    generator = np.random.default_rng(seed)
    samples = generator.standard_normal((2 * size, 3)) @ generator.standard_normal((3, size))
    samples += 0.3 * generator.standard_normal((2 * size, size))
    return samples.T @ samples / len(samples) * np.exp(generator.standard_normal())


def problem(n: int, m: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.random.default_rng(seed).standard_normal((n, m)), metric(m, seed + 1), metric(n, seed + 2)


def by_the_rule(W, steps, half, inputs, outputs):
    """One number after the other, the whole of η recomputed for each."""
    E = np.zeros_like(W)
    for i, row in enumerate(outputs.order):
        for j, column in enumerate(inputs.order):
            ordered = E[np.ix_(outputs.order, inputs.order)]
            eta = outputs.spread[:, i] @ ordered @ inputs.spread[:, j]  # E_ij itself is still zero
            step = steps[row, column]
            code = np.clip(np.rint((W[row, column] - eta) / step), -half, half - 1)
            E[row, column] = step * code - W[row, column]
    return W + E


@pytest.mark.parametrize(("n", "m"), [(5, GROUP), (BLOCK + 3, 2 * GROUP)])
def test_feedback_follows_the_rule(n, m):
    W, A, B = problem(n, m)
    inputs, outputs = side_of(A, m), side_of(B, n)
    rounded = round_under(W, 4, inputs, outputs)
    np.testing.assert_allclose(rounded.values, by_the_rule(W, rounded.grid.steps, 8, inputs, outputs), atol=1e-12)


def test_the_loss_is_a_sum_over_separate_errors():
    W, A, B = problem(7, GROUP)
    inputs, outputs = side_of(A, GROUP), side_of(B, 7)
    E = np.random.default_rng(5).standard_normal(W.shape)
    eta = outputs.spread.T @ E[np.ix_(outputs.order, inputs.order)] @ inputs.spread
    weights = outputs.weights[outputs.order][:, None] * inputs.weights[inputs.order]
    assert (weights * eta**2).sum() == pytest.approx(kronecker_loss(E, A, B), rel=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_both_sides_beat_one_and_one_beats_none(bits):
    W, A, B = problem(48, 3 * GROUP)
    inputs, outputs, none = side_of(A, 96), side_of(B, 48), side_of(None, 48)
    losses = [
        kronecker_loss(rounded.values - W, A, B)
        for rounded in (
            round_under(W, bits, inputs, outputs),
            round_under(W, bits, inputs, none),
            round_nearest(W, bits),
        )
    ]
    assert losses == sorted(losses)
    assert losses[0] < 0.5 * losses[2]


def test_without_an_output_metric_it_is_gptq():
    """Column by column, the remaining columns made to undo the error by the inverse Hessian (arXiv 2210.17323, algorithm 1)."""
    W, A, _ = problem(6, 2 * GROUP)
    inputs = side_of(A, 64)
    rounded = round_under(W, 4, inputs, side_of(None, 6))
    order, steps = inputs.order, rounded.grid.steps
    damped = A + 1e-8 * np.trace(A) / 64 * np.eye(64)
    inverse = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    left, found = W[:, order].copy(), np.empty_like(W)
    for j, column in enumerate(order):
        found[:, column] = steps[:, column] * np.clip(np.rint(left[:, j] / steps[:, column]), -8, 7)
        left[:, j:] -= np.outer((left[:, j] - found[:, column]) / inverse[j, j], inverse[j, j:])
    np.testing.assert_allclose(rounded.values, found, atol=1e-12)


def test_few_numbers_against_all_codes():
    """Never below the best of all codes; each error in its turn at most half a step; and the best itself for a diagonal metric."""
    W, A, B = problem(2, GROUP, seed=3)
    W[:, 2:] = 0  # four numbers that matter; the others round to zero, whatever the feedback, if nothing is fed to them
    A[2:, :] = A[:, 2:] = 0
    A[np.arange(2, GROUP), np.arange(2, GROUP)] = 1
    for sides, at_best in (((A, B), False), ((np.diag(np.diag(A)), np.diag(np.diag(B))), True)):
        inputs, outputs = side_of(sides[0], GROUP), side_of(sides[1], 2)
        rounded = round_under(W, 2, inputs, outputs)
        losses = []
        for codes in product(range(-2, 2), repeat=4):
            tried = np.zeros_like(W)
            tried[:, :2] = rounded.grid.steps[:, :2] * np.reshape(codes, (2, 2))
            losses.append(kronecker_loss(tried - W, *sides))
        loss = kronecker_loss(rounded.values - W, *sides)
        assert loss >= min(losses) * (1 - 1e-9)
        assert loss <= kronecker_loss(Rounded(rounded.grid, rounded.grid.codes(W)).values - W, *sides) * (1 + 1e-9)
        if at_best:
            assert loss == pytest.approx(min(losses))


def test_the_expected_loss_is_that_of_many_numbers():
    W, A, B = problem(96, 4 * GROUP)
    inputs, outputs = side_of(A, 128), side_of(B, 96)
    rounded = round_under(W, 8, inputs, outputs)
    loss = kronecker_loss(rounded.values - W, A, B)
    assert loss == pytest.approx(expected_loss(rounded.grid, inputs, outputs), rel=0.15)


def test_drawn_errors_are_those_of_rounding_on_average():
    """Their loss, and how it is spread over directions: η of both has the same mean square in every row and column."""
    W, A, B = problem(96, 128)
    inputs, outputs = side_of(A, 128), side_of(B, 96)
    made = round_under(W, 4, inputs, outputs).values - W
    several = [rounding_errors(W, 4, inputs, outputs, torch.Generator().manual_seed(seed)) for seed in range(8)]
    expected = expected_loss(fit_grid(W, 4, inputs.weights), inputs, outputs)
    assert np.mean([kronecker_loss(E, A, B) for E in several]) == pytest.approx(expected, rel=0.02)
    root_A, root_B = np.linalg.cholesky(A), np.linalg.cholesky(B)
    for axis in (0, 1):
        own = np.square(root_B.T @ made @ root_A).mean(axis)
        drawn = np.mean([np.square(root_B.T @ E @ root_A).mean(axis) for E in several], axis=0)
        assert np.corrcoef(np.log(own), np.log(drawn))[0, 1] > 0.5


def test_a_grid_is_no_worse_than_the_widest_and_storable():
    values = np.random.default_rng(0).standard_normal((8, 2 * GROUP))
    values[0, :GROUP] = 0
    fitted, widest = fit_grid(values, 4), round_nearest(values, 4)
    rounded = Rounded(fitted, fitted.codes(values))
    assert np.square(rounded.values - values).sum() < np.square(widest.values - values).sum()
    assert (rounded.values[0, :GROUP] == 0).all()
    scales = torch.from_numpy(fitted.scales)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(scales.to(dtype).double(), scales)
    assert stored_bytes(8, 64, 4) == 8 * (32 + 4)
