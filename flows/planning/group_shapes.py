"""The groups that stages write, on paper: shapes of their arrays by name, and bytes of their files.

Shapes: n outputs and m inputs of a layer, r = min(n, m).
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fisherfold.network.layers import LinearLayer
from fisherfold.run.group_writer import GroupSize
from fisherfold.run.params import CaptureParams
from fisherfold.run.store import LINKED_BYTES
from fisherfold.statistics.gradient_forms import Shapes
from fisherfold.statistics.kept import kept_dtypes, kept_shapes, rows_per_chunk

Part = TypeVar("Part")


def group_bytes(shapes: Shapes) -> int:
    """Bytes of the file of a group of float32 arrays."""
    size = GroupSize()
    for name, shape in shapes.items():
        size.array(name, shape)
    return size.total


def gathered_bytes(parts: Sequence[Part], size: Callable[[Sequence[Part]], int]) -> int:
    """Bytes of a group gathered from parts: large files stay as they are, small ones share one; see `gather_groups`.

    Args:
        size: bytes of the one file that would hold some of the parts.
    """
    sizes = [size([part]) for part in parts]
    if len(parts) == 1:
        return sizes[0]
    small = [part for part, own in zip(parts, sizes) if own < LINKED_BYTES]
    return sum(own for own in sizes if own >= LINKED_BYTES) + (size(small) if small else 0)


def copied_bytes(sizes: Sequence[int]) -> int:
    """Of files that are gathered, bytes of those that are copied into one; see `gather_groups`."""
    return sum(size for size in sizes if size < LINKED_BYTES) if len(sizes) > 1 else 0


def joined_bytes(parts: Sequence[Shapes]) -> int:
    """Bytes of one file of all these arrays."""
    return group_bytes({name: shape for part in parts for name, shape in part.items()})


def kept_bytes(
    layers: Sequence[LinearLayer], params: CaptureParams, sequences: int, length: int, with_positions: bool = True
) -> int:
    """Bytes of the file that holds what is kept of each sequence of a shard; 0 if nothing is."""
    shapes = kept_shapes(layers, params, length, with_positions)
    if not shapes:
        return 0
    size, dtypes = GroupSize(), kept_dtypes(shapes, params)
    rows = rows_per_chunk(shapes, sequences, params.batch_size)
    for name, shape in shapes.items():
        whole = (sequences, *shape)
        size.array(name, whole, dtypes.get(name, torch.float32), rows) if shape else size.array(name, whole)
    return size.total


def basis_shapes(layers: Sequence[LinearLayer]) -> Shapes:
    """Shapes of the bases of some layers, by name."""
    shapes: Shapes = {}
    for layer in layers:
        r = min(layer.outputs, layer.inputs)
        shapes |= {f"{layer.name}/left": (layer.outputs, r), f"{layer.name}/right": (r, layer.inputs)}
    return shapes
