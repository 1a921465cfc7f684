"""What a format costs in quality: the loss that is predicted under it, against that under the format which keeps most ranks."""

from dataclasses import replace

from fisherfold.allocators.allocation import Allocation, allocate, fisher, pose
from fisherfold.allocators.budget import Budget
from fisherfold.allocators.limits import Limits
from fisherfold.run.errors import ParameterError

FREEST = {"storage": "pivoted", "round_to": 1}
"""Parameters under which most ranks are kept."""


def format_price(task: Allocation, limits: Limits, budget: Budget) -> float | None:
    """L / L₀ − 1: L is the least predicted loss in the task's format, L₀ that of pivoted layers of any rank, at the same ratio and limits.

    Both by allocator `fisher`, whatever the task's own, so that formats are compared and nothing else.

    Returns:
        None if the task's format is the freest itself, or has nothing to be compared with: no loss, or limits that only this format fits.
    """
    params = task.params.model_copy(update=FREEST)
    if params == task.params:
        return None
    try:
        freest = pose(task.sites, task.spectra, params, replace(limits, round_to=params.round_to), budget)
    except ParameterError:
        return None
    loss, least = (each.predicted_loss(allocate(each, fisher).tolist()) for each in (task, freest))
    return loss / least - 1 if least else None


def price_line(storage: str, round_to: int, price: float) -> str:
    """The price in words."""
    return (
        f"{storage} in ranks of multiples of {round_to}: the predicted loss is {price:+.1%} against pivoted layers of any rank at the same "
        "ratio"
    )
