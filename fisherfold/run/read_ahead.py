"""What of a checkpoint is wanted next, brought into the system's page cache while something else computes.

Parts of a model are read one after the other, forward or backward. When one is reached the system is told of the next in that direction, and reads
it from the disk on its own: no number of it is in this process before it is asked for, so neither memory nor a bit changes.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from threading import Thread

from fisherfold.run.checkpoint import StoredTensor

CHUNK = 2**20  # bytes: of more at once Linux reads a beginning


def read_ahead(tensors: Iterable[StoredTensor]) -> None:
    """Ask the system to have their bytes in memory soon; does nothing where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    for tensor in tensors:
        if tensor.place is None:
            continue
        path, begin = tensor.place
        with suppress(OSError), path.open("rb", buffering=0) as file:  # who needs it will say what is wrong with it
            for at in range(begin, begin + tensor.bytes, CHUNK):
                size = min(CHUNK, begin + tensor.bytes - at)
                os.posix_fadvise(file.fileno(), at, size, os.POSIX_FADV_WILLNEED)


class ReadAhead:
    """Reads the neighbour of a part that is reached.

    Args:
        parts: the tensors of each, in the order of a forward pass.
    """

    def __init__(self, parts: Sequence[Sequence[StoredTensor]]) -> None:
        self._parts = parts
        self._number = {tensor.place: number for number, part in enumerate(parts) for tensor in part}
        self._last = -1

    def reached(self, tensor: StoredTensor) -> None:
        """A tensor is read. The next part is the one before, if this one lies before the last, but the first begins a forward pass."""
        part = self._number.get(tensor.place, self._last)
        if part == self._last:
            return
        following = part - 1 if 0 < part < self._last else part + 1
        self._last = part
        if following < len(self._parts):
            Thread(target=read_ahead, args=(self._parts[following],), daemon=True).start()
