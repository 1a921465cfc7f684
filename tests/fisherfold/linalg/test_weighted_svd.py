"""Weighted SVD against the loss it minimises, tr(ΔWᵀ B ΔW A), and against roots that are inverted explicitly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherfold.linalg.weighted_svd import BlockRoot, MetricRoot, metric_root, weighted_svd
from fisherfold.run.errors import NumericalError

F64 = torch.float64
SHAPES = [(6, 9), (9, 6), (7, 7), (1, 5), (5, 1)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def positive(size: int, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    """A random positive semi-definite matrix of the given rank."""
    factor = draw(size, size if rank is None else rank, seed=seed)
    return factor @ factor.T


def loss(error: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> float:
    return torch.trace(error.T @ B @ error @ A).item()


def truncated(basis, rank: int) -> torch.Tensor:
    return basis.left[:, :rank] @ basis.right[:rank]


def symmetric_root(metric: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(metric)
    return vectors * values.sqrt() @ vectors.T


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_equals_the_truncated_svd_with_inverted_roots(outputs: int, inputs: int) -> None:
    W, A, B = draw(outputs, inputs), positive(inputs, seed=1), positive(outputs, seed=2)
    basis = weighted_svd(W, metric_root(A, 0), metric_root(B, 0))
    root_A, root_B = symmetric_root(A), symmetric_root(B)
    U, sigma, Vh = torch.linalg.svd(root_B @ W @ root_A, full_matrices=False)
    torch.testing.assert_close(basis.sigma, sigma)
    for rank in range(min(outputs, inputs) + 1):
        oracle = root_B.inverse() @ (U[:, :rank] * sigma[:rank] @ Vh[:rank]) @ root_A.inverse()
        torch.testing.assert_close(truncated(basis, rank), oracle, rtol=1e-8, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 8),
    inputs=st.integers(1, 8),
    input_rank=st.integers(1, 8),
    output_rank=st.integers(1, 8),
    seed=st.integers(0, 999),
)
def test_tail_sums_are_losses_and_all_components_give_the_weight(
    outputs: int, inputs: int, input_rank: int, output_rank: int, seed: int
) -> None:
    """Also for metrics that are singular on either side or both, without damping."""
    W = draw(outputs, inputs, seed=seed)
    A, B = positive(inputs, min(input_rank, inputs), seed + 1), positive(outputs, min(output_rank, outputs), seed + 2)
    basis = weighted_svd(W, metric_root(A, 0), metric_root(B, 0))
    total = loss(W, A, B)
    full = min(outputs, inputs)
    assert basis.left.shape == (outputs, full) and basis.right.shape == (full, inputs)
    for rank in range(full + 1):
        tail = basis.sigma[rank:].square().sum().item()
        assert loss(W - truncated(basis, rank), A, B) == pytest.approx(tail, rel=1e-6, abs=1e-8 * total)
    torch.testing.assert_close(basis.left @ basis.right, W, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES[:3])
@pytest.mark.parametrize("singular", [False, True])
def test_no_other_matrix_of_that_rank_costs_less(outputs: int, inputs: int, singular: bool) -> None:
    A = positive(inputs, inputs - 2 if singular else None, seed=1)
    W, B = draw(outputs, inputs), positive(outputs, seed=2)
    basis = weighted_svd(W, metric_root(A, 0), metric_root(B, 0))
    for rank in (1, 3):
        best = loss(W - truncated(basis, rank), A, B)
        for seed in range(30):
            left = basis.left[:, :rank] + 0.2 * draw(outputs, rank, seed=seed)
            right = basis.right[:rank] + 0.2 * draw(rank, inputs, seed=seed + 100)
            assert loss(W - left @ right, A, B) >= best * (1 - 1e-9)
        # the best right factor for a random left one, by weighted least squares
        left = draw(outputs, rank, seed=7)
        right = torch.linalg.solve(left.T @ B @ left, left.T @ B @ W)
        assert loss(W - left @ right, A, B) >= best * (1 - 1e-9)


def test_components_are_balanced_in_the_weighted_basis() -> None:
    W, A, B = draw(6, 9), positive(9, seed=1), positive(6, seed=2)
    basis = weighted_svd(W, metric_root(A, 0), metric_root(B, 0))
    torch.testing.assert_close(basis.left.T @ B @ basis.left, basis.sigma.diag(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(basis.right @ A @ basis.right.T, basis.sigma.diag(), rtol=1e-8, atol=1e-8)


def test_identity_metrics_give_the_plain_svd() -> None:
    W = draw(6, 9)
    basis = weighted_svd(W, metric_root(None, 0.3), metric_root(None, 0.3))
    torch.testing.assert_close(basis.sigma, torch.linalg.svdvals(W))
    torch.testing.assert_close(basis.left.square().sum(0), basis.sigma)


def test_scaled_and_rotated_metrics() -> None:
    """c A scales every σ by √c and moves no subspace; a rotation of inputs and metric together rotates the basis alone."""
    W, A, B = draw(6, 9), positive(9, seed=1), positive(6, seed=2)
    Q = torch.linalg.qr(draw(9, 9, seed=3)).Q
    plain = weighted_svd(W, metric_root(A, 0.1), metric_root(B, 0.1))
    scaled = weighted_svd(W, metric_root(9 * A, 0.1), metric_root(4 * B, 0.1))
    rotated = weighted_svd(W @ Q, metric_root(Q.T @ A @ Q, 0.1), metric_root(B, 0.1))
    torch.testing.assert_close(scaled.sigma, 6 * plain.sigma)
    torch.testing.assert_close(truncated(scaled, 3), truncated(plain, 3))
    torch.testing.assert_close(rotated.sigma, plain.sigma)
    torch.testing.assert_close(truncated(rotated, 3), truncated(plain, 3) @ Q)


@pytest.mark.parametrize("damping", [0.0, 0.05, 1.0])
def test_a_diagonal_metric_equals_its_full_matrix_and_forms_none(damping: float) -> None:
    W, diagonal, B = draw(6, 9), draw(9, seed=1).square(), positive(6, seed=2)
    vector, matrix = metric_root(diagonal, damping), metric_root(diagonal.diag(), damping)
    assert vector.vectors is None
    assert vector.condition == pytest.approx(matrix.condition)
    by_vector = weighted_svd(W, vector, metric_root(B, 0))
    by_matrix = weighted_svd(W, matrix, metric_root(B, 0))
    torch.testing.assert_close(by_vector.sigma, by_matrix.sigma)
    for rank in (1, 4, 6):
        torch.testing.assert_close(truncated(by_vector, rank), truncated(by_matrix, rank))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 8), rank=st.integers(1, 8), damping=st.floats(0, 1), seed=st.integers(0, 99))
def test_root_of_a_damped_metric(size: int, rank: int, damping: float, seed: int) -> None:
    M = positive(size, min(rank, size), seed)
    root = metric_root(M, damping)
    R = root.times(torch.eye(size, dtype=F64))
    damped = (1 - damping) * M + damping * M.diagonal().mean() * torch.eye(size, dtype=F64)
    torch.testing.assert_close(R @ R.T, damped, rtol=1e-9, atol=1e-9 * M.trace().item())
    assert root.damping == damping
    if damping > 0.01:
        assert root.condition == pytest.approx(torch.linalg.cond(damped).item(), rel=1e-6)


def test_condition_of_a_singular_metric_is_infinite_and_damping_bounds_it() -> None:
    diagonal = torch.tensor([4.0, 0.0, 2.0])
    assert metric_root(diagonal, 0).condition == float("inf")
    assert metric_root(diagonal, 0.5).condition == pytest.approx(3.0)
    assert metric_root(None, 0.5) == MetricRoot(None, None, 1.0, 0.0)


def test_an_ill_conditioned_metric_keeps_the_digits_of_the_weight() -> None:
    """Eigenvalues over twelve orders of magnitude on both sides; inverted roots would lose the weight altogether."""
    Q, P = (torch.linalg.qr(draw(size, size, seed=size)).Q for size in (40, 50))
    B, A = Q * torch.logspace(0, -12, 40, dtype=F64) @ Q.T, P * torch.logspace(0, -12, 50, dtype=F64) @ P.T
    W = draw(40, 50)
    basis = weighted_svd(W, metric_root(A, 0), metric_root(B, 0))
    assert (basis.left.float() @ basis.right.float() - W).norm() / W.norm() < 1e-6
    error = W - truncated(basis, 10)
    assert loss(error, A, B) == pytest.approx(basis.sigma[10:].square().sum().item(), rel=1e-6)


def test_float32_rounding_of_a_metric_is_tolerated_and_an_indefinite_one_is_not() -> None:
    M = positive(30, 3)
    assert metric_root(M.float(), 0).condition > 1e6
    with pytest.raises(NumericalError, match="input metric of x is not positive semi-definite"):
        metric_root(M - 0.01 * M.trace() * torch.eye(30, dtype=F64), 0, "input metric of x")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float) -> None:
    M, W = positive(3), draw(3, 3)
    M[0, 0] = W[1, 1] = value
    with pytest.raises(NumericalError, match="not finite"):
        metric_root(M, 0.1)
    with pytest.raises(NumericalError, match="not finite"):
        weighted_svd(W, metric_root(None, 0), metric_root(None, 0))


def test_a_weight_of_zeros() -> None:
    basis = weighted_svd(torch.zeros(3, 4), metric_root(positive(4), 0), metric_root(None, 0))
    assert torch.equal(basis.left @ basis.right, torch.zeros(3, 4, dtype=F64))
    assert torch.equal(basis.sigma, torch.zeros(3, dtype=F64))


def test_the_root_of_blocks_is_that_of_the_block_diagonal_metric() -> None:
    first, second = torch.diag(torch.tensor([4.0, 1.0])).double(), torch.tensor([9.0, 2.0, 0.5]).double()
    roots = metric_root(first, 0.0), metric_root(second, 0.2), metric_root(None, 0.0)
    found = BlockRoot(roots, (2, 3, 1))
    damped = 0.8 * second + 0.2 * second.mean()
    whole = torch.block_diag(first, damped.diag(), torch.ones(1, 1).double())
    X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(found.times(X) @ found.times(X).T, X @ whole @ X.T)
    values = torch.tensor([4.0, 1.0, *damped.tolist(), 1.0])
    assert found.condition == pytest.approx((values.max() / values.min()).item())
    assert found.damping == 0.2
