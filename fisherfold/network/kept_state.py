"""What a model's modules keep of a pass in attributes of their own, such as recurrent states: the next pass then begins where this one ended.

Such a model is not trained here: a step's gradient would run into the pass before, and sequences computed side by side into each other.
"""

import torch
from torch import nn

from fisherfold.network.layers import input_embedding

KEEPS = "keeps a state from one pass to the next"


@torch.no_grad()
def keeps_state(model: nn.Module, ids: torch.Tensor) -> bool:
    """Whether a forward pass over `ids` [B, T] leaves another tensor in an attribute that is neither parameter nor buffer."""
    before = _tensors(model)
    model(input_ids=ids.to(input_embedding(model).device), use_cache=False)
    return any(before.get(place) is not tensor for place, tensor in _tensors(model).items())


def _tensors(model: nn.Module) -> dict[tuple[str, str], torch.Tensor]:
    """Held, so that none of them is taken for another that has its address."""
    return {
        (name, own): value
        for name, module in model.named_modules()
        for own, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }
