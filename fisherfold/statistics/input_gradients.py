"""What the layers of a group send back to the input they share, g = Σ_c W_cᵀ d_c, and its second moments with that input.

    S_xx = E[x xᵀ],   S_xg = E[x gᵀ] = (Σ_s G_sᵀ) W / N,   S_gg = E[g gᵀ]

over all N captured tokens, with W [Σ n_c, m] and G_s [Σ n_c, m] of the group's layers stacked. As d is, g is the gradient of the
mean loss of the token's own sequence. S_gg of one layer is Wᵀ E[d dᵀ] W; of several it needs what their gradients have in
common, which capture sums up. FASC is built on these (METHODS: section 4).

Shapes: x [m], d_c [n_c], g [m] at one token; S' sequences of a shard with t sampled tokens each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from fisherfold.linalg.weighted_svd import MetricRoot, metric_root
from fisherfold.network.layers import LinearLayer
from fisherfold.network.models import read_weight
from fisherfold.statistics.layer_statistics import Statistics


@dataclass(frozen=True)
class Moments:
    """S_xx, S_xg and S_gg, each [m, m] in float64."""

    xx: torch.Tensor
    xg: torch.Tensor
    gg: torch.Tensor

    @cached_property
    def input_root(self) -> MetricRoot:
        """The root of S_xx, found once."""
        return metric_root(self.xx, 0.0, "E[x xᵀ]")


def stacked_weight(model: Path, group: Sequence[LinearLayer]) -> torch.Tensor:
    """W [Σ n_c, m] of the layers of a group, one below the other, in float64."""
    return torch.cat([read_weight(model, layer).double() for layer in group])


def input_moments(statistics: Statistics, model: Path, group: Sequence[LinearLayer]) -> Moments:
    """The second moments of a group's input and of what it is sent back, over all captured tokens.

    Raises:
        InputError: gradients were not captured (`capture.gradients: none`).
    """
    first, W = group[0], stacked_weight(model, group)
    G = torch.cat([statistics.gradient_sum(layer) for layer in group]).double()
    if len(group) > 1:
        gg = statistics.gradient_gram(first).double() / statistics.tokens
    else:
        gg = W.T @ statistics.output_covariance(first).double() @ W
    return Moments(statistics.input_covariance(first).double(), G.T @ W / statistics.tokens, gg)


def input_gradient_shards(
    statistics: Statistics, model: Path, group: Sequence[LinearLayer]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """x and g [S', t, m] of the sampled tokens, in float64, one shard at a time.

    Raises:
        InputError: no tokens were captured.
    """
    weights = [read_weight(model, layer).double() for layer in group]
    for shards in zip(*(statistics.token_shards(layer) for layer in group)):
        g = sum(d.double() @ W for (_, d, _), W in zip(shards, weights))
        yield shards[0][0].double(), g
