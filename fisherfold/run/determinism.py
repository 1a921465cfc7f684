"""What a process needs so that the same parameters give the same bits, wherever it runs.

The order in which floats are added up depends on the number of threads and not on the number of cores: on two cores or on
one, N threads give the same bits. So N is a parameter of every stage that computes (tests/fisherfold/run/test_determinism.py).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController


def compute_deterministically() -> None:
    """Choose deterministic algorithms for the rest of this process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.manual_seed(0)
    # use_deterministic_algorithms does no more, for this, and imports the compiler
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def computing_threads(threads: int | None) -> Iterator[None]:
    """Inside, torch (OpenMP, MKL) and the BLAS of NumPy and SciPy compute with exactly `threads` threads.

    None leaves everything as it is, for stages that compute nothing.
    """
    if threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with _blas().limit(limits=threads):
            yield
    finally:
        torch.set_num_threads(before)


@cache
def _blas() -> "ThreadpoolController":
    """The loaded BLAS libraries; NumPy and SciPy bring one each, and what is loaded later would be missed."""
    import numpy  # noqa: F401
    import scipy.linalg  # noqa: F401
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")
