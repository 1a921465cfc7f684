"""Bars as inline SVG, a row a name, with their numbers for `chart`: amounts that are compared by length."""

from collections.abc import Mapping

from markupsafe import Markup

from fisherfold.page.page import chart, element
from fisherfold.page.pictures import LETTER, WIDTH

ROW = 22


def bar_chart(label: str, bars: Mapping[str, tuple[float, str]], title: str, width: int = WIDTH) -> Markup:
    """Horizontal bars from zero.

    Args:
        label: what the picture shows, for those who cannot see it.
        bars: by name the amount, and how it is written beside its bar.
        title: over the bars.
    """
    left = 14 + max(map(len, bars), default=0) * LETTER
    room = width - left - 14 - max((len(text) for _, text in bars.values()), default=0) * LETTER
    most = max((value for value, _ in bars.values()), default=0) or 1
    parts = [element("text", title, class_="title", x=0, y=12)]
    for row, (name, (value, text)) in enumerate(bars.items()):
        top, length = 24 + row * ROW, value / most * room
        parts.append(element("text", name, x=f"{left - 8:.1f}", y=top + 13, text_anchor="end"))
        parts.append(
            element("rect", class_="cell", x=f"{left:.1f}", y=top, width=f"{length:.1f}", height=ROW - 6, rx=1)
        )
        parts.append(element("text", text, x=f"{left + length + 6:.1f}", y=top + 13, text_anchor="start"))
    height = 30 + ROW * len(bars)
    svg = element("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)
    numbers = {
        "kind": "bars",
        "title": title,
        "names": list(bars),
        "values": [float(f"{value:.5g}") for value, _ in bars.values()],
        "texts": [text for _, text in bars.values()],
    }
    return chart(svg, numbers)
