"""Units that a stage's process hands to its run: what either side is told of the other, with a stage in another thread."""

import threading
from multiprocessing.connection import Client
from pathlib import Path

import pytest
from shuffled import Shuffled

from fisherfold.run.engine import Inline, Unit, use_engine
from fisherfold.run.errors import EngineError, FisherfoldError, NumericalError
from fisherfold.run.params import SubspaceParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.workspace import Workspace
from flows.cluster.unit_channel import answer, engine_of_run, taking_units


def write_sum(folder: Path, *parts: Path) -> None:
    (folder / "number").write_text(str(sum(int((part / "number").read_text()) for part in parts) or 1))


def fail(folder: Path) -> None:
    raise NumericalError("this unit's data is bad")


class Run:
    """The run's side; `end` is how a stage ended for it."""

    def __init__(self, engine=Inline) -> None:
        self.engine, self.threads, self.end = engine, None, None

    def take(self, connection, threads) -> None:
        self.threads = threads
        try:
            answer(connection, self.engine())
            self.end = "well"
        except Exception as error:
            self.end = error
            raise


def stage(folder: Path, address: str, units: dict[str, Unit]) -> list[str]:
    scratch = Scratch(Workspace(folder), "subspace", SubspaceParams(), {})
    with engine_of_run(address, "subspace", 1) as engine, use_engine(engine), scratch:
        return list(scratch.run("units", units))


def test_units_run_on_the_engine_of_the_run_in_an_order_it_may_choose(tmp_path):
    engine = Shuffled(3, 0)
    run = Run(lambda: engine)
    leaves = {f"leaf-{i}": Unit(write_sum, ()) for i in range(6)}
    with taking_units(run.take) as address, engine_of_run(address, "subspace", 1) as theirs, use_engine(theirs):
        assert theirs.slots == engine.slots
        with Scratch(Workspace(tmp_path), "subspace", SubspaceParams(), {}) as scratch:
            parts = tuple(scratch.units / name for name in leaves)
            sums = {"sum": Unit(write_sum, parts, tuple(leaves))}
            assert sorted(scratch.run("units", leaves | sums)) == sorted(leaves | sums)
            assert (scratch.units / "sum" / "number").read_text() == "6"
            assert list(scratch.map("no units", write_sum, {})) == []
            assert list(scratch.map("others", write_sum, {"other": ()})) == ["other"]
    assert (run.end, run.threads) == ("well", 1)
    assert sorted(engine.given_out) == sorted([*leaves, "sum", "other"])


def test_what_fails_in_a_unit_fails_in_the_stage_and_the_run_hears_why(tmp_path):
    run = Run()
    with pytest.raises(NumericalError, match="data is bad"), taking_units(run.take) as address:
        stage(tmp_path, address, {"unit": Unit(fail, ())})
    assert isinstance(run.end, NumericalError)


def test_what_fails_in_the_stage_itself_fails_for_the_run(tmp_path):
    run = Run()
    with pytest.raises(ValueError, match="not a unit name"), taking_units(run.take) as address:
        stage(tmp_path, address, {"../up": Unit(write_sum, ())})
    assert isinstance(run.end, FisherfoldError) and "not a unit name" in str(run.end)


def test_an_engine_that_cannot_be_had_is_the_stage_s_error(tmp_path):
    def none():
        raise EngineError("no node offers that")

    with pytest.raises(EngineError, match="no node offers that"), taking_units(Run(none).take) as address:
        stage(tmp_path, address, {})


def test_no_stage_may_come():
    run, before = Run(), threading.active_count()
    with taking_units(run.take):
        pass
    assert run.threads is None
    assert threading.active_count() == before


def test_a_run_that_ends_ends_its_stage(tmp_path):
    def gone(connection, threads):
        connection.close()

    with pytest.raises(EngineError, match="run again to go on"), taking_units(gone) as address:
        stage(tmp_path, address, {})


def test_a_stage_that_is_killed_gives_its_units_up():
    run = Run()
    with taking_units(run.take) as address, Client(address) as connection:
        connection.send(1)
        assert connection.recv() == 1
        connection.send({})
    assert isinstance(run.end, EOFError | ConnectionError)
