"""Rounding the two factors of a low-rank product to few bits under A ⊗ B: one is rounded, the other fitted anew to it and rounded in turn.

The error of a factor reaches the product through the other one, so each has a metric of its own (``kronecker_rounding``):

    plain             W ≈ U V                       U under V A Vᵀ ⊗ B,              V under A ⊗ Uᵀ B U
    outputs pivoted   W[rows] ≈ [P; C P] = M P      C under P A Pᵀ ⊗ (B | M)_rest,   P under A ⊗ Mᵀ B M
    inputs pivoted    W[:, columns] ≈ P [I, C] = P N     C under (A | Nᵀ)_rest ⊗ Pᵀ B P,    P under N A Nᵀ ⊗ B

Fitted: V = (Uᵀ B U)⁻¹ Uᵀ B W, and so on. Plain factors are fitted and rounded in turns, which gains up to a half; a second turn of pivoted
ones gains nothing, as C cannot make up for an error of the pivots themselves. But P makes up for what an error of C does within the span
of M, so C minds the rest alone: B | M = B − B M (Mᵀ B M)⁻¹ Mᵀ B, to first order what is lost once P is fitted. It loses a fifth less.

Shapes: W [n, m], U [n, r], V [r, m]; pivots and rest as in ``fisherfold.linalg.pivoted``. n, m and r are multiples of GROUP where they are the
inputs of a stored matrix. Everything is float64.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve

from fisherfold.linalg.group_grid import Rounded
from fisherfold.linalg.kronecker_rounding import Side, kronecker_loss, round_under, side_of

TURNS = 2  # of plain factors: right and left
RIDGE = 1e-10  # of a fit's Gram matrix, relative to its mean diagonal


@dataclass(frozen=True)
class LayerMetric:
    """A [m, m] and B [n, n] of a layer."""

    A: np.ndarray
    B: np.ndarray

    def loss(self, error: np.ndarray) -> float:
        """tr(B E A Eᵀ)."""
        return kronecker_loss(error, self.A, self.B)

    @property
    def inputs(self) -> Side:
        """Feedback under A."""
        return side_of(self.A, len(self.A))

    @property
    def outputs(self) -> Side:
        """Feedback under B."""
        return side_of(self.B, len(self.B))


@dataclass(frozen=True)
class RoundedFactors:
    """The two matrices of a low-rank layer, as it stores them (`up` after `down`)."""

    up: Rounded
    down: Rounded


def round_plain(left: np.ndarray, right: np.ndarray, W: np.ndarray, bits: int, metric: LayerMetric) -> RoundedFactors:
    """U [n, r] and V [r, m] in `bits` bits, with U V near W; of the turns, the one of least loss."""
    inputs, outputs = metric.inputs, metric.outputs
    best, least = None, np.inf
    for _ in range(TURNS):
        down = round_under(right, bits, inputs, _side(left.T @ metric.B @ left))
        through = metric.A @ down.values.T
        gram = down.values @ through
        up = round_under(_fit(gram, through.T @ W.T).T, bits, _side(gram), outputs)
        loss = metric.loss(up.values @ down.values - W)
        if loss < least:
            best, least = RoundedFactors(up, down), loss
        left = up.values
        through = metric.B @ left
        right = _fit(left.T @ through, through.T @ W)
    assert best is not None
    return best


def round_outputs_pivoted(
    pivot: np.ndarray, rest: np.ndarray, order: np.ndarray, W: np.ndarray, bits: int, metric: LayerMetric
) -> RoundedFactors:
    """P [r, m] (down) and C [n − r, r] (up) with cat(P, C P)[order] near W."""
    rows, rank = np.argsort(order), len(pivot)
    B, W = metric.B[np.ix_(rows, rows)], W[rows]
    beyond = _beyond(B, np.concatenate([np.eye(rank), rest]))[rank:, rank:]
    up = round_under(rest, bits, _side(pivot @ metric.A @ pivot.T), _side(beyond))
    M = np.concatenate([np.eye(rank), up.values])
    through = B @ M
    gram = M.T @ through
    return RoundedFactors(up, round_under(_fit(gram, through.T @ W), bits, metric.inputs, _side(gram)))


def round_inputs_pivoted(
    pivot: np.ndarray, rest: np.ndarray, order: np.ndarray, W: np.ndarray, bits: int, metric: LayerMetric
) -> RoundedFactors:
    """P [n, r] (up) and C [r, m − r] (down) with P (x_pivot + C x_rest) near W x."""
    rank = pivot.shape[1]
    A, W = metric.A[np.ix_(order, order)], W[:, order]
    beyond = _beyond(A, np.concatenate([np.eye(rank), rest.T]))[rank:, rank:]
    down = round_under(rest, bits, _side(beyond), _side(pivot.T @ metric.B @ pivot))
    N = np.concatenate([np.eye(rank), down.values], axis=1)
    through = A @ N.T
    gram = N @ through
    return RoundedFactors(round_under(_fit(gram, through.T @ W.T).T, bits, _side(gram), metric.outputs), down)


def _beyond(metric: np.ndarray, span: np.ndarray) -> np.ndarray:
    """metric | span [k, r]: what a metric [k, k] leaves of errors once the best of the span is taken off them."""
    through = metric @ span
    return metric - through @ _fit(span.T @ through, through.T)


def _side(gram: np.ndarray) -> Side:
    return side_of(gram, len(gram))


def _fit(gram: np.ndarray, right: np.ndarray) -> np.ndarray:
    """gram⁻¹ right, gram positive semi-definite."""
    ridge = RIDGE * max(np.trace(gram) / len(gram), np.finfo(float).tiny)
    return solve(gram + ridge * np.eye(len(gram)), right, assume_a="pos")
