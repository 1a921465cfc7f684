"""A project with a tiny local model, a text corpus and questions of its own: the real stages in seconds."""

import json
import random
from pathlib import Path

import tiny
from project import clone
from ruamel.yaml import YAML

WORDS = 40
PARAMS = {
    "prepare": {
        "model": "tiny-model",
        "corpus": "corpus.txt",
        "questions": "questions.jsonl",
        "question_count": 6,
        "sequence_length": 16,
        "calibration_sequences": 8,
        "tuning_sequences": 2,
        "evaluation_sequences": 4,
    },
    "capture": {"sequences_per_shard": 2, "batch_size": 2, "sketch_rank": 4},
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
