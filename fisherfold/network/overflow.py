"""Where a model's numbers cease to be finite: the first layer that makes such a number out of finite ones."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fisherfold.network.layers import input_embedding, removed


@dataclass(frozen=True)
class Overflow:
    """
    Attributes:
        module: the innermost module that made the number.
        largest_input: the largest magnitude that it was given.
        largest_weight: the largest magnitude of its own parameters; 0 if it has none, nan if one is not a number.
    """

    module: str
    largest_input: float
    largest_weight: float

    def __str__(self) -> str:
        weights = f"its largest weight is {self.largest_weight:.3g}" if self.largest_weight else "it has no weights"
        return f"It begins in {self.module!r}: {weights}, the largest number it read {self.largest_input:.3g}."


@torch.no_grad()
def first_overflow(model: PreTrainedModel, ids: torch.Tensor) -> Overflow | None:
    """The first layer, in the order of a pass over `ids` [B, T], whose output is not finite though its inputs are; None if none is."""
    found: list[Overflow] = []

    def listen(name: str) -> Callable[..., None]:
        def after(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: object) -> None:
            read = [*_floats(arguments), *_floats(keywords)]
            if not found and _finite(read) and not _finite(_floats(output)):
                found.append(Overflow(name, _largest(read), _largest(module.parameters(recurse=False))))

        return after

    with removed(
        module.register_forward_hook(listen(name), with_kwargs=True)
        for name, module in model.named_modules()
        if not next(module.children(), None)
    ):
        model(input_ids=ids.to(input_embedding(model).device), use_cache=False)
    return found[0] if found else None


def _floats(value: object) -> Iterator[torch.Tensor]:
    """The floating-point tensors in nested arguments."""
    if isinstance(value, torch.Tensor):
        yield from [value] if value.is_floating_point() else []
    elif isinstance(value, dict):
        yield from _floats(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _floats(each)


def _finite(tensors: Iterable[torch.Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _largest(tensors: Iterable[torch.Tensor]) -> float:
    return max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0.0)
