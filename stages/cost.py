"""What a linear layer costs in stored numbers: the one model that allocation plans with and the checkpoint is counted against.

n outputs, m inputs, k = min(n, m), rank r. Weights and index arrays count, biases do not (no method changes them).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stages.layers import LinearLayer
from stages.registry import Registry

DENSE = "dense"
Cost = Callable[[int, int, np.ndarray], np.ndarray]
FORMATS: Registry[Cost] = Registry("ranks.storage")
"""Stored numbers of a rank-r layer by format: (n, m, ranks) -> numbers, int64 of the shape of ranks."""
ALLOWED_FORMATS = {"factors": ("factors",), "pivoted": ("pivoted", "factors")}
"""Formats that a value of ``ranks.storage`` may use: for few ranks a pivot order costs more than it saves."""


@FORMATS.register("factors")
def factor_cost(n: int, m: int, ranks: np.ndarray) -> np.ndarray:
    """Two factors, [n, r] and [r, m]: r(n + m)."""
    return ranks * (n + m)


@FORMATS.register("pivoted")
def pivoted_cost(n: int, m: int, ranks: np.ndarray) -> np.ndarray:
    """Pivoted factors and the order of the shorter side: r(n + m − r) + k; nothing at rank 0. See ``stages.pivoted``."""
    return np.where(ranks > 0, ranks * (n + m - ranks) + min(n, m), 0)


@dataclass(frozen=True)
class Choice:
    """How one layer is kept: `storage` is "dense" or a name of FORMATS; `numbers` is what it stores."""

    rank: int
    storage: str
    numbers: int


def choose_storage(layer: LinearLayer, rank: int, storage: str) -> Choice:
    """The cheapest format for `rank`; full rank, and any rank whose factors outgrow the matrix, is dense."""
    n, m = layer.outputs, layer.inputs
    numbers, name = min((int(FORMATS.lookup(name)(n, m, np.array(rank))), name) for name in ALLOWED_FORMATS[storage])
    if rank == min(n, m) or numbers >= n * m:
        return Choice(min(n, m), DENSE, n * m)
    return Choice(rank, name, numbers)


def rank_costs(layer: LinearLayer, storage: str) -> np.ndarray:
    """Stored numbers at every rank 0 … k, int64 [k + 1], never more than the dense nm (which is the cost at k)."""
    n, m = layer.outputs, layer.inputs
    ranks = np.arange(min(n, m) + 1, dtype=np.int64)
    costs = np.min([FORMATS.lookup(name)(n, m, ranks) for name in ALLOWED_FORMATS[storage]], axis=0)
    costs[-1] = n * m
    return np.minimum(costs, n * m)
