"""FermiGrad: all ranks found together by gradient descent through a Fermi function (arXiv 2512.03062).

Site l (see ``fisherfold.network.sites``) keeps component i (i = 0 …, in the metric's basis, W = left @ right) with the soft occupation

    f_i(μ_l) = 1 / (1 + exp((i + ½ − μ_l) / τ)),

so μ_l is a rank and τ a temperature in the same unit; as τ → 0 the site is truncated to its first μ_l components. All μ
descend one loss of the whole network, KL(dense ‖ soft-truncated) or the cross-entropy, with everything else frozen. The
budget is held exactly at every step: after the step, μ is moved onto the surface Σ_l cost_l(μ_l) = budget.

The paper leaves schedule, optimiser and data open; ours: Adam, its step and τ measured in shares of each site's
rank range and annealed together.

Shapes: x [T, m], left [n, r], right [r, m], f [r]; T tokens, r = min(n, m).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from fisherfold.network.divergence import divergence, precise
from fisherfold.network.sites import Site
from fisherfold.network.weights_on_call import left_on_disk

BISECTIONS = 60  # halvings of the interval of a scalar: more than float64 resolves


def occupation(mu: torch.Tensor, tau: float | torch.Tensor, count: int) -> torch.Tensor:
    """Occupations f [count] of the first components at chemical potential `mu` and temperature `tau`, in rank units."""
    index = torch.arange(count, dtype=mu.dtype, device=mu.device) + 0.5
    return torch.sigmoid((mu - index) / tau)


class SoftRank(nn.Module):
    """The soft rank of one site: μ, the only parameter that gets a gradient, and τ; both in rank units.

    Attributes:
        full_rank: r.
        soft: off, the site's layers compute what the dense ones do.
    """

    NEGLIGIBLE = 17.0  # temperatures above μ; exp(-17) is below the resolution of float32
    RUN = (
        32  # components: the sizes that matrix products are fast at, and so few that a product is seldom of a new size
    )

    def __init__(self, full_rank: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.full_rank = full_rank
        self.mu = nn.Parameter(torch.tensor(float(full_rank), dtype=torch.float64, device=device))
        self.tau = 1.0
        self.soft = True

    def occupations(self) -> torch.Tensor:
        """f of the first components, as many as are not lost in rounding; float64."""
        seen = math.ceil(float(self.mu.detach()) + self.NEGLIGIBLE * self.tau)
        return occupation(self.mu, self.tau, min(self.full_rank, self.RUN * math.ceil(seen / self.RUN)))


class SoftTruncatedLinear(nn.Module):
    """y = left (f ∘ (right x)) + bias, f the occupations of the site's components; the dense layer while the rank is not soft.

    ∂L/∂μ = Σ_i f_i (1 − f_i) / τ · Σ_t (right_i x_t)(left_iᵀ d_t), summed over the layers of the site.

    Args:
        dense: the layer that is replaced.
        left, right: [r, n], see `by_components`, and [r, m]; `right` and `rank` may be those of other layers too.
    """

    left: torch.Tensor
    right: torch.Tensor

    def __init__(self, dense: nn.Module, left: torch.Tensor, right: torch.Tensor, rank: SoftRank) -> None:
        super().__init__()
        self.dense, self.rank = dense, rank
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Left factor, soft occupations, right factor: y = L (f ∘ (R x))."""
        if not self.rank.soft:
            return self.dense(x)
        kept = self.rank.occupations().to(x.dtype)
        return linear(
            linear(x, self.right[: len(kept)]) * kept,
            self.left[: len(kept)].T,
            cast(torch.Tensor | None, self.dense.bias),
        )


@dataclass(frozen=True)
class RankBudget:
    """The surface Σ_l cost_l(μ_l) = budget, for real ranks least_l ≤ μ_l ≤ most_l.

    Attributes:
        costs: cost at every whole rank 0 … limit_l, float64 [L, R], linear in between, never falling.
        limit: the full rank of each site, float64 [L]: what shares of its rank range are of.
        least, most: the lowest and the highest rank that each site may have, float64 [L]; all at the lowest cost no more than `budget`.
        budget: cost of all sites together.
    """

    costs: torch.Tensor
    limit: torch.Tensor
    least: torch.Tensor
    most: torch.Tensor
    budget: float

    def cost(self, mu: torch.Tensor) -> torch.Tensor:
        """Cost of each site at real rank `mu`, [L]."""
        below = mu.floor()
        return self._at(below) + (mu - below) * self.price(mu)

    def price(self, mu: torch.Tensor) -> torch.Tensor:
        """∂cost/∂μ of each site, [L]: what the next whole rank costs."""
        below = torch.minimum(mu.floor(), self.limit - 1)
        return self._at(below + 1) - self._at(below)

    def project(self, mu: torch.Tensor) -> torch.Tensor:
        """Move `mu` onto the budget by one scalar s: clip(μ_l + s · limit_l, least_l, most_l), s by bisection from below."""
        low, high = -float((mu / self.limit).max()), 1.0 - float((mu / self.limit).min())
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            fits = float(self.cost(self._shift(mu, middle)).sum()) <= self.budget
            low, high = (middle, high) if fits else (low, middle)
        return self._shift(mu, low)

    def _shift(self, mu: torch.Tensor, shift: float) -> torch.Tensor:
        return torch.minimum(torch.maximum(mu + shift * self.limit, self.least), self.most)

    def _at(self, rank: torch.Tensor) -> torch.Tensor:
        return self.costs.gather(1, rank.long()[:, None]).squeeze(1)


@dataclass(frozen=True)
class Descent:
    """The state between two steps: everything that the next one needs. Vectors are float64 [L]."""

    step: int
    mu: torch.Tensor
    first_moment: torch.Tensor
    second_moment: torch.Tensor

    @classmethod
    def start(cls, mu: torch.Tensor) -> "Descent":
        """Before the first step, from the ranks of a closed-form allocation."""
        return cls(0, mu.double(), torch.zeros_like(mu, dtype=torch.float64), torch.zeros_like(mu, dtype=torch.float64))


@dataclass(frozen=True)
class Schedule:
    """Temperature and step size, geometric from first to last step, as shares of each site's rank range."""

    steps: int
    tau_first: float
    tau_last: float
    rate_first: float
    rate_last: float

    def tau(self, step: int) -> float:
        """The temperature of a step, as a share of the rank range."""
        return _geometric(self.tau_first, self.tau_last, step, self.steps)

    def rate(self, step: int) -> float:
        """The rate of a step, as a share of the rank range."""
        return _geometric(self.rate_first, self.rate_last, step, self.steps)


def _geometric(first: float, last: float, step: int, steps: int) -> float:
    return first * (last / first) ** (step / max(1, steps - 1))


def adam_step(
    state: Descent,
    gradient: torch.Tensor,
    budget: RankBudget,
    schedule: Schedule,
    betas: tuple[float, float] = (0.9, 0.95),
) -> Descent:
    """One Adam step of all μ in units of each site's rank range, then back onto the budget.

    The component of the gradient along the budget's own gradient is taken out first: it asks only for more budget.

    Args:
        gradient: ∂L/∂μ, float64 [L].
    """
    scaled = budget.limit * _along_budget(gradient, state.mu, budget)
    first = betas[0] * state.first_moment + (1 - betas[0]) * scaled
    second = betas[1] * state.second_moment + (1 - betas[1]) * scaled.square()
    count = state.step + 1
    direction = (first / (1 - betas[0] ** count)) / ((second / (1 - betas[1] ** count)).sqrt() + 1e-30)
    moved = state.mu - schedule.rate(state.step) * budget.limit * direction
    return Descent(count, budget.project(moved), first, second)


def _along_budget(gradient: torch.Tensor, mu: torch.Tensor, budget: RankBudget) -> torch.Tensor:
    """The gradient less λ ∂cost/∂μ, λ the least-squares exchange rate of loss against cost."""
    price = budget.price(mu)
    weight = budget.limit.square()  # the step's own metric: shares of the rank range
    exchange = (weight * gradient * price).sum() / (weight * price.square()).sum().clamp(min=1e-300)
    return gradient - exchange * price


Basis = Callable[[Site], tuple[Sequence[torch.Tensor], torch.Tensor]]
"""Site -> left_c [n_c, r] of each of its layers, and right [r, m]."""


def soften(model: nn.Module, bases: Basis, sites: Sequence[Site]) -> list[SoftRank]:
    """Replace the layers of `sites` in `model`, in place, by soft-truncated ones; return the sites' ranks in this order."""
    return [_soften_site(model, site, bases) for site in sites]


def _soften_site(model: nn.Module, site: Site, bases: Basis) -> SoftRank:
    """Replace the layers of a site; factors of a model that reads its weights on call are read with them."""
    weight = cast(torch.Tensor, model.get_submodule(site.name).weight)
    lefts, right = bases(site)

    def read_right() -> torch.Tensor:
        return bases(site)[1].to(weight)

    rank, right = SoftRank(len(right), weight.device), left_on_disk(model, right.to(weight), read_right)
    for number, (layer, left) in enumerate(zip(site.layers, lefts, strict=True)):

        def read_left(number: int = number) -> torch.Tensor:
            return by_components(bases(site)[0][number].to(weight))

        dense = model.get_submodule(layer.name)
        own = left_on_disk(model, by_components(left.to(weight)), read_left)
        model.set_submodule(layer.name, SoftTruncatedLinear(dense, own, right, rank))
    return rank


def by_components(left: torch.Tensor) -> torch.Tensor:
    """left [n, r] as [r, n]: what its first components hold lies together."""
    return left.T.contiguous()


@contextmanager
def dense_network(ranks: Sequence[SoftRank]) -> Iterator[None]:
    """While this lasts, the softened network computes what the dense one does, without gradients."""
    for rank in ranks:
        rank.soft = False
    try:
        with torch.no_grad():
            yield
    finally:
        for rank in ranks:
            rank.soft = True


def set_ranks(ranks: Sequence[SoftRank], mu: torch.Tensor, tau_share: float) -> None:
    """Give every site its μ, and τ as a share of its rank range."""
    with torch.no_grad():
        for rank, value in zip(ranks, mu.tolist(), strict=True):
            rank.mu.fill_(value)
            rank.mu.grad = None
            rank.tau = tau_share * rank.full_rank


def potential_gradient(ranks: Sequence[SoftRank]) -> torch.Tensor:
    """∂L/∂μ of all sites after a backward pass, float64 [L]: the only vector that data-parallel workers exchange."""
    return torch.stack([cast(torch.Tensor, rank.mu.grad).cpu() for rank in ranks])


def mean_divergence(dense_logits: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """KL(dense ‖ soft-truncated), mean over tokens, in nats."""
    return divergence(dense_logits, logits).mean()


def next_token_loss(dense_logits: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token (one shift), mean over tokens, in nats."""
    return cross_entropy(precise(logits)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
