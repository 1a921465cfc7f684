"""What stage `capture` keeps of every sequence: its gradients and sampled tokens, as arrays [S, ...] of one group a shard.

Shapes: S sequences of T tokens in the shard, t sampled tokens of each, k sketch rank, n outputs and m inputs of a layer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fisherfold.network.layers import LinearLayer
from fisherfold.network.models import DTYPES
from fisherfold.run.group_writer import GroupWriter, RowWriter
from fisherfold.run.params import CaptureParams
from fisherfold.statistics.gradient_forms import GRADIENT_FORMS, GradientForm, Shapes
from fisherfold.statistics.layer_sums import ModelSums

HELD_BYTES = 256 * 2**20  # of sequences' gradients in memory before they are written


class GradientWriter:
    """Writes sequences' gradients and tokens as arrays [S, ...] of one group, at most about HELD_BYTES of them in memory.

    Args:
        folder: the group; made anew.
        shapes: of what is kept of one sequence, by name; one number per sequence is held to the end. What `ModelSums` has
            besides is left out.
        sequences: S.
        batch_size: sequences of a batch.
        dtypes: of what is not float32.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Shapes,
        sequences: int,
        batch_size: int,
        dtypes: Mapping[str, torch.dtype] = {},
    ) -> None:
        self._group = GroupWriter(folder)
        self._batches_held = batches_held(shapes, sequences, batch_size)
        whole = {name: (sequences, *shape) for name, shape in shapes.items() if shape}
        self._rows = RowWriter(self._group, whole, rows_per_chunk(shapes, sequences, batch_size), dtypes)
        self._shapes = shapes
        self._scalars: dict[str, list[torch.Tensor]] = {name: [] for name, shape in shapes.items() if not shape}
        self._batches = 0

    def after_batch(self, sums: ModelSums) -> None:
        """Write what `sums` holds if that is enough."""
        self._batches += 1
        if self._batches % self._batches_held == 0:
            self._write(sums)

    def close(self, sums: ModelSums) -> None:
        """Write all that is left."""
        self._write(sums)
        for name, parts in self._scalars.items():
            self._group.write(name, torch.cat(parts))
        self._group.close()

    def _write(self, sums: ModelSums) -> None:
        for name, rows in sums.take_gradients():
            if name in self._scalars:
                self._scalars[name].append(rows)
            elif name in self._shapes:
                self._rows.append(name, rows)


def batches_held(shapes: Shapes, sequences: int, batch_size: int) -> int:
    """Batches whose gradients are held before they are written: equal parts of a shard of at most about HELD_BYTES each."""
    batches = -(-sequences // batch_size)
    parts = -(-batches // max(1, HELD_BYTES // (batch_size * numbers_bytes(shapes))))
    return -(-batches // parts)


def rows_per_chunk(shapes: Shapes, sequences: int, batch_size: int) -> int:
    """Sequences in one chunk of a shard's gradients; the last chunk is stored in full, however few are left for it."""
    return min(sequences, batches_held(shapes, sequences, batch_size) * batch_size)


def gradient_shapes(layers: Sequence[LinearLayer], form: type[GradientForm], rank: int) -> Shapes:
    """Shapes of everything that is kept of one sequence, by name."""
    return {
        f"{layer.name}/{kind}": shape
        for layer in layers
        for kind, shape in {**form.shapes(layer, rank), "norm": ()}.items()
    }


def token_shapes(layers: Sequence[LinearLayer], tokens: int) -> Shapes:
    """Shapes of the sampled tokens of one sequence, by name, without their positions [t]."""
    if not tokens:
        return {}
    inputs: Shapes = {f"{layer.name}/x": (tokens, layer.inputs) for layer in layers if layer.group == layer.name}
    return inputs | {f"{layer.name}/d": (tokens, layer.outputs) for layer in layers}


def kept_shapes(layers: Sequence[LinearLayer], params: CaptureParams, length: int, with_positions: bool) -> Shapes:
    """Shapes of everything that is kept of one sequence of T = `length` tokens, by name."""
    form = GRADIENT_FORMS.lookup(params.gradients)
    tokens = min(params.tokens_per_sequence, length)
    shapes = gradient_shapes(layers, form, params.sketch_rank) if form else {}
    positions = {"positions": (tokens,)} if tokens and with_positions else {}
    return shapes | token_shapes(layers, tokens) | positions


def kept_dtypes(shapes: Shapes, params: CaptureParams) -> dict[str, torch.dtype]:
    """Dtypes of what is not float32, by name."""
    tokens = {name: DTYPES[params.token_dtype] for name in shapes if name.endswith(("/x", "/d"))}
    return tokens | {"positions": torch.int32}


def numbers_bytes(shapes: Shapes) -> int:
    """Bytes of float32 arrays of these shapes."""
    return 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
