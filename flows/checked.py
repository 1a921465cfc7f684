"""Stage `check` of dvc.yaml: parameters and inputs are sound. What it writes says nothing else, so no later stage becomes stale by it."""

from fisherfold.run.workspace import Workspace
from flows.experiments import run_dvc

CHECK = "check"
TEXT = "Parameters and inputs were checked.\n"


def write_checked(workspace: Workspace) -> None:
    """Write what the first stage depends on."""
    path = workspace.artifacts / "checked.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != TEXT:
        path.write_text(TEXT, encoding="utf-8")


def record_check(workspace: Workspace) -> None:
    """Tell DVC that stage `check` is done, when its work was: `dvc repro` need not repeat it.

    Raises:
        FisherfoldError: DVC cannot keep it.
    """
    write_checked(workspace)
    run_dvc(workspace.root, "--wait-for-lock", "commit", "--quiet", "--force", CHECK)
