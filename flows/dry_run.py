"""`fisherfold run --dry`: which stages would run, and why; nothing is changed."""

from collections.abc import Sequence

from fisherfold.run.workspace import Workspace
from flows.overrides import changes
from flows.staleness import stale_reasons, summary
from flows.tables import print_table


def dry_run(workspace: Workspace, stages: Sequence[str], assignments: Sequence[str]) -> list[tuple[str, str, str]]:
    """Stage, what would become of it, and why. DVC knows what is stale now; what an earlier stage writes is not known before it has run."""
    reasons = stale_reasons(workspace)
    for change in changes(workspace.root / "params.yaml", assignments):
        block = change.partition(".")[0]
        reasons[block] = [f"--set {change}", *reasons.get(block, [])]
    rows, first = [], ""
    for stage in stages:
        if stage in reasons:
            first = first or stage
            rows.append((stage, "runs", summary(reasons[stage])))
        else:
            rows.append(
                (stage, "runs if its inputs change", f"comes after {first}") if first else (stage, "up to date", "")
            )
    return rows


def print_dry_run(workspace: Workspace, stages: Sequence[str], assignments: Sequence[str]) -> None:
    """Print the same as a table."""
    print_table(("stage", "would be", "why"), dry_run(workspace, stages, assignments))
