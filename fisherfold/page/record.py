"""What the stages recorded about one run, read from their published outputs for the report."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fisherfold.run.errors import CorruptArtifact
from fisherfold.run.files import digest_json, read_manifest, verify_output
from fisherfold.run.times import speed, stage_times
from fisherfold.run.workspace import Workspace

FACTS = {
    "prepare": "prepare.json",
    "capture": "capture.json",
    "kronecker": "kronecker.json",
    "subspace": "subspace.json",
    "ranks": "budget.json",
    "factorize": "factorize.json",
    "evaluate": "evaluation.json",
}
TABLES = {
    "capture": ("questions.parquet",),
    "kronecker": ("diagnostics.parquet", "comparison.parquet", "dependence.parquet"),
    "subspace": ("diagnostics.parquet", "spectra.parquet"),
    "ranks": ("ranks.parquet", "trajectory.parquet"),
    "factorize": ("model/README.md", "refinement.parquet"),
    "evaluate": ("metrics.json", "tasks.json", "losses.csv", "questions.parquet", "answers.parquet"),
}


@dataclass(frozen=True)
class Record:
    """The recorded facts of a run; whatever a stage did not record reads as None or empty.

    Attributes:
        workspace: the project folder.
        beside: whether figures that stand beside the outputs are read too: times, speed, a sweep. No two runs share them, so the page
            that is an output has none.
    """

    workspace: Workspace
    beside: bool = False

    def digests(self) -> dict[str, str]:
        """Digest of all that is read, by stage.

        Raises:
            CorruptArtifact: a stage has not finished, or a file of it is missing or cut short.
        """
        return {
            stage: digest_json(
                [verify_output(self.workspace.out(stage), name) for name in (file, *TABLES.get(stage, ()))]
                + [self.params[stage], self.bytes[stage]]
            )
            for stage, file in FACTS.items()
        }

    @cached_property
    def params(self) -> dict[str, dict[str, Any]]:
        """The block of parameters that each stage ran with; empty in outputs of before it was recorded."""
        return {stage: manifest.get("params", {}) for stage, manifest in self._manifests.items()}

    @cached_property
    def bytes(self) -> dict[str, int]:
        """Bytes of each stage's output."""
        return {
            stage: sum(entry["bytes"] for entry in manifest["files"].values())
            for stage, manifest in self._manifests.items()
        }

    @cached_property
    def outputs(self) -> dict[str, str]:
        """Digest of the files of each stage's output."""
        return {stage: digest_json(manifest["files"]) for stage, manifest in self._manifests.items()}

    @cached_property
    def times(self) -> dict[str, dict[str, float]]:
        """Seconds and largest memory of the stages, as far as they are known."""
        return stage_times(self.workspace) if self.beside else {}

    @cached_property
    def speed(self) -> dict[str, Any] | None:
        """Tokens a second of both models, where they were measured."""
        return speed(self.workspace) if self.beside else None

    @cached_property
    def sweep(self) -> list[dict[str, Any]]:
        """Results of the last sweep, a row a model; see ``flows.sweep``."""
        path = self.workspace.artifacts / "sweep" / "results.parquet"
        return pq.read_table(path).to_pylist() if self.beside and path.exists() else []

    @cached_property
    def _manifests(self) -> dict[str, dict[str, Any]]:
        return {stage: read_manifest(self.workspace.out(stage)) for stage in FACTS}

    @cached_property
    def facts(self) -> dict[str, dict[str, Any]]:
        """The facts of each stage, as it wrote them."""
        return {stage: self.json(stage, file) or {} for stage, file in FACTS.items()}

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """metrics.json.

        Raises:
            CorruptArtifact: there is none.
        """
        metrics = self.json("evaluate", "metrics.json")
        if metrics is None:
            raise CorruptArtifact(
                f"{self.workspace.out('evaluate')} holds no metrics.json. Run stage 'evaluate' again."
            )
        return metrics

    def json(self, stage: str, name: str) -> dict[str, Any] | None:
        """A published JSON file, parsed; None if the stage wrote none."""
        path = self._path(stage, name)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def table(self, stage: str, name: str) -> pa.Table | None:
        """A published Parquet table; None if the stage wrote none."""
        path = self._path(stage, name)
        return pq.read_table(path) if path.exists() else None

    def rows(self, stage: str, name: str) -> list[dict[str, Any]]:
        """The rows of a small table; none if there is no such table."""
        table = self.table(stage, name)
        return table.to_pylist() if table is not None else []

    def text(self, stage: str, name: str) -> str | None:
        """A published text file; None if the stage wrote none."""
        path = self._path(stage, name)
        return path.read_text(encoding="utf-8") if path.exists() else None

    def _path(self, stage: str, name: str) -> Path:
        return self.workspace.out(stage) / name
