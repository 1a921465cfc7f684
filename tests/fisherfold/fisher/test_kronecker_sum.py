"""Alternating least squares under a sum of Kronecker products, against dense normal equations in float64."""

from pathlib import Path

import pytest
import tiny_capture
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherfold.export.refinement import read_pairs, refined_bases
from fisherfold.fisher.kronecker_sum import _solve_left, alternate, weighted_loss
from fisherfold.linalg.weighted_svd import metric_root, weighted_svd
from fisherfold.run.errors import ParameterError
from fisherfold.run.params import FactorizeParams, KroneckerParams, SubspaceParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.store import read_array
from stages import kronecker, subspace


def positive(size: int, generator: torch.Generator) -> torch.Tensor:
    factor = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return factor @ factor.T / size + 0.1 * torch.eye(size, dtype=torch.float64)


def problem(n: int = 6, m: int = 5, pairs: int = 2, seed: int = 0) -> tuple[torch.Tensor, list]:
    generator = torch.Generator().manual_seed(seed)
    terms = [(positive(m, generator) / (r + 1), positive(n, generator)) for r in range(pairs)]
    return torch.randn(n, m, generator=generator, dtype=torch.float64), terms


def truncated(weight: torch.Tensor, terms: list, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The solution of the first pair."""
    basis = weighted_svd(weight, metric_root(terms[0][0], 0.0), metric_root(terms[0][1], 0.0))
    return basis.left[:, :rank], basis.right[:rank]


def test_the_loss_is_the_dense_quadratic_form() -> None:
    error, terms = problem()
    F = sum(torch.kron(A, B) for A, B in terms)
    vector = error.T.flatten()
    assert weighted_loss(error, terms) == pytest.approx((vector @ F @ vector).item())


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 6), m=st.integers(2, 6), rank=st.integers(1, 3), pairs=st.integers(1, 3), seed=st.integers(0, 99)
)
def test_a_half_step_solves_the_dense_normal_equations(n: int, m: int, rank: int, pairs: int, seed: int) -> None:
    rank = min(rank, n, m)
    weight, terms = problem(n, m, pairs, seed)
    left, right = truncated(weight, terms, rank)
    F = sum(torch.kron(A, B) for A, B in terms)
    basis = torch.kron(
        right.T.clone(memory_format=torch.contiguous_format), torch.eye(n, dtype=torch.float64)
    )  # vec(U V) = (Vᵀ ⊗ I) vec(U)
    expected = torch.linalg.solve(basis.T @ F @ basis, basis.T @ F @ weight.T.flatten()).view(rank, n).T
    torch.testing.assert_close(_solve_left(weight, left, right, terms), expected, rtol=1e-5, atol=1e-6)


def test_one_pair_is_solved_already() -> None:
    weight, terms = problem(pairs=1)
    left, right = truncated(weight, terms, 2)
    found = alternate(weight, left, right, terms, 5)
    torch.testing.assert_close(found[0] @ found[1], left @ right, rtol=1e-8, atol=1e-10)


def test_several_pairs_are_better_served_than_by_the_first() -> None:
    """Stationary, and no worse than the best of random restarts of plain gradient descent on the dense form."""
    weight, terms = problem(pairs=3)
    left, right = truncated(weight, terms, 2)
    before = weighted_loss(weight - left @ right, terms)
    left, right = alternate(weight, left, right, terms, 500)
    after = weighted_loss(weight - left @ right, terms)
    assert after < 0.99 * before
    gradient = sum(B @ (weight - left @ right) @ A for A, B in terms)
    assert (gradient @ right.T).norm() < 1e-3 * gradient.norm() and (left.T @ gradient).norm() < 1e-3 * gradient.norm()


def test_a_sum_that_is_not_positive_never_makes_it_worse() -> None:
    weight, terms = problem(pairs=2)
    terms[1] = (-3 * terms[1][0], terms[1][1])
    left, right = truncated(weight, terms, 2)
    found = alternate(weight, left, right, terms, 3)
    assert all(part.isfinite().all() for part in found)
    assert weighted_loss(weight - found[0] @ found[1], terms) <= weighted_loss(weight - left @ right, terms) + 1e-9


def test_stage_factorize_refines_for_the_ranks_it_is_given(tmp_path: Path) -> None:
    """From a real run of kronecker and subspace: refined bases lower the loss under the sum, and leave one pair's alone."""
    tiny = tiny_capture.random_tokens(tmp_path)
    tiny_capture.publish(tiny)
    kronecker.run(tiny.workspace, KroneckerParams(estimator="sequence", rank=3))
    subspace.run(tiny.workspace, SubspaceParams(metric="gfwsvd"))
    ranks, layers = {"block.q": 2, "block.down": 3}, {layer.name: layer for layer in tiny.layers}
    with Scratch(tiny.workspace, "factorize", FactorizeParams(), {}) as scratch:
        group = refined_bases(scratch, tiny.workspace, layers, ranks, 20)
        for name, rank in ranks.items():
            terms = read_pairs(tiny.workspace.out("kronecker") / "factors", layers[name], (0.01, 0.1), "cpu")
            assert len(terms) == 3
            bases = tiny.workspace.out("subspace") / "bases"
            first = read_array(bases, f"{name}/left")[:, :rank] @ read_array(bases, f"{name}/right", slice(0, rank))
            found = read_array(group, f"{name}/left") @ read_array(group, f"{name}/right")
            losses = [weighted_loss(tiny.weights[name] - product.double(), terms) for product in (first, found)]
            assert losses[1] < losses[0]


def test_refining_wants_pairs(tmp_path: Path) -> None:
    tiny = tiny_capture.random_tokens(tmp_path)
    tiny_capture.publish(tiny)
    kronecker.run(tiny.workspace, KroneckerParams(estimator="sequence"))
    subspace.run(tiny.workspace, SubspaceParams(metric="gfwsvd"))
    with (
        Scratch(tiny.workspace, "factorize", FactorizeParams(), {}) as scratch,
        pytest.raises(ParameterError, match=r"kronecker\.rank of 2 or more"),
    ):
        refined_bases(scratch, tiny.workspace, {}, {}, 1)
