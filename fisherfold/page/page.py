"""A page of HTML that stands alone: elements and Jinja2 templates that escape their text, and numbers for people."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

from fisherfold.page.script import script_sources, scripts
from fisherfold.page.style import STYLE

HEADED = re.compile(r'<section id="([^"]+)"><h2>(.*?)</h2>')
SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit
TEMPLATES = Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=lambda value: "" if value is None else value
)
PAGE = TEMPLATES.from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {{ script_sources }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body><a class="skip" href="#main">To the report</a><main id="main">{{ content }}</main>
{% for script in scripts %}
<script>{{ script }}</script>
{% endfor %}
</body>
</html>
""")
TABLE = TEMPLATES.from_string("""\
<div class="scroll" tabindex="0" role="region" aria-label="{{ caption }}"><table{% if numbers_from >= header | length %} class="texts"{% endif %}><caption>{{ caption }}</caption>
<thead><tr>
{% for cell in header %}
{% if cell %}
<th scope="col"{% if loop.index0 >= numbers_from %} class="number"{% endif %}>{{ cell }}</th>
{% else %}
<td></td>
{% endif %}
{% endfor %}
</tr></thead>
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>
{% for cell in row[1:] %}
<td{% if loop.index >= numbers_from %} class="number"{% else %} data-column="{{ header[loop.index] }}"{% endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
""")
FIGURE = TEMPLATES.from_string("""\
<figure>
<div{% if wide %} class="scroll"{% endif %}>{{ picture }}</div>
<figcaption>{{ caption }}</figcaption>
</figure>
""")


def element(name: str, *children: object, **attributes: object) -> Markup:
    """``<name attributes>children</name>``; an attribute's trailing and inner ``_`` stand for nothing and ``-``; None drops it."""
    written = "".join(
        f' {key.strip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(parts: Iterable[object]) -> Markup:
    """Parts one after another, plain text escaped, None left out."""
    return Markup("").join(part if isinstance(part, Markup) else str(part) for part in parts if part is not None)


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]], numbers_from: int = 1) -> Markup:
    """A table whose first column names the row; columns from `numbers_from` on are aligned as numbers. Without such, the cells of a row
    stand below each other on a narrow screen, each under its column's name."""
    rows = [tuple(row) for row in rows]
    return Markup(TABLE.render(caption=caption, header=header, rows=rows, numbers_from=numbers_from))


def figure(picture: Markup, caption: str, wide: bool = True) -> Markup:
    """A picture with its caption; a wide one scrolls on a narrow screen instead of shrinking beyond reading."""
    return Markup(FIGURE.render(picture=picture, caption=caption, wide=wide))


def section(title: str, *children: object) -> Markup:
    """A part of the page under a heading, which can be linked to."""
    return element("section", element("h2", title), *children, id=re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"))


def contents(parts: Sequence[Markup | None]) -> Markup:
    """Links to the sections among the parts of a page."""
    found = HEADED.findall("".join(part for part in parts if part is not None))
    links = (element("li", element("a", Markup(title), href=f"#{anchor}")) for anchor, title in found)
    return element("nav", element("ul", *links), aria_label="Contents", class_="contents")


def details(summary: str, *children: object) -> Markup:
    """A part that is folded until it is asked for."""
    return element("details", element("summary", summary), *children)


def chart(picture: Markup, numbers: Mapping[str, Any]) -> Markup:
    """A picture with the numbers that the page's script draws in its place; see ``fisherfold.page.script``."""
    text = json.dumps(numbers, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return element("div", picture, element("script", Markup(text), type="application/json"), class_="chart")


def page(title: str, *children: object) -> str:
    """The whole document. Its policy forbids the browser to load anything from anywhere, and to run scripts but its own."""
    inlined = {"style": Markup(STYLE), "scripts": [Markup(script) for script in scripts()]}
    return PAGE.render(title=title, content=join(children), script_sources=Markup(script_sources()), **inlined)


def stand_alone(picture: Markup) -> str:
    """A picture as an SVG file of its own, as it looks in a page."""
    drawn = str(picture)[picture.index("<svg") : picture.index("</svg>") + len("</svg>")]
    width, height = (float(size) for size in drawn.partition('viewBox="0 0 ')[2].partition('"')[0].split())
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}"'
    style = f"{STYLE}svg {{ background: var(--paper); }}".replace(".chart > svg", "svg")
    return drawn.replace("<svg", opening, 1).replace(">", f"><style>{style}</style>", 1)


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits, thousands separated; a dash for None."""
    if value is None:
        return "–"
    if value == 0 or (isinstance(value, int) and abs(value) < 1e15):
        return f"{value:,}"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    decimals = max(0, digits - 1 - magnitude(value))
    return f"{value:,.{decimals}f}".replace("-", "−")


def magnitude(value: float) -> int:
    """The decimal exponent of a number that is not 0."""
    return int(f"{value:e}".partition("e")[2])


def percent(share: float | None, decimals: int = 1, sign: bool = False) -> str:
    """A share as per cent; a dash for None."""
    return "–" if share is None else f"{100 * share:{'+' if sign else ''}.{decimals}f}{SPACE}%".replace("-", "−")


def megabytes(count: int) -> str:
    """Bytes in decimal units, three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{number(count / size)}{SPACE}{unit}"
    return f"{count}{SPACE}B"
