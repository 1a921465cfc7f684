"""DVC's repository of a workspace, opened in this process; also where there is no git, as in a folder that was downloaded."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ruamel.yaml.error import YAMLError

from fisherfold.run.errors import CorruptArtifact, FisherfoldError, first_line
from fisherfold.run.progress import announce
from fisherfold.run.workspace import Workspace
from fisherfold.run.yaml_text import parse_yaml

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
    """What dvc.lock holds of each stage that has run: its command, dependencies, parameters and outputs.

    Raises:
        CorruptArtifact: it is not what DVC writes.
    """
    path = workspace.root / "dvc.lock"
    try:
        stages = ((parse_yaml(path) if path.exists() else None) or {}).get("stages") or {}
        return {name: dict(facts) for name, facts in stages.items()}
    except (YAMLError, AttributeError, TypeError, ValueError) as error:
        raise CorruptArtifact(
            f"{path} is not what DVC writes ({first_line(error)}). Take it from git again, or remove it: stages then run "
            "anew, from their finished units."
        ) from None
