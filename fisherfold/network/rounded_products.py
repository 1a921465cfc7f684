"""Linear layers that multiply in bfloat16 while a float32 model is trained or measured: twice as fast in the processors' units for it.

    y = round(round(x) round(W)ᵀ) + b,   likewise the gradients of x and W; each product is summed in float32 and rounded once

Weights, biases, their gradients' sums and all between the layers stay float32. An error of 2⁻⁹ of a number, at random, is far below what is trained away.
The output embedding is not among the blocks: probabilities of thousands of tokens need its logits in full.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from fisherfold.run.determinism import has_bfloat16_units


@contextmanager
def rounded_products(blocks: Iterable[nn.Module], products: str) -> Iterator[None]:
    """Inside, the float32 nn.Linear layers of `blocks` multiply so, if `products` is "bfloat16" and the processor has units for it."""
    if products != "bfloat16" or not has_bfloat16_units():
        yield
        return
    chosen = [module for block in blocks for module in block.modules() if _counts(module)]
    for module in chosen:
        module.forward = partial(_linear, module)
    try:
        yield
    finally:
        for module in chosen:
            del module.forward


def _counts(module: nn.Module) -> bool:
    """On a GPU, TF32 is as fast and more precise (`fisherfold.run.determinism.multiplying`)."""
    return type(module) is nn.Linear and module.weight.dtype == torch.float32 and module.weight.device.type == "cpu"


def _linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    y = functional.linear(x.bfloat16(), module.weight.bfloat16()).to(x.dtype)
    return y if module.bias is None else y + module.bias
