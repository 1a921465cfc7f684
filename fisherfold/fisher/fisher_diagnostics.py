"""How well Kronecker factors fit a layer's Fisher and how far they can be trusted: one row for each estimator compared.

`kronecker.diagnostics` chooses how much of it is computed:

    none     nothing beyond the factors asked for
    basic    fit of the chosen estimator and of kfac to the same gradients, effective ranks
    full     every estimator that the capture allows, condition numbers, σ₁/σ₂, the error from two halves of the sequences

Shapes: A [m, m], B [n, n]; F the Fisher of the captured gradients (of sequences, or averages of several).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fisherfold.fisher.estimators import ESTIMATORS, CapturedLayer, Estimate
from fisherfold.fisher.nearest_kronecker import KroneckerPair, leading_sigmas, relative_residual
from fisherfold.fisher.sampling import condition, effective_count, effective_rank, halves_error
from fisherfold.run.registry import Registry


@dataclass(frozen=True)
class Level:
    """How much is computed.

    Attributes:
        compared: names of the estimators, given what there is and the one that was asked for.
        fitted: whether factors are compared with F.
        thorough: whether what takes decompositions and further solutions is computed.
    """

    compared: Callable[[CapturedLayer], list[str]]
    fitted: bool
    thorough: bool


LEVELS: Registry[Level] = Registry("kronecker.diagnostics")
LEVELS.register("none")(Level(lambda captured: [captured.params.estimator], False, False))
LEVELS.register("basic")(Level(lambda captured: sorted({"kfac", captured.params.estimator}), True, False))
LEVELS.register("full")(Level(lambda captured: available(captured), True, True))


def available(captured: CapturedLayer) -> list[str]:
    """The estimators that the capture, and the passes that were made, have the data for."""
    known = {name: ESTIMATORS.lookup(name) for name in ESTIMATORS}
    there = {name: entry for name, entry in known.items() if captured.token_sums or not entry.passes}
    return [name for name, entry in there.items() if entry.reads is None or getattr(captured.statistics, entry.reads)]


def describe_layer(captured: CapturedLayer) -> dict[str, Any]:
    """What is known of the layer whatever the estimator: ‖F‖, σ₁/σ₂, effective numbers of sequences and tokens."""
    level, statistics = LEVELS.lookup(captured.params.diagnostics), captured.statistics
    names = ("fisher_norm", "sigma_ratio", "effective_sequences", "effective_tokens")
    row: dict[str, float | None] = dict.fromkeys(names)
    if level.fitted and statistics.has_sequence_gradients:
        row["fisher_norm"] = captured.fisher_norm
        row["effective_sequences"] = effective_count(statistics.gradient_norms(captured.layer))
    if level.thorough and statistics.has_sequence_gradients:
        sigmas = leading_sigmas(captured.fisher, 2)
        row["sigma_ratio"] = sigmas[0] / sigmas[1] if len(sigmas) > 1 else None
    if level.fitted and statistics.has_tokens:
        row["effective_tokens"] = effective_count(
            torch.cat([block.energies() for block in captured.samples.token_blocks()])
        )
    return row


def describe_estimate(captured: CapturedLayer, name: str, estimate: Estimate) -> dict[str, Any]:
    """One row of comparison.parquet, without the module."""
    level = LEVELS.lookup(captured.params.diagnostics)
    variances = estimate.variances or (None, None)
    row = {
        "estimator": name,
        **_fit(captured, estimate, level),
        "iterations": estimate.iterations,
        "converged": estimate.converged,
        "input_samples": estimate.samples[0],
        "output_samples": estimate.samples[1],
        "input_variance": variances[0],
        "output_variance": variances[1],
        "input_rank": effective_rank(estimate.A),
        "output_rank": effective_rank(estimate.B),
        "input_condition": condition(estimate.A) if level.thorough else None,
        "output_condition": condition(estimate.B) if level.thorough else None,
        "sampling_error": _halves(captured, name, estimate) if level.thorough else None,
    }
    return row


def _fit(captured: CapturedLayer, estimate: Estimate, level: Level) -> dict[str, Any]:
    """scale c that makes c · A ⊗ B nearest to F, norm ‖c · A ⊗ B‖ and residual ‖F − c · A ⊗ B‖ / ‖F‖."""
    if not level.fitted or not captured.statistics.has_sequence_gradients:
        return {"scale": None, "norm": None, "residual": None}
    scale: float | None = 1.0
    norm = estimate.nearest_norm
    if norm is None:
        size = _norm(estimate.A) * _norm(estimate.B)
        norm = captured.fisher.overlap(estimate.A, estimate.B) / size if size > 0 else 0.0
        scale = norm / size if size > 0 else None
    return {"scale": scale, "norm": norm, "residual": relative_residual(norm, captured.fisher_norm)}


def _halves(captured: CapturedLayer, name: str, estimate: Estimate) -> float | None:
    """Sampling error of an estimator that is the nearest pair of some Fisher, each half solved from the pair of both."""
    fisher = ESTIMATORS.lookup(name).fisher
    gradients = -(-captured.statistics.sequences // captured.params.sequences_per_gradient)
    if fisher is None or gradients < 2:
        return None

    def nearest(half: int) -> KroneckerPair:
        part = replace(captured, half=half)
        return part.nearest(fisher(part), estimate.A)

    return halves_error(nearest)


def _norm(matrix: torch.Tensor) -> float:
    return torch.linalg.vector_norm(matrix, dtype=torch.float64).item()
