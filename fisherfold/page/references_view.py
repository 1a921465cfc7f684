"""The papers behind the methods that a run used."""

from typing import Any

from markupsafe import Markup

from fisherfold.page.page import element, section
from fisherfold.page.record import Record
from fisherfold.page.references import REFERENCES


def references_view(record: Record, ranks: list[dict[str, Any]]) -> Markup | None:
    """The section; None where no method needs a paper."""
    used = [record.facts["kronecker"].get("estimator"), record.facts["subspace"].get("metric")]
    used += sorted({row[key] for row in ranks for key in ("allocator", "storage")})
    papers = list(dict.fromkeys(paper for method in used for paper in REFERENCES.get(str(method), ())))
    items = [
        element("li", f"{paper.authors}: {paper.title}. ", element("a", paper.where, href=paper.address))
        for paper in papers
    ]
    return section("Methods", element("ul", *items)) if items else None
