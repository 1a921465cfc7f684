"""Refinement of one block: its gradient, that it helps, and that it is never kept where it does not."""

import pytest
import torch
from torch import nn

from fisherfold.export.refinement import CALMER, passes_over, refine_block, relative_error
from fisherfold.run.params import RefineParams
from fisherfold.runtime.modeling_fisherfold import PivotedOutputLinear

HARMFUL = 8.0  # a rate


def run(block, x):
    return x + block(x)


def problem(seed=0):
    """A dense linear block, its pivoted product of half the rank in a state far from the best, and inputs."""
    generator = torch.Generator().manual_seed(seed)
    dense = nn.Linear(8, 8, bias=False)
    dense.weight.data = torch.randn(8, 8, generator=generator)
    low = PivotedOutputLinear(8, 8, 4, bias=False)
    low.order = torch.randperm(8, generator=generator)
    for parameter in low.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return dense, low, torch.randn(24, 5, 8, generator=generator)


def reader(x, y):
    return (lambda numbers: (x[numbers], y[numbers])), len(x)


@torch.no_grad()
def wanted(dense, x):
    return run(dense, x)


def test_the_gradient_is_that_of_finite_differences():
    dense, low, x = problem()
    low, x = low.double(), x[:2].double()
    y = wanted(dense.double(), x)
    relative_error(run(low, x), y).backward()
    for parameter in low.parameters():
        flat, step = parameter.data.view(-1), 1e-6
        for index in (0, len(flat) - 1):
            values = []
            for sign in (1, -1):
                flat[index] += sign * step
                values.append(float(relative_error(run(low, x), y).detach()))
                flat[index] -= sign * step
            slope = (values[0] - values[1]) / (2 * step)
            assert float(parameter.grad.view(-1)[index]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_a_huge_first_token_counts_as_any_other():
    y = torch.randn(2, 4, 8)
    y[:, 0] *= 1000
    for token in range(4):
        off = y.clone()
        off[:, token] *= 1.1
        assert relative_error(off, y).item() == pytest.approx(0.01 / 4, rel=1e-3)


def test_it_lowers_the_held_out_loss_and_leaves_the_order():
    dense, low, x = problem()
    order, y = low.order.clone(), wanted(dense, x)
    params = RefineParams(passes=20, min_steps=0, rate=1e-2, batch_size=4)
    found = refine_block(low, run, reader(x[:16], y[:16]), reader(x[16:], y[16:]), params)
    assert found.accepted and found.held_out_after < 0.8 * found.held_out_before and found.steps == 80
    assert torch.equal(low.order, order)
    assert float(relative_error(run(low, x[16:]), y[16:])) == pytest.approx(found.held_out_after, rel=1e-5)
    assert not any(parameter.requires_grad for parameter in low.parameters())


@pytest.mark.parametrize(
    ("count", "passes", "found"), [(512, 2, 2), (24, 2, 8), (25, 2, 8), (1, 1, 96), (24, 9, 9), (24, 0, 0)]
)
def test_little_text_is_read_more_often(count, passes, found):
    params = RefineParams(passes=passes, min_steps=96, batch_size=2)
    assert passes_over(count, params) == found


def test_it_is_not_kept_where_the_held_out_loss_rises():
    """Trained on targets of the wrong sign, from the dense block itself."""
    dense, _, x = problem()
    y, before = wanted(dense, x), dense.weight.detach().clone()
    params = RefineParams(passes=3, min_steps=0, rate=1e-2, batch_size=4)
    found = refine_block(dense, run, reader(x[:16], -y[:16]), reader(x[16:], y[16:]), params)
    assert not found.accepted and found.held_out_after > found.held_out_before
    assert torch.equal(dense.weight, before)


def test_a_rate_that_harms_is_followed_by_a_calmer_one():
    found, states = {}, {}
    for rate in (HARMFUL, HARMFUL / CALMER):
        dense, low, x = problem()
        y = wanted(dense, x)
        params = RefineParams(passes=5, min_steps=0, rate=rate, batch_size=4)
        found[rate] = refine_block(low, run, reader(x[:16], y[:16]), reader(x[16:], y[16:]), params)
        states[rate] = low.state_dict()
    assert [each.steps for each in found.values()] == [40, 20] and all(each.accepted for each in found.values())
    assert all(torch.equal(states[HARMFUL][name], value) for name, value in states[HARMFUL / CALMER].items())


def test_same_bits_again():
    states = []
    for _ in range(2):
        dense, low, x = problem()
        y = wanted(dense, x)
        refine_block(low, run, reader(x[:16], y[:16]), reader(x[16:], y[16:]), RefineParams(passes=2, min_steps=0))
        states.append(low.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_no_more_than_a_batch_is_read_at_once():
    dense, low, x = problem()
    y, sizes = wanted(dense, x), set()

    def read(numbers):
        sizes.add(len(numbers))
        return x[numbers], y[numbers]

    refine_block(low, run, (read, 24), (read, 24), RefineParams(passes=1, min_steps=0, batch_size=3))
    assert sizes == {3}
