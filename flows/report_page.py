"""The report as it is looked at: the page of stage `report`, with what no two runs share: times, memory, speed, and a sweep's results.

artifacts/report.html      what a run tells and `fisherfold report` opens; no output of a stage, so DVC knows nothing of it
"""

import os
from pathlib import Path

from fisherfold.page.record import Record
from fisherfold.run.params import load_params
from fisherfold.run.workspace import Workspace


def page_path(workspace: Workspace) -> Path:
    """Where it is written."""
    return workspace.artifacts / "report.html"


def shown_page(workspace: Workspace) -> Path:
    """What there is to look at: this page, or the one of stage `report` where DVC alone has run."""
    path = page_path(workspace)
    return path if path.exists() else workspace.out("report") / "index.html"


def write_page(workspace: Workspace) -> Path:
    """Write it from what lies in artifacts/ now.

    Raises:
        CorruptArtifact: a stage has not finished, or its output is not whole.
    """
    from stages import report

    path, title = page_path(workspace), load_params(workspace.root / "params.yaml").report.title
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(report.write_page(Record(workspace, beside=True), title), encoding="utf-8")
    os.replace(partial, path)
    return path
