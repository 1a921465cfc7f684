"""What cutting each layer was predicted to cost, beside what was measured: of its weight, of its block, and of the whole model."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from fisherfold.page.layer_views import place, site_of
from fisherfold.page.page import element, figure, join, number, section
from fisherfold.page.pictures import Line, legend, line_chart

PREDICTED = "log₁₀ of the predicted loss"
NATS = ("kfac",)
"""Metrics whose loss is the second order of the text's own: of these a prediction can be told in nats a token."""


def nats(facts: Mapping[str, Mapping[str, Any]]) -> float | None:
    """What ½ Σσ² is multiplied by to be nats a token; None where it has another unit.

    Captured gradients are of the mean over the T − 1 predicted tokens of a sequence, 1/(T − 1) of those of a token's own loss, and B is
    of second order in them. Labels drawn from the model make B that of the Fisher, whose half is the loss's second order.
    """
    length = facts["capture"].get("sequence_length")
    known = facts["subspace"].get("metric") in NATS and facts["capture"].get("labels") == "model"
    return float((length - 1) ** 2) if known and length else None


def cut_view(
    sigma: Mapping[str, np.ndarray],
    ranks: Sequence[Mapping[str, Any]],
    stored: Mapping[str, Mapping[str, Any]],
    losses: tuple[float | None, float | None],
    unit: float | None = None,
) -> Markup | None:
    """A picture with a point a layer; None if no layer was cut.

    Args:
        sigma: σ of every site.
        ranks: rows of ranks.parquet.
        stored: of every layer that was cut, what factorize.json records.
        losses: the predicted and the measured increase of the loss, where they are known.
        unit: see `nats`.
    """
    lines = [
        Line(kind, (), colour, marks=[mark for mark, _ in points], texts=[text for _, text in points])
        for colour, (kind, points) in enumerate(_points(sigma, ranks, stored, unit or 1.0).items())
    ]
    if not lines:
        return None
    name = f"{PREDICTED}, nats a token" if unit else PREDICTED
    chart = line_chart("Predicted loss and error of the weight, by layer", lines, name, "error of the weight")
    caption = (
        "A point a layer: what its cut was predicted to cost, ½ Σσ² of the components dropped under the metric, and the relative error "
        "‖Ŵ − W‖ / ‖W‖ that its stored weight was measured to have. A layer to the upper left is far from what it was, in directions that the "
        "metric says do not matter; one to the lower right costs although little of it went."
    )
    return section("Predicted and measured", _whole(*losses, unit), figure(join([chart, legend(lines)]), caption))


def _points(
    sigma: Mapping[str, np.ndarray],
    ranks: Sequence[Mapping[str, Any]],
    stored: Mapping[str, Mapping[str, Any]],
    unit: float,
) -> dict[str, list[tuple[tuple[float, float], str]]]:
    """By kind of module: (log₁₀ predicted loss, error) and what to say of it."""
    found: dict[str, list[tuple[tuple[float, float], str]]] = defaultdict(list)
    for row in ranks:
        error = stored.get(row["module"], {}).get("reconstruction_error")
        dropped = sigma.get(site_of(row), np.zeros(0))[row["rank"] :]
        cost = 0.5 * unit * float(np.square(dropped).sum())
        if error is not None and cost > 0:
            text = f"{row['module']}: predicted loss {number(cost)}, error of the weight {number(error)}"
            found[place(row["module"])[1]].append(((math.log10(cost), error), text))
    return found


def _whole(predicted: float | None, measured: float | None, unit: float | None) -> Markup | None:
    if predicted is None or measured is None:
        return None
    if unit:
        words = (
            f"Before anything was cut, the metric predicted that the loss would rise by {number(predicted * unit)} nats a token; on held-out text "
            f"it rose by {number(measured)}. The prediction is of second order and adds layers up as if each were cut alone, without what training "
            "gave back afterwards: the more is removed, the less it holds."
        )
    else:
        words = (
            f"Of the whole model, the metric predicted {number(predicted)} before anything was cut; the loss on held-out text rose by "
            f"{number(measured)} nats a token. This metric is no Fisher of the text's tokens and has another unit: compare the first "
            "figure between runs of one metric, not with the second."
        )
    return element("p", words)


def refinement_view(rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The held-out error of every decoder block before and after it was trained; None without refinement."""
    if not rows:
        return None
    changes = [
        100 * (row["held_out_after"] / row["held_out_before"] - 1) if row["held_out_before"] else 0.0 for row in rows
    ]
    texts = [f"{row['block']}: {number(row['held_out_before'])} → {number(row['held_out_after'])}" for row in rows]
    line = Line("change", list(enumerate(changes)), marks=list(enumerate(changes)), texts=texts)
    kept, trained = sum(row["accepted"] for row in rows), sum(row["steps"] > 0 for row in rows)
    caption = (
        f"By how much training changed the error of every decoder block's output on held-out text, per cent; {kept} of {trained} blocks "
        f"got better and were kept so, by {number(-sum(changes) / max(1, trained), 2)} % on average. Blocks are trained from the first to the last, "
        "each on what the compressed blocks before it give"
        + (f"; {len(rows) - trained} of which no layer was cut are left as they are." if trained < len(rows) else ".")
    )
    chart = line_chart("Change of every block's error by refinement", [line], "decoder block", "change of the error, %")
    return section("Refinement by block", figure(chart, caption))
