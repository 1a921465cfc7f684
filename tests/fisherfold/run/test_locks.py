"""Locks between processes: they keep others out, name their holder, and are looked at without being taken."""

import os
import socket
import subprocess
import sys

import pytest

from fisherfold.run.locks import Held, holder, locked

HOLD = """
import sys
from pathlib import Path
from fisherfold.run.locks import locked
with locked(Path(sys.argv[1]), lambda who: print("waits for", who, flush=True)):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "locks" / "stage"


def another(path) -> subprocess.Popen:
    words = [sys.executable, "-c", HOLD, str(path)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_another_process_is_kept_out_named_and_waited_for(path):
    process = another(path)
    assert process.stdout.readline() == "holds\n"
    assert holder(path) == f"process {process.pid}"
    with pytest.raises(Held, match=f"process {process.pid}"), locked(path):
        raise AssertionError("held twice")
    waiting = another(path)
    assert waiting.stdout.readline() == f"waits for process {process.pid}\n"
    process.kill()
    process.wait()
    assert waiting.stdout.readline() == "holds\n"
    assert holder(path) == f"process {waiting.pid}"
    waiting.communicate()
    assert holder(path) is None and path.exists()


def test_whoever_is_dead_holds_nothing(path):
    process = another(path)
    process.stdout.readline()
    process.kill()
    process.wait()
    assert path.read_text().split() == [str(process.pid), socket.gethostname()]
    assert holder(path) is None


def test_a_look_takes_no_lock(path, monkeypatch):
    with locked(path):
        assert holder(path) == f"process {os.getpid()}"
    monkeypatch.setattr("filelock.FileLock.acquire", lambda *_, **__: pytest.fail("a look took the lock"))
    assert holder(path) is None and holder(path.with_name("missing")) is None


def test_a_holder_on_another_host_is_named_with_it(path):
    path.parent.mkdir()
    path.write_text("12 another-host\n")
    assert holder(path) == "process 12 on another-host"


def test_it_is_given_up_when_the_block_fails(path):
    with pytest.raises(ValueError), locked(path):
        raise ValueError
    with locked(path):
        pass
