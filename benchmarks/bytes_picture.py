"""The README's picture of quality against bytes, from the rows that benchmarks/bytes.py has measured.

python benchmarks/bytes_picture.py --folder FOLDER --to docs/bytes.svg
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from fisherfold.page.page import element, join, stand_alone
from fisherfold.page.pictures import WIDTH, Line, line_chart

WAYS = {
    "rank × bits, one knapsack": ("ours-",),
    "few bits under the metric": ("dense-2", "dense-3", "dense-4", "dense-8"),
    "llama.cpp: Q2_K, Q4_K_M": ("q2_k", "q4_k_m"),
    "few bits to nearest": ("dense-3-nearest", "dense-4-nearest", "dense-8-nearest"),
    "40 % of the numbers cut, 16, 8 and 4 bits": ("rank-9.6", "rank-9.6-8", "rank-9.6-4"),
}
"""Rows of each line; one that ends with "-" stands for all that begin so."""
MOST = 2.0  # nats: what is worse lies above the picture
HEIGHT = 360


def lines(rows: Mapping[str, dict]) -> list[Line]:
    """A line for each way to keep the model: bits a number, and divergence on own answers; rows that others of their way beat are left out."""
    found = []
    for colour, (name, own) in enumerate(WAYS.items()):
        chosen = [row for key, row in rows.items() if key in own or any(key.startswith(n) for n in own if n[-1] == "-")]
        points = sorted((row["bits"], row["own_answers_kl"]) for row in chosen)
        points = [point for i, point in enumerate(points) if all(point[1] < other[1] for other in points[:i])]
        found.append(Line(name, points, colour, marks=points))
    return found


def picture(rows: Mapping[str, dict]) -> str:
    """An SVG file."""
    drawn = lines(rows)
    chart = line_chart(
        "Divergence from the dense model on its own answers by bits a number, of five ways to keep it",
        drawn,
        "bits a number of the layers, scales and orders included",
        "nats a token lost on the dense model's own answers",
        size=(WIDTH, HEIGHT),
        y_range=(0.0, MOST),
    )
    return stand_alone(chart.replace(Markup("</svg>"), join([*map(label, drawn), Markup("</svg>")]), 1))


def label(line: Line) -> Markup:
    """A line's name with a stroke of its colour, at the right where no curve is."""
    y = 150 + 22 * line.colour
    stroke = f"stroke: var(--c{line.colour})"
    return join(
        [
            element("line", x1=WIDTH - 330, y1=y - 4, x2=WIDTH - 302, y2=y - 4, class_="line", style=stroke),
            element("text", line.name, x=WIDTH - 294, y=y, text_anchor="start"),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of benchmarks/bytes.py")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    rows = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in options.folder.glob("*.json")}
    options.to.write_text(picture(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
