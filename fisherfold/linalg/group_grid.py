"""Numbers of few bits: whole numbers times one scale for every GROUP neighbours of a row.

    value[i, j] = scale[i, j // GROUP] · code[i, j],   −2^(b−1) <= code < 2^(b−1)

A weight [n, m] has its groups along the m inputs, as the formats that engines read have them (compressed-tensors' "pack-quantized",
GGUF's Q4_0). A scale is stored in 16 bits, so a number takes b + 16 / GROUP bits.
"""

from dataclasses import dataclass

import numpy as np

GROUP = 32  # numbers that share a scale
SCALE_BYTES = 2
SIGNIFICANT = 2**8  # values of a mantissa that bfloat16 tells apart
HEADROOM = 1.5  # codes left free at the end of a range: feedback moves numbers beyond it
SHRINKS = np.linspace(1.0, 0.5, 21)  # of the largest magnitude: what is left of it inside the grid
SMALLEST = float(
    np.finfo(np.float16).tiny
)  # scale of a group of zeros, and of one that float16 could not tell from zero


@dataclass(frozen=True)
class Grid:
    """The scales [n, m / GROUP] of a matrix [n, m], float64 with values that 16 bits hold, and the bits of its codes."""

    bits: int
    scales: np.ndarray

    @property
    def steps(self) -> np.ndarray:
        """The scale of every number, [n, m]."""
        return np.repeat(self.scales, GROUP, axis=1)

    def codes(self, values: np.ndarray) -> np.ndarray:
        """The nearest codes of values [n, m], int8."""
        return nearest_codes(values, self.steps, self.bits).astype(np.int8)


@dataclass(frozen=True)
class Rounded:
    """A matrix on its grid: codes [n, m], int8."""

    grid: Grid
    codes: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """The numbers that it stands for, float64 [n, m]."""
        return self.grid.steps * self.codes


def nearest_codes(values: np.ndarray, steps: np.ndarray, bits: int) -> np.ndarray:
    """round(values / steps), cut to the codes there are, float64."""
    half = 2 ** (bits - 1)
    return np.clip(np.rint(values / steps), -half, half - 1)


def fit_grid(values: np.ndarray, bits: int, weights: np.ndarray | None = None) -> Grid:
    """The scales of values [n, m] with the least Σ_j weights_j (value − rounded)² in each group, over a few cuts of its range.

    A cut loses the largest numbers and makes the steps of all others finer. The sign of a scale puts the larger end of a group on
    the side that has one code more.

    Args:
        values: of which m is a multiple of GROUP.
        bits: b.
        weights: [m]; all alike if not given.
    """
    groups = values.reshape(len(values), -1, GROUP)
    weights = np.ones(values.shape[1]) if weights is None else weights
    importance = weights.reshape(-1, GROUP)
    ends = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]
    best, least = np.zeros_like(ends), np.full(ends.shape, np.inf)
    for shrink in SHRINKS:
        scales = _storable(-ends * shrink / (2 ** (bits - 1) - HEADROOM * (bits > 2)))
        codes = nearest_codes(groups, scales[..., None], bits)
        loss = (importance * np.square(groups - scales[..., None] * codes)).sum(-1)
        better = loss < least
        best, least = np.where(better, scales, best), np.where(better, loss, least)
    return Grid(bits, best)


def _storable(scales: np.ndarray) -> np.ndarray:
    """Scales with the digits of bfloat16 in the range of float16, so that either keeps them as they are; none of them is zero."""
    mantissa, exponent = np.frexp(scales)
    kept = np.ldexp(np.rint(mantissa * SIGNIFICANT) / SIGNIFICANT, exponent)
    return np.where(np.abs(kept) < SMALLEST, SMALLEST, kept)


def round_nearest(values: np.ndarray, bits: int) -> Rounded:
    """Each number to the nearest of its group's grid, which the largest number of the group spans: the common baseline."""
    groups = np.abs(values).reshape(len(values), -1, GROUP).max(-1)
    grid = Grid(bits, _storable(groups / (2 ** (bits - 1) - 1)))
    return Rounded(grid, grid.codes(values))


def stored_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of a matrix of codes and its scales; `columns` is a multiple of GROUP."""
    return rows * (columns * bits // 8 + columns // GROUP * SCALE_BYTES)
