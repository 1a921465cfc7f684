"""The Fisher of vec(G) formed densely, and its nearest Kronecker factors by one SVD: the oracle."""

import torch


def dense_fisher(gradient: torch.Tensor) -> torch.Tensor:
    """F [n m, n m] of G [S, n, m], vec stacking columns."""
    vectors = gradient.mT.flatten(1)
    return vectors.T @ vectors / len(gradient)


def van_loan(F: torch.Tensor, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Unit factors and σ₁ by a dense SVD of the rearrangement R(F) [m², n²]."""
    rearranged = F.view(inputs, outputs, inputs, outputs).permute(0, 2, 1, 3).reshape(inputs**2, outputs**2)
    U, sigma, Vh = torch.linalg.svd(rearranged)
    A, B = U[:, 0].view(inputs, inputs), Vh[0].view(outputs, outputs)
    sign = A.trace().sign()
    return A * sign, B * sign, sigma[0].item()


def symmetric_sigmas(F: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """The singular values of the rearrangement R(F) on symmetric matrices (it maps these to such, and skew ones to skew ones)."""
    rearranged = F.view(inputs, outputs, inputs, outputs).permute(1, 3, 0, 2)  # (b, b', a, a')
    even = (rearranged + rearranged.transpose(0, 1)) / 2
    even = (even + even.transpose(2, 3)) / 2
    return torch.linalg.svdvals(even.reshape(outputs**2, inputs**2))
