"""A command that is watched: what it says arrives, on a terminal it looks as if alone, and it ends with all it started."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from watched import COUNT, Notes

from flows import watch
from flows.watch import Stopped, plain, run_watched

OUTER = """
import os, sys
from pathlib import Path
from watched import COUNT, Notes
from flows.watch import run_watched
notes = Notes()
run_watched([sys.executable, "-c", COUNT], Path(), dict(os.environ), notes)
Path(sys.argv[1]).write_text("\\n".join(notes.lines))
"""
STUBBORN = """
import signal, subprocess, sys, time
inner = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
subprocess.run([sys.executable, "-c", inner])
"""


def test_lines_counts_and_status_arrive(tmp_path):
    notes = Notes()
    status = run_watched([sys.executable, "-c", COUNT], tmp_path, dict(os.environ), notes)
    assert status == 7
    assert [line for line in notes.lines if "shard " in line] == [f"capture: shard {i}" for i in range(3)]
    assert [entry["done"] for entry in notes.entries] == [0, 1, 2, 3]  # inner counts are not units
    assert notes.entries[-1] == {"stage": "capture", "doing": "shards", "done": 3, "total": 3, "left": 0.0}


def test_a_terminal_keeps_its_live_bar_and_lines_come_out_plain(tmp_path):
    reader, writer = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", OUTER, str(tmp_path / "lines")]
    process = subprocess.Popen(words, stdin=writer, stdout=writer, stderr=writer, env=environment)
    os.close(writer)
    screen = b""
    while chunk := read(reader):
        screen += chunk
    assert process.wait() == 0, screen.decode()
    assert "━".encode() in screen and b"\x1b[2K" in screen  # a bar, drawn over itself
    lines = (tmp_path / "lines").read_text().splitlines()
    assert "capture: shard 1" in lines
    assert not [line for line in lines if "\x1b" in line or "\r" in line]


def read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


def test_a_stopped_command_takes_all_it_started_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "GRACE", 1.0)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(Stopped):
        run_watched([sys.executable, "-c", STUBBORN], tmp_path, dict(os.environ), Notes("ready"))
    time.sleep(0.1)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_an_interrupt_ends_the_command(tmp_path):
    class Interrupted(Notes):
        def cancelled(self) -> bool:
            if self.lines:
                raise KeyboardInterrupt
            return False

    script = "import time; print('ready', flush=True); time.sleep(60)"
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_watched([sys.executable, "-c", script], tmp_path, dict(os.environ), Interrupted())
    assert time.monotonic() - start < 20


def test_the_command_is_the_users_to_end_first():
    """The watched command hears of the end before those that wait for it: a shell in between is looked through."""
    process = subprocess.Popen(["sh", "-c", "sleep 60; true"])
    try:
        family = []
        while "sleep" not in [member.name() for member in family]:  # a child is a second shell until it has started
            time.sleep(0.01)
            family = watch._descendants(process.pid)
        (root,) = [member for member in family if member.pid == process.pid]
        assert [member.name() for member in watch._at_work([psutil.Process(), *family])] == ["sleep"]
        assert root.name() == "sh"
    finally:
        watch.stop(process)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\x1b[1mcapture\x1b[0m: begins\r", "capture: begins"),
        (b"bar 1/3\r\x1b[2K\x1b[1mcapture\x1b[0m: shard 2", "capture: shard 2"),
        (b"\x1b[?25l", ""),
        ("naïve ━".encode(), "naïve ━"),
        (b"\xff", "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_plain(raw, text):
    assert plain(raw) == text


def test_watching_needs_no_terminal(tmp_path):
    """The folder of the counts may vanish under an orphan: its work goes on."""
    environment = {**os.environ, "FISHERFOLD_PROGRESS": str(tmp_path / "gone" / "file")}
    result = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, cwd=Path())
    assert result.returncode == 7, result.stderr
