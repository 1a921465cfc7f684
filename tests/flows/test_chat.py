"""`fisherfold chat`: both models answer the same prompt."""

import json
import shutil

import pytest
from tiny import save_tiny

from fisherfold.run.errors import InputError
from fisherfold.run.workspace import Workspace
from flows import chat, cli


@pytest.fixture(autouse=True)
def warnings_as_they_are(monkeypatch):
    monkeypatch.setenv("FISHERFOLD_VERBOSE", "1")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save_tiny(folder / "dense", seed=0), save_tiny(folder / "compressed", seed=1)


def test_answers_stand_side_by_side_in_the_width_of_the_terminal(models, monkeypatch, capsys):
    monkeypatch.setattr(
        chat.shutil, "get_terminal_size", lambda fallback: fallback and shutil.os.terminal_size((61, 9))
    )
    dense, compressed = map(str, models)
    words = ["chat", compressed, "--dense", dense, "--prompt", "w3 w4", "--prompt", "w5", "--tokens", "12"]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines].count(["dense", "│", "compressed"]) == 2
    assert max(map(len, lines)) <= 61 and "a second)" in " ".join(lines)
    left, _, right = lines[2].partition("│")
    assert left.split()[0].startswith("w") and right.split()[0].startswith("w")


def test_an_empty_answer_is_called_so():
    assert chat.wrapped("", 20) == ["(an empty answer)"]


def test_the_dense_model_is_the_projects_or_the_hubs_or_must_be_named(tmp_path):
    workspace = Workspace(tmp_path)
    with pytest.raises(InputError, match="--dense"):
        chat.dense_of(tmp_path, workspace)
    lineage = {"files": {}, "lineage": {"model": {"name": "owner/name", "origin": "hub"}}}
    (tmp_path / "fisherfold.json").write_text(json.dumps(lineage))
    assert chat.dense_of(tmp_path, workspace) == "owner/name"
    workspace.model.mkdir(parents=True)
    assert chat.dense_of(tmp_path, workspace) == str(workspace.model)


def test_a_folder_without_a_model_is_one_clear_error(tmp_path, models, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for words in (["chat", str(tmp_path), "--dense", str(models[0])], ["chat", str(models[1]), "--dense", "no/such"]):
        assert cli.main([*words, "--prompt", "w3"]) == 1
        told = capsys.readouterr().err
        assert "is no model that can be loaded here" in told and "Traceback" not in told
