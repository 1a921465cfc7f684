"""FASC's objectives and their minimisers against dense oracles."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherfold.statistics.input_gradients import Moments
from fisherfold.subspaces.projectors import (
    Basis,
    Empirical,
    Gaussian,
    balanced_basis,
    best_start,
    descend,
    greedy_order,
    losses,
    nested,
    orthonormal_bases,
    printed_basis,
    variance_basis,
)


def coupled(tokens: int, size: int, seed: int = 0, coupling: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal x and g [N, m], each with a spectrum of its own, that have a part in common."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).double()

    common, scales = draw(tokens, size), torch.logspace(0, -1.5, size).double()
    x = common @ (draw(size, size) * scales)
    return x, (coupling * common + draw(tokens, size)) @ (draw(size, size) * scales.flip(0))


def moments_of(x: torch.Tensor, g: torch.Tensor) -> Moments:
    return Moments(x.T @ x / len(x), x.T @ g / len(x), g.T @ g / len(x))


def over(x: torch.Tensor, g: torch.Tensor, parts: int = 1) -> Empirical:
    return Empirical(lambda: zip(x.chunk(parts), g.chunk(parts)))


def identity(size: int) -> torch.Tensor:
    return torch.eye(size).double()


def all_bases(moments: Moments) -> dict[str, Basis]:
    generator = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(len(moments.xx), len(moments.xx), generator=generator).double()).Q
    return {
        "variance": variance_basis(moments),
        "balanced": balanced_basis(moments),
        "printed": printed_basis(moments, True),
        "printed oblique": printed_basis(moments, False),
        "random": Basis(Q, Q.T),
    }


def test_the_printed_surrogate_is_not_the_objective():
    """x and g independent ±1 in two dimensions, P = diag(1, 0): the objective is 1, the factored form 2, the surrogate 0."""
    values = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4))).double()
    x, g = values[:, :2], values[:, 2:]
    M = torch.tensor([[0.0, 0.0], [0.0, 1.0]]).double()
    moments = moments_of(x, g)
    assert over(x, g).loss_and_gradient(M)[0] == pytest.approx(1)
    assert Gaussian(moments).loss_and_gradient(M)[0] == pytest.approx(1)
    factored = (x @ M.T).square().sum(1).mean() * g.square().sum(1).mean()
    assert factored.item() == pytest.approx(2)
    printed = torch.linalg.multi_dot([M.T, moments.xg, moments.gg, moments.xg.T, M]).trace()  # as FASC has it
    assert printed == 0


def test_isserlis_against_monte_carlo():
    """10⁵ normal tokens: within five standard errors of the mean of z², each about √2 f / √N or less than 3 f / √N."""
    size, count = 6, 100_000
    x, g = coupled(count, size, coupling=1.0)
    M = identity(size) - variance_basis(moments_of(x, g)).projector(2)
    sampled, normal = over(x, g).loss_and_gradient(M)[0], Gaussian(moments_of(x, g)).loss_and_gradient(M)[0]
    assert abs(sampled / normal - 1) < 5 * 3 / count**0.5
    parts = Gaussian(moments_of(x, g)).moments
    middle = torch.trace(M @ parts.xx @ M.T @ parts.gg).item()
    assert abs(sampled / middle - 1) > 10 * 3 / count**0.5  # the other two terms are no rounding


@pytest.mark.parametrize("make", [lambda x, g: Gaussian(moments_of(x, g)), lambda x, g: over(x, g, 3)])
def test_gradient_is_that_of_the_loss(make):
    objective, generator = make(*coupled(50, 5)), torch.Generator().manual_seed(2)
    M, D = torch.randn(2, 5, 5, generator=generator).double()
    _, gradient = objective.loss_and_gradient(M)
    ahead, behind = (objective.loss_and_gradient(M + sign * 1e-6 * D)[0] for sign in (1, -1))
    assert (ahead - behind) / 2e-6 == pytest.approx((gradient * D).sum().item(), rel=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 9), st.integers(0, 100), st.booleans())
def test_losses_are_those_of_the_projectors(size, seed, gaussian):
    x, g = coupled(40, size, seed)
    objective = Gaussian(moments_of(x, g)) if gaussian else over(x, g, 4)
    for basis in all_bases(moments_of(x, g)).values():
        torch.testing.assert_close(basis.right @ basis.left, identity(size), rtol=0, atol=1e-6)
        found = losses(objective, basis)
        for rank in range(size + 1):
            expected = objective.loss_and_gradient(identity(size) - basis.projector(rank))[0]
            assert found[rank].item() == pytest.approx(expected, rel=1e-6, abs=1e-6 * found[0].item())


def test_balanced_truncation_is_the_best_oblique_projector_of_the_middle_term():
    moments = moments_of(*coupled(300, 8))
    middle = Gaussian(Moments(moments.xx, torch.zeros_like(moments.xg), moments.gg))
    for rank in range(1, 8):
        start = balanced_basis(moments)
        best = losses(middle, start)[rank].item()
        assert all(best <= losses(middle, basis)[rank].item() * (1 + 1e-9) for basis in all_bases(moments).values())
        moved = losses(middle, descend(middle, start, rank, 30, False))[rank].item()
        assert moved == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("orthonormal", [True, False])
@pytest.mark.parametrize("gaussian", [True, False])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_a_minimiser_is_never_worse_than_any_other_projector(orthonormal, gaussian, rank):
    x, g = coupled(200, 8)
    moments = moments_of(x, g)
    objective = Gaussian(moments) if gaussian else over(x, g, 3)
    others = {name: basis for name, basis in all_bases(moments).items() if not orthonormal or "alanced" not in name}
    others = {name: basis for name, basis in others.items() if not (orthonormal and "oblique" in name)}
    start = best_start(objective, [*others.values(), *orthonormal_bases(moments)], rank)
    found = nested(objective, descend(objective, start, rank, 40, orthonormal), rank)
    reached = losses(objective, found)[rank].item()
    for basis in [*others.values(), start]:
        assert reached <= losses(objective, basis)[rank].item() * (1 + 1e-9)
    P = found.projector(rank)
    torch.testing.assert_close(P @ P, P, rtol=0, atol=1e-8)
    if orthonormal:
        torch.testing.assert_close(P, P.T, rtol=0, atol=1e-8)
    slopes = descend(objective, found, rank, 40, orthonormal)
    assert losses(objective, slopes)[rank].item() > 0.9 * reached  # another run finds little more


def test_an_orthonormal_minimiser_in_two_dimensions_is_the_best_angle():
    x, g = coupled(500, 2, seed=3)
    objective = over(x, g)
    angles = torch.linspace(0, torch.pi, 2001).double()
    directions = torch.stack([angles.cos(), angles.sin()], 1)
    best = min(objective.loss_and_gradient(identity(2) - torch.outer(v, v))[0] for v in directions)
    start = best_start(objective, orthonormal_bases(moments_of(x, g)), 1)
    assert losses(objective, descend(objective, start, 1, 50, True))[1].item() <= best * (1 + 1e-6)


def test_greedy_order_is_that_of_exhaustive_steps():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, 6, generator=generator).double()
    K = z.T @ z / 50
    order, cost = greedy_order(K)
    for kept in range(6):
        dropped = order[kept:]
        assert cost[kept] == pytest.approx(K[dropped][:, dropped].sum().item())
        options = [[*order[kept + 1 :], one] for one in order[: kept + 1]]
        assert cost[kept] <= min(K[some][:, some].sum().item() for some in options) * (1 + 1e-9)
    assert cost[6] == 0


def test_singular_moments_and_an_input_that_is_zero():
    x, g = coupled(100, 6)
    x[:, 3:], g[:, :2] = 0, 0  # x and g meet in one direction only
    moments = moments_of(x, g)
    for basis in (balanced_basis(moments), variance_basis(moments), printed_basis(moments, True)):
        torch.testing.assert_close(basis.right @ basis.left, identity(6), rtol=0, atol=1e-5)
    assert (
        losses(Gaussian(moments), balanced_basis(moments))[1].item()
        < 1e-12 * losses(Gaussian(moments), balanced_basis(moments))[0].item()
    )
    nothing = Gaussian(moments_of(torch.zeros(4, 3).double(), torch.zeros(4, 3).double()))
    assert not losses(nothing, variance_basis(nothing.moments)).any()
    assert descend(nothing, variance_basis(nothing.moments), 1, 5, True) is not None
