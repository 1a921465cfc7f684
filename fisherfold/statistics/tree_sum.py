"""Sums over shards in a tree that parameters alone determine, so that neither an interruption nor where a leaf is computed changes a bit.

The shards are cut into leaves. Within a leaf each is added to the sums of those before it, in memory; of the leaves, pairs are added,
then pairs of those.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from fisherfold.run.group_writer import write_arrays
from fisherfold.run.store import array_names, close_groups, read_array

ADDED_BYTES = 2**30  # of the sums that one unit adds up


class Leaf(NamedTuple):
    """Shards `first` to `last`, both included."""

    first: int
    last: int

    @property
    def shards(self) -> int:
        """How many shards the part sums."""
        return self.last - self.first + 1


def cut_leaves(shards: int, leaves: int) -> list[Leaf]:
    """All shards in `leaves` leaves of about equal length, or in as many as there are shards."""
    count = min(shards, leaves)
    edges = [shards * i // count for i in range(count + 1)]
    return [Leaf(first, stop - 1) for first, stop in pairwise(edges)]


def portions(bytes_of_sums: int) -> int:
    """How many units add up the leaves, each some of their arrays."""
    return max(1, -(-bytes_of_sums // ADDED_BYTES))


def add_leaves(folder: Path, group: str, leaves: Sequence[Path], portion: int, of: int) -> None:
    """Unit of work: the sums of all leaves, of every `of`-th array from number `portion`.

    Args:
        group: name of the group in `folder` and in the folder of each leaf.
    """
    groups = [leaf / group for leaf in leaves]
    names = array_names(groups[0])[portion::of]
    write_arrays(folder / group, ((name, tree_sum(groups, name)) for name in names))
    close_groups()


def tree_sum(groups: Sequence[Path], name: str) -> torch.Tensor:
    """One array summed over groups, (a + b) + (c + d) and so on; about log2 of them in memory."""
    if len(groups) == 1:
        return read_array(groups[0], name)
    half = len(groups) // 2
    return tree_sum(groups[:half], name) + tree_sum(groups[half:], name)
