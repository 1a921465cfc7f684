"""How the sums of stage `capture` are stored: their names and shapes, and half of each symmetric one.

Shapes: n outputs and m inputs of a layer.
"""

from collections.abc import Sequence

import torch

from fisherfold.linalg.gram import fold, folded_shape, unfold
from fisherfold.network.layers import LinearLayer, by_group

SUMS = "statistics"
"""The name of their group."""
SYMMETRIC = ("input_gram", "gradient_gram", "output_gram")


def stored(kind: str, values: torch.Tensor) -> torch.Tensor:
    """A sum as it is stored: the `fold` of a symmetric one, of which only the upper triangle is read."""
    return fold(values) if kind in SYMMETRIC else values


def restored(kind: str, values: torch.Tensor, whole: bool = True) -> torch.Tensor:
    """The inverse of `stored`; with zeros below the diagonal if not `whole`."""
    return unfold(values, symmetric=whole) if kind in SYMMETRIC else values


def sum_shapes(layers: Sequence[LinearLayer], gradients: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of all that is stored, by name, in its order.

    Args:
        gradients: whether sums over the sequences' gradients are among it.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    groups = by_group(layers)
    for name, members in groups.items():
        m = members[0].inputs
        shapes |= {f"{name}/input_abs": (m,), f"{name}/input_gram": folded_shape(m)}
        if len(members) > 1:
            shapes[f"{name}/gradient_gram"] = folded_shape(m)
    for layer in layers:
        n, m, name = layer.outputs, layer.inputs, layer.name
        shapes[f"{name}/output_gram"] = folded_shape(n)
        if layer.stack:
            shapes[f"{name}/routed"] = (1,)
        if gradients:
            shapes |= {f"{name}/gradient_sum": (n, m), f"{name}/fisher_inputs": (m,), f"{name}/fisher_outputs": (n,)}
    return shapes
