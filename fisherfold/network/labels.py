"""Labels of the gradient pass: the next tokens of the text, or tokens drawn from what the model itself predicts.

    F = E_x E_{y ~ p(· | x)} ∇ log p(y | x) ∇ log p(y | x)ᵀ

is the Fisher matrix; with the text's own y it is called empirical (Kunstner, Balles & Hennig 2019), and grows with what the model predicts
wrongly. One draw a token is an unbiased estimate at no cost: the probabilities are there. Further draws cost a backward pass each and no
forward pass, and are worth it where there is little text.

Shapes: T tokens that are predicted, over a vocabulary of V.
"""

import math
from collections.abc import Callable, Sequence

import torch

from fisherfold.run.determinism import seeded_generator
from fisherfold.run.params import CaptureParams

ENOUGH_LABELS, MOST_DRAWS = 65_536, 4

Labels = Callable[[int, torch.Tensor], torch.Tensor]
"""(place in the batch, p [T, V]) -> labels [T]."""


def text_labels(numbers: Sequence[int], seed: int, draw: int = 0) -> None:
    """The text's own next tokens."""


def drawn_labels(numbers: Sequence[int], seed: int, draw: int = 0) -> Labels:
    """Labels drawn from p by inversion: the first v with Σ_{w ≤ v} p_w ≥ u Σ_w p_w, u uniform.

    They depend on the seed, on the sequence's number in the table and on which draw it is, not on its batch or shard.
    """
    other = f"/{draw}" if draw else ""

    def labels(place: int, p: torch.Tensor) -> torch.Tensor:
        u = torch.rand(len(p), 1, generator=seeded_generator(seed, f"labels/{numbers[place]}{other}"))
        total = p.cumsum(-1)
        found = torch.searchsorted(total, u.to(total) * total[:, -1:])
        return found[:, 0].clamp(max=p.shape[-1] - 1)

    return labels


LABELS: dict[str, Callable[[Sequence[int], int, int], Labels | None]] = {"data": text_labels, "model": drawn_labels}
"""By capture.labels: what gives the labels of a batch of sequences, by their numbers, capture.seed and the draw; None: the text."""


def all_draws(params: CaptureParams, numbers: Sequence[int]) -> list[Labels | None]:
    """The labels of every draw of capture.draws for a batch of sequences."""
    return [LABELS[params.labels](numbers, params.seed, draw) for draw in range(params.draws)]


def count_draws(params: CaptureParams, tokens: int) -> CaptureParams:
    """The parameters with a number of draws where capture.draws is 0: as many as make `ENOUGH_LABELS` of so many tokens, at most `MOST_DRAWS`."""
    if params.draws:
        return params
    wanted = math.ceil(ENOUGH_LABELS / tokens) if params.labels == "model" else 1
    return params.model_copy(update={"draws": min(wanted, MOST_DRAWS)})
