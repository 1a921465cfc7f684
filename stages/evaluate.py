"""Stage `evaluate`: the dense and the compressed model side by side, on text, on knowledge questions, on further tasks.

Text: perplexity exp(mean loss) over all predicted tokens of the evaluation sequences and, in the same pass, the
divergence KL(dense ‖ compressed) per token in nats. Questions: the share answered right, through lm-eval. A model's answer
is the choice of largest log-likelihood (lm-eval's `acc`); `acc_norm`, per character, is recorded beside it. The choices of
one question are of one kind and much alike in length, and the demo model answers more of them by `acc` (52.5 % of 200
against 49.5 %).

    artifacts/evaluate/metrics.json       the figures, unrounded; knowledge_accuracy is null where there are no questions
    artifacts/evaluate/evaluation.json    what was measured, standard errors, paired differences
    artifacts/evaluate/losses.csv         mean loss by position in the sequence
    artifacts/evaluate/questions.parquet  the answers of both models to every question
    artifacts/evaluate/tasks.json         results of `evaluate.tasks`

Units: shards of sequences on both models, runs of questions on one model, one task on one model.
"""

import csv
import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer, PreTrainedModel

from fisherfold.evaluation.harness import SharedContextModel, run_tasks
from fisherfold.evaluation.losses import compare_tokens
from fisherfold.evaluation.scores import MODELS, mean_by_position, summarise_answers, summarise_losses, tidy_results
from fisherfold.evaluation.tasks import KNOWLEDGE, knowledge_task, load_task, manager_of
from fisherfold.network.models import DTYPES, load_model
from fisherfold.run.errors import CorruptArtifact, InputError, NumericalError, ParameterError
from fisherfold.run.files import describe_files, digest_file, digest_json, verify_output
from fisherfold.run.params import EvaluateParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.store import read_array, write_arrays
from fisherfold.run.tables import read_sequences, read_table
from fisherfold.run.workspace import Workspace

ACCURACY = "acc"
BATCHES_PER_SHARD = 2
QUESTIONS_PER_UNIT = 100
POSITION_RUNS = 32
SIZES = tuple(
    f"{what}_{model}" for what in ("targeted_parameters", "model_parameters", "model_bytes") for model in MODELS
)
ANSWERS = pa.schema(
    [("question", pa.int32()), ("article", pa.string()), ("answer", pa.int32())]
    + [(model, pa.int32()) for model in MODELS]
    + [(f"{model}_log_likelihoods", pa.list_(pa.float64())) for model in MODELS]
)


@dataclass(frozen=True)
class ModelRun:
    """One model and how it is run.

    Attributes:
        folder: its Hugging Face folder.
        own_code: whether the folder carries code of ours that loads it.
        dtype: what it computes in; probabilities are float32.
        batch_size: sequences in one forward pass.
        pass_tokens: tokens in one forward pass over questions: as many as a batch of sequences has, so memory is alike.
    """

    folder: Path
    own_code: bool
    dtype: str
    batch_size: int
    pass_tokens: int


def run(workspace: Workspace, params: EvaluateParams) -> None:
    """Measure both models and publish ``artifacts/evaluate``.

    Raises:
        CorruptArtifact: a model, a table or factorize.json is missing or damaged.
        InputError: the models and the table do not share one vocabulary, or a task's data cannot be read.
        ParameterError: a task is unknown, or the task folder does not exist.
        NumericalError: a model gives losses that are not finite.
    """
    with Scratch(workspace, "evaluate", params, _inputs(workspace, params)) as scratch:
        if scratch.republish():
            return
        size, models, questions = _read_sizes(workspace), _models(workspace, params), _read_questions(workspace)
        for task in params.tasks:
            manager_of(task, *_task_folders(workspace, params))
        try:
            losses = _measure_losses(scratch, models, workspace.table("evaluation"))
            answers = _answer_questions(scratch, models, workspace.table("questions"), len(questions))
            tasks = _run_further_tasks(
                scratch, models, params.tasks, _task_folders(workspace, params), params.task_limit
            )
        finally:
            _loaded.cache_clear()
        text, knowledge = summarise_losses(losses), summarise_answers(answers)
        with scratch.publish() as out:
            _write_json(out / "metrics.json", _metrics(text, knowledge, size))
            _write_json(out / "evaluation.json", {"params": params.model_dump(), "text": text, "knowledge": knowledge})
            _write_json(out / "tasks.json", tasks)
            _write_losses(out / "losses.csv", losses)
            pq.write_table(_answers_table(questions, answers), out / "questions.parquet")


def _inputs(workspace: Workspace, params: EvaluateParams) -> dict[str, str]:
    """Digests of all that the result depends on."""
    task_folders = {
        str(number): describe_files(path) for number, path in enumerate(_task_folders(workspace, params)) if path
    }
    return {
        "dense": verify_output(workspace.out("prepare"), "model/"),
        "compressed": verify_output(workspace.out("factorize")),
        "evaluation": digest_file(workspace.table("evaluation")),
        "questions": digest_file(workspace.table("questions")) if workspace.table("questions").exists() else "none",
        "task_folders": digest_json(task_folders),
    }


def _task_folders(workspace: Workspace, params: EvaluateParams) -> tuple[Path | None, Path | None]:
    """The user's folder of task files and data, and the one that comes with the project."""
    folder = workspace.root / params.task_folder if params.task_folder else None
    if folder and not folder.is_dir():
        raise ParameterError(f"evaluate.task_folder = {params.task_folder!r}: {folder} is not a folder.")
    shipped = workspace.recipes("tasks")
    return folder, shipped if shipped.is_dir() else None


def _read_sizes(workspace: Workspace) -> dict[str, int]:
    path = workspace.out("factorize") / "factorize.json"
    try:
        size = json.loads(path.read_text(encoding="utf-8"))
        return {name: size[name] for name in SIZES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        cure = "Write it with `dvc repro --force --single-item factorize`."
        raise CorruptArtifact(f"{path} does not give the models' sizes ({error!r}). {cure}") from None


def _models(workspace: Workspace, params: EvaluateParams) -> dict[str, ModelRun]:
    length = len(read_table(workspace.table("evaluation"))["input_ids"][0])
    how = (params.dtype, params.batch_size, params.batch_size * length)
    return {
        "dense": ModelRun(workspace.model, False, *how),
        "compressed": ModelRun(workspace.out("factorize") / "model", True, *how),
    }


@lru_cache(maxsize=2)
def _loaded(model: ModelRun) -> PreTrainedModel:
    """The model in memory; both stay there from unit to unit."""
    return load_model(model.folder, DTYPES[model.dtype], trust_remote_code=model.own_code)


def _measure_losses(scratch: Scratch, models: dict[str, ModelRun], table: Path) -> dict[str, np.ndarray]:
    """Losses and divergence [S, T-1] of all evaluation sequences, as `compare_tokens` names them."""
    sequences, step = read_table(table).num_rows, models["dense"].batch_size * BATCHES_PER_SHARD
    units = {
        f"losses-{shard:05d}": (models, table, start, min(start + step, sequences))
        for shard, start in enumerate(range(0, sequences, step))
    }
    folders = scratch.map("perplexity", _measure_shard, units).values()
    return {
        name: np.concatenate([read_array(folder / "losses", name).numpy() for folder in folders])
        for name in (*MODELS, "divergence")
    }


def _measure_shard(folder: Path, models: dict[str, ModelRun], table: Path, start: int, stop: int) -> None:
    """Unit: losses of sequences `start` to `stop`, by batches."""
    dense, compressed = (_loaded(models[name]) for name in MODELS)
    ids = read_sequences(table, _common_vocabulary(dense, compressed))[start:stop]
    batches = [compare_tokens(dense, compressed, batch) for batch in ids.split(models["dense"].batch_size)]
    losses = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    for name in MODELS:
        bad = (~losses[name].isfinite()).any(-1).nonzero().flatten().tolist()
        if bad:
            raise _not_finite(folder, models[name], f"the loss in evaluation sequence {start + bad[0]}")
    write_arrays(folder / "losses", losses)


def _common_vocabulary(dense: PreTrainedModel, compressed: PreTrainedModel) -> int:
    sizes = [model.get_input_embeddings().weight.shape[0] for model in (dense, compressed)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"The dense model knows {sizes[0]} tokens and the compressed one {sizes[1]}: run stage 'factorize' again."
        )
    return sizes[0]


def _not_finite(folder: Path, model: ModelRun, what: str) -> NumericalError:
    return NumericalError(
        f"Stage 'evaluate', unit {folder.stem!r}: {what} is not finite with the model in {model.folder}. Finished units "
        f"are kept. Models overflow in float16, seldom in bfloat16 or float32 (evaluate.dtype is {model.dtype}); "
        "otherwise its weights are at fault."
    )


def _read_questions(workspace: Workspace) -> pa.Table:
    path = workspace.table("questions")
    return read_table(path) if path.exists() else pa.table({"question": []})


def _answer_questions(scratch: Scratch, models: dict[str, ModelRun], table: Path, count: int) -> dict[str, list[dict]]:
    """The answers of each model; empty lists where there are no questions."""
    runs = range(0, count, QUESTIONS_PER_UNIT)
    units = {f"knowledge-{name}-{start:06d}": (model, table, start) for name, model in models.items() for start in runs}
    folders = scratch.map("knowledge questions", _answer_run, units) if units else {}
    return {
        name: [
            row
            for start in runs
            for row in json.loads(
                (folders[f"knowledge-{name}-{start:06d}"] / "answers.json").read_text(encoding="utf-8")
            )
        ]
        for name in models
    }


def _answer_run(folder: Path, model: ModelRun, table: Path, start: int) -> None:
    """Unit: QUESTIONS_PER_UNIT questions from `start` on."""
    task = knowledge_task(read_table(table).slice(start, QUESTIONS_PER_UNIT))
    samples = run_tasks(_harness_model(model), task, samples=True)["samples"][KNOWLEDGE]
    rows = [
        {
            "log_likelihoods": [value for value, _ in sample["filtered_resps"]],
            "acc": sample["acc"],
            "acc_norm": sample["acc_norm"],
        }
        for sample in sorted(samples, key=lambda sample: sample["doc_id"])
    ]
    if not all(math.isfinite(value) for row in rows for value in row["log_likelihoods"]):
        raise _not_finite(folder, model, "a log-likelihood")
    _write_json(folder / "answers.json", rows)


def _harness_model(model: ModelRun, label: str | None = None) -> SharedContextModel:
    tokenizer = AutoTokenizer.from_pretrained(model.folder, local_files_only=True, trust_remote_code=model.own_code)
    return SharedContextModel(_loaded(model), tokenizer, model.pass_tokens, model.batch_size, label)


def _run_further_tasks(
    scratch: Scratch, models: dict[str, ModelRun], tasks: list[str], task_folders: tuple, limit: int | None
) -> dict[str, dict]:
    """Results of `evaluate.tasks`: by task as asked for, model, and lm-eval's name of each group and task in it."""
    units = {
        (task, name): f"task-{number:03d}-{re.sub('[^A-Za-z0-9_.-]', '_', task)}-{name}"
        for number, task in enumerate(tasks)
        for name in models
    }
    work = {
        unit: (models[name], task, task_folders, limit, f"{task}, {name} model,")
        for (task, name), unit in units.items()
    }
    folders = scratch.map("lm-eval tasks", _run_task, work) if work else {}
    return {
        task: {
            name: json.loads((folders[units[task, name]] / "results.json").read_text(encoding="utf-8"))
            for name in models
        }
        for task in tasks
    }


def _run_task(folder: Path, model: ModelRun, task: str, task_folders: tuple, limit: int | None, label: str) -> None:
    """Unit: one lm-eval task or group on one model."""
    results = run_tasks(_harness_model(model, label), load_task(task, *task_folders), limit)["results"]
    _write_json(folder / "results.json", {name: tidy_results(values) for name, values in results.items()})


def _metrics(text: dict, knowledge: dict | None, size: dict[str, int]) -> dict:
    accuracy = knowledge["mean"][ACCURACY] if knowledge else dict.fromkeys(MODELS)
    metrics = {
        model: {"perplexity": text["perplexity"][model], "knowledge_accuracy": accuracy[model]} for model in MODELS
    }
    metrics["compressed"]["kl_to_dense"] = text["mean"]["divergence"]
    return {**metrics, "size": size}


def _write_losses(path: Path, losses: dict[str, np.ndarray]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["position", *MODELS])
        writer.writerows(mean_by_position(losses, POSITION_RUNS))


def _answers_table(questions: pa.Table, answers: dict[str, list[dict]]) -> pa.Table:
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


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
