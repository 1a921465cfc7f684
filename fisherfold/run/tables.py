"""The prepared Parquet tables: tokenised sequences and knowledge questions.

Sequences: `sequence` int32, `input_ids` list of int32 (all rows of one length), `articles` list of string (the documents that it draws
from), `source` string (the corpus that they are of).
Questions: `question` string (the text before the answer), `choices` list of string, `answer` int32, `article` string.
The vocabulary size of the tokenizer is in the schema's metadata.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fisherfold.run.errors import CorruptArtifact, InputError

SEQUENCES = pa.schema(
    [
        ("sequence", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
        ("articles", pa.list_(pa.string())),
        ("source", pa.string()),
    ]
)
QUESTIONS = pa.schema(
    [("question", pa.string()), ("choices", pa.list_(pa.string())), ("answer", pa.int32()), ("article", pa.string())]
)
ANSWERS = pa.schema(
    [("prompt", pa.string()), ("prompt_ids", pa.list_(pa.int32())), ("sampled_ids", pa.list_(pa.int32()))]
)
"""The dense model's sampled answers to prompts; ids of a prompt are those of its chat format."""


def write_sequences(
    path: Path, input_ids: np.ndarray, articles: list[list[str]], vocabulary: int, sources: list[str] | None = None
) -> None:
    """Write token ids [S, T] with the documents that each sequence draws from, and the corpora that these are of."""
    rows = {
        "sequence": list(range(len(input_ids))),
        "input_ids": list(input_ids.astype(np.int32)),
        "articles": articles,
        "source": sources or ["corpus"] * len(input_ids),
    }
    write_table(path, pa.table(rows, schema=SEQUENCES), vocabulary)


def write_table(path: Path, table: pa.Table, vocabulary: int) -> None:
    """Write a table, its tokenizer's vocabulary size in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"vocabulary": str(vocabulary)}), path)


def read_table(path: Path) -> pa.Table:
    """Read a prepared table.

    Raises:
        CorruptArtifact: it is missing or not readable.
    """
    try:
        return pq.read_table(path)
    except (FileNotFoundError, pa.ArrowInvalid, OSError) as error:
        raise CorruptArtifact(
            f"{path}: {error}. Write it again with `dvc repro --force --single-item prepare`."
        ) from None


def in_batches(numbers: list[int], size: int) -> list[list[int]]:
    """Numbers of sequences, `size` at a time, fewer at the end."""
    return [numbers[low : low + size] for low in range(0, len(numbers), size)]


def read_sequences(path: Path, vocabulary: int) -> torch.Tensor:
    """Token ids [S, T], int64, checked against the model's vocabulary size; [0, 0] of an empty table.

    Raises:
        InputError: the table was made with a larger vocabulary than the model's, or holds ids beyond it.
    """
    table = read_table(path)
    made_for = int(table.schema.metadata[b"vocabulary"])
    if not table.num_rows:
        return torch.empty(0, 0, dtype=torch.long)
    ids = torch.from_numpy(np.stack(table["input_ids"].to_numpy(zero_copy_only=False))).long()
    if made_for > vocabulary or int(ids.max()) >= vocabulary:
        raise InputError(
            f"{path} was tokenised with a vocabulary of {made_for} (largest id {int(ids.max())}), but the model has {vocabulary} "
            "embeddings. Run stage 'prepare' again with this model and its own tokenizer."
        )
    return ids
