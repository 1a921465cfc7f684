"""The dense model's own answers: how far the compressed model is from it on what it would itself write.

Perplexity on any corpus judges a model by text that people wrote, much of it of the kind that calibration saw. What a model is
used for is what it writes: prepared prompts of no corpus, answers sampled from the dense model, and over the tokens of these

    own_answers_kl = Σ_i Σ_t KL(dense ‖ compressed | prompt i, answer tokens before t) / Σ_i n_i    in nats a token,

n_i tokens of answer i, its end token among them. The prompts are in no calibration text.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn.utils.rnn import pad_sequence

from fisherfold.evaluation.harness import runs_of_like_length
from fisherfold.evaluation.losses import compare_tokens
from fisherfold.evaluation.model_run import ModelRun, not_finite
from fisherfold.evaluation.scores import COMPARED, ratio_of_sums
from fisherfold.run.errors import InputError
from fisherfold.run.workspace import MODELS


@dataclass(frozen=True)
class Conversation:
    """A prompt and the dense model's sampled answer to it, in tokens; `row` is its place in the table."""

    row: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def conversations(table: pa.Table, positions: int | None) -> list[Conversation]:
    """The rows with an answer, cut to what a model of so many positions can read."""
    rows = zip(table["prompt_ids"].to_pylist(), table["sampled_ids"].to_pylist(), strict=True)
    found = (
        Conversation(i, tuple(prompt), tuple(answer[: _room(prompt, positions)]))
        for i, (prompt, answer) in enumerate(rows)
    )
    return [each for each in found if each.prompt and each.answer]


def _room(prompt: list[int], positions: int | None) -> int | None:
    return None if positions is None else max(0, positions - len(prompt))


def own_answer_units(models: dict[str, ModelRun], rows: list[Conversation]) -> dict[str, tuple[Any, ...]]:
    """Arguments of `compare_answers` by name of unit: rows of like length that go through in one pass."""
    runs = runs_of_like_length(rows, len, models["dense"].pass_tokens)
    return {f"own-answers-{number:05d}": (models, tuple(run)) for number, run in enumerate(runs)}


def compare_answers(folder: Path, models: dict[str, ModelRun], rows: tuple[Conversation, ...]) -> None:
    """Unit: Σ over the answer's tokens of both models' losses and of the divergence, for a few answers.

    Rows are padded on the right, where a causal model does not look.

    Raises:
        InputError: an answer has a token that the models do not know.
        NumericalError: a loss is not finite.
    """
    ids = pad_sequence([torch.tensor(row.prompt + row.answer) for row in rows], batch_first=True)
    if int(ids.max()) >= models["dense"].vocabulary:
        raise InputError(
            "answers.parquet has tokens that the model does not know. Run stage 'prepare' again with this model."
        )
    tokens = compare_tokens(models["dense"].model, models["compressed"].model, ids)
    found = []
    for i, row in enumerate(rows):
        sums = {name: float(tokens[name][i, len(row.prompt) - 1 : len(row) - 1].double().sum()) for name in COMPARED}
        for name in MODELS:
            if not np.isfinite(sums[name]):
                raise not_finite(
                    folder.stem, models[name], f"the loss in own answer {row.row}", ids[i][None, : len(row)]
                )
        found.append({"row": row.row, "tokens": len(row.answer), **sums})
    (folder / "sums.json").write_text(json.dumps(found), encoding="utf-8")


def summarise_own_answers(folders: list[Path]) -> dict[str, Any] | None:
    """Means over all answer tokens with standard errors, answers being the draws; None where there are no answers."""
    rows = [row for folder in folders for row in json.loads((folder / "sums.json").read_text(encoding="utf-8"))]
    if not rows:
        return None
    tokens = np.array([row["tokens"] for row in rows], float)
    figures = {name: ratio_of_sums(np.array([row[name] for row in rows]), tokens) for name in COMPARED}
    return {
        "answers": len(rows),
        "tokens": int(tokens.sum()),
        "mean": {name: value for name, (value, _) in figures.items()},
        "standard_error": {name: error for name, (_, error) in figures.items()},
    }
