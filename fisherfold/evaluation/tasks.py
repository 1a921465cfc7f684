"""Multiple-choice questions as lm-eval tasks: the prepared questions, and a folder of task files with local data.

A task folder holds lm-eval YAML files, which may run code only where it is trusted (see ``task_code``). Relative data paths in
them start at that folder. A group whose child's name is
``{subject}`` stands for one child per file that its evaluation pattern matches, so one file describes all subjects.
"""

import contextlib
import csv
import difflib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.manager import TaskDict

from fisherfold.evaluation.task_code import require_no_code, sandbox_templates
from fisherfold.run.errors import InputError, ParameterError

SUBJECT = "{subject}"
KNOWLEDGE = "knowledge"
EVALUATION_SPLITS = ("test", "validation")
GROUP_KEYS = ("group", "group_alias", "task", "aggregate_metric_list", "metadata")
sandbox_templates()


def knowledge_task(questions: pa.Table) -> TaskDict:
    """A task over rows of the prepared question table: the choice with the largest log-likelihood is the answer.

    The prompt is the question as it stands, the continuation a space and the choice.
    """
    config = {
        "task": KNOWLEDGE,
        "custom_dataset": lambda **_: {"test": datasets.Dataset(questions.replace_schema_metadata(None))},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    return TaskManager(include_defaults=False).load([config])


def manager_of(name: str, folder: Path | None, shipped: Path | None = None, trusted: bool = False) -> TaskManager:
    """What knows the task or group `name`: the files in `folder`, else those in `shipped`, else lm-eval itself.

    Args:
        trusted: whether the folder's files may run code.

    Raises:
        ParameterError: none of them does, and the message gives the nearest names; or files that are not trusted would run code.
    """
    folders = list(dict.fromkeys(path for path in (shipped, folder) if path))
    local = TaskManager(include_path=folders, include_defaults=False)
    if name in local.task_index:
        if not trusted:
            require_no_code(name, local.task_index)
        return local
    known = [*local.all_tasks, *_lm_eval_tasks().all_tasks]
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, n=3)) or "none"
        raise ParameterError(f"evaluate.tasks = {name!r}: neither the task folder nor lm-eval has it. Near: {near}.")
    return _lm_eval_tasks()


@functools.cache
def _lm_eval_tasks() -> TaskManager:
    """All tasks that come with lm-eval; reading their files takes seconds."""
    return TaskManager()


def load_task(name: str, folder: Path | None, shipped: Path | None = None, trusted: bool = False) -> TaskDict:
    """The task or group `name`, see `manager_of`. Relative paths of data files start at `folder`.

    Raises:
        ParameterError: see `manager_of`.
        InputError: the task's data cannot be read; lm-eval's own tasks fetch theirs from the hub.
    """
    manager = manager_of(name, folder, shipped, trusted)
    entry = manager.task_index[name]
    if entry.yaml_path and any(path and path in entry.yaml_path.parents for path in (folder, shipped)):
        entry.cfg, entry.yaml_path = _read_task_file(entry.yaml_path, folder or Path()), None
    try:
        with contextlib.chdir(folder or Path()):
            return manager.load([name])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"evaluate.tasks: task {name!r} cannot be loaded: {type(error).__name__}: {error}") from error


def _read_task_file(path: Path, folder: Path) -> dict[str, Any]:
    """A task file; in a group whose children are named by subject, one child per subject with the group's settings."""
    config = load_yaml(path)
    if not isinstance(config.get("task"), list):
        return config
    shared = {key: config.pop(key) for key in list(config) if key not in GROUP_KEYS}
    config["task"] = [each for child in config["task"] for each in _expand_child(child, shared, path, folder)]
    return config


def _expand_child(
    child: str | dict[str, Any], shared: dict[str, Any], path: Path, folder: Path
) -> list[str | dict[str, Any]]:
    own = {"task": child} if isinstance(child, str) else child
    settings = {**shared, **own}
    if SUBJECT not in settings.get("task", ""):
        return [settings if shared else child]
    subjects = _find_subjects(settings["dataset_kwargs"], folder)
    if not subjects:
        raise InputError(f"{path}: no file below {folder.resolve()} matches {settings['dataset_kwargs']}.")
    return [_fill(settings, subject) for subject in subjects]


def _find_subjects(patterns: dict[str, Any], folder: Path) -> list[str]:
    pattern = next((patterns[split] for split in EVALUATION_SPLITS if split in patterns), "")
    before, _, after = Path(pattern).name.partition(SUBJECT)
    files = folder.glob(pattern.replace(SUBJECT, "*"))
    return sorted({file.name[len(before) : len(file.name) - len(after)] for file in files})


def _fill(value: Any, subject: str) -> Any:
    """`value` with the placeholder replaced in every string of it."""
    if isinstance(value, str):
        return value.replace(SUBJECT, subject)
    if isinstance(value, list):
        return [_fill(item, subject) for item in value]
    if isinstance(value, dict):
        return {key: _fill(item, subject) for key, item in value.items()}
    return value


def four_choice_csv(**splits: str) -> dict[str, datasets.Dataset]:
    """Read MMLU's CSV layout, without a header: question, four choices, and the letter A to D of the answer.

    For use in a task file: ``custom_dataset: !function fisherfold.evaluation.tasks.four_choice_csv``, with one glob pattern per split in
    ``dataset_kwargs``. Documents have `question`, `choices` and `answer` (0 to 3) as in the hub's data set. A pattern that
    matches no file gives an empty split.

    Raises:
        InputError: a row has another form; the message names the file and the row.
    """
    return {
        split: _read_split(pattern)
        for split, pattern in splits.items()
        if split in ("train", "dev", *EVALUATION_SPLITS)
    }


def _read_split(pattern: str) -> datasets.Dataset:
    schema = pa.schema([("question", pa.string()), ("choices", pa.list_(pa.string())), ("answer", pa.int64())])
    rows = [row for path in sorted(Path().glob(pattern)) for row in _read_rows(path)]
    return datasets.Dataset(pa.Table.from_pylist(rows, schema=schema))


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        for number, cells in enumerate(csv.reader(file), start=1):
            if len(cells) != 6 or cells[5].strip() not in ("A", "B", "C", "D"):
                raise InputError(
                    f"{path.resolve()}, row {number}: expected a question, four choices and a letter A to D, "
                    f"found {cells!r}."
                )
            yield {"question": cells[0], "choices": cells[1:5], "answer": "ABCD".index(cells[5].strip())}
