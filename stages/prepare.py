"""Stage `prepare`: the dense model as a Hugging Face folder, the corpus as disjoint tables of tokens, the questions.

Evaluation, tuning and calibration are drawn from one seeded order of the corpus's articles and share none; articles
that a knowledge question is about are in neither tuning nor calibration.
"""

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fisherfold.inputs.corpora import Corpus, find_corpus, read_articles
from fisherfold.inputs.pretrained import (
    ModelSource,
    check_model,
    count_parameters,
    find_model,
    vocabulary_size,
    write_model,
)
from fisherfold.inputs.questions import QuestionSet, draw_questions, find_questions, questions_table
from fisherfold.inputs.recipes import Source
from fisherfold.inputs.splits import Split, draw_splits, start_token
from fisherfold.network.models import DTYPES
from fisherfold.run.disk import replace_folder
from fisherfold.run.params import PrepareParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.tables import write_sequences, write_table
from fisherfold.run.workspace import Workspace

TOKENIZER_BYTES = 64 * 2**20  # a large vocabulary with its merges
TOKEN_BYTES = 8  # of one token in the tables, article names included


def run(workspace: Workspace, params: PrepareParams) -> None:
    """Write ``artifacts/prepare`` (model, prepare.json) and ``data/prepared`` (the four tables).

    Raises:
        InputError: the model, corpus or question set cannot be used as asked.
        NotEnoughDisk: the model would not fit.
    """
    model = find_model(workspace, params)
    corpus = find_corpus(workspace, params)
    questions = find_questions(workspace, params)
    sources = {"model": model.source, "corpus": corpus.source} | ({"questions": questions.source} if questions else {})
    with Scratch(workspace, "prepare", params, {name: source.digest for name, source in sources.items()}) as scratch:
        tables = scratch.folder / "tables"
        if not scratch.republish("tables"):
            check_model(model, params.sequence_length)
            scratch.require_disk(_bytes_needed(model, params))
            loaded = scratch.map("model", write_model, {"model": (model, params.dtype)})["model"]
            units = {"tables": (loaded / "model", corpus, questions, params)}
            tokenised = scratch.map("tables", write_tables, units)["tables"]
            scratch.keep("tables", tokenised / "tables")
            with scratch.publish() as out:
                replace_folder(loaded / "model", out / "model")
                _write_facts(out / "prepare.json", sources, loaded / "facts.json", tokenised / "facts.json")
        replace_folder(tables, workspace.table("calibration").parent)


def write_tables(
    folder: Path, model: Path, corpus: Corpus, questions: QuestionSet | None, params: PrepareParams
) -> None:
    """Draw and tokenise; write the four tables below ``folder/tables``, and ``folder/facts.json``."""
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=params.trust_remote_code)
    vocabulary = vocabulary_size(tokenizer)
    rows = draw_questions(questions, params.question_count, params.seed)
    sizes = {
        "evaluation": params.evaluation_sequences,
        "tuning": params.tuning_sequences,
        "calibration": params.calibration_sequences,
    }
    reserved = {row["article"] for row in rows}
    splits = draw_splits(read_articles(corpus), tokenizer, sizes, params.sequence_length, params.seed, reserved)
    for name, split in splits.items():
        write_sequences(folder / "tables" / f"{name}.parquet", split.input_ids, split.articles, vocabulary)
    write_table(folder / "tables" / "questions.parquet", questions_table(rows), vocabulary)
    (folder / "facts.json").write_text(
        json.dumps(_table_facts(splits, tokenizer, params, len(rows)), sort_keys=True), encoding="utf-8"
    )


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
                "sequences": len(split.articles),
                "tokens": split.input_ids.size,
            }
            for name, split in splits.items()
        },
    }


def _write_facts(path: Path, sources: dict[str, Source], model_facts: Path, table_facts: Path) -> None:
    facts = {name: vars(source) for name, source in sources.items()}
    facts["model"] |= json.loads(model_facts.read_text(encoding="utf-8"))
    facts["data"] = json.loads(table_facts.read_text(encoding="utf-8"))
    path.write_text(json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _bytes_needed(model: ModelSource, params: PrepareParams) -> int:
    """What the stage will write; the published output is hard-linked to it."""
    sequences = params.calibration_sequences + params.tuning_sequences + params.evaluation_sequences
    weights = count_parameters(model) * DTYPES[params.dtype].itemsize
    return weights + TOKENIZER_BYTES + sequences * params.sequence_length * TOKEN_BYTES
