"""Prompts that a chat model writes itself (METHOD: Magpie, Xu et al. 2024, arXiv:2406.08464).

Given its chat format up to where a user's message begins, a model that was trained on conversations writes a message of their kind. A list
of prompts ends, and another answer to the same prompt teaches little; these do not end. A model that writes none, as one that was trained on
answers alone, is asked those of the list again.
"""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fisherfold.inputs.conversations import in_chat_format
from fisherfold.inputs.pretrained import positions_of
from fisherfold.inputs.sampling import Writer, writer
from fisherfold.inputs.self_written import prompt_ids

LONGEST = 80  # tokens; a message that has no end by then is left out
TEMPERATURE = 0.8  # of 1, a small model's messages are often no sentences
SHORTEST = 4  # characters
PLACE = "HERE"
FILE = "prompts.json"


def write_prompts(folder: Path, model: Path, count: int, seed: int, dtype: str) -> None:
    """Unit: what comes of `count` messages as `FILE`, a list of strings without repetition; empty where the chat format does not show where one begins and ends."""
    own = writer(model, dtype)
    positions = positions_of(own.decoder.model.config)
    turn = user_turn(own.tokenizer)
    prompts: list[str] = []
    if turn and (positions is None or len(turn[0]) < positions):
        before, end = turn
        longest = LONGEST if positions is None else min(LONGEST, positions - len(before))
        written = own.write([before] * count, longest, [end], seed, TEMPERATURE)
        said = dict.fromkeys(message(own.tokenizer, ids, end) for ids in written)
        prompts = [text for text in said if text and answerable(own, text, positions)]
    (folder / FILE).write_text(json.dumps(prompts, ensure_ascii=False) + "\n", encoding="utf-8")


def user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int] | None:
    """The token ids before a user's message and the token behind it, of the chat format; None where it does not hold the message as it is."""
    text = in_chat_format(tokenizer, [{"role": "user", "content": PLACE}], PLACE, answer_follows=True)
    before, _, after = text.partition(PLACE)
    first, last = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after.lstrip()))
    return (first, last[0]) if first and last else None


def message(tokenizer: PreTrainedTokenizerBase, ids: list[int], end: int) -> str | None:
    """The text of a sampled message; None if it has no end, nearly no text, or other tokens of the format in it."""
    *said, last = ids
    text = str(tokenizer.decode(said)).strip()
    whole = last == end and not set(said) & set(tokenizer.all_special_ids)
    return text if whole and len(text) >= SHORTEST else None


def answerable(own: Writer, prompt: str, positions: int | None) -> bool:
    """Whether the model embeds the prompt's tokens in the chat format, and has positions for an answer behind them."""
    ids = prompt_ids(own.tokenizer, prompt)
    return max(ids) < own.decoder.vocabulary and (positions is None or len(ids) < positions)
