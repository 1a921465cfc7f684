"""What DVC says of the pipeline. DVC alone decides what is stale; this asks it, in this process, without running anything."""

import os
import subprocess
import sys
from pathlib import Path

from stages.errors import FisherfoldError
from stages.workspace import Workspace


def stale_reasons(workspace: Workspace, stage: str | None = None) -> dict[str, list[str]]:
    """Why each stage that is not up to date would run again, by stage name; `stage` asks for one alone.

    Raises:
        FisherfoldError: DVC cannot tell (another DVC process holds the repository's lock, or dvc.yaml is broken).
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(workspace.root)) as repo:
            status = repo.status(targets=[stage] if stage else None)
    except DvcException as error:
        raise FisherfoldError(f"DVC cannot read the state of {workspace.root}: {error}") from None
    return {
        name.rpartition(":")[2]: [text for change in changes for text in _describe(change)]
        for name, changes in status.items()
    }


def _describe(change: object) -> list[str]:
    """One entry of `dvc status` as short texts, such as ``params.yaml ranks modified``."""
    if not isinstance(change, dict):
        return [str(change)]
    texts = []
    for what, where in change.items():
        for path, state in where.items():
            detail = " ".join(f"{key} {value}" for key, value in state.items()) if isinstance(state, dict) else state
            texts.append(f"{path} {detail}" if what == "changed deps" else f"output {path} {detail}")
    return texts


def summary(reasons: list[str], shown: int = 3) -> str:
    """The first few reasons, changed parameters first, in one line."""
    ordered = sorted(reasons, key=lambda reason: not reason.startswith("params.yaml"))
    more = f" and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return "; ".join(ordered[:shown]) + more


def reproduce(workspace: Workspace, stage: str) -> int:
    """Run one stage through DVC, or restore it from DVC's run-cache; return the exit status of `dvc repro`."""
    command = [sys.executable, "-m", "dvc", "repro", "--quiet", "--single-item", stage]
    process = subprocess.Popen(command, cwd=workspace.root, env=tool_environment())
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def tool_environment() -> dict[str, str]:
    """This process's environment with the commands of its own Python first on the path."""
    commands = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": os.pathsep.join([commands, os.environ.get("PATH", os.defpath)])}
