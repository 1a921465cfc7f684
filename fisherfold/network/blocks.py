"""The decoder blocks of a model, found from its modules, and one of them run on hidden states from elsewhere.

Shapes: B sequences of T tokens, h hidden dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fisherfold.network.layers import input_embedding
from fisherfold.run.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE = 8  # tokens of each of two sequences: a block called with what belongs to one must give the outputs of both


class _Reached(Exception):
    """The block of interest has what it is called with."""


def find_blocks(model: "PreTrainedModel") -> dict[str, nn.Module]:
    """The blocks by module name, each tried by itself.

    Raises:
        InputError: there is none, or a block run by itself does not give what it gives inside the model.
    """
    blocks = list_blocks(model)
    if not blocks:
        raise InputError(f"{type(model).__name__} has no list of decoder blocks: set factorize.refine.passes = 0.")
    _require_separable(model, blocks)
    return blocks


def list_blocks(model: "PreTrainedModel") -> dict[str, nn.Module]:
    """The members of the nn.ModuleList under which most parameters lie, by module name; none if there is no such list."""
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    if not lists:
        return {}
    name = max(lists, key=lambda key: sum(p.numel() for p in lists[key].parameters()))
    return {f"{name}.{index}": block for index, block in enumerate(lists[name])}


@torch.no_grad()
def _require_separable(model: "PreTrainedModel", blocks: dict[str, nn.Module]) -> None:
    embedding = input_embedding(model)
    ids = torch.arange(2 * PROBE, device=embedding.device).view(2, PROBE) % len(embedding)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = [
        block.register_forward_hook(
            lambda module, args, kwargs, out, name=name: seen.update({name: (_hidden(args, kwargs), first(out))}),
            with_kwargs=True,
        )
        for name, block in blocks.items()
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    for name, block in blocks.items():
        if name not in seen or not _runs_alone(model, block, ids[:1], *seen[name]):
            raise InputError(
                f"{type(model).__name__}: block {name!r} cannot be run by itself, so it cannot be refined: set factorize.refine.passes = 0."
            )


def _runs_alone(
    model: "PreTrainedModel", block: nn.Module, ids: torch.Tensor, entered: torch.Tensor, left: torch.Tensor
) -> bool:
    """Whether the block gives for these hidden states what it gave inside the model; many need more than that to run at all."""
    try:
        return torch.allclose(BlockCall(model, block, ids)(block, entered), left, atol=1e-5)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def first(output: Any) -> torch.Tensor:
    """The hidden states of what a block returns, which may be a tuple."""
    return output[0] if isinstance(output, tuple) else output


class BlockCall:
    """What a block is called with besides hidden states (masks, positions), taken from the model for the tokens `ids` [B, T].

    Attributes:
        entered: the hidden states [B, T, h] that reach the block if all blocks before it pass theirs on as they are.
    """

    def __init__(self, model: "PreTrainedModel", block: nn.Module, ids: torch.Tensor) -> None:
        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.entered, self.args, self.kwargs = _hidden(args, kwargs), args[1:], dict(kwargs)
            self.kwargs.pop("hidden_states", None)
            raise _Reached

        handle = block.register_forward_pre_hook(take, with_kwargs=True)
        try:
            with torch.no_grad(), _passing(model, block):
                model(input_ids=ids, use_cache=False)
        except _Reached:
            pass
        finally:
            handle.remove()

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output [B, T, h] for hidden states [B, T, h]."""
        return first(block(hidden, *self.args, **self.kwargs))


@contextmanager
def _passing(model: "PreTrainedModel", block: nn.Module) -> Iterator[None]:
    """Inside, the blocks before `block` hand on what they get."""
    siblings = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and any(b is block for b in m))
    before = []
    for other in siblings:
        if other is block:
            break
        before.append(other)
        other.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        for other in before:
            del other.forward
