"""Metrics and projectors: what is kept of a layer under A ⊗ B (SVD, FWSVD, ASVD, SVD-LLM, KFAC, GFWSVD), and of an activation (FASC,
arXiv 2601.07197). Imports `run`, `linalg`, `network`, `statistics`.
"""
