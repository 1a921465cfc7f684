import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherfold.allocators.cost import FORMATS, PIVOTED_SIDES
from fisherfold.export.gauges import gauge, product
from fisherfold.linalg.pivoted import BOUND, interpolate, pivot_factors
from fisherfold.linalg.rounding import nearest, round_pivoted, round_with_feedback


def factors(n, m, r, seed=0, decay=1.0):
    """Random left [n, r] and right [r, m] with components of falling size."""
    generator = np.random.default_rng(seed)
    sizes = decay ** np.arange(r)
    return generator.standard_normal((n, r)) * sizes, generator.standard_normal((r, m)) * sizes[:, None]


def relative_error(found, wanted):
    return np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) or 1.0)


shapes = st.tuples(st.integers(1, 24), st.integers(1, 24)).flatmap(
    lambda s: st.tuples(*map(st.just, s), st.integers(1, min(s)))
)


@given(shapes, st.integers(0, 999), st.sampled_from((1.0, 0.8, 0.3)))
@settings(max_examples=150, deadline=None)
def test_the_pivoted_gauge_loses_nothing_and_is_bounded(shape, seed, decay):
    n, m, r = shape
    left, right = factors(n, m, r, seed, decay)
    pivoted = pivot_factors(left, right)
    assert relative_error(pivoted.product(), left @ right) <= 1e-12
    assert pivoted.largest_coefficient <= BOUND
    assert pivoted.numbers == r * (n + m - r) + min(n, m)
    assert sorted(pivoted.order) == list(range(min(n, m)))


@pytest.mark.parametrize(("n", "m", "r"), [(300, 40, 30), (40, 300, 30), (120, 120, 119), (96, 96, 60)])
def test_tall_wide_and_nearly_full(n, m, r):
    left, right = factors(n, m, r, decay=0.97)
    pivoted = pivot_factors(left, right)
    assert relative_error(pivoted.product(), left @ right) <= 1e-12
    assert pivoted.side == ("outputs" if n <= m else "inputs")


@pytest.mark.parametrize("deficient", ["left", "right", "both", "zero"])
def test_rank_deficient_products(deficient):
    left, right = factors(40, 30, 20)
    if deficient in ("left", "both"):
        left[:, 10:] = left[:, :10] @ np.random.default_rng(1).standard_normal((10, 10))
    if deficient in ("right", "both"):
        right[12:] = right[:8] * 3
    if deficient == "zero":
        left[:] = 0
    pivoted = pivot_factors(left, right)
    assert relative_error(pivoted.product(), left @ right) <= 1e-12
    assert pivoted.largest_coefficient <= BOUND


def test_badly_scaled_factors():
    """Factors of opposite scale, whose product is even: the gauge must not depend on how it is split."""
    left, right = factors(50, 40, 25)
    scale = 10.0 ** np.linspace(-8, 8, 25)
    assert relative_error(pivot_factors(left * scale, right / scale[:, None]).product(), left @ right) <= 1e-10


def test_swaps_bound_what_pivoting_alone_does_not():
    """Kahan's matrix: column pivoting keeps its order and leaves coefficients that grow with its size."""
    size, s = 40, np.sin(0.3)
    c = np.sqrt(1 - s**2)
    kahan = np.diag(s ** np.arange(size)) @ (np.eye(size) - c * np.triu(np.ones((size, size)), 1))
    rows = (kahan * (1 - 1e-10) ** np.arange(size)).T[:, : size - 1]
    pivots, others, coefficients = interpolate(rows)
    assert np.abs(coefficients).max() <= BOUND
    assert relative_error(coefficients @ rows[pivots], rows[others]) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_rounding_loses_no_more_than_plain_factors_do(dtype):
    """On random products: no worse than plain factors within the noise of one draw, and far better than rounding to nearest."""
    ratios, gains = [], []
    for seed, (n, m, r) in enumerate([(96, 96, 30), (96, 96, 60), (64, 200, 48), (200, 64, 24), (64, 64, 56)]):
        left, right = factors(n, m, r, seed, decay=0.99)
        exact = pivot_factors(left, right)
        feedback = relative_error(round_pivoted(exact, dtype).product(), left @ right)
        plain = relative_error(nearest(left, dtype) @ nearest(right, dtype), left @ right)
        naive = type(exact)(exact.side, exact.order, nearest(exact.pivot, dtype), nearest(exact.rest, dtype)).product()
        ratios.append(feedback / plain)
        gains.append(feedback / relative_error(naive, left @ right))
    assert max(ratios) <= 1.1
    assert np.mean(ratios) <= 1.0
    assert max(gains) <= 0.8


def test_error_feedback_beats_rounding_to_nearest_under_its_own_metric():
    generator = np.random.default_rng(0)
    values, mix = generator.standard_normal((150, 40)), generator.standard_normal((150, 20))
    gram = mix @ mix.T + 0.1 * np.eye(150)

    def loss(rounded):
        return np.trace((values - rounded).T @ gram @ (values - rounded))

    rounded = round_with_feedback(values, gram, torch.bfloat16)
    assert np.array_equal(rounded, nearest(rounded, torch.bfloat16))
    assert loss(rounded) < 0.5 * loss(nearest(values, torch.bfloat16))
    identity = round_with_feedback(values, np.eye(150), torch.bfloat16)
    assert np.array_equal(identity, nearest(values, torch.bfloat16))


@pytest.mark.parametrize("storage", FORMATS)
def test_float32_gauges_are_exact_to_float32(storage):
    left, right = factors(40, 30, 12)
    stored = gauge(left, right, storage, torch.float32)
    assert relative_error(product(stored.kind, stored.parameters, 40, 30), left @ right) < 3e-7
    side = PIVOTED_SIDES.get(storage) or "inputs"  # the shorter one
    assert stored.kind == ("factors" if storage == "factors" else f"pivoted_{side}")


def test_a_product_of_rank_0_has_no_parameters():
    stored = gauge(np.zeros((4, 0)), np.zeros((0, 3)), "pivoted", torch.float32)
    assert (stored.kind, stored.parameters) == ("zero", {})
    assert np.array_equal(product("zero", {}, 4, 3), np.zeros((4, 3)))
