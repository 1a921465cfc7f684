"""The thin singular value decomposition by the cheaper of two routes.

    M = U Σ Vᵀ,  M [n, m], r = min(n, m)

From the eigenvectors V of MᵀM (of M Mᵀ, if that is smaller), Σ² its eigenvalues and U = M V Σ⁻¹: half to two thirds of the work. Squares lose what
is small: σ_i is found to ε σ_1² / σ_i, and component i to ε (σ_1 / σ_i)². So this route is taken where σ_r > LOST σ_1, where that is 2e-8, below the
rounding of the float32 in which components are stored; a Cholesky decomposition tells beforehand. Elsewhere the matrix itself is decomposed
(divide and conquer, after a QR decomposition of a long one), which has no such limit.
"""

import torch

from fisherfold.run.errors import NumericalError

LOST = 1e-4

SVD = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""U [n, r], σ [r] descending, Vᵀ [r, m]."""


def thin_svd(matrix: torch.Tensor) -> SVD:
    """The decomposition of M, in float64.

    Raises:
        NumericalError: it does not converge.
    """
    try:
        return by_eigenvectors(matrix) or tuple(torch.linalg.svd(matrix, full_matrices=False))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericalError(
            f"the weighted weight has no singular value decomposition that converges ({error})"
        ) from error


def by_eigenvectors(matrix: torch.Tensor) -> SVD | None:
    """The decomposition from the smaller Gram matrix, or None where too much would be lost."""
    if len(matrix) < matrix.shape[1]:
        found = by_eigenvectors(matrix.T)
        return found and (found[2].T, found[1], found[0].T)
    gram = matrix.T @ matrix
    above = gram.clone()
    above.diagonal().sub_(LOST**2 * torch.linalg.matrix_norm(gram))  # no less than σ_1²
    if torch.linalg.cholesky_ex(above).info:
        return None
    squares, vectors = torch.linalg.eigh(gram)
    sigma, V = squares.flip(0).sqrt(), vectors.flip(1)
    return matrix @ V / sigma, sigma, V.T
