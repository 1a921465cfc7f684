"""Estimators of a layer's Kronecker factors, chosen by ``kronecker.estimator``.

Shapes: n outputs, m inputs, S sequences, k sketch rank; F the per-sequence Fisher of `nearest_kronecker`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from stages.layers import LinearLayer
from stages.models import decomposing_device
from stages.nearest_kronecker import (
    BLOCK_COLUMNS,
    BLOCK_NUMBERS,
    ExactGradients,
    Gradients,
    SketchedGradients,
    StreamedFisher,
    fisher_of,
    nearest_kronecker,
    relative_residual,
)
from stages.params import KroneckerParams
from stages.registry import Registry
from stages.statistics import Statistics

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Estimate:
    """Kronecker factors of one layer's Fisher, and how well they fit the per-sequence Fisher F.

    Attributes:
        factors: A [m, m] and B [n, n]; None where they are the captured E[x xᵀ] and E[d dᵀ].
        scale: c that makes c · A ⊗ B nearest to F; None if the gradients were not captured, or are all zero.
        norm: ‖c · A ⊗ B‖, the σ₁ of the nearest pair.
        fisher_norm: ‖F‖.
        iterations: power steps done.
        converged: whether they reached the tolerance.
    """

    factors: tuple[torch.Tensor, torch.Tensor] | None
    scale: float | None = None
    norm: float | None = None
    fisher_norm: float | None = None
    iterations: int = 0
    converged: bool = True

    @property
    def residual(self) -> float | None:
        """‖F − c · A ⊗ B‖ / ‖F‖."""
        return None if self.norm is None else relative_residual(self.norm, self.fisher_norm)


@dataclass(frozen=True)
class Estimator:
    """An entry of the registry.

    Attributes:
        estimate: the function that does it, for one layer.
        needs_gradients: whether it reads per-sequence gradients, beyond measuring its residual.
        makes_factors: whether its estimates hold factors of their own.
    """

    estimate: Callable[[Statistics, LinearLayer, KroneckerParams], Estimate]
    needs_gradients: bool
    makes_factors: bool


ESTIMATORS: Registry[Estimator] = Registry("kronecker.estimator")


def kfac(statistics: Statistics, layer: LinearLayer, params: KroneckerParams) -> Estimate:
    """Token-wise factors A = E[x xᵀ], B = E[d dᵀ] (K-FAC, arXiv 1503.05671), compared with F where gradients exist."""
    if not statistics.has_gradients:
        return Estimate(None)
    A, B = statistics.input_covariance(layer), statistics.output_covariance(layer)
    fisher = StreamedFisher(lambda: gradient_blocks(statistics, layer, params))
    size = (_norm(A) * _norm(B)).item()
    overlap = fisher.overlap(A, B)
    norm = overlap / size if size > 0 else 0.0
    return Estimate(None, norm / size if size > 0 else None, norm, fisher.norm_squared() ** 0.5)


def sequence(statistics: Statistics, layer: LinearLayer, params: KroneckerParams) -> Estimate:
    """The Kronecker product nearest to the per-sequence Fisher (GFWSVD, arXiv 2505.17974).

    A streamed F starts from E[x xᵀ]; one in the span of its gradients from the identity, since its steps cost less than reading that.
    """
    fisher = fisher_of(lambda: gradient_blocks(statistics, layer, params))
    start = statistics.input_covariance(layer) if isinstance(fisher, StreamedFisher) else None
    pair = nearest_kronecker(fisher, start, params.iterations, params.tolerance)
    return Estimate((pair.A, pair.B), 1.0, pair.norm, pair.fisher_norm, pair.iterations, pair.converged)


ESTIMATORS.register("kfac")(Estimator(kfac, needs_gradients=False, makes_factors=False))
ESTIMATORS.register("sequence")(Estimator(sequence, needs_gradients=True, makes_factors=True))


def gradient_blocks(statistics: Statistics, layer: LinearLayer, params: KroneckerParams) -> Iterator[Gradients]:
    """The captured gradients of a layer in blocks of a fixed size, whatever the shards' size."""
    device, dtype = decomposing_device(), DTYPES[params.dtype]
    for arrays in regroup(statistics.gradient_shards(layer)):
        kind = ExactGradients if len(arrays) == 1 else SketchedGradients
        yield kind(*(array.to(device, dtype) for array in arrays))


def regroup(shards: Iterable[tuple[torch.Tensor, ...]]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Shards of arrays [S, …], (left, right) or (gradient,), cut and joined to blocks of equal numbers of sequences."""
    pieces, held = [], 0
    for shard in shards:
        size = _sequences_per_block(shard)
        while held + len(shard[0]) >= size:
            yield _join([*pieces, tuple(array[: size - held] for array in shard)])
            shard = tuple(array[size - held :] for array in shard)
            pieces, held = [], 0
        if len(shard[0]):
            pieces.append(shard)
            held += len(shard[0])
    if pieces:
        yield _join(pieces)


def _sequences_per_block(shard: tuple[torch.Tensor, ...]) -> int:
    exact = len(shard) == 1
    return max(1, BLOCK_NUMBERS // shard[0][0].numel() if exact else BLOCK_COLUMNS // shard[0].shape[2])


def _join(pieces: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(arrays) for arrays in zip(*pieces))


def _norm(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(matrix, dtype=torch.float64)
