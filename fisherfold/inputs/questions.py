"""Knowledge questions with choices: a recipe of ``data/questions``, or local files.

A model answers by the likelihood of each choice as the continuation of the question, with one space between; so a
question ends without a space and a choice begins without one.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from fisherfold.inputs.packages import fetch_file
from fisherfold.inputs.recipes import QuestionsRecipe, Source, find_path, find_recipe, unknown_input
from fisherfold.inputs.records import Record, file_format, files_of, read_records, read_rows
from fisherfold.run.errors import InputError
from fisherfold.run.params import PrepareParams
from fisherfold.run.tables import QUESTIONS
from fisherfold.run.workspace import Workspace

CHOICES = 4
LETTERS = "ABCD"
FIELDS = ("question", "choices", "answer")
LABELLED_ANSWER = "answerKey"  # what ARC and its like call it


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
    files = files_of(path, READERS)
    if not files:
        raise InputError(
            f"prepare.questions = {name!r}: {path} is not (or holds not) a file of questions: {', '.join(READERS)}, or one of these "
            "compressed. CSV files have MMLU's layout (no header; question, four choices, answer letter)."
        )
    return QuestionSet(Source.from_files(name, files), tuple(files))


def draw_questions(questions: QuestionSet | None, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows of the questions table (see ``tables``) in a seeded order; a larger count keeps the first ones.

    Raises:
        InputError: there are fewer, or one is not valid.
    """
    if questions is None:
        return []
    found = _matching(questions, questions.recipe, seed) if questions.recipe else _shuffled(_read(questions), seed)
    rows = [row for row, _ in zip(found, range(count))]
    if len(rows) < count:
        raise InputError(
            f"Question set {questions.source.name!r} holds {len(rows)} questions, asked are prepare.question_count = "
            f"{count}. Set it to at most {len(rows)}."
        )
    return rows


def require_askable(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, positions: int | None) -> None:
    """Refuse a question of the table that stages `capture` and `evaluate` could not ask.

    Args:
        positions: tokens that the model can read, if there is an end.

    Raises:
        InputError: a choice adds no token to the question, or both are longer than the model's positions.
    """
    where, text = f"Question {row['question']!r:.80}", row["question"]
    asked = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    for choice in row["choices"]:
        whole = f"{text} {choice}"
        if len(tokenizer(whole, add_special_tokens=False)["input_ids"]) <= asked:
            raise InputError(
                f"{where}: the model's tokenizer gives the choice {choice!r:.80} no token of its own, so no likelihood. Mend the question."
            )
        length = len(tokenizer(whole)["input_ids"])
        if positions and length > positions:
            raise InputError(
                f"{where} has {length} tokens with the choice {choice!r:.80}, and the model has {positions} positions. Take it out."
            )


def _shuffled(rows: list[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    random.Random(seed).shuffle(rows)
    yield from rows


def _matching(questions: QuestionSet, recipe: QuestionsRecipe, seed: int) -> Iterator[dict[str, Any]]:
    """Questions "which answer belongs to this title", distractors from the title's topic where that holds enough."""
    records = _recipe_records(questions, recipe)
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


def _recipe_records(questions: QuestionSet, recipe: QuestionsRecipe) -> list[dict[str, Any]]:
    """The records of a recipe's JSON file that have a title and an answer."""
    rows = [_fields(row, where) for where, row in read_records(questions.files[0])]
    records = [row for row in rows if row.get(recipe.title_field) and row.get(recipe.answer_field)]
    if len({row[recipe.answer_field].casefold() for row in records}) < CHOICES:
        raise InputError(
            f"Question set {questions.source.name!r}: {questions.files[0]} holds fewer than {CHOICES} different "
            "answers."
        )
    return [{recipe.topic_field: "", **row} for row in records]


def _read(questions: QuestionSet) -> list[dict[str, Any]]:
    """All rows of local question files, checked."""
    return [_checked(row, where) for file in questions.files for where, row in READERS[file_format(file)](file)]


def _fields(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a record with fields, but {row!r:.40}.")
    return row


def _checked(row: Any, where: str) -> dict[str, Any]:
    fields = dict(_fields(row, where))
    if LABELLED_ANSWER in fields:
        fields.setdefault("answer", fields[LABELLED_ANSWER])
    missing = [name for name in FIELDS if name not in fields]
    if missing:
        raise InputError(
            f"{where} has no field {missing[0]!r}; its fields are {', '.join(sorted(map(str, fields)))}. Needed are "
            f"{', '.join(FIELDS)}."
        )
    question = fields["question"]
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: the question must be a text, not {question!r:.40}.")
    choices, labels = _choices(fields["choices"], where)
    answer = _answer(fields["answer"], choices, labels, where)
    article = fields.get("article") or where.rpartition("/")[2]
    return {"question": question.rstrip(), "choices": choices, "answer": answer, "article": str(article)}


def _choices(found: Any, where: str) -> tuple[list[str], list[str]]:
    """The texts of the choices, and their labels where the layout has them: ``{"text": […], "label": […]}``."""
    texts, labels = (found.get("text"), found.get("label") or []) if isinstance(found, dict) else (found, [])
    if (
        not isinstance(texts, list)
        or len(texts) < 2
        or not all(isinstance(choice, str) and choice.strip() for choice in texts)
        or len({choice.strip() for choice in texts}) < len(texts)
    ):
        raise InputError(f"{where}: the choices must be two or more different texts, not {found!r:.200}.")
    if not isinstance(labels, list) or len(set(map(str, labels))) not in (0, len(texts)):
        raise InputError(f"{where}: the choices must have a label each, and different ones, not {labels!r:.200}.")
    return [choice.strip() for choice in texts], [str(label) for label in labels]


def _answer(found: Any, choices: list[str], labels: list[str], where: str) -> int:
    """The number of the right choice, given so or by its label."""
    if str(found) in labels and not isinstance(found, bool):
        return labels.index(str(found))
    numbered = any(label.isdecimal() for label in labels)  # then a number is a label, from wherever they count
    if numbered or isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < len(choices):
        number = "" if numbered else f"the number of a choice, 0 to {len(choices) - 1}"
        label = f"one of the labels {', '.join(labels)}" if labels else ""
        raise InputError(
            f"{where}: the answer must be {' or '.join(filter(None, (number, label)))}, not {found!r:.80}."
        )
    return found


def _mmlu_rows(file: Path) -> Iterator[Record]:
    """MMLU's CSV files, asked as the MMLU paper and lm-eval do: the choices in the question, answered by letter.

    Source: Hendrycks et al. 2021, arXiv:2009.03300.
    """
    stem = file.name.removesuffix("".join(file.suffixes[-2:]) if file.suffix != ".csv" else ".csv")
    subject = stem.removesuffix("_val").removesuffix("_dev").removesuffix("_test").replace("_", " ")
    for where, row in read_rows(file):
        if len(row) != CHOICES + 2 or row[-1].strip() not in tuple(LETTERS):
            raise InputError(f"{where}: expected question, four choices and a letter A to D, found {row!r}.")
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row[1:-1]))
        head = f"The following are multiple choice questions (with answers) about {subject}."
        question = f"{head}\n\n{row[0].strip()}\n{listed}\nAnswer:"
        yield where, {"question": question, "choices": list(LETTERS), "answer": LETTERS.index(row[-1].strip())}


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": read_records,
    ".ndjson": read_records,
    ".json": read_records,
    ".parquet": read_records,
    ".arrow": read_records,
    ".csv": _mmlu_rows,
}
"""Local formats by the end of the file's name."""


def questions_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table of the questions schema; no rows make an empty table."""
    return pa.Table.from_pylist(rows, schema=QUESTIONS)
