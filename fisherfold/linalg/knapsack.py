"""One rank for each layer under one budget: a multiple-choice knapsack.

    maximise Σ_l worth[l, r_l]   subject to   Σ_l cost[l, r_l] <= budget

worth [L, R] float64 and cost [L, R] int64, option r in column r; an option that a layer does not have has worth −inf.
Costs need not be concave in r, and options need not lie on the concave envelope: every step compares all of them.
"""

from dataclasses import dataclass

import numpy as np

BISECTIONS = 200  # more than float64 can tell apart
STATES = 512  # partial solutions kept while the duality gap is closed; small problems need fewer and are solved exactly


@dataclass(frozen=True)
class Knapsack:
    """The problem above. Feasible: the cheapest options together cost at most `budget`."""

    worth: np.ndarray
    cost: np.ndarray
    budget: int

    def total_cost(self, picks: np.ndarray) -> int:
        """What these picks cost together."""
        return int(pick(self.cost, picks).sum())


def solve(problem: Knapsack) -> np.ndarray:
    """Ranks [L]: the budget is never exceeded, and no layer could take a dearer option with what is left of it.

    The Lagrangian solution at the smallest price λ that meets the budget (every layer alone maximises worth − λ cost)
    is optimal for what it costs (Everett 1963). What is left is spent greedily, then the duality gap is closed: an optimal
    solution differs only in options whose reduced worth loses less than the gap, and those are few.
    """
    price = _find_price(problem)
    picks = fill(problem, best_at_price(problem, price))
    better = _close_gap(problem, price, picks)
    return picks if better is None else fill(problem, better)


def best_at_price(problem: Knapsack, price: float) -> np.ndarray:
    """argmax_r worth[l, r] − price · cost[l, r] for every layer; the cheapest of equals."""
    return np.argmax(problem.worth - price * problem.cost, axis=1)


def cheapest(problem: Knapsack) -> np.ndarray:
    """The cheapest option of every layer."""
    return np.argmin(np.where(np.isneginf(problem.worth), np.iinfo(np.int64).max, problem.cost), axis=1)


def fill(problem: Knapsack, picks: np.ndarray) -> np.ndarray:
    """Spend what is left of the budget: again and again the dearer option that still fits with the most worth per number."""
    picks = picks.copy()
    rows = np.arange(len(picks))
    worth, cost, left = problem.worth, problem.cost, problem.budget - problem.total_cost(picks)
    rate = _rates(worth, cost, picks, rows)
    while True:
        fitting = np.where(cost - cost[rows, picks][:, None] <= left, rate, -np.inf)
        layer, option = np.unravel_index(np.argmax(fitting), fitting.shape)
        if np.isneginf(fitting[layer, option]):
            return picks
        left -= int(cost[layer, option] - cost[layer, picks[layer]])
        picks[layer] = option
        rate[layer] = _rates(worth[[layer]], cost[[layer]], picks[[layer]], rows[:1])[0]


def pick(table: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """table[l, picks[l]] for every layer."""
    return np.take_along_axis(table, picks[:, None], axis=1)[:, 0]


def _rates(worth: np.ndarray, cost: np.ndarray, picks: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Worth gained per number by every dearer option; −inf where an option is not dearer or does not exist."""
    extra = cost - cost[rows, picks][:, None]
    gain = worth - worth[rows, picks][:, None]
    return np.divide(gain, extra, out=np.full(worth.shape, -np.inf), where=(extra > 0) & np.isfinite(worth))


def _find_price(problem: Knapsack) -> float:
    """The smallest price whose solution meets the budget, by bisection on its logarithm; 0 if none is needed."""
    if problem.total_cost(best_at_price(problem, 0.0)) <= problem.budget:
        return 0.0
    low, high = float(np.finfo(float).tiny), _highest_rate(problem)
    for _ in range(BISECTIONS):
        middle = float(np.sqrt(low) * np.sqrt(high))
        if not low < middle < high:
            break
        if problem.total_cost(best_at_price(problem, middle)) <= problem.budget:
            high = middle
        else:
            low = middle
    return high


def _highest_rate(problem: Knapsack) -> float:
    """A price at which every layer takes its cheapest option."""
    picks = cheapest(problem)
    highest = _rates(problem.worth, problem.cost, picks, np.arange(len(picks))).max()
    return 2.0 * max(float(highest), np.finfo(float).tiny)


def _close_gap(problem: Knapsack, price: float, picks: np.ndarray) -> np.ndarray | None:
    """A solution worth more than `picks`, or None; the best there is, unless more than STATES partial ones compete.

    With loss[l, r] = max(worth − λ cost) − (worth − λ cost)[l, r] >= 0, a solution is worth the dual bound − Σ loss −
    λ (budget left), so one that beats `picks` has Σ loss + λ (budget left) below the gap between bound and `picks`.
    """
    reduced = problem.worth - price * problem.cost
    loss = reduced.max(axis=1, keepdims=True) - reduced
    gap = float(pick(loss, picks).sum()) + price * (problem.budget - problem.total_cost(picks))
    if gap <= 0:
        return None
    options = [np.flatnonzero(row < gap) for row in loss]
    costs = [problem.cost[layer, choice] for layer, choice in enumerate(options)]
    least_after, most_after = _sums_after([c.min() for c in costs]), _sums_after([c.max() for c in costs])
    total_cost, total_loss, trail = np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 0), np.int64)
    for layer, choice in enumerate(options):
        cost = (total_cost[:, None] + costs[layer]).ravel()
        lost = (total_loss[:, None] + loss[layer, choice]).ravel()
        unspent = np.maximum(problem.budget - cost - most_after[layer], 0)
        keep = np.flatnonzero((cost + least_after[layer] <= problem.budget) & (lost + price * unspent < gap))
        keep = keep[_undominated(cost[keep], lost[keep] - price * cost[keep], lost[keep])]
        parent, taken = np.divmod(keep, len(choice))
        total_cost, total_loss = cost[keep], lost[keep]
        trail = np.column_stack([trail[parent], choice[taken]])
    if not len(trail):
        return None
    return trail[np.argmin(total_loss + price * (problem.budget - total_cost))]


def _sums_after(values: list[int]) -> np.ndarray:
    """Σ of the values behind each position."""
    return np.sum(values) - np.cumsum(values)


def _undominated(cost: np.ndarray, forgone: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices of the partial solutions that none is both cheaper and worth more than; of too many, those that lose least.

    `forgone` = loss − λ cost is, up to a constant, the negative worth.
    """
    order = np.lexsort((forgone, cost))
    best_before = np.minimum.accumulate(np.concatenate(([np.inf], forgone[order][:-1])))
    order = order[forgone[order] < best_before]
    if len(order) > STATES:
        order = order[np.sort(np.argsort(loss[order], kind="stable")[:STATES])]
    return order
