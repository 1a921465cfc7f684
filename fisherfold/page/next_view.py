"""What to do after a run, as commands to paste."""

from collections.abc import Iterator

from markupsafe import Markup

from fisherfold.page.page import element, section


def next_view(level: str, ratio: float | None) -> Markup:
    """The section with one command a wish.

    Args:
        level: of the verdict.
        ratio: `ranks.ratio` of the run.
    """
    items = (element("li", wish, element("pre", element("code", command))) for wish, command in _wishes(level, ratio))
    return section("What to do next", element("ul", *items, class_="next"))


def _wishes(level: str, ratio: float | None) -> Iterator[tuple[str, str]]:
    yield "Hear both models answer your own questions, side by side:", "fisherfold chat"
    if level != "close" and ratio is not None:
        yield "Lose less: remove half as much.", f"fisherfold run --set ranks.ratio={max(0.01, round(ratio / 2, 2)):g}"
        yield (
            "Lose less for the same size: more text, and training of the factors after the cut, which takes longer.",
            "fisherfold run --set preset=best",
        )
        yield (
            "Calibrate on text of the kind that you use the model for:",
            "fisherfold run --set prepare.corpus=YOUR_FILE.jsonl",
        )
    elif ratio is not None:
        yield (
            "Remove more:",
            f"fisherfold run --set ranks.ratio={round(min(ratio + 0.1, ratio + (1 - ratio) / 2), 2):g}",
        )
    yield "Then see what changed between the two runs:", "fisherfold compare"
    yield "Check the bytes of the model folder, wherever it goes:", "fisherfold verify artifacts/factorize/model"
