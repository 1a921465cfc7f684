"""The descent of FermiGrad for the report: how the ranks of each kind of module moved, and the loss."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from markupsafe import Markup

from fisherfold.page.layer_views import place, site_full_ranks
from fisherfold.page.page import element, figure, number, section
from fisherfold.page.pictures import Line, legend, line_chart


def trajectory_view(trajectory: Sequence[Mapping[str, Any]], ranks: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Mean μ of every kind of module, as a share of the full rank, over the steps; None if there was no descent.

    Args:
        trajectory: rows of trajectory.parquet (step, loss, tau, module, mu).
        ranks: rows of ranks.parquet.
    """
    if not trajectory:
        return None
    lines = _mean_shares(trajectory, site_full_ranks(ranks))
    losses = {row["step"]: row["loss"] for row in trajectory}
    tau = {row["step"]: row["tau"] for row in trajectory}
    caption = (
        f"Mean μ of each kind of module, as a share of its full rank, over the {len(losses)} steps of FermiGrad. τ fell from "
        f"{number(tau[0], 2)} to {number(tau[max(tau)], 2)} of the rank range; the loss of the first quarter of the steps was "
        f"{number(_mean_of(losses, 0, 1), 3)} on average, that of the last {number(_mean_of(losses, 3, 4), 3)}, each step on "
        "other sequences."
    )
    chart = line_chart("Soft ranks over the steps of the descent", lines, "step", "share of the full rank")
    return section("How the ranks were found", figure(element("div", chart, legend(lines)), caption))


def _mean_shares(trajectory: Sequence[Mapping[str, Any]], full: Mapping[str, int]) -> list[Line]:
    shares: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in trajectory:
        shares[place(row["module"])[1]][row["step"]].append(row["mu"] / full[row["module"]])
    return [
        Line(kind, [(step, mean(values)) for step, values in steps.items()], colour=colour)
        for colour, (kind, steps) in enumerate(shares.items())
    ]


def _mean_of(losses: Mapping[int, float], first: int, last: int) -> float:
    """Mean loss from one quarter of the steps to another."""
    count = len(losses)
    chosen = [losses[step] for step in range(first * count // 4, max(last * count // 4, first * count // 4 + 1))]
    return mean(chosen)
