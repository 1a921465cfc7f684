"""Layers in few bits on their way into the checkpoint: a unit of stage `factorize` each, after all training.

<unit>/model.safetensors   the layer's tensors, its matrices packed (``fisherfold.export.packed``); of a dense layer `weight` alone
<unit>/layer.json          rounding_loss = tr(B E A Eᵀ) / tr(B W A Wᵀ), E the error of the product
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fisherfold.export.gauges import product
from fisherfold.export.packed import PACKED, SCALE, SHAPE, packed_tensors
from fisherfold.export.stored_layer import StoredLayer
from fisherfold.linalg.factor_rounding import (
    LayerMetric,
    RoundedFactors,
    round_inputs_pivoted,
    round_outputs_pivoted,
    round_plain,
)
from fisherfold.linalg.group_grid import Rounded, round_nearest
from fisherfold.linalg.kronecker_rounding import round_under
from fisherfold.network.layers import LinearLayer
from fisherfold.run.checkpoint import StoredTensor, write_tensors
from fisherfold.run.scratch import Scratch
from fisherfold.run.workspace import Workspace
from fisherfold.subspaces.damped_metrics import DampedMetrics

FACTORS = ("up", "down")
ROWS = 4096  # of the head, in float64 at once
Matrices = Mapping[str, np.ndarray]
ROUNDINGS: dict[str, Callable[[Matrices, np.ndarray, int, LayerMetric], RoundedFactors]] = {
    "factors": lambda p, W, bits, metric: round_plain(p["up.weight"], p["down.weight"], W, bits, metric),
    "pivoted_outputs": lambda p, W, bits, metric: round_outputs_pivoted(
        p["down.weight"], p["up.weight"], p["order"], W, bits, metric
    ),
    "pivoted_inputs": lambda p, W, bits, metric: round_inputs_pivoted(
        p["up.weight"], p["down.weight"], p["order"], W, bits, metric
    ),
}
"""By kind of layer: (its tensors, their product, bits, metric) -> its factors."""


def in_few_bits(
    scratch: Scratch,
    workspace: Workspace,
    layers: Sequence[LinearLayer],
    compressed: dict[str, StoredLayer],
    dense: Mapping[str, StoredTensor],
    bits: Mapping[str, int],
) -> tuple[dict[str, StoredLayer], dict[str, Path]]:
    """Low-rank layers with factors rounded to their `bits`, by name, and the folders of the rounded weights of layers that stay dense, by name."""
    outs = workspace.out("capture"), workspace.out("kronecker"), workspace.out("subspace")
    low_rank = {
        f"rounded.{name}": (stored.layer, stored.record["kind"], stored.tensors, bits[name], outs)
        for name, stored in compressed.items()
        if stored.record["rank"] and name in bits
    }
    whole = {
        f"rounded.{layer.name}": (layer, dense[layer.tensor], bits[layer.name], outs)
        for layer in layers
        if layer.name not in compressed and layer.name in bits
    }
    factors = scratch.map("rounding factors", round_low_rank, low_rank)
    weights = scratch.map("rounding weights", round_dense, whole)
    names = {unit: unit.removeprefix("rounded.") for unit in (*low_rank, *whole)}
    rounded = {names[unit]: _rounded_layer(compressed[names[unit]], folder) for unit, folder in factors.items()}
    return compressed | rounded, {names[unit]: folder for unit, folder in weights.items()}


def head_in_few_bits(scratch: Scratch, head: str, dense: Mapping[str, StoredTensor], bits: int) -> dict[str, Path]:
    """The folder of the output embedding's weight in `bits`, by its module's name."""
    units = {f"rounded.{head}": (dense[f"{head}.weight"], bits)}
    (folder,) = scratch.map("rounding the head", round_head, units).values()
    return {head: folder}


def round_head(folder: Path, weight: StoredTensor, bits: int) -> None:
    """Unit: to nearest, since no statistics are taken of the head, which 8 bits leave as good as it was."""
    W = weight.read()
    parts = [packed_tensors(round_nearest(rows.double().numpy(), bits)) for rows in W.split(ROWS)]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in (PACKED, SCALE)}
    stored = {name: StoredTensor.of(tensor) for name, tensor in (tensors | {SHAPE: torch.tensor(W.shape)}).items()}
    write_tensors(folder, dict(sorted(stored.items())))


def round_low_rank(
    folder: Path,
    layer: LinearLayer,
    kind: str,
    tensors: Mapping[str, StoredTensor],
    bits: int,
    stages: tuple[Path, Path, Path],
) -> None:
    """Unit: a low-rank layer's factors in few bits, near the product that they have; what else it stores stays."""
    read = {name: tensor.read() for name, tensor in tensors.items()}
    exact = {
        name: tensor.double().numpy() if tensor.dtype.is_floating_point else tensor.numpy()
        for name, tensor in read.items()
    }
    W, metric = product(kind, exact, layer.outputs, layer.inputs), DampedMetrics(*stages).of(layer)
    found = ROUNDINGS[kind](exact, W, bits, metric)
    kept = {name: tensor for name, tensor in read.items() if name not in ("up.weight", "down.weight")}
    for factor, rounded in zip(FACTORS, (found.up, found.down)):
        kept |= {f"{factor}.{name}": tensor for name, tensor in packed_tensors(rounded).items()}
    rebuilt = exact | {"up.weight": found.up.values, "down.weight": found.down.values}
    _write(folder, kept, metric, product(kind, rebuilt, layer.outputs, layer.inputs), W)


def round_dense(
    folder: Path, layer: LinearLayer, weight: StoredTensor, bits: int, stages: tuple[Path, Path, Path]
) -> None:
    """Unit: the weight of a layer that stays dense, in few bits."""
    W, metric = weight.read().double().numpy(), DampedMetrics(*stages).of(layer)
    rounded: Rounded = round_under(W, bits, metric.inputs, metric.outputs)
    _write(folder, packed_tensors(rounded), metric, rounded.values, W)


def _rounded_layer(stored: StoredLayer, folder: Path) -> StoredLayer:
    """A low-rank layer with its tensors from the unit that rounded it."""
    found = json.loads((folder / "layer.json").read_text(encoding="utf-8"))
    return replace(stored, folder=folder, record=stored.record | found)


def _write(
    folder: Path, tensors: Mapping[str, torch.Tensor], metric: LayerMetric, found: np.ndarray, W: np.ndarray
) -> None:
    stored = {name: StoredTensor.of(tensor) for name, tensor in sorted(tensors.items())}
    write_tensors(folder, stored)
    loss = metric.loss(found - W) / (metric.loss(W) or 1.0)
    (folder / "layer.json").write_text(json.dumps({"rounding_loss": loss}) + "\n", encoding="utf-8")
