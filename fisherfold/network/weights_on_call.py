"""A model whose weights are in memory only while what they belong to runs: every decoder block, and the embeddings at both ends, read theirs from the
disk when they are called and let them go when they have answered. Its own code calls them, so it does all that a model in memory does, with the same bits:
passes over text, answers with a cache, gradients, hooks on its layers.

For a backward pass autograd keeps of a weight where it is stored, and reads it once more. What it keeps of activations is no less than with the whole model.

What has no weights stands in: a tensor of the right shape, dtype and device without numbers of its own. It is nan, so that code which reads an
absent weight does not go on in silence.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fisherfold.network.streamed_model import StreamedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_on_call(folder: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """The model in a folder, frozen and in evaluation mode.

    Args:
        folder: see `StreamedModel`.
        dtype: that it computes in.

    Raises:
        CorruptArtifact: a weight is not in the files.
    """
    from transformers import GenerationConfig

    streamed = StreamedModel(folder, dtype)
    model = streamed.model
    ends = {name: module for name, module in model.named_modules() if module in _embeddings(model)}
    parts = streamed.blocks | ends
    _stand_in(streamed)
    kinds = {kind: _reading(kind, streamed) for kind in map(type, parts.values())}
    for name, module in parts.items():
        module.__class__, module._stored_as = kinds[type(module)], name
    absent = {id(inner) for module in parts.values() for inner in module.modules()}
    streamed.fill(model, "", lambda module: id(module) not in absent)
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _embeddings(model: "PreTrainedModel") -> tuple[Any, ...]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def is_stand_in(weight: torch.Tensor) -> bool:
    """Whether a weight is not in memory."""
    return weight.dim() > 0 and not any(weight.stride()) and weight.numel() > 1


def _stand_in(streamed: StreamedModel) -> None:
    """Put nan in the place of every parameter on the meta device; tied ones stay one."""
    made: dict[int, nn.Parameter] = {}
    for path, module in streamed.model.named_modules():
        for own, value in module._parameters.items():
            if value is not None and value.is_meta:
                streamed.stored(path, own, module)
                nothing = torch.full((), torch.nan, dtype=value.dtype, device=streamed.device).expand(value.shape)
                made.setdefault(id(value), nn.Parameter(nothing, requires_grad=False))
                module._parameters[own] = made[id(value)]


def _reading(kind: type[nn.Module], streamed: StreamedModel) -> type[nn.Module]:
    """A subclass that is `kind` in all but that a module of it has its weights only while it is called."""

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        with held(self), _named_when_kept(streamed.read_again):
            return kind.__call__(self, *arguments, **keywords)

    def read(self: Any) -> Callable[[], None]:
        return streamed.fill(self, self._stored_as)

    return type(kind.__name__, (kind,), {"__call__": call, "_read": read, "__module__": kind.__module__})


@contextmanager
def held(module: Any) -> Iterator[None]:
    """Inside, a module has its weights, if it is one that reads them when it is called."""
    restore = module._read() if hasattr(module, "_read") else lambda: None
    try:
        yield
    finally:
        restore()


@contextmanager
def _named_when_kept(read_again: Callable[[torch.Tensor], Callable[[], torch.Tensor] | None]) -> Iterator[None]:
    """Inside, autograd keeps of weights what reads them again."""

    def keep(tensor: torch.Tensor) -> torch.Tensor | Callable[[], torch.Tensor]:
        return read_again(tensor) or tensor

    def give(kept: torch.Tensor | Callable[[], torch.Tensor]) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else kept()

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        yield
