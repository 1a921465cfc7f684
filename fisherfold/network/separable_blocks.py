"""Whether a model can be run one decoder block at a time: tried on a few tokens against the model's own forward pass.

That pass, too, holds one block at a time, so a model of any size can be tried; its weights are read once.

Shapes: h hidden dimensions.
"""

from collections.abc import Sequence
from typing import Any

import torch

from fisherfold.network.blocks import BlockCall
from fisherfold.network.layers import LinearLayer
from fisherfold.network.streamed_model import StreamedModel, is_stand_in
from fisherfold.network.weight_check import check_weight
from fisherfold.run.errors import InputError

PROBE = 8  # tokens of each of two sequences
TOLERANCE = 1e-5
CURE = "Set capture.placement: whole."


def require_blocks(streamed: StreamedModel, layers: Sequence[LinearLayer]) -> None:
    """Refuse a model that cannot be run one block at a time, or whose targeted layers do not all lie in blocks.

    Raises:
        InputError: names the block or the layer.
        NumericalError: a weight is not finite or beyond all measure; see `check_weights`.
    """
    require_inside(streamed, layers)
    fault = _fault(streamed)
    if fault:
        raise InputError(f"{type(streamed.model).__name__} cannot be run one decoder block at a time: {fault}. {CURE}")


def require_inside(streamed: StreamedModel, layers: Sequence[LinearLayer]) -> dict[int, list[LinearLayer]]:
    """The layers by the number of the block that they lie in, blocks without one left out.

    Raises:
        InputError: a layer lies in none.
    """
    found: dict[int, list[LinearLayer]] = {}
    for layer in layers:
        block = next((i for i, name in enumerate(streamed.names) if layer.name.startswith(f"{name}.")), None)
        if block is None:
            raise InputError(
                f"{type(streamed.model).__name__} cannot be streamed: layer {layer.name!r} lies in none of its "
                f"{len(streamed.names)} decoder blocks. {CURE}"
            )
        found.setdefault(block, []).append(layer)
    return dict(sorted(found.items()))


class _Fault(Exception):
    """What a block does that it must not."""


@torch.no_grad()
def _fault(streamed: StreamedModel) -> str | None:
    """What differs first between the model's own forward pass and its parts run by themselves."""
    try:
        with streamed.surroundings():
            calls = [streamed.call(number, 2, PROBE) for number in range(len(streamed.names))]
        left = _run_through(streamed, calls)
    except _Fault as fault:
        return str(fault)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None if left else "a block is never reached"


def _run_through(streamed: StreamedModel, calls: Sequence[BlockCall]) -> bool:
    """Run the model itself, each of its blocks a second time by itself, and what follows the blocks; whether every block was met once.

    Raises:
        _Fault: something differs.
    """
    ids = torch.arange(2 * PROBE, device=streamed.device).view(2, PROBE)
    met: list[torch.Tensor] = []

    def run(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        with streamed.block(number) as block:
            for name, weight in block.named_parameters():
                check_weight(f"{streamed.names[number]}.{name}", weight)
            entered = (args[0] if args else kwargs["hidden_states"]).clone()
            met.append(block(*args, **kwargs))
            if not isinstance(met[-1], torch.Tensor):
                raise _Fault(f"block {streamed.names[number]!r} returns more than hidden states")
            if not _same(met[-1], calls[number](block, entered)):
                raise _Fault(f"block {streamed.names[number]!r} alone gives something else")
        return met[-1]

    head = streamed.model.get_output_embeddings()
    head.forward = lambda hidden: hidden  # the same of both; its weights are not needed
    try:
        with streamed.surroundings(embedding=True), streamed.replaced(run):
            for name, weight in streamed.model.named_parameters():
                if not is_stand_in(weight):
                    check_weight(name, weight)
            whole = streamed.model(input_ids=ids % streamed.vocabulary, use_cache=False).logits
        with streamed.surroundings():
            if not _same(whole, streamed.leave(met[-1])):
                raise _Fault("what follows its blocks reads more than the last one's output")
    finally:
        del head.forward
    return len(met) == len(streamed.names)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=TOLERANCE, atol=TOLERANCE)
