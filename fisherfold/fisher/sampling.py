"""How far factors estimated from few sequences can be trusted.

Sequences are independent of one another; tokens of one sequence are not, so a sequence is the unit of every error here.

Shapes: S sequences of T tokens, t of them sampled, p inputs or outputs.
"""

from collections.abc import Callable, Iterable

import torch

from fisherfold.fisher.nearest_kronecker import KroneckerPair
from fisherfold.statistics.layer_statistics import Statistics


def gram_variance(samples: Iterable[torch.Tensor], covariance: torch.Tensor, statistics: Statistics) -> float | None:
    """Relative variance E‖M̂ − M‖² / ‖M̂‖² of M̂ = E[x xᵀ] over S sequences of T tokens, from sampled tokens.

        E‖M̂ − M‖² = (1/S) (q / T + (1 − 1/T) c − ‖M‖²) ≈ (q / T + (1 − 1/T) c − ‖M̂‖²) / (S − 1),   q = E‖x_t‖⁴,   c = E (x_tᵀ x_u)² for t ≠ u of one sequence

    c > ‖M‖² where tokens of one sequence are alike, which makes fewer samples of them than there are tokens. With one sampled token a sequence, c cannot be seen and tokens are taken to be independent.

    Args:
        samples: x of every shard, [S', t, p].
        covariance: M̂ [p, p] of all tokens.
        statistics: gives S and T.

    Returns:
        None for one sequence.
    """
    if statistics.sequences < 2:
        return None
    fourth, pairs, tokens, sequences = 0.0, 0.0, 0, 0
    for x in samples:
        squares = (x @ x.mT).double().square()
        own = squares.diagonal(dim1=1, dim2=2).sum().item()
        fourth, pairs = fourth + own, pairs + squares.sum().item() - own
        sequences, tokens = sequences + len(x), x.shape[1]
    size = torch.linalg.vector_norm(covariance, dtype=torch.float64).item() ** 2
    if size == 0:
        return 0.0
    length = statistics.facts["sequence_length"]
    q = fourth / (sequences * tokens)
    c = pairs / (sequences * tokens * (tokens - 1)) if tokens > 1 else size
    return max(0.0, q / length + (1 - 1 / length) * c - size) / (statistics.sequences - 1) / size


def halves_error(nearest: Callable[[int], KroneckerPair]) -> float | None:
    """‖P₁ − P₂‖ / ‖P₁ + P₂‖ of the nearest pairs P = A ⊗ B of two halves of the sequences.

    (P₁ + P₂) / 2 estimates the pair and (P₁ − P₂) / 2 has the size of its error, so this is the relative sampling error (not counting a
    bias that both halves share): 0 if the halves agree, 1 if they have nothing in common.

    Args:
        nearest: gives the pair of half 0 and of half 1.
    """
    first, second = nearest(0), nearest(1)
    overlap = _inner(first.A, second.A) * _inner(first.B, second.B)
    squares = first.norm**2 + second.norm**2
    return (max(0.0, squares - 2 * overlap) / (squares + 2 * overlap)) ** 0.5 if squares > 0 else None


def _inner(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left.double() * right).sum().item()


def effective_count(weights: torch.Tensor) -> float:
    """(Σ w)² / Σ w² (Kish): how many of these weights carry their sum; 1 if one does, their number if they are equal."""
    weights = weights.double()
    squares = weights.square().sum().item()
    return weights.sum().item() ** 2 / squares if squares > 0 else 0.0


def effective_rank(matrix: torch.Tensor) -> float:
    """tr(M)² / ‖M‖²: how many equal eigenvalues would give M's trace and norm. 0 for M = 0."""
    norm = torch.linalg.vector_norm(matrix, dtype=torch.float64).item()
    return (matrix.trace().item() / norm) ** 2 if norm > 0 else 0.0


def condition(matrix: torch.Tensor) -> float:
    """λ_max / λ_min, infinite for a matrix that is singular (or negative by rounding)."""
    values = torch.linalg.eigvalsh(matrix.double())
    return (values[-1] / values[0]).item() if values[0] > 0 else float("inf")
