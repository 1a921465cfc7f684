"""The forms in which the gradient of each sequence is kept, chosen by ``capture.gradients``.

Shapes: G [n, m] the gradient of one sequence of T tokens, k sketch rank.
"""

from typing import Protocol

import torch

from fisherfold.linalg.sketch import GradientBatch, gaussian_probes, products_need_gradient, sketch, sketch_width
from fisherfold.network.layers import LinearLayer
from fisherfold.run.registry import Registry

Arrays = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


class GradientForm(Protocol):
    """The form in which each sequence's gradient of one layer is kept.

    Args:
        layer: the layer.
        rank: capture.sketch_rank.
        seed: capture.seed.
    """

    def __init__(self, layer: LinearLayer, rank: int, seed: int) -> None: ...

    @staticmethod
    def shapes(layer: LinearLayer, rank: int) -> Shapes:
        """Shape of every array that is kept for one sequence."""

    def needs_gradients(self, tokens: int) -> bool:
        """Whether the gradients of sequences of T = `tokens` must be written out, all of a batch at once."""

    def arrays(self, batch: GradientBatch) -> Arrays:
        """What is kept of a batch, with its G written out if needed."""


GRADIENT_FORMS: Registry[type[GradientForm] | None] = Registry("capture.gradients")
GRADIENT_FORMS.register("none")(None)


@GRADIENT_FORMS.register("sums")
class SummedGradient:
    """Nothing: of a gradient its share in the sums and its norm are all that is kept."""

    def __init__(self, layer: LinearLayer, rank: int, seed: int) -> None:
        pass

    @staticmethod
    def shapes(layer: LinearLayer, rank: int) -> Shapes:
        return {}

    def needs_gradients(self, tokens: int) -> bool:
        return False

    def arrays(self, batch: GradientBatch) -> Arrays:
        return {}


@GRADIENT_FORMS.register("sketch")
class SketchedGradient:
    """left [n, k] and right [m, k] with G ~ left right^T, and the share of ||G||_F^2 that they keep."""

    def __init__(self, layer: LinearLayer, rank: int, seed: int) -> None:
        self.layer = layer
        self.probes = gaussian_probes(layer.outputs, layer.inputs, rank, seed, layer.name)

    @staticmethod
    def shapes(layer: LinearLayer, rank: int) -> Shapes:
        width = sketch_width(layer.outputs, layer.inputs, rank)
        return {"left": (layer.outputs, width), "right": (layer.inputs, width), "kept": ()}

    def needs_gradients(self, tokens: int) -> bool:
        return products_need_gradient(tokens, self.layer.outputs, self.layer.inputs)

    def arrays(self, batch: GradientBatch) -> Arrays:
        self.probes = self.probes.to(batch.D)
        return sketch(batch, self.probes)._asdict()


@GRADIENT_FORMS.register("exact")
class ExactGradient:
    """The gradient [n, m] itself."""

    def __init__(self, layer: LinearLayer, rank: int, seed: int) -> None:
        pass

    @staticmethod
    def shapes(layer: LinearLayer, rank: int) -> Shapes:
        return {"gradient": (layer.outputs, layer.inputs)}

    def needs_gradients(self, tokens: int) -> bool:
        return True

    def arrays(self, batch: GradientBatch) -> Arrays:
        assert batch.G is not None  # as `needs_gradients` asks
        return {"gradient": batch.G}
