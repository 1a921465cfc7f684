"""How small the model is: numbers and bytes of both, and what share is kept."""

from markupsafe import Markup

from fisherfold.page.page import megabytes, number, percent, section, table
from fisherfold.page.quality_view import ratio_of
from fisherfold.page.record import Record
from fisherfold.run.workspace import MODELS

COUNTED = {
    "targeted_parameters": "parameters of the targeted layers",
    "model_parameters": "parameters of the whole model",
    "active_parameters": "parameters that a token meets, on average",
}


def kept(record: Record, what: str) -> str:
    """Share of parameters or bytes that the compressed model has, as per cent."""
    size = record.metrics["size"]
    return percent(ratio_of(size[f"{what}_compressed"], size[f"{what}_dense"]))


def weights(record: Record, model: str) -> str:
    """Bytes of a model's weights, for people."""
    return megabytes(record.metrics["size"][f"model_bytes_{model}"])


def size_view(record: Record) -> Markup:
    """The section with both models' sizes."""
    size = record.metrics["size"]
    rows = [
        (label, *(number(size[f"{what}_{model}"]) for model in MODELS), kept(record, what))
        for what, label in COUNTED.items()
        if f"{what}_dense" in size
    ]
    rows.append(("weights on disk", *(weights(record, model) for model in MODELS), kept(record, "model_bytes")))
    caption = "Counted from the saved tensors, index arrays included"
    return section("How small it is", table(caption, ("", "dense", "compressed", "kept"), rows))
