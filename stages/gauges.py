"""How a low-rank product is stored: the parameters of the checkpoint's layer of each kind.

`left` [n, r] and `right` [r, m] are the product's factors in float64; the parameters are named and shaped as in
templates/modeling_fisherfold.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from stages.pivoted import Pivoted, pivot_factors
from stages.registry import Registry
from stages.rounding import nearest, round_pivoted


@dataclass(frozen=True)
class GaugedLayer:
    """A layer as it is stored.

    Attributes:
        kind: of the checkpoint's layer.
        parameters: arrays by name, float64 with values of the stored dtype, or int64.
        largest_coefficient: max |c| of the interpolation, 0 without one.
    """

    kind: str
    parameters: dict[str, np.ndarray]
    largest_coefficient: float = 0.0


Gauge = Callable[[np.ndarray, np.ndarray, torch.dtype], GaugedLayer]
GAUGES: Registry[Gauge] = Registry("ranks.storage")
"""By value of ``storage`` in ranks.parquet: (left, right, stored dtype) -> the layer; rank 0 needs none."""


@GAUGES.register("factors")
def plain_factors(left: np.ndarray, right: np.ndarray, dtype: torch.dtype) -> GaugedLayer:
    """The factors as they are, rounded to nearest."""
    return GaugedLayer("factors", {"up.weight": nearest(left, dtype), "down.weight": nearest(right, dtype)})


@GAUGES.register("pivoted")
def pivoted_factors(left: np.ndarray, right: np.ndarray, dtype: torch.dtype) -> GaugedLayer:
    """The pivoted gauge (PivGa), on the side with the shorter order."""
    stored = round_pivoted(pivot_factors(left, right), dtype)
    up, down = (stored.rest, stored.pivot) if stored.side == "outputs" else (stored.pivot, stored.rest)
    parameters = {"up.weight": up, "down.weight": down, "order": stored.order}
    return GaugedLayer(f"pivoted_{stored.side}", parameters, stored.largest_coefficient)


def gauge(left: np.ndarray, right: np.ndarray, storage: str, dtype: torch.dtype) -> GaugedLayer:
    """Store left @ right in the format `storage`; a product of rank 0 has no parameters."""
    if not left.shape[1]:
        return GaugedLayer("zero", {})
    return GAUGES.lookup(storage)(left, right, dtype)


def product(kind: str, parameters: Mapping[str, np.ndarray], n: int, m: int) -> np.ndarray:
    """The dense matrix [n, m] that a stored layer stands for, float64."""
    return PRODUCTS[kind](parameters) if parameters else np.zeros((n, m))


PRODUCTS: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    "factors": lambda p: p["up.weight"] @ p["down.weight"],
    "pivoted_outputs": lambda p: Pivoted("outputs", p["order"], p["down.weight"], p["up.weight"]).product(),
    "pivoted_inputs": lambda p: Pivoted("inputs", p["order"], p["up.weight"], p["down.weight"]).product(),
}
