"""A layer as stage `factorize` keeps it on its way into the checkpoint: a folder of tensors and a record."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fisherfold.export.expert_tensors import Stack, find_stacks
from fisherfold.export.gauges import product, right_factor
from fisherfold.export.packed import matrices
from fisherfold.export.refined_blocks import LowRank
from fisherfold.network.layers import LinearLayer
from fisherfold.network.sites import Site
from fisherfold.run.checkpoint import StoredTensor, read_tensors

OWN_BIAS = frozenset({"pivoted_outputs", "zero"})  # kinds whose bias is not that of `up`


@dataclass(frozen=True)
class StoredLayer:
    """A layer that is no longer dense: where its tensors are, and its record (kind, rank, source, errors).

    Attributes:
        source: the layer that holds its right factor, if another does.
    """

    layer: LinearLayer
    folder: Path
    record: dict[str, Any]
    source: "StoredLayer | None" = None

    @property
    def entry(self) -> dict[str, Any]:
        """What the checkpoint's configuration says of it."""
        return {key: self.record[key] for key in ("kind", "rank", "source") if key in self.record}

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors of the layer in the checkpoint."""
        return read_tensors(self.folder)

    @property
    def factors(self) -> dict[str, StoredTensor]:
        """Its tensors but for the bias, which a refined layer has among them."""
        return {name: tensor for name, tensor in self.tensors.items() if name not in ("bias", "up.bias")}

    def moved(self, folder: Path) -> "StoredLayer":
        """The same with tensors read from below `folder`, by the layer's name; those of its source, too."""
        return replace(self, folder=folder / self.layer.name, source=self.source and self.source.moved(folder))

    def product(self) -> np.ndarray:
        """Its weight multiplied out, float64 [n, m]."""
        read = {name: tensor.read() for name, tensor in self.factors.items()}
        parameters = {name: exact(tensor) for name, tensor in matrices(read).items()}
        if self.source:
            shared = right_factor(self.source.tensors)
            parameters |= {name: exact(tensor.read()) for name, tensor in shared.items()}
        return product(self.record["kind"], parameters, self.layer.outputs, self.layer.inputs)


def stored_site(site: Site, folder: Path) -> dict[str, StoredLayer]:
    """The layers of a site by name."""
    found: dict[str, StoredLayer] = {}
    for layer in site.layers:
        record = json.loads((folder / layer.name / "layer.json").read_text(encoding="utf-8"))
        found[layer.name] = StoredLayer(layer, folder / layer.name, record, found.get(record.get("source")))
    return found


def as_trained(
    layers: Iterable[LinearLayer], compressed: Mapping[str, StoredLayer]
) -> tuple[dict[str, LowRank], list[Stack]]:
    """The same for what trains them: layers that are trained alone, by name, and stacks of experts. Both hold the factors as they are now."""
    alone = {
        name: LowRank(
            stored.folder,
            stored.entry,
            bias_place(stored) if stored.layer.bias else None,
        )
        for name, stored in compressed.items()
        if not stored.layer.stack
    }
    return alone, find_stacks(layers, compressed)


def bias_place(stored: StoredLayer) -> str:
    """Where the layer keeps its bias in the checkpoint."""
    return "bias" if stored.record["kind"] in OWN_BIAS else "up.bias"


def replaced(
    compressed: Mapping[str, StoredLayer],
    folders: Mapping[str, Path],
    dense: Mapping[str, StoredTensor],
    dtype: torch.dtype,
) -> tuple[dict[str, StoredLayer], dict[str, StoredTensor]]:
    """Layers read from other folders, and the dense tensors with the biases that lie there."""
    layers, tensors = dict(compressed), dict(dense)
    for name, folder in folders.items():
        layers[name] = replace(compressed[name], folder=folder)
        if layers[name].layer.bias:
            tensors[f"{name}.bias"] = layers[name].tensors[bias_place(layers[name])].cast(dtype)
    for name, stored in layers.items():
        if "source" in stored.record:
            layers[name] = replace(stored, source=layers[stored.record["source"]])
    return layers, tensors


def exact(tensor: torch.Tensor) -> np.ndarray:
    """Its values in float64; integers as they are."""
    return (tensor.double() if tensor.dtype.is_floating_point else tensor).numpy()
