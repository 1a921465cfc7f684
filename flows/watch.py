"""Run a command and watch it: its lines, its counts, its end, and an end to it when the run is cancelled.

The command writes to this process's terminal as if it were alone there (through a pseudo-terminal, so live bars stay
live), while every line that it finishes is also handed on as plain text. Counts come by fisherfold/run/progress.py's file.
"""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import Protocol

import psutil

from fisherfold.run.progress import WATCHED

INTERVAL = 0.5  # seconds between looks
GRACE = 20.0  # seconds a command is given to end by itself when it is stopped; Prefect's runner gives 30
SHELLS = {"sh", "bash", "dash", "zsh", "fish"}
ENDING = threading.Event()  # set when this process ends, so that commands watched in other threads end too
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-_]")


class Watcher(Protocol):
    """What is told of a command while it runs, always in the thread that called `run_watched`."""

    def line(self, text: str) -> None:
        """The command finished a line."""

    def progress(self, entry: dict) -> None:
        """The command counted; see fisherfold/run/progress.py."""

    def cancelled(self) -> bool:
        """Whether the command should be stopped."""


class Stopped(Exception):
    """The command was stopped because its watcher said so."""


def run_watched(
    command: Sequence[str], folder: Path, environment: dict[str, str], watcher: Watcher, echo: bool = True
) -> int:
    """Run `command` in `folder` and return its exit status; with `echo` what it says appears here as well.

    Whatever interrupts this function (Ctrl-C, a signal that raises, a cancelled run) ends the command and all that it
    started before it goes on.

    Raises:
        Stopped: the watcher asked for it.
    """
    if ENDING.is_set():
        raise Stopped
    with TemporaryDirectory(prefix="fisherfold-", ignore_cleanup_errors=True) as temporary:
        counts = Path(temporary) / "progress.jsonl"
        counts.touch()
        reader, writer = _channel()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, WATCHED: str(counts)},
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
        )
        os.close(writer)
        lines: SimpleQueue[str] = SimpleQueue()
        pump = threading.Thread(target=_pump, args=(reader, lines, echo), daemon=True)
        pump.start()
        try:
            return _attend(process, lines, counts, watcher, pump)
        except BaseException:
            stop(process)
            raise


def _attend(
    process: subprocess.Popen, lines: SimpleQueue, counts: Path, watcher: Watcher, pump: threading.Thread
) -> int:
    """Hand on what comes until the process has ended."""
    with counts.open(encoding="utf-8") as recorded:
        while True:
            status = _wait(process)
            if status is not None:
                pump.join(2 * INTERVAL)  # what the command left running may hold the channel open
            for text in _waiting(lines):
                watcher.line(text)
            for entry in recorded:
                watcher.progress(json.loads(entry))
            if status is not None:
                return status
            if ENDING.is_set() or watcher.cancelled():
                raise Stopped


def _wait(process: subprocess.Popen) -> int | None:
    try:
        return process.wait(INTERVAL)
    except subprocess.TimeoutExpired:
        return None


def _waiting(queue: SimpleQueue) -> Iterator[str]:
    while True:
        try:
            yield queue.get_nowait()
        except Empty:
            return


def _channel() -> tuple[int, int]:
    """(read, write) ends: a pseudo-terminal as wide as ours if we have one to ourselves, else a pipe."""
    if not sys.stderr.isatty() or threading.current_thread() is not threading.main_thread():
        return os.pipe()
    reader, writer = pty.openpty()
    attributes = termios.tcgetattr(writer)
    attributes[1] &= ~termios.OPOST  # the outer terminal turns line feeds into new lines
    termios.tcsetattr(writer, termios.TCSANOW, attributes)
    size = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
    fcntl.ioctl(writer, termios.TIOCSWINSZ, size)
    return reader, writer


def _pump(reader: int, lines: SimpleQueue, echo: bool) -> None:
    """Copy everything to our own standard error, if wanted, and every finished line to `lines`."""
    rest = b""
    with os.fdopen(reader, "rb", buffering=0) as source:
        while chunk := _read(source):
            if echo:
                sys.stderr.buffer.write(chunk)
                sys.stderr.flush()
            *finished, rest = (rest + chunk).split(b"\n")
            for line in finished:
                if text := plain(line):
                    lines.put(text)


def _read(source) -> bytes:
    try:
        return source.read(65536)
    except OSError:  # a pseudo-terminal whose other end is closed
        return b""


def plain(line: bytes) -> str:
    """What is left to read of a line in a terminal: without colours, and only what was written over the rest last."""
    return ESCAPES.sub(b"", line.rstrip(b"\r")).rpartition(b"\r")[2].decode(errors="replace").strip()


def stop(process: subprocess.Popen) -> None:
    """End a command and all that it started: what it runs first, so that it can note that end and clean up."""
    family = _descendants(process.pid)
    for member in _at_work(family):
        _signal(member, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=GRACE)
    for member in {*alive, *_descendants(process.pid)}:
        _signal(member, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _at_work(family: list[psutil.Process]) -> list[psutil.Process]:
    """What the first of a family runs, looking through shells; itself if it runs nothing."""
    looked_through = {member.pid for i, member in enumerate(family) if i == 0 or _name(member) in SHELLS}
    return [
        member for member in family[1:] if _parent(member) in looked_through and member.pid not in looked_through
    ] or family[:1]


def _name(member: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return member.name()
    return ""


def _parent(member: psutil.Process) -> int | None:
    with suppress(psutil.NoSuchProcess):
        return member.ppid()
    return None


def _signal(member: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        member.send_signal(number)
