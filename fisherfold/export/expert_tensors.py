"""Experts as the checkpoint stores them: of every stack with a factorized expert, factors [E_c, ., .] of each class of experts.

A class is what has one kind and one rank (see ``fisherfold.allocators.expert_classes``); experts that stay dense are one, too. Stacks none of
whose experts is factorized stay as they are, and so do biases.

Shapes: E experts of n outputs and m inputs; E_c of class c.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from fisherfold.network.experts import expert_modules
from fisherfold.network.layers import LinearLayer
from fisherfold.run.checkpoint import StoredTensor

NAMES = {"up.weight": "up", "down.weight": "down", "order": "order"}
"""Of a factor in a class, by that of an expert alone."""


class Factors(Protocol):
    """A factorized layer as stage `factorize` keeps it: its record (kind, rank) and tensors; see there."""

    layer: LinearLayer
    record: dict[str, Any]

    @property
    def factors(self) -> dict[str, StoredTensor]: ...

    def product(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Stack:
    """One stack with factorized experts.

    Attributes:
        name: of the tensor of the dense model.
        layers: its experts, by number.
        found: those that are factorized, by number.
    """

    name: str
    layers: Sequence[LinearLayer]
    found: Mapping[int, Factors]

    @property
    def prefix(self) -> str:
        """Of the names of its tensors in the checkpoint; the dense model's name is free for an empty one."""
        return f"{self.name}_classes."

    @property
    def kinds(self) -> list[tuple[str, int]]:
        """Kind and rank of every expert."""
        full = min(self.layers[0].outputs, self.layers[0].inputs)
        dense: dict[str, Any] = {"kind": "dense", "rank": full}
        records = [self.found[e].record if e in self.found else dense for e in self._numbers]
        return [(record["kind"], record["rank"]) for record in records]

    @property
    def classes(self) -> list[tuple[str, int]]:
        """The different ones, sorted."""
        return sorted(set(self.kinds))

    @property
    def _numbers(self) -> range:
        return range(len(self.layers))

    def record(self) -> dict[str, Any]:
        """What config.json says of it."""
        place = {each: c for c, each in enumerate(self.classes)}
        return {
            "classes": [{"kind": kind, "rank": rank} for kind, rank in self.classes],
            "of": [place[each] for each in self.kinds],
        }

    def tensors(self, dense: StoredTensor, dtype: torch.dtype) -> dict[str, StoredTensor]:
        """Those of all classes, instead of the `dense` one."""
        return {
            f"{self.prefix}{c}.{name}": tensor
            for c, each in enumerate(self.classes)
            for name, tensor in self._of_class(each, dense, dtype).items()
        }

    def _of_class(self, each: tuple[str, int], dense: StoredTensor, dtype: torch.dtype) -> dict[str, StoredTensor]:
        members = [number for number, kind in zip(self._numbers, self.kinds) if kind == each]
        if each[0] == "dense":
            shape = len(members), self.layers[0].outputs, self.layers[0].inputs
            return {"weight": StoredTensor(shape, dtype, partial(self._dense, members, dense, dtype))}
        parts = [{name: tensor.cast(dtype) for name, tensor in self.found[e].factors.items()} for e in members]
        return {
            NAMES[name]: StoredTensor((len(parts), *tensor.shape), tensor.dtype, partial(_stacked, parts, name))
            for name, tensor in parts[0].items()
        }

    def _dense(self, members: Sequence[int], dense: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
        matrices = dense.read()[list(members)].to(dtype)
        return (matrices.mT if self.layers[0].transposed else matrices).contiguous()

    def multiplied_out(self, dense: StoredTensor, dtype: torch.dtype) -> StoredTensor:
        """The dense stack with every factorized expert's product in its place."""

        def read() -> torch.Tensor:
            whole = dense.read().to(dtype, copy=True)
            for number, found in self.found.items():
                product = torch.from_numpy(found.product()).to(dtype)
                whole[number] = product.T if self.layers[0].transposed else product
            return whole

        return StoredTensor(dense.shape, dtype, read)

    def stored_numbers(self, saved: Mapping[str, StoredTensor]) -> dict[str, int]:
        """What each expert has of the tensors of a checkpoint, by name."""
        place = {each: c for c, each in enumerate(self.classes)}
        totals = {c: 0 for c in place.values()}
        for name, tensor in saved.items():
            if name.startswith(self.prefix):
                totals[int(name.removeprefix(self.prefix).partition(".")[0])] += tensor.numbers // tensor.shape[0]
        return {layer.name: totals[place[kind]] for layer, kind in zip(self.layers, self.kinds)}


def _stacked(parts: Sequence[Mapping[str, StoredTensor]], name: str) -> torch.Tensor:
    return torch.stack([part[name].read() for part in parts])


def find_stacks(layers: Iterable[LinearLayer], compressed: Mapping[str, Factors]) -> list[Stack]:
    """The stacks with factorized experts."""
    members: dict[str, dict[int, LinearLayer]] = {}
    for layer in layers:
        if layer.stack:
            members.setdefault(layer.stack, {})[layer.expert] = layer
    stacks = [
        Stack(
            name,
            [own[e] for e in sorted(own)],
            {e: compressed[layer.name] for e, layer in own.items() if layer.name in compressed},
        )
        for name, own in members.items()
    ]
    return [stack for stack in stacks if stack.found]


def stored_numbers(
    layers: Iterable[LinearLayer], stacks: Iterable[Stack], saved: Mapping[str, StoredTensor]
) -> dict[str, int]:
    """Numbers that each expert among `layers` stores in a checkpoint, by name; in stacks that stay as they were, its matrix."""
    found = {name: numbers for stack in stacks for name, numbers in stack.stored_numbers(saved).items()}
    return {layer.name: layer.dense_numbers for layer in layers if layer.stack} | found


def active_parameters(size: Mapping[str, int], plan: Mapping[str, Mapping[str, Any]], ranks: Path) -> dict[str, int]:
    """What a token meets of both models, on average over the calibration text: of an expert the share of tokens that come to it.

    Embeddings, and experts that are no layers, count in full.

    Args:
        size: parameters of both models.
        plan: rows of ranks.parquet by module.
        ranks: the published output of stage `ranks`.
    """
    routed = json.loads((ranks / "budget.json").read_text(encoding="utf-8"))["routed"]
    columns = {"dense": "dense_parameters", "compressed": "stored_parameters"}
    idle = {
        model: sum((1 - share) * plan[name][column] for name, share in routed.items())
        for model, column in columns.items()
    }
    return {
        f"active_parameters_{model}": round(size[f"model_parameters_{model}"] - numbers)
        for model, numbers in idle.items()
    }


def expert_records(model: PreTrainedModel, stacks: Iterable[Stack]) -> dict[str, dict[str, Any]]:
    """What config.json says of the modules of experts: {module: {"layout": …, "stacks": {name: `Stack.record`}}}.

    Args:
        model: the dense model; it may be on the meta device.
    """
    layouts = {name: layout for name, _, layout in expert_modules(model)}
    found: dict[str, dict[str, Any]] = {}
    for stack in stacks:
        module, _, name = stack.name.rpartition(".")
        found.setdefault(module, {"layout": layouts[module].name, "stacks": {}})["stacks"][name] = stack.record()
    return found
