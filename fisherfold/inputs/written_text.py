"""Text that the model writes itself for the splits of stage `prepare`: conversations, if it is a chat model, free text, and text that goes on from the corpus's.

Units are batches: of answers, of prompts, of texts. What a split gets depends on the parameters alone, and no prompt is in two of them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fisherfold.inputs.continued_text import go_on
from fisherfold.inputs.conversations import has_chat_format
from fisherfold.inputs.free_text import FILE as TEXTS_FILE
from fisherfold.inputs.free_text import write_freely
from fisherfold.inputs.own_prompts import FILE as PROMPTS_FILE
from fisherfold.inputs.own_prompts import write_prompts
from fisherfold.inputs.sampling import BATCH, writing_dtype
from fisherfold.inputs.self_written import (
    Turns,
    batch_size,
    conversation_split,
    conversations,
    split_prompts,
    write_answers,
)
from fisherfold.inputs.shares import own_text
from fisherfold.inputs.splits import Split, split_of, start_token
from fisherfold.run.determinism import named_seed
from fisherfold.run.params import PrepareParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.tables import read_table

Files = Mapping[str, Sequence[Path]]
"""By split."""


@dataclass(frozen=True)
class WrittenText:
    """Files of answers to prompts, those that are held out for evaluation among them, of free text, and of text that goes on from the corpus's."""

    answers: Files
    free: Files
    continued: Files = field(default_factory=dict)

    def to_continue(self, params: PrepareParams) -> int:
        """Sequences for training that are still to go on from text of the corpus."""
        if self.continued:
            return 0
        own = own_text(params, talks=bool(self.answers)).get("training")
        return own.continued if own else 0

    def splits(self, tokenizer: PreTrainedTokenizerBase, params: PrepareParams) -> dict[str, list[Split]]:
        """What there is for each split."""
        found: dict[str, list[Split]] = {}
        for name, own in own_text(params, talks=True).items():
            if self.answers.get(name) and own.conversations:
                tables = [read_table(file) for file in self.answers[name]]
                found[name] = [
                    conversation_split(tables, own.conversations, params.sequence_length, start_token(tokenizer))
                ]
        for name, files in (*self.free.items(), *self.continued.items()):
            if files:
                found.setdefault(name, []).append(split_of([read_table(file) for file in files], params.sequence_length))
        return found


def write_own_text(
    scratch: Scratch, model: Path, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], params: PrepareParams
) -> WrittenText:
    """Let the model write until every split has its shares; without a chat format, or prompts, free text alone."""
    talks = bool(prompts) and has_chat_format(tokenizer)
    answers = _conversations(scratch, model, prompts, params) if talks else {}
    start = start_token(tokenizer)
    free = {
        name: _free_text(scratch, model, name, own.free, start, params) for name, own in own_text(params, talks).items()
    }
    return WrittenText(answers, free)


def _conversations(scratch: Scratch, model: Path, prompts: Sequence[str], params: PrepareParams) -> Files:
    """Let a chat model answer prompts until every split has its share; files of answers by split."""
    split = split_prompts(prompts, params.held_out_prompts, params.seed)
    taken = set(prompts)

    def turns(name: str, prompts: Sequence[str]) -> Turns:
        return Turns(prompts, lambda number: _own_prompts(scratch, model, name, number, params), taken)

    held_out = Turns(split.evaluation, lambda number: (), taken, rounds=1)
    batches = iter(lambda: held_out.take(BATCH), None)
    found = {"evaluation": tuple(_answer(scratch, model, "evaluation", batches, params))}
    calibration = turns("calibration", split.calibration)  # training goes on behind it: other answers
    asked = {"tuning": turns("tuning", split.tuning), "calibration": calibration, "training": calibration}
    for name, own in own_text(params, talks=True).items():
        tokens = own.conversations * params.sequence_length
        found[name] = tuple(_answer_until(scratch, model, name, asked[name], tokens, params))
    return found


def _own_prompts(scratch: Scratch, model: Path, name: str, number: int, params: PrepareParams) -> list[str]:
    """A round of prompts that the model writes itself."""
    seed = named_seed(params.seed, f"prompts {name} {number}")
    unit = {f"prompts-{name}-{number:04d}": (model, BATCH, seed, writing_dtype(params))}
    (folder,) = scratch.map(f"prompts for {name}", write_prompts, unit).values()
    return json.loads((folder / PROMPTS_FILE).read_text(encoding="utf-8"))


def _free_text(
    scratch: Scratch, model: Path, name: str, size: int, start: int | None, params: PrepareParams
) -> tuple[Path, ...]:
    """Files of the free text of a split."""

    def arguments(low: int, count: int) -> tuple:
        return model, count, params.sequence_length, start

    return _texts(scratch, f"free text for {name}", f"free {name}", write_freely, arguments, size, params)


def continue_text(
    scratch: Scratch, model: Path, windows: Path, size: int, start: int | None, params: PrepareParams
) -> Files:
    """Let the model go on from the text of `windows` until training has `size` sequences of it."""

    def arguments(low: int, count: int) -> tuple:
        return model, windows, low, count, start

    doing = "text that goes on from the corpus"
    return {"training": _texts(scratch, doing, "continued", go_on, arguments, size, params)}


def _texts(
    scratch: Scratch,
    doing: str,
    kind: str,
    write: Callable[..., None],
    arguments: Callable[[int, int], tuple],
    size: int,
    params: PrepareParams,
) -> tuple[Path, ...]:
    """Files of `size` texts, a batch each.

    Args:
        kind: names the units and their seeds.
        write: is given `arguments` of a batch's first text and its count, its seed and the dtype.
    """
    units = {
        f"{kind.replace(' ', '-')}-{low // BATCH:04d}": (
            *arguments(low, min(BATCH, size - low)),
            named_seed(params.seed, f"{kind} {low}"),
            writing_dtype(params),
        )
        for low in range(0, size, BATCH)
    }
    folders = scratch.map(doing, write, units) if units else {}
    return tuple(folders[unit] / TEXTS_FILE for unit in units)


def _answer_until(
    scratch: Scratch,
    model: Path,
    name: str,
    turns: Turns,
    tokens: int,
    params: PrepareParams,
) -> Iterator[Path]:
    """Answers to the next prompts until they hold `tokens`."""
    held = answered = 0
    while held < tokens:
        batch = turns.take(batch_size(tokens - held, answered, held, params.answer_tokens))
        if batch is None:
            return
        (file,) = _answer(scratch, model, name, [batch], params, f", {held} of {tokens} tokens written")
        yield file
        held += sum(len(ids) for _, ids in conversations([read_table(file)]))
        answered += len(batch[1])
        if not held and answered >= BATCH:  # the model answers nothing
            return


def _answer(
    scratch: Scratch,
    model: Path,
    name: str,
    batches: Iterable[tuple[int, tuple[str, ...]]],
    params: PrepareParams,
    so_far: str = "",
) -> list[Path]:
    """The files of answers to numbered batches of prompts, a unit each."""
    settings = params.answer_tokens, writing_dtype(params)
    units = {
        f"answers-{name}-{number:04d}": (model, batch, params.seed * 10_007 + number, *settings)
        for number, batch in batches
    }
    folders = scratch.map(f"answers for {name}{so_far}", write_answers, units)
    return [folders[unit] / "answers.parquet" for unit in units]
