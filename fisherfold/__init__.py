"""Low-rank compression of large language models, weighted by the Fisher information: the library.

Its rooms, from the ground up: `run`, `linalg`, `network`, `inputs`, `statistics`, `fisher`, `subspaces`, `allocators`, `runtime`,
`export`, `evaluation`, `page`. Each says in its `__init__` what it holds and what it may import (import contracts in pyproject.toml).
`import fisherfold.runtime` lets transformers load compressed checkpoints without running code from their folder.
"""
