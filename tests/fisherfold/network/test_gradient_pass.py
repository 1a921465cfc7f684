import pytest
import torch
from tiny import FAMILIES, random_ids, tiny_model

from fisherfold.network.gradient_pass import gradient_pass, loss_gradient
from fisherfold.network.labels import count_draws, drawn_labels
from fisherfold.run.params import CaptureParams


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_shifted_exactly_once(family):
    model = tiny_model(family).requires_grad_(False)
    ids = random_ids(3, 12)
    own = [model(input_ids=sequence[None], labels=sequence[None]).loss for sequence in ids]
    torch.testing.assert_close(gradient_pass(model, ids).losses, torch.stack(own))


def test_the_gradient_is_that_of_the_loss():
    logits = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(1))
    oracle = torch.stack([torch.nn.functional.cross_entropy(logits[s, :-1], ids[s, 1:]) for s in range(2)])
    oracle.sum().backward()
    losses, gradient = loss_gradient(logits.detach(), ids)
    torch.testing.assert_close(losses, oracle.detach())
    torch.testing.assert_close(gradient, logits.grad)


def test_bfloat16_logits_are_turned_to_float32_for_the_loss():
    logits = 8 * torch.randn(2, 7, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.zeros(2, 7, dtype=torch.long)
    losses, gradient = loss_gradient(logits, ids)
    exact, _ = loss_gradient(logits.float(), ids)
    assert torch.equal(losses, exact) and gradient.dtype == torch.bfloat16


def test_a_sequence_that_is_not_finite_is_told_apart():
    model = tiny_model("qwen2").requires_grad_(False)
    ids = random_ids(3, 12).clamp(min=10)
    ids[1, 4] = 7
    model.get_input_embeddings().weight[7] = torch.nan
    result = gradient_pass(model, ids)
    assert result.finite.tolist() == [True, False, True]
    assert result.losses[[0, 2]].isfinite().all()


def test_weights_must_be_frozen():
    with pytest.raises(RuntimeError, match="freeze"):
        gradient_pass(tiny_model(), random_ids(1, 5))


def test_with_labels_of_the_model_the_gradient_s_mean_square_is_the_fisher_of_the_logits():
    """E_y (p − e_y)(p − e_y)ᵀ = diag(p) − p pᵀ, and the losses stay those of the text."""
    draws, tokens = 4000, 5
    logits = torch.randn(1, tokens + 1, 4, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(1, tokens + 1, dtype=torch.long)
    gradients = [loss_gradient(logits, ids, labels=drawn_labels([number], 0)) for number in range(draws)]
    g = torch.stack([gradient[0, :-1] * tokens for _, gradient in gradients])
    p = logits[0, :-1].softmax(-1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close((g[..., None] * g[..., None, :]).mean(0), fisher, atol=0.03, rtol=0)
    assert torch.equal(gradients[0][0], loss_gradient(logits, ids)[0])


def test_drawn_labels_depend_on_the_sequence_and_not_on_its_batch():
    p = torch.rand(6, 50, generator=torch.Generator().manual_seed(0))
    alone, among, other, again = (drawn_labels(*of) for of in (([7], 0), ([3, 7], 0), ([7], 1), ([7], 0, 1)))
    assert torch.equal(alone(0, p), among(1, p))
    assert all(not torch.equal(alone(0, p), labels(0, p)) for labels in (among, other, again))


@pytest.mark.parametrize(
    ("changes", "tokens", "draws"),
    [
        ({"draws": 0}, 256 * 256, 1),
        ({"draws": 0}, 256 * 256 - 1, 2),
        ({"draws": 0}, 24 * 512, 4),
        ({"draws": 0, "labels": "data"}, 24 * 512, 1),
        ({"draws": 3}, 256 * 256, 3),
    ],
)
def test_little_text_is_labelled_more_often(changes, tokens, draws):
    assert count_draws(CaptureParams(**changes), tokens).draws == draws
