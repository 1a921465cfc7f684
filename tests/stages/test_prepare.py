"""The stage as a whole: what it writes, that it resumes, and that it publishes all or nothing."""

import gzip
import hashlib
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML
from tiny import VOCABULARY, save_tiny, tiny_bytes_tokenizer, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from wheels import make_wheel

from fisherfold.inputs import packages, written_text
from fisherfold.inputs.prompts import find_prompts
from fisherfold.inputs.self_written import write_answers
from fisherfold.run.determinism import STREAMED, placed
from fisherfold.run.errors import InputError, NotEnoughDisk
from fisherfold.run.files import describe_files, verify_output
from fisherfold.run.params import PrepareParams
from fisherfold.run.tables import read_sequences, read_table
from fisherfold.run.workspace import Workspace
from stages import prepare

PARAMS = PrepareParams(
    model="model", corpus="corpus.json", unseen=None, questions="facts", sequence_length=8,
    calibration_sequences=6, tuning_sequences=2, training_sequences=0, evaluation_sequences=4, question_count=5, free_text=0,
)  # fmt: skip
SPLITS = {"calibration": 6, "tuning": 2, "evaluation": 4}


def records(count=40):
    return [
        {
            "title": f"T{i}",
            "text": " ".join(f"w{3 + (i * 5 + j) % 90}" for j in range(6)),
            "description": f"w{i + 3} w{i % 7 + 50}",
        }
        for i in range(count)
    ]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A local model, a corpus, and a question recipe whose file comes from a wheel."""
    monkeypatch.setenv("FISHERFOLD_CACHE", str(tmp_path / "cache"))
    return make_workspace(tmp_path / "project", monkeypatch)


def make_workspace(root, monkeypatch):
    root.mkdir()
    save_tiny(root / "model")
    text = json.dumps(records())
    (root / "corpus.json").write_text(text)
    wheel = make_wheel(root, "facts", {"facts.json": text})
    monkeypatch.setattr(packages, "download", lambda _, folder: (folder / wheel.name).write_bytes(wheel.read_bytes()))
    recipe = {
        "description": "Facts", "licence": "CC0-1.0", "source": "https://example.org",
        "file": {
            "name": "facts.json", "bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "packages": [{"name": "facts", "version": "1.0", "member": "facts/facts.json"}],
        },
        "title_field": "title", "answer_field": "description", "topic_field": "topic", "prompt": "{title}:",
    }  # fmt: skip
    (root / "data" / "prompts").mkdir(parents=True)
    (root / "data" / "prompts" / "everyday.txt").write_text("\n".join(f"w{i} w{i + 1}" for i in range(10, 60)))
    (root / "data" / "questions").mkdir()
    YAML().dump(recipe, root / "data" / "questions" / "facts.yaml")
    return Workspace(root)


def published(workspace):
    return describe_files(workspace.out("prepare")) | describe_files(workspace.root / "data" / "prepared")


def test_writes_model_tables_and_facts(workspace):
    prepare.run(workspace, PARAMS)
    assert AutoModelForCausalLM.from_pretrained(workspace.model).num_parameters() > 0
    used = {}
    for split, count in SPLITS.items():
        assert read_sequences(workspace.table(split), VOCABULARY).shape == (count, 8)
        used[split] = {name for row in read_table(workspace.table(split))["articles"].to_pylist() for name in row}
    questions = read_table(workspace.table("questions")).to_pylist()
    asked = {row["article"] for row in questions}
    assert len(asked) == 5
    for one, other in (("calibration", "tuning"), ("calibration", "evaluation"), ("tuning", "evaluation")):
        assert not used[one] & used[other]
    assert not (used["calibration"] | used["tuning"]) & asked
    verify_output(workspace.out("prepare"))
    assert sorted(path.name for path in (workspace.root / "data" / "prepared").iterdir()) == [
        "answers.parquet", "calibration.parquet", "evaluation.parquet", "questions.parquet", "training.parquet", "tuning.parquet",
    ]  # fmt: skip


def test_facts(workspace):
    prepare.run(workspace, PARAMS)
    text = (workspace.out("prepare") / "prepare.json").read_text()
    facts = json.loads(text)
    assert facts["questions"]["licence"] == "CC0-1.0" and facts["questions"]["origin"].startswith("facts==1.0")
    assert facts["model"]["parameters"] == AutoModelForCausalLM.from_pretrained(workspace.model).num_parameters()
    assert facts["data"]["splits"]["calibration"]["tokens"] == 48
    assert facts["data"]["sequence_length"] == 8 and facts["data"]["vocabulary"] == VOCABULARY
    assert str(workspace.root) not in text and facts == json.loads(json.dumps(facts, sort_keys=True))


@pytest.fixture
def with_image(workspace):
    """The same with an added token that the model does not embed."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["[IMG]"])
    tokenizer.save_pretrained(workspace.root / "model")
    return workspace


def test_a_token_that_is_not_embedded_does_no_harm(with_image):
    prepare.run(with_image, PARAMS)
    assert read_sequences(with_image.table("calibration"), VOCABULARY).max() < VOCABULARY


def test_a_text_that_holds_it_is_named(with_image):
    (with_image.root / "texts.txt").write_text("\n\n".join(f"w{i} [IMG] " + f"w{i + 5} " * 9 for i in range(3, 43)))
    with pytest.raises(InputError, match=rf"The corpus \(.*holds '\[IMG\]', token {VOCABULARY} .*Take it out"):
        prepare.run(with_image, PARAMS.model_copy(update={"corpus": "texts.txt"}))
    row = {"question": "[IMG]?", "choices": ["w4", "w5", "w6", "w7"], "answer": 0, "article": "x"}
    (with_image.root / "asked.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"Question '\[IMG\]\?' holds"):
        prepare.run(with_image, PARAMS.model_copy(update={"questions": "asked.jsonl", "question_count": 1}))


def test_an_end_token_that_is_not_embedded_ends_no_document(workspace):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(workspace.root / "model")
    prepare.run(workspace, PARAMS)
    assert read_sequences(workspace.table("calibration"), VOCABULARY).max() < VOCABULARY
    assert json.loads((workspace.out("prepare") / "prepare.json").read_text())["data"]["end_token"] is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["w4", "\u00a0\u2003"]}, "two or more different texts"),
        ({"question": "w3 " * 80}, r"has 8\d tokens with the choice 'w4', and the model has 64 positions"),
    ],
)
def test_questions_that_no_stage_could_ask_are_refused(workspace, row, message):
    row = {"question": "w3", "choices": ["w4", "w5", "w6", "w7"], "answer": 0, "article": "x"} | row
    (workspace.root / "asked.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=message):
        prepare.run(workspace, PARAMS.model_copy(update={"questions": "asked.jsonl", "question_count": 1}))


def test_later_stages_look_at_the_model_before_it_writes_text(chatting):
    seen = []

    def refuse(model, found):
        seen.append((model / "config.json").exists() and (found / "layers.json").exists())
        raise InputError("not this one")

    with pytest.raises(InputError, match="not this one"):
        prepare.run(chatting, CHAT, refuse)
    assert seen == [True] and not list((chatting.artifacts / "prepare.partial").glob("*/units/answers*"))
    prepare.run(chatting, CHAT)


def test_no_questions_make_an_empty_table(workspace):
    prepare.run(workspace, PARAMS.model_copy(update={"questions": None}))
    assert read_table(workspace.table("questions")).num_rows == 0


def test_same_parameters_same_bits(workspace, tmp_path, monkeypatch):
    other = make_workspace(tmp_path / "other", monkeypatch)
    prepare.run(workspace, PARAMS)
    prepare.run(other, PARAMS)
    assert published(workspace) == published(other)


class Killed(Exception):
    """Stands for the end of the process."""


def kill(*_, **__):
    raise Killed


@pytest.mark.parametrize(
    "point",
    ["write_model", "draw_texts", "write_tables", "draw_questions", "write_table", "_write_facts", "replace_folder"],
)
def test_killed_anywhere_it_resumes_to_the_same_bits(workspace, tmp_path, monkeypatch, point):
    whole = make_workspace(tmp_path / "whole", monkeypatch)
    prepare.run(whole, PARAMS)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, point, kill)
        with pytest.raises(Killed):
            prepare.run(workspace, PARAMS)
    assert not workspace.out("prepare").exists() and not workspace.table("tuning").exists()
    if point != "write_model":
        monkeypatch.setattr(prepare, "write_model", kill)  # a finished unit is not done again
    prepare.run(workspace, PARAMS)
    assert published(workspace) == published(whole)


def test_killed_while_publishing(workspace, monkeypatch):
    """The model folder is out, the tables are not: the next run publishes both, and computes nothing."""
    replace = prepare.replace_folder

    def killed_at_the_last(source, target):
        if target.name == "prepared":
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "replace_folder", killed_at_the_last)
        with pytest.raises(Killed):
            prepare.run(workspace, PARAMS)
    monkeypatch.setattr(prepare, "write_model", kill)
    monkeypatch.setattr(prepare, "write_tables", kill)
    prepare.run(workspace, PARAMS)
    assert read_table(workspace.table("evaluation")).num_rows == 4


def test_tables_are_replaced_as_a_whole(workspace):
    prepare.run(workspace, PARAMS)
    before = published(workspace)
    (workspace.root / "data" / "prepared" / "stray").write_text("left over")
    prepare.run(workspace, PARAMS.model_copy(update={"calibration_sequences": 7}))
    after = published(workspace)
    assert set(after) == set(before)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"calibration.parquet", "prepare.json", "manifest.json"}


def test_a_changed_corpus_is_another_run(workspace):
    prepare.run(workspace, PARAMS)
    before = published(workspace)
    (workspace.root / "corpus.json").write_text(json.dumps(records(41)))
    prepare.run(workspace, PARAMS)
    assert published(workspace)["calibration.parquet"] != before["calibration.parquet"]


def test_errors_leave_the_previous_output(workspace):
    prepare.run(workspace, PARAMS)
    before = published(workspace)
    for changes, message in (
        ({"calibration_sequences": 100}, "is too small"),
        ({"sequence_length": 65}, "positions"),
        ({"question_count": 41}, "holds 40 questions"),
        ({"text_field": "body"}, "no field 'body'"),
    ):
        with pytest.raises(InputError, match=message):
            prepare.run(workspace, PARAMS.model_copy(update=changes))
    assert published(workspace) == before


def test_disk_is_checked_before_anything_is_loaded(workspace, monkeypatch):
    monkeypatch.setattr(prepare, "write_model", kill)
    monkeypatch.setattr(prepare, "count_parameters", lambda _: 10**15)
    with pytest.raises(NotEnoughDisk, match=r"needs \d+ bytes .* \d+ are free"):
        prepare.run(workspace, PARAMS)


TEMPLATE = (
    "{% for message in messages %}w5 {{ message['content'] }} {% endfor %}{% if add_generation_prompt %}w6{% endif %}"
)
CHAT = PARAMS.model_copy(update={"self_written": 0.5, "held_out_prompts": 6, "answer_tokens": 5, "tuning_sequences": 4})


@pytest.fixture
def chatting(workspace):
    """The same with a model that has a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(workspace.root / "model")
    return workspace


def test_a_chat_model_writes_half_of_its_calibration_itself(chatting):
    prepare.run(chatting, CHAT)
    tables = {name: read_table(chatting.table(name)).to_pylist() for name in (*SPLITS, "answers")}
    sources = {name: [row["source"] for row in tables[name]] for name in SPLITS}
    assert sources["calibration"].count("self-written") == 3 and sources["tuning"].count("self-written") == 2
    assert sources["evaluation"] == ["corpus.json"] * 4
    own = {
        name: {a for row in tables[name] if row["source"] == "self-written" for a in row["articles"]} for name in SPLITS
    }
    held_out = {row["prompt"] for row in tables["answers"]}
    assert len(held_out) == 6 and own["calibration"] and own["tuning"]
    assert not own["calibration"] & own["tuning"] and not (own["calibration"] | own["tuning"]) & held_out


def test_streamed_it_writes_the_same(chatting, tmp_path):
    """But for how the model's files are cut."""
    prepare.run(chatting, CHAT)
    shutil.copytree(chatting.root, tmp_path / "other", ignore=shutil.ignore_patterns("artifacts"))
    with placed(STREAMED):
        prepare.run(Workspace(tmp_path / "other"), CHAT)
    whole, streamed = (published(workspace) for workspace in (chatting, Workspace(tmp_path / "other")))
    files = {name for name in whole if not name.startswith(("model/model", "manifest"))}
    assert len(files) > 12 and {name: whole[name] for name in files} == {name: streamed[name] for name in files}


def test_text_for_training_is_other_text_and_moves_nothing(chatting):
    prepare.run(chatting, CHAT)
    assert len(read_sequences(chatting.table("training"), VOCABULARY)) == 0
    before = {name: read_table(chatting.table(name)) for name in (*SPLITS, "answers")}
    prepare.run(chatting, CHAT.model_copy(update={"training_sequences": 4}))
    assert all(read_table(chatting.table(name)).equals(table) for name, table in before.items())
    rows = read_table(chatting.table("training")).to_pylist()
    assert [row["source"] for row in rows].count("self-written") == 2 and len(rows) == 4
    of_corpus = {a for row in rows if row["source"] == "corpus.json" for a in row["articles"]}
    assert not of_corpus & {
        a for table in before.values() for row in table.to_pylist() for a in row.get("articles", [])
    }
    written = {tuple(row["input_ids"]) for row in before["calibration"].to_pylist()}
    assert not written & {tuple(row["input_ids"]) for row in rows}
    facts = json.loads((chatting.out("prepare") / "prepare.json").read_text())
    assert facts["data"]["splits"]["training"]["sequences"] == 4


def test_prompts_are_in_the_chat_format_and_answers_end_where_the_model_ended_them(chatting):
    prepare.run(chatting, CHAT)
    tokenizer = AutoTokenizer.from_pretrained(chatting.model)
    for row in read_table(chatting.table("answers")).to_pylist():
        messages = [{"role": "user", "content": row["prompt"]}]
        assert row["prompt_ids"] == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert 0 < len(row["sampled_ids"]) <= 5 and 2 not in row["sampled_ids"][:-1]


def test_a_model_without_a_chat_template_writes_nothing(workspace):
    prepare.run(workspace, CHAT)
    assert read_table(workspace.table("answers")).num_rows == 0
    assert set(read_table(workspace.table("calibration"))["source"].to_pylist()) == {"corpus.json"}


def test_self_written_text_has_the_same_bits_after_a_kill(chatting, tmp_path, monkeypatch):
    whole = make_workspace(tmp_path / "whole", monkeypatch)
    shutil.copytree(chatting.root / "model", whole.root / "model", dirs_exist_ok=True)
    prepare.run(whole, CHAT)
    write, done = written_text.write_answers, []

    def killed_at_the_second(*arguments):
        if done:
            raise Killed
        done.append(arguments)
        write(*arguments)

    killed_at_the_second.__module__, killed_at_the_second.__qualname__ = write.__module__, write.__qualname__
    with monkeypatch.context() as patch:
        patch.setattr(written_text, "write_answers", killed_at_the_second)
        with pytest.raises(Killed):
            prepare.run(chatting, CHAT)
    prepare.run(chatting, CHAT)
    assert published(chatting) == published(whole)


def test_a_share_of_the_rest_is_free_text_of_any_model(workspace):
    prepare.run(workspace, PARAMS.model_copy(update={"free_text": 0.5, "self_written": 0.5, "training_sequences": 4}))
    rows = {name: read_table(workspace.table(name)).to_pylist() for name in (*SPLITS, "training")}
    written = {
        name: [tuple(row["input_ids"]) for row in some if row["source"] == "free text"] for name, some in rows.items()
    }
    assert {name: len(some) for name, some in written.items()} == {
        "calibration": 3, "tuning": 1, "training": 0, "evaluation": 0,
    }  # fmt: skip
    sequences = [ids for some in written.values() for ids in some]
    assert len(set(sequences)) == len(sequences) and {len(ids) for ids in sequences} == {8}


@pytest.mark.parametrize(("share", "drawn"), [(0.5, 4), (1, 0)])
def test_a_share_of_training_goes_on_from_the_calibration(workspace, share, drawn):
    """The documents are those of the calibration, so none of evaluation's or tuning's are in it."""
    whole = PARAMS.model_copy(update={"calibration_sequences": 3, "training_sequences": 8})
    prepare.run(workspace, whole.model_copy(update={"continued": share}))
    rows = {name: read_table(workspace.table(name)).to_pylist() for name in (*SPLITS, "training")}
    continued = [row for row in rows["training"] if row["source"] == "continued text"]
    assert len(rows["training"]) == 8 and len(continued) == 8 - drawn
    named = {name: {article for row in some for article in row["articles"]} for name, some in rows.items()}
    of_calibration = {article for row in continued for article in row["articles"]}
    assert of_calibration <= named["calibration"] and not of_calibration & (named["evaluation"] | named["tuning"])
    seen = {tuple(row["input_ids"][i : i + 4]) for row in rows["calibration"] for i in range(5)}
    assert all({tuple(row["input_ids"][i : i + 4]) for i in (0, 1)} & seen for row in continued)
    assert len({tuple(row["input_ids"]) for row in continued}) == len(continued)


@pytest.mark.parametrize(("articles", "of_corpus"), [(14, 0), (18, 4)])
def test_where_a_corpus_ends_training_goes_on_from_the_calibration(workspace, capsys, articles, of_corpus):
    """As much of the corpus as a quarter, half or three quarters of what is asked, and nobody has to say so."""
    (workspace.root / "corpus.json").write_text(json.dumps(records(articles)))
    asked = {"calibration_sequences": 4, "training_sequences": 16, "questions": None}
    prepare.run(workspace, PARAMS.model_copy(update=asked))
    rows = {name: read_table(workspace.table(name)).to_pylist() for name in (*SPLITS, "training")}
    assert len(rows["training"]) == 16
    continued = [row for row in rows["training"] if row["source"] == "continued text"]
    assert len(continued) == 16 - of_corpus
    assert f"of 16 sequences for training {16 - of_corpus} go on" in capsys.readouterr().err
    calibration = {article for row in rows["calibration"] for article in row["articles"]}
    assert {article for row in continued for article in row["articles"]} <= calibration


def test_where_calibration_has_no_text_of_a_corpus_nothing_can_go_on(workspace):
    asked = PARAMS.model_copy(update={"training_sequences": 4, "free_text": 0.99, "continued": 1, "tuning_sequences": 1})
    with pytest.raises(InputError, match=r"prepare.continued goes on from"):
        prepare.run(workspace, asked)


def test_where_the_list_ends_a_chat_model_answers_its_own_prompts(chatting, monkeypatch):
    """Which are in no two splits, and none of which the list holds."""
    listed = [f"w{i}" for i in range(3, 20)]
    (chatting.root / "list.txt").write_text("\n".join(listed))
    rounds = []

    def write(folder, model, count, seed, dtype):
        rounds.append(seed)
        (folder / "prompts.json").write_text(
            json.dumps(["w3", "w90", *(f"w{i} w{len(rounds)}" for i in range(30, 60))])
        )

    monkeypatch.setattr(written_text, "write_prompts", write)
    prepare.run(
        chatting, CHAT.model_copy(update={"prompts": "list.txt", "calibration_sequences": 20, "self_written": 0.8})
    )
    own = {
        name: [a for row in read_table(chatting.table(name)).to_pylist() if row["source"] == "self-written" for a in row["articles"]]
        for name in ("calibration", "tuning")
    }  # fmt: skip
    assert len(rounds) == len(set(rounds)) > 0
    assert [prompt for prompt in own["calibration"] if prompt not in listed]
    assert not set(own["calibration"]) & set(own["tuning"])


def test_a_model_that_answers_nothing_is_not_asked_for_ever(chatting, monkeypatch):
    write = written_text.write_answers

    def silent(folder, *arguments):
        write(folder, *arguments)
        table = read_table(folder / "answers.parquet")
        nothing = pa.array([[]] * table.num_rows, table.schema.field("sampled_ids").type)
        pq.write_table(table.set_column(2, "sampled_ids", nothing), folder / "answers.parquet")

    monkeypatch.setattr(written_text, "write_answers", silent)
    prepare.run(chatting, CHAT)
    assert "self-written" not in read_table(chatting.table("calibration"))["source"].to_pylist()


def test_corpora_share_the_sequences(workspace):
    (workspace.root / "other.txt").write_text("\n\n".join(f"w{90 - i} " * 9 for i in range(60)))
    corpus = ({"source": "corpus.json", "share": 1}, {"source": "other.txt", "share": 3})
    prepare.run(
        workspace, PrepareParams.model_validate(PARAMS.model_dump() | {"corpus": corpus, "evaluation_sequences": 8})
    )
    for name, (first, second) in {"evaluation": (2, 6), "calibration": (2, 4)}.items():
        sources = read_table(workspace.table(name))["source"].to_pylist()
        assert (sources.count("corpus.json"), sources.count("other.txt")) == (first, second)
    facts = json.loads((workspace.out("prepare") / "prepare.json").read_text())
    assert facts["corpus"]["name"] == "corpus.json" and facts["corpus 2"]["name"] == "other.txt"


def test_an_unseen_corpus_is_for_evaluation_alone(workspace):
    (workspace.root / "other.txt").write_text("\n\n".join(f"w{90 - i} " * 9 for i in range(60)))
    prepare.run(workspace, PARAMS.model_copy(update={"unseen": "other.txt", "unseen_sequences": 3}))
    found = {
        name: read_table(workspace.table(name))["source"].to_pylist()
        for name in ("evaluation", "tuning", "calibration")
    }
    assert found["evaluation"].count("other.txt") == 3
    assert len(found["evaluation"]) == PARAMS.evaluation_sequences + 3
    assert set(found["tuning"]) == set(found["calibration"]) == {"corpus.json"}
    with pytest.raises(InputError, match="only what calibration must not see"):
        prepare.run(workspace, PARAMS.model_copy(update={"unseen": "corpus.json"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "nowhere"}, "neither a list in data/prompts .everyday. nor a text file"),
        ({"prompts": "empty.txt"}, "holds no prompt"),
        ({"held_out_prompts": 49}, "holds 50 different prompts"),
    ],
)
def test_prompts_that_do_not_do(chatting, changes, message):
    (chatting.root / "empty.txt").write_text("\n \n")
    with pytest.raises(InputError, match=message):
        prepare.run(chatting, CHAT.model_copy(update=changes))


def test_prompts_are_read_as_texts_are(workspace):
    """Raw separators of lines inside one, compressed, UTF-16."""
    texts = [f"w{i}\u2028w{i + 1}\x85w{i + 2}" for i in range(3, 60)]
    (workspace.root / "p.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode("utf-16")))
    assert find_prompts(workspace, "p.txt.gz").texts == tuple(texts)


def test_answers_end_where_positions_do(tmp_path):
    """Of a model with one embedding a position, which knows none beyond."""
    save_tiny(tmp_path / "model", "gpt2")
    tiny_bytes_tokenizer().save_pretrained(tmp_path / "model")
    write_answers(tmp_path, tmp_path / "model", ("w3 " * 20, "w4"), seed=0, longest=40, dtype="float32")
    rows = read_table(tmp_path / "answers.parquet").to_pylist()
    room = 64 - len(rows[0]["prompt_ids"])
    assert 0 < room < 40 and all(len(row["sampled_ids"]) <= room for row in rows)
    with pytest.raises(InputError, match=r"tokens in the chat format, and the model has 64 positions"):
        write_answers(tmp_path, tmp_path / "model", ("w3 " * 80,), seed=0, longest=40, dtype="float32")
