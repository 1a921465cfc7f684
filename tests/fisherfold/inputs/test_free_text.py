"""Text that the model writes after nothing but a token drawn at random."""

import pytest

from fisherfold.inputs.free_text import FREE, ordinary_tokens, write_freely
from fisherfold.inputs.splits import split_of
from fisherfold.network.models import StaysLoaded
from fisherfold.run.tables import read_table
from tests.support.tiny import VOCABULARY, save_tiny, tiny_tokenizer


@pytest.fixture
def model(tmp_path):
    return save_tiny(tmp_path / "model")


def written(folder, model, *, count=5, length=8, start=1, seed=0):
    write_freely(folder, model, count, length, start, seed, "float32")
    return split_of([read_table(folder / "sequences.parquet")], length)


def test_a_sequence_is_the_start_token_a_random_one_and_what_the_model_goes_on_with(tmp_path, model):
    split = written(tmp_path, model)
    assert split.input_ids.shape == (5, 8) and set(split.sources) == {FREE}
    assert set(split.input_ids[:, 0]) == {1} and len(set(split.input_ids[:, 1])) > 1
    assert (split.input_ids[:, 1:] > 2).all()
    assert len({tuple(row) for row in split.input_ids.tolist()}) == 5
    assert (written(tmp_path, model, start=None).input_ids > 2).all()


def test_without_a_cache_no_special_token_is_drawn_either(tmp_path, model, monkeypatch):
    monkeypatch.setattr("fisherfold.network.generation.Decoder.caches", False)
    StaysLoaded.cache_clear()
    assert (written(tmp_path, model, count=32).input_ids[:, 1:] > 2).all()


def test_same_seed_same_text_another_seed_another(tmp_path, model):
    first, again, other = (written(tmp_path, model, seed=seed) for seed in (3, 3, 4))
    assert (first.input_ids == again.input_ids).all() and (first.input_ids != other.input_ids).any()
    assert not {a for names in first.articles for a in names} & {a for names in other.articles for a in names}


@pytest.mark.parametrize("length", [1, 2])
def test_sequences_shorter_than_what_they_begin_with(tmp_path, model, length):
    assert written(tmp_path, model, length=length).input_ids.shape == (5, length)


def test_no_special_token_begins_a_text_and_none_that_the_model_does_not_embed():
    tokenizer = tiny_tokenizer()
    assert ordinary_tokens(tokenizer, VOCABULARY) == list(range(3, VOCABULARY))
    assert ordinary_tokens(tokenizer, 9) == list(range(3, 9))
