"""Stage `subspace` on a capture of which everything is known."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny_capture
import torch
from safetensors.torch import load_file, save_file
from tiny_capture import LAYERS, TinyCapture

from fisherfold.linalg.triangular_root import weighting_root
from fisherfold.linalg.weighted_svd import metric_root, weighted_svd
from fisherfold.network.layers import read_layers
from fisherfold.run.errors import CorruptArtifact, NotEnoughDisk, NumericalError, ParameterError
from fisherfold.run.files import MANIFEST, describe_files
from fisherfold.run.params import KroneckerParams, SubspaceParams
from fisherfold.run.store import array_names, read_array
from fisherfold.subspaces.metrics import METRICS
from stages import kronecker, subspace


def make(folder: Path, estimator: str = "sequence") -> TinyCapture:
    tiny = tiny_capture.random_tokens(folder)
    return prepare(tiny, estimator)


def prepare(tiny: TinyCapture, estimator: str = "sequence") -> TinyCapture:
    tiny_capture.publish(tiny)
    kronecker.run(tiny.workspace, KroneckerParams(estimator=estimator))
    return tiny


def run(tiny: TinyCapture, **params: object) -> Path:
    subspace.run(tiny.workspace, SubspaceParams(**params))
    return tiny.workspace.out("subspace")


def basis(out: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = (read_array(out / "bases", f"{name}/{side}") for side in ("left", "right"))
    return left.double(), right.double()


def spectrum(out: Path, name: str) -> torch.Tensor:
    table = pq.read_table(out / "spectra.parquet").to_pylist()
    rows = [row for row in table if row["module"] == name]
    assert [row["component"] for row in rows] == list(range(len(rows)))
    return torch.tensor([row["sigma"] for row in rows], dtype=torch.float64)


def diagnostics(out: Path) -> dict[str, dict]:
    return {row["module"]: row for row in pq.read_table(out / "diagnostics.parquet").to_pylist()}


WEIGHT_METRICS = [name for name in METRICS if callable(METRICS.lookup(name))]


@pytest.mark.parametrize("metric", WEIGHT_METRICS)
def test_every_metric_predicts_its_loss(tmp_path: Path, metric: str) -> None:
    """tr(ΔWᵀ B ΔW A) under the damped metric equals the tail of σ² at every rank; all components give W."""
    tiny = make(tmp_path)
    out = run(tiny, metric=metric, input_damping=0.2, output_damping=0.3)
    sources = subspace.MetricSources(
        subspace.Statistics(tiny.workspace.out("capture")),
        tiny.workspace.out("kronecker"),
        SubspaceParams(metric=metric),
    )
    for layer in LAYERS:
        W, (left, right), sigma = tiny.weights[layer.name], basis(out, layer.name), spectrum(out, layer.name)
        sides = zip(METRICS.lookup(metric)(sources, layer), (0.2, 0.3), (layer.inputs, layer.outputs))
        A, B = (damped(side, damping, size) for side, damping, size in sides)
        torch.testing.assert_close(left @ right, W, rtol=1e-5, atol=1e-5)
        for rank in range(len(sigma)):
            error = W - left[:, :rank] @ right[:rank]
            loss = torch.trace(error.T @ B @ error @ A).item()
            assert loss == pytest.approx(sigma[rank:].square().sum().item(), rel=1e-4)


def damped(metric: torch.Tensor | None, damping: float, size: int) -> torch.Tensor:
    identity = torch.eye(size, dtype=torch.float64)
    if metric is None:
        return identity
    full = metric.double().diag() if metric.ndim == 1 else metric.double()
    return (1 - damping) * full + damping * full.diagonal().mean() * identity


def test_outputs_and_their_order(tmp_path: Path) -> None:
    tiny = make(tmp_path)
    out = run(tiny)
    assert read_layers(out) == list(LAYERS)
    modules = [row["module"] for row in pq.read_table(out / "spectra.parquet").to_pylist()]
    assert modules == [layer.name for layer in LAYERS for _ in range(min(layer.outputs, layer.inputs))]
    assert list(diagnostics(out)) == [layer.name for layer in LAYERS]
    facts = json.loads((out / "subspace.json").read_text())
    assert facts == {**SubspaceParams().model_dump(), "dense": {}, "methods": {}, "shared": False}
    for layer in LAYERS:
        left, right = basis(out, layer.name)
        rank = min(layer.outputs, layer.inputs)
        assert left.shape == (layer.outputs, rank) and right.shape == (rank, layer.inputs)
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["files"] == {name: entry for name, entry in describe_files(out).items() if name != MANIFEST}


def test_condition_numbers_are_those_of_the_damped_metrics(tmp_path: Path) -> None:
    tiny = make(tmp_path)
    rows = diagnostics(run(tiny, input_damping=0.05, output_damping=0.0))
    for layer in LAYERS:
        x, d = tiny.inputs[layer.name].flatten(0, 1), tiny.gradients[layer.name].flatten(0, 1)
        row = rows[layer.name]
        assert row["input_condition"] == pytest.approx(
            torch.linalg.cond(damped(x.T @ x, 0.05, layer.inputs)).item(), rel=1e-4
        )
        assert row["output_condition"] == pytest.approx(torch.linalg.cond(d.T @ d).item(), rel=1e-4)
        assert (row["input_damping"], row["output_damping"], row["dense"]) == (0.05, 0.0, None)
    plain = diagnostics(run(tiny, metric="svd"))["block.q"]
    assert (plain["input_condition"], plain["input_damping"]) == (1.0, 0.0)


def test_layers_of_a_group_share_one_root(tmp_path: Path, monkeypatch) -> None:
    tiny = make(tmp_path)
    names = []

    def counted(metric: torch.Tensor, damping: float, name: str):
        names.append(name)
        return weighting_root(metric, damping, name)

    monkeypatch.setattr(subspace, "weighting_root", counted)
    out = run(tiny, metric="kfac")
    assert sum("input" in name for name in names) == 3 and sum("output" in name for name in names) == 4
    x, d = tiny.inputs["block.k"].flatten(0, 1), tiny.gradients["block.k"].flatten(0, 1)
    alone = weighted_svd(
        tiny.weights["block.k"], metric_root(x.T @ x / len(x), 0.01), metric_root(d.T @ d / len(d), 0.05)
    )
    torch.testing.assert_close(spectrum(out, "block.k"), alone.sigma, rtol=1e-5, atol=0)


def test_the_scale_of_a_layer_shows_in_its_spectrum(tmp_path: Path) -> None:
    """Inputs c times as large and gradients of half the size: σ of kfac times c / 2, so layers stay comparable."""
    plain = run(make(tmp_path / "plain"))
    tiny = tiny_capture.random_tokens(tmp_path / "scaled")
    tiny.inputs["block.down"] *= 8
    tiny.gradients["block.down"] /= 2
    scaled = run(prepare(tiny))
    torch.testing.assert_close(spectrum(scaled, "block.down"), 4 * spectrum(plain, "block.down"), rtol=1e-5, atol=0)
    torch.testing.assert_close(spectrum(scaled, "block.up"), spectrum(plain, "block.up"))


@pytest.mark.parametrize("metric", ["kfac", "svd_llm", "gfwsvd"])
def test_fewer_tokens_than_inputs_without_damping(tmp_path: Path, metric: str) -> None:
    """Singular metrics: what the tokens do not see costs nothing and comes last, and the weight stays whole."""
    tiny = prepare(tiny_capture.random_tokens(tmp_path, sequences=3, tokens=1))
    out = run(tiny, metric=metric, input_damping=0, output_damping=0)
    for layer in LAYERS:
        left, right = basis(out, layer.name)
        torch.testing.assert_close(left @ right, tiny.weights[layer.name], rtol=1e-4, atol=1e-4)
        sigma = spectrum(out, layer.name)
        assert (sigma[3:] < 1e-3 * sigma[0]).all()


@pytest.mark.parametrize(
    ("metric", "silent", "side"),
    [
        ("kfac", "inputs", "input"),
        ("svd_llm", "inputs", "input"),
        ("asvd", "inputs", "input"),
        ("kfac", "gradients", "output"),
        ("fwsvd", "gradients", "input"),
        ("gfwsvd", "gradients", "input"),
    ],
)
def test_a_layer_that_the_calibration_never_reached_stays_dense(
    tmp_path: Path, capsys, metric: str, silent: str, side: str
) -> None:
    tiny = tiny_capture.random_tokens(tmp_path)
    getattr(tiny, silent)["block.up"].zero_()
    out = run(prepare(tiny), metric=metric)
    rows, facts = diagnostics(out), json.loads((out / "subspace.json").read_text())
    assert list(facts["dense"]) == ["block.up"]
    assert rows["block.up"]["dense"] == facts["dense"]["block.up"]
    assert f"{side} metric is zero" in facts["dense"]["block.up"]
    assert len(spectrum(out, "block.up")) == 0 and len(spectrum(out, "block.down")) == 5
    assert {name.rpartition("/")[0] for name in array_names(out / "bases")} == {"block.q", "block.k", "block.down"}
    assert "block.up stays dense" in capsys.readouterr().err


@pytest.mark.parametrize(("tensors", "match"), [("inputs", "input metric"), ("gradients", "output metric")])
def test_statistics_that_are_not_finite_name_the_layer(tmp_path: Path, tensors: str, match: str) -> None:
    tiny = make(tmp_path)
    getattr(tiny, tensors)["block.down"][0, 0, 0] = float("nan")
    tiny_capture.publish(tiny, "exact")
    with pytest.raises(NumericalError, match=f"module 'block.down': the {match} holds values that are not finite"):
        run(tiny, metric="kfac")


def test_a_weight_that_is_not_finite_names_the_layer(tmp_path: Path) -> None:
    tiny = tiny_capture.random_tokens(tmp_path)
    tiny.weights["block.k"][0, 0] = float("inf")
    with pytest.raises(NumericalError, match=r"module 'block\.k': the weight holds values that are not finite"):
        run(prepare(tiny))


def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path, monkeypatch) -> None:
    reference = run(make(tmp_path / "reference"))
    tiny = make(tmp_path / "killed")
    work, calls = subspace.decompose_groups, []

    def interrupted(folder: Path, *arguments: object) -> None:
        calls.append(folder.name)
        work(folder, *arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(subspace, "decompose_groups", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny)
    assert not tiny.workspace.out("subspace").exists()
    out = run(tiny)
    assert len(calls) == 2 + 2
    assert describe_files(out) == describe_files(reference)


def test_earlier_outputs_that_are_not_whole(tmp_path: Path) -> None:
    tiny = make(tmp_path)
    weights = tiny.workspace.model / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if "up" not in name}, weights)
    with pytest.raises(CorruptArtifact, match="bytes instead of"):
        run(tiny)
    (tiny.workspace.out("kronecker") / MANIFEST).unlink()
    with pytest.raises(CorruptArtifact, match=r"'kronecker' has not finished|bytes instead of"):
        run(tiny)


def test_a_flipped_bit_in_the_statistics(tmp_path: Path) -> None:
    tiny = make(tmp_path)
    capture = tiny.workspace.out("capture")
    content = read_array(capture / "statistics", "block.down/output_gram").numpy().tobytes()
    for path in (path for path in capture.rglob("*") if path.is_file() and content in path.read_bytes()):
        damaged = bytearray(path.read_bytes())
        damaged[damaged.index(content) + 5] ^= 4
        path.write_bytes(damaged)
    with pytest.raises(CorruptArtifact, match="output_gram"):
        run(tiny)


def test_unknown_metric_and_missing_factors(tmp_path: Path) -> None:
    tiny = make(tmp_path, "kfac")
    with pytest.raises(ParameterError, match="Did you mean 'kfac'"):
        run(tiny, metric="kfca")
    with pytest.raises(ParameterError, match=r"kronecker\.estimator"):
        run(tiny, metric="gfwsvd")


def test_disk_is_checked_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    tiny = make(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 2**26})())
    with pytest.raises(NotEnoughDisk, match="'subspace' needs"):
        run(tiny)


def stacked(tiny: TinyCapture) -> dict[str, torch.Tensor]:
    """W [Σ n, m] of every group."""
    groups = {layer.group: [] for layer in LAYERS}
    for layer in LAYERS:
        groups[layer.group].append(tiny.weights[layer.name])
    return {name: torch.cat(weights) for name, weights in groups.items()}


def shared_basis(out: Path, group: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The stacked left factors [Σ n, r] and the one right factor [r, m] of a group."""
    lefts = [read_array(out / "bases", f"{layer.name}/left") for layer in LAYERS if layer.group == group]
    return torch.cat(lefts).double(), read_array(out / "bases", f"{group}/right").double()


@pytest.mark.parametrize("metric", WEIGHT_METRICS)
def test_shared_factors_give_the_weights_and_predict_their_loss(tmp_path: Path, metric: str) -> None:
    """tr(ΔWᵀ B ΔW A) of the stacked weight, B block-diagonal, equals the tail of σ² at every rank."""
    tiny = make(tmp_path)
    out = run(tiny, metric=metric, share_inputs=True, input_damping=0.2, output_damping=0.3)
    facts = json.loads((out / "subspace.json").read_text())
    assert facts["shared"] and facts["dense"] == {}
    capture, factors = tiny.workspace.out("capture"), tiny.workspace.out("kronecker")
    sources = subspace.MetricSources(subspace.Statistics(capture), factors, SubspaceParams(metric=metric))
    for name, W in stacked(tiny).items():
        group = [layer for layer in LAYERS if layer.group == name]
        (left, right), sigma = shared_basis(out, name), spectrum(out, name)
        assert len(right) == len(sigma) == min(W.shape)
        torch.testing.assert_close(left @ right, W, rtol=1e-5, atol=1e-5)
        A, blocks = subspace.stacked_metric([METRICS.lookup(metric)(sources, layer) for layer in group], group)
        A = damped(A, 0.2, W.shape[1])
        B = torch.block_diag(*(damped(block, 0.3, layer.outputs) for block, layer in zip(blocks, group)))
        for rank in range(len(sigma)):
            error = W - left[:, :rank] @ right[:rank]
            loss = torch.trace(error.T @ B @ error @ A).item()
            assert loss == pytest.approx(sigma[rank:].square().sum().item(), rel=1e-4)


def test_a_group_of_one_layer_shares_nothing_new(tmp_path: Path) -> None:
    tiny = make(tmp_path)
    alone, shared = (run(tiny, metric="gfwsvd", share_inputs=share) for share in (False, True))
    for name in ("block.up", "block.down"):
        torch.testing.assert_close(spectrum(shared, name), spectrum(alone, name), rtol=1e-5, atol=0)


def test_a_calibration_that_reached_no_layer_is_refused(tmp_path: Path) -> None:
    tiny = tiny_capture.random_tokens(tmp_path)
    for inputs in tiny.inputs.values():
        inputs.zero_()
    with pytest.raises(NumericalError, match=r"says nothing about any layer: .*metric is zero"):
        run(prepare(tiny), metric="svd_llm")


def test_how_a_pair_is_scaled_does_not_matter_when_it_is_stacked() -> None:
    generator = torch.Generator().manual_seed(0)
    roots = [torch.randn(size, size, generator=generator).double() for size in (6, 5, 6, 3)]
    A1, B1, A2, B2 = (root @ root.T for root in roots)
    first = subspace.stacked_metric([(A1, B1), (A2, B2)], LAYERS[:2])
    second = subspace.stacked_metric([(10 * A1, B1 / 10), (A2 / 7, 7 * B2)], LAYERS[:2])
    torch.testing.assert_close(first[0], second[0])
    for one, other in zip(first[1], second[1]):
        torch.testing.assert_close(one, other)


def test_stacked_layers_without_any_gradient_stay_dense(tmp_path: Path) -> None:
    tiny = tiny_capture.random_tokens(tmp_path)
    for name in ("block.q", "block.k"):
        tiny.gradients[name].zero_()
    prepare(tiny, "kfac")
    for params in ({"share_inputs": True}, {"metric": "fasc"}):
        out = run(tiny, **params)
        facts = json.loads((out / "subspace.json").read_text())
        assert list(facts["dense"]) == ["block.q"] and "gradient" in facts["dense"]["block.q"]
        assert not spectrum(out, "block.q").numel() and spectrum(out, "block.up").numel()
        assert "block.q/right" not in array_names(out / "bases")
