"""What a stage's scratch folder promises when something was cut short, damaged or computed elsewhere."""

import json
import os
import shutil
from pathlib import Path

import pytest
from pydantic import BaseModel

from fisherfold.run import determinism, unit_work
from fisherfold.run.engine import Inline
from fisherfold.run.scratch import Scratch, clear_scratch, forget_output, lock_file, lock_stage
from fisherfold.run.unit_work import attempt_folder, finish_unit
from fisherfold.run.workspace import Workspace


class NoParams(BaseModel):
    pass


class Computing(BaseModel):
    threads: int = 1


def write_number(folder: Path, number: int) -> None:
    (folder / "number").write_text(str(number))
    with (folder.parents[5] / "computed").open("a") as log:
        print(folder.name, file=log)


UNITS = {f"unit-{i}": (i,) for i in range(4)}


class Stage:
    """Runs the units of a stage; knows which were computed in its last run."""

    def __init__(self, folder: Path, params: BaseModel | None = None) -> None:
        self.workspace, self.params = Workspace(folder), params or NoParams()

    def scratch(self) -> Scratch:
        return Scratch(self.workspace, "report", self.params, {})

    def run(self, publishes: bool = False) -> list[str]:
        log = self.workspace.root / "computed"
        log.unlink(missing_ok=True)
        with self.scratch() as scratch:
            if not (publishes and scratch.republish("kept")):
                folders = scratch.map("numbers", write_number, UNITS)
                assert [(folder / "number").read_text() for folder in folders.values()] == list("0123")
                if publishes:
                    scratch.keep("kept", folders["unit-3"])
                    with scratch.publish() as out:
                        (out / "result").write_text(
                            "".join((folder / "number").read_text() for folder in folders.values())
                        )
        return log.read_text().split() if log.exists() else []


@pytest.fixture
def stage(tmp_path) -> Stage:
    return Stage(tmp_path)


@pytest.fixture
def manifest(stage) -> Path:
    assert stage.run() == list(UNITS)
    return stage.scratch().folder / "manifest.jsonl"


@pytest.mark.parametrize("cut", [1, 20])
def test_a_cut_last_line_costs_its_unit_and_jams_nothing(stage, manifest, cut):
    os.truncate(manifest, manifest.stat().st_size - cut)
    assert stage.run() == ["unit-3"]
    assert stage.run() == []
    assert [json.loads(line)["unit"] for line in manifest.read_text().splitlines()] == list(UNITS)


def test_a_unit_whose_files_are_not_all_there_is_computed_again(stage, manifest):
    folder = stage.scratch().units
    (folder / "unit-1" / "number").unlink()
    shutil.rmtree(folder / "unit-2")
    assert stage.run() == ["unit-1", "unit-2"]


def test_an_unlisted_unit_folder_that_is_incomplete_is_replaced(stage, manifest):
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[:-1]))
    (stage.scratch().units / "unit-3" / "number").write_text("?")
    assert stage.run() == ["unit-3"]
    assert (stage.scratch().units / "unit-3" / "number").read_text() == "3"
    assert not list(stage.scratch().units.glob(".*"))


def test_an_attempt_that_finds_the_same_bits_leaves_them(tmp_path):
    folders = [attempt_folder(tmp_path, "unit") for _ in range(2)]
    for folder in folders:
        (folder / "number").write_text("7")
    files = finish_unit(folders[0], tmp_path / "unit")
    inode = (tmp_path / "unit" / "number").stat().st_ino
    assert finish_unit(folders[1], tmp_path / "unit") == files
    assert (tmp_path / "unit" / "number").stat().st_ino == inode


def test_a_part_that_was_dropped_is_not_missed(stage, manifest):
    with stage.scratch() as scratch:
        scratch.drop("unit-0", "number")
        scratch.drop("unit-0", "number")
    assert not (stage.scratch().units / "unit-0" / "number").exists()
    with stage.scratch() as scratch:
        assert all(scratch.done(name) for name in UNITS)


def test_a_finished_output_is_published_again_and_recomputed_when_forgotten(stage, capsys):
    assert stage.run(publishes=True) == list(UNITS)
    shutil.rmtree(stage.workspace.out("report"))
    assert stage.run(publishes=True) == [] and "publishing its output again" in capsys.readouterr().err
    assert (stage.workspace.out("report") / "result").read_text() == "0123"
    forget_output(stage.workspace, "report")
    assert stage.run(publishes=True) == list(UNITS)


@pytest.mark.parametrize("part", ["out/result", "out/manifest.json", "kept/number", "kept.json"])
@pytest.mark.parametrize("damage", ["flip", "lose"])
def test_what_its_digests_do_not_confirm_is_computed_again(stage, capsys, part, damage):
    stage.run(publishes=True)
    path = stage.scratch().folder / part
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flip":
        content[0] ^= 1
        path.write_bytes(content)
    assert stage.run(publishes=True) == list(UNITS)
    assert (stage.workspace.out("report") / "result").read_text() == "0123"
    assert "computed again" in capsys.readouterr().err or part == "out/manifest.json"


def test_another_device_or_library_starts_anew(tmp_path, monkeypatch):
    stage = Stage(tmp_path, Computing())
    assert stage.run() == list(UNITS)
    here = determinism.describe_machine()
    for changed in ({"device": "cuda NVIDIA H100"}, {"torch": "2.0"}):
        for module in (unit_work, determinism):
            monkeypatch.setattr(module, "describe_machine", lambda changed=changed: here | changed)
        monkeypatch.setattr(Inline, "machine", lambda _, changed=changed: here | changed)
        assert stage.run() == list(UNITS)
    monkeypatch.undo()
    assert stage.run() == []


def test_what_a_machine_says_of_itself(monkeypatch):
    import torch

    found = determinism.describe_machine()
    assert found["device"] == f"cpu {torch.backends.cpu.get_cpu_capability()}" or found["device"].startswith(
        ("cuda", "mps")
    )
    assert found["torch"] == torch.__version__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"Card {number}")
    monkeypatch.setenv("FISHERFOLD_DEVICE", "cuda:1")
    determinism._device_name.cache_clear()
    assert determinism.describe_machine()["device"] == "cuda Card 1"
    determinism._device_name.cache_clear()


def test_clearing_a_scratch_folder_leaves_the_lock_that_others_may_wait_for(stage):
    stage.run()
    lock = lock_file(stage.workspace, "report")
    inode = lock.stat().st_ino
    clear_scratch(stage.workspace, "report")
    assert not (stage.workspace.artifacts / "report.partial").exists()
    assert lock.stat().st_ino == inode
    stage.run()
    with lock_stage(stage.workspace, "report"):
        clear_scratch(stage.workspace, "report")
    assert (stage.workspace.artifacts / "report.partial").exists()
