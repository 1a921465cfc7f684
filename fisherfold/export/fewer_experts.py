"""A mixture with whole experts dropped: the same architecture with fewer of them, and the rows of the others in its tensors.

What a tensor holds of each expert (stacks, biases, the router's rows) is told from its shape: it is what becomes smaller when the configuration
says that there are fewer experts.
"""

import copy
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fisherfold.export.architecture import DenseArchitecture
from fisherfold.network.experts import expert_modules
from fisherfold.network.layers import LinearLayer
from fisherfold.run.checkpoint import StoredTensor
from fisherfold.run.errors import InputError
from fisherfold.run.params import FactorizeParams, HealParams, RefineParams
from fisherfold.run.progress import announce

NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names that configurations have for the number of experts."""


def without_experts(
    architecture: DenseArchitecture, dense: Mapping[str, StoredTensor], dropped: Mapping[str, Sequence[int]]
) -> tuple[DenseArchitecture, dict[str, StoredTensor]]:
    """The architecture and the tensors without the experts that go, by module of experts; as they are, if none goes.

    Raises:
        InputError: the configuration does not say how many experts there are, or a tensor does not follow it.
    """
    if not dropped:
        return architecture, dict(dense)
    model = architecture.empty_model()
    counts = {
        name: len(module.get_parameter(layout.stacks(module)[0])) for name, module, layout in expert_modules(model)
    }
    kept = {name: [e for e in range(count) if e not in set(dropped.get(name, ()))] for name, count in counts.items()}
    fewer = replace(architecture, config=_fewer(architecture.config, counts, kept))
    shapes = {name: tuple(tensor.shape) for name, tensor in fewer.empty_model().state_dict().items()}
    return fewer, {name: _kept(name, tensor, shapes.get(name, tensor.shape), kept) for name, tensor in dense.items()}


def _fewer(config: Mapping[str, Any], counts: Mapping[str, int], kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The configuration with the number of experts that are left, in it or in its text part."""
    changed = copy.deepcopy(dict(config))
    parts = [changed, changed.get("text_config") or {}]
    found = [(part, name) for part in parts for name in NUMBERS if part.get(name) in counts.values()]
    left = {len(own) for own in kept.values()}
    if found and len(left) == 1:
        for part, name in found:
            part[name] = min(left)
        return changed
    raise InputError(
        f"Stage 'factorize': experts of a {config.get('model_type')!r} model cannot be dropped: its configuration has no one number of experts "
        f"({', '.join(NUMBERS)}). Use ranks.allocator = 'fisher'."
    )


def as_they_are(params: FactorizeParams) -> FactorizeParams:
    """The parameters without training and rounding, which change layers that are left whole; says so where they were asked for."""
    if params.bits or params.refine.passes or params.heal.passes:
        announce(
            "factorize", "neither trained nor rounded: ranks.allocator = drop_experts leaves whole experts as they are"
        )
    return params.model_copy(update={"bits": None, "refine": RefineParams(passes=0), "heal": HealParams(passes=0)})


def expert_layers(layers: Iterable[LinearLayer], dropped: Mapping[str, Sequence[int]]) -> set[str]:
    """Names of the layers that go with the experts."""
    found = ((layer, dropped.get(layer.stack.rpartition(".")[0], ())) for layer in layers if layer.stack)
    return {layer.name for layer, experts in found if layer.expert in experts}


def spread_shares(
    routed: Mapping[str, float], layers: Iterable[LinearLayer], gone: Collection[str]
) -> dict[str, float]:
    """Shares of the tokens that come to each expert when those of the experts that go are spread over the others of its stack."""
    stacks = {layer.name: layer.stack for layer in layers if layer.stack}
    whole: dict[str | None, float] = defaultdict(float)
    left: dict[str | None, float] = defaultdict(float)
    for name, share in routed.items():
        whole[stacks[name]] += share
        left[stacks[name]] += 0.0 if name in gone else share
    return {name: min(1.0, share * whole[stacks[name]] / (left[stacks[name]] or 1.0)) for name, share in routed.items()}


def _kept(name: str, tensor: StoredTensor, shape: Sequence[int], kept: Mapping[str, Sequence[int]]) -> StoredTensor:
    """The tensor in its new shape: what it holds of the experts that are left."""
    smaller = [axis for axis, sizes in enumerate(zip(tensor.shape, shape)) if len(set(sizes)) > 1]
    if not smaller and len(tensor.shape) == len(shape):
        return tensor
    numbers = kept[max(kept, key=lambda module: _common(module, name))]
    wanted = list(tensor.shape)
    if len(smaller) == 1:
        wanted[smaller[0]] = len(numbers)
    if len(smaller) != 1 or wanted != list(shape):
        raise InputError(f"Stage 'factorize': {name!r} does not hold one part an expert, so none can be dropped.")
    return StoredTensor(tuple(shape), tensor.dtype, partial(_select, tensor, smaller[0], numbers))


def _select(tensor: StoredTensor, axis: int, numbers: Sequence[int]) -> torch.Tensor:
    return tensor.read().index_select(axis, torch.tensor(numbers))


def _common(one: str, other: str) -> int:
    """How many parts two names begin with."""
    pairs = list(zip(one.split("."), other.split(".")))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
