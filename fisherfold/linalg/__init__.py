"""Matrix algorithms that know no model: Gram sums, sketches, weighted SVD, leading pairs of an operator, interpolative decomposition,
rounding, the knapsack of ranks. Oracles in the tests are dense and in float64. Imports `run`.
"""
