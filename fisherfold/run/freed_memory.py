"""What a process has freed, given back to the system at once.

glibc maps large blocks of memory one by one and gives them back when they are freed, but it takes for large what is larger than any block that was freed
before (up to 32 MiB): after the first tensor of some megabytes all others come from a heap, whose holes stay with the process. Block after block of
a model that is read one block at a time the process then holds more: of a random model of 0.4 B parameters 1.74 GB instead of 1.24
(`python benchmarks/memory.py`).
"""

import ctypes
from functools import cache

M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""
LARGE = 4 * 2**20  # bytes


@cache
def give_back_freed() -> bool:
    """From now on every block of LARGE bytes and more is mapped by itself; whether the C library can be asked (glibc can)."""
    try:
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE))
    except (AttributeError, OSError, TypeError):  # another C library
        return False
