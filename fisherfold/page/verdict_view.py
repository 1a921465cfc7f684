"""The verdict at the top of the report: one word, what it means, and the findings behind it."""

from collections.abc import Sequence

from markupsafe import Markup

from fisherfold.page.page import element


def verdict_view(level: str, sentences: Sequence[str]) -> Markup:
    """A box with the level, the first sentence beside it and a list of the others.

    Args:
        level: one word; it chooses the box's colour too, never colour alone.
        sentences: the headline, then the findings.
    """
    headline, *findings = sentences
    items = element("ul", *(element("li", sentence) for sentence in findings)) if findings else None
    return element(
        "div",
        element("p", element("strong", f"{level.capitalize()}. "), headline),
        items,
        class_=f"verdict {level}",
        role="note",
        aria_label="Verdict",
    )
