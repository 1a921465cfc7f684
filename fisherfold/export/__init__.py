"""From bases and ranks to a checkpoint: gauges (PivGa, arXiv 2512.03062; PIFA), refinement, the folder that loads like any other, dense and
GGUF exports, the model card. Imports `run`, `linalg`, `network`, `fisher`, `subspaces`, `allocators`, `runtime`.
"""
