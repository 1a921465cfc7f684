"""Ranks of a mixture's experts, brought into a few classes a stack, as grouped products want them.

An allocator gives every expert a rank of its own. Here the ranks of each stack, sorted, are cut into at most `ranks.expert_classes` runs of
least squared spread, and a run takes the largest allowed rank that costs its members no more than their own did; so the budget holds. What
that leaves is spent on experts that go up to the class of the next run, most kept σ² first.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from fisherfold.allocators.allocation import Allocation
from fisherfold.linalg.knapsack import pick


def into_classes(task: Allocation, ranks: np.ndarray, most: int) -> np.ndarray:
    """Ranks [L] with at most `most` in each stack besides those of experts that have no choice; others are as they were."""
    lowered, allowed = ranks.copy(), np.zeros_like(task.allowed)
    for rows in _stacks(task):
        if len(np.unique(ranks[rows])) > most:
            _classify(task, ranks, rows, most, lowered, allowed)
    chosen = [int(row) for row in np.flatnonzero(allowed.any(1))]
    if not chosen:
        return ranks
    left = task.budget - int(np.delete(pick(task.costs, ranks), chosen).sum())
    part = replace(
        task,
        sites=[task.sites[row] for row in chosen],
        spectra=[task.spectra[row] for row in chosen],
        costs=task.costs[chosen],
        allowed=allowed[chosen],
        budget=left,
    )
    lowered[chosen] = part.spend(part.energies())
    return lowered


def _stacks(task: Allocation) -> list[np.ndarray]:
    """The rows of the experts of each stack that have a choice."""
    found: dict[str, list[int]] = {}
    for row in map(int, np.flatnonzero(task.allowed.sum(1) > 1)):
        if stack := task.sites[row].layers[0].stack:
            found.setdefault(stack, []).append(row)
    return [np.array(rows) for rows in found.values()]


def _classify(
    task: Allocation, ranks: np.ndarray, rows: np.ndarray, most: int, lowered: np.ndarray, allowed: np.ndarray
) -> None:
    """Fill in, for the experts of one stack, the rank of their run and the ranks that they may have."""
    order = rows[np.argsort(ranks[rows], kind="stable")]
    edges = cut(ranks[order], most)
    common = [_common_rank(task, ranks, order[first:last]) for first, last in pairwise(edges)]
    for number, (first, last) in enumerate(pairwise(edges)):
        for row in order[first:last]:
            lowered[row] = common[number]
            allowed[row, common[number : number + 2]] = True


def _common_rank(task: Allocation, ranks: np.ndarray, rows: np.ndarray) -> int:
    """The largest rank allowed to all of these experts that costs them no more than theirs; at least the smallest of theirs."""
    spent = int(pick(task.costs[rows], ranks[rows]).sum())
    together = task.costs[rows].sum(0)
    fits = task.allowed[rows].all(0) & (together <= spent)
    low, high = int(ranks[rows].min()), int(ranks[rows].max())
    found = np.flatnonzero(fits[low : high + 1])
    return low + int(found[-1]) if len(found) else low


def cut(values: np.ndarray, most: int) -> Sequence[int]:
    """Edges of at most `most` runs of ascending values [E] with the least sum of squared distances from their means."""
    count = len(values)
    one, two = (np.concatenate(([0.0], np.cumsum(np.asarray(values, float) ** power))) for power in (1, 2))
    lengths = np.arange(count + 1)[None, :] - np.arange(count + 1)[:, None]
    spread = (two[None, :] - two[:, None]) - (one[None, :] - one[:, None]) ** 2 / np.maximum(lengths, 1)
    spread = np.where(lengths > 0, spread, np.inf)
    best, backs = np.full(count + 1, np.inf), []
    best[0] = 0.0
    for _ in range(min(most, count)):
        totals = best[:, None] + spread
        backs.append(np.argmin(totals, axis=0))
        best = totals.min(0)
    edges = [count]
    for back in reversed(backs):
        edges.append(int(back[edges[-1]]))
    return edges[::-1]
