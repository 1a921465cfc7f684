"""Low-rank approximation of a weight under a sum of Kronecker products, by alternating least squares.

    minimise f(U, V) = Σ_r tr(ΔWᵀ B_r ΔW A_r),   ΔW = W − U V

Under one pair the truncated weighted SVD is the minimiser; under several there is none in closed form, and none whose first k
components are best at every k. So it starts from the solution of the first pair for a given rank, after ranks are known. With V fixed, U
solves the linear equations

    Σ_r B_r U (V A_r Vᵀ) = Σ_r B_r W A_r Vᵀ

by conjugate gradients from the present U, with the first pair's inverse as preconditioner; V likewise. Every iteration lowers f. The
truncated singular value decomposition of a rearranged Fisher need not be positive, so f need not be bounded below: where a direction of no
positive curvature comes up, the solver stops and keeps what it has.

Shapes: W [n, m], U [n, k], V [k, m], A_r [m, m], B_r [n, n]; the first pair positive definite (damped).
"""

from collections.abc import Callable, Sequence

import torch

Terms = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""(A_r, B_r), the first pair leading."""
INNER_STEPS = 30  # of conjugate gradients; what is left is done in the next alternation
SETTLED = 1e-10  # of f: an alternation that lowers it by a smaller share is the last
RIDGE = 1e-12  # share of the mean eigenvalue that keeps the preconditioner invertible


def weighted_loss(error: torch.Tensor, terms: Terms) -> float:
    """Σ_r tr(ΔWᵀ B_r ΔW A_r)."""
    return sum((error * (B @ error @ A)).sum().item() for A, B in terms)


def alternate(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, terms: Terms, sweeps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """U and V of f no larger than that of the given ones, in float64.

    Args:
        weight: W.
        left: U to start from.
        right: V to start from.
        terms: the pairs.
        sweeps: alternations at most.
    """
    loss = weighted_loss(weight - left @ right, terms)
    mirrored = [(B, A) for A, B in terms]
    for _ in range(sweeps):
        left = _solve_left(weight, left, right, terms)
        right = _solve_left(weight.T, right.T, left.T, mirrored).T
        before, loss = loss, weighted_loss(weight - left @ right, terms)
        if before - loss <= SETTLED * abs(before):
            break
    return left, right


def _solve_left(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, terms: Terms) -> torch.Tensor:
    """Conjugate gradients for U with V fixed."""
    cores = [right @ A @ right.T for A, _ in terms]

    def apply(U: torch.Tensor) -> torch.Tensor:
        return sum(B @ U @ core for (_, B), core in zip(terms, cores))

    residual = sum(B @ (weight @ (A @ right.T)) for A, B in terms) - apply(left)
    return left + _conjugate_gradients(apply, _inverse(terms[0][1], cores[0]), residual)


def _conjugate_gradients(apply: Callable, precondition: Callable, residual: torch.Tensor) -> torch.Tensor:
    """The step D of L(D) ≈ residual from zero; stops at a direction of no positive curvature."""
    step, first = torch.zeros_like(residual), residual.norm()
    z = precondition(residual)
    direction, slope = z, (residual * z).sum()
    for _ in range(INNER_STEPS):
        image = apply(direction)
        curvature = (direction * image).sum()
        if curvature <= 0 or slope <= 0:
            break
        rate = slope / curvature
        step, residual = step + rate * direction, residual - rate * image
        if residual.norm() <= 1e-12 * first:
            break
        z = precondition(residual)
        slope, before = (residual * z).sum(), slope
        direction = z + slope / before * direction
    return step


def _inverse(B: torch.Tensor, core: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """R ↦ B⁻¹ R C⁻¹ of positive matrices, by Cholesky factors."""
    factors = [torch.linalg.cholesky(_ridged(matrix)) for matrix in (B, core)]
    return lambda R: torch.cholesky_solve(torch.cholesky_solve(R, factors[0]).T, factors[1]).T


def _ridged(matrix: torch.Tensor) -> torch.Tensor:
    ridge = RIDGE * matrix.diagonal().mean()
    return matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
