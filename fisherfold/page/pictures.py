"""Pictures as inline SVG: a heat map over decoder blocks, and lines over an axis; with their numbers, for `chart`.

Colours are style-sheet variables, so pictures follow the reader's light or dark mode; coordinates are rounded to a tenth,
so the same data give the same bytes.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fisherfold.page.page import chart, element, join

WIDTH = 880
LETTER = 7.0  # mean width of a letter in the labels
OUTLINE = 6  # narrowest cell that can carry an outline
COLOURS = 8
DASHES = (None, "7 3", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map: its share of full colour, 0 to 1, what it stands for in words, and whether it is outlined."""

    share: float
    text: str
    outlined: bool = False


def heat_map(label: str, rows: Mapping[str, Mapping[int, Cell]], legend: tuple[str, str]) -> Markup:
    """Cells by row name and column number, coloured from none (share 0) to full (share 1).

    Args:
        label: what the picture shows, for those who cannot see it.
        rows: cells by row and column.
        legend: what no colour and full colour stand for.
    """
    columns = sorted({column for cells in rows.values() for column in cells})
    left = min(250, 14 + max(len(shorten(name)) for name in rows) * LETTER)
    step, height = (WIDTH - left) / max(len(columns), 12), min(26, max(16, 420 / len(rows)))
    gap = 1.5 if step > 8 else 0.0
    place = {column: left + i * step for i, column in enumerate(columns)}
    parts = []
    for i, (name, cells) in enumerate(rows.items()):
        top = i * height
        parts.append(_text(left - 8, top + height / 2 + 4, shorten(name), "end"))
        parts += [_cell(place[column], top, step - gap, height - gap, cell) for column, cell in sorted(cells.items())]
    bottom = len(rows) * height
    parts += [_text(place[column] + step / 2, bottom + 15, str(column)) for column in _spread(columns, 16)]
    parts.append(_text(left, bottom + 34, "decoder block", "start"))
    parts.append(_scale(WIDTH - 250, bottom + 24, legend))
    return chart(_svg(label, bottom + 44, parts), _heat_numbers(rows, columns, legend))


def _heat_numbers(
    rows: Mapping[str, Mapping[int, Cell]], columns: Sequence[int], legend: tuple[str, str]
) -> dict[str, object]:
    """What the page's script draws a heat map from; a column that a row has no cell for is null."""
    cells = [[row.get(column) for column in columns] for row in rows.values()]
    return {
        "kind": "heat",
        "names": [shorten(name) for name in rows],
        "columns": columns,
        "shares": [[cell and _short(min(1.0, max(0.0, cell.share))) for cell in row] for row in cells],
        "texts": [[cell.text if cell else "" for cell in row] for row in cells],
        "outlined": [[y, x] for y, row in enumerate(cells) for x, cell in enumerate(row) if cell and cell.outlined],
        "legend": legend,
    }


def _cell(x: float, y: float, width: float, height: float, cell: Cell) -> Markup:
    where = {"x": _round(x), "y": _round(y), "width": _round(width), "height": _round(height), "rx": 1}
    fill = element(
        "rect",
        element("title", cell.text),
        class_="cell",
        fill_opacity=f"{0.06 + 0.94 * min(1, max(0, cell.share)):.3f}",
        **where,
    )
    if not cell.outlined or width < OUTLINE:
        return fill
    inner = {"x": _round(x + 1), "y": _round(y + 1), "width": _round(width - 2), "height": _round(height - 2)}
    return join([fill, element("rect", class_="whole", **inner)])


def _scale(x: float, y: float, legend: tuple[str, str]) -> Markup:
    steps = [
        element(
            "rect",
            class_="cell",
            fill_opacity=f"{0.06 + 0.94 * i / 11:.3f}",
            x=_round(x + 66 + 9 * i),
            y=_round(y),
            width=9,
            height=10,
        )
        for i in range(12)
    ]
    return join([_text(x + 60, y + 9, legend[0], "end"), *steps, _text(x + 66 + 9 * 12 + 6, y + 9, legend[1], "start")])


@dataclass(frozen=True)
class Line:
    """One line: its name, its points (x, y), the number of its colour, how strong it is, points to be marked, and what these are."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    strength: float = 1.0
    marks: Sequence[tuple[float, float]] = ()
    texts: Sequence[str] = ()


def line_chart(
    label: str,
    lines: Sequence[Line],
    x_name: str,
    y_name: str,
    size: tuple[int, int] = (WIDTH, 300),
    title: str | None = None,
    y_range: tuple[float, float] | None = None,
) -> Markup:
    """Lines over common axes with round ticks; points that are not finite, or outside `y_range`, interrupt a line."""
    width, height = size
    points = [point for line in lines for point in (*line.points, *line.marks) if _finite(point)]
    x_ticks = _ticks([x for x, _ in points], 6 if width > 500 else 4)
    y_ticks = _ticks(y_range or [y for _, y in points], 6 if height > 220 else 4)
    x_end = max((x for x, _ in points), default=x_ticks[-1])
    x_end = x_end if x_end > x_ticks[0] else x_ticks[-1]
    top, bottom, right = (46 if title else 24), height - 40, width - 14
    left = 16 + max(len(_tick(tick, y_ticks)) for tick in y_ticks) * LETTER

    def across(x: float) -> float:
        return left + (x - x_ticks[0]) / (x_end - x_ticks[0]) * (right - left)

    def up(y: float) -> float:
        return bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top)

    parts = [element("text", shorten(title), class_="title", x=0, y=12)] if title else []
    parts.append(_text(0, top - 10, y_name, "start"))
    parts += [_rule(left, up(tick), right, up(tick), "grid") for tick in y_ticks]
    parts += [_text(left - 7, up(tick) + 4, _tick(tick, y_ticks), "end") for tick in y_ticks]
    parts += [_text(across(tick), bottom + 17, _tick(tick, x_ticks)) for tick in x_ticks if tick <= x_end]
    parts += [_rule(left, bottom, right, bottom, "axis"), _text(right, bottom + 34, x_name, "end")]
    parts += [_draw(line, across, up, (y_ticks[0], y_ticks[-1])) for line in lines]
    numbers = {"x": x_name, "y": y_name, "title": title, "size": size, "range": y_range and list(map(_short, y_range))}
    return chart(
        _svg(label, height, parts, width), {"kind": "lines", **numbers, "lines": list(map(_line_numbers, lines))}
    )


def _line_numbers(line: Line) -> dict[str, object]:
    """What the page's script draws a line from; what is not finite interrupts it."""
    texts = line.texts or [""] * len(line.marks)
    marks = [(mark, text) for mark, text in zip(line.marks, texts, strict=True) if _finite(mark)]
    return {
        "name": line.name,
        "colour": line.colour,
        "strength": _short(line.strength),
        "x": [_short(x) if math.isfinite(x) else None for x, _ in line.points],
        "y": [_short(y) if math.isfinite(y) else None for _, y in line.points],
        "marks": [[_short(x), _short(y)] for (x, y), _ in marks],
        "texts": [text for _, text in marks] if line.texts else [],
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _draw(
    line: Line, across: Callable[[float], float], up: Callable[[float], float], y_range: tuple[float, float]
) -> Markup:
    def seen(point: tuple[float, float]) -> bool:
        return _finite(point) and y_range[0] <= point[1] <= y_range[1]

    runs: list[list[str]] = [[]]
    for point in line.points:
        if seen(point):
            runs[-1].append(f"{_round(across(point[0]))},{_round(up(point[1]))}")
        elif runs[-1]:
            runs.append([])
    strength = f"{line.strength:.2f}"
    strokes = [
        element(
            "polyline",
            element("title", line.name),
            class_="line",
            points=" ".join(run),
            stroke_opacity=strength,
            **_stroke(line),
        )
        for run in runs
        if run
    ]
    colour = f"fill: var(--c{line.colour % COLOURS})"
    dots = [
        element("circle", class_="dot", cx=_round(across(x)), cy=_round(up(y)), r=2.6, style=colour)
        for x, y in line.marks
        if seen((x, y))
    ]
    return join([*strokes, *dots])


def _stroke(line: Line) -> dict[str, str | None]:
    """Colour of a line, and a dash once the colours are used up."""
    return {
        "style": f"stroke: var(--c{line.colour % COLOURS})",
        "stroke_dasharray": DASHES[line.colour // COLOURS % len(DASHES)],
    }


def legend(lines: Iterable[Line]) -> Markup:
    """Names of lines with a stroke of each."""
    return element("ul", *(element("li", _sample(line), line.name) for line in lines), class_="legend")


def _sample(line: Line) -> Markup:
    stroke = element("line", x1=0, y1=6, x2=30, y2=6, class_="line", **_stroke(line))
    return element("svg", stroke, viewBox="0 0 30 12", aria_hidden="true")


def _svg(label: str, height: float, parts: Sequence[Markup], width: float = WIDTH) -> Markup:
    return element("svg", *parts, viewBox=f"0 0 {_round(width)} {_round(height)}", role="img", aria_label=label)


def _text(x: float, y: float, text: str, anchor: str = "middle") -> Markup:
    return element("text", text, x=_round(x), y=_round(y), text_anchor=anchor)


def _rule(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return element("line", x1=_round(x1), y1=_round(y1), x2=_round(x2), y2=_round(y2), class_=style)


def _round(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def shorten(name: str, limit: int = 32) -> str:
    """A name of at most `limit` letters, its middle left out."""
    return name if len(name) <= limit else f"{name[: limit // 2 - 1]}…{name[-limit // 2 :]}"


def _spread(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of `values`, evenly spread from the first on."""
    return list(values[:: math.ceil(len(values) / count)])


def _finite(point: tuple[float, float]) -> bool:
    return all(math.isfinite(value) for value in point)


def _ticks(values: Sequence[float], count: int) -> list[float]:
    """At least two round numbers that enclose `values`, about `count` of them."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-9 * max(abs(high), 1e-9):
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def _tick(value: float, ticks: Sequence[float]) -> str:
    """A tick's number with as many decimals as its neighbours need."""
    step = ticks[1] - ticks[0]
    if abs(value) >= 1e6 or step < 1e-4:
        return f"{value:.1e}".replace("-", "−")
    decimals = max(
        0, -math.floor(math.log10(step) + 1e-9) + (abs(step / 10 ** math.floor(math.log10(step)) - 2.5) < 1e-6)
    )
    return f"{value:,.{decimals}f}".replace("-", "−")
