"""The thin SVD by eigenvectors against LAPACK's SVD, and where it is not taken."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherfold.linalg import thin_svd as module
from fisherfold.linalg.thin_svd import LOST, by_eigenvectors, thin_svd
from fisherfold.linalg.weighted_svd import metric_root, weighted_svd

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(outputs: int, inputs: int, smallest: float, seed: int = 0) -> torch.Tensor:
    """Singular values from 1 down to `smallest`."""
    rank = min(outputs, inputs)
    U, V = (torch.linalg.qr(draw(size, rank, seed=seed + size)).Q for size in (outputs, inputs))
    return 3 * U * torch.logspace(0, float(torch.tensor(smallest).log10()), rank, dtype=F64) @ V.T


@settings(max_examples=60, deadline=None)
@given(outputs=st.integers(1, 40), inputs=st.integers(1, 40), power=st.floats(-3.2, 0), seed=st.integers(0, 99))
def test_what_is_found_by_eigenvectors_is_the_svd(outputs: int, inputs: int, power: float, seed: int) -> None:
    M = with_spectrum(outputs, inputs, 10**power, seed)
    U, sigma, Vh = by_eigenvectors(M)
    expected = torch.linalg.svd(M, full_matrices=False)
    torch.testing.assert_close(sigma, expected.S, rtol=2e-8, atol=0)
    assert U.shape == expected.U.shape and Vh.shape == expected.Vh.shape
    torch.testing.assert_close(U * sigma @ Vh, M, rtol=0, atol=1e-13)
    for gram in (U.T @ U, Vh @ Vh.T):
        torch.testing.assert_close(gram, torch.eye(len(sigma), dtype=F64), rtol=0, atol=2e-8)


@pytest.mark.parametrize(("outputs", "inputs"), [(30, 12), (12, 30), (12, 12)])
def test_the_route_is_chosen_by_what_squares_would_lose(outputs: int, inputs: int) -> None:
    assert by_eigenvectors(with_spectrum(outputs, inputs, 3 * LOST)) is not None
    lost = with_spectrum(outputs, inputs, LOST / 3)
    assert by_eigenvectors(lost) is None and by_eigenvectors(torch.zeros(outputs, inputs, dtype=F64)) is None
    assert torch.equal(thin_svd(lost)[1], torch.linalg.svd(lost, full_matrices=False).S)


@pytest.mark.parametrize(("outputs", "inputs"), [(60, 24), (24, 60)])
def test_components_under_metrics_are_those_of_either_route_in_float32(outputs, inputs, monkeypatch) -> None:
    """As they are stored, for every rank, with σ over three and a half orders of magnitude."""
    W = with_spectrum(outputs, inputs, 1e-2)
    A, B = (draw(3 * size, size, seed=size) for size in (inputs, outputs))
    roots = metric_root(A.T @ A, 0.01), metric_root(B.T @ B, 0.05)
    fast = weighted_svd(W, *roots)
    monkeypatch.setattr(module, "by_eigenvectors", lambda matrix: None)
    exact = weighted_svd(W, *roots)
    torch.testing.assert_close(fast.sigma, exact.sigma, rtol=1e-9, atol=0)
    for rank in range(1, min(outputs, inputs) + 1):
        products = [basis.left[:, :rank] @ basis.right[:rank] for basis in (fast, exact)]
        torch.testing.assert_close(*products, rtol=0, atol=1e-9 * float(W.abs().max()))
