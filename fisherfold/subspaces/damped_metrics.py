"""The damped metric of a layer, as stage `subspace` decomposed under it, for whatever comes after."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from fisherfold.linalg.factor_rounding import LayerMetric
from fisherfold.linalg.weighted_svd import Metric
from fisherfold.network.layers import LinearLayer
from fisherfold.run.params import SubspaceParams
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.subspaces.metrics import METRICS, MetricEntry, MetricSources, OwnDecomposition


class DampedMetrics:
    """(1 − δ) M + δ mean(diag M) I of both sides of every layer, with the δ of diagnostics.parquet.

    Args:
        capture, kronecker, subspace: the published outputs of these stages.
    """

    def __init__(self, capture: Path, kronecker: Path, subspace: Path) -> None:
        facts = json.loads((subspace / "subspace.json").read_text(encoding="utf-8"))
        params = SubspaceParams.model_validate({key: facts[key] for key in SubspaceParams.model_fields if key in facts})
        self.sources = MetricSources(Statistics(capture), kronecker, params)
        rows = pq.read_table(subspace / "diagnostics.parquet").to_pylist()
        self.dampings = {row["module"]: (row["input_damping"], row["output_damping"]) for row in rows}

    def of(self, layer: LinearLayer) -> LayerMetric:
        """A and B of a layer, whole matrices in float64; the identity of one that the metric says nothing about."""
        sides = (None, None) if layer.name not in self.dampings else self._metric(self.sources, layer)
        dampings = self.dampings.get(layer.name, (0.0, 0.0))
        sizes = layer.inputs, layer.outputs
        A, B = (_damped(metric, damping or 0.0, size) for metric, damping, size in zip(sides, dampings, sizes))
        return LayerMetric(A, B)

    @property
    def _metric(self) -> MetricEntry:
        entry = METRICS.lookup(self.sources.params.metric)
        assert not isinstance(entry, OwnDecomposition)  # refused before anything runs, see flows.pairs
        return entry


def _damped(metric: Metric, damping: float, size: int) -> np.ndarray:
    if metric is None:
        return np.eye(size)
    whole = metric.double() if metric.ndim == 2 else torch.diag(metric.double())
    return ((1 - damping) * whole + damping * whole.diagonal().mean() * torch.eye(size)).numpy()
