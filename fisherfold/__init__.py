"""Low-rank compression of large language models, weighted by the Fisher information: the library.

    from fisherfold import Compression, compress

is its interface in Python, see ``fisherfold.interface``. Its rooms, from the ground up: `run`, `linalg`, `network`, `inputs`, `statistics`,
`fisher`, `subspaces`, `allocators`, `runtime`, `export`, `evaluation`, `page`. Each says in its `__init__` what it holds and what it may
import (import contracts in pyproject.toml).
`import fisherfold.runtime` lets transformers load compressed checkpoints without running code from their folder.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fisherfold.interface import Basis, Compression, compress

__all__ = ["Basis", "Compression", "compress"]


def __getattr__(name: str) -> Any:
    """The interface is imported when it is asked for: the command line has no need of torch."""
    if name in __all__:
        return getattr(import_module("fisherfold.interface"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
