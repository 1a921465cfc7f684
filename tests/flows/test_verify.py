"""`fisherfold verify`: every byte of a model folder, wherever it lies, and of artifacts/."""

import json
import shutil

import pytest

from fisherfold.export.lineage import damaged_files, read_lineage, write_lineage
from fisherfold.export.multiplied_out import export
from fisherfold.run.errors import CorruptArtifact, InputError
from fisherfold.run.params import PrepareParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.workspace import Workspace
from flows import cli, verify

SOURCES = {"model": {"name": "mine", "origin": "local", "licence": None, "digest": "d" * 64}, "tokens": 3}


@pytest.fixture
def model(tmp_path):
    """A model folder that describes itself."""
    workspace = Workspace(tmp_path)
    workspace.out("prepare").mkdir(parents=True)
    (workspace.out("prepare") / "prepare.json").write_text(json.dumps(SOURCES))
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("weights.safetensors", "config.json", "README.md"):
        (folder / name).write_text(name)
    write_lineage(folder, workspace, {"ranks": "r" * 64})
    return folder


def test_a_model_folder_is_checked_alone_wherever_it_goes(model, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(model, tmp_path / "elsewhere" / "copy")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["verify", "copy"]) == 0
    told = capsys.readouterr().out
    assert "mine" in told and "2 files, 0 damaged" in told
    (folder / "README.md").write_text("the card of stage report")  # may take the place of the one that was written
    (folder / "weights.safetensors").write_text("weights.safetensorz")
    (folder / "config.json").unlink()
    assert cli.main(["verify", "copy"]) == 1
    told = capsys.readouterr().out
    assert "damaged: weights.safetensors has other bytes" in told and "damaged: config.json is missing" in told


def test_it_says_from_what_it_was_made(model):
    lineage = read_lineage(model)["lineage"]
    assert lineage == {
        "model": {"name": "mine", "origin": "local", "digest": "d" * 64},
        "inputs": {"ranks": "r" * 64},
    }


def test_a_folder_that_says_nothing_of_itself_and_one_that_names_files_outside(model, tmp_path):
    with pytest.raises(CorruptArtifact, match="no model of Fisherfold"):
        read_lineage(tmp_path)
    (model / "fisherfold.json").write_text("{")
    with pytest.raises(CorruptArtifact, match="not readable"):
        read_lineage(model)
    assert damaged_files(model, {"../secret": {}}) == ["../secret is outside of the folder"]


@pytest.mark.parametrize(
    "text",
    ["null", "[]", '{"files": [1], "lineage": {}}', '{"files": {}, "lineage": {"model": 5}}', '{"files": {"a": 1}}'],
)
def test_what_says_nothing_readable_of_itself(tmp_path, text):
    (tmp_path / "fisherfold.json").write_text(text)
    with pytest.raises(CorruptArtifact, match=r"fisherfold\.json is not readable"):
        read_lineage(tmp_path)


@pytest.mark.parametrize("text", ["null", "5", "[1]", "{", '{"model_type": "llama"}'])
def test_a_folder_that_is_no_compressed_model_is_not_multiplied_out(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"is no(t a)? model"):
        export(tmp_path, tmp_path / "out", "dense")


def test_artifacts_are_checked_byte_by_byte_against_their_manifests(tmp_path, monkeypatch, capsys):
    workspace = Workspace(tmp_path)
    with Scratch(workspace, "prepare", PrepareParams(), {}) as scratch, scratch.publish() as out:
        (out / "table").write_text("as written")
    monkeypatch.setattr(verify, "stale_reasons", lambda _: {"capture": [verify.NEVER], "ranks": ["x"]})
    (workspace.out("ranks")).mkdir()
    found = {each.name: each for each in verify.check_outputs(workspace)}
    assert found["prepare"].sound and found["prepare"].files == 1
    assert "capture" not in found and not found["ranks"].sound
    (workspace.out("prepare") / "table").write_text("as wr1tten")
    (workspace.out("ranks")).rmdir()
    monkeypatch.setattr(verify, "stale_reasons", lambda _: {name: [verify.NEVER] for name in verify.STAGES[1:]})
    assert verify.print_outputs(workspace) == 1
    told = capsys.readouterr().out
    assert "other bytes" in told and "dvc repro --force --single-item prepare" in told
