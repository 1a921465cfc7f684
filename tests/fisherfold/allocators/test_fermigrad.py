import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherfold.allocators.fermigrad import (
    Descent,
    RankBudget,
    Schedule,
    SoftRank,
    SoftTruncatedLinear,
    adam_step,
    by_components,
    dense_network,
    mean_divergence,
    next_token_loss,
    occupation,
    potential_gradient,
    set_ranks,
    soften,
)
from fisherfold.network.layers import find_layers
from fisherfold.network.sites import find_sites

SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)


def budget_of(shapes, share, pivoted, between=(0.0, 1.0)) -> RankBudget:
    """`between`: lowest and highest rank, as shares of the rank range."""
    limit = torch.tensor([min(shape) for shape in shapes], dtype=torch.float64)
    costs = torch.zeros(len(shapes), int(limit.max()) + 1, dtype=torch.float64)
    for row, (n, m) in zip(costs, shapes, strict=True):
        rank = torch.arange(min(n, m) + 1, dtype=torch.float64)
        row[: len(rank)] = rank * (n + m - rank) if pivoted else (rank * (n + m)).clamp(max=n * m)
    least, most = (torch.tensor(bound).mul(limit).floor() for bound in between)
    return RankBudget(costs, limit, least, most, share * sum(n * m for n, m in shapes))


def svd_basis(layer: torch.nn.Linear):
    u, s, v = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    return u * s.sqrt(), s.sqrt()[:, None] * v


def stacked_basis(model, site):
    stacked = torch.nn.Linear(1, 1)
    stacked.weight = torch.nn.Parameter(torch.cat([model.get_submodule(layer.name).weight for layer in site.layers]))
    left, right = svd_basis(stacked)
    return left.split([layer.outputs for layer in site.layers]), right


@given(SHAPES, st.floats(0.05, 0.95), st.booleans(), st.integers(0, 9))
def test_projection_meets_the_budget_and_never_exceeds_it(shapes, share, pivoted, seed):
    budget = budget_of(shapes, share, pivoted)
    mu = torch.rand(len(shapes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * budget.limit
    projected = budget.project(mu)
    spent = float(budget.cost(projected).sum())
    assert (projected >= 0).all()
    assert (projected <= budget.limit).all()
    assert spent <= budget.budget
    assert spent == pytest.approx(budget.budget, rel=1e-9)


@settings(max_examples=20)
@given(SHAPES, st.integers(0, 9))
def test_every_step_keeps_the_budget(shapes, seed):
    budget, schedule = budget_of(shapes, 0.6, True), Schedule(5, 0.1, 0.01, 0.05, 0.01)
    generator = torch.Generator().manual_seed(seed)
    state = Descent.start(budget.project(budget.limit / 2))
    for _ in range(5):
        state = adam_step(state, torch.randn(len(shapes), generator=generator, dtype=torch.float64), budget, schedule)
        assert float(budget.cost(state.mu).sum()) == pytest.approx(budget.budget, rel=1e-9)


def test_lowest_and_highest_ranks_hold_at_every_step():
    """A site that the loss does not miss sinks to its floor, one that it wants most rises to its ceiling; the budget holds."""
    budget, schedule = budget_of([(40, 40)] * 3, 0.6, True, (0.2, 0.5)), Schedule(30, 0.1, 0.01, 0.1, 0.1)
    state = Descent.start(budget.project(budget.limit / 2))
    for _ in range(30):
        state = adam_step(state, torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), budget, schedule)
        assert float(budget.cost(state.mu).sum()) == pytest.approx(budget.budget, rel=1e-9)
    assert state.mu[[0, 2]].tolist() == [8, 20]


def test_zero_temperature_is_truncation():
    layer = torch.nn.Linear(7, 5).double()
    left, right = svd_basis(layer)
    rank = SoftRank(5)
    soft = SoftTruncatedLinear(layer, by_components(left), right, rank)
    x = torch.randn(3, 7, dtype=torch.float64)
    with torch.no_grad():
        rank.mu.fill_(3)
        rank.tau = 1e-6
        truncated = torch.nn.functional.linear(x, left[:, :3] @ right[:3], layer.bias)
        torch.testing.assert_close(soft(x), truncated)
        rank.mu.fill_(1e9)
        torch.testing.assert_close(soft(x), layer(x))


def test_components_that_are_not_computed_are_lost_in_rounding():
    rank = SoftRank(500)
    with torch.no_grad():
        rank.mu.fill_(100.3)
    rank.tau = 2.0
    kept = rank.occupations()
    assert len(kept) == 160
    assert occupation(rank.mu, rank.tau, 500)[160:].max() < torch.finfo(torch.float32).eps
    rank.tau = 50.0
    assert len(rank.occupations()) == 500


def test_gradient_is_the_formula_and_the_finite_difference():
    torch.manual_seed(0)
    layer = torch.nn.Linear(7, 5).double()
    left, right = svd_basis(layer)
    rank = SoftRank(5)
    soft = SoftTruncatedLinear(layer, by_components(left), right, rank)
    x, target = torch.randn(9, 7, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)

    def loss_at(mu: float) -> torch.Tensor:
        with torch.no_grad():
            rank.mu.fill_(mu)
        return (soft(x) - target).square().sum()

    rank.tau = 0.7
    loss_at(2.3).backward()
    with torch.no_grad():
        d = 2 * (soft(x) - target)
        f = occupation(rank.mu, rank.tau, 5)
        formula = (((x @ right.T) * (d @ left)).sum(0) * f * (1 - f) / rank.tau).sum()
        difference = (loss_at(2.3 + 1e-5) - loss_at(2.3 - 1e-5)) / 2e-5
    assert float(rank.mu.grad) == pytest.approx(float(formula), rel=1e-12)
    assert float(rank.mu.grad) == pytest.approx(float(difference), rel=1e-7)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("loss", [mean_divergence, next_token_loss])
def test_all_potentials_of_a_model_by_finite_differences(family, loss, shared):
    model, dense = (tiny.tiny_model(family).double().requires_grad_(False) for _ in range(2))
    for parameter in (*model.parameters(), *dense.parameters()):
        parameter.mul_(8)  # RMSNorm rounds to float32: make the signal larger than that
    sites = find_sites(find_layers(dense), shared)
    ranks = soften(model, lambda site: stacked_basis(dense, site), sites)
    ids = tiny.random_ids(2, 10)
    with dense_network(ranks):
        reference = model(ids).logits
    torch.testing.assert_close(reference, dense(ids).logits)

    def loss_at(mu: torch.Tensor) -> torch.Tensor:
        set_ranks(ranks, mu, 0.1)
        return loss(reference, model(ids).logits, ids)

    mu = torch.full((len(sites),), 6.0, dtype=torch.float64)
    loss_at(mu).backward()
    gradient = potential_gradient(ranks)
    for index in (0, 3, len(sites) - 1):
        step = torch.zeros_like(mu)
        step[index] = 1e-2
        with torch.no_grad():
            difference = float(loss_at(mu + step) - loss_at(mu - step)) / 2e-2
        assert float(gradient[index]) == pytest.approx(difference, rel=2e-2)


def test_two_steps_are_torch_s_adam_of_what_the_budget_does_not_see():
    """In shares of each rank range, less the multiple of the price that least squares in these shares finds."""
    shapes, schedule = [(30, 20), (12, 50), (40, 40)], Schedule(5, 0.1, 0.01, 0.05, 0.01)
    budget = budget_of(shapes, 0.5, True)
    state = Descent.start(budget.project(0.4 * budget.limit))
    moved = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    adam = torch.optim.Adam([moved], lr=1.0, betas=(0.9, 0.95), eps=1e-30)
    for step, gradient in enumerate(torch.tensor([[3.0, -1.0, 0.5], [-0.2, 0.1, 0.7]], dtype=torch.float64)):
        in_shares, price = budget.limit * gradient, budget.limit * budget.price(state.mu)
        before = moved.detach().clone()
        moved.grad = in_shares - price * (in_shares @ price) / (price @ price)
        adam.step()
        rate = 0.05 * (0.01 / 0.05) ** (step / 4)
        expected = budget.project(state.mu + rate * budget.limit * (moved.detach() - before))
        state = adam_step(state, gradient, budget, schedule)
        torch.testing.assert_close(state.mu, expected, rtol=0, atol=1e-9)


def test_temperature_and_rate_fall_geometrically_from_the_first_step_to_the_last():
    schedule = Schedule(5, 0.16, 0.01, 0.5, 0.5)
    assert [schedule.tau(step) for step in range(5)] == pytest.approx([0.16, 0.08, 0.04, 0.02, 0.01])
    assert [schedule.rate(step) for step in (0, 4)] == [0.5, 0.5]
    assert Schedule(1, 0.3, 0.1, 0.2, 0.1).tau(0) == 0.3
