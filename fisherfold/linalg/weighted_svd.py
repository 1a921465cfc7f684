"""The best low-rank approximations of a weight under a metric on its inputs and one on its outputs.

    minimise tr(ΔWᵀ B ΔW A),  ΔW = W − W_k,  rank W_k ≤ k

With roots A = R_A R_Aᵀ and B = R_B R_Bᵀ the loss is ‖R_Bᵀ ΔW R_A‖_F², so R_Bᵀ W_k R_A is the truncated SVD U Σ Vᵀ of R_Bᵀ W R_A, and the
loss of rank k is Σ_{i>k} σ_i². Component i of W itself is

    left_i = W R_A v_i / √σ_i,   right_i = u_iᵀ R_Bᵀ W / √σ_i,   since R_Bᵀ left_i = √σ_i u_i and right_i R_A = √σ_i v_iᵀ

(Wedderburn's rank reduction): no root is inverted, so singular metrics need no pseudo-inverse and no damping, and damping is a
statistical choice alone. The components of W that the metrics do not see (σ_i ≤ 1e-10 σ_1) cost nothing; they come last,
with σ = 0, from the plain SVD of what the others leave, so that all components together always give W.

Shapes: W [n, m], A [m, m], B [n, n], r = min(n, m). All in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from fisherfold.linalg.thin_svd import thin_svd
from fisherfold.run.errors import NumericalError

Metric = torch.Tensor | None
"""A full matrix [p, p], a diagonal [p], or None for the identity."""

Damping = float | Callable[[torch.Tensor], float]

UNSEEN = 1e-10  # relative size of a singular value that rounding alone can produce
INDEFINITE = 1e-3  # relative size of a negative eigenvalue that rounding of a float32 sum cannot produce


@dataclass(frozen=True)
class MetricRoot:
    """R = Q diag(√λ) with R Rᵀ = M [p, p], after damping.

    Attributes:
        vectors: Q [p, p], None for a diagonal metric.
        scales: √λ [p], None for the identity.
        condition: λ_max / λ_min, infinite for a singular metric.
        damping: the δ that went in; 0 for the identity, which has nothing to damp.
    """

    vectors: torch.Tensor | None
    scales: torch.Tensor | None
    condition: float
    damping: float

    @property
    def extremes(self) -> tuple[float, float]:
        """λ_min and λ_max."""
        if self.scales is None:
            return 1.0, 1.0
        return float(self.scales.min()) ** 2, float(self.scales.max()) ** 2

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        """X R of X [q, p]."""
        rotated = matrix if self.vectors is None else matrix @ self.vectors
        return rotated if self.scales is None else rotated * self.scales


class Root(Protocol):
    """A root R of a metric M = R Rᵀ [p, p]."""

    @property
    def extremes(self) -> tuple[float, float]:
        """λ_min and λ_max of M."""

    @property
    def condition(self) -> float:
        """λ_max / λ_min."""

    @property
    def damping(self) -> float:
        """The δ that went in."""

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        """X R of X [q, p]."""


@dataclass(frozen=True)
class BlockRoot:
    """The root of a metric with blocks on its diagonal, from the roots of the blocks, which have the given sizes."""

    roots: tuple[Root, ...]
    sizes: tuple[int, ...]

    @property
    def extremes(self) -> tuple[float, float]:
        """As of a `Root`."""
        smallest, largest = zip(*(root.extremes for root in self.roots))
        return min(smallest), max(largest)

    @property
    def condition(self) -> float:
        """As of a `Root`."""
        smallest, largest = self.extremes
        return largest / smallest if smallest else float("inf")

    @property
    def damping(self) -> float:
        """The largest of the blocks'."""
        return max(root.damping for root in self.roots)

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        """X R of X [q, p], a block at a time: the root itself, [p, p], is never formed."""
        parts = matrix.split(self.sizes, -1)
        return torch.cat([root.times(part) for root, part in zip(self.roots, parts, strict=True)], -1)


def metric_root(metric: Metric, damping: Damping, name: str = "the metric") -> MetricRoot:
    """The root of the damped metric (1 − δ) M + δ mean(diag M) I.

    Damping keeps the eigenvectors, so it is applied to the eigenvalues, after negative ones that rounding left are set to 0.

    Args:
        metric: M.
        damping: δ, from 0 to 1, or what gives it for the eigenvalues of M.
        name: what errors call M.

    Raises:
        NumericalError: M is not finite or not positive semi-definite, or its eigenvalues cannot be found.
    """
    if metric is None:
        return MetricRoot(None, None, 1.0, 0.0)
    if not metric.isfinite().all():
        raise NumericalError(f"{name} holds values that are not finite")
    diagonal = metric.ndim == 1
    values, vectors = (metric.double(), None) if diagonal else _eigenvalues(metric.double(), name)
    if values.min() < -INDEFINITE * values.max():
        spread = f"eigenvalues from {values.min():.3g} to {values.max():.3g}"
        raise NumericalError(f"{name} is not positive semi-definite: {spread}")
    values = values.clamp(min=0)
    if callable(damping):
        damping = damping(values)
    damped = (1 - damping) * values + damping * values.mean()
    return MetricRoot(vectors, damped.sqrt(), (damped.max() / damped.min()).item(), damping)


def _eigenvalues(metric: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return torch.linalg.eigh(metric)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericalError(f"{name} has no eigenvalue decomposition that converges ({error})") from error


@dataclass(frozen=True)
class WeightedSVD:
    """W = left @ right; the first k columns and rows are the best approximation of rank k under the metrics.

    Attributes:
        left: [n, r].
        right: [r, m].
        sigma: [r], descending; σ_i² is the loss of dropping component i.
    """

    left: torch.Tensor
    right: torch.Tensor
    sigma: torch.Tensor


def weighted_svd(weight: torch.Tensor, input_root: Root, output_root: Root) -> WeightedSVD:
    """Components of W in the order of what they cost under the metrics A and B, given by their roots.

    Raises:
        NumericalError: W is not finite, or its decomposition does not converge.
    """
    weight = weight.double()
    if not weight.isfinite().all():
        raise NumericalError("the weight holds values that are not finite")
    inputs_weighted = input_root.times(weight)
    outputs_weighted = output_root.times(weight.T).T
    U, sigma, Vh = thin_svd(output_root.times(inputs_weighted.T).T)
    seen = int((sigma > UNSEEN * sigma[0]).sum())
    roots = sigma[:seen].sqrt()
    left = inputs_weighted @ Vh[:seen].T / roots
    right = U[:, :seen].T @ outputs_weighted / roots[:, None]
    if seen == len(sigma):
        return WeightedSVD(left, right, sigma)
    return _with_unseen(weight, left, right, sigma[:seen])


def _with_unseen(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, sigma: torch.Tensor) -> WeightedSVD:
    """Append the plain SVD of W − left right, whose rank is at most r − k after k components."""
    U, size, Vh = thin_svd(weight - left @ right)
    more = len(size) - len(sigma)
    roots = size[:more].sqrt()
    return WeightedSVD(
        torch.cat([left, U[:, :more] * roots], dim=1),
        torch.cat([right, roots[:, None] * Vh[:more]]),
        torch.cat([sigma, sigma.new_zeros(more)]),
    )
