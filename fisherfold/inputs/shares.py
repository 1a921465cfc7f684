"""How much of the text of stage `prepare` the model writes itself."""

from typing import NamedTuple

from fisherfold.run.params import PrepareParams


class OwnText(NamedTuple):
    """Sequences of a split that the model writes: as answers to prompts, and after nothing."""

    conversations: int
    free: int


def own_text(params: PrepareParams, talks: bool) -> dict[str, OwnText]:
    """Of each split but evaluation's; conversations only where the model `talks`.

    No free text for training: healing moves all layers at once, and such text made the model less sure of its chat format.
    """
    found = {}
    for name, size in params.splits.items():
        if name != "evaluation":
            conversations = round(params.self_written * size) if talks else 0
            found[name] = OwnText(
                conversations, 0 if name == "training" else round(params.free_text * (size - conversations))
            )
    return found
