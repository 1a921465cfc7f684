"""What an article is, in every format; and every unreadable corpus."""

import gzip
import json
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_tokenizer

from fisherfold.inputs import corpora, hub
from fisherfold.inputs.conversations import encode_messages
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


def test_arrow_files_and_streams_as_the_datasets_library_saves_them(tmp_path):
    table = pa.table({"text": ["a", "b"], "title": ["A", "B"], "other": [1, 2]})
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text('{"_split": "train"}')
    (folder / "dataset_info.json").write_text("{}")
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table)
    assert articles(tmp_path, "saved") == articles(tmp_path, "file.arrow") == [("A", "a"), ("B", "b")]


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "c.txt")
    with pytest.raises(InputError, match=r"c\.txt is not .* a file of a known format"):
        articles(tmp_path, "c.txt")


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
        ("c.jsonl", b'{"text": "a"}\nnull\n', "c.jsonl, line 2 is not a record"),
        ("c.json", b"3", "neither a list of records nor a mapping"),
        ("c.json", b"[" * 100_000, "not valid JSON"),
        ("c.jsonl", b'{"a":' * 700 + b'"\\\\ud800"' + b"}" * 700, "line 1 is not valid JSON"),
        ("c.csv", b"text,n\na,1,2\n", "c.csv, line 2 has 3 values, but the header has 2"),
        ("c.csv", b"body\na\n", "no field 'text'"),
        ("c.csv", b'text\n"a\nb\nc\n', "c.csv, line 4 is not valid CSV"),
        ("c.csv", b"text,text\na,b\n", "c.csv, line 1: the header names a column twice"),
        ("c.txt", "some text".encode("utf-16-le"), "c.txt is no text, or UTF-16 without its mark"),
        ("c.csv", "text\ncaf\u00e9\n".encode("latin-1"), "c.csv is not UTF-8"),
        ("c.jsonl.gz", b"nothing", "c.jsonl.gz cannot be read"),
        ("c.txt.gz", gzip.compress(b"a b c" * 99, mtime=0)[:-9], "c.txt.gz cannot be read"),
        ("c.jsonl", b'{"messages": [{"role": "user"}]}\n', "line 1, message 1 has neither role and content"),
        ("c.jsonl", b'{"messages": [{"role": "user", "content": 3}]}\n', "message 1 has no role or no text"),
        ("c.parquet", b"nothing", "not a readable Parquet file"),
        ("c.arrow", b"nothing", "not a readable Arrow file"),
        ("c.arrow", b"ARROW1\0\0cut", "not a readable Arrow file"),
        ("c.ndjson", b"{", "c.ndjson, line 1 is not valid JSON"),
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


def unreachable(*_):
    raise HubUnknown("the hub cannot be asked (no network)")


def test_unknown_corpus_gives_the_nearest(tmp_path, monkeypatch):
    (tmp_path / "data" / "corpora").mkdir(parents=True)
    (tmp_path / "data" / "corpora" / "wikipedia-leads.yaml").write_text("")

    monkeypatch.setattr(hub, "_resolve", unreachable)
    for name in ("wikipedia-lead", "./wikipedia lead.pdf"):
        with pytest.raises(InputError, match="Did you mean 'wikipedia-leads'"):
            articles(tmp_path, name)


def test_compressed_files_in_subfolders(tmp_path):
    folder = tmp_path / "c" / "deep" / "er"
    folder.mkdir(parents=True)
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"one\n\ntwo\n"))
    (folder / "b.jsonl.xz").write_bytes(lzma.compress(b'{"text": "three"}\n'))
    (folder / "c.csv").write_text('title,text\nT,"four,\nfive"\n', encoding="utf-8-sig")
    (tmp_path / "c" / ".hidden").mkdir()
    (tmp_path / "c" / ".hidden" / "d.txt").write_text("no")
    assert [text for _, text in articles(tmp_path, "c")] == ["one", "two", "three", "four,\nfive"]


def test_files_of_one_name_in_subfolders_are_all_in_the_digest(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "c" / name).mkdir(parents=True)
        (tmp_path / "c" / name / "text.txt").write_text(name)
    before = find_corpus(Workspace(tmp_path), "c").source.digest
    (tmp_path / "c" / "a" / "text.txt").write_text("other")
    assert find_corpus(Workspace(tmp_path), "c").source.digest != before


def test_long_field_of_a_csv_file(tmp_path):
    (tmp_path / "c.csv").write_text(f"text\n{'w' * 200_000}\n")
    assert len(articles(tmp_path, "c.csv")[0][1]) == 200_000


def test_dotted_fields(tmp_path):
    rows = [{"data": {"body": "a"}, "x.y": "b"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in (write_rows(tmp_path, rows), "c.parquet"):
        assert [text for _, text in articles(tmp_path, name, text_field="data.body")] == ["a"]
        assert [text for _, text in articles(tmp_path, name, text_field="x.y")] == ["b"]


def test_lone_surrogates_and_raw_separators(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a\\ud800b\\ud83d\\ude00 c\u2028d\u0085e"}\n', encoding="utf-8")
    ((_, text),) = articles(tmp_path, "c.jsonl")
    assert text == "a\ufffdb\U0001f600 c\u2028d\u0085e"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_other_encodings_with_their_marks_and_names_in_capitals(tmp_path, encoding):
    (tmp_path / "C.TXT").write_text("caf\u00e9", encoding=encoding)
    (tmp_path / "C.JSONL.GZ").write_bytes(gzip.compress('{"text": "caf\u00e9"}'.encode(encoding)))
    for name in ("C.TXT", "C.JSONL.GZ"):
        assert [text for _, text in articles(tmp_path, name)] == ["caf\u00e9"]


@pytest.mark.parametrize("name", ["", "a\0b", "a" * 300, "~nobody-of-this-name/c.txt"])
def test_names_that_no_path_can_have(tmp_path, monkeypatch, name):
    monkeypatch.setattr(hub, "_resolve", unreachable)
    with pytest.raises(InputError, match=r"prepare.corpus = .* is no recipe .* and no local path"):
        articles(tmp_path, name)


MESSAGES = [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5"}]
SHARED = [{"from": "human", "value": "w3 w4"}, {"from": "gpt", "value": "w5"}]


def test_conversations_of_both_layouts(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"id": 1, "messages": MESSAGES}]), tmp_path / "c.parquet")
    sets = (write_rows(tmp_path, [{"messages": MESSAGES}], "m.jsonl"), "c.parquet")
    for name in (*sets, write_rows(tmp_path, [{"conversations": SHARED}], "s.jsonl")):
        (article,) = read_articles(find_corpus(Workspace(tmp_path), name))
        assert [dict(message) for message in article.messages] == MESSAGES
    (article,) = read_articles(find_corpus(Workspace(tmp_path), write_rows(tmp_path, [{"chat": MESSAGES}]), "chat"))
    assert [dict(message) for message in article.messages] == MESSAGES


def test_conversation_is_encoded_by_the_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "<s> {% for m in messages %}{{ m['content'] + ' </s> ' }}{% endfor %}"
    ids = encode_messages(tokenizer, MESSAGES, "a")
    assert ids == tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=False) == [1, 3, 4, 2, 5, 2]


def test_conversation_without_a_usable_template_is_an_error():
    tokenizer = tiny_tokenizer()
    with pytest.raises(InputError, match=r"article 7.*no chat template"):
        encode_messages(tokenizer, MESSAGES, "article 7")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"refuses .*article 7.*roles must alternate.*user, assistant"):
        encode_messages(tokenizer, MESSAGES, "article 7")
