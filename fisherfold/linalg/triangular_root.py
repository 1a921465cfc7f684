"""The triangular root of a damped metric, where the weighted SVD needs no more: a tenth of the work of its eigenvectors.

    M = L Lᵀ (Cholesky),  M = (1 − δ) M₀ + δ mean(diag M₀) 1

The weighted SVD (see ``fisherfold.linalg.weighted_svd``) is the same for every root: L = Q √λ O with O orthogonal, which turns its singular
vectors and leaves its components. Cholesky is backward stable without a condition on M, and damping makes M definite. Eigenvectors are
taken where δ comes from the eigenvalues, where nothing is damped, and where M is not definite for all that.

Shapes: M [p, p]. All in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fisherfold.linalg.weighted_svd import INDEFINITE, Damping, Metric, MetricRoot, metric_root

STEPS = 12  # of Lanczos: outermost eigenvalues to some percent, exact if p is no larger


@dataclass(frozen=True)
class TriangularRoot:
    """L, lower triangular, with L Lᵀ = M, after damping.

    Attributes:
        factor: L [p, p].
        extremes: smallest and largest eigenvalue of M, to some percent.
        damping: the δ that went in.
    """

    factor: torch.Tensor
    extremes: tuple[float, float]
    damping: float

    @property
    def condition(self) -> float:
        """λ_max / λ_min, to some percent."""
        return self.extremes[1] / self.extremes[0]

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        """X L of X [q, p]."""
        return matrix @ self.factor


def weighting_root(metric: Metric, damping: Damping, name: str = "the metric") -> MetricRoot | TriangularRoot:
    """A root of the damped metric, whichever is the cheapest; arguments and errors are those of `metric_root`."""
    if metric is None or metric.ndim == 1 or callable(damping) or damping <= 0:
        return metric_root(metric, damping, name)
    return _triangular(metric, damping) or metric_root(metric, damping, name)


def _triangular(metric: torch.Tensor, damping: float) -> TriangularRoot | None:
    """The root, or None where the metric is not finite, not definite, or has a negative eigenvalue that damping hides."""
    added = damping * metric.diagonal().double().mean()
    factor, failed = torch.linalg.cholesky_ex(_damped(metric, damping, added))
    if failed or not factor.isfinite().all():
        return None
    largest = outermost(lambda v: factor @ (factor.T @ v), factor)
    smallest = 1 / outermost(partial(_solved, factor), factor)
    if smallest - float(added) < -INDEFINITE * largest:
        return None
    return TriangularRoot(factor, (smallest, largest), damping)


def _damped(metric: torch.Tensor, damping: float, added: torch.Tensor) -> torch.Tensor:
    """One copy of M₀, which is as large as anything that a stage holds."""
    damped = metric.to(torch.float64, copy=True).mul_(1 - damping)
    damped.diagonal().add_(added)
    return damped


def _solved(factor: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """M⁻¹ v, without a copy of L."""
    half = torch.linalg.solve_triangular(factor, v[:, None], upper=False)
    return torch.linalg.solve_triangular(factor.T, half, upper=True)[:, 0]


def outermost(apply: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor) -> float:
    """The largest eigenvalue of a symmetric operator, by Lanczos steps with full reorthogonalisation.

    Args:
        apply: v [p] -> M v.
        like: gives p, the device and the dtype.
    """
    size = len(like)
    steps = min(STEPS, size)
    basis = like.new_zeros(steps, size)
    v = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
    images = torch.zeros_like(basis)
    for step in range(steps):
        for _ in range(2):
            v = v - basis[:step].T @ (basis[:step] @ v)
        norm = torch.linalg.vector_norm(v)
        if norm <= torch.finfo(like.dtype).tiny:
            break
        basis[step] = v / norm
        images[step] = v = apply(basis[step])
    projected = basis @ images.T
    return float(torch.linalg.eigvalsh((projected + projected.T) / 2)[-1])
