"""DVC's repository of a workspace, opened in this process; also where there is no git, as in a folder that was downloaded."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from fisherfold.run.errors import FisherfoldError
from fisherfold.run.progress import announce
from fisherfold.run.workspace import Workspace

if TYPE_CHECKING:
    from dvc.repo import Repo

one_at_a_time = threading.Lock()  # a sweep asks for several workspaces; DVC's own objects are not made for threads


@contextmanager
def repository(workspace: Workspace) -> Iterator["Repo"]:
    """The repository, for one thread at a time.

    Raises:
        FisherfoldError: there is none.
    """
    from dvc.repo import Repo
    from dvc.scm import SCMError

    if not (workspace.root / ".dvc").is_dir():
        raise FisherfoldError(
            f"{workspace.root} is not a DVC repository: `dvc init` there (with --no-scm outside of git)."
        )
    with one_at_a_time:
        try:
            repo = Repo(str(workspace.root))
        except SCMError:
            _do_without_git(workspace)
            repo = Repo(str(workspace.root))
        with repo:
            yield repo


def _do_without_git(workspace: Workspace) -> None:
    """Tell DVC, here alone, that no git keeps this folder; all but experiments works without."""
    from dvc.config import Config

    with Config(str(workspace.root / ".dvc"), validate=False).edit("local") as config:
        config["core"]["no_scm"] = True
    announce(
        "fisherfold",
        "no git here, so DVC does without (core.no_scm in .dvc/config.local); for `sweep`: git init, commit, "
        "dvc config --local --unset core.no_scm",
    )


def recorded(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """What dvc.lock holds of each stage that has run: its command, dependencies, parameters and outputs."""
    path = workspace.root / "dvc.lock"
    document = YAML(typ="safe").load(path) if path.exists() else None
    return (document or {}).get("stages") or {}
