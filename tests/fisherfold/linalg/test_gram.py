import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherfold.linalg.gram import add_gram, add_tokens, exact_products, fold, folded_shape, mirror, unfold


def gram_of(batches: list[torch.Tensor]) -> torch.Tensor:
    size = batches[0].shape[1]
    total = torch.zeros(size, size, dtype=batches[0].dtype)
    for rows in batches:
        add_gram(total, rows)
    return mirror(total)


@given(st.integers(1, 700), st.integers(1, 40), st.integers(1, 3), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_equals_the_full_product(size, rows, batches, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(rows, size, generator=generator, dtype=torch.float64) for _ in range(batches)]
    stacked = torch.cat(drawn)
    total = gram_of(drawn)
    torch.testing.assert_close(total, stacked.T @ stacked, rtol=1e-12, atol=1e-12)
    assert torch.equal(total, total.T)


@pytest.mark.parametrize("size", [5, 192, 576])
def test_float32_sums_stay_near_the_float64_oracle(size):
    drawn = [torch.randn(100, size, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    stacked = torch.cat(drawn).double()
    error = (gram_of(drawn).double() - stacked.T @ stacked).abs().max()
    assert error < 1e-5 * len(stacked)


def test_bfloat16_rows_are_multiplied_exactly():
    rows = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = torch.zeros(200, 200)
    add_tokens(total, rows.view(3, 100, 200))
    oracle = rows.double().T @ rows.double()
    assert (mirror(total).double() - oracle).abs().max() < 1e-5 * len(rows)


def test_exact_products_leave_no_setting_behind():
    before = torch.backends.mkldnn.matmul.fp32_precision
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(KeyError), exact_products(torch.zeros(1, dtype=dtype)):
            raise KeyError
        assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_float32_products_keep_their_precision():
    rows = torch.full((1, 1), 1 + 2**-12)
    with exact_products(rows):
        assert (rows.T @ rows).item() == pytest.approx((1 + 2**-12) ** 2, rel=1e-7)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 600, 601])
def test_a_folded_gram_is_half_the_numbers_and_unfolds_to_the_bit(size):
    total = torch.randn(size, size)
    folded = fold(total)
    assert tuple(folded.shape) == folded_shape(size) and folded.numel() == size * (size + 1) // 2
    upper = total.triu()
    assert torch.equal(unfold(folded, symmetric=False), upper)
    assert torch.equal(unfold(folded), upper + total.triu(1).T)
    assert torch.equal(fold(unfold(folded)), folded)
