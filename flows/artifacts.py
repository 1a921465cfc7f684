"""What Prefect shows of a run: progress, the table of metrics and sizes, the picture of the ranks, events."""

import base64
import json
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event

from fisherfold.evaluation.verdict import verdict
from fisherfold.run.errors import FisherfoldError
from fisherfold.run.times import speed
from fisherfold.run.workspace import Workspace

UPDATE_INTERVAL = 2.0  # seconds between updates of one progress artifact
LARGEST_PICTURE = 512 * 1024  # bytes; a larger one belongs in the report, not in Prefect's database


class StageProgress:
    """The progress artifact of one stage in this run: share done, what it is doing, the time left."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._artifact = None
        self._shown = 0.0

    def show(self, entry: Mapping) -> None:
        """Show a count as fisherfold/run/progress.py records it; counts that follow each other quickly are left out."""
        done, total = entry["done"], entry["total"]
        now = time.monotonic()
        if done < total and now - self._shown < UPDATE_INTERVAL and self._artifact:
            return
        percent = 100.0 * done / total if total else 100.0
        left = "" if entry["left"] is None else f", {timedelta(seconds=round(entry['left']))} left"
        description = f"{entry['doing']}: {done} of {total}{left}"
        if self._artifact is None:
            self._artifact = create_progress_artifact(percent, f"{self.stage}-progress", description)
        else:
            update_progress_artifact(self._artifact, percent, description)
        self._shown = now


def evaluation_views(workspace: Workspace) -> None:
    """The verdict with its findings, and a table: quality and size of the dense and the compressed model."""
    metrics = json.loads((workspace.out("evaluate") / "metrics.json").read_text(encoding="utf-8"))
    create_markdown_artifact("\n".join(verdict(metrics).lines), "verdict", f"Verdict on the model of {workspace.root}")
    rows = [
        {"measure": key, "dense": metrics["dense"].get(key), "compressed": value}
        for key, value in metrics["compressed"].items()
    ]
    size = metrics["size"]
    for key in dict.fromkeys(name.rpartition("_")[0] for name in size):
        rows.append({"measure": key, "dense": size[f"{key}_dense"], "compressed": size[f"{key}_compressed"]})
    create_table_artifact(rows, "metrics", f"Dense and compressed model, {workspace.root}")


def rank_picture(workspace: Workspace) -> None:
    """The report's picture of the kept share of every layer, as an image."""
    import pyarrow.parquet as pq

    from fisherfold.page.layer_views import parameter_map
    from fisherfold.page.page import stand_alone

    rows = pq.read_table(workspace.out("ranks") / "ranks.parquet").to_pylist()
    picture = stand_alone(parameter_map(rows)).encode()
    if len(picture) <= LARGEST_PICTURE:
        kept = f"Kept share of each layer's parameters, {workspace.root}"
        create_image_artifact(address("image/svg+xml", picture), "ranks", kept)


def address(kind: str, picture: bytes) -> str:
    """A picture as an address that holds it, so that Prefect needs no place to fetch it from."""
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


def report_link(workspace: Workspace) -> None:
    """The figures in a few lines, and where the report lies that has the rest; it is written anew, with what the run took."""
    from flows.outcome import figures, paces
    from flows.report_page import write_page

    try:
        page = write_page(workspace)
    except FisherfoldError:  # the page is for looking at; a run is not undone by it
        return
    metrics = json.loads((workspace.out("evaluate") / "metrics.json").read_text(encoding="utf-8"))
    rows = [*figures(metrics), *paces(speed(workspace))]
    lines = [f"[{page.name}]({page.as_uri()}), {page}", "", "| | dense → compressed |", "|---|---|"]
    text = "\n".join([*lines, *(f"| {label} | {value} |" for label, value in rows), "", *verdict(metrics).lines])
    create_markdown_artifact(text, "report", f"Report on the model of {workspace.root}")


RESULTS: dict[str, Callable[[Workspace], None]] = {
    "ranks": rank_picture,
    "evaluate": evaluation_views,
    "report": report_link,
}
"""What is shown once a stage is up to date."""


def show_results(workspace: Workspace, stage: str) -> None:
    """Show what there is to show of a stage's output."""
    if stage in RESULTS:
        RESULTS[stage](workspace)


def announce_event(workspace: Workspace, stage: str, what: str, message: str) -> None:
    """Emit ``fisherfold.stage.<what>``: started, completed, cached, failed or cancelled; automations can wait for it."""
    resource = {
        "prefect.resource.id": f"fisherfold.workspace.{workspace.root}",
        "prefect.resource.name": workspace.root.name,
    }
    emit_event(f"fisherfold.stage.{what}", resource, payload={"stage": stage, "message": message})
