"""What the model was made of: the dense model and every text with origin, licence and digest, the outputs in between, and what to beware of."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fisherfold.page.page import details, element, section, table
from fisherfold.page.record import Record

SHOWN = 16  # digits of a digest
LISTED = 8
NOT_STATED = "not stated"


def origin_view(record: Record) -> Markup:
    """Warnings, a table of sources, and the digests of all outputs."""
    sources = [_row(what, source) for what, source in _sources(record.facts["prepare"])]
    outputs = [(stage, element("code", digest[:SHOWN])) for stage, digest in record.outputs.items()]
    warnings = [element("li", text) for text in _warnings(record)]
    return section(
        "What it was made of",
        element("ul", *warnings) if warnings else None,
        table("Models and texts, their licences and digests", ("", "name", "origin", "licence", "digest"), sources, 5),
        details(
            "Digests of what each stage wrote",
            table(
                "`fisherfold verify` compares them with what lies there", ("stage", "digest of its files"), outputs, 2
            ),
        ),
    )


def _sources(facts: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The recorded sources by what they are for; several of a kind are a list."""
    for what, found in sorted(facts.items(), key=lambda item: item[0] != "model"):
        for each in found if isinstance(found, list) else [found]:
            if isinstance(each, Mapping) and "name" in each:
                yield what, each


def _row(what: str, source: Mapping[str, Any]) -> tuple[object, ...]:
    digest = element("code", str(source["digest"])[:SHOWN]) if source.get("digest") else "–"
    return what, source["name"], source.get("origin") or "–", source.get("licence") or NOT_STATED, digest


def _warnings(record: Record) -> Iterator[str]:
    """What a reader should know before the model goes anywhere."""
    sources = [each for _, each in _sources(record.facts["prepare"]) if each.get("origin") != "local"]
    unknown = [each["name"] for each in sources if not each.get("licence")]
    if unknown:
        yield f"No licence is stated for {', '.join(map(str, unknown))}: see to it before you pass the model on."
    if skipped := record.facts["capture"].get("skipped"):
        yield f"Calibration sequences left out, for their gradient was not finite: {len(skipped)}."
    if unreached := record.facts["capture"].get("unreached"):
        yield f"Layers that the calibration text never reached: {_some(unreached)}."
    if zero := record.facts["evaluate"].get("zero_layers"):
        yield f"Layers of nothing but zeros, where the dense model has weights: {_some(zero)}."
    texts = record.metrics.get("by_source") or {}
    if texts and all(text.get("calibrated") for text in texts.values()):
        yield "All evaluation text is of sources that calibration drew from, which flatters the model (prepare.unseen names others)."


def _some(names: Sequence[object]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(str, names[:LISTED])) + more
