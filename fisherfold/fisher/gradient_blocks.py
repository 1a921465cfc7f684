"""Gradients of one layer in blocks, in the three forms that the nearest Kronecker product of their Fisher is found from.

Shapes: n outputs, m inputs, S gradients of one block, k sketch rank, t tokens of a sequence, G_s = U_s V_sᵀ [n, m].
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Protocol

import torch

from fisherfold.linalg.gram import mirror

BLOCK_COLUMNS = 8192  # sketch columns S k of one block; a Gram matrix of them takes 256 MiB in float32
BLOCK_NUMBERS = 2**26  # numbers of one block of exact gradients
STRIPES = 8  # of a symmetric product: 9/16 of the work; more stripes gain nothing on CPUs


def symmetric_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """P Qᵀ [p, p] of P, Q [p, q] when the product is known to be symmetric: only its upper stripes are computed."""
    return symmetric_sum([(left, right)])


def symmetric_sum(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Σ P Qᵀ [p, p] of products that are symmetric, one pair (P, Q) [p, q] in memory at a time."""
    total: torch.Tensor | None = None
    for left, right in pairs:
        beta, size = int(total is not None), len(left)
        total = left.new_empty(size, size) if total is None else total
        for low, high in pairwise(size * i // STRIPES for i in range(STRIPES + 1)):
            total[low:high, low:].addmm_(left[low:high], right[low:].T, beta=beta)
    assert total is not None
    return mirror(total)


class Gradients(Protocol):
    """A block of per-sequence gradients of one layer."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, int]  # n, m
    clusters: int  # of gradients; those of two clusters are independent

    def __len__(self) -> int: ...

    def outputs(self, A: torch.Tensor) -> torch.Tensor:
        """Σ_s G_s A G_sᵀ [n, n]."""

    def inputs(self, B: torch.Tensor) -> torch.Tensor:
        """Σ_s G_sᵀ B G_s [m, m]."""

    def overlap(self, A: torch.Tensor, B: torch.Tensor) -> float:
        """Σ_s ⟨G_s, B G_s A⟩."""

    def products(self, other: Any) -> torch.Tensor:
        """⟨G_s, G_t⟩ [S, S'] for s of this block and t of another of its class, in float64."""

    def squares(self, A: torch.Tensor, B: torch.Tensor) -> tuple[float, float]:
        """Σ_c ‖A_c‖² and Σ_c ‖B_c‖² over clusters c of gradients: A_c = Σ_{s∈c} G_sᵀ B G_s, B_c = Σ_{s∈c} G_s A G_sᵀ."""


class SketchedGradients:
    """Gradients G_s = U_s V_sᵀ from left factors U [S, n, k] and right factors V [S, m, k].

    Kept as stacked columns U [n, S k] and V [m, S k], so that a step is two large matrix products.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self.count, self.rank = left.shape[0], left.shape[2]
        self.clusters = self.count
        self.dtype, self.device = left.dtype, left.device
        self.shape = left.shape[1], right.shape[1]
        self.left = _stack(left)
        self.right = _stack(right)

    def __len__(self) -> int:
        return self.count

    def outputs(self, A: torch.Tensor) -> torch.Tensor:
        """Σ_s G_s A G_sᵀ."""
        return self.congruence(self.left, self.images(self.right, A))

    def inputs(self, B: torch.Tensor) -> torch.Tensor:
        """Σ_s G_sᵀ B G_s."""
        return self.congruence(self.right, self.images(self.left, B))

    def overlap(self, A: torch.Tensor, B: torch.Tensor) -> float:
        """Σ_s ⟨G_s, B G_s A⟩."""
        return (self.images(self.left, B).double() * self.images(self.right, A)).sum().item()

    def squares(self, A: torch.Tensor, B: torch.Tensor) -> tuple[float, float]:
        """Σ_c ‖A_c‖² and Σ_c ‖B_c‖² over clusters c of gradients."""
        return self.squares_of(self.images(self.right, A), self.images(self.left, B))

    def squares_of(self, images_A: torch.Tensor, images_B: torch.Tensor) -> tuple[float, float]:
        """`squares` from V_sᵀ A V_s and U_sᵀ B U_s."""
        inputs = self.cluster_squares(self.cluster_grams(self.right), images_B)
        return inputs, self.cluster_squares(self.cluster_grams(self.left), images_A)

    def cluster_grams(self, columns: torch.Tensor) -> torch.Tensor:
        """K_s = P_sᵀ P_s [S, k, k]: a gradient is a cluster."""
        return self._split(columns).mT @ self._split(columns)

    def cluster_squares(self, grams: torch.Tensor, cores: torch.Tensor) -> float:
        """Σ_s ‖P_s C_s P_sᵀ‖² = Σ_s tr(C_s K_s C_s K_s) from K and C [S, k, k]."""
        product = cores @ grams
        return (product.double() * product.mT).sum().item()

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


class TokenGradients(SketchedGradients):
    """Gradients of single tokens, d_t x_tᵀ: sketches of rank 1, so that both steps are a weighted Gram product.

        B = Σ_t (x_tᵀ A x_t) d_t d_tᵀ,   A = Σ_t (d_tᵀ B d_t) x_t x_tᵀ

    Tokens of one sequence form a cluster. Nothing is formed for pairs of tokens, but within a cluster and by `products`.

    Args:
        x: [S, t, m].
        d: [S, t, n].
        kept: tokens that count in the mean; those left out of it have d = 0. All by default.
    """

    def __init__(self, x: torch.Tensor, d: torch.Tensor, kept: int | None = None) -> None:
        self.sequences, self.tokens = x.shape[:2]
        super().__init__(d.flatten(0, 1)[:, :, None], x.flatten(0, 1)[:, :, None])
        self.clusters, self.kept = self.sequences, self.count if kept is None else kept

    def __len__(self) -> int:
        return self.kept

    def images(self, columns: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
        return (columns * (metric @ columns)).sum(0)[:, None, None]

    def congruence(self, columns: torch.Tensor, cores: torch.Tensor) -> torch.Tensor:
        return symmetric_product(columns * cores.flatten(), columns)

    def energies(self) -> torch.Tensor:
        """‖d_t x_tᵀ‖² of every token."""
        return self.left.square().sum(0) * self.right.square().sum(0)

    def cluster_grams(self, columns: torch.Tensor) -> torch.Tensor:
        """Inner products [S, t, t] of the tokens of each sequence."""
        split = columns.view(len(columns), self.sequences, self.tokens).transpose(0, 1)
        return split.mT @ split

    def cluster_squares(self, grams: torch.Tensor, cores: torch.Tensor) -> float:
        return super().cluster_squares(grams, cores.view(self.sequences, self.tokens).diag_embed())


class ExactGradients:
    """Gradients written out, G [S, n, m]."""

    def __init__(self, gradient: torch.Tensor) -> None:
        self.dtype, self.device = gradient.dtype, gradient.device
        self.shape, self.clusters = (gradient.shape[1], gradient.shape[2]), len(gradient)
        self.gradient = gradient

    def __len__(self) -> int:
        return len(self.gradient)

    def outputs(self, A: torch.Tensor) -> torch.Tensor:
        """Σ_s G_s A G_sᵀ."""
        return symmetric_sum((G @ A, G) for G in self.gradient)

    def inputs(self, B: torch.Tensor) -> torch.Tensor:
        """Σ_s G_sᵀ B G_s."""
        return symmetric_sum((G.T @ B, G.T) for G in self.gradient)

    def overlap(self, A: torch.Tensor, B: torch.Tensor) -> float:
        """Σ_s ⟨G_s, B G_s A⟩."""
        return sum(((B @ G).double() * (G @ A)).sum().item() for G in self.gradient)

    def squares(self, A: torch.Tensor, B: torch.Tensor) -> tuple[float, float]:
        """Σ_c ‖A_c‖² and Σ_c ‖B_c‖² over clusters c of gradients."""
        inputs = sum(symmetric_product(G.T @ B, G.T).double().square().sum().item() for G in self.gradient)
        outputs = sum(symmetric_product(G @ A, G).double().square().sum().item() for G in self.gradient)
        return inputs, outputs

    def products(self, other: "ExactGradients") -> torch.Tensor:
        return (self.gradient.flatten(1) @ other.gradient.flatten(1).T).double()


def _stack(split: torch.Tensor) -> torch.Tensor:
    """[S, p, k] as stacked columns [p, S k]."""
    return split.transpose(0, 1).reshape(split.shape[1], -1)


def block_sums(first: torch.Tensor, second: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Sums over the blocks of an element-wise product: [S·rows, T·columns] twice to [S, T], in float64."""
    product = first * second
    blocks = product.view(len(product) // rows, rows, product.shape[1] // columns, columns)
    return blocks.sum(dim=1).sum(dim=2, dtype=torch.float64)
