"""One run at a time in a workspace, whoever started it: the command line, a schedule, another server's schedule."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from fisherfold.run.locks import locked
from fisherfold.run.workspace import Workspace


def exclusive(workspace: Workspace, on_wait: Callable[[str], None], what: str = "run") -> AbstractContextManager[None]:
    """Hold the workspace for one run (or whatever `what` says); wait while another holds it.

    Waiting loses nothing: a run that waited finds up to date what the other computed. The lock ends with the process.

    Args:
        workspace: the project folder.
        on_wait: told once, in words, whom this waits for.
        what: runs wait for runs, sweeps for sweeps.
    """
    path = workspace.root / ".dvc" / "tmp" / f"fisherfold-{what}.lock"
    return locked(path, lambda holder: on_wait(f"waits for another {what} in {workspace.root} ({holder})"))
