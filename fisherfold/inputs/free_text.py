"""Text that the model writes after nothing but a token drawn at random (METHOD: LLM-QAT, Liu et al. 2023, arXiv:2305.17888).

It has many of the kinds of text that the model was trained on, where a corpus has one. Any model writes it, with a chat template or without. Special
tokens are never drawn: this is text, and conversations have a share of their own.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fisherfold.inputs.sampling import Writer, writer
from fisherfold.run.determinism import seeded_generator
from fisherfold.run.tables import write_sequences

FREE = "free text"
FILE = "sequences.parquet"


def write_freely(folder: Path, model: Path, count: int, length: int, start: int | None, seed: int, dtype: str) -> None:
    """Unit: `count` sequences of `length` tokens as `FILE`.

    Args:
        start: the token that every sequence begins with, or None.
    """
    own = writer(model, dtype)
    ordinary = ordinary_tokens(own.tokenizer, own.decoder.vocabulary)
    drawn = torch.randint(len(ordinary), (count,), generator=seeded_generator(seed, FREE)).tolist()
    begun = [([] if start is None else [start]) + [ordinary[number]] for number in drawn]
    names = [[f"{FREE} {seed:x} {number}"] for number in range(count)]
    write_on(folder, own, ordinary, begun, names, length, FREE, seed)


def write_on(
    folder: Path,
    own: Writer,
    ordinary: Collection[int],
    begun: Sequence[list[int]],
    names: list[list[str]],
    length: int,
    source: str,
    seed: int,
) -> None:
    """Let the model go on after beginnings of one size to `length` tokens, none of them but `ordinary`; write the sequences as `FILE`.

    Args:
        names: of the documents that each is of.
        source: what they are called.
    """
    more = length - len(begun[0])
    never = sorted(set(range(own.decoder.vocabulary)).difference(ordinary))
    written = own.write(begun, more, [], seed, never=never) if more > 0 else [[] for _ in begun]
    ids = np.array([(first + rest)[:length] for first, rest in zip(begun, written, strict=True)])
    write_sequences(folder / FILE, ids, names, own.decoder.vocabulary, [source] * len(begun))


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase, embeddings: int) -> list[int]:
    """The tokens that text is made of: all that the model embeds but special and added ones."""
    others = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    return sorted(index for index in tokenizer.get_vocab().values() if index < embeddings and index not in others)
