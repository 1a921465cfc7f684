"""Pivoted layers as plain factors while they are trained, and back into their order.

The pivoted gauge stores a product with a unit matrix in it, [1; C] R say. That is the right way to store it and a poor one to train it:
a step in R moves all outputs at once, and numbers of the size of weights and of coefficients share one rate. While it is trained the
product is L R, both free, in the balanced gauge

    L = U √S,  R = √S Vᵀ,   U S Vᵀ = L R,

and afterwards it goes back to the rows (or columns) that it was pivoted on, by an exact change of gauge in float64:

    outputs pivoted (P: L's rows of the pivots, Q: the others)     pivot = P R,  rest = Q P⁻¹
    inputs pivoted (P: R's columns of the pivots, Q: the others)   pivot = L P,  rest = P⁻¹ Q

Shapes: n outputs, m inputs, rank r; L [n, r], R [r, m].
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from fisherfold.runtime.modeling_fisherfold import LowRankLinear, PivotedInputLinear, PivotedOutputLinear

Pivoted = PivotedOutputLinear | PivotedInputLinear

SMALLEST = 1e-6
"""Singular value, as a share of the largest, that is balanced: what a product has no rank for stays finite."""


@torch.no_grad()
def free_factors(block: nn.Module) -> dict[str, Pivoted]:
    """Put plain factors in the place of every pivoted layer of `block`; the pivoted layers by name, for `pivot_again`."""
    found = {
        name: module
        for name, module in block.named_modules()
        if type(module) in (PivotedOutputLinear, PivotedInputLinear)
    }
    pivoted = cast(dict[str, Pivoted], found)
    for name, module in pivoted.items():
        L, R = balanced_factors(module)
        bias = bias_of(module)
        plain = LowRankLinear(len(L), R.shape[1], len(R), bias is not None).to(module.up.weight)
        tensors = {"up.weight": L, "down.weight": R} | ({} if bias is None else {"up.bias": bias})
        plain.load_state_dict(tensors)
        plain.weight = module.weight  # what code of the block may look for
        block.set_submodule(name, plain.requires_grad_(False))
    return pivoted


@torch.no_grad()
def pivot_again(block: nn.Module, pivoted: Mapping[str, Pivoted], trained: bool = True) -> None:
    """Put the pivoted layers back, with the products and biases that the plain ones have now, in the order that they had; or, if nothing was trained, as they were."""
    for name, module in pivoted.items():
        plain = cast(LowRankLinear, block.get_submodule(name))
        block.set_submodule(name, module)
        if not trained:
            continue
        L, R = plain.up.weight.double(), cast(torch.Tensor, plain.down.weight).double()
        pivots, others = places(module)
        if isinstance(module, PivotedOutputLinear):
            module.down.weight.copy_(L[pivots] @ R)
            module.up.weight.copy_(torch.linalg.solve(L[pivots], L[others], left=False))
        else:
            module.up.weight.copy_(L @ R[:, pivots])
            module.down.weight.copy_(torch.linalg.solve(R[:, pivots], R[:, others]))
        bias = bias_of(module)
        if bias is not None:
            bias.copy_(plain.up.bias)


def balanced_factors(module: Pivoted) -> tuple[torch.Tensor, torch.Tensor]:
    """L and R of a pivoted layer in the balanced gauge, in float64."""
    up, down = module.up.weight.double(), module.down.weight.double()
    pivots, others = places(module)
    outputs = isinstance(module, PivotedOutputLinear)
    coefficients, free = (up, down) if outputs else (down.T, up.T)
    interpolation = up.new_empty(len(module.order), len(pivots))
    interpolation[pivots], interpolation[others] = torch.eye(len(pivots)).to(up), coefficients
    first, second = balanced(interpolation, free)
    return (first, second) if outputs else (second.T, first.T)


def places(module: Pivoted) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs (or inputs) that are pivots, and the others, each in the order in which they are stored."""
    if isinstance(module, PivotedOutputLinear):
        forward, rank = module.order.argsort(), len(module.down.weight)
    else:
        forward, rank = module.order, module.rank
    return forward[:rank], forward[rank:]


def bias_of(module: Pivoted) -> torch.Tensor | None:
    """Where a pivoted layer keeps its bias."""
    return module.bias if isinstance(module, PivotedOutputLinear) else module.up.bias


def balanced(L: torch.Tensor, R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with LᵀL = R Rᵀ, diagonal, as far as its singular values are above `SMALLEST` of the largest.

    Args:
        L: [n, r] of full rank; so is what is returned for it.
        R: [r, m].
    """
    Q, triangle = torch.linalg.qr(L)
    core = triangle @ R
    squares, U = torch.linalg.eigh(core @ core.T)
    S = squares.clamp(min=0).sqrt()
    roots = S.clamp(min=SMALLEST * float(S[-1]) or 1.0).sqrt()
    return Q @ U * roots, (U.T @ core) / roots[:, None]
