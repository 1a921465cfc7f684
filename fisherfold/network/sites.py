"""Sites: what has one rank. A site is one layer, or all layers that read one input and share the right factor of their products, or all
experts of a stack that share it.

A site of layers c is the stacked layer [Σ n_c, m]: W_c ≈ left_c right with left_c [n_c, r] for each layer and one right [r, m],
r = min(Σ n_c, m). Which of these a subspace has, its subspace.json says ("shared", and "shared" of "experts").
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fisherfold.network.layers import LinearLayer, read_layers
from fisherfold.run.errors import CorruptArtifact
from fisherfold.run.store import read_array

BUNDLE = 32  # experts of a unit of work


@dataclass(frozen=True)
class Site:
    """One layer, or several with one right factor.

    Attributes:
        name: of the first layer.
        layers: in model order.
    """

    name: str
    layers: tuple[LinearLayer, ...]

    @property
    def outputs(self) -> int:
        """Σ n_c."""
        return sum(layer.outputs for layer in self.layers)

    @property
    def inputs(self) -> int:
        """m."""
        return self.layers[0].inputs

    @property
    def full_rank(self) -> int:
        """The rank at which nothing is cut."""
        return min(self.outputs, self.inputs)

    @property
    def dense_numbers(self) -> int:
        """Numbers that the site's layers store dense."""
        return self.outputs * self.inputs

    def read_basis(self, bases: Path, rank: int | None = None) -> tuple[list[torch.Tensor], torch.Tensor]:
        """left_c [n_c, r] of every layer, and right [r, m]; or their first `rank` components."""
        lefts = [read_array(bases, f"{layer.name}/left")[:, :rank] for layer in self.layers]
        return lefts, read_array(bases, f"{self.name}/right", slice(0, rank))


def find_sites(layers: Sequence[LinearLayer], shared: bool, experts: bool = False) -> list[Site]:
    """The sites of layers in model order: layers of one group if factors are shared, experts of one stack if theirs are, else every layer alone."""
    members: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        alone = layer.group if shared else layer.name
        members.setdefault(layer.stack if layer.stack and experts else alone, []).append(layer)
    return [Site(found[0].name, tuple(found)) for found in members.values()]


def bundles(layers: Iterable[LinearLayer]) -> dict[str, list[LinearLayer]]:
    """Layers by unit of work, each named after its first: every layer alone, experts of one stack BUNDLE at a time."""
    found: dict[str, list[LinearLayer]] = {}
    open_bundles: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        bundle = open_bundles.get(layer.stack) if layer.stack else None
        if bundle is None or len(bundle) == BUNDLE:
            bundle = found[layer.name] = []
            if layer.stack:
                open_bundles[layer.stack] = bundle
        bundle.append(layer)
    return found


def read_sites(subspace: Path) -> list[Site]:
    """The sites of the published output of stage `subspace`, in model order.

    Raises:
        CorruptArtifact: it is not whole.
    """
    facts = read_facts(subspace)
    return find_sites(read_layers(subspace), facts.get("shared", False), facts.get("experts", {}).get("shared", False))


def read_facts(subspace: Path) -> dict[str, Any]:
    """subspace.json.

    Raises:
        CorruptArtifact: it is missing or not readable.
    """
    path = subspace / "subspace.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptArtifact(
            f"{path} is not readable ({error}). Write it again with `dvc repro --force --single-item subspace`."
        ) from None
