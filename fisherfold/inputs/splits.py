"""Articles into disjoint splits of packed token sequences.

The corpus is put into one seeded order. Evaluation takes articles from its front until its sequences are full, tuning
goes on behind it, calibration last; so asking for more calibration moves nothing else. An article goes to one split
whole: what is left of it when the split is full is not used.

Legend: S sequences, T tokens a sequence.
"""

import hashlib
import random
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from fisherfold.inputs.corpora import Article
from fisherfold.run.errors import InputError
from fisherfold.run.progress import track

SHUFFLE_ARTICLES = 16384
SHUFFLE_CHARACTERS = 2**28  # bounds the memory of the shuffle, whatever the length of an article


@dataclass(frozen=True)
class Split:
    """Sequences [S, T] of one split, and the names of the articles that each draws from."""

    input_ids: np.ndarray
    articles: list[list[str]]

    @property
    def article_names(self) -> set[str]:
        """The articles that the split draws from."""
        return {name for names in self.articles for name in names}


@dataclass
class Tally:
    """What was read of a corpus so far."""

    articles: int = 0
    tokens: int = 0
    reserved: int = 0


def draw_splits(
    articles: Iterable[Article],
    tokenizer: PreTrainedTokenizerBase,
    sizes: dict[str, int],
    length: int,
    seed: int,
    reserved: Collection[str],
) -> dict[str, Split]:
    """Fill the splits named in `sizes` one after the other with sequences of `length` tokens.

    Args:
        articles: the corpus.
        tokenizer: the model's.
        sizes: sequences per split, in the order of drawing.
        length: T.
        seed: of the corpus's order.
        reserved: names of articles that only the first split may use.

    Raises:
        InputError: the corpus is too small; the message says what it holds and what is asked.
    """
    stream, tally = distinct(shuffled(articles, seed)), Tally()
    splits: dict[str, Split] = {}
    for name, size in sizes.items():
        source = unreserved(stream, reserved, tally) if splits else stream
        packed = pack(source, encoder(tokenizer), length, start_token(tokenizer), tally)
        rows = list(track("prepare", f"tokenising {name}", islice(packed, size), size))
        splits[name] = Split(
            np.array([ids for ids, _ in rows], dtype=np.int32).reshape(len(rows), length), [names for _, names in rows]
        )
        if len(rows) < size:
            raise _too_small(splits, sizes, length, tally)
    return splits


def shuffled(articles: Iterable[Article], seed: int) -> Iterator[Article]:
    """The articles in a seeded order: a full shuffle, or one through a buffer if they are many."""
    generator = random.Random(seed)
    buffer: list[Article] = []
    held = 0
    for article in articles:
        if not buffer or (len(buffer) < SHUFFLE_ARTICLES and held < SHUFFLE_CHARACTERS):
            buffer.append(article)
            held += len(article.text)
            continue
        place = generator.randrange(len(buffer))
        held += len(article.text) - len(buffer[place].text)
        article, buffer[place] = buffer[place], article
        yield article
    generator.shuffle(buffer)
    yield from buffer


def distinct(articles: Iterable[Article]) -> Iterator[Article]:
    """Pass over an article whose name or text came before: it would carry one split's text into another."""
    names, texts = set(), set()
    for article in articles:
        text = hashlib.blake2b(article.text.encode(), digest_size=16).digest()
        if article.name not in names and text not in texts:
            yield article
        names.add(article.name)
        texts.add(text)


def unreserved(articles: Iterable[Article], reserved: Collection[str], tally: Tally) -> Iterator[Article]:
    """Pass over the articles whose names are in `reserved`, and count them."""
    for article in articles:
        if article.name in reserved:
            tally.reserved += 1
        else:
            yield article


def pack(
    articles: Iterable[Article], encode: Callable[[str], list[int]], length: int, start: int | None, tally: Tally
) -> Iterator[tuple[list[int], list[str]]]:
    """Sequences of exactly `length` tokens, articles one after the other; a last short one is left out.

    A sequence that begins inside an article begins with the `start` token all the same, if there is one: models trained
    with it depend on it in the first position.
    """
    ids: list[int] = []
    names: list[str] = []
    for article in articles:
        tokens = encode(article.text)
        tally.articles += 1
        tally.tokens += len(tokens)
        position = 0
        while position < len(tokens):
            if not ids and start is not None and tokens[position] != start:
                ids.append(start)
            end = position + length - len(ids)
            ids += tokens[position:end]
            position = end
            names.append(article.name)
            if len(ids) == length:
                yield ids, names
                ids, names = [], []


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Text to token ids: the start token if the tokenizer adds one, the text, the end token."""
    start = [] if start_token(tokenizer) is None else [start_token(tokenizer)]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(text: str) -> list[int]:
        return [*start, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *end]

    return encode


def start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The beginning-of-sequence token, if the tokenizer puts one before a text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None


def _too_small(splits: dict[str, Split], sizes: dict[str, int], length: int, tally: Tally) -> InputError:
    filled = sum(len(split.articles) for split in splits.values())
    asked = sum(sizes.values())
    parts = " + ".join(f"{size} {name}" for name, size in sizes.items())
    aside = f", {tally.reserved} more set aside for the questions" if tally.reserved else ""
    return InputError(
        f"The corpus is too small: its {tally.articles} articles hold {tally.tokens} tokens{aside}, and fill {filled} "
        f"sequences of {length} tokens; asked are {parts} = {asked} ({asked * length} tokens). Ask for fewer or "
        "shorter sequences in block prepare, or give a larger corpus."
    )
