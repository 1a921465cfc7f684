"""The prepared multiple-choice questions, asked of each model through lm-eval.

A model's answer is the choice of largest log-likelihood (lm-eval's `acc`); `acc_norm`, per character, is recorded beside it.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fisherfold.evaluation.harness import SharedContextModel, run_tasks
from fisherfold.evaluation.model_run import ModelRun, not_finite
from fisherfold.evaluation.tasks import KNOWLEDGE, knowledge_task
from fisherfold.run.tables import read_table
from fisherfold.run.workspace import MODELS

QUESTIONS_PER_UNIT = 100
ANSWERS = pa.schema(
    [("question", pa.int32()), ("article", pa.string()), ("answer", pa.int32())]
    + [(model, pa.int32()) for model in MODELS]
    + [(f"{model}_log_likelihoods", pa.list_(pa.float64())) for model in MODELS]
)


def question_units(models: dict[str, ModelRun], table: Path, count: int) -> dict[str, tuple[Any, ...]]:
    """Arguments of `answer_questions` by name of unit: QUESTIONS_PER_UNIT questions on one model, the dense one first."""
    return {
        f"knowledge-{name}-{start:06d}": (model, table, start)
        for name, model in models.items()
        for start in range(0, count, QUESTIONS_PER_UNIT)
    }


def answer_questions(folder: Path, model: ModelRun, table: Path, start: int) -> None:
    """Unit: QUESTIONS_PER_UNIT questions from `start` on.

    Raises:
        NumericalError: a log-likelihood is not finite.
    """
    questions = read_table(table).slice(start, QUESTIONS_PER_UNIT)
    samples = run_tasks(harness_model(model), knowledge_task(questions), samples=True)["samples"][KNOWLEDGE]
    rows = [
        {
            "log_likelihoods": [value for value, _ in sample["filtered_resps"]],
            "acc": sample["acc"],
            "acc_norm": sample["acc_norm"],
        }
        for sample in sorted(samples, key=lambda sample: sample["doc_id"])
    ]
    for row, question in zip(rows, questions["question"].to_pylist(), strict=True):
        if not all(map(math.isfinite, row["log_likelihoods"])):
            ids = model.tokenizer(question, return_tensors="pt")["input_ids"]
            raise not_finite(folder.stem, model, "a log-likelihood", ids)
    (folder / "answers.json").write_text(json.dumps(rows), encoding="utf-8")


def harness_model(model: ModelRun, label: str | None = None) -> SharedContextModel:
    """The model as lm-eval asks it; `label` is shown with its progress."""
    return SharedContextModel(model.model, model.tokenizer, model.pass_tokens, model.batch_size, label)


def read_answers(folders: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """The answers of each model, by the folders of `question_units`; empty lists where there are no questions."""
    return {
        model: [
            row
            for unit, folder in sorted(folders.items())
            if unit.startswith(f"knowledge-{model}-")
            for row in json.loads((folder / "answers.json").read_text(encoding="utf-8"))
        ]
        for model in MODELS
    }


def answers_table(questions: pa.Table, answers: dict[str, list[dict[str, Any]]]) -> pa.Table:
    """What is published of every question: the right answer, each model's, and all log-likelihoods."""
    rows = [
        {
            "question": number,
            "article": question["article"],
            "answer": question["answer"],
            **{model: int(np.argmax(answers[model][number]["log_likelihoods"])) for model in MODELS},
            **{f"{model}_log_likelihoods": answers[model][number]["log_likelihoods"] for model in MODELS},
        }
        for number, question in enumerate(questions.to_pylist())
    ]
    return pa.Table.from_pylist(rows, schema=ANSWERS)
