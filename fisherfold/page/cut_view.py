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


def cut_view(
    sigma: Mapping[str, np.ndarray],
    ranks: Sequence[Mapping[str, Any]],
    stored: Mapping[str, Mapping[str, Any]],
    losses: tuple[float | None, float | None],
) -> Markup | None:
    """A picture with a point a layer; None if no layer was cut.

    Args:
        sigma: σ of every site.
        ranks: rows of ranks.parquet.
        stored: of every layer that was cut, what factorize.json records.
        losses: the predicted and the measured increase of the loss, where they are known.
    """
    lines = [
        Line(kind, (), colour, marks=[mark for mark, _ in points], texts=[text for _, text in points])
        for colour, (kind, points) in enumerate(_points(sigma, ranks, stored).items())
    ]
    if not lines:
        return None
    chart = line_chart("Predicted loss and error of the weight, by layer", lines, PREDICTED, "error of the weight")
    caption = (
        "A point a layer: what its cut was predicted to cost, ½ Σσ² of the components dropped under the metric, and the relative error "
        "‖Ŵ − W‖ / ‖W‖ that its stored weight was measured to have. A layer to the upper left is far from what it was, in directions that the "
        "metric says do not matter; one to the lower right costs although little of it went."
    )
    return section("Predicted and measured", _whole(*losses), figure(join([chart, legend(lines)]), caption))


def _points(
    sigma: Mapping[str, np.ndarray], ranks: Sequence[Mapping[str, Any]], stored: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[tuple[tuple[float, float], str]]]:
    """By kind of module: (log₁₀ predicted loss, error) and what to say of it."""
    found: dict[str, list[tuple[tuple[float, float], str]]] = defaultdict(list)
    for row in ranks:
        error = stored.get(row["module"], {}).get("reconstruction_error")
        dropped = sigma.get(site_of(row), np.zeros(0))[row["rank"] :]
        cost = 0.5 * float(np.square(dropped).sum())
        if error is not None and cost > 0:
            text = f"{row['module']}: predicted loss {number(cost)}, error of the weight {number(error)}"
            found[place(row["module"])[1]].append(((math.log10(cost), error), text))
    return found


def _whole(predicted: float | None, measured: float | None) -> Markup | None:
    if predicted is None or measured is None:
        return None
    return element(
        "p",
        f"Of the whole model, the metric predicted {number(predicted)} before anything was cut; the loss on held-out text rose by "
        f"{number(measured)} nats a token. The prediction adds layers up as if each were cut alone and, with a metric that is no Fisher of the "
        "text's tokens, has another unit: compare it between runs of one metric, not with the measured figure.",
    )


def refinement_view(rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The held-out error of every decoder block before and after it was trained; None without refinement."""
    if not rows:
        return None
    lines = [
        Line(name, [(index, row[key]) for index, row in enumerate(rows)], colour)
        for colour, (name, key) in enumerate((("before", "held_out_before"), ("after", "held_out_after")))
    ]
    kept = sum(row["accepted"] for row in rows)
    caption = (
        f"Error of every decoder block's output on held-out text, before and after its factors were trained; {kept} of {len(rows)} blocks "
        "got better and were kept so."
    )
    chart = line_chart("Error of every block before and after refinement", lines, "decoder block", "held-out error")
    return section("Refinement by block", figure(join([chart, legend(lines)]), caption))
