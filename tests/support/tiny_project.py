"""A project with a tiny local model, a text corpus and questions of its own: the real stages in seconds; run once a session."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from project import clone, command
from ruamel.yaml import YAML

from fisherfold.run.params import STAGES

WORDS = 40
PARAMS = {
    "prepare": {
        "model": "tiny-model",
        "corpus": "corpus.txt",
        "unseen": None,
        "questions": "questions.jsonl",
        "question_count": 6,
        "sequence_length": 16,
        "calibration_sequences": 8,
        "tuning_sequences": 2,
        "training_sequences": 0,
        "evaluation_sequences": 4,
    },
    "capture": {"sequences_per_shard": 2, "leaves": 2, "batch_size": 2, "gradients": "sketch", "sketch_rank": 4},
    "kronecker": {"estimator": "sequence"},
}


def tiny_project(folder: Path, articles: int = 24) -> Path:
    """Make it in `folder`; nothing has run."""
    clone(folder)
    tiny.save_tiny(folder / "tiny-model")
    generator = random.Random(0)
    texts = [" ".join(f"w{generator.randrange(3, tiny.VOCABULARY)}" for _ in range(WORDS)) for _ in range(articles)]
    (folder / "corpus.txt").write_text("\n\n".join(texts) + "\n")
    questions = [
        {
            "question": f"w{i + 3}",
            "choices": [f"w{20 * c + i + 5}" for c in range(4)],
            "answer": i % 4,
            "article": f"q{i}",
        }
        for i in range(6)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n")
    set_params(folder, PARAMS)
    return folder


def set_params(folder: Path, values: dict[str, dict]) -> None:
    """Change params.yaml, block by block."""
    yaml = YAML()
    document = yaml.load(folder / "params.yaml")
    for block, changed in values.items():
        document[block].update(changed)
    yaml.dump(document, folder / "params.yaml")


@pytest.fixture(scope="session")
def fresh(tmp_path_factory) -> Path:
    """A tiny project of which nothing has run."""
    return tiny_project(tmp_path_factory.mktemp("fresh"))


STAGES_AT_ONCE = """
import sys
from flows import cli
from fisherfold.run.workspace import STAGES

sys.exit(max(cli.main(words) for words in (["check"], *(["stage", stage] for stage in STAGES))))
"""


@pytest.fixture(scope="session")
def finished(fresh, prefect_home, tmp_path_factory) -> Path:
    """The same project after all stages, in one process that starts once, and as DVC knows it; `fisherfold run` gives the same bits."""
    folder = copy(fresh, tmp_path_factory.mktemp("finished"))
    prefect_home(folder / ".prefect")
    result = command(folder, sys.executable, "-c", STAGES_AT_ONCE, environment={"PYTHONPATH": str(folder)})
    assert result.returncode == 0, result.stderr
    result = command(folder, "dvc", "commit", "--quiet", "--force")
    assert result.returncode == 0, result.stderr
    return folder


def copy(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder, dirs_exist_ok=True, symlinks=True))


def fisherfold(folder: Path, *words: str, url: str = "") -> subprocess.CompletedProcess:
    """Run it with the Prefect API at `url`, else with a temporary one."""
    environment = {"PREFECT_HOME": str(folder / ".prefect"), "PREFECT_API_URL": url}
    return command(folder, sys.executable, "-m", "fisherfold", *words, environment=environment)


def published(folder: Path) -> dict[str, dict]:
    """What each stage published: every file's size and digest."""
    return {
        stage: json.loads((folder / "artifacts" / stage / "manifest.json").read_text())["files"] for stage in STAGES
    }
