"""Sums over shards along a tree that the number of shards alone determines, so that an interruption changes no bit.

Equal subtrees are added as soon as both are there: of S shards, at most log2(S) + 1 parts wait at any time, and one more
is being written.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stages.store import array_names, close_groups, read_array, write_arrays


class Part(NamedTuple):
    """The sum over shards `first` to `last`, both included."""

    first: int
    last: int

    @property
    def shards(self) -> int:
        return self.last - self.first + 1


class Step(NamedTuple):
    """One part to make: from its shard if `terms` is empty, else by adding them."""

    part: Part
    terms: tuple[Part, ...]


def summation_tree(shards: int) -> Iterator[Step]:
    """The steps that sum up `shards` shards, in order; the last one makes the whole."""
    waiting: list[Part] = []
    for shard in range(shards):
        waiting.append(Part(shard, shard))
        yield Step(waiting[-1], ())
        while len(waiting) > 1 and (waiting[-1].shards == waiting[-2].shards or shard == shards - 1):
            right, left = waiting.pop(), waiting.pop()
            waiting.append(Part(left.first, right.last))
            yield Step(waiting[-1], (left, right))


def parts_at_once(shards: int) -> int:
    """The most parts that exist while the steps of `summation_tree` are done, with the one being written."""
    return 1 if shards == 1 else shards.bit_length() + 1


def add_parts(folder: Path, left: Path, right: Path) -> None:
    """Write the sum of two groups of the same arrays into `folder`, with one array of each in memory."""
    write_arrays(folder, ((name, read_array(left, name) + read_array(right, name)) for name in array_names(left)))
    close_groups()
