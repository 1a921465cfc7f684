"""What answers to prompts ask of a worker, on paper: those that a chat model writes for its calibration, and those of evaluation."""

from math import ceil

from fisherfold.evaluation.greedy_answers import MOST_ROWS
from fisherfold.inputs.self_written import BATCH
from fisherfold.network.models import DTYPES
from fisherfold.run.params import Params, PrepareParams
from flows.planning.demand import Demand, forward_operations
from flows.planning.shapes import ModelShapes

Units = dict[str, tuple[Demand, tuple[str, ...]]]


def self_writing(shapes: ModelShapes, params: PrepareParams) -> Units:
    """Stage `prepare`: answers to the held-out prompts, and as many as their share of the sequences takes, in batches."""
    splits = params.tuning_sequences, params.calibration_sequences, params.healing_sequences
    wanted = [params.self_written * size * params.sequence_length for size in splits]
    prompts = [params.held_out_prompts, *(ceil(tokens / params.answer_tokens) for tokens in wanted)]
    batches = [size for asked in prompts for size in _batches(asked, BATCH).values()]
    return {
        f"answers-{number}": (_answering(shapes, size, params.answer_tokens, params.dtype), ("model",))
        for number, size in enumerate(batches)
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
