"""Sums of Gram matrices, Σ X^T X, at about half the products of a full multiplication, and stored as half their numbers.

Shapes: X [N, p] rows of one batch, G [p, p], h = ⌊p/2⌋.
"""

from typing import Any

import torch

STRIPES = 6  # fewer do more products, more make them slow: (1 + 1/6) / 2 of the full product
NARROWEST = 96
ALIGNED = 32  # numbers that a stripe begins after: a matrix unit of a GPU takes no others, and what stands in for it is three times as slow
MIRRORED = 512


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """G += X^T X in the stripes of the upper block triangle; what lies below them is left as it is.

    Call `mirror`, or `fold`, once all rows are in.

    Args:
        total: G [p, p], changed in place.
        rows: X [N, p] in G's dtype; or, on a CUDA device, in bfloat16, whose products are summed in G's.
    """
    size = len(total)
    width = max(NARROWEST, -(-size // (STRIPES * ALIGNED)) * ALIGNED)
    for low in range(0, size, width):
        stripe, left, right = total[low : low + width, low:], rows[:, low : low + width].T, rows[:, low:]
        if rows.dtype == total.dtype:
            stripe.addmm_(left, right)
        else:
            torch.addmm(stripe, left, right, out_dtype=total.dtype, out=stripe)


def add_tokens(total: torch.Tensor, values: torch.Tensor) -> None:
    """G += Σ v v^T over the tokens of `values` [..., p] of any floating-point dtype, by `add_gram`, as fast as the products stay exact."""
    rows = values.flatten(0, -2)
    as_they_are = rows.is_cuda and rows.dtype == torch.bfloat16
    with exact_products(rows):
        add_gram(total, rows if as_they_are else rows.to(total))


def mirror(total: torch.Tensor) -> torch.Tensor:
    """G with its upper triangle copied over the lower one, in place: exactly symmetric."""
    for low in range(0, len(total), MIRRORED):
        stripe = slice(low, low + MIRRORED)
        corner = total[stripe, stripe].triu()
        total[stripe, stripe] = corner + corner.triu(1).T
        below = total[stripe, low + MIRRORED :].T.contiguous()  # two fast copies for a slow one
        total[low + MIRRORED :, stripe] = below
    return total


def folded_shape(size: int) -> tuple[int, int]:
    """Shape of `fold` of G [p, p]: [h, p + 1] for an even p, [h + 1, p] for an odd one; p (p + 1) / 2 numbers."""
    return (size // 2, size + 1) if size % 2 == 0 else (size // 2 + 1, size)


def fold(total: torch.Tensor) -> torch.Tensor:
    """The upper triangle of G as a rectangle without a gap; what lies below the diagonal is not read.

    The first rows of G stay rows, and the triangle below them is transposed into what they leave free: the rectangular full packed
    format (Gustavson, Waśniewski, Dongarra & Langou 2010). Of integers exactly, of floats to the bit, `unfold` is its inverse.
    """
    size, upper = len(total), (len(total) + 1) // 2
    folded = total.new_empty(folded_shape(size))
    even = 1 - size % 2
    folded[:, even:] = total[:upper]
    corner = folded[1 - even :, : size - upper]
    corner.copy_(torch.where(_below(corner), total[upper:, upper:].T, corner))
    return folded


def unfold(folded: torch.Tensor, symmetric: bool = True) -> torch.Tensor:
    """G [p, p] of its `fold`, exactly symmetric; or only its upper triangle, with zeros below."""
    rows, columns = folded.shape
    size = columns - 1 if columns == 2 * rows + 1 else columns
    upper, even = (size + 1) // 2, 1 - size % 2
    total = folded.new_zeros(size, size)
    total[:upper] = folded[:, even:]
    total[upper:, upper:] = folded[1 - even :, : size - upper].T
    return mirror(total) if symmetric else total.triu_()


def _below(corner: torch.Tensor) -> torch.Tensor:
    """Where the transposed triangle lies in a corner [h, h]: on and below the diagonal."""
    return torch.ones_like(corner, dtype=torch.bool).tril_()


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
