"""The Kronecker product nearest to a layer's Fisher matrix, from the layer's per-sequence gradients.

    F = (1/N) Σ_s vec(G_s) vec(G_s)ᵀ,   minimise ‖F − A ⊗ B‖_F over A [m, m], B [n, n]

The minimiser is the leading singular pair of Van Loan's rearrangement R(F) = (1/N) Σ_s G_s ⊗ G_s, reached without
forming F or R(F) by alternating B ← (1/N) Σ_s G_s A G_sᵀ and A ← (1/N) Σ_s G_sᵀ B G_s. Each step is a sum of congruences,
so factors stay positive semi-definite from a positive semi-definite start. vec stacks columns, so (A ⊗ B) vec(G) = vec(B G A).

Sources: Van Loan & Pitsianis 1993; GFWSVD (arXiv 2505.17974) for the use on LLM layers, there by Lanczos.

Shapes: n outputs, m inputs, S sequences of one block, N of all, k sketch rank, G_s = U_s V_sᵀ [n, m].
"""

import math
from dataclasses import dataclass

import torch

from fisherfold.fisher.streamed_fisher import SpannedFisher, StreamedFisher
from fisherfold.linalg.leading_pairs import SOLVERS, Vector, lanczos
from fisherfold.run.errors import NumericalError


@dataclass(frozen=True)
class KroneckerPair:
    """A ⊗ B nearest to F.

    Attributes:
        A: input factor [m, m], of norm √σ₁.
        B: output factor [n, n], of norm √σ₁.
        norm: σ₁ = ‖A ⊗ B‖ = ⟨F, A ⊗ B⟩ / ‖A ⊗ B‖.
        fisher_norm: ‖F‖; None if it was not asked for.
        iterations: iterations done, each one A step and one B step.
        converged: whether the last iteration moved the unit factor B by no more than the tolerance.
        variances: of A and B, see `relative_variance`; None if they were not asked for, or there is one gradient.
    """

    A: torch.Tensor
    B: torch.Tensor
    norm: float
    fisher_norm: float | None
    iterations: int
    converged: bool
    variances: tuple[float, float] | None = None

    @property
    def residual(self) -> float | None:
        """‖F − A ⊗ B‖ / ‖F‖, None for F = 0 or ‖F‖ not asked for. In float32, values below 1e-3 are rounding."""
        return None if self.fisher_norm is None else relative_residual(self.norm, self.fisher_norm)


def relative_residual(norm: float, fisher_norm: float) -> float | None:
    """√(1 − (norm / ‖F‖)²), the residual of the best multiple of a pair whose overlap with F is norm · ‖A ⊗ B‖."""
    return math.sqrt(max(0.0, 1 - (norm / fisher_norm) ** 2)) if fisher_norm > 0 else None


def nearest_kronecker(
    fisher: StreamedFisher | SpannedFisher,
    start: torch.Tensor | None = None,
    iterations: int = 200,
    tolerance: float = 1e-4,
    method: str = "power",
    with_norm: bool = True,
    with_variances: bool = False,
) -> KroneckerPair:
    """The nearest Kronecker pair of F, by one of `leading_pairs.SOLVERS`.

    σ₁ is split evenly, ‖A‖_F = ‖B‖_F = √σ₁. The common sign of the factors is that which makes tr A + tr B positive: the leading
    pair of a Fisher is semi-definite, and Lanczos finds it up to a sign. A vanishing F gives vanishing factors.

    Args:
        fisher: F, see `fisher_of`.
        start: positive semi-definite A [m, m] to start from, else the identity. The token-wise Σ x xᵀ saves steps of a streamed F.
        iterations: at most so many.
        tolerance: stop when an iteration changes (or would change) the unit factor B by no more, in Frobenius norm. Below 1e-6 only
            in float64.
        method: power or lanczos.
        with_norm: whether ‖F‖ is wanted, which streamed over many blocks costs more than the steps.
        with_variances: whether the sampling variances of the factors are wanted, which streamed cost half a step.

    Raises:
        NumericalError: the gradients or the start are not finite.
        ParameterError: the method is unknown.
    """
    solve = SOLVERS.lookup(method)
    B = _first(fisher, start)
    if B is None:
        A, B = (torch.zeros(size, size) for size in reversed(fisher.shape))
        return KroneckerPair(A, B, 0.0, 0.0, 0, True)
    found = solve(fisher, B, iterations, tolerance)
    fisher_norm = math.sqrt(fisher.norm_squared()) if with_norm else None
    pair, sigma = found.pairs[0], found.sigmas[0]
    variances = fisher.variances(*pair, sigma) if with_variances else None
    A, B = _factors(fisher, *pair, sigma)
    return KroneckerPair(A, B, sigma, fisher_norm, found.iterations, found.converged, variances)


def leading_sigmas(
    fisher: StreamedFisher | SpannedFisher, count: int, iterations: int = 200, tolerance: float = 1e-2
) -> tuple[float, ...]:
    """σ₁ … of the rearranged Fisher, `count` of them or as many as are not zero; their error is the tolerance squared."""
    B = _first(fisher, None)
    return () if B is None else lanczos(fisher, B, iterations, tolerance, count).sigmas


def _first(fisher: StreamedFisher | SpannedFisher, start: torch.Tensor | None) -> Vector | None:
    """A unit left vector to start from: R(start), or R(I) if the gradients do not see the start; None for F = 0.

    Raises:
        NumericalError: it is not finite.
    """
    B = fisher.first(start)
    if B.norm() == 0:
        B = fisher.first(None)
    if B.norm() == 0:
        return None
    if not B.norm().isfinite():
        raise NumericalError("the gradients, or the start, are not finite or overflow float32")
    return B / B.norm()


def _factors(
    fisher: StreamedFisher | SpannedFisher, A: Vector, B: Vector, sigma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors as matrices of norm √σ, of the sign that makes their traces positive."""
    scale = math.copysign(math.sqrt(sigma), fisher.input_trace(A) + fisher.output_trace(B))
    return fisher.input_factor(A, scale), fisher.output_factor(B, scale)
