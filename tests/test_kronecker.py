"""Stage `kronecker` on a capture of which everything is known."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny_capture
import torch
from test_nearest_kronecker import dense_fisher, van_loan
from tiny_capture import LAYERS, TinyCapture

from stages import estimators, kronecker
from stages.errors import CorruptArtifact, NotEnoughDisk, NumericalError, ParameterError
from stages.estimators import ESTIMATORS, regroup
from stages.params import KroneckerParams
from stages.statistics import Statistics
from stages.store import read_array
from stages.workspace import MANIFEST, describe_files

PRECISE = {"iterations": 500, "tolerance": 1e-10, "dtype": "float64"}


def run(tiny: TinyCapture, **params: object) -> list[dict]:
    kronecker.run(tiny.workspace, KroneckerParams(**params))
    return pq.read_table(tiny.workspace.out("kronecker") / "diagnostics.parquet").to_pylist()


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
    assert set(files) == {"diagnostics.parquet", "kronecker.json", MANIFEST}


def test_no_kronecker_pair_is_nearer_than_that_of_sequence(tmp_path: Path) -> None:
    tiny = make(tmp_path)
    kfac = run(tiny)
    sequence = run(tiny, estimator="sequence")
    assert all(best["residual"] <= other["residual"] for best, other in zip(sequence, kfac))


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
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_streamed_over_blocks_equals_one_block(tmp_path: Path, monkeypatch, form: str, estimator: str) -> None:
    statistics = Statistics(make(tmp_path, form).workspace.out("capture"))
    params = KroneckerParams(estimator=estimator, **{**PRECISE, "tolerance": 1e-7})
    estimate = ESTIMATORS.lookup(estimator).estimate
    whole = estimate(statistics, LAYERS[0], params)
    monkeypatch.setattr(estimators, "BLOCK_COLUMNS", 20)  # four sequences and two
    monkeypatch.setattr(estimators, "BLOCK_NUMBERS", 120)
    assert len(list(estimators.gradient_blocks(statistics, LAYERS[0], params))) == 2
    streamed = estimate(statistics, LAYERS[0], params)
    for key in ("scale", "norm", "fisher_norm", "residual"):
        assert getattr(streamed, key) == pytest.approx(getattr(whole, key), rel=1e-9)
    for factor, other in zip(streamed.factors or (), whole.factors or ()):
        torch.testing.assert_close(factor, other, rtol=0, atol=1e-6 * whole.norm**0.5)


def test_regroup_keeps_every_sequence_in_order() -> None:
    left, right = torch.arange(23.0)[:, None, None].expand(23, 3, 1), torch.arange(23.0)[:, None, None].expand(23, 2, 1)
    for sizes in ([23], [1] * 23, [5, 0, 9, 9], [20, 3]):
        for columns in (1, 4, 7, 23, 40):
            shards = zip(left.split(sizes), right.split(sizes))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(estimators, "BLOCK_COLUMNS", columns)
                blocks = list(regroup(shards))
            assert [len(block[0]) for block in blocks[:-1]] == [columns] * (len(blocks) - 1)
            assert torch.equal(torch.cat([block[0] for block in blocks]), left)
            assert torch.equal(torch.cat([block[1] for block in blocks]), right)


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
    work, calls = kronecker.estimate_layer, []

    def interrupted(folder: Path, *arguments: object) -> None:
        calls.append(folder.name)
        work(folder, *arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(kronecker, "estimate_layer", interrupted)
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
