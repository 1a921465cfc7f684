"""Rounding the two factors of a low-rank product to few bits under A ⊗ B: one is rounded, the other fitted anew to it and rounded in turn.

The error of a factor reaches the product through the other one, so each has a metric of its own (``kronecker_rounding``):

    plain             W ≈ U V                       U under V A Vᵀ ⊗ (B | U),        V under A ⊗ Uᵀ B U
    outputs pivoted   W[rows] ≈ [P; C P] = M P      C under P A Pᵀ ⊗ (B | M)_rest,   P under A ⊗ Mᵀ B M
    inputs pivoted    W[:, columns] ≈ P [I, C] = P N     C under (A | Nᵀ)_rest ⊗ Pᵀ B P,    P under N A Nᵀ ⊗ B

Fitted: V = (Uᵀ B U)⁻¹ Uᵀ B W, and so on. What is fitted makes up for what an error before it does within its span, so the first to be rounded minds
the rest alone: B | M = B − B M (Mᵀ B M)⁻¹ Mᵀ B is to first order what an error of C still loses once P is fitted. Plain factors are
rotated in their r dimensions before (`rotated_gauge`); pivots fix those of pivoted ones.

Shapes: W [n, m], U [n, r], V [r, m]; pivots and rest as in ``fisherfold.linalg.pivoted``. n, m and r are multiples of GROUP where they are the
inputs of a stored matrix. Everything is float64.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cholesky, eigh, qr, solve

from fisherfold.linalg.group_grid import Rounded
from fisherfold.linalg.kronecker_rounding import Side, kronecker_loss, round_under, side_of

WITHIN = 0.03  # of the metric, that the first of two plain factors minds of errors that the second makes up for
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
    """U [n, r] and V [r, m] in `bits` bits, with U V near W: in their rotated gauge, the one that has the shorter side of W first."""
    left, right = rotated_gauge(left, right, metric)
    if len(left) <= right.shape[1]:
        through = _side(right @ metric.A @ right.T)
        up = round_under(left, bits, through, _side(_mostly_beyond(metric.B, left)))
        seen = metric.B @ up.values
        gram = up.values.T @ seen
        return RoundedFactors(up, round_under(_fit(gram, seen.T @ W), bits, metric.inputs, _side(gram)))
    through = _side(left.T @ metric.B @ left)
    down = round_under(right, bits, _side(_mostly_beyond(metric.A, right.T)), through)
    seen = metric.A @ down.values.T
    gram = down.values @ seen
    return RoundedFactors(round_under(_fit(gram, seen.T @ W.T).T, bits, _side(gram), metric.outputs), down)


def rotated_gauge(left: np.ndarray, right: np.ndarray, metric: LayerMetric) -> tuple[np.ndarray, np.ndarray]:
    """left S and S⁻¹ right with leftᵀ B left = right A rightᵀ, and this far from diagonal: the same product.

    Balanced, both are Σ in some basis. Where that is diagonal, strong components have large numbers that count for much: rounding loses in
    proportion to the mean of σ². A random rotation of the r dimensions makes ranges alike, and what feedback leaves of Σ is then near the
    geometric mean of σ: the loss goes with that times the mean of σ, which is never more.
    """
    rank = len(right)
    of_left, of_right = left.T @ metric.B @ left, right @ metric.A @ right.T
    root = cholesky(_damped(of_right), lower=True)
    squares, basis = eigh(root.T @ of_left @ root)
    sigma = np.sqrt(np.maximum(squares, squares[-1] * RIDGE**2 + np.finfo(float).tiny))
    rotation = qr(np.random.default_rng(0).standard_normal((rank, rank)))[0]
    across = root @ (basis / np.sqrt(sigma)) @ rotation
    return left @ across, solve(across, right)


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


def _mostly_beyond(metric: np.ndarray, span: np.ndarray) -> np.ndarray:
    """metric | span and a little of the metric itself: errors within the span are made up for, but must stay on the grid."""
    return WITHIN * metric + (1 - WITHIN) * _beyond(metric, span)


def _damped(gram: np.ndarray) -> np.ndarray:
    return gram + RIDGE * max(np.trace(gram) / len(gram), np.finfo(float).tiny) * np.eye(len(gram))


def _side(gram: np.ndarray) -> Side:
    return side_of(gram, len(gram))


def _fit(gram: np.ndarray, right: np.ndarray) -> np.ndarray:
    """gram⁻¹ right, gram positive semi-definite."""
    return solve(_damped(gram), right, assume_a="pos")
