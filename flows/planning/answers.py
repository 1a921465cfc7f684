"""What writing asks of a worker, on paper: the text that a model writes for its calibration, and the answers of evaluation."""

from math import ceil

from fisherfold.evaluation.greedy_answers import MOST_ROWS
from fisherfold.inputs.sampling import BATCH
from fisherfold.inputs.shares import own_text
from fisherfold.network.models import DTYPES
from fisherfold.run.params import Params, PrepareParams
from flows.planning.demand import Demand, forward_operations
from flows.planning.shapes import ModelShapes

Units = dict[str, tuple[Demand, tuple[str, ...]]]


def own_text_units(shapes: ModelShapes, params: PrepareParams) -> Units:
    """Stage `prepare`: answers to the held-out prompts, as many as their share of the sequences takes, and free and continued text, in batches."""
    splits = own_text(params, talks=True).values()
    texts = [size for own in splits for size in (own.free, own.continued)]
    wanted = [own.conversations * params.sequence_length for own in splits]
    prompts = [params.held_out_prompts, *(ceil(tokens / params.answer_tokens) for tokens in wanted)]
    batches = [(size, params.answer_tokens) for asked in prompts for size in _batches(asked, BATCH).values()]
    batches += [(size, params.sequence_length) for count in texts for size in _batches(count, BATCH).values()]
    return {
        f"text-{number}": (_answering(shapes, size, tokens, params.dtype), ("model",))
        for number, (size, tokens) in enumerate(batches)
    }


def greedy_answers(shapes: ModelShapes, params: Params) -> Units:
    """Stage `evaluate`: the held-out prompts, a batch of each model at a time."""
    asked = params.prepare.held_out_prompts
    return {
        f"answers-{model}-{first}": (_answering(shapes, size, params.evaluate.answer_tokens, params.evaluate.dtype), ())
        for first, size in _batches(asked, MOST_ROWS).items()
        for model in ("dense", "compressed")
    }


def _batches(asked: int, most: int) -> dict[int, int]:
    """Sizes of the batches of so many prompts, at most `most` each, by their first."""
    return {first: min(most, asked - first) for first in range(0, asked, most)}


def _answering(shapes: ModelShapes, prompts: int, tokens: int, dtype: str) -> Demand:
    """A batch of prompts answered token by token: every step reads all weights."""
    weights = shapes.parameters * DTYPES[dtype].itemsize
    return Demand(model=forward_operations(shapes, prompts * tokens, tokens), traffic=weights * tokens)
