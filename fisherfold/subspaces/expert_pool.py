"""Sums of a mixture's experts, shrunk by count towards the mean expert of their stack.

An expert e sees N_e of the N tokens. With κ tokens of the mean over the stack mixed in (`subspace.experts.prior_tokens`), its sums are

    Σ_e ← N_e (Σ_e + κ Σ_f Σ_f / Σ_f N_f) / (N_e + κ)        of Σ x xᵀ, Σ |x| and Σ d dᵀ

which keeps their size: how often an expert is used is not shrunk. One with fewer than `fewest` tokens says too little: it stays dense, or
takes the mean alone, as if a token had come to it (`few`). Other sums (of gradients) are given as they are.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from fisherfold.network.layers import LinearLayer
from fisherfold.run.params import ExpertsParams
from fisherfold.run.progress import announce
from fisherfold.run.store import read_array
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.statistics.stored_sums import SUMS, restored

SOME = 4  # names that are said


def needed(params: ExpertsParams) -> int:
    """Tokens below which an expert has too few: at least one is needed, whatever is asked for."""
    return max(1, params.fewest)


class PooledStatistics(Statistics):
    """The statistics of the experts of one stack, shrunk.

    Args:
        statistics: of stage `capture`.
        stack: whose experts are asked for.
        params: how much is borrowed.
    """

    def __init__(self, statistics: Statistics, stack: str, params: ExpertsParams) -> None:
        super().__init__(statistics.folder)
        self.params = params
        self.experts = [layer for layer in self.layers if layer.stack == stack]
        self._means: dict[str, torch.Tensor] = {}

    @cached_property
    def counts(self) -> dict[str, int]:
        """N_e by name."""
        return {layer.name: super(PooledStatistics, self).tokens_seen(layer) for layer in self.experts}

    def tokens_seen(self, layer: LinearLayer) -> int:
        """N_e; 1 for one that takes the mean though none came to it."""
        return max(self.counts[layer.name], self.params.few == "mean")

    def too_few(self, layer: LinearLayer) -> bool:
        """See `needed`."""
        return self.counts[layer.name] < needed(self.params)

    def why_dense(self, layer: LinearLayer) -> str | None:
        """Why an expert stays dense for want of tokens; None if it need not."""
        if self.params.few == "mean" or not self.too_few(layer):
            return None
        return f"the router sent {self.counts[layer.name]} calibration tokens to this expert"

    def input_gram(self, layer: LinearLayer) -> torch.Tensor:
        return self._shrunk(layer, "input_gram", super().input_gram(layer))

    def input_magnitude(self, layer: LinearLayer) -> torch.Tensor:
        return self._shrunk(layer, "input_abs", super().input_magnitude(layer) * self.tokens) / self.tokens

    def output_gram(self, layer: LinearLayer) -> torch.Tensor:
        return self._shrunk(layer, "output_gram", super().output_gram(layer))

    def _shrunk(self, layer: LinearLayer, kind: str, own: torch.Tensor) -> torch.Tensor:
        count, prior = self.tokens_seen(layer), self.params.prior_tokens
        if self.too_few(layer):
            return self._mean(kind) * count
        if not prior:
            return own
        return (own + prior * self._mean(kind)) * (count / (count + prior))

    def _mean(self, kind: str) -> torch.Tensor:
        """Σ_f Σ_f / Σ_f N_f over the stack."""
        if kind not in self._means:
            sums = (restored(kind, read_array(self.folder / SUMS, f"{layer.name}/{kind}")) for layer in self.experts)
            total = next(sums).double()
            for own in sums:
                total += own
            self._means[kind] = (total / max(1, sum(self.counts.values()))).float()
        return self._means[kind]


def pool_experts(
    statistics: Statistics, groups: Sequence[Sequence[LinearLayer]], params: ExpertsParams, rows: list[dict[str, Any]]
) -> tuple[Statistics, list[Sequence[LinearLayer]]]:
    """The statistics to decompose groups of layers by, and those that have enough: `rows` gets why each other one stays dense.

    Experts' statistics, all of one stack, are shrunk; those of other layers are as they are. Where experts share a factor none stays dense: one
    with too few tokens takes the mean.
    """
    stack = groups[0][0].stack
    if not stack:
        return statistics, list(groups)
    if params.shared:  # their factor is found for all of them together
        return PooledStatistics(statistics, stack, params.model_copy(update={"few": "mean"})), list(groups)
    shrunk = PooledStatistics(statistics, stack, params)
    usable: list[Sequence[LinearLayer]] = []
    for (layer,) in groups:
        if reason := shrunk.why_dense(layer):
            rows.append({"module": layer.name, "sigma": [], "dense": reason})
        else:
            usable.append([layer])
    return shrunk, usable


def few_tokens(statistics: Statistics, params: ExpertsParams) -> dict[str, int]:
    """N_e of the experts' matrices that have fewer tokens than asked for, or none, by name; says how many and what becomes of them."""
    counts = {layer.name: statistics.tokens_seen(layer) for layer in statistics.layers if layer.stack}
    few = {name: count for name, count in counts.items() if count < needed(params)}
    if few:
        fate = "take the mean's metric" if params.few == "mean" or params.shared else "stay dense"
        names = ", ".join(list(few)[:SOME]) + (f" and {len(few) - SOME} more" if len(few) > SOME else "")
        announce(
            "subspace",
            f"of {len(counts)} matrices of experts, {len(few)} had fewer than {needed(params)} calibration tokens and {fate}: {names} "
            "(subspace.json has all)",
        )
    return few
