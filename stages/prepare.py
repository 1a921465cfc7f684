"""Stage `prepare`: the dense model as a Hugging Face folder, text as disjoint tables of tokens, the questions.

Evaluation, tuning, calibration and training are drawn from one seeded order of each corpus's articles and share none; articles
that a knowledge question is about are in none that anything learns from. Shares of tuning,
calibration and training are what the model writes itself (`written_text`): free text, what goes on from text of the corpus and, if it is a chat model, answers to prompts; those to held-out prompts are for evaluation.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from fisherfold.inputs.corpora import Corpus, find_corpora, read_articles
from fisherfold.inputs.embedded import require_embedded
from fisherfold.inputs.pretrained import (
    ModelSource,
    check_model,
    count_parameters,
    find_model,
    positions_of,
    write_model,
)
from fisherfold.inputs.prompts import PromptList, find_prompts
from fisherfold.inputs.questions import (
    QuestionSet,
    draw_questions,
    find_questions,
    questions_table,
    require_askable,
)
from fisherfold.inputs.recipes import Source
from fisherfold.inputs.splits import (
    Split,
    as_much_as_there_is,
    as_split,
    draw_splits,
    interleave,
    portions,
    split_of,
    start_token,
)
from fisherfold.inputs.targeting import write_targets
from fisherfold.inputs.tokenizer_files import vocabulary_size
from fisherfold.inputs.written_text import WrittenText, continue_text, write_own_text
from fisherfold.network.coverage import describe_coverage
from fisherfold.network.layers import DENSE_FILE, LAYERS_FILE
from fisherfold.network.models import DTYPES
from fisherfold.run.disk import replace_folder
from fisherfold.run.errors import InputError
from fisherfold.run.params import PrepareParams
from fisherfold.run.progress import announce
from fisherfold.run.scratch import Scratch
from fisherfold.run.tables import ANSWERS, read_table, write_sequences, write_table
from fisherfold.run.workspace import Workspace

WINDOWS = "windows.parquet"
QUESTIONS = "questions.parquet"
LACKING = "lacking.json"
TOKENIZER_BYTES = 64 * 2**20  # a large vocabulary with its merges
TOKEN_BYTES = 8  # of one token in the tables, article names included


def run(
    workspace: Workspace, params: PrepareParams, look_ahead: Callable[[Path, Path], None] = lambda model, found: None
) -> None:
    """Write ``artifacts/prepare`` (model, prepare.json) and ``data/prepared`` (the six tables).

    Args:
        look_ahead: is given the folders of the model and of what was found of its layers, once they are there, and may refuse them.

    Raises:
        InputError: the model, a corpus, the prompts or the question set cannot be used as asked.
        NotEnoughDisk: the model would not fit.
    """
    model, corpora, questions, prompts = find_inputs(workspace, params)
    sources = {"model": model.source} | {_key("corpus", i): corpus.source for i, corpus in enumerate(corpora)}
    sources |= {name: found.source for name, found in (("questions", questions), ("prompts", prompts)) if found}
    with Scratch(workspace, "prepare", params, {name: source.digest for name, source in sources.items()}) as scratch:
        tables = scratch.folder / "tables"
        if not scratch.republish("tables"):
            check_model(model, params.sequence_length)
            scratch.require_disk(_bytes_needed(model, params))
            loaded = scratch.map("model", write_model, {"model": (model, params.dtype)})["model"]
            layers = scratch.map("layers", write_targets, {"layers": _trial(loaded / "model", params)})["layers"]
            coverage = json.loads((layers / "coverage.json").read_text(encoding="utf-8"))
            for line in describe_coverage(coverage):
                announce("prepare", line)
            look_ahead(loaded / "model", layers)
            tokenizer = _tokenizer(loaded / "model")
            written = write_own_text(scratch, loaded / "model", tokenizer, prompts.texts if prompts else (), params)
            texts = Texts(loaded / "model", corpora, questions, params, written)
            drawn = scratch.map("corpora", draw_texts, {"corpora": (texts,)})["corpora"]
            training = json.loads((drawn / LACKING).read_text(encoding="utf-8"))
            if size := training["lacking"]:
                if size > written.to_continue(params):
                    of_all = f"of {training['asked']} sequences for training {size}"
                    announce("prepare", f"{of_all} go on from the calibration's text, as the corpus ends")
                start = start_token(tokenizer)
                more = continue_text(scratch, loaded / "model", drawn / WINDOWS, size, start, params)
                texts = replace(texts, written=replace(written, continued=more))
            tokenised = scratch.map("tables", write_tables, {"tables": (texts, drawn)})["tables"]
            scratch.keep("tables", tokenised / "tables")
            with scratch.publish() as out:
                replace_folder(loaded / "model", out / "model")
                for name in (LAYERS_FILE, DENSE_FILE):
                    shutil.copyfile(layers / name, out / name)
                parts = {
                    "model": loaded / "facts.json",
                    "data": tokenised / "facts.json",
                    "coverage": layers / "coverage.json",
                }
                _write_facts(out / "prepare.json", sources, parts)
        replace_folder(tables, workspace.table("calibration").parent)


def find_inputs(
    workspace: Workspace, params: PrepareParams
) -> tuple[ModelSource, list[Corpus], QuestionSet | None, PromptList | None]:
    """What the names in the parameters mean.

    Raises:
        InputError: the model, a corpus, the prompts or the question set cannot be had.
    """
    prompts = find_prompts(workspace, params.prompts) if params.self_written or params.held_out_prompts else None
    return find_model(workspace, params), find_corpora(workspace, params), find_questions(workspace, params), prompts


def _key(name: str, number: int) -> str:
    return name if number == 0 else f"{name} {number + 1}"


def _tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model, local_files_only=True)


@dataclass(frozen=True)
class Texts:
    """What the tables are drawn from."""

    model: Path
    corpora: Sequence[Corpus]
    questions: QuestionSet | None
    params: PrepareParams
    written: WrittenText


class Vocabulary(NamedTuple):
    """The tokenizer, how many tokens the model embeds, and how many of these there are."""

    tokenizer: PreTrainedTokenizerBase
    embedded: int
    size: int

    @classmethod
    def of(cls, model: Path) -> "Vocabulary":
        """That of the prepared model."""
        tokenizer = _tokenizer(model)
        embedded = json.loads((model.parent / "facts.json").read_text(encoding="utf-8"))["embedded_tokens"]
        size = min(vocabulary_size(tokenizer), embedded)
        if (tokenizer.eos_token_id or 0) >= embedded:
            tokenizer.eos_token = None  # it would stand behind every document, and the model does not know it
        return cls(tokenizer, embedded, size)


def draw_texts(folder: Path, texts: Texts) -> None:
    """Unit: what the corpora give to every split, a table for each of them, the questions, and how many sequences for training are still to go on
    from the windows of the calibration, which are a table then.

    Raises:
        InputError: a corpus is too small, or a question cannot be asked.
    """
    params, vocabulary = texts.params, Vocabulary.of(texts.model)
    rows = askable_questions(texts, vocabulary)
    write_table(folder / QUESTIONS, questions_table(rows), vocabulary.size)
    own = texts.written.splits(vocabulary.tokenizer, params)
    wanted = {name: size - sum(len(split) for split in own.get(name, ())) for name, size in params.splits.items()}
    asked = {name: size - texts.written.to_continue(params) * (name == "training") for name, size in wanted.items()}
    reserved = {row["article"] for row in rows}
    found = as_much_as_there_is(
        lambda sizes: draw_all(texts.corpora, vocabulary.tokenizer, params, sizes, reserved), asked
    )
    for number, splits in enumerate(found):
        for name, split in splits.items():
            write_sequences(folder / _drawn(name, number), *_columns(split, vocabulary.size))
    training = wanted.get("training", 0)
    lacking = training - sum(len(splits["training"]) for splits in found if training)
    if lacking:
        write_sequences(folder / WINDOWS, *_columns(windows_to_go_on_from(found), vocabulary.size))
    (folder / LACKING).write_text(json.dumps({"asked": training, "lacking": lacking}), encoding="utf-8")


def askable_questions(texts: Texts, vocabulary: Vocabulary) -> list[dict]:
    """The questions that are drawn.

    Raises:
        InputError: one cannot be asked.
    """
    rows = draw_questions(texts.questions, texts.params.question_count, texts.params.seed)
    positions = positions_of(AutoConfig.from_pretrained(texts.model, local_files_only=True))
    tokenizer = vocabulary.tokenizer
    for row in rows:
        text = " ".join([row["question"], *row["choices"]])
        what = f"Question {row['question']!r:.80}"
        require_embedded(tokenizer(text)["input_ids"], vocabulary.embedded, tokenizer, what)
        require_askable(row, tokenizer, positions)
    return rows


def windows_to_go_on_from(found: Sequence[Mapping[str, Split]]) -> Split:
    """The calibration's of all corpora.

    Raises:
        InputError: there are none.
    """
    windows = interleave([splits["calibration"] for splits in found])
    if not len(windows):
        raise InputError(
            "prepare.continued goes on from the calibration's text of corpora, and all of the calibration is what the model writes itself. Lower "
            "prepare.self_written or prepare.free_text, or set prepare.continued: 0."
        )
    return windows


def _drawn(split: str, corpus: int) -> str:
    return f"{split}-{corpus}.parquet"


def _columns(split: Split, vocabulary: int) -> tuple:
    """What `write_sequences` is given."""
    return split.input_ids, split.articles, vocabulary, split.sources


def write_tables(folder: Path, texts: Texts, drawn: Path) -> None:
    """Unit: the six tables below ``folder/tables``, and ``folder/facts.json``: what `draw_texts` drew, and what the model has written itself, mixed evenly."""
    params, written = texts.params, texts.written
    tokenizer, embedded, vocabulary = Vocabulary.of(texts.model)
    own = written.splits(tokenizer, params)
    splits = {}
    for name in params.splits:
        tables = [read_table(drawn / _drawn(name, number)) for number in range(len(texts.corpora))]
        of_corpora = [split_of([table], params.sequence_length) for table in tables]
        splits[name] = interleave([*of_corpora, *own.get(name, ())])
    for name, split in {"training": as_split([], params.sequence_length, ""), **splits}.items():
        for ids, articles in zip(split.input_ids, split.articles, strict=True):
            require_embedded(ids, embedded, tokenizer, f"The corpus ({', '.join(articles[:2])})")
        write_sequences(folder / "tables" / f"{name}.parquet", *_columns(split, vocabulary))
    shutil.copyfile(drawn / QUESTIONS, folder / "tables" / QUESTIONS)
    answers = [read_table(file) for file in written.answers.get("evaluation", ())]
    write_table(
        folder / "tables" / "answers.parquet",
        pa.concat_tables(answers) if answers else ANSWERS.empty_table(),
        vocabulary,
    )
    facts = _table_facts(splits, tokenizer, params, len(read_table(drawn / QUESTIONS)))
    (folder / "facts.json").write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")


def draw_all(
    corpora: Sequence[Corpus],
    tokenizer: PreTrainedTokenizerBase,
    params: PrepareParams,
    wanted: Mapping[str, int],
    reserved: set[str],
) -> list[dict[str, Split]]:
    """Of each corpus its share of every split; unseen corpora give to evaluation alone.

    Args:
        wanted: sequences of every split, in the order of drawing.

    Raises:
        CorpusTooSmall: one is.
    """
    unseen = portions([entry.share for entry in params.unseen_corpora], params.unseen_sequences)
    shares = {
        name: portions([entry.share for entry in params.corpora], size)
        + (unseen if name == "evaluation" else [0] * len(unseen))
        for name, size in wanted.items()
    }
    seen: set[bytes] = set()
    return [
        draw_splits(
            read_articles(corpus),
            tokenizer,
            {name: shares[name][i] for name in wanted},
            params.sequence_length,
            params.seed,
            reserved,
            corpus.source.name,
            seen,
        )
        for i, corpus in enumerate(corpora)
    ]


def _table_facts(
    splits: dict[str, Split], tokenizer: PreTrainedTokenizerBase, params: PrepareParams, questions: int
) -> dict:
    return {
        "sequence_length": params.sequence_length,
        "vocabulary": vocabulary_size(tokenizer),
        "start_token": start_token(tokenizer),
        "end_token": tokenizer.eos_token_id,
        "question_count": questions,
        "splits": {
            name: {
                "articles": len(split.article_names),
                "sequences": len(split),
                "sources": {source: split.sources.count(source) for source in sorted(set(split.sources))},
                "tokens": split.input_ids.size,
            }
            for name, split in splits.items()
        },
    }


def _write_facts(path: Path, sources: dict[str, Source], parts: Mapping[str, Path]) -> None:
    """prepare.json: where everything comes from, and the facts that units have written, by name."""
    facts = {name: dict(vars(source)) for name, source in sources.items()}
    for name, file in parts.items():
        facts[name] = facts.get(name, {}) | json.loads(file.read_text(encoding="utf-8"))
    path.write_text(json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _trial(model: Path, params: PrepareParams) -> tuple:
    """What `write_targets` is given."""
    return model, params.dtype, params.sequence_length, params.gates, params.experts


def _bytes_needed(model: ModelSource, params: PrepareParams) -> int:
    """What the stage will write; the published output is hard-linked to it."""
    sequences = sum(params.splits.values()) + params.unseen_sequences
    weights = count_parameters(model) * DTYPES[params.dtype].itemsize
    return weights + TOKENIZER_BYTES + sequences * params.sequence_length * TOKEN_BYTES
