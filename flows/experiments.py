"""DVC experiments made in workspaces of their own, so that the user's workspace is neither changed nor waited for.

An experiment runs in a clone of the project below ``.dvc/tmp/sweep`` that shares the project's DVC cache: whatever any
workspace has computed with the same inputs is restored from the run-cache by links. Its scratch folders stay with it, so
a killed experiment goes on unit by unit. When it is finished it becomes a DVC experiment of the commit it was made from,
as `dvc exp run` would make it: `dvc exp show` lists it, `dvc exp apply NAME` brings it into the workspace.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from fisherfold.run.errors import FisherfoldError
from fisherfold.run.files import digest_file, digest_json
from fisherfold.run.workspace import Workspace
from fisherfold.run.yaml_text import parse_yaml
from flows.overrides import overridden
from flows.repository import repository
from flows.staleness import tool_environment

PARAMS = "params.yaml"
LOCK = "dvc.lock"
OURS = (".dvc/", "artifacts/", "data/prepared", LOCK)  # what a clone has of its own


@dataclass(frozen=True)
class Project:
    """A workspace in git, at the commit it stands on with its changes since.

    Attributes:
        workspace: the project folder.
        commit: its git commit; experiments belong to it.
        inside: the folder within the git repository.
    """

    workspace: Workspace
    commit: str
    inside: Path

    @classmethod
    def of(cls, workspace: Workspace) -> "Project":
        """The project of a workspace.

        Raises:
            FisherfoldError: it is in no git repository, or nothing is committed.
        """
        try:
            commit = _git(workspace.root, "rev-parse", "--verify", "HEAD")
            return cls(workspace, commit, Path(_git(workspace.root, "rev-parse", "--show-prefix") or "."))
        except FisherfoldError as error:
            raise FisherfoldError(
                f"{workspace.root} has no git commit that experiments could belong to ({error}). "
                "Make one: git init; git add .; git commit -m 'First'."
            ) from None

    @property
    def _clones(self) -> Path:
        return self.workspace.root / ".dvc" / "tmp" / "sweep"

    @property
    def refs(self) -> str:
        """Where git keeps the experiments of this commit."""
        return f"refs/exps/{self.commit[:2]}/{self.commit[2:]}"

    def digest(self, overrides: Sequence[str]) -> str:
        """What determines an experiment: parameters, and every file that dvc.yaml names and no stage writes."""
        root = self.workspace.root
        _, params = overridden(root / PARAMS, overrides)
        pipeline = parse_yaml(root / "dvc.yaml")["stages"].values()
        names = {name for stage in pipeline for name in stage["deps"] if not name.startswith(OURS)}
        files = [file for name in sorted(names) for file in _files(root / name)]
        contents = {file.relative_to(root).as_posix(): digest_file(file) for file in files}
        return digest_json({"params": params.model_dump(mode="json"), "files": contents})

    def clone(self, name: str, overrides: Sequence[str]) -> Workspace:
        """The workspace of an experiment, with its parameters; the one that a killed run of it left, if there is one."""
        root = self._clones / name
        workspace = Workspace(root / self.inside)
        if not (root / ".git" / "ready").exists():
            shutil.rmtree(root, ignore_errors=True)
            self._populate(root)
            (workspace.root / PARAMS).write_text(
                overridden(self.workspace.root / PARAMS, overrides)[0], encoding="utf-8"
            )
            _share_cache(self.workspace, workspace)
            (root / ".git" / "ready").touch()
        return workspace

    def forget(self, outdated: Callable[[str], bool]) -> None:
        """Remove the clones that killed runs left, of those names of which this is true."""
        for folder in self._clones.glob("*"):
            if outdated(folder.name):
                shutil.rmtree(folder)

    def save(self, name: str, clone: Workspace) -> None:
        """Make the state of a clone a DVC experiment of the project, and remove the clone."""
        run_dvc(clone.root, "exp", "save", "--quiet", "--force", "--name", name)
        _git(clone.root, "push", "--quiet", "--force", "origin", f"{self.refs}/{name}:{self.refs}/{name}")
        shutil.rmtree(self._clones / name)

    def metrics(self, names: Collection[str]) -> dict[str, dict]:
        """metrics.json of those of these experiments that are finished, and whose results DVC still has."""
        found = {}
        for name, data in shown_experiments(self.workspace, "--rev", self.commit).items():
            values = data["metrics"].get("artifacts/evaluate/metrics.json", {})
            if name in names and "data" in values:
                found[name] = values["data"]
        return found

    def _populate(self, root: Path) -> None:
        """A clone with the files of git as they are now, links to all others, and the outputs known to DVC."""
        top = Path(_git(self.workspace.root, "rev-parse", "--show-toplevel"))
        _git(top, "clone", "--quiet", "--shared", "--no-checkout", str(top), str(root))
        _git(root, "update-ref", "--no-deref", "HEAD", self.commit)
        _git(root, "reset", "--quiet")
        for who in ("user.name", "user.email"):
            if value := _git(top, "config", "--default", "fisherfold", "--get", who):
                _git(root, "config", who, value)
        for name in filter(None, _git(top, "ls-files", "-z").split("\0")):
            if (top / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(top / name, root / name, follow_symlinks=False)
        source, target = self.workspace.root, root / self.inside
        for name in filter(None, _git(source, "ls-files", "-z", "--others", "--directory").split("\0")):
            if not name.startswith(OURS) and "__pycache__" not in name and not (target / name).exists():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).symlink_to(source / name)
        for name in (LOCK, ".dvc/config.local"):
            if (source / name).exists():
                shutil.copy2(source / name, target / name)


def shown_experiments(workspace: Workspace, *options: str) -> dict[str, dict]:
    """What `dvc exp show` tells of every experiment, by its name: params and metrics.

    Raises:
        FisherfoldError: the workspace is not in git.
    """
    shown = json.loads(run_dvc(workspace.root, "exp", "show", "--json", *options))
    entries = (entry for baseline in shown for entry in baseline.get("experiments") or ())
    return {entry["name"]: entry["revs"][0]["data"] for entry in entries if entry.get("name")}


def _share_cache(project: Workspace, clone: Workspace) -> None:
    with repository(project) as repo:
        cache = repo.cache.local_cache_dir
    with repository(clone) as repo, repo.config.edit("local") as config:
        config["cache"]["dir"] = cache


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return [path] if path.exists() else []


def _git(folder: Path, *words: str) -> str:
    return _output(["git", "-C", str(folder), *words], folder)


def run_dvc(folder: Path, *words: str) -> str:
    """What a command of DVC prints.

    Raises:
        FisherfoldError: it failed; the message ends with what it said.
    """
    return _output([sys.executable, "-m", "dvc", *words], folder)


def _output(command: list[str], folder: Path) -> str:
    """What a command prints.

    Raises:
        FisherfoldError: it failed; the message ends with what it said.
    """
    result = subprocess.run(
        command, cwd=folder, env=tool_environment(), capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
    if result.returncode:
        said = " ".join((result.stderr or result.stdout).strip().splitlines()[-2:])
        raise FisherfoldError(f"`{' '.join(command[:6])}` failed in {folder}: {said}")
    return result.stdout.strip()
