"""How long a run will still take: by what its stages took here before, else by `fisherfold plan`, corrected by what this run has shown.

Times are remembered for one model (`.dvc/tmp/fisherfold-times.json`); where nothing is, a plan is made beside the run, once a stage has
taken so long that somebody may wonder.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fisherfold.run.params import load_params
from fisherfold.run.workspace import Workspace

PATIENCE = 20.0  # seconds that a stage takes before a plan is made
UNLIKE = ("prepare",)
"""Stages that download, and answer token by token: how long they took says nothing of those that compute."""


class TimeLeft:
    """Use as a context manager around a run.

    Args:
        workspace: the project folder.
        ahead: the stages that are to be run, in their order.
    """

    def __init__(self, workspace: Workspace, ahead: Iterable[str]) -> None:
        self._file = workspace.root / ".dvc" / "tmp" / "fisherfold-times.json"
        self._root = workspace.root
        self._model = load_params(workspace.root / "params.yaml").prepare.model
        self._ahead = list(ahead)
        self._seconds = _read(self._file).get(self._model, {})
        self._planned: dict[str, float] = {}
        self._planning: subprocess.Popen[bytes] | None = None
        self._taken: dict[str, float] = {}
        self._started = time.monotonic()

    def __getstate__(self) -> dict:
        """Without the plan in the making: Prefect sends a task's parameters to wherever its units run."""
        return self.__dict__ | {"_planning": None}

    def __enter__(self) -> "TimeLeft":
        return self

    def __exit__(self, *_: object) -> None:
        if self._planning:
            self._planning.kill()
            self._planning.wait()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # it only makes the next run's estimate better
            known = _read(self._file) | {self._model: self._seconds | self._taken}
            self._file.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8")

    def begin(self) -> None:
        """A stage begins."""
        self._started = time.monotonic()

    def look(self) -> None:
        """Called now and then while a stage is at work."""
        unknown = [stage for stage in self._ahead if stage not in self._seconds]
        if unknown and not self._planned and not self._planning and time.monotonic() - self._started > PATIENCE:
            words = [sys.executable, "-m", "fisherfold", "plan", "--json"]
            streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdout": subprocess.PIPE}
            self._planning = subprocess.Popen(words, cwd=self._root, **streams)
        if self._planning and self._planning.poll() is not None:
            self._planned = _stages(self._planning.communicate()[0])
            self._planning = None

    def end(self, stage: str, computed: bool) -> None:
        """A stage has ended well."""
        if computed:
            self._taken[stage] = time.monotonic() - self._started
        if stage in self._ahead:
            self._ahead.remove(stage)

    def seconds(self) -> float | None:
        """What the stages ahead will take; None if that is not known."""
        shown = [stage for stage in self._planned if stage in self._taken and stage not in UNLIKE]
        pace = (
            sum(self._taken[stage] for stage in shown) / sum(self._planned[stage] for stage in shown) if shown else 1.0
        )
        each = [self._seconds.get(stage) or pace * self._planned.get(stage, float("nan")) for stage in self._ahead]
        total = sum(each)
        return total if total == total else None

    def text(self) -> str:
        """The same, in words to follow others; empty if it is not known."""
        seconds = self.seconds()
        return f", about {in_words(seconds)} left in all" if seconds else ""


def in_words(seconds: float) -> str:
    """A time that nobody needs to the second."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{max(1, round(seconds))} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _read(file: Path) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _stages(document: bytes) -> dict[str, float]:
    """Seconds by stage of a plan for one device; empty if there is none."""
    try:
        stages = json.loads(document)["plans"]["1"]["stages"]
        return {stage["stage"]: stage["seconds"] for stage in stages if stage["seconds"]}
    except (ValueError, KeyError, TypeError):
        return {}
