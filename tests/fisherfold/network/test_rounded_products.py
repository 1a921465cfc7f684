"""Linear layers that multiply in bfloat16: by how much they err, and that nothing else does."""

import pytest
import torch
from torch import nn

from fisherfold.network import rounded_products as module
from fisherfold.network.rounded_products import rounded_products

STEP = 2**-9


@pytest.fixture(autouse=True)
def units(monkeypatch):
    monkeypatch.setattr(module, "has_bfloat16_units", lambda: True)


def layer():
    torch.manual_seed(0)
    return nn.Linear(64, 48), torch.randn(5, 64, requires_grad=True)


def test_values_and_gradients_are_off_by_a_rounding_and_stay_float32():
    linear, x = layer()
    exact = linear(x)
    wanted = torch.autograd.grad(exact.square().sum(), (x, linear.weight, linear.bias))
    with rounded_products([linear], "bfloat16"):
        found = linear(x)
        slopes = torch.autograd.grad(found.square().sum(), (x, linear.weight, linear.bias))
    for rounded, right in zip((found, *slopes), (exact, *wanted), strict=True):
        assert rounded.dtype == torch.float32
        assert 0 < (rounded - right).norm() < 4 * STEP * right.norm()


def test_afterwards_everything_is_as_it_was():
    linear, x = layer()
    exact = linear(x)
    with pytest.raises(RuntimeError), rounded_products([linear], "bfloat16"):
        raise RuntimeError
    assert torch.equal(linear(x), exact) and "forward" not in vars(linear)


@pytest.mark.parametrize("units", [True, False])
def test_products_in_float32_are_float32(monkeypatch, units):
    monkeypatch.setattr(module, "has_bfloat16_units", lambda: units)
    linear, x = layer()
    exact = linear(x)
    with rounded_products([linear], "float32" if units else "bfloat16"):
        assert torch.equal(linear(x), exact)


def test_other_modules_and_dtypes_multiply_as_ever():
    class Own(nn.Linear):
        pass

    double, own = nn.Linear(8, 8).double(), Own(8, 8)
    x = torch.randn(3, 8)
    expected = double(x.double()), own(x)
    with rounded_products([nn.ModuleList([double, own])], "bfloat16"):
        assert torch.equal(double(x.double()), expected[0]) and torch.equal(own(x), expected[1])
