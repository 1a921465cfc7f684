"""Sums of Gram matrices, Σ X^T X, at about half the products of a full multiplication.

Shapes: X [N, p] rows of one batch, G [p, p].
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

STRIPES = 6  # fewer do more products, more make them slow: (1 + 1/6) / 2 of the full product
NARROWEST = 96


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
    for low in range(0, len(total), NARROWEST):
        stripe = slice(low, low + NARROWEST)
        corner = total[stripe, stripe].triu()
        total[stripe, stripe] = corner + corner.triu(1).T
        total[low + NARROWEST :, stripe] = total[stripe, low + NARROWEST :].T
    return total


@contextmanager
def exact_products(source: torch.Tensor) -> Iterator[None]:
    """Inside, float32 products of values that come from `source`'s dtype run as fast as they stay exact.

    A bfloat16 value has 8 significant bits, so a product of two of them is exact in float32, and matrix units that take
    bfloat16 (or TF32) and sum in float32 round nothing but the sums. Values that come from float32 are left alone.
    """
    units = _matrix_units(source)
    if units is None:
        yield
        return
    setting, exact = units
    before = setting.fp32_precision
    setting.fp32_precision = exact
    try:
        yield
    finally:
        setting.fp32_precision = before


def _matrix_units(source: torch.Tensor) -> tuple[object, str] | None:
    if source.dtype != torch.bfloat16:
        return None
    if source.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.backends.mkldnn.matmul, "bf16"
    return (torch.backends.cuda.matmul, "tf32") if source.device.type == "cuda" else None
