"""Experts as the checkpoint stores them: of every stack with a factorized expert, factors [E_c, ., .] of each class of experts.

A class is what has one kind and one rank (see ``fisherfold.allocators.expert_classes``); experts that stay dense are one, too. Stacks none of
whose experts is factorized stay as they are, and so do biases.

Shapes: E experts of n outputs and m inputs; E_c of class c.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from fisherfold.allocators.cost import DENSE
from fisherfold.network.experts import expert_modules
from fisherfold.network.layers import LinearLayer
from fisherfold.run.checkpoint import StoredTensor
from fisherfold.runtime.modeling_fisherfold_experts import SHARED

NAMES = {
    "up.weight": "up",
    "down.weight": "down",
    "order": "order",
    "down.rest.weight": "down",
    "down.order": "order",
}
"""Of a factor in a class, by that of an expert alone. What the class shares lies with the first."""


class Factors(Protocol):
    """A factorized layer as stage `factorize` keeps it: its record (kind, rank) and tensors; see there."""

    @property
    def layer(self) -> LinearLayer: ...

    @property
    def record(self) -> dict[str, Any]: ...

    @property
    def factors(self) -> dict[str, StoredTensor]: ...

    def product(self) -> np.ndarray: ...

    def moved(self, folder: Path) -> "Factors": ...


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
        sources = {found.layer.name: found.record for found in self.found.values()}
        return [(sources.get(record.get("source", ""), record)["kind"], record["rank"]) for record in records]

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

    def moved(self, folder: Path) -> "Stack":
        """The same with experts read from below `folder`."""
        return replace(self, found={number: each.moved(folder) for number, each in self.found.items()})

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
            NAMES[name]: tensor
            if NAMES[name] in SHARED.get(each[0], ())
            else StoredTensor((len(parts), *tensor.shape), tensor.dtype, partial(_stacked, parts, name))
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
        """What each expert has of the tensors of a checkpoint, by name; what a class shares has its first."""
        members = {c: [layer.name for layer, kind in zip(self.layers, self.kinds) if kind == each]
                   for c, each in enumerate(self.classes)}  # fmt: skip
        found = dict.fromkeys((layer.name for layer in self.layers), 0)
        for name, tensor in saved.items():
            if name.startswith(self.prefix):
                number, _, own = name.removeprefix(self.prefix).partition(".")
                shared = own in SHARED.get(self.classes[int(number)][0], ())
                for member in members[int(number)][: 1 if shared else None]:
                    found[member] += tensor.numbers if shared else tensor.numbers // tensor.shape[0]
        return found


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


def active_parameters(
    size: Mapping[str, int],
    plan: Mapping[str, Mapping[str, Any]],
    routed: Mapping[str, Mapping[str, float]],
) -> dict[str, int]:
    """What a token meets of both models, on average over the calibration text: of an expert the share of tokens that come to it.

    Embeddings, and experts that are no layers, count in full.

    Args:
        size: parameters of both models.
        plan: rows of ranks.parquet by module.
        routed: of both models, the share of the tokens that come to each expert.
    """
    columns = {"dense": "dense_parameters", "compressed": "stored_parameters"}
    members = Counter(row["site"] for row in plan.values())

    def own(row: Mapping[str, Any], column: str) -> int:
        """Without a factor that all experts share, which every token meets."""
        shares = column == "stored_parameters" and members[row["site"]] > 1 and row["storage"] != DENSE
        return row["rank"] * row["n"] if shares else row[column]

    idle = {
        model: sum((1 - share) * own(plan[name], column) for name, share in routed[model].items())
        for model, column in columns.items()
    }
    return {
        f"active_parameters_{model}": round(size[f"model_parameters_{model}"] - numbers)
        for model, numbers in idle.items()
    }


def routed_shares(ranks: Path) -> dict[str, float]:
    """The share of the calibration tokens that came to each expert, from the published output of stage `ranks`."""
    return dict(json.loads((ranks / "budget.json").read_text(encoding="utf-8"))["routed"])


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
