"""Text that the model writes on from a corpus: more text of the kind of one that is small.

A sequence begins with `BEGUN` tokens from anywhere in a window of the calibration's, and the model goes on. So it holds nothing of the documents that
evaluation and tuning are drawn from, and is as disjoint from them as the calibration is. Special tokens are neither begun with nor drawn.
"""

import random
from collections.abc import Collection, Sequence
from pathlib import Path

from fisherfold.inputs.free_text import ordinary_tokens, write_on
from fisherfold.inputs.sampling import writer
from fisherfold.run.errors import InputError
from fisherfold.run.tables import read_table

CONTINUED = "continued text"
BEGUN = 48  # tokens, of at most half a sequence
TRIES = 64  # places in windows


def go_on(
    folder: Path, model: Path, windows: Path, low: int, count: int, start: int | None, seed: int, dtype: str
) -> None:
    """Unit: sequences `low` to `low + count` as `free_text.FILE`, as long as those of the table `windows`, which they go round.

    Args:
        start: the token that every sequence begins with, or None.

    Raises:
        InputError: there is no text in the windows.
    """
    rows = read_table(windows).to_pylist()
    own = writer(model, dtype)
    ordinary = set(ordinary_tokens(own.tokenizer, own.decoder.vocabulary))
    begun, names = [], []
    for number in range(low, low + count):
        beginning, row = beginning_of(rows, number, ordinary, seed)
        begun.append(([] if start is None else [start]) + beginning)
        names.append(row["articles"])
    write_on(folder, own, ordinary, begun, names, len(rows[0]["input_ids"]), CONTINUED, seed)


def beginning_of(rows: Sequence[dict], number: int, ordinary: Collection[int], seed: int) -> tuple[list[int], dict]:
    """Tokens of a text, all of them `ordinary`, and the row that they are of: that of this number, or where it has none such the next."""
    places = random.Random(f"{seed} {number}")
    for attempt in range(TRIES):
        row = rows[(number + attempt) % len(rows)]
        size = min(BEGUN, len(row["input_ids"]) // 2)
        low = places.randint(0, len(row["input_ids"]) - size)
        beginning = row["input_ids"][low : low + size]
        if all(token in ordinary for token in beginning):
            return beginning, row
    raise InputError(
        f"prepare.continued: of {TRIES} places in the calibration's windows none has {size} tokens of text without special ones, as conversations have "
        "them. Give text, or set prepare.continued: 0."
    )
