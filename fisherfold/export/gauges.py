"""How a low-rank product is stored: the parameters of the checkpoint's layer of each kind.

`left` [n, r] and `right` [r, m] are the product's factors in float64; the parameters are named and shaped as in
fisherfold/runtime/modeling_fisherfold.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from fisherfold.allocators.cost import PIVOTED_SIDES
from fisherfold.linalg.pivoted import Pivoted, pivot_factors
from fisherfold.linalg.rounding import nearest, round_pivoted
from fisherfold.run.registry import Registry

SHARED_MEMBER = "shared_member"
"""Kind of a layer whose right factor is with the first layer of its site."""


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


Values = TypeVar("Values")
Gauge = Callable[[np.ndarray, np.ndarray, torch.dtype], GaugedLayer]
GAUGES: Registry[Gauge] = Registry("ranks.storage")
"""By value of ``storage`` in ranks.parquet: (left, right, stored dtype) -> the layer; rank 0 needs none."""


@GAUGES.register("factors")
def plain_factors(left: np.ndarray, right: np.ndarray, dtype: torch.dtype) -> GaugedLayer:
    """The factors as they are, rounded to nearest."""
    return GaugedLayer("factors", {"up.weight": nearest(left, dtype), "down.weight": nearest(right, dtype)})


def pivoted_factors(left: np.ndarray, right: np.ndarray, dtype: torch.dtype, side: str | None) -> GaugedLayer:
    """The pivoted gauge (PivGa) on a side, None being that with the shorter order."""
    stored = round_pivoted(pivot_factors(left, right, side), dtype)
    up, down = (stored.rest, stored.pivot) if stored.side == "outputs" else (stored.pivot, stored.rest)
    parameters = {"up.weight": up, "down.weight": down, "order": stored.order}
    return GaugedLayer(f"pivoted_{stored.side}", parameters, stored.largest_coefficient)


def gauge(left: np.ndarray, right: np.ndarray, storage: str, dtype: torch.dtype) -> GaugedLayer:
    """Store left @ right in the format `storage`; a product of rank 0 has no parameters."""
    if not left.shape[1]:
        return GaugedLayer("zero", {})
    return GAUGES.lookup(storage)(left, right, dtype)


SharedGauge = tuple[str, np.ndarray, dict[str, np.ndarray], float]
Shared = Callable[[np.ndarray, np.ndarray, torch.dtype], SharedGauge]
SHARED_GAUGES: Registry[Shared] = Registry("ranks.storage")
"""As GAUGES, for layers that share `right`; left is [Σ n, r]: -> kind, stacked up.weight, the right factor, largest coefficient."""


@SHARED_GAUGES.register("factors")
def shared_factors(left: np.ndarray, right: np.ndarray, dtype: torch.dtype) -> SharedGauge:
    """The factors as they are, rounded to nearest."""
    return "shared_factors", nearest(left, dtype), {"down.weight": nearest(right, dtype)}, 0.0


def shared_pivoted_factors(left: np.ndarray, right: np.ndarray, dtype: torch.dtype) -> SharedGauge:
    """The pivoted gauge on the side of the inputs, which the layers share: z = x_pivot + rest x_rest."""
    stored = round_pivoted(pivot_factors(left, right, "inputs"), dtype)
    right_factor = {"down.rest.weight": stored.rest, "down.order": stored.order}
    return "shared_pivoted_inputs", stored.pivot, right_factor, stored.largest_coefficient


for _name, _side in PIVOTED_SIDES.items():
    GAUGES.register(_name)(partial(pivoted_factors, side=_side))
    SHARED_GAUGES.register(_name)(shared_pivoted_factors)


def gauge_site(lefts: Sequence[np.ndarray], right: np.ndarray, storage: str, dtype: torch.dtype) -> list[GaugedLayer]:
    """Store left_c @ right for every layer c of a site: the first holds the right factor, the others take it from there."""
    if len(lefts) == 1 or not len(right):
        return [gauge(left, right, storage, dtype) for left in lefts]
    kind, up, down, coefficient = SHARED_GAUGES.lookup(storage)(np.concatenate(lefts), right, dtype)
    first, *others = np.split(up, np.cumsum([len(left) for left in lefts])[:-1])
    members = [GaugedLayer(SHARED_MEMBER, {"up.weight": part}) for part in others]
    return [GaugedLayer(kind, {"up.weight": first, **down}, coefficient), *members]


def right_factor(parameters: Mapping[str, Values]) -> dict[str, Values]:
    """The part of a site's first layer that its other layers read."""
    return {name: values for name, values in parameters.items() if name.startswith("down.")}


def product(kind: str, parameters: Mapping[str, np.ndarray], n: int, m: int) -> np.ndarray:
    """The dense matrix [n, m] that a stored layer stands for, float64; a member's `parameters` include the right factor."""
    return PRODUCTS[kind](parameters) if parameters else np.zeros((n, m))


def _shared_product(parameters: Mapping[str, np.ndarray]) -> np.ndarray:
    if "down.order" not in parameters:
        return parameters["up.weight"] @ parameters["down.weight"]
    return Pivoted(
        "inputs", parameters["down.order"], parameters["up.weight"], parameters["down.rest.weight"]
    ).product()


PRODUCTS: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    "factors": lambda p: p["up.weight"] @ p["down.weight"],
    "pivoted_outputs": lambda p: Pivoted("outputs", p["order"], p["down.weight"], p["up.weight"]).product(),
    "pivoted_inputs": lambda p: Pivoted("inputs", p["order"], p["up.weight"], p["down.weight"]).product(),
    "shared_factors": _shared_product,
    "shared_pivoted_inputs": _shared_product,
    SHARED_MEMBER: _shared_product,
}
