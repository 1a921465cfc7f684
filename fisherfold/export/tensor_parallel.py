"""How the factors of a low-rank layer are split over devices that compute one layer together (tensor parallelism).

The dense model's plan says of a linear layer whether its outputs are split (`colwise`: each device has some heads) or its inputs
(`rowwise`: each has what it made before, and the results are added). For y = up(down(x)) the same holds for the half at that end:

    colwise:  down on every device, up split by outputs          rowwise:  down split by inputs and added, up on every device

A pivoted layer's outputs or inputs are in an order that no such split respects. A layer of rank 0 gives as many zeros on every device: right where
the dense layer's results are added, too many where each device has some of its outputs.
"""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

HALVES = {
    "colwise": {"down": "replicate", "up": "colwise"},
    "rowwise": {"down": "rowwise", "up": "replicate"},
}
SPLIT_KINDS: dict[str, tuple[str, ...]] = {
    "factors": ("down", "up"),
    "shared_factors": ("down", "up"),
    "shared_member": ("up",),
}
"""Kinds of layers that can be split, and their halves."""
SPLITTABLE = {"colwise": SPLIT_KINDS, "rowwise": SPLIT_KINDS | {"zero": ()}}
"""The same, by what the dense model's plan says of the layer."""


def split_plan(model: PreTrainedModel, layers: Mapping[str, dict[str, Any]]) -> dict[str, str] | None:
    """The base model's plan with factors in it, as transformers and vLLM read it: name of a module (* for a number) -> style.

    Args:
        model: the dense model.
        layers: what config.json says of the low-rank layers, by name.

    Returns:
        None if the dense model has no plan, or a layer that it names cannot be split.
    """
    dense = model.config.base_model_tp_plan
    prefix = f"{model.base_model_prefix}."
    kinds: dict[str, set[str]] = {}
    for name, layer in layers.items():
        kinds.setdefault(re.sub(r"\b\d+\b", "*", name.removeprefix(prefix)), set()).add(layer["kind"])
    split = {name: found for name, found in kinds.items() if name in (dense or {})}
    if not dense or any(found - SPLITTABLE.get(dense[name], {}).keys() for name, found in split.items()):
        return None
    factors = {
        f"{name}.{half}": HALVES[dense[name]][half]
        for name, found in split.items()
        for half in sorted({half for kind in found for half in SPLITTABLE[dense[name]][kind]})
    }
    return factors | {
        name: style for name, style in dense.items() if name not in split or _some_dense(model, name, layers)
    }


def _some_dense(model: PreTrainedModel, pattern: str, layers: Mapping[str, dict[str, Any]]) -> bool:
    """Whether a module that the pattern names is not among the low-rank layers."""
    wanted = re.compile(re.escape(f"{model.base_model_prefix}.{pattern}").replace(r"\*", r"\d+"))
    return any(wanted.fullmatch(name) and name not in layers for name, _ in model.named_modules())
