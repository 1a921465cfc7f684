"""Questions from a recipe's records and from local files."""

import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fisherfold.inputs.questions import QuestionSet, draw_questions, find_questions, questions_table
from fisherfold.inputs.recipes import QuestionsRecipe, Source
from fisherfold.run.errors import InputError
from fisherfold.run.params import PrepareParams
from fisherfold.run.workspace import Workspace

ROW = {"question": "Two plus two is", "choices": ["four", "five"], "answer": 0}


@pytest.fixture
def described(tmp_path):
    """A recipe's question set: 60 titles in 2 topics, a rare topic, an empty description."""
    rows = [{"title": f"T{i}", "description": f"Thing {i // 2}", "topic": f"topic {i % 2}"} for i in range(60)]
    rows += [
        {"title": "Rare", "description": "thing 3", "topic": "rare"},
        {"title": "Empty", "description": "", "topic": "rare"},
    ]
    (tmp_path / "q.json").write_text(json.dumps({row["title"]: row for row in rows}))
    file = {
        "name": "q.json",
        "bytes": 1,
        "sha256": "0" * 64,
        "packages": [{"name": "p", "version": "1", "member": "m"}],
    }
    recipe = QuestionsRecipe(
        description="x",
        licence="x",
        source="x",
        file=file,
        prompt="{title}:",
        title_field="title",
        answer_field="description",
        topic_field="topic",
    )
    return QuestionSet(Source("q", "local", None, "0"), (tmp_path / "q.json",), recipe), {
        row["title"]: row for row in rows
    }


def test_distractors_differ_and_share_the_topic(described):
    questions, records = described
    drawn = draw_questions(questions, 61, seed=0)
    topics = {}
    for record in records.values():
        topics.setdefault(record["description"].casefold(), set()).add(record["topic"])
    for row in drawn:
        record = records[row["article"]]
        assert row["choices"][row["answer"]] == record["description"]
        assert len({choice.casefold() for choice in row["choices"]}) == 4
        assert row["question"] == f"{row['article']}:"
        if record["topic"] != "rare":
            assert all(record["topic"] in topics[choice.casefold()] for choice in row["choices"])
    assert len({row["article"] for row in drawn}) == 61
    assert set(Counter(row["answer"] for row in drawn)) == {0, 1, 2, 3}


def test_more_questions_keep_the_first_ones(described):
    questions, _ = described
    assert draw_questions(questions, 40, seed=3)[:10] == draw_questions(questions, 10, seed=3)
    assert draw_questions(questions, 10, seed=3) != draw_questions(questions, 10, seed=4)


def test_too_few_questions(described):
    with pytest.raises(InputError, match=r"holds 61 questions, asked are prepare.question_count = 100"):
        draw_questions(described[0], 100, seed=0)


def draw(tmp_path, name, count=1):
    return draw_questions(find_questions(Workspace(tmp_path), PrepareParams(questions=name)), count, seed=0)


def test_local_files(tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps(ROW) + "\n")
    pq.write_table(questions_table([{**ROW, "article": "Sums"}]), tmp_path / "q.parquet")
    assert draw(tmp_path, "q.jsonl") == [{**ROW, "article": "q.jsonl, line 1"}]
    assert draw(tmp_path, "q.parquet") == [{**ROW, "article": "Sums"}]


def test_mmlu_folder(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "high_school_physics_val.csv").write_text('"What, is it?",a,"b, c",d,e,B\n')
    (row,) = draw(tmp_path, "val")
    head = "The following are multiple choice questions (with answers) about high school physics."
    assert row["question"] == f"{head}\n\nWhat, is it?\nA. a\nB. b, c\nC. d\nD. e\nAnswer:"
    assert (row["choices"], row["answer"]) == (["A", "B", "C", "D"], 1)


def test_no_questions(tmp_path):
    assert draw(tmp_path, None) == [] and questions_table([]).num_rows == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x", "choices": ["a", "b"]}, "no field 'answer'; its fields are choices, question"),
        ({**ROW, "choices": ["a", "a"]}, "two or more different texts"),
        ({**ROW, "answer": 2}, "0 to 1, not 2"),
        ({**ROW, "answer": "A"}, "number of a choice"),
        ({**ROW, "answer": True}, "number of a choice"),
        ({**ROW, "answer": None}, "number of a choice"),
        ({**ROW, "question": None}, "the question must be a text, not None"),
        ({**ROW, "choices": "ab"}, "two or more different texts"),
        ({**ROW, "choices": None}, "two or more different texts"),
        ({**ROW, "choices": {"text": ["a", "b"], "label": ["A"]}}, "a label each"),
        ({**ROW, "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answer": "C"}, "one of the labels A, B"),
        (
            {**ROW, "choices": {"text": ["a", "b"], "label": ["A", "A"]}, "answer": "A"},
            "a label each, and different ones",
        ),
        ({**ROW, "choices": {"text": ["a", "b"], "label": [1, 2]}, "answer": 0}, "one of the labels 1, 2, not 0"),
        ({**ROW, "choices": ["a", " "]}, "two or more different texts"),
        ({**ROW, "choices": ["a", "a "]}, "two or more different texts"),
        ([1], "not a record with fields"),
        (7, "not a record with fields"),
        (None, "not a record with fields"),
    ],
)
def test_invalid_row_is_named(tmp_path, row, message):
    (tmp_path / "q.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"q.jsonl, line 2") as error:
        draw(tmp_path, "q.jsonl")
    assert message in str(error.value)


def test_invalid_csv(tmp_path):
    (tmp_path / "a.csv").write_text("question,a,b,c,d,E\n")
    with pytest.raises(InputError, match=r"a.csv, line 1: expected question, four choices and a letter"):
        draw(tmp_path, "a.csv")


def test_unknown_questions(tmp_path):
    with pytest.raises(InputError, match=r"is no recipe .* lm-eval tasks"):
        draw(tmp_path, "mmlu")


def test_labelled_choices(tmp_path):
    """The layout of ARC: texts and labels side by side, the answer by its label."""
    row = {"question": "x", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "q.parquet")
    for name in ("q.jsonl", "q.parquet"):
        (drawn,) = draw(tmp_path, name)
        assert (drawn["choices"], drawn["answer"]) == (["a", "b"], 1)


@pytest.mark.parametrize(("labels", "answer"), [(["1", "2"], 1), ([1, 2], "1"), ([0, 1], 0), (["a", "1"], "a")])
def test_a_number_is_a_label_where_labels_are_numbers(tmp_path, labels, answer):
    (tmp_path / "q.jsonl").write_text(
        json.dumps({**ROW, "choices": {"text": [" c", "d"], "label": labels}, "answer": answer})
    )
    (drawn,) = draw(tmp_path, "q.jsonl")
    assert (drawn["choices"], drawn["answer"]) == (["c", "d"], 0)


def test_text_that_the_corpus_reader_takes(tmp_path):
    """A byte order mark, raw separators of lines inside a text, and half of a surrogate pair."""
    text = json.dumps({**ROW, "question": "a\u2028b\u0085c"}, ensure_ascii=False).replace("four", "\\ud83d")
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n")
    (drawn,) = draw(tmp_path, "q.jsonl")
    assert drawn["question"] == "a\u2028b\u0085c" and drawn["choices"][0] == "\ufffd"
    assert questions_table([drawn]).num_rows == 1


def test_formats_and_folders(tmp_path):
    folder = tmp_path / "set" / "inner"
    folder.mkdir(parents=True)
    (folder / "list.json").write_text(json.dumps([ROW]))
    (folder / "more.jsonl.gz").write_bytes(gzip.compress(json.dumps({**ROW, "question": "y"}).encode()))
    (folder / "sums_val.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfz,a,b,c,d,B\n"))
    drawn = draw(tmp_path, "set", 3)
    assert {row["question"].partition("\n")[0] for row in drawn} == {
        "Two plus two is", "y", "The following are multiple choice questions (with answers) about sums."
    }  # fmt: skip


@pytest.mark.parametrize("name", ["q.jsonl", "q.csv"])
def test_latin_1_is_named(tmp_path, name):
    (tmp_path / name).write_bytes("caf\u00e9,a,b,c,d,A\n".encode("latin-1"))
    with pytest.raises(InputError, match=rf"{name} is not UTF-8"):
        draw(tmp_path, name)
