"""Shrinkage chosen from data, against its definition and against the error that it is to reduce."""

from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import tiny_capture
import torch

from fisherfold.fisher.sampling import condition, effective_count, effective_rank, gram_variance, halves_error
from fisherfold.run.errors import ParameterError
from fisherfold.run.params import KroneckerParams, SubspaceParams
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.subspaces.shrinkage import FactorSampling, ledoit_wolf, oas
from stages import kronecker, subspace


def gaussian(samples: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples [N, p] of a covariance with a power-law spectrum, and that covariance."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, size + 1, dtype=torch.float64) ** -0.5
    return torch.randn(samples, size, generator=generator, dtype=torch.float64) * scales, scales.square().diag()


def shrunk(M: torch.Tensor, delta: float) -> torch.Tensor:
    return (1 - delta) * M + delta * M.trace() / len(M) * torch.eye(len(M), dtype=M.dtype)


def test_ledoit_wolf_is_its_definition() -> None:
    x, _ = gaussian(12, 5)
    M = x.T @ x / 12
    variance = sum((torch.outer(row, row) - M).square().sum() for row in x) / 12**2
    spread = (M - M.trace() / 5 * torch.eye(5)).square().sum()
    sampling = FactorSampling(12, (variance / M.square().sum()).item())
    assert ledoit_wolf(torch.linalg.eigvalsh(M), sampling) == pytest.approx((variance / spread).item(), rel=1e-10)


def test_oas_is_its_closed_form() -> None:
    """Equation 23 of Chen et al. by hand: p = 4, tr M = 8, tr M² = 22."""
    values = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    expected = (0.5 * 22 + 64) / ((20 + 0.5) * (22 - 64 / 4))
    assert oas(values, FactorSampling(20, None)) == pytest.approx(expected, rel=1e-12)
    assert oas(7 * values, FactorSampling(20, None)) == pytest.approx(expected, rel=1e-12)
    assert oas(torch.ones(4), FactorSampling(20, None)) == oas(values, FactorSampling(5, None)) == 1


@pytest.mark.parametrize(("samples", "slack"), [(10, 1.3), (60, 1.1)])
def test_both_rules_come_near_the_best_damping_of_gaussian_samples(samples: int, slack: float) -> None:
    """Without knowing the truth, the squared error is within a few per cent of the least that any δ gives."""
    deltas = torch.linspace(0, 1, 201, dtype=torch.float64).tolist()
    errors = {"best": 0.0, "ledoit_wolf": 0.0, "oas": 0.0, "none": 0.0}
    for seed in range(20):
        x, truth = gaussian(samples, 20, seed)
        M = x.T @ x / samples
        squares = M.square().sum().item()
        variance = (x.square().sum(1).square().sum().item() / samples - squares) / samples / squares
        values, sampling = torch.linalg.eigvalsh(M), FactorSampling(samples, variance)
        chosen = {"ledoit_wolf": ledoit_wolf(values, sampling), "oas": oas(values, sampling), "none": 0.0}
        errors["best"] += min((shrunk(M, delta) - truth).square().sum().item() for delta in deltas)
        for name, delta in chosen.items():
            errors[name] += (shrunk(M, delta) - truth).square().sum().item()
    assert errors["ledoit_wolf"] < slack * errors["best"] and errors["oas"] < slack * errors["best"]
    assert errors["none"] > slack * errors["best"]


def test_the_variance_of_a_gram_matrix_is_that_of_a_mean_of_sequences() -> None:
    """With every token sampled it is exactly Σ_s ‖M_s − M̂‖² / (S (S − 1)), M_s the mean of one sequence."""
    sequences, length = 5, 7
    x = torch.randn(sequences, length, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = x.mT @ x / length
    M = means.mean(0)
    expected = (means - M).square().sum() / (sequences * (sequences - 1)) / M.square().sum()
    facts = SimpleNamespace(facts={"sequence_length": length}, sequences=sequences)
    assert gram_variance([x[:2], x[2:]], M, facts) == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("alike", [0.0, 0.9])
def test_the_variance_of_a_gram_matrix_counts_like_tokens_once(alike: float) -> None:
    """Against the variance between draws; tokens of a sequence share a part of weight `alike`."""
    sequences, length, kept, size = 30, 12, 4, 3
    generator = torch.Generator().manual_seed(0)

    facts = SimpleNamespace(facts={"sequence_length": length}, sequences=sequences)
    grams, estimates = [], []
    for _ in range(300):
        shared = torch.randn(sequences, 1, size, generator=generator, dtype=torch.float64)
        own = torch.randn(sequences, length, size, generator=generator, dtype=torch.float64)
        x = alike**0.5 * shared + (1 - alike) ** 0.5 * own
        grams.append(x.flatten(0, 1).T @ x.flatten(0, 1) / (sequences * length))
        estimates.append(gram_variance([x[:20, :kept], x[20:, :kept]], grams[-1], facts))
    spread = torch.stack(grams).var(0).sum() / torch.stack(grams).mean(0).square().sum()
    assert sum(estimates) / len(estimates) == pytest.approx(spread.item(), rel=0.2)


def test_effective_numbers() -> None:
    assert effective_count(torch.ones(5)) == pytest.approx(5)
    assert effective_count(torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_count(torch.zeros(3)) == effective_rank(torch.zeros(2, 2)) == 0
    assert effective_rank(torch.eye(4)) == pytest.approx(4)


def test_the_error_of_halves_is_that_of_their_products() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(2):
        A, B = (torch.randn(size, size, generator=generator).double() for size in (3, 2))
        A, B = A @ A.T, B @ B.T
        pairs.append(SimpleNamespace(A=A, B=B, norm=(A.norm() * B.norm()).item()))
    first, second = (torch.kron(pair.A, pair.B) for pair in pairs)
    expected = ((first - second).norm() / (first + second).norm()).item()
    assert halves_error(pairs.__getitem__) == pytest.approx(expected, rel=1e-10)
    assert halves_error(lambda half: pairs[0]) == pytest.approx(0, abs=1e-7)


def test_the_condition_is_the_ratio_of_the_outer_eigenvalues() -> None:
    assert condition(torch.tensor([[2.0, 1.0], [1.0, 2.0]])) == pytest.approx(3)
    assert condition(torch.zeros(2, 2)) == float("inf")


def prepared(folder: Path, estimator: str = "kfac", tokens_kept: int = 7, **params: object) -> tiny_capture.TinyCapture:
    tiny = tiny_capture.random_tokens(folder)
    tiny_capture.publish(tiny, tokens_kept=tokens_kept)
    kronecker.run(tiny.workspace, KroneckerParams(estimator=estimator, **params))
    return tiny


@pytest.mark.parametrize("rule", ["ledoit_wolf", "oas"])
@pytest.mark.parametrize(
    ("metric", "estimator"), [("kfac", "kfac"), ("svd_llm", "kfac"), ("gfwsvd", "sequence"), ("gfwsvd", "token")]
)
def test_stage_subspace_chooses_and_reports(tmp_path: Path, metric: str, estimator: str, rule: str) -> None:
    tiny = prepared(tmp_path, estimator)
    subspace.run(tiny.workspace, SubspaceParams(metric=metric, input_damping=rule, output_damping=rule))
    rows = pq.read_table(tiny.workspace.out("subspace") / "diagnostics.parquet").to_pylist()
    assert all(0 < row["input_damping"] <= 1 for row in rows)
    if (metric, rule) == ("kfac", "ledoit_wolf"):
        comparison = pq.read_table(tiny.workspace.out("kronecker") / "comparison.parquet").to_pylist()
        known = next(row for row in comparison if (row["module"], row["estimator"]) == ("block.up", "kfac"))
        M = Statistics(tiny.workspace.out("capture")).input_covariance(tiny.layers[2]).double()
        expected = ledoit_wolf(torch.linalg.eigvalsh(M), FactorSampling(0, known["input_variance"]))
        assert rows[2]["input_damping"] == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_chosen_is_refused(tmp_path: Path) -> None:
    tiny = prepared(tmp_path, tokens_kept=0)
    with pytest.raises(ParameterError, match=r"capture\.tokens_per_sequence"):
        subspace.run(tiny.workspace, SubspaceParams(input_damping="ledoit_wolf"))
    subspace.run(tiny.workspace, SubspaceParams(input_damping="oas"))
    with pytest.raises(ParameterError, match="'asvd' is not a mean of samples"):
        subspace.run(tiny.workspace, SubspaceParams(metric="asvd", input_damping="oas"))
    tiny = prepared(tmp_path / "none", "sequence", diagnostics="none")
    with pytest.raises(ParameterError, match=r"kronecker\.diagnostics"):
        subspace.run(tiny.workspace, SubspaceParams(metric="svd_llm", input_damping="oas"))
