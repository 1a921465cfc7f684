"""Nearest Kronecker product against the dense oracle: F and its rearrangement formed, the pair by a dense SVD."""

import pytest
import torch
from dense_fisher import dense_fisher, symmetric_sigmas, van_loan
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherfold.fisher.gradient_blocks import ExactGradients, SketchedGradients, TokenGradients, symmetric_product
from fisherfold.fisher.nearest_kronecker import KroneckerPair, leading_sigmas, nearest_kronecker, relative_residual
from fisherfold.fisher.streamed_fisher import SpannedFisher, StreamedFisher, fisher_of
from fisherfold.linalg.leading_pairs import lanczos

N, M = 5, 4  # outputs, inputs


def random_sketch(
    sequences: int, rank: int, outputs: int = N, inputs: int = M, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """U [S, n, k], V [S, m, k] with a decaying spectrum, so that the power steps converge quickly."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(sequences, outputs, rank, generator=generator, dtype=dtype)
    right = torch.randn(sequences, inputs, rank, generator=generator, dtype=dtype)
    return left * torch.logspace(0, -1, outputs, dtype=dtype)[:, None], right * torch.logspace(
        0, -1, inputs, dtype=dtype
    )[:, None]


def forms(left: torch.Tensor, right: torch.Tensor) -> dict[str, StreamedFisher | SpannedFisher]:
    gradient = left @ right.mT
    pieces = [slice(low, low + 3) for low in range(0, len(left), 3)]
    return {
        "spanned": SpannedFisher(SketchedGradients(left, right)),
        "streamed": StreamedFisher(lambda: [SketchedGradients(left, right)]),
        "sharded": StreamedFisher(lambda: (SketchedGradients(left[piece], right[piece]) for piece in pieces)),
        "exact": StreamedFisher(lambda: [ExactGradients(gradient)]),
        "exact, sharded": StreamedFisher(lambda: (ExactGradients(gradient[piece]) for piece in pieces)),
    }


def solve(fisher: StreamedFisher | SpannedFisher, inputs: int = M, dtype: torch.dtype = torch.float64) -> KroneckerPair:
    return nearest_kronecker(fisher, torch.eye(inputs, dtype=dtype), 500, 1e-12)


@pytest.mark.parametrize("form", forms(*random_sketch(2, 2)))
@pytest.mark.parametrize("rank", [1, 2, 4, 7])
def test_equals_the_dense_svd_of_the_rearranged_fisher(form: str, rank: int) -> None:
    left, right = random_sketch(8, rank)
    F = dense_fisher(left @ right.mT)
    A, B, sigma = van_loan(F, N, M)
    pair = solve(forms(left, right)[form])
    assert pair.converged
    assert pair.norm == pytest.approx(sigma, rel=1e-10)
    torch.testing.assert_close(pair.A, A * sigma**0.5, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(pair.B, B * sigma**0.5, atol=1e-6, rtol=1e-6)
    explicit = (F - torch.kron(pair.A, pair.B)).norm() / F.norm()
    assert pair.residual == pytest.approx(explicit.item(), rel=1e-8)
    assert pair.fisher_norm == pytest.approx(F.norm().item(), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    sequences=st.integers(1, 6),
    rank=st.integers(1, 5),
    outputs=st.integers(1, 7),
    inputs=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_every_form_gives_the_same_positive_pair(
    sequences: int, rank: int, outputs: int, inputs: int, seed: int
) -> None:
    left, right = random_sketch(sequences, rank, outputs, inputs, seed)
    F = dense_fisher(left @ right.mT)
    pairs = [
        nearest_kronecker(fisher, torch.eye(inputs, dtype=torch.float64), iterations=30, tolerance=1e-15)
        for fisher in forms(left, right).values()
    ]
    for pair in pairs:
        torch.testing.assert_close(pair.A, pairs[0].A, rtol=1e-9, atol=1e-9 * pairs[0].norm ** 0.5)
        torch.testing.assert_close(pair.B, pairs[0].B, rtol=1e-9, atol=1e-9 * pairs[0].norm ** 0.5)
        for factor in (pair.A, pair.B):
            assert torch.equal(factor, factor.T)
            assert torch.linalg.eigvalsh(factor)[0] >= -1e-12 * pair.norm**0.5
        explicit = ((F - torch.kron(pair.A, pair.B)).norm() / F.norm()).item()
        assert pair.residual == pytest.approx(explicit, abs=1e-6)


def test_no_other_pair_is_nearer() -> None:
    left, right = random_sketch(8, 3)
    F = dense_fisher(left @ right.mT)
    pair = solve(SpannedFisher(SketchedGradients(left, right)))
    best = (F - torch.kron(pair.A, pair.B)).norm()
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        A = pair.A + 0.1 * torch.randn(M, M, generator=generator, dtype=torch.float64)
        B = pair.B + 0.1 * torch.randn(N, N, generator=generator, dtype=torch.float64)
        assert (F - torch.kron(A, B)).norm() >= best


def test_an_exact_kronecker_product_is_recovered_with_its_scale() -> None:
    """Gradients u vᵀ over all pairs (u, v) of two sets have F = mean(v vᵀ) ⊗ mean(u uᵀ)."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(6, N, generator=generator, dtype=torch.float64)
    v = 7 * torch.randn(6, M, generator=generator, dtype=torch.float64)
    left, right = u.repeat(6, 1)[:, :, None], v.repeat_interleave(6, 0)[:, :, None]
    pair = solve(SpannedFisher(SketchedGradients(left, right)))
    torch.testing.assert_close(torch.kron(pair.A, pair.B), torch.kron(v.T @ v / 6, u.T @ u / 6))
    assert pair.residual < 1e-6
    assert pair.A.norm().item() == pytest.approx(pair.B.norm().item()) == pytest.approx(pair.norm**0.5)


@pytest.mark.parametrize("form", forms(*random_sketch(2, 2)))
def test_overlap_with_a_given_pair(form: str) -> None:
    left, right = random_sketch(7, 3)
    F = dense_fisher(left @ right.mT)
    A, B = (
        torch.randn(size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64) for size in (M, N)
    )
    A, B = A @ A.T, B @ B.T
    fisher = forms(left, right)[form]
    assert fisher.norm_squared() == pytest.approx(F.square().sum().item(), rel=1e-12)
    if isinstance(fisher, StreamedFisher):
        assert fisher.overlap(A, B) == pytest.approx((F * torch.kron(A, B)).sum().item(), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(sequences=st.integers(1, 9), rank=st.integers(1, 6), outputs=st.integers(1, 9), inputs=st.integers(1, 9))
def test_inner_products_of_gradients_either_way(sequences: int, rank: int, outputs: int, inputs: int) -> None:
    """Over these shapes both ways of `products` are the cheaper one somewhere."""
    block = SketchedGradients(*random_sketch(sequences, rank, outputs, inputs))
    other = SketchedGradients(*random_sketch(4, rank, outputs, inputs, seed=1))
    for second in (block, other):
        written_out = block._products_written_out(second)
        torch.testing.assert_close(block.products(second), written_out)
        torch.testing.assert_close(
            written_out, ExactGradients(_gradient(block)).products(ExactGradients(_gradient(second)))
        )


def _gradient(block: SketchedGradients) -> torch.Tensor:
    return block._split(block.left) @ block._split(block.right).mT


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 11), inner=st.integers(1, 5))
def test_symmetric_product(size: int, inner: int) -> None:
    X = torch.randn(size, inner, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    product = symmetric_product(X, X)
    torch.testing.assert_close(product, X @ X.T)
    assert torch.equal(product, product.T)


def test_float32_keeps_six_digits_of_the_scale() -> None:
    left, right = random_sketch(40, 8, 60, 90)
    reference = solve(SpannedFisher(SketchedGradients(left, right)), 90)
    for fisher in forms(left.float(), right.float()).values():
        pair = nearest_kronecker(fisher, torch.eye(90), tolerance=1e-6)
        assert pair.converged
        assert pair.norm == pytest.approx(reference.norm, rel=3e-6)
        torch.testing.assert_close(pair.A.double(), reference.A, rtol=0, atol=1e-5 * reference.norm**0.5)


def test_a_better_start_needs_fewer_iterations_and_a_blind_one_is_replaced() -> None:
    left, right = random_sketch(8, 3)
    right[:, -1] = 0
    fisher = SpannedFisher(SketchedGradients(left, right))
    reference = solve(fisher)
    warm = nearest_kronecker(fisher, reference.A, tolerance=1e-8)
    assert warm.iterations == 1
    blind = torch.zeros(M, M, dtype=torch.float64)
    blind[-1, -1] = 1
    torch.testing.assert_close(nearest_kronecker(fisher, blind, 500, 1e-12).A, reference.A)


def test_too_few_iterations_are_reported() -> None:
    left, right = random_sketch(8, 3)
    pair = nearest_kronecker(SpannedFisher(SketchedGradients(left, right)), torch.eye(M, dtype=torch.float64), 1, 1e-12)
    assert (pair.iterations, pair.converged) == (1, False)


@pytest.mark.parametrize("form", forms(*random_sketch(2, 2)))
def test_gradients_that_are_all_zero(form: str) -> None:
    pair = solve(forms(torch.zeros(4, N, 2), torch.zeros(4, M, 2))[form], dtype=torch.float32)
    assert pair.A.shape == (M, M) and pair.B.shape == (N, N)
    assert pair.A.count_nonzero() == pair.B.count_nonzero() == 0
    assert (pair.norm, pair.residual, pair.converged) == (0.0, None, True)


def test_the_cheaper_form_is_taken() -> None:
    def blocks(sequences: int, count: int = 1) -> list[SketchedGradients]:
        return [SketchedGradients(*random_sketch(sequences, 2))] * count

    assert isinstance(fisher_of(lambda: iter(blocks(9))), SpannedFisher)
    assert isinstance(fisher_of(lambda: iter(blocks(10))), StreamedFisher)
    assert isinstance(fisher_of(lambda: iter(blocks(2, 2))), StreamedFisher)
    assert isinstance(fisher_of(lambda: iter([ExactGradients(torch.ones(2, N, M))])), StreamedFisher)


def test_relative_residual_of_nothing() -> None:
    assert relative_residual(0.0, 0.0) is None
    assert relative_residual(1.0, 1.0) == 0.0


@pytest.mark.parametrize("form", forms(*random_sketch(2, 2)))
@pytest.mark.parametrize("rank", [1, 4])
def test_power_and_lanczos_agree(form: str, rank: int) -> None:
    """Converged to 1e-10 in float64, both give the same positive pair to 1e-6."""
    fisher = forms(*random_sketch(8, rank))[form]
    start = torch.eye(M, dtype=torch.float64)
    power, lanczos = (nearest_kronecker(fisher, start, 500, 1e-10, method) for method in ("power", "lanczos"))
    assert power.converged and lanczos.converged
    assert lanczos.norm == pytest.approx(power.norm, rel=1e-9)
    torch.testing.assert_close(lanczos.A, power.A, rtol=1e-6, atol=1e-6 * power.norm**0.5)
    torch.testing.assert_close(lanczos.B, power.B, rtol=1e-6, atol=1e-6 * power.norm**0.5)


def test_lanczos_needs_fewer_steps_where_two_pairs_nearly_tie() -> None:
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, 2, generator=generator, dtype=torch.float64))[0] for size in (20, 30))
    left, right = (U * torch.tensor([1.0, 0.98])).T[:, :, None], V.T[:, :, None].contiguous()
    fisher = SpannedFisher(SketchedGradients(left, right))
    power, lanczos = (nearest_kronecker(fisher, None, 2000, 1e-6, method) for method in ("power", "lanczos"))
    assert lanczos.iterations <= 5 < 100 < power.iterations
    torch.testing.assert_close(lanczos.A, power.A, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["power", "lanczos"])
def test_a_fisher_of_one_pair_has_no_second(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(1, size, 1, generator=generator, dtype=torch.float64) for size in (N, M))
    fisher = SpannedFisher(SketchedGradients(left, right))
    pair = nearest_kronecker(fisher, None, 50, 1e-8, method)
    assert pair.converged and pair.residual == pytest.approx(0, abs=1e-6)
    assert leading_sigmas(fisher, 3) == pytest.approx([pair.norm])


def test_restarted_lanczos_finds_the_leading_pairs_of_many() -> None:
    left, right = random_sketch(40, 2, 20, 16)
    F = dense_fisher(left @ right.mT)
    sigmas = symmetric_sigmas(F, 20, 16)
    fisher = StreamedFisher(lambda: [SketchedGradients(left, right)])
    pair = nearest_kronecker(fisher, torch.eye(16, dtype=torch.float64), 100, 1e-9, "lanczos")
    assert pair.converged and pair.norm == pytest.approx(sigmas[0].item(), rel=1e-8)
    found = lanczos(fisher, fisher.first(None) / fisher.first(None).norm(), 100, 1e-9, 2)
    assert found.converged and found.iterations > 10  # so it was restarted
    assert found.sigmas == pytest.approx(sigmas[:2].tolist(), rel=1e-8)
    assert leading_sigmas(fisher, 2) == pytest.approx(sigmas[:2].tolist(), rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    sequences=st.integers(1, 4),
    tokens=st.integers(1, 4),
    outputs=st.integers(1, 6),
    inputs=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_tokens_are_gradients_of_rank_one(sequences: int, tokens: int, outputs: int, inputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sequences, tokens, inputs, generator=generator, dtype=torch.float64)
    d = torch.randn(sequences, tokens, outputs, generator=generator, dtype=torch.float64)
    block = TokenGradients(x, d)
    plain = SketchedGradients(d.flatten(0, 1)[:, :, None], x.flatten(0, 1)[:, :, None])
    start = torch.eye(inputs, dtype=torch.float64)
    expected = nearest_kronecker(StreamedFisher(lambda: [plain]), start, 20, 1e-14)
    for fisher in (SpannedFisher(block), StreamedFisher(lambda: [block])):
        found = nearest_kronecker(fisher, start, 20, 1e-14, with_variances=True)
        torch.testing.assert_close(found.A, expected.A, atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(found.B, expected.B, atol=1e-9, rtol=1e-7)
        assert found.fisher_norm == pytest.approx(expected.fisher_norm, rel=1e-10)
        if sequences > 1:  # of the output side, since the last step gave B from this A
            A = found.A / found.A.norm()
            parts = [torch.einsum("ta,tb,ti,ij,tj->ab", d[s], d[s], x[s], A, x[s]) for s in range(sequences)]
            assert found.variances[1] == pytest.approx(variance_of_mean(parts), rel=1e-6, abs=1e-9)
        else:
            assert found.variances is None


def variance_of_mean(parts: list[torch.Tensor]) -> float:
    """Squared standard error of the mean of matrices over its squared norm."""
    stack = torch.stack(list(parts))
    spread = (stack - stack.mean(0)).square().sum() / (len(stack) - 1) / len(stack)
    return (spread / stack.mean(0).square().sum()).item()


@pytest.mark.parametrize("form", forms(*random_sketch(2, 2)))
def test_variances_of_the_factors_are_those_of_means(form: str) -> None:
    left, right = random_sketch(8, 3)
    pair = nearest_kronecker(forms(left, right)[form], None, 500, 1e-12, with_variances=True)
    G = left @ right.mT
    assert pair.variances[0] == pytest.approx(variance_of_mean(G.mT @ (pair.B / pair.B.norm()) @ G), rel=1e-6)
    assert pair.variances[1] == pytest.approx(variance_of_mean(G @ (pair.A / pair.A.norm()) @ G.mT), rel=1e-6)
