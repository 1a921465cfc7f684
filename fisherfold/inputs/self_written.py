"""Text that the dense model writes itself: answers to prompts, in its chat format.

A chat model is used on what it would itself say, in a format that no corpus has; calibrated on a corpus alone, it forgets to
answer (docs/figures.md). So it answers a list of prompts, sampled at temperature 1, and a share of the calibration sequences is
made of these conversations. Prompts are split before anything is written: those of evaluation are in neither calibration nor tuning.

A batch of prompts is a unit: its bits depend on the seed, its number and its prompts.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice, repeat
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fisherfold.inputs.conversations import encode_messages
from fisherfold.inputs.embedded import require_embedded
from fisherfold.inputs.pretrained import positions_of
from fisherfold.inputs.splits import Split, as_split
from fisherfold.inputs.windows import pack
from fisherfold.network.generation import GreedyDecoder, decode_plainly, left_padded, until_end
from fisherfold.network.models import DTYPES, StaysLoaded, load_model
from fisherfold.run.errors import InputError
from fisherfold.run.tables import ANSWERS

SELF = "self-written"
BATCH = 64  # prompts answered together, at most: 64 are a quarter faster than 32 on two cores, twice the cache of their tokens
TUNING = 8  # every so many-th prompt is tuning's
MOST_ROUNDS = 64  # samples of one prompt
SPARE = 1.1


@dataclass(frozen=True)
class Prompts:
    """Prompts of the three uses; none is in two of them."""

    calibration: tuple[str, ...]
    tuning: tuple[str, ...]
    evaluation: tuple[str, ...]


def split_prompts(prompts: Sequence[str], held_out: int, seed: int) -> Prompts:
    """A seeded order of the distinct prompts: `held_out` for evaluation, of the others every eighth for tuning.

    Raises:
        InputError: there are too few.
    """
    order = list(dict.fromkeys(prompts))
    random.Random(seed).shuffle(order)
    rest = order[held_out:]
    if len(rest) < 2:
        raise InputError(
            f"prepare.prompts holds {len(order)} different prompts, and prepare.held_out_prompts = {held_out} are for evaluation: at least "
            "two more are needed for calibration and tuning. Give more prompts, or hold out fewer."
        )
    tuning = rest[::TUNING]
    return Prompts(tuple(p for p in rest if p not in set(tuning)), tuple(tuning), tuple(order[:held_out]))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of one message of a user in the chat format, up to where the answer begins."""
    return encode_messages(tokenizer, [{"role": "user", "content": prompt}], prompt, answer_follows=True)


@StaysLoaded
def writer(model: Path, dtype: str) -> tuple[PreTrainedTokenizerBase, GreedyDecoder]:
    """The tokenizer and the model that write, loaded once for all units of a process; the decoder knows whether a cache serves."""
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    return tokenizer, GreedyDecoder(load_model(model, DTYPES[dtype]), ends=[])


def write_answers(folder: Path, model: Path, prompts: tuple[str, ...], seed: int, longest: int, dtype: str) -> None:
    """Unit: one sampled answer to each prompt, of at most `longest` tokens, as ``answers.parquet`` (see `tables.ANSWERS`).

    Raises:
        InputError: a prompt leaves no place for an answer, or holds a token that the model does not embed.
    """
    tokenizer, decoder = writer(model, dtype)
    asked = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, asked, strict=True):
        require_embedded(ids, decoder.vocabulary, tokenizer, f"Prompt {prompt!r:.80} in the chat format")
    longest = _longest(decoder.model, prompts, asked, longest)
    end = tokenizer.eos_token_id
    ends = [] if end is None else [end]
    sample = _sample_with_cache if decoder.caches else partial(decode_plainly, choose=_draw)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        written = sample(decoder.model, asked, longest, ends)
    sampled = [until_end(row, ends) for row in written]
    rows = {"prompt": list(prompts), "prompt_ids": asked, "sampled_ids": sampled}
    pq.write_table(pa.table(rows, schema=ANSWERS), folder / "answers.parquet")


def _longest(model: PreTrainedModel, prompts: Sequence[str], asked: Sequence[list[int]], longest: int) -> int:
    """`longest`, or what the model's positions leave for answers."""
    positions = positions_of(model.config)
    if positions is None:
        return longest
    prompt, ids = max(zip(prompts, asked, strict=True), key=lambda one: len(one[1]))
    if len(ids) >= positions:
        raise InputError(
            f"Prompt {prompt!r:.80} has {len(ids)} tokens in the chat format, and the model has {positions} positions. Take it out of "
            "prepare.prompts."
        )
    return min(longest, positions - len(ids))


def _sample_with_cache(
    model: PreTrainedModel, prompts: Sequence[list[int]], longest: int, ends: Sequence[int]
) -> list[list[int]]:
    """Sampled answers by `generate`."""
    ids, mask = left_padded(prompts, model.device)
    model.generation_config = GenerationConfig(  # the model's own would fill what is open: penalties, top-k
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=longest,
        eos_token_id=ends[0] if ends else None,
        pad_token_id=ends[0] if ends else 0,
    )
    generate: Any = model.generate
    return generate(ids, attention_mask=mask)[:, ids.shape[1] :].tolist()


def _draw(logits: torch.Tensor) -> torch.Tensor:
    """One token of each row's distribution [R]."""
    return torch.multinomial(logits.float().softmax(-1), 1).squeeze(-1)


class Turns:
    """Prompts asked over and over, in numbered batches: every round is another sample of each."""

    def __init__(self, prompts: Sequence[str], rounds: int) -> None:
        self._turns = chain.from_iterable(repeat(prompts, rounds))
        self._numbers = count()

    def take(self, size: int) -> tuple[int, tuple[str, ...]] | None:
        """The next `size` prompts and their batch's number; None after the last."""
        prompts = tuple(islice(self._turns, size))
        return (next(self._numbers), prompts) if prompts else None


def batch_size(missing: int, answered: int, held: int, longest: int) -> int:
    """Prompts to answer together where `missing` tokens are missing and `answered` prompts gave `held`.

    By their mean length and a tenth more, since one more batch takes as many steps for a few prompts; the first by `longest`.
    """
    return min(BATCH, ceil(SPARE * missing / max(1, held / answered) if answered else missing / longest))


def conversations(tables: Sequence[pa.Table]) -> list[tuple[str, list[int]]]:
    """Prompt and answer of every row as one text of tokens; empty answers are left out."""
    rows = [row for table in tables for row in table.to_pylist()]
    return [(row["prompt"], row["prompt_ids"] + row["sampled_ids"]) for row in rows if len(row["sampled_ids"]) > 1]


def conversation_split(tables: Sequence[pa.Table], size: int, length: int, start: int | None) -> Split:
    """At most `size` sequences of `length` tokens: conversations one after the other."""
    return as_split(list(islice(pack(conversations(tables), length, start), size)), length, SELF)
