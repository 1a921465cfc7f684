"""Shrinkage of a metric towards the mean of its diagonal, its share δ chosen from data: ``subspace.input_damping: ledoit_wolf``.

    M ← (1 − δ) M + δ mean(diag M) I

Both rules minimise E‖shrunk − true‖². They differ in how they know the error of M:

- `ledoit_wolf` is told the sampling variance that stage `kronecker` measured (sequences as independent samples, whatever the tails
  of their distribution), so it needs sampled tokens for the token-wise factors.
- `oas` assumes N independent Gaussian samples, N being the nominal count of rank-one terms: tokens for the token-wise factors and the
  estimator `token`, gradients times the rank of their sketch for `sequence`. Gradients are heavy-tailed and tokens of a sequence
  alike, so its δ is a lower bound rather than an estimate.

Shapes: M [p, p].
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from fisherfold.run.errors import ParameterError
from fisherfold.run.registry import Registry

COMPARISON_FILE = "comparison.parquet"  # of stage `kronecker`
TOKEN_WISE = {"svd_llm": "kfac", "kfac": "kfac"}
"""Metrics whose sampling error is that of an estimator other than the one that stage `kronecker` was asked for."""


@dataclass(frozen=True)
class FactorSampling:
    """What is known of one factor's sampling.

    Attributes:
        samples: N, nominal.
        variance: E‖M̂ − M‖² / ‖M̂‖²; None if it was not measured.
    """

    samples: int
    variance: float | None


Shrinkage = Callable[[torch.Tensor, FactorSampling], float]
SHRINKAGES: Registry[Shrinkage] = Registry("subspace damping")


@SHRINKAGES.register("ledoit_wolf")
def ledoit_wolf(values: torch.Tensor, sampling: FactorSampling) -> float:
    """δ = E‖M̂ − M‖² / ‖M̂ − μI‖², μ = mean(diag M̂), at most 1 (Ledoit & Wolf 2004, J. Multivariate Analysis 88).

    Args:
        values: eigenvalues of M̂ [p].
        sampling: of M̂.

    Raises:
        ParameterError: the variance was not measured.
    """
    if sampling.variance is None:
        raise ParameterError(
            "damping 'ledoit_wolf' needs a sampling variance that was not measured. Set capture.tokens_per_sequence to 2 or more "
            "(with two sequences or more), or choose 'oas' or a number."
        )
    spread = 1 - _rank(values) / len(values)  # ‖M̂ − μI‖² / ‖M̂‖²
    return min(1.0, sampling.variance / spread) if spread > 0 else 1.0


@SHRINKAGES.register("oas")
def oas(values: torch.Tensor, sampling: FactorSampling) -> float:
    """δ = ((1 − 2/p) tr M² + tr² M) / ((N + 1 − 2/p) (tr M² − tr² M / p)), at most 1 (Chen et al. 2010, arXiv 0907.4698)."""
    size, rank = len(values), _rank(values)
    spread = (sampling.samples + 1 - 2 / size) * (1 - rank / size)
    return min(1.0, (1 - 2 / size + rank) / spread) if spread > 0 else 1.0


def _rank(values: torch.Tensor) -> float:
    """tr² M / tr M²."""
    return (values.sum() ** 2 / values.square().sum()).item()


def read_sampling(kronecker: Path, metric: str, module: str) -> tuple[FactorSampling, FactorSampling]:
    """The sampling of a metric's input and output factor, as stage `kronecker` recorded it.

    Raises:
        ParameterError: the metric's factors are not means of samples, or nothing was recorded of them.
    """
    own = (
        json.loads((kronecker / "kronecker.json").read_text(encoding="utf-8"))["estimator"]
        if metric == "gfwsvd"
        else None
    )
    estimator = TOKEN_WISE.get(metric, own)
    if estimator is None:
        raise ParameterError(
            f"subspace.metric = {metric!r} is not a mean of samples that a damping could be chosen from. Give it a number, or use "
            f"{', '.join((*TOKEN_WISE, 'gfwsvd'))}."
        )
    table = pq.read_table(kronecker / COMPARISON_FILE)
    rows = table.filter((pc.field("module") == module) & (pc.field("estimator") == estimator)).to_pylist()
    if not rows:
        raise ParameterError(
            f"A damping chosen from data needs the diagnostics of estimator {estimator!r}. Set kronecker.diagnostics to 'basic'."
        )
    of_inputs, of_outputs = (
        FactorSampling(rows[0][f"{side}_samples"], rows[0][f"{side}_variance"]) for side in ("input", "output")
    )
    return of_inputs, of_outputs
