"""Splits share no document, draw windows from all before a second from any, ask for no more than they use, and stay where they are."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from fisherfold.inputs import splits
from fisherfold.inputs.corpora import Article
from fisherfold.inputs.splits import Tally, as_split, distinct, draw_splits, encoder, interleave, portions, shuffled
from fisherfold.inputs.windows import pack, windows
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
    texts = {article.name: encoder(tiny_tokenizer())(article.text) for article in corpus()}
    for name, split in drawn.items():
        assert split.input_ids.shape == (SIZES[name], length)
        for ids, titles in zip(split.input_ids.tolist(), split.articles, strict=True):
            position = 0
            for title in titles:  # every piece is a stretch of its document
                size = min(length - position, len(texts[title]))
                taken = next(n for n in range(size, 0, -1) if contains(texts[title], ids[position : position + n]))
                position += taken
            assert position == length


def contains(text, piece):
    return any(text[i : i + len(piece)] == piece for i in range(len(text) - len(piece) + 1))


def words(first, count):
    return " ".join(f"w{3 + (first + i) % 90}" for i in range(count))


def test_three_long_documents_give_windows_to_all_splits_and_of_all_their_length():
    books = [Article(f"B{k}", words(30 * k, 2000)) for k in range(3)]
    drawn = draw_splits(books, tiny_tokenizer(), {"evaluation": 5, "tuning": 3, "calibration": 12}, 16, 0, ())
    assert [len(split.article_names) for split in drawn.values()] == [1, 1, 1]
    calibration = drawn["calibration"]
    text = encoder(tiny_tokenizer())(next(b.text for b in books if b.name in calibration.article_names))
    assert all(contains(text, ids) for ids in calibration.input_ids.tolist())
    assert len(calibration.articles) == 12


def test_every_document_gives_a_window_before_one_gives_two():
    books = [Article(f"B{k}", words(7 * k, 300)) for k in range(12)]
    sizes = {"evaluation": 2, "tuning": 2, "calibration": 8}
    drawn = draw_splits(books, tiny_tokenizer(), sizes, 16, 0, ())
    assert sorted(name for split in drawn.values() for name in split.article_names) == sorted(b.name for b in books)
    more = draw_splits(books, tiny_tokenizer(), {**sizes, "calibration": 20}, 16, 0, ())["calibration"]
    counts = [sum(name in names for names in more.articles) for name in more.article_names]
    assert len(counts) > 4 and max(counts) - min(counts) <= 1


def test_windows_are_disjoint_at_a_random_phase_and_in_a_random_order():
    text = list(range(1000))
    drawn = windows(text, 64, "a", 0)
    assert len(drawn) == 15 and len({token for piece in drawn for token in piece}) == 15 * 64
    starts = [piece[0] for piece in drawn]
    assert starts != sorted(starts) and all(piece == text[piece[0] : piece[0] + 64] for piece in drawn)
    assert {windows(text, 64, "a", seed)[0][0] % 64 for seed in range(8)} != {starts[0] % 64}
    assert windows(text[:10], 64, "a", 0) == [text[:10]]


def test_shares_are_exact_and_sources_are_spread():
    assert (
        portions([0.5, 0.5], 5) == [3, 2] and portions([2, 1, 1], 8) == [4, 2, 2] and sum(portions([1, 1, 1], 10)) == 10
    )
    one, two = (as_split([([k, i], [f"{k}{i}"]) for i in range(n)], 2, f"s{k}") for k, n in ((0, 6), (1, 3)))
    mixed = interleave([one, two])
    assert mixed.input_ids.shape == (9, 2) and sorted(mixed.sources) == ["s0"] * 6 + ["s1"] * 3
    assert all(set(mixed.sources[i : i + 4]) == {"s0", "s1"} for i in range(6))


def test_one_document_for_three_splits_says_so():
    with pytest.raises(InputError, match=r"No document may be in two splits.*blank lines"):
        draw_splits([Article("A", words(0, 5000))], tiny_tokenizer(), SIZES, 12, 0, ())


def test_a_corpus_without_text_says_so():
    with pytest.raises(InputError, match=r"its 0 articles hold 0 tokens.*It holds no text"):
        draw_splits([], tiny_tokenizer(), SIZES, 12, 0, ())


def test_repeated_documents_are_counted_where_the_corpus_is_too_small():
    same = [Article("A", words(k, 30)) for k in range(20)]
    with pytest.raises(InputError, match="19 passed over because their title or text came before"):
        draw_splits(same, tiny_tokenizer(), SIZES, 12, 0, ())


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
    assert [article.name for article in distinct(repeated, Tally(), set())] == ["A", "C"]


def pieces(tokenizer, *texts):
    return [(name, encoder(tokenizer)(text)) for name, text in zip("AB", texts)]


def test_a_text_in_two_corpora_is_used_once():
    seen = set()
    first = draw_splits(corpus(), tiny_tokenizer(), SIZES, 12, 0, (), "one", seen)
    again = [Article(f"copy of {article.name}", article.text) for article in corpus()]
    with pytest.raises(InputError, match="passed over because their title or text came before"):
        draw_splits(again, tiny_tokenizer(), {"evaluation": 40}, 12, 0, (), "two", seen)
    assert first["calibration"].sources == ["one"] * 3


def test_start_token_opens_documents_and_sequences():
    tokenizer = starting_tokenizer()
    packed = list(pack(pieces(tokenizer, "w3 w4 w5 w6 w7", "w8 w9"), 4, splits.start_token(tokenizer)))
    assert [ids for ids, _ in packed] == [[1, 3, 4, 5], [1, 6, 7, END], [1, 8, 9, END]]
    assert [names for _, names in packed] == [["A"], ["A"], ["B"]]
    assert list(pack([("A", [5, 6, 7, 8])], 4, 1)) == [([1, 5, 6, 7], ["A"])]


def test_no_start_token_unless_the_tokenizer_adds_one():
    packed = list(pack(pieces(tiny_tokenizer(), "w3 w4", "w5 w6"), 3, None))
    assert [ids for ids, _ in packed] == [[3, 4, END], [5, 6, END]]


def test_too_small_says_what_there_is_and_what_is_asked():
    reserved = {f"A{i}" for i in range(10)}
    with pytest.raises(
        InputError,
        match=r"hold \d+ tokens, \d+ more set aside .* fill \d+ sequences of 12 tokens.*= 103 \(1236 tokens\)",
    ):
        draw_splits(corpus(), tiny_tokenizer(), {**SIZES, "calibration": 100}, 12, 0, reserved)
