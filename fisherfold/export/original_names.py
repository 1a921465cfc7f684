"""Tensors under the names, and in the parts, in which an architecture's checkpoints lie on the hub.

Inside this project tensors have the names of their modules. Transformers renames, splits and merges many families' tensors when it loads
(experts of a block become one tensor, `embed_out` becomes `lm_head`), and other tools know the names on the hub alone. Its own conversion
is undone here one block at a time, so no more than a block is in memory.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from fisherfold.run.checkpoint import StoredTensor

BLOCK = re.compile(r".*?\.\d+(?=\.)")  # a tensor's name up to the first number: the block that it is in


@dataclass(frozen=True, eq=False)
class _Block:
    """Tensors that are converted together.

    Attributes:
        model: whose conversion it is.
        tensors: by their names here.
    """

    model: PreTrainedModel
    tensors: dict[str, StoredTensor]

    def converted(self) -> dict[str, StoredTensor]:
        """What the hub has for them. Names and shapes are found with tensors that hold nothing; numbers are read when asked for."""
        empty = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in self.tensors.items()}
        own = {id(tensor): name for name, tensor in empty.items()}
        return {
            name: self.tensors[own[id(tensor)]]
            if id(tensor) in own
            else StoredTensor(tuple(tensor.shape), tensor.dtype, partial(_read_converted, self, name))
            for name, tensor in revert_weight_conversion(self.model, empty).items()
        }


@lru_cache(maxsize=1)
def _read_block(block: _Block) -> dict[str, torch.Tensor]:
    read = {name: tensor.read() for name, tensor in block.tensors.items()}
    return revert_weight_conversion(block.model, read)


def _read_converted(block: _Block, name: str) -> torch.Tensor:
    return _read_block(block)[name].contiguous()


def original_tensors(model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The model's `tensors`, named as its modules, in the format of the hub, sorted by name.

    Args:
        model: the dense model; it may be on the meta device.
        tensors: by name. No conversion reaches over blocks.
    """
    blocks: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        found = BLOCK.match(name)
        blocks.setdefault(found[0] if found else "", {})[name] = tensor
    converted = [_Block(model, block).converted() for block in blocks.values()]
    return dict(sorted(entry for block in converted for entry in block.items()))
