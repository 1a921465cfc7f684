"""Stage `evaluate`: the dense and the compressed model side by side, on text, on their own answers, on questions, on further tasks.

Text: perplexity exp(mean loss) over all predicted tokens of the evaluation sequences and, in the same pass, the divergence
KL(dense ‖ compressed) per token in nats, over all of them and by source. Own answers: the same divergence on answers that the dense
model wrote to prompts of its own, and what both models answer when each takes its most likely tokens. Questions: the share answered
right, through lm-eval.

    artifacts/evaluate/metrics.json       the figures by name, unrounded, with standard errors; null where nothing was to be measured
    artifacts/evaluate/evaluation.json    what was measured, in more detail; layers that hold nothing but zeros
    artifacts/evaluate/losses.csv         mean loss and divergence by position in the sequence
    artifacts/evaluate/answers.parquet    every prompt with the answers of both models
    artifacts/evaluate/questions.parquet  the answers of both models to every question
    artifacts/evaluate/tasks.json         results of `evaluate.tasks`

Units: the stored weights, shards of sequences on both models, a few own answers on both models, prompts on one model, runs of
questions on one model, one task on one model, the speed of both. Times are no result: they go to artifacts/times.json.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fisherfold.evaluation.further_tasks import TaskSource, read_tasks, run_task, task_units
from fisherfold.evaluation.greedy_answers import answer_prompts, answer_units, samples_table, summarise_samples
from fisherfold.evaluation.knowledge import answer_questions, answers_table, question_units, read_answers
from fisherfold.evaluation.metrics import metrics
from fisherfold.evaluation.model_run import ModelRun, forget_models
from fisherfold.evaluation.own_answers import compare_answers, conversations, own_answer_units, summarise_own_answers
from fisherfold.evaluation.scores import COMPARED, mean_by_position, summarise_answers, summarise_losses
from fisherfold.evaluation.speed import FILE, measure_speed
from fisherfold.evaluation.stored_weights import find_zero_layers, read_zero_layers
from fisherfold.evaluation.text import loss_units, measure_losses, read_losses, sources, summarise_sources
from fisherfold.run.determinism import STREAMED, chosen_placement
from fisherfold.run.errors import CorruptArtifact, ParameterError
from fisherfold.run.files import describe_files, digest_file, digest_json, verify_output
from fisherfold.run.params import EvaluateParams
from fisherfold.run.progress import announce
from fisherfold.run.scratch import Scratch
from fisherfold.run.tables import ANSWERS, QUESTIONS, read_table
from fisherfold.run.times import note_speed
from fisherfold.run.workspace import MODELS, Workspace

POSITION_RUNS = 32
OPTIONAL_TABLES = {"answers": ANSWERS, "questions": QUESTIONS}
SIZES = tuple(
    f"{what}_{model}" for what in ("targeted_parameters", "model_parameters", "model_bytes") for model in MODELS
)
OF_MIXTURES = tuple(f"active_parameters_{model}" for model in MODELS)
CURES = {
    "dense": "The prepared model itself has it: prepare another copy of the checkpoint, or set prepare.dtype to float32.",
    "compressed": "Write the compressed model again with `dvc repro --force --single-item factorize`, or set factorize.dtype to float32.",
}


def run(workspace: Workspace, params: EvaluateParams) -> None:
    """Measure both models and publish ``artifacts/evaluate``.

    Raises:
        CorruptArtifact: a model, a table or factorize.json is missing or damaged.
        InputError: the models and the tables do not share one vocabulary, or a task's data cannot be read.
        ParameterError: a task is unknown or would run code that is not trusted, or the task folder does not exist.
        NumericalError: a model gives losses that are not finite; the message names the layer where they begin.
    """
    tasks = task_source(workspace, params)
    with Scratch(workspace, "evaluate", params, _inputs(workspace, tasks)) as scratch:
        if scratch.republish():
            return
        size, models = _read_sizes(workspace), _models(workspace, params)
        tasks.check(params.tasks)
        tables = {name: _read_table(workspace, name, schema) for name, schema in OPTIONAL_TABLES.items()}
        try:
            losses = _measure_text(scratch, models, workspace.table("evaluation"))
            own = _measure_own_answers(scratch, models, tables["answers"])
            samples = _ask_both(scratch, models, tables["answers"], params.answer_tokens)
            answers = _answer_questions(scratch, models, workspace.table("questions"), tables["questions"].num_rows)
            further = _run_tasks(scratch, models, params, tasks)
            _measure_speed(scratch, models, workspace)
        finally:
            forget_models()
        zero = _find_zero_layers(scratch, models)
        text, knowledge, greedy = summarise_losses(losses), summarise_answers(answers), summarise_samples(samples)
        by_source = summarise_sources(losses, *_sources(workspace))
        facts = {
            "text": text,
            "by_source": by_source,
            "knowledge": knowledge,
            "own_answers": own,
            "greedy_answers": greedy,
        }
        with scratch.publish() as out:
            _write_json(out / "metrics.json", metrics(text, by_source, knowledge, own, greedy, zero, size))
            _write_json(out / "evaluation.json", {"params": params.model_dump(), "zero_layers": zero, **facts})
            _write_json(out / "tasks.json", further)
            _write_losses(out / "losses.csv", losses)
            pq.write_table(samples, out / "answers.parquet")
            pq.write_table(answers_table(tables["questions"], answers), out / "questions.parquet")


def _inputs(workspace: Workspace, tasks: TaskSource) -> dict[str, str]:
    """Digests of all that the result depends on."""
    folders = [describe_files(folder) for folder in (tasks.folder, tasks.shipped) if folder]
    tables = {name: workspace.table(name) for name in ("calibration", *OPTIONAL_TABLES)}
    return {
        "dense": verify_output(workspace.out("prepare"), "model/"),
        "compressed": verify_output(workspace.out("factorize")),
        "evaluation": digest_file(workspace.table("evaluation")),
        "task_folders": digest_json(folders),
        **{name: digest_file(path) if path.exists() else "none" for name, path in tables.items()},
    }


def task_source(workspace: Workspace, params: EvaluateParams) -> TaskSource:
    """Where the files of `evaluate.tasks` lie.

    Raises:
        ParameterError: `evaluate.task_folder` is not there.
    """
    folder, shipped = workspace.root / params.task_folder, workspace.recipes("tasks")
    named = params.tasks or params.task_folder != EvaluateParams().task_folder
    if named and not folder.is_dir():
        raise ParameterError(f"evaluate.task_folder = {params.task_folder!r}: {folder} is not a folder.")
    return TaskSource(folder, shipped if shipped.is_dir() else None, params.trust_task_code)


def _read_sizes(workspace: Workspace) -> dict[str, int]:
    path = workspace.out("factorize") / "factorize.json"
    try:
        size = json.loads(path.read_text(encoding="utf-8"))
        return {name: size[name] for name in SIZES} | {name: size[name] for name in OF_MIXTURES if name in size}
    except (OSError, ValueError, KeyError, TypeError) as error:
        cure = "Write it with `dvc repro --force --single-item factorize`."
        raise CorruptArtifact(f"{path} does not give the models' sizes ({error!r}). {cure}") from None


def _models(workspace: Workspace, params: EvaluateParams) -> dict[str, ModelRun]:
    length = len(read_table(workspace.table("evaluation"))["input_ids"][0])
    folders = {"dense": workspace.model, "compressed": workspace.out("factorize") / "model"}
    how = (params.dtype, params.batch_size, params.batch_size * length)
    return {name: ModelRun(folders[name], *how, CURES[name]) for name in MODELS}


def _read_table(workspace: Workspace, name: str, schema: pa.Schema) -> pa.Table:
    """A table that a model without prompts or questions need not have."""
    path = workspace.table(name)
    return read_table(path) if path.exists() else schema.empty_table()


def _sources(workspace: Workspace) -> tuple[list[str], set[str]]:
    """The source of every evaluation sequence, and the sources that calibration draws from."""
    calibration = workspace.table("calibration")
    return sources(read_table(workspace.table("evaluation"))), set(sources(read_table(calibration)))


def _measure_text(scratch: Scratch, models: dict[str, ModelRun], table: Path) -> dict[str, np.ndarray]:
    units = loss_units(models, table, read_table(table).num_rows)
    return read_losses(list(scratch.map("perplexity", measure_losses, units).values()))


def _measure_own_answers(scratch: Scratch, models: dict[str, ModelRun], prompts: pa.Table) -> dict | None:
    units = own_answer_units(models, conversations(prompts, models["dense"].positions))
    return summarise_own_answers(list(_map(scratch, "own answers", compare_answers, units).values()))


def _ask_both(scratch: Scratch, models: dict[str, ModelRun], prompts: pa.Table, longest: int) -> pa.Table:
    folders = _map(scratch, "answers to prompts", answer_prompts, answer_units(models, prompts, longest))
    return samples_table(prompts, folders)


def _answer_questions(scratch: Scratch, models: dict[str, ModelRun], table: Path, count: int) -> dict[str, list[dict]]:
    return read_answers(_map(scratch, "knowledge questions", answer_questions, question_units(models, table, count)))


def _run_tasks(
    scratch: Scratch, models: dict[str, ModelRun], params: EvaluateParams, source: TaskSource
) -> dict[str, dict]:
    units = task_units(models, params.tasks, source, params.task_limit)
    return read_tasks(_map(scratch, "lm-eval tasks", run_task, units), params.tasks, models)


def _measure_speed(scratch: Scratch, models: dict[str, ModelRun], workspace: Workspace) -> None:
    if chosen_placement() == STREAMED:
        announce("evaluate", "no speed is measured: with one decoder block in memory it would be the disk's")
        return
    folders = scratch.map("speed", measure_speed, {"speed": (models, workspace.table("evaluation"))})
    note_speed(workspace, json.loads((folders["speed"] / FILE).read_text(encoding="utf-8")))


def _find_zero_layers(scratch: Scratch, models: dict[str, ModelRun]) -> list[str]:
    unit = {"weights": tuple(models[name].folder for name in MODELS)}
    return read_zero_layers(scratch.map("stored weights", find_zero_layers, unit)["weights"])


def _map(scratch: Scratch, doing: str, work: Callable[..., None], units: dict[str, tuple]) -> dict[str, Path]:
    """As `Scratch.map`, without a word where there is nothing to do."""
    return scratch.map(doing, work, units) if units else {}


def _write_losses(path: Path, losses: dict[str, np.ndarray]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["position", *COMPARED])
        writer.writerows(mean_by_position(losses, POSITION_RUNS))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
