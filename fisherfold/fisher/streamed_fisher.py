"""The two forms of a layer's Fisher matrix that `nearest_kronecker` takes its steps with: folded over blocks, or in the gradients' span.

`StreamedFisher` folds over blocks of gradients and holds nothing that grows with N. `SpannedFisher` writes the factors in the span of the
gradients, A = Σ_s V_s D_s V_sᵀ with small D_s [k, k], and needs only the Gram matrices UᵀU and VᵀV [S k, S k]. A step then costs
4 (S k)² k instead of 2 S k (n² + m²). `fisher_of` takes it while all gradients are one block and S k ≤ 2 (n + m), where the two Gram
matrices cost about as much as one streamed iteration.

Shapes: n outputs, m inputs, S sequences of one block, N of all, k sketch rank, G_s = U_s V_sᵀ [n, m].
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from fisherfold.fisher.gradient_blocks import Gradients, SketchedGradients, block_sums, symmetric_product

CACHED_COLUMNS = 256  # of them whose weighted products stay in a processor's cache


def _like(factor: torch.Tensor, block: Gradients) -> torch.Tensor:
    return factor.to(block.device, block.dtype)


def _liker(factor: torch.Tensor) -> Callable[[Gradients], torch.Tensor]:
    """`_like` of one factor for many blocks, converted once."""
    converted: dict[tuple[Any, ...], torch.Tensor] = {}

    def like(block: Gradients) -> torch.Tensor:
        key = block.device, block.dtype
        if key not in converted:
            converted[key] = _like(factor, block)
        return converted[key]

    return like


class StreamedFisher:
    """F as a fold over blocks of gradients, in their order; memory does not depend on the number of blocks.

    Products are taken in the blocks' dtype; sums over blocks, factors and norms are float64 (a float32 norm of a whole
    matrix is off by up to 3e-4).

    Args:
        blocks: gives the blocks anew each time it is called.
    """

    def __init__(self, blocks: Callable[[], Iterable[Gradients]]) -> None:
        opening = list(islice(blocks(), 2))
        self.shape = opening[0].shape
        self.single = opening[0] if len(opening) == 1 else None  # kept, not read again at every step
        self.blocks = blocks if self.single is None else lambda: opening
        self._count: int | None = None  # known after the first step

    @property
    def count(self) -> int:
        """N."""
        return sum(len(block) for block in self.blocks()) if self._count is None else self._count

    def first(self, start: torch.Tensor | None) -> torch.Tensor:
        """`outputs` of a matrix A [m, m], by default the identity."""
        return self.outputs(torch.eye(self.shape[1]) if start is None else start)

    def outputs(self, A: torch.Tensor) -> torch.Tensor:
        """(1/N) Σ G A Gᵀ [n, n]."""
        like = _liker(A)
        return self._mean(lambda block: block.outputs(like(block)))

    def inputs(self, B: torch.Tensor) -> torch.Tensor:
        """(1/N) Σ Gᵀ B G [m, m]."""
        like = _liker(B)
        return self._mean(lambda block: block.inputs(like(block)))

    def overlap(self, A: torch.Tensor, B: torch.Tensor) -> float:
        """⟨F, A ⊗ B⟩ = (1/N) Σ ⟨G, B G A⟩."""
        terms = [(block.overlap(_like(A, block), _like(B, block)), len(block)) for block in self.blocks()]
        return sum(overlap for overlap, _ in terms) / sum(count for _, count in terms)

    def norm_squared(self) -> float:
        """‖F‖² = N⁻² Σ_{s,t} ⟨G_s, G_t⟩², over pairs of blocks."""
        total, sequences = 0.0, 0
        for row, block in enumerate(self.blocks()):
            sequences += len(block)
            for column, other in enumerate(self.blocks()):
                if column > row:
                    break
                squares = block.products(block if column == row else other).square().sum().item()
                total += squares if column == row else 2 * squares
        return total / sequences**2

    def variances(self, A: torch.Tensor, B: torch.Tensor, sigma: float) -> tuple[float, float] | None:
        """Relative sampling variances of σA = (1/N) Σ Gᵀ B G and σB = (1/N) Σ G A Gᵀ, see `relative_variance`."""
        parts = [
            (*block.squares(_like(A, block), _like(B, block)), block.clusters, len(block)) for block in self.blocks()
        ]
        inputs, outputs, clusters, gradients = (sum(column) for column in zip(*parts))
        return relative_variance(inputs, outputs, clusters, gradients * sigma)

    def input_factor(self, A: torch.Tensor, scale: float) -> torch.Tensor:
        """A, as it goes into the pair."""
        return A * scale

    def output_factor(self, B: torch.Tensor, scale: float) -> torch.Tensor:
        """B, as it goes into the pair."""
        return B * scale

    def input_trace(self, A: torch.Tensor) -> float:
        """tr A."""
        return A.trace().item()

    def output_trace(self, B: torch.Tensor) -> float:
        """tr B."""
        return B.trace().item()

    def _mean(self, term: Callable[[Gradients], torch.Tensor]) -> torch.Tensor:
        total: torch.Tensor | None = None
        sequences = 0
        for block in self.blocks():
            part = term(block)
            total = part.double() if total is None else total.add_(part)
            sequences += len(block)
        assert total is not None
        self._count = sequences
        return total / sequences


def relative_variance(inputs: float, outputs: float, clusters: int, size: float) -> tuple[float, float] | None:
    """E‖M̂ − M‖² / ‖M̂‖² of a mean M̂ = (1/N) Σ_c M_c, for both factors; None for one cluster.

        (Σ_c ‖M_c‖² / ‖Σ_c M_c‖² − 1 / C) · C / (C − 1)

    Args:
        inputs: Σ_c ‖A_c‖² over the clusters c of gradients that are independent of one another.
        outputs: Σ_c ‖B_c‖².
        clusters: C.
        size: ‖Σ_c A_c‖ = ‖Σ_c B_c‖ = N σ.
    """
    if clusters < 2:
        return None
    of_A, of_B = ((squares / size**2 - 1 / clusters) * clusters / (clusters - 1) for squares in (inputs, outputs))
    return of_A, of_B


@dataclass(frozen=True)
class SpanVector:
    """A factor M = Σ_s P_s D_s P_sᵀ in the span of stacked columns P, with its images C_s = P_sᵀ M P_s; both [S, k, k].

    ‖M‖² = Σ_s ⟨D_s, C_s⟩, and both parts are linear in M.
    """

    cores: torch.Tensor
    images: torch.Tensor

    def norm(self) -> torch.Tensor:
        """‖M‖."""
        return (self.cores.double() * self.images).sum().clamp(min=0).sqrt()

    def inner(self, other: "SpanVector") -> float:
        """⟨M, other⟩."""
        return (self.cores.double() * other.images).sum().item()

    def __truediv__(self, number: torch.Tensor) -> "SpanVector":
        return SpanVector(self.cores / number, self.images / number)

    def __mul__(self, number: float) -> "SpanVector":
        return SpanVector(self.cores * number, self.images * number)

    def __add__(self, other: "SpanVector") -> "SpanVector":
        return SpanVector(self.cores + other.cores, self.images + other.images)

    def __sub__(self, other: "SpanVector") -> "SpanVector":
        return SpanVector(self.cores - other.cores, self.images - other.images)


class SpannedFisher:
    """F of one block of sketched gradients, its factors written in the span of U and V."""

    def __init__(self, block: SketchedGradients) -> None:
        self.block = block
        self.shape, self.count = block.shape, len(block)
        self.left_gram = symmetric_product(block.left.T, block.left.T)
        self.right_gram = symmetric_product(block.right.T, block.right.T)

    def first(self, start: torch.Tensor | None) -> SpanVector:
        """(1/N) Σ G A Gᵀ of a matrix A [m, m] that need not lie in the span, by default the identity (at no cost)."""
        if start is not None:
            return self._vector(self.left_gram, self.block.images(self.block.right, _like(start, self.block)))
        size = self.block.count, self.block.rank
        return self._vector(
            self.left_gram, self.right_gram.view(*size, *size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        )

    def outputs(self, A: SpanVector) -> SpanVector:
        return self._vector(self.left_gram, A.images)

    def inputs(self, B: SpanVector) -> SpanVector:
        return self._vector(self.right_gram, B.images)

    def norm_squared(self) -> float:
        """‖F‖², see `StreamedFisher.norm_squared`."""
        products = block_sums(self.left_gram, self.right_gram, self.block.rank, self.block.rank)
        return products.square().sum().item() / len(self.block) ** 2

    def overlap(self, A: torch.Tensor, B: torch.Tensor) -> float:
        """⟨F, A ⊗ B⟩ of matrices that need not lie in the span."""
        return self.block.overlap(_like(A, self.block), _like(B, self.block)) / len(self.block)

    def variances(self, A: SpanVector, B: SpanVector, sigma: float) -> tuple[float, float] | None:
        """See `StreamedFisher.variances`; the images of the steps are enough."""
        squares = self.block.squares_of(A.images, B.images)
        return relative_variance(*squares, self.block.clusters, len(self.block) * sigma)

    def input_factor(self, A: SpanVector, scale: float) -> torch.Tensor:
        """A, as it goes into the pair."""
        return self.block.congruence(self.block.right, A.cores * scale)

    def output_factor(self, B: SpanVector, scale: float) -> torch.Tensor:
        """B, as it goes into the pair."""
        return self.block.congruence(self.block.left, B.cores * scale)

    def input_trace(self, A: SpanVector) -> float:
        """tr A."""
        return self._trace(self.right_gram, A)

    def output_trace(self, B: SpanVector) -> float:
        """tr B."""
        return self._trace(self.left_gram, B)

    def _trace(self, gram: torch.Tensor, vector: SpanVector) -> float:
        """tr Σ_s P_s D_s P_sᵀ = Σ_s ⟨P_sᵀ P_s, D_s⟩."""
        size = self.block.count, self.block.rank
        own = gram.view(*size, *size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return (own.double() * vector.cores).sum().item()

    def _vector(self, gram: torch.Tensor, images: torch.Tensor) -> SpanVector:
        """The factor with cores D = images / N: C_t = Σ_s K_ts D_s K_st with K = PᵀP, for a few t at a time."""
        count, rank = self.block.count, self.block.rank
        cores = images / len(self.block)
        if rank == 1:
            return SpanVector(cores, (gram.square() @ cores.flatten())[:, None, None])
        rows = gram.view(count, rank, -1)
        parts = []
        few = max(1, CACHED_COLUMNS // rank)
        for low in range(0, count, few):
            high = min(count, low + few)
            weighted = torch.bmm(cores, rows[:, :, low * rank : high * rank])
            parts.append(torch.bmm(rows[low:high], weighted.view(len(gram), -1, rank).transpose(0, 1)))
        return SpanVector(cores, torch.cat(parts))


def fisher_of(blocks: Callable[[], Iterable[Gradients]]) -> StreamedFisher | SpannedFisher:
    """The cheaper form of F for these gradients; both give the same factors up to rounding."""
    fisher = StreamedFisher(blocks)
    block = fisher.single
    if isinstance(block, SketchedGradients) and block.left.shape[1] <= 2 * sum(block.shape):
        return SpannedFisher(block)
    return fisher
