"""Which linear layers are compressed, and why each other one stays dense.

A layer is a target if it computes W x + b on text, gets a gradient there, is read by nobody but its own forward pass, and neither
chooses between others nor has so few outputs that a rank means nothing. This is decided once, in stage `prepare`, by trying
(`fisherfold.network.trial`); later stages read layers.json.
"""

import difflib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fisherfold.network.experts import ExpertStack
from fisherfold.network.layers import LinearLayer, describe_layers, input_embedding, linear_modules
from fisherfold.network.trial import Trial, try_layers
from fisherfold.run.errors import InputError

FEW = 16  # outputs or inputs of a gate; of a narrow model, an eighth of its width
UNUSED = "the pass over text never calls them"
NO_GRADIENT = "no gradient comes back to them"
STRANGE = "they compute something else than a matrix product"
READ_ELSEWHERE = "other code reads their weights"
SHARED = "several layers have one weight"
CHOOSES = "they choose (routers)"
NARROW = "they have very few outputs or inputs (gates)"
HEAD = "they give the logits"
GATES = (CHOOSES, NARROW)


@dataclass(frozen=True)
class Targets:
    """Attributes:
    layers: the targets, in model order.
    dense: of every other linear layer, by name, why it stays dense.
    """

    layers: list[LinearLayer]
    dense: dict[str, str]


def find_targets(model: PreTrainedModel, ids: torch.Tensor, gates: Collection[str] = ()) -> Targets:
    """Try every linear layer of a frozen model on text, token ids [B, T].

    Args:
        gates: patterns of routers and gates that are targets all the same.

    Raises:
        InputError: see `try_layers`; or there is no target, or no layer for one of `gates`.
    """
    modules = linear_modules(model)
    strange = [gate for gate in gates if not any(fnmatchcase(name, gate) for name in modules)]
    if strange:
        near = difflib.get_close_matches(strange[0], modules, n=1, cutoff=0.1)
        raise InputError(
            f"prepare.gates: no linear layer of the model is called {strange[0]!r}; one is {''.join(near)!r}."
        )
    trial = try_layers(model, modules, ids)
    reasons = dict(_reasons(model, modules, trial))
    wanted = {name for name, reason in reasons.items() if reason in GATES for gate in gates if fnmatchcase(name, gate)}
    reasons = {name: reason for name, reason in reasons.items() if name not in wanted}
    targets = {name: module for name, module in modules.items() if name not in reasons}
    if not targets:
        raise InputError(f"{type(model).__name__} has no linear layer that can be compressed: {_summary(reasons)}.")
    return Targets(describe_layers(targets, trial.reads), reasons)


def _reasons(model: PreTrainedModel, modules: Mapping[str, Any], trial: Trial) -> Iterator[tuple[str, str]]:
    """(name, why it stays dense) of the layers that do: the first reason that holds."""
    vocabulary, width = input_embedding(model).shape
    few = min(FEW, width // 8)
    routed, shared, choices = set(_routed(model, modules, trial)), _shared(modules), _numbers_of_experts(model)
    for name, module in modules.items():
        sizes = module.weight.shape
        tests = {
            READ_ELSEWHERE: name in trial.read_elsewhere,
            UNUSED: name not in trial.called and name not in routed,
            STRANGE: name in trial.strange,
            NO_GRADIENT: name in trial.called and name not in trial.reached,
            SHARED: name in shared,
            HEAD: vocabulary in sizes and name == trial.last,
            CHOOSES: name in trial.chosen_from or choices.get(name.rpartition(".")[0]) in sizes,
            NARROW: min(sizes) <= few,
        }
        reason = next((reason for reason, holds in tests.items() if holds), None)
        if reason:
            yield name, reason


def _routed(model: nn.Module, modules: Mapping[str, nn.Module], trial: Trial) -> Iterator[str]:
    """Layers of experts that no token of the trial was sent to: inside an idle item of a list of which another item ran."""
    for name in modules.keys() - trial.called.keys():
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            owner = ".".join(parts[: end - 1]) if end > 1 else ""
            if ".".join(parts[:end]) in trial.running:
                break
            if isinstance(model.get_submodule(owner), nn.ModuleList | nn.ModuleDict) and any(
                f"{owner}.{item}" in trial.running for item, _ in model.get_submodule(owner).named_children()
            ):
                yield name
                break


def _shared(modules: Mapping[str, nn.Module]) -> set[str]:
    """Layers whose weight is another's too."""
    uses = Counter(id(module.weight) for module in modules.values())
    return {name for name, module in modules.items() if uses[id(module.weight)] > 1}


def _numbers_of_experts(model: nn.Module) -> dict[str, int]:
    """By name of the module that holds experts, how many: items of a list of one kind, or matrices [E, ., .] of one parameter."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        owner = name.rpartition(".")[0]
        if isinstance(module, nn.ModuleList) and len({type(item) for item in module}) == 1 < len(module):
            found[owner] = len(module)
        if isinstance(module, ExpertStack):
            found[owner.rpartition(".")[0]] = len(module)
        stacks = {len(matrices) for matrices in module.parameters(recurse=False) if matrices.dim() == 3}
        if len(stacks) == 1 and not isinstance(module, nn.modules.conv._ConvNd):
            found[owner] = stacks.pop()
    return found


def _summary(reasons: Mapping[str, str]) -> str:
    """How many layers stay dense for which reason."""
    counts = Counter(reasons.values())
    return "; ".join(f"of {count}, {reason}" for reason, count in counts.most_common()) or "there is none"
