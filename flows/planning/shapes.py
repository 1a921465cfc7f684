"""The shapes of a model without its weights: from a configuration, on fake tensors, so a model of any size takes no memory."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fisherfold.network.blocks import list_blocks
from fisherfold.network.experts import ExpertLinear, expert_modules, experts_a_token, unfold_experts
from fisherfold.network.layers import LinearLayer, describe_layers, find_layers, linear_modules, read_layers
from fisherfold.network.shortcuts import attempt
from fisherfold.run.errors import FisherfoldError, InputError, first_line
from fisherfold.run.workspace import Workspace
from fisherfold.run.yaml_text import parse_yaml


@dataclass(frozen=True)
class ModelShapes:
    """What a plan needs to know of a model.

    Attributes:
        name: as asked for.
        layers: the targeted linear layers.
        parameters: of the whole model, tied ones once.
        vocabulary, hidden: V and the width h of the output embedding [V, h].
        blocks: decoder blocks.
        attention_width: heads times their size.
        chosen: by stack of experts, how many a token goes to.
        block_sizes: parameters of every decoder block, by name.
    """

    name: str
    layers: tuple[LinearLayer, ...]
    parameters: int
    vocabulary: int
    hidden: int
    blocks: int
    attention_width: int
    chosen: Mapping[str, int] = field(default_factory=dict)
    block_sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def targeted(self) -> int:
        """Σ n m over the targeted layers."""
        return sum(layer.dense_numbers for layer in self.layers)

    def seen(self, layer: LinearLayer) -> float:
        """The share of the tokens that come to a layer: k / E for each of E experts, if all are used alike."""
        return min(1.0, self.chosen[layer.stack] / self.experts[layer.stack]) if layer.stack else 1.0

    @cached_property
    def experts(self) -> Counter[str]:
        """E by stack."""
        return Counter(layer.stack for layer in self.layers if layer.stack)

    @property
    def active(self) -> int:
        """Parameters that a token meets."""
        return self.parameters - round(sum((1 - self.seen(layer)) * layer.dense_numbers for layer in self.layers))


def find_shapes(workspace: Workspace, name: str) -> ModelShapes:
    """The shapes that a name means: a recipe in data/shapes, a folder with a config.json, the prepared model, a hub name.

    Raises:
        InputError: it is none of these, or its architecture has no causal language model in transformers.
    """
    try:
        return shapes_of(name, find_config(workspace, name), _targets(workspace, name))
    except Exception as error:  # a configuration that is odd or damaged makes its class raise almost anything
        if isinstance(error, FisherfoldError | MemoryError):
            raise
        known = ", ".join(sorted(path.stem for path in workspace.recipes("shapes").glob("*.yaml")))
        raise InputError(
            f"--model {name!r} is none of data/shapes ({known}), no folder with a config.json and no hub name that can be read here "
            f"({first_line(error)})."
        ) from None


def find_config(workspace: Workspace, name: str) -> PreTrainedConfig:
    """The configuration of the model that a name means; see `find_shapes`."""
    recipe = workspace.recipes("shapes") / f"{Path(name).name}.yaml"
    if recipe.stem == name and recipe.exists():
        return AutoConfig.for_model(**parse_yaml(recipe))
    folder = workspace.model if _prepared(workspace) == name else workspace.root / Path(name).expanduser()
    if not folder.is_dir():
        folder = Path(name).expanduser().absolute()  # outside a project there is none that paths could be relative to
    if not folder.is_dir() and "/" not in name:
        raise ValueError("a hub name is OWNER/NAME")
    return AutoConfig.from_pretrained(folder if folder.is_dir() else name)


def _prepared(workspace: Workspace) -> str | None:
    """The name of the model that stage `prepare` has written, if it has."""
    try:
        return json.loads((workspace.out("prepare") / "prepare.json").read_text(encoding="utf-8"))["model"]["name"]
    except (OSError, ValueError, KeyError):
        return None


def _targets(workspace: Workspace, name: str) -> Sequence[LinearLayer] | None:
    """What stage `prepare` will compress of its model; None of another one."""
    return read_layers(workspace.out("prepare")) if _prepared(workspace) == name else None


def shapes_of(name: str, config: PreTrainedConfig, targets: Sequence[LinearLayer] | None = None) -> ModelShapes:
    """The shapes of the model that a configuration describes; without `targets` every linear layer is taken for one."""
    with FakeTensorMode(), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        blocks = {name: sum(p.numel() for p in block.parameters()) for name, block in list_blocks(model).items()}
        layers = tuple(_find_layers(model) if targets is None else targets)
        chosen = {layer.stack: experts_a_token(config.get_text_config()) for layer in layers if layer.stack}
        vocabulary, hidden = (model.get_output_embeddings() or model.get_input_embeddings()).weight.shape
    if not layers:
        raise InputError(f"Model {name!r} has no linear layers besides its output embedding: nothing to compress.")
    return ModelShapes(
        name=name,
        layers=layers,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=vocabulary,
        hidden=hidden,
        blocks=len(blocks) or 1,
        attention_width=_attention_width(config.get_text_config()),
        chosen=chosen,
        block_sizes=blocks,
    )


def _apart(model: PreTrainedModel) -> list[LinearLayer]:
    """The linear layers of a model that cannot run on fake tensors: who shares an input is not known."""
    modules = linear_modules(model)
    return describe_layers(modules, dict.fromkeys(modules, ()))


def _attention_width(config: PreTrainedConfig) -> int:
    """Heads times their size; 0 of a model without attention."""
    heads = getattr(config, "num_attention_heads", None) or 0
    heads = max(heads) if isinstance(heads, list | tuple) else heads
    size = getattr(config, "head_dim", None)
    return heads * size if isinstance(size, int) else getattr(config, "hidden_size", 0) if heads else 0


def _find_layers(model: PreTrainedModel) -> Iterator[LinearLayer]:
    """The linear layers in model order, experts among them, of which none runs: on fake tensors no router can choose."""
    for _, module, _ in expert_modules(model):
        module.forward = lambda hidden_states, *_: torch.zeros_like(hidden_states)
    found = {layer.name: layer for layer in attempt(lambda: find_layers(model)) or _apart(model)}
    unfold_experts(model)
    modules = linear_modules(model)
    experts = {name: module for name, module in modules.items() if isinstance(module, ExpertLinear)}
    found |= {layer.name: layer for layer in describe_layers(experts, dict.fromkeys(experts, ()))}
    yield from (found[name] for name in modules)
