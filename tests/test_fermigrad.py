import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.fermigrad import (
    Descent,
    RankBudget,
    Schedule,
    SoftTruncatedLinear,
    adam_step,
    dense_network,
    divergence,
    next_token_loss,
    occupation,
    potential_gradient,
    set_occupations,
    soften,
)

SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)


def budget_of(shapes, share, pivoted) -> RankBudget:
    limit = torch.tensor([min(shape) for shape in shapes], dtype=torch.float64)
    costs = torch.zeros(len(shapes), int(limit.max()) + 1, dtype=torch.float64)
    for row, (n, m) in zip(costs, shapes, strict=True):
        rank = torch.arange(min(n, m) + 1, dtype=torch.float64)
        row[: len(rank)] = rank * (n + m - rank) if pivoted else (rank * (n + m)).clamp(max=n * m)
    return RankBudget(costs, limit, share * sum(n * m for n, m in shapes))


def svd_basis(layer: torch.nn.Linear):
    u, s, v = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    return u * s.sqrt(), s.sqrt()[:, None] * v


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


def test_zero_temperature_is_truncation():
    layer = torch.nn.Linear(7, 5).double()
    soft = SoftTruncatedLinear(layer, *svd_basis(layer))
    x = torch.randn(3, 7, dtype=torch.float64)
    with torch.no_grad():
        soft.mu.fill_(3)
        soft.tau = 1e-6
        truncated = torch.nn.functional.linear(x, soft.left[:, :3] @ soft.right[:3], layer.bias)
        torch.testing.assert_close(soft(x), truncated)
        soft.mu.fill_(1e9)
        torch.testing.assert_close(soft(x), layer(x))


def test_gradient_is_the_formula_and_the_finite_difference():
    torch.manual_seed(0)
    layer = torch.nn.Linear(7, 5).double()
    soft = SoftTruncatedLinear(layer, *svd_basis(layer))
    x, target = torch.randn(9, 7, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)

    def loss_at(mu: float) -> torch.Tensor:
        with torch.no_grad():
            soft.mu.fill_(mu)
        return (soft(x) - target).square().sum()

    soft.tau = 0.7
    loss_at(2.3).backward()
    with torch.no_grad():
        d = 2 * (soft(x) - target)
        f = occupation(soft.mu, soft.tau, 5)
        formula = (((x @ soft.right.T) * (d @ soft.left)).sum(0) * f * (1 - f) / soft.tau).sum()
        difference = (loss_at(2.3 + 1e-5) - loss_at(2.3 - 1e-5)) / 2e-5
    assert float(soft.mu.grad) == pytest.approx(float(formula), rel=1e-12)
    assert float(soft.mu.grad) == pytest.approx(float(difference), rel=1e-7)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("loss", [divergence, next_token_loss])
def test_all_potentials_of_a_model_by_finite_differences(family, loss):
    model, dense = (tiny.tiny_model(family).double().requires_grad_(False) for _ in range(2))
    for parameter in (*model.parameters(), *dense.parameters()):
        parameter.mul_(8)  # RMSNorm rounds to float32: make the signal larger than that
    names = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]
    layers = soften(model, lambda name: svd_basis(dense.get_submodule(name)), names)
    ids = tiny.random_ids(2, 10)
    with dense_network(layers):
        reference = model(ids).logits
    torch.testing.assert_close(reference, dense(ids).logits)

    def loss_at(mu: torch.Tensor) -> torch.Tensor:
        set_occupations(layers, mu, 0.1)
        return loss(reference, model(ids).logits, ids)

    mu = torch.full((len(names),), 6.0, dtype=torch.float64)
    loss_at(mu).backward()
    gradient = potential_gradient(layers)
    for index in (0, 3, len(names) - 1):
        step = torch.zeros_like(mu)
        step[index] = 1e-2
        with torch.no_grad():
            difference = float(loss_at(mu + step) - loss_at(mu - step)) / 2e-2
        assert float(gradient[index]) == pytest.approx(difference, rel=2e-2)
