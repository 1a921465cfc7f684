"""Pivoted layers trained as plain factors: the same function, in the balanced gauge, and back in the order they had."""

import copy

import pytest
import torch
from torch import nn

from fisherfold.export.free_factors import balanced, free_factors, pivot_again
from fisherfold.runtime.modeling_fisherfold import LowRankLinear, PivotedInputLinear, PivotedOutputLinear

SIDES = pytest.mark.parametrize("side", [PivotedOutputLinear, PivotedInputLinear])


def block(side: type[nn.Module], deficient: bool = False) -> nn.Sequential:
    """A pivoted layer of 11 outputs, 7 inputs and rank 4 (of which its product has 2, if deficient), with a bias."""
    torch.manual_seed(0)
    layer = side(11, 7, 4, True)
    for parameter in layer.parameters():
        parameter.data.normal_()
    layer.order = torch.randperm(len(layer.order))
    free = layer.down if side is PivotedOutputLinear else layer.up
    if deficient:
        free.weight.data = free.weight.data * 0 + torch.outer(*(torch.randn(size) for size in free.weight.shape))
    layer.weight = torch.empty(0, 7)
    return nn.Sequential(layer).requires_grad_(False)


@SIDES
@pytest.mark.parametrize("deficient", [False, True])
def test_the_function_is_the_same_free_and_pivoted_again(side, deficient):
    stored, x = block(side, deficient), torch.randn(5, 7)
    order, expected = stored[0].order.clone(), stored(x)
    pivoted = free_factors(stored)
    assert type(stored[0]) is LowRankLinear and stored[0].weight.shape == (0, 7)
    torch.testing.assert_close(stored(x), expected, rtol=1e-4, atol=1e-5)
    pivot_again(stored, pivoted)
    assert type(stored[0]) is side and torch.equal(stored[0].order, order)
    torch.testing.assert_close(stored(x), expected, rtol=1e-4, atol=1e-5)


@SIDES
def test_what_was_trained_is_what_is_pivoted(side):
    stored, x = block(side), torch.randn(5, 7)
    pivoted = free_factors(stored)
    for parameter in stored.parameters():
        parameter += 0.1 * torch.randn(parameter.shape)
    expected = stored(x)
    pivot_again(stored, pivoted)
    torch.testing.assert_close(stored(x), expected, rtol=1e-4, atol=1e-5)


@SIDES
def test_what_was_not_trained_keeps_its_bits(side):
    stored = block(side)
    before = copy.deepcopy(stored.state_dict())
    pivot_again(stored, free_factors(stored), trained=False)
    assert all(torch.equal(before[name], value) for name, value in stored.state_dict().items())


def test_balanced_factors_have_equal_diagonal_grams_of_the_singular_values():
    torch.manual_seed(0)
    L, R = torch.randn(9, 4).double(), torch.randn(4, 6).double()
    left, right = balanced(L, R)
    S = torch.linalg.svdvals(L @ R)[:4].flip(0)
    torch.testing.assert_close(left @ right, L @ R)
    torch.testing.assert_close(left.T @ left, S.diag(), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(right @ right.T, S.diag(), atol=1e-9, rtol=1e-9)


def test_layers_of_other_kinds_are_left():
    plain = nn.Sequential(LowRankLinear(5, 4, 2, False), nn.Linear(5, 5))
    assert free_factors(plain) == {}
