"""How much of the text of stage `prepare` the model writes itself."""

from typing import NamedTuple

from fisherfold.run.params import PrepareParams


class OwnText(NamedTuple):
    """Sequences of a split that the model writes: as answers to prompts, after nothing, and on from text of the corpus."""

    conversations: int
    free: int
    continued: int


def own_text(params: PrepareParams, talks: bool) -> dict[str, OwnText]:
    """Of each split but evaluation's; conversations only where the model `talks`.

    No free text for training: healing moves all layers at once, and such text made the model less sure of its chat format. Text that goes on from the
    corpus's is for training alone.
    """
    found = {}
    for name, size in params.splits.items():
        if name != "evaluation":
            conversations = round(params.self_written * size) if talks else 0
            rest = size - conversations
            free, continued = (params.free_text, 0.0) if name != "training" else (0.0, params.continued)
            found[name] = OwnText(conversations, round(free * rest), round(continued * rest))
    return found
