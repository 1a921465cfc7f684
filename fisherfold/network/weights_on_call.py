"""A model whose weights are in memory only while what they belong to runs: every decoder block, and the embeddings at both ends, read theirs from the
disk when they are called and let them go when they have answered. Its own code calls them, so it does all that a model in memory does, with the same bits:
passes over text, answers with a cache, gradients, hooks on its layers.

For a backward pass autograd keeps of a weight where it is stored, and reads it once more. What it keeps of activations is no less than with the whole model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fisherfold.network.streamed_model import Source, StreamedModel

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
    model: Any = streamed.model
    model._streamed = streamed
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    parts = [*streamed.blocks.values(), *(module for module in ends if module is not None)]
    kinds = {kind: _reading(kind, streamed) for kind in map(type, parts)}
    for module in parts:
        module.__class__ = kinds[type(module)]
    absent = {id(inner) for module in parts for inner in module.modules()}
    streamed.fill(model, lambda module: id(module) not in absent)
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def left_on_disk(model: nn.Module, tensor: torch.Tensor, read: Source) -> torch.Tensor:
    """A buffer for one of the model's blocks: the tensor itself, or what stands in for what `read` gives if the model reads on call."""
    streamed = getattr(model, "_streamed", None)
    return tensor if streamed is None else streamed.stand_in(tensor.shape, tensor.dtype, read)


def _reading(kind: type[nn.Module], streamed: StreamedModel) -> type[nn.Module]:
    """A subclass that is `kind` in all but that a module of it has its weights only while it is called."""

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self._again and torch.is_grad_enabled():
            return checkpoint(run, self, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)
        with _named_when_kept(streamed.read_again):
            return run(self, *arguments, **keywords)

    def run(self: Any, *arguments: Any, **keywords: Any) -> Any:
        with held(self):
            return kind.__call__(self, *arguments, **keywords)

    def read(self: Any) -> Callable[[], None]:
        return streamed.fill(self)

    return type(
        kind.__name__, (kind,), {"__call__": call, "_read": read, "_again": False, "__module__": kind.__module__}
    )


def compute_again(model: nn.Module) -> None:
    """Let the blocks of a model that reads on call keep of a pass what reached them alone, and compute the rest again on the way back.

    Hooks on their layers see such a pass twice.
    """
    streamed = getattr(model, "_streamed", None)
    for block in streamed.blocks.values() if streamed else ():
        block._again = True


@contextmanager
def held(module: Any) -> Iterator[None]:
    """Inside, a module has its weights, if it is one that reads them when it is called."""
    restore = module._read() if hasattr(module, "_read") else lambda: None
    try:
        yield
    finally:
        restore()


@contextmanager
def _named_when_kept(read_again: Callable[[torch.Tensor], Source | None]) -> Iterator[None]:
    """Inside, autograd keeps of weights what reads them again."""

    def keep(tensor: torch.Tensor) -> torch.Tensor | Source:
        return read_again(tensor) or tensor

    def give(kept: torch.Tensor | Source) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else kept()

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        yield
