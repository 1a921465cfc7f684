"""What both models write, side by side, and how far apart they are on each source of text and on the dense model's own answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fisherfold.page.page import details, element, join, number, percent, section, table
from fisherfold.run.workspace import MODELS

SHOWN = 8  # answers before the rest folds away
MOST = 64
LONGEST = 1200  # characters of one answer
NO_PROMPTS = (
    "There were no prompts to ask both models, so how the compressed model answers is not known. Prompts are prepared for models "
    "with a chat template."
)


def answers_view(samples: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> Markup:
    """Figures of the answers, then the answers.

    Args:
        samples: answers.parquet of stage `evaluate`.
        metrics: metrics.json.
    """
    if not samples:
        return section("What it writes", element("p", NO_PROMPTS))
    header = ("prompt", "dense model", "compressed model")
    rows = [(_said(row["prompt"]), *(_answer(row, model) for model in MODELS)) for row in samples[:MOST]]
    shown = table(
        "Greedy answers of both models to prompts that calibration never saw", header, rows[:SHOWN], len(header)
    )
    rest = rows[SHOWN:]
    left_out = f" The first {MOST} of {len(samples)} are here." if len(samples) > MOST else ""
    more = (
        details(f"{len(rest)} more answers.{left_out}", table("Further answers", header, rest, len(header)))
        if rest
        else None
    )
    return section("What it writes", _figures(metrics), shown, more)


def _figures(metrics: Mapping[str, Any]) -> Markup:
    """Counts of failures and measures of agreement."""
    dense, compressed = (metrics[model] for model in MODELS)
    prompts = metrics["answers"]["prompts"]
    rows = [
        ("empty answers", number(dense["empty_answers"]), number(compressed["empty_answers"])),
        (
            "answers that repeat themselves to the end",
            number(dense["looping_answers"]),
            number(compressed["looping_answers"]),
        ),
        (
            "first tokens of both answers agree, share of prompts",
            "",
            _with_error(compressed, "greedy_agreement", share=True),
        ),
        ("agreeing tokens at the start, mean", "", _with_error(compressed, "agreeing_prefix")),
        ("divergence on the dense model's own answers, nats per token", "0", _with_error(compressed, "own_answers_kl")),
    ]
    return table(f"Answers to {prompts} prompts; ± is one standard error", ("", "dense", "compressed"), rows)


def _with_error(figures: Mapping[str, Any], name: str, share: bool = False) -> Markup:
    value, error = figures[name], figures[f"{name}_error"]
    shown = (
        (percent(value), None if error is None else f"{100 * error:.1f}")
        if share
        else (number(value), error and number(error, 2))
    )
    return join([shown[0], element("span", f" ± {shown[1]}", class_="error") if shown[1] else None])


def _answer(row: Mapping[str, Any], model: str) -> Markup:
    """The answer, marked where it is empty or goes round in circles."""
    text = row[model]
    if not text.strip():
        return element("em", "(empty)")
    return join([_said(text), element("em", " (repeats itself)") if row[f"{model}_loops"] else None])


def _said(text: str) -> Markup:
    return element("span", text if len(text) <= LONGEST else f"{text[:LONGEST]} …", class_="said")


def sources_table(metrics: Mapping[str, Any]) -> Markup | None:
    """Perplexity and divergence on each source of the evaluation text; None where the text has one source without a name."""
    sources = metrics.get("by_source") or {}
    if not sources:
        return None
    header = ("source", "sequences", "dense", "compressed", "times", "divergence", "calibrated on")
    rows = [
        (
            name,
            number(source["sequences"]),
            *(_with_error(source, model) for model in MODELS),
            number(source["compressed"] / source["dense"]),
            _with_error(source, "kl_to_dense"),
            "yes" if source["calibrated"] else "no",
        )
        for name, source in sources.items()
    ]
    return table(
        "Perplexity and divergence (nats per token) by source of the text; ± is one standard error", header, rows
    )
