"""What stages took and how fast models are: kept for the output that it belongs to, lost by no interruption."""

import time

import pytest

from fisherfold.run import times
from fisherfold.run.params import Params
from fisherfold.run.scratch import Scratch
from fisherfold.run.times import note_speed, read_times, speed, stage_times, timed
from fisherfold.run.workspace import Workspace


def publish(workspace: Workspace, stage: str, text: str) -> None:
    params = getattr(Params(), stage)
    with Scratch(workspace, stage, params, {"text": text}) as scratch, scratch.publish() as out:
        (out / "facts.json").write_text(text)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that each process of a stage takes, in turn."""
    taken: list[float] = []
    monkeypatch.setattr(times, "_of_this_process", lambda: {"seconds": taken.pop(0), "written_bytes": 7})
    return taken


def test_what_an_interrupted_stage_took_counts_for_the_output_that_it_leads_to(tmp_path, clock):
    workspace = Workspace(tmp_path)
    clock += [100.0, 20.0, 3.0]
    with pytest.raises(KeyboardInterrupt), timed(workspace, "ranks"):
        raise KeyboardInterrupt
    assert stage_times(workspace) == {}
    with timed(workspace, "ranks"):
        publish(workspace, "ranks", "first")
    assert stage_times(workspace)["ranks"]["seconds"] == 120.0
    with timed(workspace, "ranks"):  # the same output, published again
        pass
    found = stage_times(workspace)["ranks"]
    assert (found["seconds"], found["written_bytes"]) == (120.0, 14) and found["peak_bytes"] > 1e6


def test_a_stage_s_process_is_measured_by_what_it_did(tmp_path):
    workspace = Workspace(tmp_path)
    before, begin = times._of_this_process(), time.process_time()
    (tmp_path / "file").write_bytes(bytes(10**6))
    while time.process_time() < begin + 0.1:  # the system counts in ticks of a hundredth of a second
        pass
    now = times._of_this_process()
    assert now["cpu_seconds"] > before["cpu_seconds"] and now["seconds"] > before["seconds"]
    if now["written_bytes"]:  # where the system counts
        assert 10**6 <= now["written_bytes"] - before["written_bytes"] < 2 * 10**6
    with timed(workspace, "ranks"):
        publish(workspace, "ranks", "first")
    assert {"seconds", "cpu_seconds", "peak_bytes", "written_bytes"} == set(stage_times(workspace)["ranks"])


def test_an_output_that_comes_back_has_its_own_figures(tmp_path, clock):
    workspace = Workspace(tmp_path)
    clock += [10.0, 20.0]
    for text in ("first", "second"):
        publish(workspace, "factorize", text)
        with timed(workspace, "factorize"):
            pass
        note_speed(workspace, {"answering": text})
    assert (stage_times(workspace)["factorize"]["seconds"], speed(workspace)) == (20.0, {"answering": "second"})
    publish(workspace, "factorize", "first")
    assert (stage_times(workspace)["factorize"]["seconds"], speed(workspace)) == (10.0, {"answering": "first"})


def test_a_file_that_is_damaged_or_not_there_says_nothing(tmp_path):
    workspace = Workspace(tmp_path)
    empty = {"stages": {}, "unfinished": {}, "speed": {}}
    assert read_times(workspace) == empty and stage_times(workspace) == {} and speed(workspace) is None
    workspace.artifacts.mkdir()
    (workspace.artifacts / "times.json").write_text('{"stages": ')
    assert read_times(workspace) == empty
