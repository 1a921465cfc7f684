"""What rounding a layer to few bits will cost, before anything is rounded: in the unit of σ², the loss of dropping a component.

Under feedback the loss is Σ_ij D_B,i D_A,j s_ij² / 12 (``kronecker_rounding``), and the step of b bits spans a group's largest number, s = max /
2^(b−1). So everything but b is one number, the `unit`: loss(b) = unit / 4^(b−1).

For the factors of the weighted SVD, balanced to left = R_B⁻ᵀ U √Σ, right = √Σ Vᵀ R_A⁻¹, the metrics that the other factor makes are diagonal:
right A rightᵀ = leftᵀ B left = Σ. So each component k has a unit of its own,

    σ_k ranges_k,     ranges_k = (Σ_i D_B,i max_left(i, group of k)² + Σ_j D_A,j max_right(k, group of j)²) / 12

Plain factors are rounded in a rotated gauge (``factor_rounding``), in which every component has the mean range and Σ leaves its geometric mean:
rank r costs ROTATED · (Π_{k<r} σ_k)^(1/r) · Σ_{k<r} ranges_k. Pivoted ones cannot be rotated: PIVOTED · Σ_{k<r} σ_k ranges_k.
"""

from dataclasses import dataclass

import numpy as np

from fisherfold.linalg.group_grid import GROUP
from fisherfold.linalg.kronecker_rounding import Side

PIVOTED = 1.0
"""Loss of pivoted factors over the sum of their components' units: an error of the pivots is repeated by every row that they make, but their
coefficients are few and made up for. See docs/bytes.md."""
ROTATED = 0.5
"""Loss of rotated plain factors over the product of their means: a rotated group's range is less than the largest of its components', and
the factor that is rounded second makes up for a part of the first one's errors."""


@dataclass(frozen=True)
class RoundingUnits:
    """Losses at one bit: `dense` of the whole weight; `components` [k] of each component, σ_k ranges_k, and `sigma` [k]."""

    dense: float
    components: np.ndarray
    sigma: np.ndarray

    def of_pivoted(self, bits: int) -> np.ndarray:
        """The loss of rounding pivoted factors of rank 0 … k to `bits` bits, [k + 1]."""
        return PIVOTED * np.concatenate([[0.0], np.cumsum(self.components)]) / 4 ** (bits - 1)

    def of_plain(self, bits: int) -> np.ndarray:
        """The same of plain factors."""
        sigma = np.maximum(self.sigma, np.finfo(float).tiny)
        mean = np.exp(np.cumsum(np.log(sigma)) / np.arange(1, len(sigma) + 1))
        return ROTATED * np.concatenate([[0.0], mean * np.cumsum(self.components / sigma)]) / 4 ** (bits - 1)

    def of_dense(self, bits: int) -> float:
        """The loss of rounding the weight itself."""
        return self.dense / 4 ** (bits - 1)


def rounding_units(
    W: np.ndarray, left: np.ndarray, right: np.ndarray, sigma: np.ndarray, inputs: Side, outputs: Side
) -> RoundingUnits:
    """The units of W [n, m] with its balanced components left [n, k], right [k, m], σ [k]."""
    of_left = outputs.weights @ _squared_ranges(left)
    of_right = _squared_ranges(right) @ inputs.weights
    dense = outputs.weights @ _squared_ranges(W) @ inputs.weights
    return RoundingUnits(float(dense) / 12, sigma * (of_left + of_right) / 12, sigma)


def _squared_ranges(matrix: np.ndarray) -> np.ndarray:
    """The square of the largest number of every number's group, [p, q]; the last group of a row may be shorter."""
    size = matrix.shape[1]
    padded = np.pad(matrix, ((0, 0), (0, -size % GROUP)))
    largest = np.abs(padded).reshape(len(matrix), -1, GROUP).max(-1)
    return np.square(np.repeat(largest, GROUP, axis=1)[:, :size])
