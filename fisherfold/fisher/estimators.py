"""Estimators of a layer's Kronecker factors, chosen by ``kronecker.estimator``.

Shapes: n outputs, m inputs, S sequences, N tokens, k sketch rank; F the per-sequence Fisher of `nearest_kronecker`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from fisherfold.fisher.gradient_samples import GradientSamples
from fisherfold.fisher.nearest_kronecker import KroneckerPair, nearest_kronecker
from fisherfold.fisher.sampling import gram_variance
from fisherfold.fisher.streamed_fisher import SpannedFisher, StreamedFisher, fisher_of
from fisherfold.fisher.token_pass import step_sums
from fisherfold.network.layers import LinearLayer
from fisherfold.run.params import KroneckerParams
from fisherfold.run.registry import Registry
from fisherfold.statistics.layer_statistics import Statistics


@dataclass(frozen=True)
class Estimate:
    """Kronecker factors of one layer's Fisher.

    Attributes:
        A: [m, m].
        B: [n, n].
        nearest_norm: ‖A ⊗ B‖, if no other pair is nearer to F.
        iterations: steps done.
        converged: whether they reached the tolerance.
        samples: rank-one terms that A and B are sums of, the nominal sample count of `shrinkage.oas`.
        variances: E‖Â − A‖² / ‖Â‖² and the same of B, with sequences as the independent samples; None where they cannot be had.
    """

    A: torch.Tensor
    B: torch.Tensor
    samples: tuple[int, int]
    variances: tuple[float, float] | None = None
    iterations: int = 0
    converged: bool = True
    nearest_norm: float | None = None


@dataclass(frozen=True)
class CapturedLayer:
    """A layer as it was captured, which its estimators and diagnostics read; what two of them share is made once.

    Attributes:
        half: 0 or 1 to see every second sequence only; None for all.
        token_sums: folders of the last token pass, of the parts that hold this layer; see `token_pass`.
    """

    statistics: Statistics
    layer: LinearLayer
    params: KroneckerParams
    half: int | None = None
    token_sums: tuple[Path, ...] = ()

    @property
    def samples(self) -> GradientSamples:
        """The gradients and tokens of the layer."""
        return GradientSamples(self.statistics, self.layer, self.params, self.half)

    @cached_property
    def fisher(self) -> StreamedFisher | SpannedFisher:
        """F of the sequences' gradients, or of their averages."""
        return fisher_of(self.samples.blocks)

    @cached_property
    def fisher_norm(self) -> float:
        """‖F‖."""
        return self.fisher.norm_squared() ** 0.5

    @cached_property
    def token_fisher(self) -> StreamedFisher | SpannedFisher:
        """The Fisher of single tokens' gradients."""
        return fisher_of(self.samples.token_blocks)

    def nearest(
        self,
        fisher: StreamedFisher | SpannedFisher,
        start: torch.Tensor | None = None,
        with_variances: bool = False,
    ) -> KroneckerPair:
        """The nearest pair by the parameters' method.

        A streamed F starts from E[x xᵀ]; one in the span of its gradients from the identity, since its steps cost less than
        reading that.
        """
        if start is None and isinstance(fisher, StreamedFisher):
            start = self.statistics.input_covariance(self.layer)
        limits = self.params.iterations, self.params.tolerance, self.params.method
        return nearest_kronecker(fisher, start, *limits, with_norm=False, with_variances=with_variances)


@dataclass(frozen=True)
class Estimator:
    """An entry of the registry.

    Attributes:
        estimate: the function that does it, for one layer.
        reads: what it needs of the capture, a property of `Statistics` (has_sequence_gradients, has_tokens); None for sums alone.
        fisher: the Fisher that it is the nearest pair of; None if it is not defined so, or not kept.
        passes: whether it needs passes over the calibration text (`CapturedLayer.token_sums`).
    """

    estimate: Callable[[CapturedLayer], Estimate]
    reads: str | None = None
    fisher: Callable[[CapturedLayer], StreamedFisher | SpannedFisher] | None = None
    passes: bool = False

    @property
    def makes_factors(self) -> bool:
        """Whether its estimates hold factors of their own."""
        return self.fisher is not None or self.passes


ESTIMATORS: Registry[Estimator] = Registry("kronecker.estimator")


def kfac(captured: CapturedLayer) -> Estimate:
    """Token-wise factors A = E[x xᵀ], B = E[d dᵀ] (K-FAC, arXiv 1503.05671), over all tokens: neither trimmed nor clipped."""
    statistics, layer = captured.statistics, captured.layer
    A, B = statistics.input_covariance(layer), statistics.output_covariance(layer)
    variances = None
    if statistics.has_tokens:
        tokens = captured.samples.tokens
        of_A, of_B = (gram_variance(tokens(side), M, statistics) for side, M in (("x", A), ("d", B)))
        variances = None if of_A is None or of_B is None else (of_A, of_B)
    seen = statistics.tokens_seen(layer)
    return Estimate(A, B, (seen, seen), variances)


def sequence(captured: CapturedLayer) -> Estimate:
    """The Kronecker product nearest to the per-sequence Fisher (GFWSVD, arXiv 2505.17974).

    With kronecker.sequences_per_gradient = c, to that of gradients averaged over c sequences, as the paper did (c = 32).
    """
    pair = captured.nearest(captured.fisher, with_variances=True)
    facts, layer, together = captured.statistics.facts, captured.layer, captured.params.sequences_per_gradient
    of_sequence = facts["sketch_rank" if facts["gradients"] == "sketch" else "sequence_length"]
    rank = min(together * of_sequence, layer.outputs, layer.inputs)
    return replace(
        _of_pair(captured, pair, captured.fisher.count * rank),
        nearest_norm=None if captured.params.prior else pair.norm,
    )


def token(captured: CapturedLayer) -> Estimate:
    """The Kronecker product nearest to the Fisher of single tokens, (1/N) Σ_t vec(d_t x_tᵀ) vec(d_t x_tᵀ)ᵀ, of the sampled tokens.

    Each step is two weighted Gram products, and nothing is formed for pairs of tokens of different sequences. A few tokens with
    huge gradients rule this Fisher (their norms count to the fourth power), so they are clipped to kronecker.clip times the
    median norm, and kronecker.trim_tokens leaves out the first tokens of every sequence.
    """
    pair = captured.nearest(captured.token_fisher, with_variances=True)
    return _of_pair(captured, pair, captured.token_fisher.count)


def every_token(captured: CapturedLayer) -> Estimate:
    """The nearest Kronecker pair of the Fisher of single tokens, of all calibration tokens: power steps by `fisherfold.fisher.token_pass`.

    Both factors get the norm √σ, σ = √(‖R Â‖ ‖Rᵀ B̂‖) with the unit factors that the last pass started from; σ₁ once the steps converge.
    """
    statistics, trimmed = captured.statistics, captured.params.trim_tokens
    tokens = statistics.tokens - statistics.sequences * min(trimmed, statistics.facts["sequence_length"])
    A, B = (M / max(1, tokens) for M in step_sums(captured.token_sums, captured.layer))
    sizes = [torch.linalg.vector_norm(M).item() for M in (A, B)]
    sigma = (sizes[0] * sizes[1]) ** 0.5
    if sigma > 0:
        A, B = (M * (sigma**0.5 / size) for M, size in zip((A, B), sizes, strict=True))
    pair = KroneckerPair(A, B, sigma, None, captured.params.token_pass.passes, True)
    return _of_pair(captured, pair, tokens)


def _of_pair(captured: CapturedLayer, pair: KroneckerPair, samples: int) -> Estimate:
    A, B, variances, prior = pair.A, pair.B, pair.variances, captured.params.prior
    if prior:
        statistics, layer = captured.statistics, captured.layer
        A, of_A = shrink(A, statistics.input_covariance(layer), prior)
        B, of_B = shrink(B, statistics.output_covariance(layer), prior)
        variances = variances and (of_A * variances[0], of_B * variances[1])
    return Estimate(A, B, (samples, samples), variances, pair.iterations, pair.converged)


def shrink(factor: torch.Tensor, target: torch.Tensor, share: float) -> tuple[torch.Tensor, float]:
    """(1 − π) M + π (tr M / tr T) T: a factor of few effective samples shrunk towards a target T with share π.

    T is the token-wise factor, a sum over all tokens, where damping's target is a multiple of the identity (Ledoit and Wolf 2004).

    Returns:
        The matrix, and what its relative variance is to be multiplied by, T taken as exact: ((1 − π) ‖M‖ / ‖result‖)².
    """
    trace = target.trace()
    if not trace > 0:
        return factor, 1.0
    mixed = (1 - share) * factor + share * (factor.trace() / trace) * target.to(factor)
    return mixed, float(((1 - share) * factor.norm() / mixed.norm()) ** 2)


ESTIMATORS.register("kfac")(Estimator(kfac))
ESTIMATORS.register("sequence")(Estimator(sequence, "has_sequence_gradients", lambda captured: captured.fisher))
ESTIMATORS.register("every_token")(Estimator(every_token, passes=True))
ESTIMATORS.register("token")(Estimator(token, "has_tokens", lambda captured: captured.token_fisher))
