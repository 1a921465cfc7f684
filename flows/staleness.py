"""What DVC says of the pipeline. DVC alone decides what is stale; this asks it, in this process, without running anything."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from fisherfold.run.errors import FisherfoldError
from fisherfold.run.workspace import Workspace
from flows.repository import recorded, repository
from flows.verbosity import is_verbose
from flows.watch import Watcher, run_watched

if TYPE_CHECKING:
    from dvc.repo import Repo

NEVER = "never run"


def stale_reasons(workspace: Workspace, stage: str | None = None) -> dict[str, list[str]]:
    """Why each stage that is not up to date would run again, by stage name; `stage` asks for one alone.

    Stage `check` of dvc.yaml is among them: it computes nothing.

    Raises:
        FisherfoldError: DVC cannot tell (another DVC process holds the repository's lock, or dvc.yaml is broken).
    """
    from dvc.exceptions import DvcException

    try:
        with repository(workspace) as repo:
            release_dead_locks(workspace)
            status = _status(repo, str(workspace.root / "dvc.yaml"), stage) if stage else repo.status()
    except DvcException as error:
        raise FisherfoldError(f"DVC cannot read the state of {workspace.root}: {error}") from None
    known = recorded(workspace)
    reasons = {name.rpartition(":")[2]: changes for name, changes in status.items()}
    return {
        name: [text for change in changes for text in _describe(change)] if name in known else [NEVER]
        for name, changes in reasons.items()
    }


def _status(repo: "Repo", pipeline: str, stage: str) -> dict[str, list[Any]]:
    """DVC's status of one stage. Its own command looks a bare name up in the current folder, and a path it cuts at the end of a line."""
    from dvc.repo import lock_repo

    with lock_repo(repo):
        status: dict[str, list[Any]] = repo.stage.load_one(path=pipeline, name=stage).status(check_updates=True)
        return status


def release_dead_locks(workspace: Workspace) -> None:
    """Take back what killed DVC processes hold of outputs and dependencies.

    DVC does so itself for processes that are gone, but not for those that are dead and not yet reaped by their parent; and it
    refuses a list of locks that a killed process has left half written.
    """
    from dvc.lock import make_lock
    from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK

    folder = workspace.root / ".dvc" / "tmp"
    path = folder / RWLOCK_FILE
    if not path.exists():
        return
    with make_lock(str(folder / RWLOCK_LOCK), tmp_dir=str(folder)):  # who writes the list holds this
        try:
            locks = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            locks = None
        alive = {mode: _living_holders(paths) for mode, paths in (locks or {}).items()}
        if alive != locks:
            partial = path.with_name(f"{RWLOCK_FILE}.partial")
            partial.write_text(json.dumps(alive), encoding="utf-8")
            partial.replace(path)


def _living_holders(paths: dict) -> dict:
    """The part of one mode's entries whose processes live: ``{path: {pid, cmd}}`` of writers, ``{path: [{pid, cmd}, …]}`` of readers."""
    kept = {}
    for path, held in paths.items():
        living = [holder for holder in (held if isinstance(held, list) else [held]) if _lives(int(holder["pid"]))]
        if living:
            kept[path] = living if isinstance(held, list) else living[0]
    return kept


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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


def reproduce(
    workspace: Workspace, stage: str, watcher: Watcher, variables: Mapping[str, str], echo: bool = True
) -> int:
    """Run one stage through DVC, or restore it from DVC's run-cache; return the exit status of `dvc repro`.

    Args:
        workspace: the project folder.
        stage: its name.
        watcher: is told what happens.
        variables: of the environment, for the stage's process.
        echo: whether what it says appears here.

    Raises:
        Stopped: the watcher asked for it.
    """
    loudness = [] if is_verbose() else ["--quiet"]
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *loudness, "--single-item", stage]
    return run_watched(command, workspace.root, {**tool_environment(), **variables}, watcher, echo)


def tool_environment() -> dict[str, str]:
    """This process's environment with the commands of its own Python first on the path.

    DVC runs a stage's command in the user's SHELL; that of a service's account, /sbin/nologin, runs nothing.
    """
    commands = str(Path(sys.executable).parent)
    path = os.pathsep.join([commands, os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "SHELL": "/bin/sh"}
