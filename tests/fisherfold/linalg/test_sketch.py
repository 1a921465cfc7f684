from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherfold.linalg.sketch import GradientBatch, Sketch, gaussian_probes, orthonormal, products_need_gradient, sketch


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(tokens: int, outputs: int, inputs: int, sequences: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """D, X of gradients whose singular values fall as those of a language model's do."""
    scale = (torch.arange(tokens) + 1.0) ** -0.7
    return draw(sequences, tokens, outputs) * scale[:, None], draw(sequences, tokens, inputs, seed=1)


def sketch_of(D: torch.Tensor, X: torch.Tensor, rank: int, written_out: bool = False, seed: int = 0) -> Sketch:
    G = D.mT @ X
    probes = gaussian_probes(D.shape[-1], X.shape[-1], rank, seed, "layer").to(D)
    norms = G.square().sum((1, 2))
    return sketch(GradientBatch(D, X, G if written_out else None, norms, coarse=nullcontext()), probes)


@given(st.integers(1, 12), st.integers(1, 20), st.integers(1, 20), st.integers(0, 8), st.booleans())
@settings(max_examples=60, deadline=None)
def test_exact_when_the_rank_suffices(tokens, outputs, inputs, beyond, written_out):
    D, X = draw(2, tokens, outputs), draw(2, tokens, inputs, seed=1)
    made = sketch_of(D, X, min(tokens, outputs, inputs) + beyond, written_out)
    torch.testing.assert_close(made.left @ made.right.mT, D.mT @ X, rtol=1e-12, atol=1e-12)
    assert torch.equal(made.kept, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(40, 30, 50), (40, 50, 30), (30, 40, 40)])
@pytest.mark.parametrize("written_out", [False, True])
def test_kept_energy_is_right_and_near_the_best(shape, written_out):
    D, X = decaying(*shape)
    G = D.mT @ X
    made = sketch_of(D, X, 8, written_out)
    approximation = made.left @ made.right.mT
    torch.testing.assert_close(made.kept, approximation.square().sum((1, 2)) / G.square().sum((1, 2)))
    energy = torch.linalg.svdvals(G).square()
    best_loss = energy[:, 8:].sum(1)
    loss = (G - approximation).square().sum((1, 2))
    assert (loss >= best_loss * (1 - 1e-9)).all()
    assert (loss <= 1.35 * best_loss).all()
    torch.testing.assert_close(
        1 - made.kept, loss / G.square().sum((1, 2))
    )  # a projection: what is lost is what is left


@pytest.mark.parametrize("shape", [(40, 30, 50), (40, 50, 30)])
def test_one_side_is_orthonormal(shape):
    made = sketch_of(*decaying(*shape), 8)
    basis = made.left if shape[1] <= shape[2] else made.right
    torch.testing.assert_close(basis.mT @ basis, torch.eye(8, dtype=torch.float64).expand(2, 8, 8))


def test_gradients_of_low_rank_are_exact_too():
    D, X = draw(2, 3, 30).repeat(1, 10, 1), draw(2, 3, 50, seed=1).repeat(1, 10, 1)  # T = 30, rank 3, k = 8
    made = sketch_of(D, X, 8)
    torch.testing.assert_close(made.left @ made.right.mT, D.mT @ X, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made.kept, torch.ones(2, dtype=torch.float64))


def test_a_vanishing_gradient_is_kept_whole():
    made = sketch_of(torch.zeros(1, 40, 30), torch.ones(1, 40, 50), 8)
    assert made.kept == 1 and made.left.isfinite().all() and not (made.left @ made.right.mT).any()


def test_a_batch_changes_nothing_but_rounding():
    D, X = decaying(40, 30, 50, sequences=3)
    together = sketch_of(D, X, 8)
    for s in range(3):
        alone = sketch_of(D[s : s + 1], X[s : s + 1], 8)
        torch.testing.assert_close(alone.left[0] @ alone.right[0].mT, together.left[s] @ together.right[s].mT)


def test_float32_agrees_with_float64():
    D, X = decaying(40, 30, 50)
    single, double = sketch_of(D.float(), X.float(), 8), sketch_of(D, X, 8)
    torch.testing.assert_close(single.kept.double(), double.kept, rtol=1e-4, atol=0)


def test_probes_depend_on_seed_and_layer_only():
    probes = gaussian_probes(30, 50, 8, 0, "a")
    assert torch.equal(probes, gaussian_probes(30, 50, 8, 0, "a")) and probes.shape == (50, 8)
    assert not torch.equal(probes, gaussian_probes(30, 50, 8, 1, "a"))
    assert not torch.equal(probes, gaussian_probes(30, 50, 8, 0, "b"))


def test_values_that_are_not_finite_do_not_stop_the_batch():
    D, X = decaying(40, 30, 50)
    D[0, 0, 0] = torch.nan
    made = sketch_of(D, X, 8)
    assert not made.left[0].isfinite().all() and made.left[1].isfinite().all()


@pytest.mark.parametrize("columns", [1, 5])
def test_orthonormal_spans_the_columns(columns):
    Y = draw(2, 20, columns)
    Y[1, :, -1] = 0
    Q = orthonormal(Y)
    torch.testing.assert_close(Q @ (Q.mT @ Y), Y, rtol=1e-9, atol=1e-9)
    assert not Q[1, :, -1].any()


def test_products_take_the_cheaper_way():
    assert products_need_gradient(256, 192, 576)
    assert not products_need_gradient(256, 1536, 576)
