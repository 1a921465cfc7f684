"""KL(p ‖ q) and its gradient, against torch's own."""

import pytest
import torch
from torch.nn.functional import kl_div

from fisherfold.network.divergence import divergence


def logits(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def by_torch(wanted, found):
    return kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("shape", [(7,), (4, 7), (3, 4, 7), (0, 4, 7)])
def test_values_and_gradients_are_torchs(shape):
    wanted, found = logits(*shape)
    found.requires_grad_()
    ours, theirs = divergence(wanted, found), by_torch(wanted, found)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.rand(shape[:-1], dtype=torch.float64)
    slopes = [torch.autograd.grad((weights * value).sum(), found)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences():
    wanted, found = logits(2, 3, 5)
    assert torch.autograd.gradcheck(lambda q: divergence(wanted, q), found.requires_grad_())


def test_part_of_a_batch_as_a_view():
    wanted, found = logits(3, 6, 7)
    torch.testing.assert_close(divergence(wanted[:, :-1], found[:, :-1]), by_torch(wanted, found)[:, :-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_of_few_digits_are_compared_in_float32_and_get_gradients_of_their_own(dtype):
    wanted, found = logits(2, 3, 50, dtype=dtype)
    found.requires_grad_()
    nats = divergence(wanted, found)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, by_torch(wanted.float(), found.float()), rtol=1e-5, atol=1e-6)
    nats.sum().backward()
    assert found.grad.dtype == dtype


def test_the_same_predictions_are_no_way_apart():
    wanted, _ = logits(2, 3, 7)
    assert divergence(wanted, wanted).abs().max() < 1e-12


def test_without_a_gradient_none_is_made():
    wanted, found = logits(2, 3, 7)
    with torch.inference_mode():
        assert not divergence(wanted, found).requires_grad
