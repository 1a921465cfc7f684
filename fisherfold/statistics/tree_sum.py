"""Sums over shards along a tree that the number of shards alone determines, so that neither an interruption nor the order in
which shards end changes a bit.

Equal subtrees are added as soon as both are there. Of S shards, one at a time, at most log2(S) + 1 parts wait, and one more
is being written; shards in parallel run ahead of the tree by a bounded number, and so are the parts.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fisherfold.run.store import array_names, close_groups, read_array, write_arrays


class Part(NamedTuple):
    """The sum over shards `first` to `last`, both included."""

    first: int
    last: int

    @property
    def shards(self) -> int:
        """How many shards the part sums."""
        return self.last - self.first + 1


class Step(NamedTuple):
    """One part to make, when the parts of `after` have been made: from its shard if `terms` is empty, else by adding them."""

    part: Part
    terms: tuple[Part, ...]
    after: tuple[Part, ...]


def summation_tree(shards: int, at_once: int = 1) -> Iterator[Step]:
    """The steps that sum up `shards` shards, in an order in which they can be made; the last one makes the whole.

    A shard waits until all that are `shards_ahead(at_once)` or more before it are added up as far as the tree goes.
    """
    ahead = shards_ahead(at_once)
    waiting: list[Part] = []
    added_up: list[tuple[Part, ...]] = []  # after each shard
    for shard in range(shards):
        waiting.append(Part(shard, shard))
        yield Step(waiting[-1], (), added_up[shard - ahead] if shard >= ahead else ())
        while len(waiting) > 1 and (waiting[-1].shards == waiting[-2].shards or shard == shards - 1):
            right, left = waiting.pop(), waiting.pop()
            waiting.append(Part(left.first, right.last))
            yield Step(waiting[-1], (left, right), (left, right))
        added_up.append(tuple(waiting))


def shards_ahead(at_once: int) -> int:
    """How many shards may be begun beyond those that are added up, so that `at_once` workers seldom wait: 2 W - 1."""
    return 2 * at_once - 1


def parts_at_once(shards: int, at_once: int = 1) -> int:
    """The most parts that exist while W = `at_once` steps at a time are made, with those being written: ⌊log₂ S⌋ + 3 W - 1,
    but never more than all shards and the sums of their pairs."""
    return 1 if shards == 1 else min(shards.bit_length() + 3 * at_once - 2, shards + shards // 2)


def add_parts(folder: Path, left: Path, right: Path) -> None:
    """Write the sum of two groups of the same arrays into `folder`, with one array of each in memory."""
    write_arrays(folder, ((name, read_array(left, name) + read_array(right, name)) for name in array_names(left)))
    close_groups()
