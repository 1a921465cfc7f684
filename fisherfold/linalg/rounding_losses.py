"""What rounding a layer to few bits will cost, before anything is rounded: in the unit of σ², the loss of dropping a component.

Under feedback the loss is Σ_ij D_B,i D_A,j s_ij² / 12 (``kronecker_rounding``), and the step of b bits spans a group's largest number, s = max /
2^(b−1). So everything but b is one number, the `unit`: loss(b) = unit / 4^(b−1).

For the factors of the weighted SVD, balanced to left = R_B⁻ᵀ U √Σ, right = √Σ Vᵀ R_A⁻¹, the metrics that the other factor makes are diagonal:
right A rightᵀ = leftᵀ B left = Σ. So each component k has a unit of its own, and rank r costs the sum over the first r:

    σ_k (Σ_i D_B,i max_left(i, group of k)² + Σ_j D_A,j max_right(k, group of j)²) / 12
"""

from dataclasses import dataclass

import numpy as np

from fisherfold.linalg.group_grid import GROUP
from fisherfold.linalg.kronecker_rounding import Side

PIVOTED = 2.2
"""Loss of pivoted factors over that of plain ones: an error of the pivots is repeated by every row that they make. See docs/bytes.md."""


@dataclass(frozen=True)
class RoundingUnits:
    """Losses at one bit: `dense` of the whole weight, `components` [k] of each component of the plain factors."""

    dense: float
    components: np.ndarray

    def of_ranks(self, bits: int) -> np.ndarray:
        """The loss of rounding plain factors of rank 0 … k to `bits` bits, [k + 1]."""
        return np.concatenate([[0.0], np.cumsum(self.components)]) / 4 ** (bits - 1)

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
    return RoundingUnits(float(dense) / 12, sigma * (of_left + of_right) / 12)


def _squared_ranges(matrix: np.ndarray) -> np.ndarray:
    """The square of the largest number of every number's group, [p, q]; the last group of a row may be shorter."""
    size = matrix.shape[1]
    padded = np.pad(matrix, ((0, 0), (0, -size % GROUP)))
    largest = np.abs(padded).reshape(len(matrix), -1, GROUP).max(-1)
    return np.square(np.repeat(largest, GROUP, axis=1)[:, :size])
