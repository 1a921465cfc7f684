"""What both models answer: greedy answers to prompts that calibration never saw, side by side.

    agreement         share of prompts whose first AGREEING answer tokens are the same
    agreeing prefix   tokens before the first that differs, at most AGREEING, mean over prompts
    empty             answers without a character that prints
    looping           answers that were cut at the longest length while they said one thing over and over, see `loops`

Two good models need not agree word for word: one token of many near ties ends the agreement. Empty and looping answers are failures
by themselves, of which the dense model may have some too, so both models are counted.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from fisherfold.evaluation.harness import runs_of_like_length
from fisherfold.evaluation.model_run import ModelRun
from fisherfold.evaluation.scores import standard_error
from fisherfold.run.workspace import MODELS

AGREEING = 32
LOOP_TURNS = 3  # an n-gram said so often
LOOP_TOKENS = 12  # over at least so many tokens
MOST_ROWS = 32  # prompts in one pass: reading the weights costs less than computing from there on
SAMPLES = pa.schema(
    [
        ("prompt", pa.string()),
        ("dense", pa.string()),
        ("compressed", pa.string()),
        ("dense_tokens", pa.int32()),
        ("compressed_tokens", pa.int32()),
        ("agreeing_tokens", pa.int32()),
        ("dense_loops", pa.bool_()),
        ("compressed_loops", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Prompt:
    """Tokens of a prompt; `row` is its place in the table."""

    row: int
    tokens: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)


def answer_units(models: dict[str, ModelRun], table: pa.Table, longest: int) -> dict[str, tuple[Any, ...]]:
    """Arguments of `answer_prompts` by name of unit: prompts of like length on one model, the dense one first."""
    prompts = [Prompt(row, tuple(tokens)) for row, tokens in enumerate(table["prompt_ids"].to_pylist()) if tokens]
    most = models["dense"].pass_tokens
    runs = [
        run[start : start + MOST_ROWS]
        for run in runs_of_like_length(prompts, len, most, worth=most)
        for start in range(0, len(run), MOST_ROWS)
    ]
    return {
        f"answers-{name}-{number:05d}": (model, tuple(run), longest)
        for name, model in models.items()
        for number, run in enumerate(runs)
    }


def answer_prompts(folder: Path, model: ModelRun, prompts: tuple[Prompt, ...], longest: int) -> None:
    """Unit: one model's greedy answers, of at most `longest` tokens and no more than its positions hold."""
    room = longest if model.positions is None else model.positions - max(map(len, prompts))
    answers = model.decoder.answer([list(prompt.tokens) for prompt in prompts], max(0, min(longest, room)))
    texts = model.tokenizer.batch_decode(answers, skip_special_tokens=True)
    rows = [
        {
            "row": prompt.row,
            "tokens": tokens,
            "text": text,
            "ended": tokens[-1:] != [] and tokens[-1] in model.decoder.ends,
        }
        for prompt, tokens, text in zip(prompts, answers, texts, strict=True)
    ]
    (folder / "answers.json").write_text(json.dumps(rows), encoding="utf-8")


def samples_table(prompts: pa.Table, folders: dict[str, Path]) -> pa.Table:
    """Every prompt with both answers, by the folders of `answer_units`, in the order of the prompts."""
    answers: dict[str, dict[int, dict[str, Any]]] = {model: {} for model in MODELS}
    for unit, folder in folders.items():
        for answer in json.loads((folder / "answers.json").read_text(encoding="utf-8")):
            answers[unit.split("-")[1]][answer["row"]] = answer
    rows = [
        _sample(prompts["prompt"][row].as_py(), *(answers[model][row] for model in MODELS))
        for row in sorted(answers["dense"])
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def _sample(prompt: str, dense: dict[str, Any], compressed: dict[str, Any]) -> dict[str, Any]:
    both = dict(zip(MODELS, (dense, compressed), strict=True))
    return {
        "prompt": prompt,
        "agreeing_tokens": agreeing_tokens(dense["tokens"], compressed["tokens"]),
        **{model: answer["text"] for model, answer in both.items()},
        **{f"{model}_tokens": len(answer["tokens"]) for model, answer in both.items()},
        **{f"{model}_loops": not answer["ended"] and loops(answer["tokens"]) for model, answer in both.items()},
    }


def agreeing_tokens(one: list[int], other: list[int]) -> int:
    """Tokens before the first that differs, at most AGREEING; all AGREEING where both answers end before, and are the same."""
    if one[:AGREEING] == other[:AGREEING]:
        return AGREEING
    return next(i for i, (a, b) in enumerate(zip([*one, None], [*other, None])) if a != b)


def loops(tokens: list[int]) -> bool:
    """Whether the end is an n-gram said LOOP_TURNS times or more, over at least LOOP_TOKENS tokens.

    With n the length of the n-gram: the last max(LOOP_TURNS n, LOOP_TOKENS) tokens t have t[i] = t[i - n] throughout.
    """
    for n in range(1, len(tokens) // LOOP_TURNS + 1):
        tail = tokens[-max(LOOP_TURNS * n, LOOP_TOKENS) :]
        if len(tail) >= LOOP_TOKENS and tail[n:] == tail[:-n]:
            return True
    return False


def summarise_samples(samples: pa.Table) -> dict[str, Any] | None:
    """Shares and counts over all prompts, see the module; None where there are none."""
    if not samples.num_rows:
        return None
    agreeing = samples["agreeing_tokens"].to_numpy().astype(float)
    agrees = (agreeing == AGREEING).astype(float)
    return {
        "prompts": samples.num_rows,
        "greedy_agreement": float(agrees.mean()),
        "greedy_agreement_error": standard_error(agrees),
        "agreeing_prefix": float(agreeing.mean()),
        "agreeing_prefix_error": standard_error(agreeing),
        "empty": {model: sum(not text.strip() for text in samples[model].to_pylist()) for model in MODELS},
        "looping": {model: sum(samples[f"{model}_loops"].to_pylist()) for model in MODELS},
    }
