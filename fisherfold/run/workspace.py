"""Where things lie in a project folder."""

from dataclasses import dataclass
from pathlib import Path

STAGES = ("prepare", "capture", "kronecker", "subspace", "ranks", "factorize", "evaluate", "report")
"""The stages in their order; each has a block of parameters and an output of its name."""
MODELS = ("dense", "compressed")
"""What stage `evaluate` compares, by the names that its figures have everywhere."""


@dataclass(frozen=True)
class Workspace:
    """A project folder: `root` holds params.yaml, data and artifacts."""

    root: Path

    @property
    def artifacts(self) -> Path:
        """The folder of all published outputs."""
        return self.root / "artifacts"

    def out(self, stage: str) -> Path:
        """The published output folder of a stage."""
        return self.artifacts / stage

    @property
    def model(self) -> Path:
        """The prepared dense model, a Hugging Face folder."""
        return self.out("prepare") / "model"

    def table(self, name: str) -> Path:
        """A prepared Parquet table: calibration, tuning, evaluation or questions."""
        return self.root / "data" / "prepared" / f"{name}.parquet"

    def recipes(self, kind: str) -> Path:
        """The folder of recipes of one kind: models, corpora, questions or tasks."""
        return self.root / "data" / kind
