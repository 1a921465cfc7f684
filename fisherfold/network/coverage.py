"""How much of a model its targets are, and what stays dense: in figures for the report, in lines for the reader."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from fisherfold.network.layers import kind_of
from fisherfold.network.targets import Targets
from fisherfold.run.progress import millions


def measure_coverage(model: PreTrainedModel, targets: Targets, unknown: Collection[str] = ()) -> dict[str, Any]:
    """Parameters by what becomes of them; names with `*` for the number of a block or an expert.

        {"model_parameters": …, "targeted_parameters": …, "targeted_layers": …,
         "dense": [{"reason": …, "layers": …, "parameters": …, "names": […]}, …],
         "embeddings": …, "stacked_matrices": …, "other": …}

    `stacked_matrices` are parameters of three dimensions, as experts have, that are no layers; `unknown_stacks` names those of a layout
    that is not known (`unknown`), if there are any; `other` is norms, biases, convolutions.
    """
    linear = {id(model.get_submodule(name).weight): name for name in targets.dense}
    targeted = {id(model.get_submodule(layer.name).weight) for layer in targets.layers}
    ends: tuple[Any, ...] = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(module.weight) for module in ends if module is not None}
    parts: dict[str, int] = defaultdict(int)
    for matrices in model.parameters():
        parts[_part(matrices, linear, targeted, embeddings)] += matrices.numel()
    return {
        "model_parameters": sum(parts.values()),
        "targeted_parameters": sum(layer.dense_numbers for layer in targets.layers),
        "targeted_layers": len(targets.layers),
        "dense": _by_reason(model, targets.dense),
        **{part: parts[part] for part in ("embeddings", "stacked_matrices", "other")},
        **({"unknown_stacks": sorted({kind_of(name) for name in unknown})} if unknown else {}),
    }


def _part(matrices: nn.Parameter, linear: Mapping[int, str], targeted: set[int], embeddings: set[int]) -> str:
    if id(matrices) in targeted or id(matrices) in linear:
        return "linear"
    if id(matrices) in embeddings:
        return "embeddings"
    return "stacked_matrices" if matrices.dim() == 3 and matrices.shape[-1] > 8 else "other"


def _by_reason(model: nn.Module, dense: Mapping[str, str]) -> list[dict[str, Any]]:
    """The dense linear layers of each reason, the reason with most parameters first."""

    def weight(name: str) -> torch.Tensor:
        return cast(torch.Tensor, model.get_submodule(name).weight)

    found: dict[str, list[str]] = defaultdict(list)
    for name, reason in dense.items():
        found[reason].append(name)
    rows: list[dict[str, Any]] = [
        {
            "reason": reason,
            "layers": len(names),
            "parameters": sum({id(w): w.numel() for w in map(weight, names)}.values()),
            "names": sorted({kind_of(name) for name in names}),
        }
        for reason, names in found.items()
    ]
    return sorted(rows, key=lambda row: (-row["parameters"], row["reason"]))


def describe_coverage(coverage: Mapping[str, Any]) -> Iterator[str]:
    """The same in lines."""
    whole, targeted = coverage["model_parameters"], coverage["targeted_parameters"]
    yield (
        f"{coverage['targeted_layers']} linear layers will be compressed: {millions(targeted)} of {millions(whole)} parameters "
        f"({targeted / whole:.0%})"
    )
    for row in coverage["dense"]:
        yield (
            f"{row['layers']} linear layers stay dense, for {row['reason']}: {_some(row['names'])} "
            f"({millions(row['parameters'])} parameters)"
        )
    if coverage["stacked_matrices"]:
        yield f"{millions(coverage['stacked_matrices'])} parameters are matrices of experts in one tensor, which stay dense"
    if coverage.get("unknown_stacks"):
        yield f"of a layout that is not known here: {_some(coverage['unknown_stacks'])}"


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
