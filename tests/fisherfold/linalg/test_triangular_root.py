"""The triangular root: the weighted SVD of the eigenvectors' root, and eigenvectors where it is none."""

import pytest
import torch

from fisherfold.linalg.triangular_root import TriangularRoot, outermost, weighting_root
from fisherfold.linalg.weighted_svd import BlockRoot, MetricRoot, metric_root, weighted_svd
from fisherfold.run.errors import NumericalError


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(size: int, rows: int, seed: int = 0) -> torch.Tensor:
    x = draw(rows, size, seed=seed) * torch.logspace(0, -4, size).double()
    return x.T @ x


@pytest.mark.parametrize("rows", [200, 9])
def test_components_are_those_of_the_eigenvectors_root(rows):
    """Nine rows give a singular metric, which damping alone makes definite."""
    W, A, B = draw(30, 40), gram(40, rows, 1), gram(30, rows, 2)
    fast = weighting_root(A, 0.01), weighting_root(B, 0.05)
    assert all(isinstance(root, TriangularRoot) for root in fast)
    found, expected = weighted_svd(W, *fast), weighted_svd(W, metric_root(A, 0.01), metric_root(B, 0.05))
    torch.testing.assert_close(found.sigma, expected.sigma, rtol=1e-9, atol=1e-12 * float(expected.sigma[0]))
    for rank in (1, 12, 30):
        product, wanted = (basis.left[:, :rank] @ basis.right[:rank] for basis in (found, expected))
        torch.testing.assert_close(product, wanted, rtol=1e-6, atol=1e-8)


def test_the_root_is_of_the_damped_metric():
    M = gram(20, 50)
    root = weighting_root(M, 0.2)
    damped = 0.8 * M + 0.2 * M.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(root.factor @ root.factor.T, damped)
    torch.testing.assert_close(root.times(draw(3, 20)), draw(3, 20) @ root.factor)
    assert root.damping == 0.2


@pytest.mark.parametrize("size", [3, 12, 300])
def test_extremes_are_the_outer_eigenvalues(size):
    M = gram(size, 2 * size)
    root, values = weighting_root(M, 0.01), metric_root(M, 0.01).scales.square()
    assert root.extremes == pytest.approx((float(values.min()), float(values.max())), rel=0.05)
    assert root.condition == pytest.approx(float(values.max() / values.min()), rel=0.08)


def test_outermost_takes_what_lies_in_few_directions():
    assert outermost(lambda v: 0 * v, torch.eye(4).double()) == 0


def test_eigenvectors_are_taken_where_there_is_no_such_root():
    M = gram(6, 20)
    for metric, damping in (
        (M, 0.0),
        (M.diagonal(), 0.1),
        (None, 0.1),
        (M, lambda values: 0.1),
        (torch.zeros(6, 6), 0.1),
    ):
        assert isinstance(weighting_root(metric, damping), MetricRoot)


def test_what_is_not_semi_definite_is_refused_though_damping_hides_it():
    M = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05], dtype=torch.float64))
    with pytest.raises(NumericalError, match="not positive semi-definite"):
        weighting_root(M, 0.3)
    M[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        weighting_root(M, 0.3)


def test_blocks_of_either_kind_have_one_condition():
    first, second = gram(5, 20), gram(4, 20, 3)
    mixed = BlockRoot((weighting_root(first, 0.1), metric_root(second, 0.1)), (5, 4))
    alike = BlockRoot((metric_root(first, 0.1), metric_root(second, 0.1)), (5, 4))
    assert mixed.condition == pytest.approx(alike.condition, rel=1e-6)
