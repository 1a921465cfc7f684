"""Refinement of one decoder block (METHOD: AA-SVD 2026): its factors and norms are trained on the compressed network's own inputs
to give what the dense block gives on the dense network's.

    minimise  mean over tokens t of  ‖ŷ_t − y_t‖² / ‖y_t‖²

y_t = f(x_t) of the dense block f on the dense input, ŷ_t = f̂(x̂_t). Divided by the norm token by token, since the loss depends on the
residual stream through norms alone, and plain squares are ruled by a few huge tokens. The first token, such a one, counts as any other:
attention rests on it, and where nothing holds it, it drifts (docs/developers/log.md).
What is trained is kept only if it lowers this on held-out sequences. The order of a pivoted factor is no parameter and stays.

Shapes: S sequences of T tokens, h hidden dimensions.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from fisherfold.run.params import RefineParams
from fisherfold.run.side_by_side import Apply, at_once
from fisherfold.run.tables import in_batches

WARM = 0.05  # share of the steps in which the rate rises
FLOOR = 0.05  # of the rate, at the end
CALMER = 4  # the rate divided by this where a block is not better for its training
BETAS = (0.9, 0.95)

Batch = tuple[torch.Tensor, torch.Tensor]
"""x̂ and y, both [B, T, h]."""
Sequences = Callable[[list[int]], Batch]
"""Gives the sequences of these numbers; so that no more than a batch is in memory."""

Run = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""(block, x̂) -> ŷ."""

Piece = TypeVar("Piece")


@dataclass(frozen=True)
class Refinement:
    """What was gained: the loss on held-out sequences before and after, whether it was kept, optimiser steps done."""

    held_out_before: float
    held_out_after: float
    accepted: bool
    steps: int


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean over sequences and tokens of ‖ŷ_t − y_t‖² / ‖y_t‖²."""
    squares = (found - wanted).square().sum(-1)
    return (squares / wanted.square().sum(-1).clamp(min=torch.finfo(wanted.dtype).tiny)).mean()


def refine_block(
    block: nn.Module,
    run: Run,
    training: tuple[Sequences, int],
    held_out: tuple[Sequences, int],
    params: RefineParams,
    apply: Apply = map,
) -> Refinement:
    """Train `block` in place; where the held-out loss does not fall, once more from the beginning at a calmer rate, and where it does not fall
    then, it is left as it was.

    Args:
        block: f̂; every floating-point parameter of it is trained.
        run: what the block is run by.
        training: sequences and how many there are; so `held_out`.
        apply: computes the pieces of a batch, see `fisherfold.run.side_by_side`.
    """
    before = _mean_loss(block, run, held_out, params, apply)
    kept = copy.deepcopy(block.state_dict())
    steps = 0
    for rate in (params.rate, params.rate / CALMER):
        steps += _train(block, run, training, params, rate, apply)
        after = _mean_loss(block, run, held_out, params, apply)
        if after < before:
            return Refinement(before, after, True, steps)
        block.load_state_dict(kept)
    return Refinement(before, after, False, steps)


def left_alone(
    block: nn.Module, run: Run, held_out: tuple[Sequences, int], params: RefineParams, apply: Apply = map
) -> Refinement:
    """What is said of a block that is not trained; see `refine_block`."""
    loss = _mean_loss(block, run, held_out, params, apply)
    return Refinement(loss, loss, False, 0)


def _mean_loss(
    block: nn.Module, run: Run, sequences: tuple[Sequences, int], params: RefineParams, apply: Apply
) -> float:
    read, count = sequences
    batches = in_batches(list(range(count)), params.batch_size)

    def loss(piece: Batch) -> float:
        x, y = piece
        with torch.no_grad():
            return len(x) * float(relative_error(run(block, x), y))

    return sum(apply(loss, (piece for numbers in batches for piece in _pieces(read(numbers))))) / count


def _train(
    block: nn.Module, run: Run, sequences: tuple[Sequences, int], params: RefineParams, rate: float, apply: Apply
) -> int:
    read, count = sequences
    trained = [p for p in block.parameters() if p.is_floating_point() and p.numel()]
    batches = list(batches_of(count, passes_over(count, params), params.batch_size))

    def loss(piece: Batch) -> torch.Tensor:
        x, y = piece
        return relative_error(run(block, x), y)

    numbered = ((_pieces(read(numbers)), schedule(step, len(batches))) for step, numbers in enumerate(batches))
    descend(adamw(trained, rate), loss, numbered, apply)
    return len(batches)


def passes_over(count: int, params: RefineParams) -> int:
    """How often that many sequences are read: `passes`, or where these are fewer than `min_steps` as often as makes so many; never, if `passes` is 0."""
    steps = math.ceil(count / params.batch_size)
    return max(params.passes, math.ceil(params.min_steps / steps)) if params.passes else 0


def _pieces(batch: Batch) -> list[Batch]:
    x, y = batch
    size = at_once(len(x))
    return list(zip(x.split(size), y.split(size), strict=True))


def adamw(trained: Iterable[nn.Parameter], rate: float) -> torch.optim.AdamW:
    """The optimiser of all training here, without weight decay. Fused: a step in a fifth of the time."""
    return torch.optim.AdamW(trained, lr=rate, betas=BETAS, weight_decay=0.0, fused=True)


def descend(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Piece], torch.Tensor],
    steps: Iterable[tuple[list[Piece], float]],
    apply: Apply = map,
) -> None:
    """Take steps along the mean gradient of a batch's pieces, clipped to norm 1. Parameters are frozen after.

    The pieces' gradients are added in their order, so the bits do not depend on which is there first.

    Args:
        loss: mean of a piece, all pieces of a batch having as many sequences.
        steps: of each the pieces of its batch, and the share of the optimiser's rate.
        apply: computes the pieces, see `fisherfold.run.side_by_side`.
    """
    group = optimizer.param_groups[0]
    trained, rate = group["params"], group["lr"]
    for parameter in trained:
        parameter.requires_grad_(True)

    def gradient(piece: Piece) -> list[torch.Tensor | None]:
        value = loss(piece)
        if not value.requires_grad:  # it reaches nothing that is trained: every layer on the way has rank 0
            return []
        return list(torch.autograd.grad(value, trained, allow_unused=True))

    for pieces, share in steps:
        reached = False
        for found in apply(gradient, pieces):
            reached |= bool(found)
            for parameter in reversed(trained[: len(found)]):
                _add(parameter, found.pop(), len(pieces))  # which is free then
        if not reached:
            break
        group["lr"] = rate * share
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for parameter in trained:
        parameter.requires_grad_(False)


def _add(parameter: nn.Parameter, part: torch.Tensor | None, pieces: int) -> None:
    """Add a share of the mean to the gradient of a parameter; nothing for one that a piece does not reach."""
    if part is not None:
        parameter.grad = part / pieces if parameter.grad is None else parameter.grad.add_(part, alpha=1 / pieces)


def schedule(step: int, steps: int) -> float:
    """Share of the rate at a step: rising at first, then half a cosine."""
    cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / max(1.0, WARM * steps)) * cosine


def batches_of(count: int, passes: int, size: int) -> Iterator[list[int]]:
    """Numbers of sequences in batches, each pass in another seeded order."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(passes):
        yield from in_batches(torch.randperm(count, generator=generator).tolist(), size)
