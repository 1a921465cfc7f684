"""The groups that stages write, on paper: shapes of their arrays by name, and bytes of their files.

Shapes: n outputs and m inputs of a layer, r = min(n, m).
"""

from collections.abc import Sequence

import torch

from fisherfold.network.layers import LinearLayer
from fisherfold.run.group_writer import GroupSize
from fisherfold.run.params import CaptureParams
from fisherfold.statistics.gradient_forms import Shapes
from fisherfold.statistics.kept import kept_dtypes, kept_shapes, rows_per_chunk


def group_bytes(shapes: Shapes) -> int:
    """Bytes of the file of a group of float32 arrays."""
    size = GroupSize()
    for name, shape in shapes.items():
        size.array(name, shape)
    return size.total


def kept_bytes(layers: Sequence[LinearLayer], params: CaptureParams, sequences: int, length: int) -> int:
    """Bytes of the file that holds what is kept of each sequence of a shard; 0 if nothing is."""
    shapes = kept_shapes(layers, params, length, with_positions=True)
    if not shapes:
        return 0
    size, dtypes = GroupSize(), kept_dtypes(shapes, params)
    rows = rows_per_chunk(shapes, sequences, params.batch_size)
    for name, shape in shapes.items():
        whole = (sequences, *shape)
        size.array(name, whole, dtypes.get(name, torch.float32), rows) if shape else size.array(name, whole)
    return size.total


def basis_shapes(layers: Sequence[LinearLayer]) -> Shapes:
    """Shapes of the bases of stage `subspace`, by name."""
    shapes: Shapes = {}
    for layer in layers:
        r = min(layer.outputs, layer.inputs)
        shapes |= {f"{layer.name}/left": (layer.outputs, r), f"{layer.name}/right": (r, layer.inputs)}
    return shapes
