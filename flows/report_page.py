"""The report as it is looked at: the page of stage `report`, with what no two runs share: times, memory, speed, and a sweep's results.

artifacts/report.html      what a run tells and `fisherfold report` opens; no output of a stage, so DVC knows nothing of it
"""

import os
from pathlib import Path

from fisherfold.page.record import Record
from fisherfold.run.workspace import Workspace


def page_path(workspace: Workspace) -> Path:
    """Where it lies."""
    return workspace.artifacts / "report.html"


def write_page(workspace: Workspace, title: str) -> Path:
    """Write it from what lies in artifacts/ now.

    Raises:
        CorruptArtifact: a stage has not finished, or its output is not whole.
    """
    from stages import report

    path = page_path(workspace)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(report.write_page(Record(workspace, beside=True), title), encoding="utf-8")
    os.replace(partial, path)
    return path
