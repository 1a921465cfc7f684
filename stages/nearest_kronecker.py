"""The Kronecker product nearest to a layer's Fisher matrix, from the layer's per-sequence gradients.

    F = (1/N) Σ_s vec(G_s) vec(G_s)ᵀ,   minimise ‖F − A ⊗ B‖_F over A [m, m], B [n, n]

The minimiser is the leading singular pair of Van Loan's rearrangement R(F) = (1/N) Σ_s G_s ⊗ G_s, reached without
forming F or R(F) by alternating B ← (1/N) Σ_s G_s A G_sᵀ and A ← (1/N) Σ_s G_sᵀ B G_s. Each step is a sum of congruences,
so factors stay positive semi-definite from a positive semi-definite start. vec stacks columns, so (A ⊗ B) vec(G) = vec(B G A).

Two forms of the same steps:

- `StreamedFisher` folds over blocks of gradients and holds nothing that grows with N.
- `SpannedFisher` writes the factors in the span of the gradients, A = Σ_s V_s D_s V_sᵀ with small D_s [k, k], and needs only the
  Gram matrices UᵀU and VᵀV [S k, S k]. A step then costs 4 (S k)² k instead of 2 S k (n² + m²). `fisher_of` takes it
  while all gradients are one block and S k ≤ 2 (n + m), where the two Gram matrices cost about as much as one streamed iteration.

Sources: Van Loan & Pitsianis 1993; GFWSVD (arXiv 2505.17974) for the use on LLM layers, there by Lanczos.

Shapes: n outputs, m inputs, S sequences of one block, N of all, k sketch rank, G_s = U_s V_sᵀ [n, m].
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Protocol

import torch

from stages.errors import NumericalError

BLOCK_COLUMNS = 8192  # sketch columns S k of one block; a Gram matrix of them takes 256 MiB in float32
CACHED_COLUMNS = 256  # of them whose weighted products stay in a processor's cache
BLOCK_NUMBERS = 2**26  # numbers of one block of exact gradients
STRIPES = 8  # of a symmetric product: 9/16 of the work; more stripes gain nothing on CPUs


def symmetric_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """P Qᵀ [p, p] of P, Q [p, q] when the product is known to be symmetric: only its upper stripes are computed."""
    size = left.shape[0]
    product = left.new_empty(size, size)
    edges = [size * i // STRIPES for i in range(STRIPES + 1)]
    for low, high in pairwise(edges):
        product[low:high, low:] = left[low:high] @ right[low:].T
        product[high:, low:high] = product[low:high, high:].T
        product[low:high, low:high] = (product[low:high, low:high] + product[low:high, low:high].T) / 2
    return product


class Gradients(Protocol):
    """A block of per-sequence gradients of one layer."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, int]  # n, m

    def __len__(self) -> int: ...

    def outputs(self, A: torch.Tensor) -> torch.Tensor:
        """Σ_s G_s A G_sᵀ [n, n]."""

    def inputs(self, B: torch.Tensor) -> torch.Tensor:
        """Σ_s G_sᵀ B G_s [m, m]."""

    def overlap(self, A: torch.Tensor, B: torch.Tensor) -> float:
        """Σ_s ⟨G_s, B G_s A⟩."""

    def products(self, other: "Gradients") -> torch.Tensor:
        """⟨G_s, G_t⟩ [S, S'] for s of this block and t of the other, in float64."""


class SketchedGradients:
    """Gradients G_s = U_s V_sᵀ from left factors U [S, n, k] and right factors V [S, m, k].

    Kept as stacked columns U [n, S k] and V [m, S k], so that a step is two large matrix products.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self.count, self.rank = left.shape[0], left.shape[2]
        self.dtype, self.device = left.dtype, left.device
        self.shape = left.shape[1], right.shape[1]
        self.left = _stack(left)
        self.right = _stack(right)

    def __len__(self) -> int:
        return self.count

    def outputs(self, A: torch.Tensor) -> torch.Tensor:
        return self.congruence(self.left, self.images(self.right, A))

    def inputs(self, B: torch.Tensor) -> torch.Tensor:
        return self.congruence(self.right, self.images(self.left, B))

    def overlap(self, A: torch.Tensor, B: torch.Tensor) -> float:
        return (self.images(self.left, B).double() * self.images(self.right, A)).sum().item()

    def images(self, columns: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
        """C_s = P_sᵀ M P_s [S, k, k] of stacked columns P [p, S k] and a metric M [p, p]."""
        return self._split(columns).mT @ self._split(metric @ columns)

    def congruence(self, columns: torch.Tensor, cores: torch.Tensor) -> torch.Tensor:
        """Σ_s P_s C_s P_sᵀ [p, p] of stacked columns P [p, S k] and symmetric cores C [S, k, k]."""
        return symmetric_product(_stack(self._split(columns) @ cores), columns)

    def products(self, other: "SketchedGradients") -> torch.Tensor:
        """⟨G_s, G_t⟩ = ⟨U_sᵀU_t, V_sᵀV_t⟩, or from the gradients written out where that takes fewer operations."""
        outputs, inputs = self.shape
        columns, columns_other = self.left.shape[1], other.left.shape[1]
        by_factors = columns * columns_other * (outputs + inputs)
        written_out = outputs * inputs * (columns + columns_other + len(self) * len(other))
        if written_out < by_factors:
            return self._products_written_out(other)
        product = symmetric_product if other is self else lambda left, right: left @ right.T
        lefts, rights = product(self.left.T, other.left.T), product(self.right.T, other.right.T)
        return block_sums(lefts, rights, self.rank, other.rank)

    def _products_written_out(self, other: "SketchedGradients") -> torch.Tensor:
        total = torch.zeros(len(self), len(other), dtype=torch.float64, device=self.device)
        rows = max(1, BLOCK_NUMBERS // (max(len(self), len(other)) * self.shape[1]))
        for low in range(0, self.shape[0], rows):
            mine = self._written_out(slice(low, low + rows))
            total += mine @ (mine if other is self else other._written_out(slice(low, low + rows))).T
        return total

    def _written_out(self, rows: slice) -> torch.Tensor:
        """Some rows of every G_s, flattened: [S, rows · m]."""
        return (self._split(self.left[rows]) @ self._split(self.right).mT).flatten(1)

    def _split(self, columns: torch.Tensor) -> torch.Tensor:
        """[p, S k] as a view [S, p, k]."""
        return columns.view(len(columns), self.count, self.rank).transpose(0, 1)


class ExactGradients:
    """Gradients written out, G [S, n, m]."""

    def __init__(self, gradient: torch.Tensor) -> None:
        self.dtype, self.device = gradient.dtype, gradient.device
        self.shape = gradient.shape[1], gradient.shape[2]
        self.gradient = gradient

    def __len__(self) -> int:
        return len(self.gradient)

    def outputs(self, A: torch.Tensor) -> torch.Tensor:
        return sum(symmetric_product(G @ A, G) for G in self.gradient)

    def inputs(self, B: torch.Tensor) -> torch.Tensor:
        return sum(symmetric_product(G.T @ B, G.T) for G in self.gradient)

    def overlap(self, A: torch.Tensor, B: torch.Tensor) -> float:
        return sum(((B @ G).double() * (G @ A)).sum().item() for G in self.gradient)

    def products(self, other: "ExactGradients") -> torch.Tensor:
        return (self.gradient.flatten(1) @ other.gradient.flatten(1).T).double()


def _like(factor: torch.Tensor, block: Gradients) -> torch.Tensor:
    return factor.to(block.device, block.dtype)


def _stack(split: torch.Tensor) -> torch.Tensor:
    """[S, p, k] as stacked columns [p, S k]."""
    return split.transpose(0, 1).reshape(split.shape[1], -1)


def block_sums(first: torch.Tensor, second: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Sums over the blocks of an element-wise product: [S·rows, T·columns] twice to [S, T], in float64."""
    product = first * second
    blocks = product.view(len(product) // rows, rows, product.shape[1] // columns, columns)
    return blocks.sum(dim=1).sum(dim=2, dtype=torch.float64)


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

    def first(self, start: torch.Tensor | None) -> torch.Tensor:
        """`outputs` of a matrix A [m, m], by default the identity."""
        return self.outputs(torch.eye(self.shape[1]) if start is None else start)

    def outputs(self, A: torch.Tensor) -> torch.Tensor:
        """(1/N) Σ G A Gᵀ [n, n]."""
        return self._mean(lambda block: block.outputs(_like(A, block)))

    def inputs(self, B: torch.Tensor) -> torch.Tensor:
        """(1/N) Σ Gᵀ B G [m, m]."""
        return self._mean(lambda block: block.inputs(_like(B, block)))

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

    def input_factor(self, A: torch.Tensor) -> torch.Tensor:
        return A

    def output_factor(self, B: torch.Tensor) -> torch.Tensor:
        return B

    def _mean(self, term: Callable[[Gradients], torch.Tensor]) -> torch.Tensor:
        total, sequences = None, 0
        for block in self.blocks():
            part = term(block)
            total = part.double() if total is None else total.add_(part)
            sequences += len(block)
        return total / sequences


@dataclass(frozen=True)
class SpanVector:
    """A factor M = Σ_s P_s D_s P_sᵀ in the span of stacked columns P, with its images C_s = P_sᵀ M P_s; both [S, k, k].

    ‖M‖² = Σ_s ⟨D_s, C_s⟩, and both parts are linear in M.
    """

    cores: torch.Tensor
    images: torch.Tensor

    def norm(self) -> torch.Tensor:
        return (self.cores.double() * self.images).sum().clamp(min=0).sqrt()

    def __truediv__(self, number: torch.Tensor) -> "SpanVector":
        return SpanVector(self.cores / number, self.images / number)

    def __sub__(self, other: "SpanVector") -> "SpanVector":
        return SpanVector(self.cores - other.cores, self.images - other.images)


class SpannedFisher:
    """F of one block of sketched gradients, its factors written in the span of U and V."""

    def __init__(self, block: SketchedGradients) -> None:
        self.block = block
        self.shape = block.shape
        self.left_gram = symmetric_product(block.left.T, block.left.T)
        self.right_gram = symmetric_product(block.right.T, block.right.T)

    def first(self, start: torch.Tensor | None) -> SpanVector:
        """(1/N) Σ G A Gᵀ of a matrix A [m, m] that need not lie in the span, by default the identity (at no cost)."""
        if start is not None:
            return self._vector(self.left_gram, self.block.images(self.block.right, _like(start, self.block)))
        size = len(self.block), self.block.rank
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

    def input_factor(self, A: SpanVector) -> torch.Tensor:
        return self.block.congruence(self.block.right, A.cores)

    def output_factor(self, B: SpanVector) -> torch.Tensor:
        return self.block.congruence(self.block.left, B.cores)

    def _vector(self, gram: torch.Tensor, images: torch.Tensor) -> SpanVector:
        """The factor with cores D = images / N: C_t = Σ_s K_ts D_s K_st with K = PᵀP, for a few t at a time."""
        count, rank = len(self.block), self.block.rank
        cores = images / count
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
    if isinstance(block, SketchedGradients) and block.left.shape[1] <= 2 * (len(block.left) + len(block.right)):
        return SpannedFisher(block)
    return fisher


@dataclass(frozen=True)
class KroneckerPair:
    """A ⊗ B nearest to F.

    Attributes:
        A: input factor [m, m], of norm √σ₁.
        B: output factor [n, n], of norm √σ₁.
        norm: σ₁ = ‖A ⊗ B‖ = ⟨F, A ⊗ B⟩ / ‖A ⊗ B‖.
        fisher_norm: ‖F‖.
        iterations: iterations done, each one A step and one B step.
        converged: whether the last iteration moved the unit factor B by no more than the tolerance.
    """

    A: torch.Tensor
    B: torch.Tensor
    norm: float
    fisher_norm: float
    iterations: int
    converged: bool

    @property
    def residual(self) -> float | None:
        """‖F − A ⊗ B‖ / ‖F‖, None for F = 0. In float32, values below 1e-3 are rounding."""
        return relative_residual(self.norm, self.fisher_norm)


def relative_residual(norm: float, fisher_norm: float) -> float | None:
    """√(1 − (norm / ‖F‖)²), the residual of the best multiple of a pair whose overlap with F is norm · ‖A ⊗ B‖."""
    return math.sqrt(max(0.0, 1 - (norm / fisher_norm) ** 2)) if fisher_norm > 0 else None


def nearest_kronecker(
    fisher: StreamedFisher | SpannedFisher,
    start: torch.Tensor | None = None,
    iterations: int = 200,
    tolerance: float = 1e-4,
) -> KroneckerPair:
    """The nearest Kronecker pair of F by alternating power steps.

    σ₁ is split evenly, ‖A‖_F = ‖B‖_F = √σ₁. A vanishing F gives vanishing factors.

    Args:
        fisher: F, see `fisher_of`.
        start: positive semi-definite A [m, m] to start from, else the identity. The token-wise Σ x xᵀ saves steps of a streamed F.
        iterations: at most so many.
        tolerance: stop when an iteration changes the unit factor B by no more, in Frobenius norm. Below 1e-6 only in float64.

    Raises:
        NumericalError: the gradients or the start are not finite.
    """
    B = fisher.first(start)
    if B.norm() == 0:  # a start that the gradients do not see, or gradients that are all zero
        B = fisher.first(None)
    if B.norm() == 0:
        A, B = (torch.zeros(size, size) for size in reversed(fisher.shape))
        return KroneckerPair(A, B, 0.0, 0.0, 0, True)
    if not B.norm().isfinite():
        raise NumericalError("the gradients, or the start, are not finite or overflow float32")
    return _alternate(fisher, B / B.norm(), iterations, tolerance)


def _alternate(
    fisher: StreamedFisher | SpannedFisher, B: torch.Tensor | SpanVector, iterations: int, tolerance: float
) -> KroneckerPair:
    """Power steps from a unit factor B, until it stays."""
    done, converged = 0, False
    while done < iterations and not converged:
        A = fisher.inputs(B)
        A = A / A.norm()
        image = fisher.outputs(A)
        norm = image.norm()
        before, B = B, image / norm
        done, converged = done + 1, (B - before).norm().item() <= tolerance
    factors = fisher.input_factor(A) * norm.sqrt(), fisher.output_factor(B) * norm.sqrt()
    return KroneckerPair(*factors, norm.item(), math.sqrt(fisher.norm_squared()), done, converged)
