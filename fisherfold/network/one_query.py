"""Attention of one query a sequence, as a model that writes computes it token by token: two products for each key-value head.

    o_h = softmax(s q_h K_gᵀ + mask) V_g        heads h of group g read the same keys and values

For one query torch's `scaled_dot_product_attention` on a CPU takes up to twenty times as long as these products, most of all in bfloat16.

Shapes: R sequences, H heads in groups over H_k key-value heads, T keys of dimension D, values of dimension D_v.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "sdpa"
"""The implementation of transformers' that is replaced for one query."""

OTHERS = ("position_bias", "softcap")
"""What a call may ask for besides."""

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@contextmanager
def one_query_products() -> Iterator[None]:
    """Inside, models that attend through transformers' interface do so, where a call has one query a sequence and lies on the CPU."""
    usual = ALL_ATTENTION_FUNCTIONS[NAME]
    ALL_ATTENTION_FUNCTIONS[NAME] = partial(_attend, usual)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[NAME] = usual


def attend_once(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Outputs [R, H, 1, D_v] of queries [R, H, 1, D] over keys [R, H_k, T, D] and values [R, H_k, T, D_v].

    Args:
        mask: [R or 1, H or 1, 1, T], true where a key is seen, or what is added to the scores; None: all are.
        scale: s, of the scores.
    """
    rows, heads, _, _ = query.shape
    groups = key.shape[1]
    grouped = query.reshape(rows, groups, heads // groups, -1)
    scores = (grouped @ key.transpose(2, 3)).float() * scale
    if mask is not None:
        if mask.shape[1] > 1:
            mask = mask.reshape(-1, groups, heads // groups, mask.shape[-1])
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1).to(value.dtype) @ value).reshape(-1, heads, 1, value.shape[-1])


def _attend(
    usual: Attention,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' signature; what has more queries, or asks for one of `OTHERS`, is computed as usual."""
    if query.shape[2] > 1 or query.device.type != "cpu" or any(others.get(name) is not None for name in OTHERS):
        return usual(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_once(query, key, value, attention_mask, scale).transpose(1, 2), None
