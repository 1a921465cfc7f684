"""The worked examples of CONTRIBUTING.md, as they stand there."""

import re

import numpy as np
import pytest
import tiny_capture
import torch
from project import ROOT

from fisherfold.allocators.allocation import ALLOCATORS, pose
from fisherfold.fisher.estimators import ESTIMATORS
from fisherfold.network.layers import LinearLayer
from fisherfold.network.sites import Site
from fisherfold.run.params import KroneckerParams, RanksParams, SubspaceParams
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.subspaces.metrics import METRICS, MetricSources

REGISTRIES = (METRICS, ALLOCATORS, ESTIMATORS)


@pytest.fixture(autouse=True)
def examples():
    """The code blocks, run; what they enter is taken out again."""
    before = [dict(registry._entries) for registry in REGISTRIES]
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S):
        exec(compile(block, "CONTRIBUTING.md", "exec"), {})
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry._entries = entries


@pytest.fixture
def tiny(tmp_path) -> tiny_capture.TinyCapture:
    tiny = tiny_capture.random_tokens(tmp_path)
    tiny_capture.publish(tiny)
    return tiny


def test_the_metric(tiny):
    sources = MetricSources(
        Statistics(tiny.workspace.out("capture")), tiny.workspace.out("kronecker"), SubspaceParams()
    )
    for layer in tiny_capture.LAYERS:
        A, B = METRICS.lookup("rms")(sources, layer)
        x = tiny.inputs[layer.name].double().reshape(-1, layer.inputs)
        torch.testing.assert_close(A.double(), x.square().mean(0), rtol=1e-5, atol=0)
        assert B is None


def test_the_allocator():
    sites = [Site(name, (LinearLayer(name, 8, 12, bias=False, transposed=False, group=name),)) for name in "ab"]
    spectra = [np.linspace(8, 1, 8), np.array([9.0, *np.full(7, 0.1)])]
    allocation = pose(sites, spectra, RanksParams(ratio=0.5, storage="factors"))
    ranks = ALLOCATORS.lookup("same_energy")(allocation)
    assert allocation.costs[np.arange(2), ranks].sum() <= allocation.budget
    assert ranks[0] > ranks[1] > 0


def test_the_estimator(tiny):
    from fisherfold.fisher.estimators import CapturedLayer

    layer = tiny_capture.LAYERS[0]
    samples = CapturedLayer(Statistics(tiny.workspace.out("capture")), layer, KroneckerParams())
    estimate = ESTIMATORS.lookup("output_only").estimate(samples)
    x = tiny.inputs[layer.name].double().reshape(-1, layer.inputs)
    torch.testing.assert_close(
        estimate.A.double(), x.square().mean() * torch.eye(layer.inputs).double(), rtol=1e-5, atol=1e-9
    )
