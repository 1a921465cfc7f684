"""Splits share no article, ask for no more than they use, and stay where they are."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from fisherfold.inputs import splits
from fisherfold.inputs.corpora import Article
from fisherfold.inputs.splits import Tally, distinct, draw_splits, encoder, pack, shuffled
from fisherfold.run.errors import InputError

SIZES = {"evaluation": 2, "tuning": 1, "calibration": 3}
END = 2


def corpus(count=40, words=9):
    return [Article(f"A{i}", " ".join(f"w{3 + (i * 7 + j) % 90}" for j in range(words + i % 5))) for i in range(count)]


def starting_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 24), st.integers(0, 5), st.sets(st.integers(0, 39), max_size=8))
def test_splits_are_disjoint_and_exact(length, seed, reserved):
    """No article in two splits; none of the questions' articles in tuning or calibration; every token in its place."""
    names = {f"A{i}" for i in reserved}
    drawn = draw_splits(corpus(), tiny_tokenizer(), SIZES, length, seed, names)
    used = {name: split.article_names for name, split in drawn.items()}
    assert not used["evaluation"] & used["tuning"]
    assert not used["evaluation"] & used["calibration"]
    assert not used["tuning"] & used["calibration"]
    assert not (used["tuning"] | used["calibration"]) & names
    texts = {article.name: article.text for article in corpus()}
    for name, split in drawn.items():
        assert split.input_ids.shape == (SIZES[name], length)
        order = list(dict.fromkeys(title for titles in split.articles for title in titles))
        whole = [token for title in order for token in encoder(tiny_tokenizer())(texts[title])]
        assert split.input_ids.ravel().tolist() == whole[: split.input_ids.size]


def test_more_calibration_moves_nothing_else():
    few = draw_splits(corpus(), tiny_tokenizer(), SIZES, 12, 0, ())
    many = draw_splits(corpus(), tiny_tokenizer(), {**SIZES, "calibration": 9}, 12, 0, ())
    for name in ("evaluation", "tuning"):
        assert (few[name].input_ids == many[name].input_ids).all()
    assert (few["calibration"].input_ids == many["calibration"].input_ids[:3]).all()


def test_seed_changes_the_order():
    one, two = (draw_splits(corpus(), tiny_tokenizer(), SIZES, 12, seed, ()) for seed in (0, 1))
    assert one["evaluation"].articles != two["evaluation"].articles


def test_buffered_shuffle_keeps_every_article(monkeypatch):
    whole = corpus(200)
    monkeypatch.setattr(splits, "SHUFFLE_ARTICLES", 16)
    mixed = list(shuffled(whole, 0))
    assert mixed != whole and sorted(article.name for article in mixed) == sorted(article.name for article in whole)
    monkeypatch.setattr(splits, "SHUFFLE_CHARACTERS", 1)
    assert len(list(shuffled(whole, 0))) == 200


def test_repeated_names_and_texts_are_passed_over():
    repeated = [Article("A", "x"), Article("A", "y"), Article("B", "x"), Article("C", "z")]
    assert [article.name for article in distinct(repeated)] == ["A", "C"]


def test_start_token_opens_articles_and_sequences():
    tokenizer = starting_tokenizer()
    articles = [Article("A", "w3 w4 w5 w6 w7"), Article("B", "w8 w9")]
    packed = list(pack(articles, encoder(tokenizer), 4, splits.start_token(tokenizer), Tally()))
    assert [ids for ids, _ in packed] == [[1, 3, 4, 5], [1, 6, 7, END], [1, 8, 9, END]]
    assert [names for _, names in packed] == [["A"], ["A"], ["B"]]


def test_no_start_token_unless_the_tokenizer_adds_one():
    packed = list(pack([Article("A", "w3 w4"), Article("B", "w5 w6")], encoder(tiny_tokenizer()), 3, None, Tally()))
    assert [ids for ids, _ in packed] == [[3, 4, END], [5, 6, END]]


def test_too_small_says_what_there_is_and_what_is_asked():
    reserved = {f"A{i}" for i in range(10)}
    with pytest.raises(
        InputError,
        match=r"hold \d+ tokens, \d+ more set aside .* fill \d+ sequences of 12 tokens.*= 103 \(1236 tokens\)",
    ):
        draw_splits(corpus(), tiny_tokenizer(), {**SIZES, "calibration": 100}, 12, 0, reserved)
