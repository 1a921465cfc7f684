"""What answers to prompts ask of a worker, on paper: those that a chat model writes for its calibration, and those of evaluation."""

from math import ceil

from fisherfold.inputs.self_written import BATCH
from fisherfold.network.models import DTYPES
from fisherfold.run.params import Params, PrepareParams
from flows.planning.demand import Demand, forward_operations
from flows.planning.shapes import ModelShapes

Units = dict[str, tuple[Demand, tuple[str, ...]]]


def self_writing(shapes: ModelShapes, params: PrepareParams) -> Units:
    """Stage `prepare`: batches of answers, as many as their share of the sequences takes, and one to the held-out prompts."""
    sequences = params.calibration_sequences + params.tuning_sequences + params.healing_sequences
    wanted = params.self_written * sequences * params.sequence_length
    batches = ceil(wanted / (BATCH * params.answer_tokens)) + ceil(params.held_out_prompts / BATCH)
    demand = _answering(shapes, BATCH, params.answer_tokens, params.dtype)
    return {f"answers-{number}": (demand, ("model",)) for number in range(batches)}


def greedy_answers(shapes: ModelShapes, params: Params) -> Units:
    """Stage `evaluate`: the held-out prompts, a batch of each model at a time."""
    asked = params.prepare.held_out_prompts
    sizes = {first: min(BATCH, asked - first) for first in range(0, asked, BATCH)}
    return {
        f"answers-{model}-{first}": (_answering(shapes, size, params.evaluate.answer_tokens, params.evaluate.dtype), ())
        for first, size in sizes.items()
        for model in ("dense", "compressed")
    }


def _answering(shapes: ModelShapes, prompts: int, tokens: int, dtype: str) -> Demand:
    """A batch of prompts answered token by token: every step reads all weights."""
    weights = shapes.parameters * DTYPES[dtype].itemsize
    return Demand(model=forward_operations(shapes, prompts * tokens, tokens), traffic=weights * tokens)
