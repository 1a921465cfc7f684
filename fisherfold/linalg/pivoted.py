"""PivGa: the pivoted gauge of a low-rank product, which stores r(n + m − r) numbers instead of r(n + m) and loses nothing.

A product left @ right (n outputs, m inputs, rank r) is the same for (left S)(S⁻¹ right) with any invertible S. The gauge S
that turns r rows of left (or r columns of right) into the identity makes them free to store; which rows, an interpolative
decomposition tells. Sources: PivGa, arXiv 2512.03062; PIFA (the same construction), ICML 2025.

    outputs pivoted:  y_pivot = pivot x,  y_rest = rest y_pivot,   y = cat(y_pivot, y_rest)[order]
                      pivot [r, m], rest [n − r, r], order [n]
    inputs pivoted:   x_pivot, x_rest = split(x[order]),           y = pivot (x_pivot + rest x_rest)
                      pivot [n, r], rest [r, m − r], order [m]

Everything here is float64.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cholesky, qr, solve_triangular

BOUND = 1.1  # of the coefficients |rest| (strong rank-revealing, Gu and Eisenstat 1996): 2 is enough, smaller ones round better
RANK_TOLERANCE = 16 * np.finfo(np.float64).eps  # of the triangular factor's diagonal, relative to its first
SHIFT = 16 * np.finfo(np.float64).eps  # of a Gram matrix, relative to its trace


@dataclass(frozen=True)
class Pivoted:
    """A product in the pivoted gauge; see the module for the shapes. `side` is "outputs" or "inputs"."""

    side: str
    order: np.ndarray
    pivot: np.ndarray
    rest: np.ndarray

    @property
    def numbers(self) -> int:
        """Stored numbers, the order included."""
        return self.order.size + self.pivot.size + self.rest.size

    @property
    def largest_coefficient(self) -> float:
        """max |rest|, at most BOUND; 0 if there is none."""
        return float(np.abs(self.rest).max(initial=0.0))

    def product(self) -> np.ndarray:
        """The dense product [n, m]."""
        if self.side == "outputs":
            return np.concatenate([self.pivot, self.rest @ self.pivot])[self.order]
        product = np.empty((len(self.pivot), len(self.order)))
        product[:, self.order] = np.concatenate([self.pivot, self.pivot @ self.rest], axis=1)
        return product


def pivot_factors(left: np.ndarray, right: np.ndarray, side: str | None = None) -> Pivoted:
    """Bring left [n, r] @ right [r, m] into the pivoted gauge, 0 < r <= min(n, m), on `side` if one is given.

    Both sides store r(n + m − r) numbers and an order, so the side with the shorter order is pivoted; outputs if n = m,
    where one token is the faster by it.
    """
    outputs = left.shape[0] <= right.shape[1] if side is None else side == "outputs"
    rows, columns = (left, right) if outputs else (right.T, left.T)
    pivots, others, coefficients = interpolate(_rows_of_product(rows, columns))
    kept = rows[pivots] @ columns
    forward = np.concatenate([pivots, others])
    if outputs:
        return Pivoted("outputs", np.argsort(forward), kept, coefficients)
    return Pivoted("inputs", forward, kept.T, coefficients.T)


def interpolate(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Strong interpolative decomposition of `rows` [k, r], r <= k: rows[others] = coefficients @ rows[pivots].

    Returns:
        pivots [r], others [k − r], coefficients [k − r, r] of at most BOUND each. If `rows` has a rank below r, the pivots
        in excess have zero coefficients.
    """
    r = rows.shape[1]
    triangle, order = qr(rows.T, mode="r", pivoting=True, check_finite=False)
    diagonal = np.abs(np.diag(triangle))
    rank = int(np.count_nonzero(diagonal > RANK_TOLERANCE * diagonal[0]))
    coefficients = np.zeros((len(rows) - r, r))
    coefficients[:, :rank] = solve_triangular(triangle[:rank, :rank], triangle[:rank, r:], check_finite=False).T
    pivots, others = order[:r].astype(np.int64), order[r:].astype(np.int64)
    _bound_coefficients(coefficients, pivots, others)
    return pivots, others, coefficients


def _bound_coefficients(coefficients: np.ndarray, pivots: np.ndarray, others: np.ndarray) -> None:
    """Swap pivots with other rows, in place, while a coefficient exceeds BOUND.

    A swap at coefficient c multiplies the volume spanned by the pivots by |c|, so swaps end.
    """
    while coefficients.size:
        i, j = np.unravel_index(np.argmax(np.abs(coefficients)), coefficients.shape)
        if abs(coefficients[i, j]) <= BOUND:
            return
        step = coefficients[i] / coefficients[i, j]
        step[j] -= 1 / coefficients[i, j]
        coefficients -= np.outer(coefficients[:, j], step)
        coefficients[i] = -step
        coefficients[i, j] += 1
        pivots[j], others[i] = others[i], pivots[j]


def _rows_of_product(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[k, r] with the inner products of the rows of rows @ columns: rows @ L, where columns columnsᵀ = L Lᵀ.

    L only sets the scale in which pivots are compared (any invertible L leaves the coefficients exact), so a shift of the
    Gram matrix by its rounding error, which lets singular factors pass, costs no accuracy.
    """
    gram = columns @ columns.T
    gram[np.diag_indices_from(gram)] += max(np.trace(gram) * SHIFT, np.finfo(np.float64).tiny)
    return rows @ cholesky(gram, lower=True, overwrite_a=True, check_finite=False)
