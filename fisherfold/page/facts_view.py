"""Everything the stages recorded about themselves."""

from collections.abc import Iterator, Mapping

from markupsafe import Markup

from fisherfold.page.page import details, element, section, table
from fisherfold.page.record import Record

LONGEST_FACT = 300


def facts_view(record: Record) -> Markup:
    """The section with a table a stage."""
    blocks = [
        details(stage, table(f"Recorded by stage {stage}", ("fact", "value"), rows, numbers_from=2))
        for stage, facts in record.facts.items()
        if (rows := [(element("code", key), _fact(value)) for key, value in flatten(facts)])
    ]
    return section("Parameters and facts", *blocks)


def flatten(facts: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Nested facts as (dotted key, value), sorted."""
    if isinstance(facts, Mapping) and facts:
        for key in sorted(facts):
            yield from flatten(facts[key], f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, facts


def _fact(value: object) -> str:
    text = (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else "–"
        if value is None or value in ([], {})
        else str(value)
    )
    return text if len(text) <= LONGEST_FACT else f"{text[:LONGEST_FACT]} … ({len(text)} characters)"
