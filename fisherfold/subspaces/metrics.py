"""Compression methods as metrics: what an error of a layer's weight costs, chosen by ``subspace.metric``.

    loss(ΔW) = tr(ΔWᵀ B ΔW A)

An entry gives A and B of one layer as a full matrix, a diagonal or None (the identity), in their true scale: nothing is
normalised per layer, so the losses of two layers under one metric can be compared. With B = I a loss is the squared error of the layer's output
per token (svd_llm) or of its weight (svd); with both sides given it is the second-order change of the model's loss up
to one factor for the whole model.

Shapes: x [m] input and d [n] output gradient at one token, G [n, m] gradient of one sequence.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fisherfold.linalg.weighted_svd import Metric
from fisherfold.network.layers import LinearLayer
from fisherfold.run.errors import ParameterError
from fisherfold.run.params import SubspaceParams
from fisherfold.run.registry import Registry
from fisherfold.run.store import read_array
from fisherfold.statistics.layer_statistics import Statistics


@dataclass(frozen=True)
class MetricSources:
    """What a metric may read.

    Attributes:
        statistics: of stage `capture`.
        kronecker: the published output of stage `kronecker`.
        params: of stage `subspace`.
    """

    statistics: Statistics
    kronecker: Path
    params: SubspaceParams


Decomposition = Callable[
    [MetricSources, Path, Sequence[LinearLayer], list[dict[str, Any]]], Iterator[tuple[str, torch.Tensor]]
]
"""(sources, model folder, layers of one group, rows) -> arrays of their bases; `rows` gets a dict for every rank to choose."""


@dataclass(frozen=True)
class OwnDecomposition:
    """An entry that is no metric on weights: it decomposes a group of layers itself, into factors that share the right one."""

    decompose: Decomposition


MetricEntry = Callable[[MetricSources, LinearLayer], tuple[Metric, Metric]]
METRICS: Registry[MetricEntry | OwnDecomposition] = Registry("subspace.metric")


@METRICS.register("svd")
def svd(sources: MetricSources, layer: LinearLayer) -> tuple[Metric, Metric]:
    """A = B = I (Eckart & Young 1936)."""
    return None, None


@METRICS.register("fwsvd")
def fwsvd(sources: MetricSources, layer: LinearLayer) -> tuple[Metric, Metric]:
    """A = diag(Σ_rows E[G∘G]), whose root is the paper's Î = diag(√Σ F) (Hsu et al. 2022, arXiv 2207.00112)."""
    return sources.statistics.fisher_inputs(layer) / sources.statistics.sequences, None


@METRICS.register("asvd")
def asvd(sources: MetricSources, layer: LinearLayer) -> tuple[Metric, Metric]:
    """A = diag(E|x|^2α), whose root is the paper's S = diag(E|x|^α) (Yuan et al. 2023, arXiv 2312.05821)."""
    return sources.statistics.input_magnitude(layer) ** (2 * sources.params.asvd_alpha), None


@METRICS.register("svd_llm")
def svd_llm(sources: MetricSources, layer: LinearLayer) -> tuple[Metric, Metric]:
    """A = E[x xᵀ] (SVD-LLM, arXiv 2403.07378; with an eigen root, as its version 2, arXiv 2503.12340)."""
    return sources.statistics.input_covariance(layer), None


@METRICS.register("kfac")
def kfac(sources: MetricSources, layer: LinearLayer) -> tuple[Metric, Metric]:
    """A = E[x xᵀ], B = E[d dᵀ]: the token-wise Kronecker factors (K-FAC, arXiv 1503.05671).

    Of an expert that sees N_e of N tokens, B is the mean over those it sees: A ⊗ B, with both over all tokens, would count N_e / N twice.
    """
    A, B = sources.statistics.input_covariance(layer), sources.statistics.output_covariance(layer)
    if layer.stack:
        B = B * (sources.statistics.tokens / max(1, sources.statistics.tokens_seen(layer)))
    return A, B


@METRICS.register("gfwsvd")
def gfwsvd(sources: MetricSources, layer: LinearLayer) -> tuple[Metric, Metric]:
    """A ⊗ B nearest to the Fisher of sequences or of tokens, from stage `kronecker` (GFWSVD, arXiv 2505.17974).

    Raises:
        ParameterError: stage `kronecker` estimated none.
    """
    facts = json.loads((sources.kronecker / "kronecker.json").read_text(encoding="utf-8"))
    if not facts["factors"]:
        raise ParameterError(
            f"subspace.metric = 'gfwsvd' needs Kronecker factors, and kronecker.estimator = {facts['estimator']!r} computes none. "
            "Set kronecker.estimator = 'sequence' (or 'token'), or subspace.metric = 'kfac'."
        )
    factors = sources.kronecker / "factors"
    return read_array(factors, f"{layer.name}/A"), read_array(factors, f"{layer.name}/B")
