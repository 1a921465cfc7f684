"""Locks between processes: a lock is a file that stays, held through filelock (flock) and given up with the process at the latest.

What the library lacks: the holder's name for others to read, and a look that takes no lock itself (one that did would make a start at
that moment fail). So the file holds ``PID HOST`` while it is held. It is never removed: a process that had opened it before would hold a
lock that nobody else sees.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


class Held(Exception):
    """Another process holds the lock; its text says which."""


@contextmanager
def locked(path: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock while the block runs.

    Args:
        path: of the lock's file; made if missing.
        on_wait: told once who holds it, before this waits; without it nothing waits.

    Raises:
        Held: another process holds it, and nothing waits.
        OSError: the file system keeps no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if on_wait is None:
            raise Held(_named(path)) from None
        on_wait(_named(path))
        lock.acquire()
    try:
        path.write_text(f"{os.getpid()} {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        with suppress(FileNotFoundError):  # the project may be gone by now
            os.truncate(path, 0)
        lock.release()


def holder(path: Path) -> str | None:
    """Who holds the lock, as its file says, without taking it; None if nobody does. Of another host it is not known whether they live."""
    try:
        process, host = path.read_text(encoding="utf-8").split()
    except (FileNotFoundError, ValueError):
        return None
    if host == socket.gethostname():
        return f"process {process}" if _lives(int(process), path.stat().st_mtime) else None
    return f"process {process} on {host}"


def _named(path: Path) -> str:
    return holder(path) or "an unknown process"


def _lives(pid: int, since: float) -> bool:
    """Whether the process that wrote its number then is there, and not a later one of the same number."""
    import psutil

    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= since + 1
    except psutil.NoSuchProcess:
        return False
