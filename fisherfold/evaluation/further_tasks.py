"""Further lm-eval tasks, `evaluate.tasks`, on both models."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisherfold.evaluation.harness import run_tasks
from fisherfold.evaluation.knowledge import harness_model
from fisherfold.evaluation.model_run import ModelRun
from fisherfold.evaluation.scores import tidy_results
from fisherfold.evaluation.tasks import load_task, manager_of


@dataclass(frozen=True)
class TaskSource:
    """Where task files lie.

    Attributes:
        folder: the user's, where relative paths of data files start.
        shipped: the one that comes with the project.
        trusted: whether their code may run.
    """

    folder: Path
    shipped: Path | None
    trusted: bool

    def check(self, names: list[str]) -> None:
        """
        Raises:
            ParameterError: see `manager_of`.
        """
        for name in names:
            manager_of(name, self.folder, self.shipped, self.trusted)


def task_units(
    models: dict[str, ModelRun], names: list[str], source: TaskSource, limit: int | None
) -> dict[str, tuple[Any, ...]]:
    """Arguments of `run_task` by name of unit: one task or group on one model, the task before the model."""
    return {
        _unit(number, name, which): (model, name, source, limit, f"{name}, {which} model,")
        for number, name in enumerate(names)
        for which, model in models.items()
    }


def _unit(number: int, name: str, model: str) -> str:
    return f"task-{number:03d}-{re.sub('[^A-Za-z0-9_.-]', '_', name)}-{model}"


def run_task(folder: Path, model: ModelRun, name: str, source: TaskSource, limit: int | None, label: str) -> None:
    """Unit: one lm-eval task or group on one model."""
    task = load_task(name, source.folder, source.shipped, source.trusted)
    results = run_tasks(harness_model(model, label), task, limit)["results"]
    tidy = {part: tidy_results(values) for part, values in results.items()}
    (folder / "results.json").write_text(json.dumps(tidy), encoding="utf-8")


def read_tasks(folders: dict[str, Path], names: list[str], models: dict[str, ModelRun]) -> dict[str, dict[str, Any]]:
    """Results by task as asked for, model, and lm-eval's name of each group and task in it."""
    return {
        name: {
            which: json.loads((folders[_unit(number, name, which)] / "results.json").read_text(encoding="utf-8"))
            for which in models
        }
        for number, name in enumerate(names)
    }
