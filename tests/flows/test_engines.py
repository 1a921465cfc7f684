"""Units on engines: what `Scratch` promises whichever engine runs them, and how an engine is chosen."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import BaseModel
from shuffled import Shuffled

from fisherfold.run import unit_work
from fisherfold.run.determinism import STREAMED, WHOLE, chosen_placement, computing_threads, describe_machine
from fisherfold.run.engine import Files, Unit, use_engine
from fisherfold.run.errors import EngineError, ParameterError
from fisherfold.run.scratch import Scratch
from fisherfold.run.source import code_digest
from fisherfold.run.unit_work import StageWork, attempt_folder, finish_unit, write_unit
from fisherfold.run.workspace import Workspace
from flows import cli
from flows.engine_choice import run_on_engine
from flows.settings import Settings, read_settings


class NoParams(BaseModel):
    pass


def write_number(folder: Path, number: int) -> None:
    (folder / "number").write_text(str(number))


def test_finished_units_are_not_given_out_again(tmp_path):
    units = {f"unit-{i}": (i,) for i in range(6)}
    first, second = Shuffled(2, 0), Shuffled(2, 1)
    with use_engine(first), Scratch(Workspace(tmp_path), "report", NoParams(), {}) as run:
        run.map("half of it", write_number, dict(list(units.items())[:3]))
    with use_engine(second), Scratch(Workspace(tmp_path), "report", NoParams(), {}) as run:
        folders = run.map("all of it", write_number, units)
        assert [(folder / "number").read_text() for folder in folders.values()] == [str(i) for i in range(6)]
    assert set(first.given_out).isdisjoint(second.given_out) and len(second.given_out) == 3


def test_small_pieces_share_a_unit_and_each_has_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(unit_work, "SMALL", 10)
    assert unit_work.share({"a": 0, "b": 11}) == [["a"], ["b"]]
    assert unit_work.share({"a": 4, "b": 6, "c": 1, "d": 30, "e": 10, "f": 0}) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    sizes = dict(zip("abcdef", (4, 4, 4, 30, 9, 1)))
    engine = Shuffled(2, 0)
    with use_engine(engine), Scratch(Workspace(tmp_path), "report", NoParams(), {}) as run:
        folders = run.map("all", write_number, {name: (size,) for name, size in sizes.items()}, sizes)
        assert {name: int((folder / "number").read_text()) for name, folder in folders.items()} == sizes
    assert sorted(engine.given_out) == ["a.and-1-more", "c", "d", "e.and-1-more"]


def test_of_two_attempts_at_a_unit_the_first_stays(tmp_path):
    """A host that was given up for lost goes on writing while another does its work."""
    lost, other = attempt_folder(tmp_path, "unit"), attempt_folder(tmp_path, "unit")
    for attempt in (lost, other):
        write_number(attempt, 7)
    assert finish_unit(other, tmp_path / "unit") == finish_unit(lost, tmp_path / "unit")
    assert [path.name for path in tmp_path.iterdir()] == ["unit"]


def stage_work(folder: Path, **changes: object) -> StageWork:
    return replace(StageWork("report", code_digest("report"), describe_machine(), folder, None, WHOLE, None), **changes)


def test_a_worker_places_models_as_the_stage_does(tmp_path):
    def work(folder: Path) -> None:
        (folder / "found").write_text(chosen_placement())

    write_unit(stage_work(tmp_path, placement=STREAMED), "unit", Unit(work, ()))
    assert (tmp_path / "unit" / "found").read_text() == STREAMED and chosen_placement() == WHOLE


def test_a_failed_attempt_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_unit(stage_work(tmp_path), "unit", Unit(write_number, ()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"code": "another"}, "another source text"),
        (
            {"machine": describe_machine() | {"device": "cuda H100", "torch": "1.0"}},
            "device 'cpu.*' where others have 'cuda H100', torch",
        ),
        ({"units": Path("/nowhere")}, "is not to be seen on"),
    ],
)
def test_a_host_that_could_compute_something_else_or_in_vain_refuses(tmp_path, monkeypatch, changes, says):
    monkeypatch.setattr(unit_work, "SIGHT_SECONDS", 0.1)
    with pytest.raises(EngineError, match=says):
        write_unit(stage_work(tmp_path, **changes), "unit", Unit(write_number, (1,)))
    assert not list(tmp_path.iterdir()) and not Path("/nowhere").exists()


class Elsewhere:
    """An engine whose workers have another file system."""

    slots = 1

    def machine(self) -> dict[str, str]:
        return {}

    def run(self, write: Callable[[str, Unit], Files], units: Mapping[str, Unit]) -> Iterator[tuple[str, Files]]:
        yield next(iter(units)), {"number": {"bytes": 1, "sha256": "0" * 64}}


def test_a_unit_that_is_not_to_be_seen_here_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(unit_work, "SIGHT_SECONDS", 0.1)
    with use_engine(Elsewhere()), Scratch(Workspace(tmp_path), "report", NoParams(), {}) as run:
        with pytest.raises(EngineError, match="file system that all nodes share"):
            run.map("numbers", write_number, {"unit": (1,)})
        assert not run.done("unit")


class Threads(BaseModel):
    threads: int


def note_threads(folder: Path) -> None:
    import torch
    from threadpoolctl import threadpool_info

    blas = {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
    (folder / "threads").write_text(repr((torch.get_num_threads(), blas)))


@pytest.mark.parametrize("threads", [1, 3])
def test_every_unit_computes_with_the_threads_of_its_stage(tmp_path, threads):
    with Scratch(Workspace(tmp_path), "report", Threads(threads=threads), {}) as run:
        folders = run.map("threads", note_threads, {"unit": ()})
        assert (folders["unit"] / "threads").read_text() == repr((threads, {threads}))


def test_threads_are_given_back():
    import torch

    before = torch.get_num_threads()
    with computing_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_settings_come_from_the_environment(monkeypatch):
    assert read_settings() == Settings(engine="inline")
    for name, value in {"ENGINE": "ray", "NUM_GPUS": "0.5", "MEMORY": "16GB", "RAY_ADDRESS": ""}.items():
        monkeypatch.setenv(f"FISHERFOLD_{name}", value)
    found = read_settings()
    assert (found.engine, found.num_gpus, found.memory, found.ray_address) == ("ray", 0.5, 16 * 10**9, None)
    monkeypatch.setenv("FISHERFOLD_NUM_GPUS", "many")
    with pytest.raises(ParameterError, match="FISHERFOLD_NUM_GPUS='many'"):
        read_settings()


def test_without_the_extra_inline_works_and_ray_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("FISHERFOLD_ENGINE", "inline")
    done = []
    run_on_engine("capture", lambda: done.append(True), Settings(engine="inline"), 1)
    assert done == [True]
    assert cli.main(["run", "--engine", "ray"]) == 1
    assert "pip install 'fisherfold[cluster]'" in capsys.readouterr().err
