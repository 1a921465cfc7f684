"""Stage `prepare`: the dense model as a Hugging Face folder, text as disjoint tables of tokens, the questions.

Evaluation, tuning and calibration are drawn from one seeded order of each corpus's articles and share none; articles
that a knowledge question is about are in neither tuning nor calibration. A chat model also answers prompts: a share of tuning and
calibration is what it writes itself, and its answers to held-out prompts are for evaluation.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from fisherfold.inputs.conversations import has_chat_format
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
from fisherfold.inputs.self_written import (
    BATCH,
    MOST_ROUNDS,
    Turns,
    batch_size,
    conversation_split,
    conversations,
    split_prompts,
    write_answers,
)
from fisherfold.inputs.splits import Split, as_split, draw_splits, interleave, portions, start_token
from fisherfold.inputs.targeting import write_targets
from fisherfold.inputs.tokenizer_files import vocabulary_size
from fisherfold.network.coverage import describe_coverage
from fisherfold.network.layers import DENSE_FILE, LAYERS_FILE
from fisherfold.network.models import DTYPES
from fisherfold.run.disk import replace_folder
from fisherfold.run.params import PrepareParams
from fisherfold.run.progress import announce
from fisherfold.run.scratch import Scratch
from fisherfold.run.tables import ANSWERS, read_table, write_sequences, write_table
from fisherfold.run.workspace import Workspace

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
            written = self_written(scratch, loaded / "model", prompts.texts if prompts else (), params)
            units = {"tables": (loaded / "model", corpora, questions, params, written)}
            tokenised = scratch.map("tables", write_tables, units)["tables"]
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


def self_written(
    scratch: Scratch, model: Path, prompts: Sequence[str], params: PrepareParams
) -> dict[str, tuple[Path, ...]]:
    """Let a chat model answer prompts until every split has its share; files of answers by split."""
    if not prompts or not has_chat_format(_tokenizer(model)):
        return {}
    split = split_prompts(prompts, params.held_out_prompts, params.seed)
    held_out = Turns(split.evaluation, rounds=1)
    batches = iter(lambda: held_out.take(BATCH), None)
    found = {"evaluation": tuple(_answer(scratch, model, "evaluation", batches, params))}
    calibration = Turns(split.calibration, MOST_ROUNDS)  # healing goes on behind it: other answers
    asked = {"tuning": Turns(split.tuning, MOST_ROUNDS), "calibration": calibration, "healing": calibration}
    for name, size in _self_written_sequences(params).items():
        found[name] = tuple(_answer_until(scratch, model, name, asked[name], size * params.sequence_length, params))
    return found


def _answer_until(
    scratch: Scratch,
    model: Path,
    name: str,
    turns: Turns,
    tokens: int,
    params: PrepareParams,
) -> Iterator[Path]:
    """Answers to the next prompts until they hold `tokens`."""
    held = answered = 0
    while held < tokens:
        batch = turns.take(batch_size(tokens - held, answered, held, params.answer_tokens))
        if batch is None:
            return
        (file,) = _answer(scratch, model, name, [batch], params, f", {held} of {tokens} tokens written")
        yield file
        held += sum(len(ids) for _, ids in conversations([read_table(file)]))
        answered += len(batch[1])


def _answer(
    scratch: Scratch,
    model: Path,
    name: str,
    batches: Iterable[tuple[int, tuple[str, ...]]],
    params: PrepareParams,
    so_far: str = "",
) -> list[Path]:
    """The files of answers to numbered batches of prompts, a unit each."""
    settings = params.answer_tokens, params.dtype
    units = {
        f"answers-{name}-{number:04d}": (model, batch, params.seed * 10_007 + number, *settings)
        for number, batch in batches
    }
    folders = scratch.map(f"answers for {name}{so_far}", write_answers, units)
    return [folders[unit] / "answers.parquet" for unit in units]


def _self_written_sequences(params: PrepareParams) -> dict[str, int]:
    """How many sequences of each mixed split the model writes itself."""
    return {name: round(params.self_written * size) for name, size in _sizes(params).items() if name != "evaluation"}


def _sizes(params: PrepareParams) -> dict[str, int]:
    """Sequences of every split, in the order of drawing: more of one moves none before it."""
    sizes = {
        "evaluation": params.evaluation_sequences,
        "tuning": params.tuning_sequences,
        "calibration": params.calibration_sequences,
    }
    return sizes | ({"healing": params.healing_sequences} if params.healing_sequences else {})


def _tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model, local_files_only=True)


def write_tables(
    folder: Path,
    model: Path,
    corpora: Sequence[Corpus],
    questions: QuestionSet | None,
    params: PrepareParams,
    written: Mapping[str, Sequence[Path]],
) -> None:
    """Draw and tokenise; write the six tables below ``folder/tables``, and ``folder/facts.json``."""
    tokenizer = _tokenizer(model)
    embeddings = json.loads((model.parent / "facts.json").read_text(encoding="utf-8"))["embedded_tokens"]
    vocabulary = min(vocabulary_size(tokenizer), embeddings)
    rows = draw_questions(questions, params.question_count, params.seed)
    if (tokenizer.eos_token_id or 0) >= embeddings:
        tokenizer.eos_token = None  # it would stand behind every document, and the model does not know it
    positions = positions_of(AutoConfig.from_pretrained(model, local_files_only=True))
    for row in rows:
        text = " ".join([row["question"], *row["choices"]])
        require_embedded(tokenizer(text)["input_ids"], embeddings, tokenizer, f"Question {row['question']!r:.80}")
        require_askable(row, tokenizer, positions)
    splits = draw_all(corpora, tokenizer, params, {row["article"] for row in rows}, written)
    for name, split in {"healing": as_split([], params.sequence_length, ""), **splits}.items():
        for ids, articles in zip(split.input_ids, split.articles, strict=True):
            require_embedded(ids, embeddings, tokenizer, f"The corpus ({', '.join(articles[:2])})")
        write_sequences(
            folder / "tables" / f"{name}.parquet", split.input_ids, split.articles, vocabulary, split.sources
        )
    write_table(folder / "tables" / "questions.parquet", questions_table(rows), vocabulary)
    answers = [read_table(file) for file in written.get("evaluation", ())]
    write_table(
        folder / "tables" / "answers.parquet",
        pa.concat_tables(answers) if answers else ANSWERS.empty_table(),
        vocabulary,
    )
    (folder / "facts.json").write_text(
        json.dumps(_table_facts(splits, tokenizer, params, len(rows)), sort_keys=True), encoding="utf-8"
    )


def draw_all(
    corpora: Sequence[Corpus],
    tokenizer: PreTrainedTokenizerBase,
    params: PrepareParams,
    reserved: set[str],
    written: Mapping[str, Sequence[Path]],
) -> dict[str, Split]:
    """The splits: each corpus's share, and what the model has written itself, mixed evenly; unseen corpora give to evaluation alone.

    Raises:
        InputError: a corpus is too small.
    """
    own = {
        name: conversation_split(
            [read_table(file) for file in written[name]], size, params.sequence_length, start_token(tokenizer)
        )
        for name, size in _self_written_sequences(params).items()
        if written.get(name) and size
    }
    sizes = _sizes(params)
    wanted = {name: size - (len(own[name].articles) if name in own else 0) for name, size in sizes.items()}
    unseen = portions([entry.share for entry in params.unseen_corpora], params.unseen_sequences)
    shares = {
        name: portions([entry.share for entry in params.corpora], size)
        + (unseen if name == "evaluation" else [0] * len(unseen))
        for name, size in wanted.items()
    }
    seen: set[bytes] = set()
    drawn = [
        draw_splits(
            read_articles(corpus),
            tokenizer,
            {name: shares[name][i] for name in sizes},
            params.sequence_length,
            params.seed,
            reserved,
            corpus.source.name,
            seen,
        )
        for i, corpus in enumerate(corpora)
    ]
    return {name: interleave([split[name] for split in drawn] + ([own[name]] if name in own else [])) for name in sizes}


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
    sequences = sum(_sizes(params).values()) + params.unseen_sequences
    weights = count_parameters(model) * DTYPES[params.dtype].itemsize
    return weights + TOKENIZER_BYTES + sequences * params.sequence_length * TOKEN_BYTES
