"""ρ against dense second moments, and its intervals on tokens that are coupled or not."""

import json

import pyarrow.parquet as pq
import pytest
import tiny_capture
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisherfold.linalg.weighted_svd import metric_root
from fisherfold.run.errors import NumericalError, ParameterError
from fisherfold.run.params import KroneckerParams
from fisherfold.statistics.dependence import FORMS, RIDGE, TABLE, kernels, measure_dependence, read_dependence
from stages import kronecker


def draw(sequences: int, tokens: int, size: int, coupling: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal x and g [S, t, m]."""
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(sequences, tokens, size, generator=generator).double() for _ in range(2))
    return x * torch.linspace(1, 3, size), coupling * x + g


def dense(x: torch.Tensor, g: torch.Tensor) -> list[float]:
    """(ρ_F, ρ_cca, ρ_kfac) as they are defined."""
    x, g = x.flatten(0, 1), g.flatten(0, 1)
    xx, xg, gg = x.T @ x / len(x), x.T @ g / len(x), g.T @ g / len(x)
    inverse = []
    for each in (xx, gg):
        root = metric_root(each, RIDGE)
        inverse.append((root.vectors / root.scales) @ root.vectors.T)
    independent = (xx * gg).sum()
    return [
        (xg.norm() / (xx.norm() * gg.norm()).sqrt()).item(),
        (inverse[0] @ xg @ inverse[1]).norm().item() / x.shape[1] ** 0.5,
        (((x * g).sum(1).square().mean() - independent).abs() / independent).item(),
    ]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(2, 6), st.integers(1, 7), st.floats(0, 2), st.integers(0, 1000))
def test_kernels_give_the_definitions(sequences, tokens, size, coupling, seed):
    x, g = draw(sequences, tokens, size, coupling, seed)
    row = measure_dependence(x, g, 0, 0)
    assert [row[form] for form in FORMS] == pytest.approx(dense(x, g), rel=1e-6)
    assert (row["dimension"], row["tokens"]) == (size, sequences * tokens) and set(row) == {
        *FORMS,
        "dimension",
        "tokens",
    }


def test_weights_of_a_resample_are_repeated_sequences():
    x, g = draw(4, 5, 3, 0.5)
    chosen = torch.tensor([0, 0, 2, 3])
    weights = (torch.bincount(chosen, minlength=4).double() / 20).repeat_interleave(5)
    found = kernels(x.flatten(0, 1), g.flatten(0, 1)).resampled(weights[None])[0]
    repeated = dense(x[chosen], g[chosen])
    assert found[0].item() == pytest.approx(repeated[0]) and found[2].item() == pytest.approx(repeated[2])


def test_intervals_are_quantiles_of_the_permutations_and_standard_errors_of_the_resamples():
    """The same draws, each as its own definition has it: pairs permuted, whole sequences repeated."""
    x, g = draw(5, 4, 3, 0.6)
    found, draws, generator = measure_dependence(x, g, 12, 3), range(12), torch.Generator().manual_seed(3)
    tokens = [each.flatten(0, 1) for each in (x, g)]
    orders = [torch.randperm(20, generator=generator) for _ in draws]
    null = torch.tensor([dense(tokens[0][None], tokens[1][order][None]) for order in orders]).double()
    chosen = [torch.randint(5, (5,), generator=generator) for _ in draws]
    spread = 1.96 * torch.tensor([dense(x[own], g[own]) for own in chosen]).double().std(0)
    for i, form in enumerate(FORMS):
        low, high = null[:, i].quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        assert (found[f"{form}_null_low"], found[f"{form}_null_high"]) == pytest.approx((low, high))
        if form != "rho_cca":  # whitened by the moments of all sequences, not of those drawn
            assert found[f"{form}_high"] - found[form] == pytest.approx(spread[i].item())
            assert found[f"{form}_low"] == pytest.approx(max(0.0, found[form] - spread[i].item()))


def test_independent_tokens_are_inside_the_null_and_coupled_ones_outside():
    apart, together = (measure_dependence(*draw(24, 10, 12, coupling), 100, 0) for coupling in (0.0, 0.7))
    for form in FORMS:
        assert apart[f"{form}_null_low"] <= apart[form] <= apart[f"{form}_null_high"]
        assert together[form] > together[f"{form}_null_high"]
        assert together[f"{form}_low"] < together[f"{form}_high"]
        assert together[f"{form}_low"] > together[f"{form}_null_high"]


def test_the_null_covers_independent_tokens_nine_times_in_ten():
    inside = {form: 0 for form in FORMS}
    for seed in range(30):
        row = measure_dependence(*draw(10, 6, 6, 0.0, seed), 60, seed)
        for form in FORMS:
            inside[form] += row[f"{form}_null_low"] <= row[form] <= row[f"{form}_null_high"]
    assert all(count >= 24 for count in inside.values())  # 95 % of 30 is 28.5; 24 is four standard deviations below


def test_draws_are_those_of_the_seed():
    x, g = draw(6, 5, 4, 0.3)
    assert measure_dependence(x, g, 20, 7) == measure_dependence(x, g, 20, 7)
    assert measure_dependence(x, g, 20, 7) != measure_dependence(x, g, 20, 8)


def test_the_stage_writes_a_row_for_every_input(tmp_path):
    tiny = tiny_capture.random_tokens(tmp_path)
    tiny.inputs["block.up"].zero_()
    tiny_capture.publish(tiny, tokens_kept=7)
    kronecker.run(tiny.workspace, KroneckerParams(dependence_draws=5))
    out = tiny.workspace.out("kronecker")
    rows = {row["module"]: row for row in pq.read_table(out / TABLE).to_pylist()}
    assert list(rows) == ["block.q", "block.up", "block.down"]
    assert rows["block.up"]["rho_F"] is None and rows["block.up"]["dimension"] == 5
    expected = dense(tiny.inputs["block.q"], tiny_capture.input_gradients(tiny, "block.q"))
    assert [rows["block.q"][form] for form in FORMS] == pytest.approx(expected, rel=1e-3)
    assert read_dependence(out, "rho_kfac") == {
        "block.q": rows["block.q"]["rho_kfac"],
        "block.up": 0.0,
        "block.down": rows["block.down"]["rho_kfac"],
    }


def test_without_tokens_there_is_no_table(tmp_path):
    tiny = tiny_capture.random_tokens(tmp_path)
    tiny_capture.publish(tiny)
    kronecker.run(tiny.workspace, KroneckerParams())
    assert not (tiny.workspace.out("kronecker") / TABLE).exists()
    assert "dependence_draws" in json.loads((tiny.workspace.out("kronecker") / "kronecker.json").read_text())
    with pytest.raises(ParameterError, match=r"capture\.tokens_per_sequence"):
        read_dependence(tiny.workspace.out("kronecker"), "rho_F")


def test_tokens_that_are_not_finite_are_named(tmp_path):
    tiny = tiny_capture.random_tokens(tmp_path)
    tiny_capture.publish(tiny, tokens_kept=7)
    tiny.weights["block.down"][0, 0] = torch.nan
    tiny_capture.publish(tiny, tokens_kept=7)
    with pytest.raises(NumericalError, match=r"'block\.down': its tokens are not finite"):
        kronecker.run(tiny.workspace, KroneckerParams())
