"""The top of the page: which model, five figures, and the result in plain words."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from fisherfold.page.cost_view import speed_sentence
from fisherfold.page.page import element, number, percent
from fisherfold.page.quality_view import at, points, times
from fisherfold.page.record import Record
from fisherfold.page.size_view import kept, weights
from fisherfold.run.workspace import MODELS

RATIO_OF = {"model_bytes": "the whole model's bytes"}
"""What ranks.ratio is a share of, by ranks.unit; else the targeted parameters."""


def model_name(record: Record) -> str:
    """What the model is called."""
    model = record.facts["prepare"].get("model")
    return str(model.get("name", "model") if isinstance(model, Mapping) else model or "model")


def kicker(record: Record, ranks: list[dict[str, Any]]) -> str:
    """One line: the model, what was removed, by which methods."""
    ratio, metric = record.facts["ranks"].get("ratio"), record.facts["subspace"].get("metric")
    what = RATIO_OF.get(str(record.facts["ranks"].get("unit")), "the targeted parameters")
    parts = [model_name(record)]
    parts += [f"{percent(ratio, 0)} of {what} removed"] if ratio is not None else []
    parts += [f"metric {metric}"] if metric else []
    parts += [f"ranks by {ranks[0]['allocator']}"] if ranks else []
    return " · ".join(parts)


def cards(record: Record) -> Markup:
    """The headline: five figures, four where there are no questions."""
    dense, compressed = (record.metrics[model] for model in MODELS)
    whole = kept(record, "model_parameters")
    perplexity = f"{times(record)} × the dense model's {number(dense['perplexity'])}"
    shown = [
        (
            "Parameters kept",
            kept(record, "targeted_parameters"),
            f"of the targeted layers; {whole} of the whole model",
        ),
        ("Perplexity", number(compressed["perplexity"]), perplexity),
        _divergence_card(compressed),
        ("Size on disk", weights(record, "compressed"), f"dense {weights(record, 'dense')}"),
    ]
    if compressed["knowledge_accuracy"] is not None:
        right = f"dense {percent(dense['knowledge_accuracy'])} right"
        shown.insert(2, ("Knowledge", percent(compressed["knowledge_accuracy"]), right))
    return element("ul", *(_card(*card) for card in shown), class_="cards")


def _divergence_card(compressed: Mapping[str, Any]) -> tuple[str, str, str]:
    """On the dense model's own answers, which is what counts in use; on the evaluation text where there are none."""
    own = compressed.get("own_answers_kl")
    if own is None:
        return "Divergence", number(compressed["kl_to_dense"]), "nats per token from the dense model"
    return "Divergence", number(own), "nats per token of the dense model's own answers"


def _card(name: str, value: str, note: str) -> Markup:
    lines = (("name", name), ("value", value), ("note", note))
    return element("li", *(element("span", text, class_=style) for style, text in lines))


def summary(record: Record, layers: int) -> str:
    """The result in plain words."""
    dense, compressed = (record.metrics[model] for model in MODELS)
    sentences = [
        f"The compressed model stores {kept(record, 'targeted_parameters')} of the parameters of its {layers} targeted "
        f"layers, which is {kept(record, 'model_parameters')} of the whole model: {weights(record, 'compressed')} instead of "
        f"{weights(record, 'dense')}.",
        f"On text that nothing was fitted to, its perplexity is {number(compressed['perplexity'])} where the dense model has "
        f"{number(dense['perplexity'])}, {times(record)} times as much.",
    ]
    if compressed["knowledge_accuracy"] is not None:
        sentences.append(_knowledge_sentence(record))
    return " ".join([*sentences, speed_sentence(record.speed)]).strip()


def _knowledge_sentence(record: Record) -> str:
    knowledge = record.facts["evaluate"].get("knowledge") or {}
    accuracy = {model: record.metrics[model]["knowledge_accuracy"] for model in MODELS}
    difference, error = (
        accuracy["compressed"] - accuracy["dense"],
        at(knowledge, "standard_error", "acc", "difference"),
    )
    verdict = ""
    if error is not None:
        verdict = (
            ", which chance alone could explain"
            if abs(difference) <= 2 * error
            else ", which is more than chance explains"
        )
    count = f"{knowledge['questions']} " if "questions" in knowledge else "the "
    return (
        f"Of {count}knowledge questions it answers {percent(accuracy['compressed'])} right, the dense model "
        f"{percent(accuracy['dense'])}: a difference of {points(difference)}{verdict}."
    )
