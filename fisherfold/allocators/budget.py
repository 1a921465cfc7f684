"""What a budget counts: the unit of ``ranks.ratio``, chosen by ``ranks.budget``."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from fisherfold.allocators.cost import Unit
from fisherfold.network.sites import Site
from fisherfold.run.checkpoint import count_bytes, read_tensors
from fisherfold.run.registry import Registry

INDEX_BYTES = 8  # an order is stored as int64


@dataclass(frozen=True)
class Budget:
    """What all sites together may cost.

    Attributes:
        what: the ratio is of, for messages.
        unit: what a stored number costs.
        whole: what the ratio is of.
        untargeted: the part of `whole` that no rank changes.
    """

    what: str
    unit: Unit
    whole: int
    untargeted: int

    def left(self, ratio: float) -> int:
        """What the sites may cost: ⌊(1 − ratio) whole⌋ − untargeted, in exact decimal arithmetic."""
        return math.floor((1 - Fraction(str(ratio))) * self.whole) - self.untargeted

    def ratio(self, cost: int) -> float:
        """The ratio at which the sites cost `cost`."""
        return 1 - (self.untargeted + cost) / self.whole


BUDGETS: Registry[Callable[[Sequence[Site], Path], Budget]] = Registry("ranks.budget")
"""(sites, folder of the prepared model) -> what is counted."""


def parameters(sites: Sequence[Site], model: Path | None = None) -> Budget:
    """Stored numbers of the targeted layers: weights and indices, without biases."""
    return Budget("stored numbers of the targeted layers", Unit(), sum(site.dense_numbers for site in sites), 0)


BUDGETS.register("parameters")(parameters)


@BUDGETS.register("model_bytes")
def model_bytes(sites: Sequence[Site], model: Path) -> Budget:
    """Bytes of all tensors of the model, embeddings and norms included, in the dtype of the prepared model.

    A ``factorize.dtype`` of fewer bits makes the compressed model smaller still.
    """
    tensors = read_tensors(model)
    weight = max(tensors[layer.tensor].dtype.itemsize for site in sites for layer in site.layers)
    targeted = sum(
        layer.dense_numbers * tensors[layer.tensor].dtype.itemsize for site in sites for layer in site.layers
    )
    whole = count_bytes(tensors)
    return Budget("bytes of the whole model", Unit(weight, INDEX_BYTES), whole, whole - targeted)
