"""What the runs of a project gave, one line each, so that they can be compared: parameters and metrics.json.

artifacts/runs.jsonl      {"run": 1, "ended": "2026-01-31T12:00:00", "minutes": 9.2, "params": …, "metrics": …, "speed": …}
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fisherfold.run.disk import append_line
from fisherfold.run.errors import FisherfoldError, ParameterError
from fisherfold.run.params import Params
from fisherfold.run.workspace import Workspace

METRICS = Path("artifacts", "evaluate", "metrics.json")


def note_run(
    workspace: Workspace,
    params: Params,
    metrics: Mapping[str, Any],
    seconds: float,
    speed: Mapping[str, Any] | None = None,
) -> None:
    """Remember what a finished run gave, unless the last one gave the same."""
    entry = {"params": params.model_dump(mode="json"), "metrics": metrics}
    known = read_runs(workspace)
    if known and {key: known[-1].get(key) for key in entry} == entry:
        return
    ended = datetime.now().isoformat(timespec="seconds")
    number = known[-1]["run"] + 1 if known else 1
    line = {"run": number, "ended": ended, "minutes": round(seconds / 60, 2), "speed": speed, **entry}
    append_line(_file(workspace), json.dumps(line, sort_keys=True))


def read_metrics(workspace: Workspace) -> dict[str, Any]:
    """The content of metrics.json of stage `evaluate`.

    Raises:
        ParameterError: it is not that.
    """
    return _metrics(workspace.root / METRICS)


def read_runs(workspace: Workspace) -> list[dict[str, Any]]:
    """Every remembered run, in order; a line that a kill has cut is none."""
    runs = []
    text = _file(workspace).read_text(encoding="utf-8", errors="replace") if _file(workspace).exists() else ""
    for line in text.splitlines():
        with suppress(ValueError):
            runs.append(json.loads(line))
    return [run for run in runs if isinstance(run, dict) and {"run", "metrics"} <= run.keys()]


def find_run(workspace: Workspace | None, name: str) -> dict[str, Any]:
    """What `name` means: the number of a run here, a metrics.json, a folder that holds one (a project), or a DVC experiment.

    Raises:
        ParameterError: it is none of these.
    """
    for run in read_runs(workspace) if workspace and name.isdigit() else ():
        if run["run"] == int(name):
            return run
    path = Path(name)
    for file in (path, path / "metrics.json", path / METRICS):
        if file.is_file():
            return {"run": name, "metrics": _metrics(file)}
    if workspace and (found := _experiment(workspace, name)):
        return found
    known = ", ".join(str(run["run"]) for run in read_runs(workspace)) if workspace else ""
    raise ParameterError(
        f"{name!r} is no run here ({known or 'there is none yet'}), no metrics.json, no folder with one, and no DVC experiment."
    )


def _metrics(file: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
        return {key: dict(metrics[key]) for key in ("dense", "compressed", "size")} | metrics
    except (ValueError, KeyError, TypeError):
        raise ParameterError(f"{file} is no metrics.json of stage 'evaluate'.") from None


def _experiment(workspace: Workspace, name: str) -> dict[str, Any] | None:
    """Parameters and metrics of a DVC experiment (`fisherfold sweep` makes them), by its name."""
    from flows.experiments import shown_experiments

    try:
        data = shown_experiments(workspace).get(name)
    except FisherfoldError:
        return None  # no git, no experiments
    if data is None or "data" not in data["metrics"].get(METRICS.as_posix(), {}):
        return None
    return {
        "run": name,
        "params": data["params"]["params.yaml"]["data"],
        "metrics": data["metrics"][METRICS.as_posix()]["data"],
    }


def last_two(workspace: Workspace) -> Sequence[str]:
    """The numbers of the last two runs.

    Raises:
        ParameterError: there are not two.
    """
    runs = read_runs(workspace)
    if len(runs) < 2:
        raise ParameterError(
            "There are not two runs to compare yet: fisherfold run --set ranks.ratio=0.3 makes another."
        )
    return [str(run["run"]) for run in runs[-2:]]


def _file(workspace: Workspace) -> Path:
    return workspace.artifacts / "runs.jsonl"
