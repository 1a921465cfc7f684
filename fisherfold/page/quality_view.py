"""What compression costs: perplexity, divergence, knowledge and further tasks of both models side by side, and losses and divergence by position."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from markupsafe import Markup

from fisherfold.page.answers_view import sources_table
from fisherfold.page.page import details, element, figure, join, number, percent, section, table
from fisherfold.page.pictures import Line, legend, line_chart
from fisherfold.page.record import Record
from fisherfold.run.workspace import MODELS

COMPARED = (*MODELS, "difference")
ACCURACIES = {"acc": "knowledge questions right", "acc_norm": "the same, by likelihood per character"}


def points(difference: float) -> str:
    """A difference of two shares in percentage points."""
    return percent(difference, sign=True).replace("%", "points")


def times(record: Record) -> str:
    """The compressed model's perplexity as a multiple of the dense model's."""
    return number(ratio_of(*(record.metrics[model]["perplexity"] for model in reversed(MODELS))))


def ratio_of(compressed: float | None, dense: float | None) -> float | None:
    """compressed / dense, None where one of them is missing or dense is zero."""
    return None if compressed is None or not dense else compressed / dense


def at(facts: Any, *keys: str) -> Any:
    """A nested fact, or None where the record does not go so deep."""
    for key in keys:
        facts = facts.get(key) if isinstance(facts, Mapping) else None
    return facts


def _figure(value: float | None, error: float | None) -> Markup:
    """A figure with its standard error."""
    return _with_error(number(value, 4), None if error is None else number(error, 2))


def _with_error(value: str, error: str | None) -> Markup:
    return join([value, element("span", f" ± {error}", class_="error") if error else None])


def quality_view(record: Record) -> Markup:
    """The section with everything that was measured of both models."""
    caption = "Dense and compressed model side by side; ± is one standard error"
    figures = table(caption, ("measure", "dense", "compressed", "change"), _quality_rows(record))
    return section(
        "What it costs", figures, sources_table(record.metrics), _task_table(record), *_by_position(record)
    )


def _quality_rows(record: Record) -> Iterator[tuple[object, ...]]:
    text, knowledge = (at(record.facts["evaluate"], part) for part in ("text", "knowledge"))
    errors = [at(text, "perplexity_standard_error", model) for model in MODELS]
    perplexities = [record.metrics[model]["perplexity"] for model in MODELS]
    yield "perplexity", *map(_figure, perplexities, errors), f"{times(record)} ×"
    if text:
        losses = [_figure(text["mean"][name], text["standard_error"][name]) for name in COMPARED]
        yield "loss, nats per token", *losses
    divergence = _figure(record.metrics["compressed"]["kl_to_dense"], at(text, "standard_error", "divergence"))
    yield "divergence from the dense model, nats per token", "0", divergence, ""
    worst = record.metrics["compressed"].get("kl_worst_share")
    yield "of that, what the worst hundredth of the tokens has", "", percent(worst), ""
    for rule, name in ACCURACIES.items() if knowledge else ():
        yield name, *(_accuracy(knowledge, rule, which) for which in COMPARED)


def _accuracy(knowledge: Mapping[str, Any], rule: str, which: str) -> Markup:
    value, error = (knowledge[statistic][rule][which] for statistic in ("mean", "standard_error"))
    shown = points(value) if which == "difference" else percent(value)
    return _with_error(shown, None if error is None else f"{100 * error:.1f}")


def _task_table(record: Record) -> Markup | None:
    """Results of further tasks; the parts of a group fold away."""
    tasks = record.json("evaluate", "tasks.json") or {}
    if not tasks:
        return None
    whole = [row for task, results in tasks.items() for row in _task_rows(results, [task])]
    parts = [
        row for task, results in tasks.items() for row in _task_rows(results, sorted({*results["dense"]} - {task}))
    ]
    header = ("task and metric", "examples", "dense", "compressed")
    folded = details("Parts of these groups", table("Parts of lm-eval groups", header, parts)) if parts else None
    return join([table("Further lm-eval tasks", header, whole), folded])


def _task_rows(results: Mapping[str, Any], names: Iterable[str]) -> Iterator[tuple[object, ...]]:
    """One row for each metric of each of `names`, which lm-eval gives to tasks and groups."""
    for name in names:
        entries = [results[model].get(name, {}) for model in MODELS]
        for metric in entries[0].get("metrics", {}):
            pair = [at(entry, "metrics", metric) or {} for entry in entries]
            figures = [_figure(each.get("value"), each.get("standard_error")) for each in pair]
            yield f"{name}, {metric}", number(entries[0].get("documents")), *figures


def _by_position(record: Record) -> Iterator[Markup]:
    """Pictures of both models' losses, and of the divergence."""
    text = record.text("evaluate", "losses.csv")
    rows = list(csv.DictReader(text.splitlines())) if text else []
    if not rows:
        return

    def line(column: str, title: str, colour: int) -> Line:
        return Line(title, [(float(row["position"]), float(row[column])) for row in rows], colour)

    where = "position in the sequence, tokens"
    losses = [line(model, f"{model} model", colour) for colour, model in enumerate(MODELS)]
    chart = line_chart("Mean loss by position, dense and compressed", losses, where, "mean loss, nats")
    yield figure(
        join([legend(losses), chart]),
        "Mean loss at each position: later tokens have more context. A gap that widens to the right would mean that long context suffers most.",
    )
    divergence = line("divergence", "divergence", 1)
    heights = [0.0, *(y for _, y in divergence.points)]
    from_zero = min(heights), max(heights)
    yield figure(
        line_chart("Mean divergence by position", [divergence], where, "mean divergence, nats", y_range=from_zero),
        "Mean divergence at each position. High at the very left alone it says that first tokens, which attention rests on, are off.",
    )
