"""Every metric's definition against plain numpy on the raw inputs x, output gradients d and gradients G."""

from pathlib import Path

import numpy as np
import pytest
import tiny_capture
from tiny_capture import LAYERS

from fisherfold.run.errors import InputError, ParameterError
from fisherfold.run.params import KroneckerParams, SubspaceParams
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.subspaces.metrics import METRICS, MetricSources
from stages import kronecker


@pytest.fixture
def tiny(tmp_path: Path) -> tiny_capture.TinyCapture:
    tiny = tiny_capture.random_tokens(tmp_path)
    tiny_capture.publish(tiny)
    return tiny


def metric_of(tiny: tiny_capture.TinyCapture, name: str, layer, **params: object) -> list[np.ndarray | None]:
    workspace = tiny.workspace
    sources = MetricSources(
        Statistics(workspace.out("capture")),
        workspace.out("kronecker"),
        SubspaceParams(metric=name, **params),
    )
    return [None if side is None else side.numpy() for side in METRICS.lookup(name)(sources, layer)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_definitions(tiny: tiny_capture.TinyCapture, layer) -> None:
    x = tiny.inputs[layer.name].numpy().reshape(-1, layer.inputs)
    d = tiny.gradients[layer.name].numpy().reshape(-1, layer.outputs)
    G = np.einsum("stn,stm->snm", tiny.gradients[layer.name].numpy(), tiny.inputs[layer.name].numpy())
    inputs, outputs = x.T @ x / len(x), d.T @ d / len(d)
    expected = {
        "svd": (None, None),
        "fwsvd": (np.square(G).mean(0).sum(0), None),
        "asvd": (np.abs(x).mean(0), None),
        "svd_llm": (inputs, None),
        "kfac": (inputs, outputs),
    }
    for name, (A, B) in expected.items():
        for side, oracle in zip(metric_of(tiny, name, layer), (A, B)):
            assert (side is None) == (oracle is None)
            if oracle is not None:
                np.testing.assert_allclose(side, oracle, rtol=1e-5, atol=1e-6 * np.abs(oracle).max())


def test_asvd_takes_its_exponent(tiny: tiny_capture.TinyCapture) -> None:
    layer = LAYERS[0]
    magnitude = np.abs(tiny.inputs[layer.name].numpy()).mean((0, 1))
    for alpha in (0.0, 0.25, 1.0):
        A, _ = metric_of(tiny, "asvd", layer, asvd_alpha=alpha)
        np.testing.assert_allclose(A, magnitude ** (2 * alpha), rtol=1e-5)


def test_fwsvd_is_the_papers_weighting_of_rows(tiny: tiny_capture.TinyCapture) -> None:
    """Its loss Σ_ij A_j ΔW_ij² is ‖Î ΔWᵀ‖² with Î = diag(√Σ F)."""
    layer = LAYERS[1]
    G = tiny.gradient(layer.name).numpy()
    error = tiny.weights[layer.name].numpy()
    weighting = np.diag(np.sqrt(np.square(G).mean(0).sum(0)))
    A, _ = metric_of(tiny, "fwsvd", layer)
    assert np.trace(error @ np.diag(A) @ error.T) == pytest.approx(np.square(weighting @ error.T).sum(), rel=1e-5)


def test_gfwsvd_is_nearest_to_the_dense_fisher(tiny: tiny_capture.TinyCapture) -> None:
    kronecker.run(
        tiny.workspace, KroneckerParams(estimator="sequence", iterations=500, tolerance=1e-10, dtype="float64")
    )
    for layer in LAYERS:
        G = tiny.gradient(layer.name).numpy()
        vectors = G.transpose(0, 2, 1).reshape(len(G), -1)
        F = vectors.T @ vectors / len(G)
        n, m = layer.outputs, layer.inputs
        U, sigma, Vh = np.linalg.svd(F.reshape(m, n, m, n).transpose(0, 2, 1, 3).reshape(m * m, n * n))
        A, B = metric_of(tiny, "gfwsvd", layer)
        oracle = sigma[0] * np.kron(U[:, 0].reshape(m, m), Vh[0].reshape(n, n))
        np.testing.assert_allclose(np.kron(A, B), oracle, rtol=1e-4, atol=1e-5 * np.abs(oracle).max())


def test_gfwsvd_without_factors_names_the_parameter(tiny: tiny_capture.TinyCapture) -> None:
    kronecker.run(tiny.workspace, KroneckerParams(estimator="kfac"))
    with pytest.raises(ParameterError, match=r"Set kronecker\.estimator = 'sequence'"):
        metric_of(tiny, "gfwsvd", LAYERS[0])


def test_fwsvd_without_gradients_names_the_parameter(tmp_path: Path) -> None:
    tiny = tiny_capture.random_tokens(tmp_path)
    tiny_capture.publish(tiny, form="none")
    with pytest.raises(InputError, match=r"capture\.gradients is 'none'"):
        metric_of(tiny, "fwsvd", LAYERS[0])


def test_unknown_metric() -> None:
    with pytest.raises(ParameterError, match=r"subspace\.metric = 'svdllm' is unknown\. Did you mean 'svd_llm'"):
        METRICS.lookup("svdllm")
