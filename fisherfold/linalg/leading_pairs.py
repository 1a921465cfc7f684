"""The leading singular pairs of a linear map between matrices, by power steps or by Lanczos, chosen by ``kronecker.method``.

The map R sends A to R(A) = `outputs` and its adjoint sends B to Rᵀ(B) = `inputs`; neither is ever formed. Here R is Van Loan's
rearranged Fisher. A step is one product with Rᵀ and one with R. Vectors are matrices, or `SpanVector`s of them: whatever has
`+`, `-`, `*`, `/` with numbers, `norm()` and `inner` below.

Both methods stop by the same measure, the relative residual ‖R Rᵀ B − θ B‖ / θ of a unit left vector B, which is what a power step
still changes; the error of B itself is that over 1 − (σ₂/σ₁)².

Where R maps symmetric matrices to symmetric and skew ones to skew ones, as the rearranged Fisher does, a symmetric start stays among
the symmetric pairs: σ₂ … are those of R on symmetric matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from fisherfold.run.registry import Registry

Vector = Any  # a tensor, or a SpanVector: what has the operations named above
KRYLOV = 8  # left vectors that Lanczos holds beyond those asked for; more save steps and cost memory
UNSEEN = 1e-7  # share of σ₁ below which another σ is rounding


class PairMap(Protocol):
    """R and its adjoint."""

    def outputs(self, A: Vector) -> Vector:
        """R A: the output side that belongs to an input side."""
        ...

    def inputs(self, B: Vector) -> Vector:
        """Rᵀ B: the input side that belongs to an output side."""
        ...


@dataclass(frozen=True)
class LeadingPairs:
    """Unit vectors with R(A_i) = σ_i B_i, σ descending; fewer than asked for if R has no more.

    Attributes:
        pairs: (A_i, B_i), their common sign arbitrary.
        sigmas: σ_i.
        iterations: steps done.
        converged: whether every pair reached the tolerance.
    """

    pairs: tuple[tuple[Vector, Vector], ...]
    sigmas: tuple[float, ...]
    iterations: int
    converged: bool


class Solver(Protocol):
    """Finds the leading pair of `map` from a unit left vector `start`, in at most `iterations` steps."""

    def __call__(self, map: PairMap, start: Vector, iterations: int, tolerance: float) -> LeadingPairs: ...


SOLVERS: Registry[Solver] = Registry("kronecker.method")


def inner(left: Vector, right: Vector) -> float:
    """⟨M, M'⟩ in float64."""
    if isinstance(left, torch.Tensor):
        return torch.dot(left.double().flatten(), right.double().flatten()).item()
    return left.inner(right)


def combine(vectors: Sequence[Vector], weights: Sequence[float] | np.ndarray) -> Vector:
    """Σ w_i M_i."""
    total = vectors[0] * weights[0]
    for vector, weight in zip(vectors[1:], weights[1:]):
        total = total + vector * weight
    return total


@SOLVERS.register("power")
def power(map: PairMap, start: Vector, iterations: int, tolerance: float) -> LeadingPairs:
    """Alternating power steps from a unit vector B until it stays.

    The iterates are positive semi-definite if R and the start are.
    """
    B, done, settled = start, 0, False
    while done < iterations and not settled:
        A = map.inputs(B)
        A = A / A.norm()
        image = map.outputs(A)
        sigma = image.norm()
        before, B = B, image / sigma
        done, settled = done + 1, float((B - before).norm()) <= tolerance
    return LeadingPairs(((A, B),), (float(sigma),), done, settled)


def lanczos(map: PairMap, start: Vector, iterations: int, tolerance: float, count: int = 1) -> LeadingPairs:
    """Golub-Kahan bidiagonalisation with thick restarts, in the form that keeps its left vectors only.

    That is Lanczos on R Rᵀ: U spans the Krylov space of the start, H = Uᵀ R Rᵀ U is formed from full inner products, every new vector
    is orthogonalised twice, and when U is full its `count` leading Ritz vectors (and one more) and the residual take its place
    (Wu & Simon 2000; Simon & Zha 2000 for one side sufficing). Needs fewer steps than `power` where σ₁ ≈ σ₂; its pairs are
    semi-definite only up to the tolerance, and of a common sign that the caller sets.
    """
    basis, size = [start], count + KRYLOV
    H = np.zeros((size, size))
    for done in range(1, iterations * count + 1):
        last = len(basis) - 1
        image = map.outputs(map.inputs(basis[last]))
        image, H[: last + 1, last] = _project_out(image, basis)
        H[last, :last] = H[:last, last]
        theta, Y = np.linalg.eigh(H[: last + 1, : last + 1])
        theta, Y = theta[::-1], Y[:, ::-1]
        length = float(image.norm())
        residuals = length * np.abs(Y[last, :count]) / np.abs(theta[:count])
        exhausted = bool(length <= UNSEEN**2 * theta[0])
        converged = exhausted or (len(basis) >= count and bool((residuals <= tolerance).all()))
        if converged or done == iterations * count:
            break
        if len(basis) == size:
            keep = count + 1
            basis = [combine(basis, Y[:, i]) for i in range(keep)]
            H[:] = np.diag(np.append(theta[:keep], np.zeros(size - keep)))
        basis.append(image / length)
    lefts = [combine(basis, Y[:, i]) for i in range(min(count, len(basis))) if theta[i] > UNSEEN**2 * theta[0]]
    return _finish(map, lefts, done, converged)


SOLVERS.register("lanczos")(lanczos)


def _project_out(image: Vector, basis: Sequence[Vector]) -> tuple[Vector, np.ndarray]:
    """The part of a vector orthogonal to an orthonormal basis, and its coefficients; twice, for rounding."""
    total = np.zeros(len(basis))
    for _ in range(2):
        coefficients = np.array([inner(vector, image) for vector in basis])
        for vector, coefficient in zip(basis, coefficients):
            image = image - vector * coefficient
        total += coefficients
    return image, total


def _finish(map: PairMap, lefts: Sequence[Vector], done: int, converged: bool) -> LeadingPairs:
    """Pairs and σ of left Ritz vectors: A = Rᵀ(B) / σ."""
    images = [map.inputs(B) for B in lefts]
    sigmas = [float(image.norm()) for image in images]
    pairs = [(image / sigma, B) for image, sigma, B in zip(images, sigmas, lefts)]
    return LeadingPairs(tuple(pairs), tuple(sigmas), done, converged)
