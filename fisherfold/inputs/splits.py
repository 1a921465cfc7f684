"""Documents into disjoint splits of token sequences.

The corpus is put into one seeded order. Evaluation takes documents from its front until its sequences are full, tuning goes on
behind it, calibration last; so asking for more calibration moves nothing else. A document goes to one split whole, and gives
one window (`windows`). Where a corpus has too few documents for that, they are shared out over the splits, and give further windows.

Legend: S sequences, T tokens a sequence.
"""

import hashlib
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fisherfold.inputs.conversations import Message, encode_messages
from fisherfold.inputs.corpora import Article
from fisherfold.inputs.windows import Encode, consecutive, pack, rounds, windows
from fisherfold.run.errors import InputError
from fisherfold.run.progress import track

SHUFFLE_ARTICLES = 16384
SHUFFLE_CHARACTERS = 2**28  # bounds the memory of the shuffle, and of what is kept for further windows
LESS = (0.75, 0.5, 0.25, 0.0)
"""Shares of the text for training that corpora are asked for in turn where they are too small for all of it."""


class CorpusTooSmall(InputError):
    """It does not hold as many sequences as are asked of it."""


@dataclass(frozen=True)
class Split:
    """Sequences [S, T] of one split, the documents that each draws from, and the corpus it is of."""

    input_ids: NDArray[np.int32]
    articles: list[list[str]]
    sources: list[str]

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def article_names(self) -> set[str]:
        """The documents that the split draws from."""
        return {name for names in self.articles for name in names}


@dataclass
class Tally:
    """What was read of a corpus so far."""

    documents: int = 0
    tokens: int = 0
    reserved: int = 0
    repeated: int = 0


@dataclass
class Drawing:
    """One corpus on its way into splits.

    Attributes:
        encode: text to token ids.
        converse: messages, and the name of their conversation, to token ids.
        length: T.
        start: the token that every sequence begins with, or None.
        seed: of the order and of the windows.
        reserved: names of documents that only the first split may use.
    """

    encode: Encode
    converse: Callable[[tuple[Message, ...], str], list[int]]
    length: int
    start: int | None
    seed: int
    reserved: Collection[str]
    tally: Tally = field(default_factory=Tally)

    def pieces(self, article: Article) -> list[list[int]]:
        """The windows of a document; those of a conversation in their order, for it is used from its beginning."""
        tokens = self.converse(article.messages, article.name) if article.messages else self.encode(article.text)
        self.tally.documents += 1
        self.tally.tokens += len(tokens)
        if article.messages:
            return consecutive(tokens, self.length)
        return windows(tokens, self.length, article.name, self.seed)

    def pack(self, pieces: Iterable[tuple[str, list[int]]], size: int) -> list[tuple[list[int], list[str]]]:
        """At most `size` sequences of pieces."""
        return list(islice(pack(pieces, self.length, self.start), size))


def draw_splits(
    articles: Iterable[Article],
    tokenizer: PreTrainedTokenizerBase,
    sizes: Mapping[str, int],
    length: int,
    seed: int,
    reserved: Collection[str],
    source: str = "corpus",
    seen: set[bytes] | None = None,
) -> dict[str, Split]:
    """Fill the splits named in `sizes` one after the other with sequences of `length` tokens.

    Args:
        articles: the corpus.
        tokenizer: the model's.
        sizes: sequences per split, in the order of drawing.
        length: T.
        seed: of the corpus's order and of the windows.
        reserved: names of documents that only the first split may use.
        source: the corpus's name.
        seen: digests of the texts of other corpora, which this one's join: a text in two corpora is used once.

    Raises:
        CorpusTooSmall: the message says which limit it was.
    """
    converse = partial(encode_messages, tokenizer)
    drawing = Drawing(encoder(tokenizer), converse, length, start_token(tokenizer), seed, reserved)
    read = Remembered(distinct(shuffled(articles, seed), drawing.tally, set() if seen is None else seen))
    rows = _one_window_each(read, sizes, drawing)
    if any(len(rows[name]) < size for name, size in sizes.items()):
        documents = read.kept
        if documents is None:  # so large that sharing it out could not help
            raise _too_small(source, rows, sizes, drawing)
        drawing.tally.documents = drawing.tally.tokens = drawing.tally.reserved = 0
        rows = _shared_out(documents, sizes, drawing)
    if any(len(rows[name]) < size for name, size in sizes.items()):
        raise _too_small(source, rows, sizes, drawing)
    return {name: as_split(rows[name], length, source) for name in sizes}


def as_split(rows: Sequence[tuple[list[int], list[str]]], length: int, source: str) -> Split:
    """Sequences and their documents as a split of one source."""
    ids = np.array([ids for ids, _ in rows], dtype=np.int32).reshape(len(rows), length)
    return Split(ids, [names for _, names in rows], [source] * len(rows))


def split_of(tables: Sequence[pa.Table], length: int) -> Split:
    """The sequences of some tables, one after the other."""
    rows = [row for table in tables for row in table.to_pylist()]
    split = as_split([(row["input_ids"], row["articles"]) for row in rows], length, "")
    return replace(split, sources=[row["source"] for row in rows])


def as_much_as_there_is(
    draw: Callable[[dict[str, int]], list[dict[str, Split]]], wanted: dict[str, int]
) -> list[dict[str, Split]]:
    """What `draw` gives of the sizes `wanted`; where corpora are too small for that, with the largest of `LESS` shares of training that they hold,
    if there is calibration of them that the rest can go on from.

    Raises:
        CorpusTooSmall: they are too small without training, too; says so of all that was wanted.
    """
    errors = []
    for share in (1.0, *LESS) if wanted.get("training") and wanted["calibration"] else (1.0,):
        try:
            return draw({name: int(share * size) if name == "training" else size for name, size in wanted.items()})
        except CorpusTooSmall as error:
            errors.append(error)
    raise errors[0]


def portions(shares: Sequence[float], size: int) -> list[int]:
    """`size` shared out by weight, by largest remainder; the first of equals gets more."""
    exact = [size * share / sum(shares) for share in shares]
    whole = [int(part) for part in exact]
    for i in sorted(range(len(shares)), key=lambda i: whole[i] - exact[i])[: size - sum(whole)]:
        whole[i] += 1
    return whole


def interleave(splits: Sequence[Split]) -> Split:
    """Several sources' sequences as one split, each source spread evenly over it, so that every stretch has them all."""
    places = [
        ((i + 0.5) / len(split), k, i) for k, split in enumerate(splits) for i in range(len(split.articles))
    ]
    if not places:
        return splits[0]
    order = [(k, i) for _, k, i in sorted(places)]
    return Split(
        np.stack([splits[k].input_ids[i] for k, i in order]),
        [splits[k].articles[i] for k, i in order],
        [splits[k].sources[i] for k, i in order],
    )


def _one_window_each(
    stream: Iterable[Article], sizes: Mapping[str, int], drawing: Drawing
) -> dict[str, list[tuple[list[int], list[str]]]]:
    """Sequences of each split, of documents that give one window each, until the corpus ends."""
    documents = iter(stream)
    rows = {}
    for number, (name, size) in enumerate(sizes.items()):
        usable = unreserved(documents, drawing.reserved, drawing.tally) if number else documents
        pieces = ((article.name, drawing.pieces(article)[0]) for article in usable)
        packed = islice(pack(pieces, drawing.length, drawing.start), size)
        rows[name] = list(track("prepare", f"tokenising {name}", packed, size)) if size else []
    return rows


def _shared_out(
    documents: Iterable[Article], sizes: Mapping[str, int], drawing: Drawing
) -> dict[str, list[tuple[list[int], list[str]]]]:
    """The same of few documents: each goes to the split that lacks most, and gives all its windows, in rounds."""
    first = next(iter(sizes))
    held: dict[str, list[tuple[str, list[list[int]]]]] = {name: [] for name in sizes}
    have = dict.fromkeys(sizes, 0)
    for article in documents:
        lacking = {name: 1 - have[name] / (size * drawing.length) for name, size in sizes.items() if size}
        if article.name in drawing.reserved:
            drawing.tally.reserved += 1
            lacking = {name: share for name, share in lacking.items() if name == first}
        if not lacking:
            continue
        name = max(lacking, key=lambda one: (lacking[one], have[one] == 0))
        pieces = drawing.pieces(article)
        held[name].append((article.name, pieces))
        have[name] += sum(map(len, pieces))
    return {name: drawing.pack(rounds(held[name]), size) for name, size in sizes.items()}


class Remembered:
    """Documents that pass through are kept, as long as they are few enough to be held."""

    def __init__(self, documents: Iterable[Article]) -> None:
        self._documents = iter(documents)
        self.kept: list[Article] | None = []
        self._characters = 0

    def __iter__(self) -> Iterator[Article]:
        for document in self._documents:
            self._characters += len(document.text)
            if self._characters > SHUFFLE_CHARACTERS:
                self.kept = None
            if self.kept is not None:
                self.kept.append(document)
            yield document


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


def distinct(articles: Iterable[Article], tally: Tally, texts: set[bytes]) -> Iterator[Article]:
    """Pass over an article whose name or text came before: it would carry one split's text into another.

    Args:
        texts: digests of texts that came before; those of `articles` are added.
    """
    names: set[str] = set()
    for article in articles:
        text = hashlib.blake2b(article.text.encode("utf-8", "replace"), digest_size=16).digest()
        if article.name in names or text in texts:
            tally.repeated += 1
        else:
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


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
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


def _too_small(
    source: str, rows: Mapping[str, Sequence[object]], sizes: Mapping[str, int], drawing: Drawing
) -> CorpusTooSmall:
    tally, length = drawing.tally, drawing.length
    filled, asked = sum(map(len, rows.values())), sum(sizes.values())
    parts = " + ".join(f"{size} {name}" for name, size in sizes.items())
    aside = f", {tally.reserved} more set aside for the questions" if tally.reserved else ""
    repeated = f", {tally.repeated} passed over because their title or text came before" if tally.repeated else ""
    empty = [name for name, size in sizes.items() if size and not rows[name]]
    if not tally.documents + tally.reserved:
        cure = "It holds no text: is it the file, and the field, that was meant?"
    elif len(sizes) > tally.documents and empty:
        cure = (
            f"No document may be in two splits, so {len(sizes)} splits need at least as many. Separate its documents: by blank lines in a "
            "text file, as records in the others."
        )
    else:
        cure = "Ask for fewer or shorter sequences in block prepare, give a larger corpus, or let the model write more of them itself (prepare.free_text: 0.75)."
    return CorpusTooSmall(
        f"The corpus {source!r} is too small: its {tally.documents} articles hold {tally.tokens} tokens{aside}{repeated}, and fill "
        f"{filled} sequences of {length} tokens; asked are {parts} = {asked} ({asked * length} tokens). {cure}"
    )
