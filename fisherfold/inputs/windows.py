"""Windows of documents, and sequences of windows.

One window a document before a second from any: what is drawn then represents the corpus, where consecutive pieces of one long
document represent that document alone (measured: docs/figures.md). A document gives disjoint windows of T tokens, at a random
phase and in a random order that depend on the seed and on its name only; one shorter than T gives itself, whole.

Legend: T tokens a sequence.
"""

import random
from collections.abc import Callable, Iterable, Iterator

Encode = Callable[[str], list[int]]
Sequence = tuple[list[int], list[str]]
"""T token ids, and the names of the documents that they come from."""


def windows(tokens: list[int], length: int, name: str, seed: int) -> list[list[int]]:
    """The windows of one document, in the order of their use; short of `length` if the document is."""
    if len(tokens) <= length:
        return [tokens]
    generator = random.Random(f"{seed} {name}")
    count = len(tokens) // length
    phase = generator.randint(0, len(tokens) - count * length)
    places = list(range(count))
    generator.shuffle(places)
    return [tokens[phase + place * length :][:length] for place in places]


def consecutive(tokens: list[int], length: int) -> list[list[int]]:
    """The windows of a document from its beginning on; short of `length` if the document is."""
    return [tokens[low : low + length] for low in range(0, len(tokens) - length + 1, length)] or [tokens]


def rounds(documents: Iterable[tuple[str, list[list[int]]]]) -> Iterator[tuple[str, list[int]]]:
    """The first window of every document, then the second of those that have one, and so on, with the document's name."""
    waiting = list(documents)
    depth = 0
    while waiting:
        yield from ((name, pieces[depth]) for name, pieces in waiting)
        depth += 1
        waiting = [(name, pieces) for name, pieces in waiting if len(pieces) > depth]


def pack(pieces: Iterable[tuple[str, list[int]]], length: int, start: int | None) -> Iterator[Sequence]:
    """Sequences of exactly `length` tokens: a whole window by itself, shorter pieces one after the other; a last short one is left out.

    A sequence that begins inside a document begins with the `start` token all the same, if there is one: models trained
    with it depend on it in the first position.
    """
    ids: list[int] = []
    names: list[str] = []
    for name, piece in pieces:
        if len(piece) == length:
            yield (piece if start in (None, piece[0]) else [start, *piece[:-1]]), [name]
            continue
        position = 0
        while position < len(piece):
            if not ids and start is not None and piece[position] != start:
                ids.append(start)
            end = position + length - len(ids)
            ids += piece[position:end]
            position = end
            names.append(name)
            if len(ids) == length:
                yield ids, names
                ids, names = [], []
