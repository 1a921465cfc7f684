"""Quality against size, where `fisherfold sweep` has made several models of one: perplexity by that of the dense model over what is kept."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from markupsafe import Markup

from fisherfold.page.page import element, figure, number, percent, section
from fisherfold.page.pictures import Line, legend, line_chart
from fisherfold.page.quality_view import ratio_of
from fisherfold.page.record import Record
from fisherfold.run.workspace import MODELS

SHARE = "share of the targeted parameters kept"


def sweep_view(record: Record) -> Markup | None:
    """A line a metric and allocator, through the means over seeds, and a point for the run that the page is about; None without a sweep."""
    rows, here = record.sweep, _here(record)
    if not rows:
        return None
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[f"{row['metric']}, {row['allocator']}"][round(row["kept"], 3)].append(
            row["perplexity"] / row["perplexity_dense"]
        )
    lines = [_line(name, points, colour) for colour, (name, points) in enumerate(found.items())]
    if here:
        text = f"this run: {percent(here[0])} kept, {number(here[1])} times"
        lines.append(Line("this run", (), len(lines), marks=[here], texts=[text]))
    chart = line_chart("Quality against size", lines, SHARE, "perplexity, times the dense model's")
    caption = (
        f"{len(rows)} models of the last sweep: perplexity on held-out text, by that of the dense model, over the share of the targeted "
        "parameters that is kept. The further down and to the left, the better."
    )
    return section("Quality against size", figure(element("div", chart, legend(lines)), caption))


def _here(record: Record) -> tuple[float, float] | None:
    """Kept share and perplexity by the dense model's, of this run."""
    size, perplexities = record.metrics["size"], [record.metrics[model]["perplexity"] for model in MODELS]
    ratio = ratio_of(*reversed(perplexities))
    kept = ratio_of(size["targeted_parameters_compressed"], size["targeted_parameters_dense"])
    return None if ratio is None or kept is None else (kept, ratio)


def _line(name: str, points: Mapping[float, Sequence[float]], colour: int) -> Line:
    means = [(kept, fmean(values)) for kept, values in sorted(points.items())]
    texts = [f"{name}: {percent(kept)} kept, {number(times)} times" for kept, times in means]
    return Line(name, means, colour, marks=means, texts=texts)
