"""One run at a time in a workspace, whoever started it: the command line, a schedule, another server's schedule."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fisherfold.run.workspace import Workspace


@contextmanager
def exclusive(workspace: Workspace, on_wait: Callable[[str], None], what: str = "run") -> Iterator[None]:
    """Hold the workspace for one run (or whatever `what` says); wait while another holds it.

    Waiting loses nothing: a run that waited finds up to date what the other computed. The lock ends with the process.

    Args:
        workspace: the project folder.
        on_wait: told once, in words, whom this waits for.
        what: runs wait for runs, sweeps for sweeps.
    """
    path = workspace.root / ".dvc" / "tmp" / f"fisherfold-{what}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            on_wait(f"waits for another {what} in {workspace.root} (process {file.read().strip() or 'unknown'})")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
