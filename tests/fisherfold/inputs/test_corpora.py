"""What an article is, in every format; and every unreadable corpus."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fisherfold.inputs import corpora, hub
from fisherfold.inputs.corpora import find_corpus, read_articles
from fisherfold.inputs.hub import HubEntry, HubUnknown
from fisherfold.run.errors import InputError
from fisherfold.run.workspace import Workspace

WIKITEXT = (
    " \n = First title = \n \n Text one . \n = = Section = = \n More . \n \n = Second title = \n \n Text two ; = 3 = \n"
)


def articles(tmp_path, name, **params):
    found = find_corpus(Workspace(tmp_path), name, **params)
    return [(article.name, article.text) for article in read_articles(found)]


def write_rows(tmp_path, rows, name="c.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_text_in_blocks(tmp_path):
    (tmp_path / "c.txt").write_text("\ufeffone\nstill one\n\n\ntwo\n\n", encoding="utf-8")
    assert [text for _, text in articles(tmp_path, "c.txt")] == ["one\nstill one", "two"]


def test_text_in_lines(tmp_path):
    (tmp_path / "c.txt").write_text("one\ntwo\n\n")
    assert [text.strip() for _, text in articles(tmp_path, "c.txt")] == ["one", "two"]


def test_text_with_headings(tmp_path):
    (tmp_path / "c.txt").write_text(WIKITEXT)
    first, second = articles(tmp_path, "c.txt")
    assert first[0] == "First title" and "= = Section = =" in first[1] and "More" in first[1]
    assert second[0] == "Second title" and "= 3 =" in second[1]


def test_headings_of_one_title_are_different_articles(tmp_path):
    (tmp_path / "c.txt").write_text(WIKITEXT.replace("Second", "First"))
    assert [name for name, _ in articles(tmp_path, "c.txt")] == ["First title", "First title (2)"]


def test_rows_with_headings_are_joined(tmp_path):
    rows = [{"text": line} for line in WIKITEXT.splitlines(keepends=True)]
    assert [name for name, _ in articles(tmp_path, write_rows(tmp_path, rows))] == ["First title", "Second title"]


def test_records_of_one_title_are_one_article(tmp_path):
    rows = [
        {"title": "A", "text": "a1"},
        {"title": "A", "text": "a2"},
        {"title": "", "text": "b"},
        {"title": None, "text": None},
    ]
    assert articles(tmp_path, write_rows(tmp_path, rows)) == [("A", "a1\n\na2"), ("article 3", "b")]


def test_json_list_and_mapping(tmp_path):
    rows = [{"title": "A", "body": "a"}, {"title": "B", "body": "b"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "map.json").write_text(json.dumps({row["title"]: row for row in rows}))
    expected = [("A", "a"), ("B", "b")]
    assert (
        articles(tmp_path, "list.json", text_field="body")
        == articles(tmp_path, "map.json", text_field="body")
        == expected
    )


def test_folder_of_parquet(tmp_path):
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        pq.write_table(
            pa.table({"text": [f"t{shard}"], "title": [f"T{shard}"], "other": [1]}),
            tmp_path / "shards" / f"{shard}.parquet",
        )
    assert articles(tmp_path, "shards") == [("T0", "t0"), ("T1", "t1")]


def test_missing_field_names_the_fields(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "c.parquet")
    for name in ("c.parquet", write_rows(tmp_path, [{"body": "x", "id": 1}])):
        with pytest.raises(InputError, match=r"no field 'text'; its fields are body, id.*prepare.text_field"):
            articles(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c.jsonl", b'{"text": "a"}\n{"text": ', "c.jsonl, line 2 is not valid JSON"),
        ("c.jsonl", b'{"text": 3}\n', "no text in field 'text', but int"),
        ("c.jsonl", b"[1]\n", "not a record"),
        ("c.parquet", b"nothing", "not a readable Parquet file"),
        ("c.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("c.pdf", b"", "not .* a file of a known format"),
    ],
)
def test_unreadable_corpus(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        articles(tmp_path, name)


def test_text_field_of_a_text_file(tmp_path):
    (tmp_path / "c.txt").write_text("a")
    with pytest.raises(InputError, match="a text file has no fields"):
        articles(tmp_path, "c.txt", text_field="body")


def test_hub_dataset_is_streamed_at_its_commit(tmp_path, monkeypatch):
    """A local folder stands in for the hub: the datasets library reads both alike."""
    (tmp_path / "owner").mkdir()
    write_rows(tmp_path, [{"text": "a"}, {"text": "b"}], "owner/data.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpora, "resolve_dataset", lambda name: HubEntry("c0ffee", "mit"))
    found = find_corpus(Workspace(tmp_path / "elsewhere"), "owner@train")
    assert (found.source.digest, found.source.licence, found.hub.split) == ("c0ffee", "mit", "train")
    assert [article.text for article in read_articles(found)] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("allenai/c4:en@train", ("allenai/c4", "en", "train")),
        ("wikitext:wikitext-2-raw-v1", ("wikitext", "wikitext-2-raw-v1", "train")),
        ("HuggingFaceFW/fineweb@test", ("HuggingFaceFW/fineweb", None, "test")),
    ],
)
def test_hub_syntax(tmp_path, monkeypatch, name, parts):
    monkeypatch.setattr(corpora, "resolve_dataset", lambda name: HubEntry("c0ffee"))
    found = find_corpus(Workspace(tmp_path), name).hub
    assert (found.name, found.config, found.split) == parts


def test_unknown_corpus_gives_the_nearest(tmp_path, monkeypatch):
    (tmp_path / "data" / "corpora").mkdir(parents=True)
    (tmp_path / "data" / "corpora" / "wikipedia-leads.yaml").write_text("")

    def unreachable(*_):
        raise HubUnknown("the hub cannot be asked (no network)")

    monkeypatch.setattr(hub, "_resolve", unreachable)
    for name in ("wikipedia-lead", "./wikipedia lead.pdf"):
        with pytest.raises(InputError, match="Did you mean 'wikipedia-leads'"):
            articles(tmp_path, name)
