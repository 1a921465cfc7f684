"""Text that the dense model writes itself: answers to prompts, in its chat format.

A chat model is used on what it would itself say, in a format that no corpus has; calibrated on a corpus alone, it forgets to
answer (docs/figures.md). So it answers a list of prompts and then its own (`own_prompts`), sampled at temperature 1, and a share of the
calibration sequences is made of these conversations. Prompts are split before anything is written: those of evaluation are in neither calibration nor tuning.

A batch of prompts is a unit: its bits depend on the seed, its number and its prompts.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from math import ceil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fisherfold.inputs.conversations import encode_messages
from fisherfold.inputs.embedded import require_embedded
from fisherfold.inputs.pretrained import positions_of
from fisherfold.inputs.sampling import BATCH, writer
from fisherfold.inputs.splits import Split, as_split
from fisherfold.inputs.windows import pack
from fisherfold.run.errors import InputError
from fisherfold.run.tables import ANSWERS

SELF = "self-written"
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


def write_answers(folder: Path, model: Path, prompts: tuple[str, ...], seed: int, longest: int, dtype: str) -> None:
    """Unit: one sampled answer to each prompt, of at most `longest` tokens, as ``answers.parquet`` (see `tables.ANSWERS`).

    Raises:
        InputError: a prompt leaves no place for an answer, or holds a token that the model does not embed.
    """
    own = writer(model, dtype)
    asked = [prompt_ids(own.tokenizer, prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, asked, strict=True):
        require_embedded(ids, own.decoder.vocabulary, own.tokenizer, f"Prompt {prompt!r:.80} in the chat format")
    longest = _longest(own.decoder.model, prompts, asked, longest)
    end = own.tokenizer.eos_token_id
    sampled = own.write(asked, longest, [] if end is None else [end], seed)
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


class Turns:
    """Prompts in numbered batches: those of a list, then those of further rounds; for a round that has none, the list again.

    Args:
        prompts: the list.
        further: the prompts of a round by its number.
        taken: prompts that are not to come from a round; all that do join it.
        rounds: how often the list may come.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        further: Callable[[int], Sequence[str]],
        taken: set[str],
        rounds: int = MOST_ROUNDS,
    ) -> None:
        self._prompts, self._further, self._taken, self._rounds = prompts, further, taken, rounds
        self._turns = self._all()
        self._numbers = count()

    def _all(self) -> Iterator[str]:
        yield from self._prompts
        listed = 1
        for number in count():
            new = [prompt for prompt in self._further(number) if prompt not in self._taken]
            listed += not new
            if listed > self._rounds:
                return
            self._taken.update(new)
            yield from new or self._prompts

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
