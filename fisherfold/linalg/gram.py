"""Sums of Gram matrices, Σ X^T X, at about half the products of a full multiplication.

Shapes: X [N, p] rows of one batch, G [p, p].
"""

from typing import Any

import torch

STRIPES = 6  # fewer do more products, more make them slow: (1 + 1/6) / 2 of the full product
NARROWEST = 96
MIRRORED = 512


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """G += X^T X in the stripes of the upper block triangle; what lies below them is left as it is.

    Call `mirror` once all rows are in.

    Args:
        total: G [p, p], changed in place.
        rows: X [N, p] in G's dtype.
    """
    size = len(total)
    width = max(NARROWEST, -(-size // STRIPES))
    for low in range(0, size, width):
        total[low : low + width, low:].addmm_(rows[:, low : low + width].T, rows[:, low:])


def mirror(total: torch.Tensor) -> torch.Tensor:
    """G with its upper triangle copied over the lower one, in place: exactly symmetric."""
    for low in range(0, len(total), MIRRORED):
        stripe = slice(low, low + MIRRORED)
        corner = total[stripe, stripe].triu()
        total[stripe, stripe] = corner + corner.triu(1).T
        below = total[stripe, low + MIRRORED :].T.contiguous()  # two fast copies for a slow one
        total[low + MIRRORED :, stripe] = below
    return total


class exact_products:
    """Inside, float32 products of values that come from `source`'s dtype run as fast as they stay exact.

    A bfloat16 value has 8 significant bits, so a product of two of them is exact in float32, and matrix units that take
    bfloat16 (or TF32) and sum in float32 round nothing but the sums. Values that come from float32 are left alone.
    May be entered many times, one after the other.
    """

    def __init__(self, source: torch.Tensor) -> None:
        self._setting, self._exact = _matrix_units(source)

    def __enter__(self) -> None:
        if self._setting is not None:
            self._before = self._setting.fp32_precision
            self._setting.fp32_precision = self._exact

    def __exit__(self, *error: object) -> None:
        if self._setting is not None:
            self._setting.fp32_precision = self._before


def _matrix_units(source: torch.Tensor) -> tuple[Any, str]:
    """The setting of `source`'s device that chooses how float32 is multiplied, and the value that is exact."""
    if source.dtype == torch.bfloat16 and source.device.type == "cuda":
        return torch.backends.cuda.matmul, "tf32"
    if source.dtype == torch.bfloat16 and source.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.backends.mkldnn.matmul, "bf16"  # type: ignore[attr-defined]
    return None, ""
