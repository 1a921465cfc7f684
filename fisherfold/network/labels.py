"""Labels of the gradient pass: the next tokens of the text, or tokens drawn from what the model itself predicts.

    F = E_x E_{y ~ p(· | x)} ∇ log p(y | x) ∇ log p(y | x)ᵀ

is the Fisher matrix; with the text's own y it is called empirical (Kunstner, Balles & Hennig 2019), and grows with what the model predicts
wrongly. One draw a token is an unbiased estimate at no cost: the probabilities are there.

Shapes: T tokens that are predicted, over a vocabulary of V.
"""

from collections.abc import Callable, Sequence

import torch

from fisherfold.run.determinism import seeded_generator

Labels = Callable[[int, torch.Tensor], torch.Tensor]
"""(place in the batch, p [T, V]) -> labels [T]."""


def text_labels(numbers: Sequence[int], seed: int) -> None:
    """The text's own next tokens."""


def drawn_labels(numbers: Sequence[int], seed: int) -> Labels:
    """Labels drawn from p by inversion: the first v with Σ_{w ≤ v} p_w ≥ u Σ_w p_w, u uniform.

    They depend on the seed and on the sequence's number in the table, not on its batch or shard.
    """

    def draw(place: int, p: torch.Tensor) -> torch.Tensor:
        u = torch.rand(len(p), 1, generator=seeded_generator(seed, f"labels/{numbers[place]}"))
        total = p.cumsum(-1)
        found = torch.searchsorted(total, u.to(total) * total[:, -1:])
        return found[:, 0].clamp(max=p.shape[-1] - 1)

    return draw


LABELS: dict[str, Callable[[Sequence[int], int], Labels | None]] = {"data": text_labels, "model": drawn_labels}
"""By capture.labels: what gives the labels of a batch of sequences, by their numbers and capture.seed; None: the text."""
