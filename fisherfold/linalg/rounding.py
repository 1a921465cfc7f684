"""Rounding a pivoted product to 16 bits by error feedback, so that it loses no more than plain factors do.

Rounded to nearest, an error of the pivots is repeated by every row that they make, about twice the error of plain factors.
Instead each row's rounding error is spread over the rows that are still to be rounded, as optimal brain quantization does
(GPTQ, arXiv 2210.17323): first in C, then in P, which is fitted anew to the rounded C.

Shapes, for pivoted outputs: pivot P [r, m], rest C [k − r, r], product rows P and C P. Everything is float64.
"""

import numpy as np
import torch
from scipy.linalg import cholesky, solve, solve_triangular

from fisherfold.linalg.pivoted import Pivoted

BLOCK = 64  # rows whose errors are spread at once over the rows after them
DAMPING = 1e-10  # of a Gram matrix, relative to its mean diagonal


def round_pivoted(exact: Pivoted, dtype: torch.dtype) -> Pivoted:
    """The pivoted product with numbers of `dtype`: by error feedback for 16 bits, to nearest for more."""
    if dtype.itemsize > 2:
        return Pivoted(exact.side, exact.order, nearest(exact.pivot, dtype), nearest(exact.rest, dtype))
    outputs = exact.side == "outputs"
    pivot, rest = (exact.pivot, exact.rest) if outputs else (exact.pivot.T, exact.rest.T)
    pivot, rest = _round_factors(pivot, rest, dtype)
    return (
        Pivoted(exact.side, exact.order, pivot, rest) if outputs else Pivoted(exact.side, exact.order, pivot.T, rest.T)
    )


def nearest(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """`values` rounded to `dtype`, as float64."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).double().numpy()


def round_with_feedback(values: np.ndarray, gram: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Rounded Q of values X [r, c] with a small tr((X − Q)ᵀ gram (X − Q)), gram [r, r] positive definite.

    Rows are rounded in order of falling diagonal of gram; each row's error is made up for by the rows after it.
    """
    order = np.argsort(-np.diag(gram), kind="stable")
    spread = _feedback(gram[np.ix_(order, order)])
    left, rounded = values[order], np.empty_like(values)
    for start in range(0, len(left), BLOCK):
        block = slice(start, min(start + BLOCK, len(left)))
        errors = np.empty_like(left[block])
        for row in range(block.start, block.stop):
            rounded[order[row]] = nearest(left[row], dtype)
            errors[row - start] = left[row] - rounded[order[row]]
            left[row + 1 : block.stop] -= np.outer(spread[row, row + 1 : block.stop], errors[row - start])
        left[block.stop :] -= spread[block, block.stop :].T @ errors
    return rounded


def _feedback(gram: np.ndarray) -> np.ndarray:
    """Upper triangular [r, r]: row i says how a unit error of row i is best made up for by the rows after it, negated."""
    damped = gram + DAMPING * max(np.trace(gram) / len(gram), np.finfo(float).tiny) * np.eye(len(gram))
    lower = cholesky(
        damped[::-1, ::-1], lower=True
    )  # of the reversed matrix, so that earlier rows are eliminated first
    inverse = solve_triangular(lower, np.eye(len(lower)), lower=True)[::-1, ::-1]
    return inverse / np.diag(inverse)[:, None]


def _round_factors(pivot: np.ndarray, rest: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Rounded P and C whose product stays near [P; C P]. Fitting C again to the rounded P, and so on, would gain 3 %."""
    rounded = round_with_feedback(rest.T, pivot @ pivot.T, dtype).T
    gram = np.eye(len(pivot)) + rounded.T @ rounded
    fitted = solve(gram, pivot + (rounded.T @ rest) @ pivot, assume_a="pos")
    return round_with_feedback(fitted, gram, dtype), rounded
