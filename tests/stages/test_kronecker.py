"""Stage `kronecker` on a capture of which everything is known."""

import json
import weakref
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny_capture
import torch
from dense_fisher import dense_fisher, symmetric_sigmas, van_loan
from tiny_capture import LAYERS, TinyCapture

from fisherfold.fisher import gradient_samples
from fisherfold.fisher.estimators import ESTIMATORS, CapturedLayer
from fisherfold.fisher.fisher_diagnostics import describe_estimate
from fisherfold.linalg.leading_pairs import SOLVERS
from fisherfold.run import store, unit_work
from fisherfold.run.errors import CorruptArtifact, NotEnoughDisk, NumericalError, ParameterError
from fisherfold.run.files import MANIFEST, describe_files
from fisherfold.run.params import KroneckerParams
from fisherfold.run.store import read_array
from fisherfold.statistics.layer_statistics import Statistics
from stages import kronecker

CAPTURED = [name for name in ESTIMATORS if not ESTIMATORS.lookup(name).passes]  # those that need no model
PRECISE = {"iterations": 500, "tolerance": 1e-10, "dtype": "float64"}


def run(tiny: TinyCapture, **params: object) -> list[dict]:
    kronecker.run(tiny.workspace, KroneckerParams(**params))
    return pq.read_table(tiny.workspace.out("kronecker") / "diagnostics.parquet").to_pylist()


def compared(tiny: TinyCapture, **params: object) -> dict[tuple[str, str], dict]:
    """The rows of comparison.parquet by module and estimator."""
    run(tiny, **params)
    rows = pq.read_table(tiny.workspace.out("kronecker") / "comparison.parquet").to_pylist()
    return {(row["module"], row["estimator"]): row for row in rows}


def factors(tiny: TinyCapture, layer) -> tuple[torch.Tensor, torch.Tensor]:
    folder = tiny.workspace.out("kronecker") / "factors"
    return read_array(folder, f"{layer.name}/A"), read_array(folder, f"{layer.name}/B")


def make(folder: Path, form: str = "sketch", **options: int) -> TinyCapture:
    tiny = tiny_capture.random_tokens(folder)
    tiny_capture.publish(tiny, form, **options)
    return tiny


@pytest.mark.parametrize("form", ["sketch", "exact"])
def test_sequence_equals_the_dense_oracle(tmp_path: Path, form: str) -> None:
    tiny = make(tmp_path, form)
    rows = run(tiny, estimator="sequence", **PRECISE)
    assert [row["module"] for row in rows] == [layer.name for layer in LAYERS]
    for layer, row in zip(LAYERS, rows):
        F = dense_fisher(tiny.gradient(layer.name))
        A, B, sigma = van_loan(F, layer.outputs, layer.inputs)
        found_A, found_B = factors(tiny, layer)
        torch.testing.assert_close(
            torch.kron(found_A, found_B).double(), sigma * torch.kron(A, B), rtol=1e-4, atol=1e-5 * sigma
        )
        explicit = (F - sigma * torch.kron(A, B)).norm() / F.norm()
        assert row["residual"] == pytest.approx(explicit.item(), rel=1e-5)
        assert row["norm"] == pytest.approx(sigma, rel=1e-5)
        assert row["fisher_norm"] == pytest.approx(F.norm().item(), rel=1e-5)
        assert (row["scale"], row["converged"], row["sequences"], row["estimator"]) == (1.0, True, 6, "sequence")


@pytest.mark.parametrize("form", ["sketch", "exact"])
def test_kfac_is_measured_against_the_dense_fisher_and_copies_nothing(tmp_path: Path, form: str) -> None:
    tiny = make(tmp_path, form)
    for layer, row in zip(LAYERS, run(tiny)):
        F = dense_fisher(tiny.gradient(layer.name))
        x, d = tiny.inputs[layer.name].flatten(0, 1), tiny.gradients[layer.name].flatten(0, 1)
        product = torch.kron(x.T @ x / len(x), d.T @ d / len(d))
        scale = ((F * product).sum() / product.square().sum()).item()
        assert row["scale"] == pytest.approx(scale, rel=1e-4)
        assert row["norm"] == pytest.approx(scale * product.norm().item(), rel=1e-4)
        assert row["residual"] == pytest.approx(((F - scale * product).norm() / F.norm()).item(), rel=1e-4)
    files = describe_files(tiny.workspace.out("kronecker"))
    assert set(files) == {"comparison.parquet", "diagnostics.parquet", "kronecker.json", MANIFEST}


def test_no_kronecker_pair_is_nearer_than_that_of_sequence(tmp_path: Path) -> None:
    tiny = make(tmp_path)
    kfac = run(tiny)
    sequence = run(tiny, estimator="sequence")
    assert all(best["residual"] <= other["residual"] for best, other in zip(sequence, kfac))


@pytest.mark.parametrize("estimator", ["sequence", "token"])
def test_a_prior_mixes_in_the_token_wise_factors(tmp_path: Path, estimator: str) -> None:
    """Factors, residual and the scale that fits best, against dense float64; wholly mixed, the pair is that of kfac."""
    tiny = make(tmp_path, tokens_kept=7)
    run(tiny, estimator=estimator, **PRECISE)
    alone = [factors(tiny, layer) for layer in LAYERS]
    for prior in (0.3, 1.0):
        for layer, row, pair in zip(LAYERS, run(tiny, estimator=estimator, prior=prior, **PRECISE), alone):
            x, d = tiny.inputs[layer.name].flatten(0, 1), tiny.gradients[layer.name].flatten(0, 1)
            targets = x.T @ x / len(x), d.T @ d / len(d)
            mixed = [
                (1 - prior) * M.double() + prior * M.trace() / T.trace() * T for M, T in zip(pair, targets, strict=True)
            ]
            for found, expected in zip(factors(tiny, layer), mixed, strict=True):
                torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * expected.norm().item())
            F, product = dense_fisher(tiny.gradient(layer.name)), torch.kron(*mixed)
            scale = ((F * product).sum() / product.square().sum()).item()
            assert row["scale"] == pytest.approx(scale, rel=1e-4)
            assert row["residual"] == pytest.approx(((F - scale * product).norm() / F.norm()).item(), rel=1e-4)


def test_without_gradients(tmp_path: Path) -> None:
    tiny = make(tmp_path, "none")
    assert all(row["residual"] is None and row["scale"] is None and row["converged"] for row in run(tiny))
    with pytest.raises(ParameterError, match=r"Set capture\.gradients to 'sketch' or 'exact'"):
        run(tiny, estimator="sequence")


def test_shards_change_nothing(tmp_path: Path) -> None:
    digests = []
    for shard in (1, 4, 6):
        tiny = make(tmp_path / str(shard), shard=shard)
        run(tiny, estimator="sequence")
        digests.append(describe_files(tiny.workspace.out("kronecker")))
    assert all(digest == digests[0] for digest in digests)


@pytest.mark.parametrize("form", ["sketch", "exact"])
@pytest.mark.parametrize("estimator", CAPTURED)
def test_streamed_over_blocks_equals_one_block(tmp_path: Path, monkeypatch, form: str, estimator: str) -> None:
    statistics = Statistics(make(tmp_path, form, tokens_kept=7).workspace.out("capture"))
    params = KroneckerParams(estimator=estimator, **{**PRECISE, "tolerance": 1e-7}, clip=2.0, trim_tokens=1)
    captured = CapturedLayer(statistics, LAYERS[0], params)
    estimate = ESTIMATORS.lookup(estimator).estimate(captured)
    whole = describe_estimate(captured, estimator, estimate)
    monkeypatch.setattr(gradient_samples, "BLOCK_COLUMNS", 20)  # four sequences and two; two of seven tokens
    monkeypatch.setattr(gradient_samples, "BLOCK_NUMBERS", 120)
    blocks = CapturedLayer(statistics, LAYERS[0], params)
    assert len(list(blocks.samples.blocks())) == 2 and len(list(blocks.samples.token_blocks())) == 3
    other = ESTIMATORS.lookup(estimator).estimate(blocks)
    streamed = describe_estimate(blocks, estimator, other)
    for key in ("scale", "norm", "residual", "input_variance", "output_variance", "input_samples"):
        assert streamed[key] == pytest.approx(whole[key], rel=1e-6), key
    for found, expected in ((other.A, estimate.A), (other.B, estimate.B)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * expected.norm().item(), check_dtype=False)


@pytest.mark.parametrize("estimator", ["sequence", "kfac"])
def test_a_layer_without_gradients_has_no_fisher(tmp_path: Path, estimator: str) -> None:
    tiny = tiny_capture.random_tokens(tmp_path)
    tiny.gradients["block.up"].zero_()
    tiny_capture.publish(tiny)
    row = run(tiny, estimator=estimator)[2]
    assert (row["module"], row["norm"], row["fisher_norm"], row["residual"]) == ("block.up", 0.0, 0.0, None)
    assert row["scale"] == (1.0 if estimator == "sequence" else None)


@pytest.mark.parametrize("estimator", ["sequence", "kfac"])
@pytest.mark.parametrize("value", [float("nan"), 1e25])
def test_gradients_that_are_not_finite_name_the_layer(tmp_path: Path, estimator: str, value: float) -> None:
    tiny = make(tmp_path)
    tiny.gradients["block.k"][3, 1, 0] = value
    tiny_capture.publish(tiny, "exact")
    with pytest.raises(NumericalError, match=r"module 'block\.k'"):
        run(tiny, estimator=estimator)


def test_too_few_iterations_are_said(tmp_path: Path, capsys) -> None:
    tiny = make(tmp_path)
    rows = run(tiny, estimator="sequence", iterations=1, tolerance=1e-9)
    assert not any(row["converged"] for row in rows)
    assert "4 layers did not reach" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("estimator", ["sequence", "kfac"])
def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path, monkeypatch, estimator: str) -> None:
    reference = make(tmp_path / "reference")
    run(reference, estimator=estimator)
    tiny = make(tmp_path / "killed")
    monkeypatch.setattr(unit_work, "SMALL", 1)  # a unit each
    work, calls = kronecker.estimate_layers, []

    def interrupted(folder: Path, *arguments: object) -> None:
        calls.append(folder.name)
        work(folder, *arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(kronecker, "estimate_layers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, estimator=estimator)
    assert not tiny.workspace.out("kronecker").exists()
    run(tiny, estimator=estimator)
    assert len(calls) == 3 + 2  # the third unit, not finished, and the fourth
    assert describe_files(tiny.workspace.out("kronecker")) == describe_files(reference.workspace.out("kronecker"))


def test_parameters_are_recorded(tmp_path: Path) -> None:
    tiny = make(tmp_path)
    run(tiny, tolerance=1e-3)
    facts = json.loads((tiny.workspace.out("kronecker") / "kronecker.json").read_text())
    assert facts == {**KroneckerParams(tolerance=1e-3).model_dump(), "factors": False}


def test_a_missing_shard_is_corrupt(tmp_path: Path) -> None:
    tiny = make(tmp_path)
    gradients = tiny.workspace.out("capture") / "gradients"
    next(gradients.glob("*.zarr.zip")).unlink()
    with pytest.raises(CorruptArtifact, match="is missing"):
        run(tiny)


def test_disk_is_checked_for_the_factors_alone(tmp_path: Path, monkeypatch) -> None:
    tiny = make(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 2**26})())
    run(tiny)
    with pytest.raises(NotEnoughDisk, match="'kronecker' needs"):
        run(tiny, estimator="sequence")


def test_unknown_estimator(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="Did you mean 'sequence'"):
        run(make(tmp_path), estimator="sequences")


def token_fisher(tiny: TinyCapture, name: str, trim: int, clip: float | None) -> torch.Tensor:
    """The dense per-token Fisher [n m, n m], vec stacking columns."""
    x, d = tiny.inputs[name][:, trim:].flatten(0, 1), tiny.gradients[name][:, trim:].flatten(0, 1)
    gradients = d[:, :, None] * x[:, None, :]
    norms = gradients.flatten(1).norm(dim=1)
    if clip is not None:
        gradients = gradients * (clip * norms.median() / norms).clamp(max=1)[:, None, None]
    return dense_fisher(gradients)


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize(("trim", "clip"), [(0, None), (2, 1.5)])
def test_token_equals_the_dense_oracle(tmp_path: Path, method: str, trim: int, clip: float | None) -> None:
    tiny = make(tmp_path, "none", tokens_kept=7)
    run(tiny, estimator="token", method=method, trim_tokens=trim, clip=clip, **PRECISE)
    for layer in LAYERS:
        A, B, sigma = van_loan(token_fisher(tiny, layer.name, trim, clip), layer.outputs, layer.inputs)
        for found, unit in zip(factors(tiny, layer), (A, B)):
            torch.testing.assert_close(found.double(), sigma**0.5 * unit, rtol=1e-4, atol=1e-5 * sigma**0.5)


def test_tokens_without_a_gradient_are_clipped_to_nothing(tmp_path: Path) -> None:
    """The last token of a sequence has no loss: its norm is 0."""
    tiny = tiny_capture.random_tokens(tmp_path)
    for d in tiny.gradients.values():
        d[:, -1] = 0
    tiny_capture.publish(tiny, tokens_kept=7)
    run(tiny, estimator="token", clip=1.0)
    assert all(factor.isfinite().all() for layer in LAYERS for factor in factors(tiny, layer))


@pytest.mark.parametrize("together", [2, 4, 9])
@pytest.mark.parametrize("form", ["sketch", "exact"])
def test_averaged_gradients_equal_the_dense_oracle(tmp_path: Path, form: str, together: int) -> None:
    tiny = make(tmp_path, form)
    rows = run(tiny, estimator="sequence", sequences_per_gradient=together, **PRECISE)
    for layer, row in zip(LAYERS, rows):
        F = dense_fisher(torch.stack([part.mean(0) for part in tiny.gradient(layer.name).split(together)]))
        _, B, sigma = van_loan(F, layer.outputs, layer.inputs)
        assert row["norm"] == pytest.approx(sigma, rel=1e-5)
        assert row["fisher_norm"] == pytest.approx(F.norm().item(), rel=1e-5)
        torch.testing.assert_close(factors(tiny, layer)[1].double(), sigma**0.5 * B, rtol=1e-4, atol=1e-5 * sigma**0.5)


def test_shards_change_nothing_for_averages_tokens_and_halves(tmp_path: Path) -> None:
    digests = []
    for shard in (1, 4, 6):
        tiny = make(tmp_path / str(shard), shard=shard, tokens_kept=5)
        run(tiny, estimator="token", diagnostics="full", sequences_per_gradient=2)
        digests.append(describe_files(tiny.workspace.out("kronecker")))
    assert digests[0] == digests[1] == digests[2]


def test_full_diagnostics_equal_the_dense_oracle(tmp_path: Path) -> None:
    tiny = make(tmp_path, "exact", tokens_kept=7)
    found = compared(tiny, estimator="token", diagnostics="full", **PRECISE)
    assert [name for module, name in found if module == "block.q"] == CAPTURED
    layer, about = LAYERS[0], pq.read_table(tiny.workspace.out("kronecker") / "diagnostics.parquet").to_pylist()[0]
    G = tiny.gradient(layer.name)
    F = dense_fisher(G)
    sigmas = symmetric_sigmas(F, layer.outputs, layer.inputs)
    assert about["sigma_ratio"] == pytest.approx((sigmas[0] / sigmas[1]).item(), rel=1e-3)
    squares = G.square().sum((1, 2))
    assert about["effective_sequences"] == pytest.approx((squares.sum() ** 2 / squares.square().sum()).item(), rel=1e-5)
    for name in ("sequence", "token"):
        first, second = (half_pair(tiny, layer, name, half) for half in (0, 1))
        error = ((first - second).norm() / (first + second).norm()).item()
        assert found[layer.name, name]["sampling_error"] == pytest.approx(error, rel=1e-4)
    A, B = (factor.double() for factor in factors(tiny, layer))
    row, product = found[layer.name, "token"], torch.kron(A, B)
    scale = ((F * product).sum() / product.square().sum()).item()
    assert row["scale"] == pytest.approx(scale, rel=1e-4)
    assert row["residual"] == pytest.approx(((F - scale * product).norm() / F.norm()).item(), rel=1e-4)
    assert row["input_rank"] == pytest.approx((A.trace() ** 2 / A.square().sum()).item(), rel=1e-4)
    assert row["input_condition"] == pytest.approx(torch.linalg.cond(A, 2).item(), rel=1e-2)
    assert found[layer.name, "kfac"]["sampling_error"] is None


def half_pair(tiny: TinyCapture, layer, estimator: str, half: int) -> torch.Tensor:
    """A ⊗ B of every second sequence, dense."""
    x, d = tiny.inputs[layer.name][half::2], tiny.gradients[layer.name][half::2]
    tokens = d.flatten(0, 1)[:, :, None] * x.flatten(0, 1)[:, None, :]
    F = dense_fisher(tokens if estimator == "token" else d.mT @ x)
    A, B, sigma = van_loan(F, layer.outputs, layer.inputs)
    return sigma * torch.kron(A, B)


def test_the_level_of_diagnostics_says_what_is_compared(tmp_path: Path) -> None:
    tiny = make(tmp_path, tokens_kept=3)
    assert {name for _, name in compared(tiny, diagnostics="none")} == {"kfac"}
    assert {name for _, name in compared(tiny, estimator="token")} == {"kfac", "token"}
    found = compared(tiny, diagnostics="full")
    for layer in LAYERS:
        best = found[layer.name, "sequence"]["residual"]
        assert all(found[layer.name, name]["residual"] >= best - 1e-6 for name in CAPTURED)
    tiny_capture.publish(tiny)
    assert {name for _, name in compared(tiny, diagnostics="full")} == {"kfac", "sequence"}


def test_few_sequences_are_said_with_the_number_that_would_do(tmp_path: Path, capsys) -> None:
    tiny = tiny_capture.random_tokens(tmp_path, sequences=2, tokens=7)
    tiny_capture.publish(tiny, rank=1)
    run(tiny, estimator="sequence")
    said = " ".join(capsys.readouterr().err.split())
    assert "(the worst is 'block.q': 2 samples, rank 5)" in said and "5 sequences instead of 2 would do" in said


def test_what_the_capture_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"capture\.tokens_per_sequence is 0"):
        run(make(tmp_path), estimator="token")
    with pytest.raises(ParameterError, match=r"trim_tokens = 7 leaves no token"):
        run(make(tmp_path, tokens_kept=7), estimator="token", trim_tokens=7)
    with pytest.raises(ParameterError, match="Did you mean 'lanczos'"):
        run(make(tmp_path), method="lanczoss")


def test_layers_without_gradients_are_named(tmp_path: Path, capsys) -> None:
    tiny = tiny_capture.random_tokens(tmp_path)
    tiny.gradients["block.up"].zero_()
    tiny.inputs["block.down"].zero_()
    tiny_capture.publish(tiny, tokens_kept=3)
    for estimator in CAPTURED:
        run(tiny, estimator=estimator, diagnostics="full")
        said = " ".join(capsys.readouterr().err.split())
        assert "2 layers have no gradient on the calibration text: ['block.up', 'block.down']" in said


def test_a_step_reads_every_shard_once_and_holds_two_blocks_at_most(tmp_path: Path, monkeypatch) -> None:
    statistics = Statistics(make(tmp_path, "sketch", shard=1).workspace.out("capture"))
    monkeypatch.setattr(gradient_samples, "BLOCK_COLUMNS", 5)  # one sequence a block
    reads, alive, most = [], weakref.WeakSet(), []
    monkeypatch.setattr(store, "read_array", lambda shard, name: (reads.append(name), read_array(shard, name))[1])
    captured = CapturedLayer(statistics, LAYERS[0], KroneckerParams())
    fisher = captured.fisher
    blocks = fisher.blocks

    def watched():
        for block in blocks():
            alive.add(block)
            most.append(len(alive))
            yield block

    fisher.blocks = watched
    for step in (lambda: fisher.outputs(torch.eye(6)), lambda: fisher.inputs(torch.eye(5))):
        reads.clear()
        step()
        assert sorted(reads) == ["block.q/left"] * 6 + ["block.q/right"] * 6
    assert max(most) <= 2
