"""Rounding a matrix so that tr(B E A Eᵀ) is small, E its error: feedback along rows and columns at once.

With A = R_A R_Aᵀ and B = R_B R_Bᵀ, R upper triangular, S = R / diag R (columns) and D = diag(R)²,

    tr(B E A Eᵀ) = Σ_ij D_B,i D_A,j η_ij²,     η = S_Bᵀ E S_A,     η_ij = E_ij + what errors of earlier rows and columns give

so number (i, j) is rounded after all (i' <= i, j' <= j), with their share of η_ij taken off beforehand: η_ij is then that one rounding's
own error, at most half a step. With B = I it is GPTQ (arXiv 2210.17323), which equals LDLQ (QuIP, arXiv 2307.13304); both
sides: YAQA (arXiv 2505.22988). Rows and columns of large diagonal go first.

If steps s are not cut, the errors η are uniform in a step, so the loss is about Σ_ij D_B,i D_A,j s_ij² / 12; to nearest, the diagonals of B
and A stand in the place of D.

Numbers on one antidiagonal do not read each other, so they are rounded together: first blocks, then the numbers within them.

Shapes: W, E [n, m]; A [m, m], B [n, n], positive definite up to rounding. Everything is float64.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import cholesky, solve_triangular

from fisherfold.linalg.group_grid import Grid, Rounded, fit_grid, nearest_codes

BLOCK = 32  # rows and columns of a block
DAMPING = 1e-8  # of a metric, relative to its mean diagonal


@dataclass(frozen=True)
class Side:
    """One metric as feedback needs it.

    Attributes:
        order: what is rounded first, [p].
        spread: S of the metric in this order, unit upper triangular [p, p].
        weights: D in the metric's own order [p].
    """

    order: np.ndarray
    spread: np.ndarray
    weights: np.ndarray


def side_of(metric: np.ndarray | None, size: int) -> Side:
    """The feedback of a metric [p, p], or of the identity."""
    if metric is None:
        return Side(np.arange(size), np.eye(size), np.ones(size))
    order = np.argsort(-np.diag(metric), kind="stable")
    damped = metric[np.ix_(order, order)] + DAMPING * max(np.trace(metric) / size, np.finfo(float).tiny) * np.eye(size)
    root = cholesky(damped[::-1, ::-1], lower=True)[::-1, ::-1]
    diagonal = np.diag(root)
    weights = np.empty(size)
    weights[order] = diagonal**2
    return Side(order, root / diagonal, weights)


def kronecker_loss(error: np.ndarray, A: np.ndarray | None, B: np.ndarray | None) -> float:
    """tr(B E A Eᵀ)."""
    right = error if A is None else error @ A
    return float(np.sum((error if B is None else B @ error) * right))


def expected_loss(grid: Grid, inputs: Side, outputs: Side) -> float:
    """Σ_ij D_B,i D_A,j s_ij² / 12: what `round_under` loses, on average, if no number lies outside its grid."""
    return float(outputs.weights @ np.square(grid.steps) @ inputs.weights) / 12


def round_under(values: np.ndarray, bits: int, inputs: Side, outputs: Side) -> Rounded:
    """W [n, m] in `bits` bits by feedback under A (inputs) and B (outputs); m is a multiple of GROUP."""
    grid = fit_grid(values, bits, inputs.weights)
    ordered = np.ix_(outputs.order, inputs.order)
    codes = np.empty(values.shape, np.int8)
    codes[ordered] = _Feedback(values[ordered], grid.steps[ordered], bits, inputs.spread, outputs.spread).codes()
    return Rounded(grid, codes)


def rounding_errors(
    values: np.ndarray, bits: int, inputs: Side, outputs: Side, generator: torch.Generator
) -> np.ndarray:
    """E [n, m] as `round_under` leaves it, drawn instead of made, which takes two triangular solves: η uniform in a step, E = S_B⁻ᵀ η S_A⁻¹."""
    ordered = np.ix_(outputs.order, inputs.order)
    steps = fit_grid(values, bits, inputs.weights).steps[ordered]
    drawn = torch.rand(values.shape, generator=generator, dtype=torch.float64).numpy() - 0.5
    along = solve_triangular(outputs.spread, steps * drawn, trans="T", unit_diagonal=True)
    errors = np.empty_like(values)
    errors[ordered] = solve_triangular(inputs.spread, along.T, trans="T", unit_diagonal=True).T
    return errors


class _Feedback:
    """The rounding of W in order: E its errors, T = E S_A.

    Rows and columns are filled up to whole blocks with zeros, which round to zero.
    """

    def __init__(self, values: np.ndarray, steps: np.ndarray, bits: int, right: np.ndarray, left: np.ndarray) -> None:
        self.shape, self.bits = values.shape, bits
        self.values, self.steps = _whole_blocks(values), _whole_blocks(steps, fill=1.0)
        self.right, self.left = _whole_blocks(right), _whole_blocks(left)
        self.errors, self.mixed = np.zeros_like(self.values), np.zeros_like(self.values)
        self.rounded = np.zeros(self.values.shape, np.int8)

    def codes(self) -> np.ndarray:
        """The codes of W [n, m]."""
        rows, columns = (size // BLOCK for size in self.values.shape)
        for diagonal in range(rows + columns - 1):
            first = range(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
            self._round_blocks([(_block(i), _block(diagonal - i)) for i in first])
        return self.rounded[: self.shape[0], : self.shape[1]]

    def _round_blocks(self, places: list[tuple[slice, slice]]) -> None:
        """Round the blocks of one antidiagonal, each after what the blocks before it say."""
        across = np.stack([self.errors[rows, : cols.start] @ self.right[: cols.start, cols] for rows, cols in places])
        along = np.stack([self.left[: rows.start, rows].T @ self.mixed[: rows.start, cols] for rows, cols in places])
        S_A = np.stack([self.right[cols, cols].T[::-1] for _, cols in places])
        S_B = np.stack([self.left[rows, rows].T for rows, _ in places])
        target, steps = (np.stack([matrix[place] for place in places]) for matrix in (self.values, self.steps))
        E, T, codes = np.zeros_like(target), np.zeros_like(target), np.zeros_like(target)
        backwards = T[:, :, ::-1]  # as S_A: columns fall where rows rise, so both are read by slices
        for diagonal in range(2 * BLOCK - 1):
            first, end = max(0, diagonal - BLOCK + 1), min(BLOCK, diagonal + 1)
            i, rows = np.arange(first, end), slice(first, end)
            j, columns = diagonal - i, slice(BLOCK - 1 - diagonal + first, BLOCK - 1 - diagonal + end)
            before = across[:, i, j] + np.einsum("kep,kep->ke", E[:, rows], S_A[:, columns])
            above = along[:, i, j] + np.einsum("kpe,kep->ke", backwards[:, :, columns], S_B[:, rows])
            wanted = target[:, i, j] - before - above
            codes[:, i, j] = nearest_codes(wanted, steps[:, i, j], self.bits)
            E[:, i, j] = steps[:, i, j] * codes[:, i, j] - target[:, i, j]
            T[:, i, j] = before + E[:, i, j]
        for k, place in enumerate(places):
            self.errors[place], self.mixed[place], self.rounded[place] = E[k], T[k], codes[k]


def _block(number: int) -> slice:
    return slice(number * BLOCK, (number + 1) * BLOCK)


def _whole_blocks(matrix: np.ndarray, fill: float = 0.0) -> np.ndarray:
    rows, columns = (-size % BLOCK for size in matrix.shape)
    return np.pad(matrix, ((0, rows), (0, columns)), constant_values=fill)
