"""Kronecker factors of the Fisher information (GFWSVD, arXiv 2505.17974; YAQA's per-token Fisher, arXiv 2505.22988; K-FAC), streamed over
shards, and how well they fit. Imports `run`, `linalg`, `network`, `statistics`.
"""
