"""Text that the model writes on from a corpus."""

import numpy as np
import pytest

from fisherfold.inputs.continued_text import CONTINUED, beginning_of, go_on
from fisherfold.inputs.splits import split_of
from fisherfold.run.errors import InputError
from fisherfold.run.tables import read_table, write_sequences
from tests.support.tiny import VOCABULARY, save_tiny

TEXT = np.arange(3, 19).reshape(2, 8)


@pytest.fixture
def model(tmp_path):
    return save_tiny(tmp_path / "model")


def written(folder, model, *, low=0, count=6, start=1, seed=0):
    write_sequences(folder / "windows.parquet", TEXT, [["a"], ["b"]], VOCABULARY)
    go_on(folder, model, folder / "windows.parquet", low, count, start, seed, "float32")
    return split_of([read_table(folder / "sequences.parquet")], TEXT.shape[1])


def pieces(row):
    """All runs of four tokens."""
    return {tuple(row[i : i + 4]) for i in range(len(row) - 3)}


def test_a_sequence_begins_with_text_of_a_window_and_special_tokens_are_nowhere_else(tmp_path, model):
    split = written(tmp_path, model)
    assert split.input_ids.shape == (6, 8) and set(split.sources) == {CONTINUED}
    assert split.articles == [["a"], ["b"]] * 3
    assert set(split.input_ids[:, 0]) == {1} and (split.input_ids[:, 1:] > 2).all()
    for row, window in zip(split.input_ids.tolist(), TEXT.tolist() * 3, strict=True):
        assert tuple(row[1:5]) in pieces(window)
    assert tuple(written(tmp_path, model, start=None).input_ids[0, :4]) in pieces(TEXT[0].tolist())


def test_same_seed_same_text_another_seed_another(tmp_path, model):
    first, again, other = (written(tmp_path, model, seed=seed).input_ids for seed in (3, 3, 4))
    assert (first == again).all() and (first != other).any()


def test_where_a_window_has_no_text_the_next_one_has():
    rows = [{"input_ids": [1, 2] * 4}, {"input_ids": list(range(3, 11))}]
    beginning, row = beginning_of(rows, 0, range(3, 20), seed=0)
    assert row is rows[1] and len(beginning) == 4
    with pytest.raises(InputError, match=r"prepare.continued"):
        beginning_of(rows[:1], 0, range(3, 20), seed=0)
