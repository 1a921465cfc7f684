"""Knowledge questions with choices: a recipe of ``data/questions``, or local files.

A model answers by the likelihood of each choice as the continuation of the question, with one space between; so a
question ends without a space and a choice begins without one.
"""

import csv
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fisherfold.inputs.packages import fetch_file
from fisherfold.inputs.recipes import QuestionsRecipe, Source, find_path, find_recipe, unknown_input
from fisherfold.run.errors import InputError
from fisherfold.run.params import PrepareParams
from fisherfold.run.tables import QUESTIONS
from fisherfold.run.workspace import Workspace

CHOICES = 4
LETTERS = "ABCD"
FIELDS = ("question", "choices", "answer")


@dataclass(frozen=True)
class QuestionSet:
    """A set of questions, ready to be drawn from: a recipe's file, or local files."""

    source: Source
    files: tuple[Path, ...]
    recipe: QuestionsRecipe | None = None


def find_questions(workspace: Workspace, params: PrepareParams) -> QuestionSet | None:
    """What ``prepare.questions`` means; None for none.

    Raises:
        InputError: it is no recipe, no Parquet or JSON Lines file, and no folder of CSV files.
    """
    name = params.questions
    if name is None:
        return None
    recipe = find_recipe(workspace, "questions", name, QuestionsRecipe)
    if recipe:
        return QuestionSet(Source.from_recipe(name, recipe), (fetch_file(recipe.file),), recipe)
    path = find_path(workspace, name)
    if path is None:
        raise unknown_input(
            workspace,
            "prepare.questions",
            "questions",
            name,
            "questions from the hub are lm-eval tasks (evaluate.tasks)",
        )
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files or files[0].suffix not in READERS:
        raise InputError(
            f"prepare.questions = {name!r}: {path} is neither a .parquet or .jsonl file of questions nor a folder of "
            "CSV files in MMLU's layout (no header; question, four choices, answer letter)."
        )
    return QuestionSet(Source.from_files(name, files), tuple(files))


def draw_questions(questions: QuestionSet | None, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows of the questions table (see ``tables``) in a seeded order; a larger count keeps the first ones.

    Raises:
        InputError: there are fewer, or one is not valid.
    """
    if questions is None:
        return []
    found = _matching(questions, seed) if questions.recipe else _shuffled(_read(questions), seed)
    rows = [row for row, _ in zip(found, range(count))]
    if len(rows) < count:
        raise InputError(
            f"Question set {questions.source.name!r} holds {len(rows)} questions, asked are prepare.question_count = "
            f"{count}. Set it to at most {len(rows)}."
        )
    return rows


def _shuffled(rows: list[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    random.Random(seed).shuffle(rows)
    yield from rows


def _matching(questions: QuestionSet, seed: int) -> Iterator[dict[str, Any]]:
    """Questions "which answer belongs to this title", distractors from the title's topic where that holds enough."""
    recipe = questions.recipe
    records = _recipe_records(questions)
    pools: dict[str, dict[str, str]] = defaultdict(dict)
    for record in records:
        for pool in (record[recipe.topic_field], ""):  # "" pools all topics
            pools[pool].setdefault(record[recipe.answer_field].casefold(), record[recipe.answer_field])
    random.Random(seed).shuffle(records)
    for record in records:
        title, answer = record[recipe.title_field], record[recipe.answer_field]
        pool = pools[record[recipe.topic_field]]
        others = [
            text for key, text in (pool if len(pool) >= CHOICES else pools[""]).items() if key != answer.casefold()
        ]
        generator = random.Random(f"{seed} {title}")  # its own, so that no question depends on the ones before
        choices = [answer, *generator.sample(others, CHOICES - 1)]
        generator.shuffle(choices)
        question = recipe.prompt.replace("{title}", title)
        yield {"question": question, "choices": choices, "answer": choices.index(answer), "article": title}


def _recipe_records(questions: QuestionSet) -> list[dict[str, Any]]:
    """The records of a recipe's JSON file that have a title and an answer."""
    recipe = questions.recipe
    document = _parse(questions.files[0].read_text(encoding="utf-8"), str(questions.files[0]))
    rows = list(document.values()) if isinstance(document, dict) else document
    records = [row for row in rows if row.get(recipe.title_field) and row.get(recipe.answer_field)]
    if len({row[recipe.answer_field].casefold() for row in records}) < CHOICES:
        raise InputError(
            f"Question set {questions.source.name!r}: {questions.files[0]} holds fewer than {CHOICES} different "
            "answers."
        )
    return [{recipe.topic_field: "", **row} for row in records]


def _read(questions: QuestionSet) -> list[dict[str, Any]]:
    """All rows of local question files, checked."""
    rows = []
    for file in questions.files:
        for number, row in enumerate(READERS[file.suffix](file), start=1):
            rows.append(_checked(row, f"{file}, question {number}"))
    return rows


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    missing = [field for field in FIELDS if field not in row]
    if missing:
        raise InputError(
            f"{where} has no field {missing[0]!r}; its fields are {', '.join(sorted(row))}. Needed are "
            f"{', '.join(FIELDS)}."
        )
    choices = list(row["choices"])
    if (
        len(choices) < 2
        or len(set(choices)) < len(choices)
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise InputError(f"{where}: the choices must be two or more different texts, not {choices!r}.")
    answer = row["answer"]
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise InputError(
            f"{where}: the answer must be the number of a choice, 0 to {len(choices) - 1}, not {answer!r}."
        )
    article = row.get("article") or where.rpartition("/")[2]
    return {"question": str(row["question"]), "choices": choices, "answer": answer, "article": str(article)}


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from pq.read_table(file).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file} is not a readable Parquet file ({error}).") from None


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines()
    yield from (_parse(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1) if line.strip())


def _csv_rows(file: Path) -> Iterator[dict[str, Any]]:
    """MMLU's CSV files, asked as the MMLU paper and lm-eval do: the choices in the question, answered by letter.

    Source: Hendrycks et al. 2021, arXiv:2009.03300.
    """
    subject = file.stem.removesuffix("_val").removesuffix("_dev").removesuffix("_test").replace("_", " ")
    with file.open(encoding="utf-8", newline="") as text:
        for number, row in enumerate(csv.reader(text), start=1):
            if len(row) != CHOICES + 2 or row[-1].strip() not in tuple(LETTERS):
                raise InputError(
                    f"{file}, question {number}: expected question, four choices and a letter A to D, found {row!r}."
                )
            listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row[1:-1]))
            head = f"The following are multiple choice questions (with answers) about {subject}."
            question = f"{head}\n\n{row[0].strip()}\n{listed}\nAnswer:"
            yield {"question": question, "choices": list(LETTERS), "answer": LETTERS.index(row[-1].strip())}


READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".parquet": _parquet_rows,
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
}
"""Local formats by the end of the file's name."""


def questions_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table of the questions schema; no rows make an empty table."""
    return pa.Table.from_pylist(rows, schema=QUESTIONS)


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON ({error}).") from None
