"""What one forward and backward pass gives, for every method: Σ x xᵀ, Σ d dᵀ, per-sequence gradients, sampled tokens, ρ, and where
knowledge sits. Sums are added in a fixed tree, so bits depend on nothing else. Imports `run`, `linalg`, `network`.
"""
