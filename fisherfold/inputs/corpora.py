"""The articles of a corpus: a recipe of ``data/corpora``, a local file or folder, or a dataset on the hub.

All are read as a stream of records and never held whole. What an article is:
- a record of JSON Lines, JSON, Parquet or a hub dataset; records in a row with one title are one article;
- in a text file, what stands between blank lines (a line, if there are none);
- in either, if the first line is a heading of the form `` = Title = `` (WikiText), all up to the next such heading.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, dropwhile, groupby
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from fisherfold.inputs.hub import HubUnknown, is_offline, resolve_dataset
from fisherfold.inputs.packages import fetch_file
from fisherfold.inputs.recipes import CorpusRecipe, Source, find_path, find_recipe, unknown_input
from fisherfold.run.errors import InputError
from fisherfold.run.params import PrepareParams
from fisherfold.run.workspace import Workspace

HEADING = re.compile(r"\s*= (?!=)(.*[^=\s]) =\s*")  # of the first level only: `` = = Section = = `` is not one
HUB_NAME = re.compile(r"(?P<name>[\w.\-]+(/[\w.\-]+)?)(:(?P<config>[^:@]+))?(@(?P<split>[^@]+))?")
DEFAULT_TEXT_FIELD = "text"
DEFAULT_TITLE_FIELD = "title"


@dataclass(frozen=True)
class Article:
    """One document; `name` is its title, or its number in the corpus."""

    name: str
    text: str


@dataclass(frozen=True)
class HubDataset:
    """One split of one configuration of a dataset, at one commit."""

    name: str
    config: str | None
    split: str
    commit: str | None


@dataclass(frozen=True)
class Corpus:
    """A corpus, ready to be read: local files, or a dataset on the hub."""

    source: Source
    files: tuple[Path, ...] = ()
    hub: HubDataset | None = None
    text_field: str = DEFAULT_TEXT_FIELD
    title_field: str = DEFAULT_TITLE_FIELD


def find_corpora(workspace: Workspace, params: PrepareParams) -> list[Corpus]:
    """The corpora of block `prepare`, in their order.

    Raises:
        InputError: see `find_corpus`; or one is named twice.
    """
    names = [entry.source for entry in params.corpora]
    if len(set(names)) < len(names):
        raise InputError(
            f"prepare.corpus names a source twice: {', '.join(names)}. Name each once, with the sum of its shares."
        )
    return [find_corpus(workspace, name, params.text_field) for name in names]


def find_corpus(workspace: Workspace, name: str, text_field: str | None = None) -> Corpus:
    """What a name in ``prepare.corpus`` means; hub datasets are written ``OWNER/NAME:CONFIG@SPLIT``, config and split optional.

    Raises:
        InputError: it is no recipe, no readable path, and nothing the hub knows.
    """
    recipe = find_recipe(workspace, "corpora", name, CorpusRecipe)
    if recipe:
        field = text_field or recipe.text_field
        return Corpus(Source.from_recipe(name, recipe), (fetch_file(recipe.file),), None, field, recipe.title_field)
    field = text_field or DEFAULT_TEXT_FIELD
    path = find_path(workspace, name)
    if path:
        files = _corpus_files(name, path)
        if text_field and any(file.suffix == ".txt" for file in files):
            raise InputError(
                f"prepare.text_field = {text_field!r}, but a text file has no fields. Set it to null for {name!r}."
            )
        return Corpus(Source.from_files(name, files), tuple(files), None, field)
    return _hub_corpus(workspace, name, field)


def _corpus_files(name: str, path: Path) -> list[Path]:
    files = sorted(file for file in path.iterdir() if file.suffix in READERS) if path.is_dir() else [path]
    if not files or files[0].suffix not in READERS:
        raise InputError(
            f"prepare.corpus = {name!r}: {path} is not (or holds not) a file of a known format: {', '.join(READERS)}."
        )
    return files


def _hub_corpus(workspace: Workspace, name: str, text_field: str) -> Corpus:
    parts = HUB_NAME.fullmatch(name)
    if not parts:
        why = "it cannot be a dataset on the hub (OWNER/NAME:CONFIG@SPLIT)"
        raise unknown_input(workspace, "prepare.corpus", "corpora", name, why)
    commit, licence = None, None
    if not is_offline():  # else the datasets library reads its local cache
        try:
            entry = resolve_dataset(parts["name"])
        except HubUnknown as why:
            raise unknown_input(workspace, "prepare.corpus", "corpora", name, str(why)) from None
        commit, licence = entry.commit, entry.licence
    hub = HubDataset(parts["name"], parts["config"], parts["split"] or "train", commit)
    return Corpus(Source(name, "hub", licence, commit or "local cache"), hub=hub, text_field=text_field)


Record = tuple[str | None, str]
"""Title, if there is one, and text."""


def read_articles(corpus: Corpus) -> Iterator[Article]:
    """Every article of the corpus that has any text, in its order.

    Raises:
        InputError: a file is not readable, or a record lacks the text field; the message lists the fields it has.
    """
    records = (
        _hub_records(corpus)
        if corpus.hub
        else chain.from_iterable(READERS[file.suffix](file, corpus) for file in corpus.files)
    )
    filled = dropwhile(lambda record: not record[1].strip(), records)
    first = next(filled, (None, ""))
    split = _split_at_headings if HEADING.fullmatch(first[1]) else _join_by_title
    yield from (article for article in split(chain([first], filled)) if article.text.strip())


def _join_by_title(records: Iterable[Record]) -> Iterator[Article]:
    """Consecutive records of one title as one article; a record without title is an article of its own."""
    numbered = enumerate(records, start=1)
    for name, rows in groupby(numbered, key=lambda row: row[1][0] or f"article {row[0]}"):
        yield Article(name, "\n\n".join(text for _, (_, text) in rows))


def _split_at_headings(records: Iterable[Record]) -> Iterator[Article]:
    """Articles of WikiText lines: a heading opens one if a blank line is before it (or nothing).

    Different articles can share a title there (``<unk> <unk>``): the second one's name has a number.
    """
    name, lines, after_blank = "", [], True
    seen: Counter[str] = Counter()
    for _, line in records:
        heading = HEADING.fullmatch(line) if after_blank else None
        if heading:
            yield Article(name, "".join(lines))
            seen[heading[1]] += 1
            name, lines = heading[1] if seen[heading[1]] == 1 else f"{heading[1]} ({seen[heading[1]]})", []
        lines.append(line if line.endswith("\n") else f"{line}\n")
        after_blank = not line.strip()
    yield Article(name, "".join(lines))


def _text_records(file: Path, _: Corpus) -> Iterator[Record]:
    """Lines of a text file with headings; else the blocks between its blank lines; else its lines."""
    with _lines(file) as lines:
        by_line = HEADING.fullmatch(next((line for line in lines if line.strip()), "")) or not _has_gap(lines)
    with _lines(file) as lines:
        for blank, block in groupby(lines, key=lambda line: not line.strip()):
            if by_line:
                yield from ((None, line) for line in block)
            elif not blank:
                yield None, "".join(block).rstrip("\n")


def _has_gap(lines: Iterable[str]) -> bool:
    """Whether a blank line stands before more text."""
    return any(line.strip() for line in dropwhile(str.strip, lines))


def _json_lines(file: Path, corpus: Corpus) -> Iterator[Record]:
    with _lines(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _record(_parse(line, f"{file}, line {number}"), corpus, f"{file}, line {number}")


def _json_records(file: Path, corpus: Corpus) -> Iterator[Record]:
    """A list of records, or a mapping to records."""
    with _lines(file) as lines:
        document = _parse(lines.read(), str(file))
    rows = list(document.values()) if isinstance(document, dict) else document
    for number, row in enumerate(rows, start=1):
        yield _record(row, corpus, f"{file}, record {number}")


def _parquet_records(file: Path, corpus: Corpus) -> Iterator[Record]:
    try:
        with pq.ParquetFile(file) as table:
            columns = [name for name in (corpus.text_field, corpus.title_field) if name in table.schema_arrow.names]
            if corpus.text_field not in columns:
                raise _no_field(corpus, str(file), table.schema_arrow.names)
            for batch in table.iter_batches(columns=columns, batch_size=1024):
                yield from (_record(row, corpus, str(file)) for row in batch.to_pylist())
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"Corpus {corpus.source.name!r}: {file} is not a readable Parquet file ({error}).") from None


READERS: dict[str, Callable[[Path, Corpus], Iterator[Record]]] = {
    ".txt": _text_records,
    ".jsonl": _json_lines,
    ".json": _json_records,
    ".parquet": _parquet_records,
}
"""Local formats by the end of the file's name."""


def _hub_records(corpus: Corpus) -> Iterator[Record]:
    """Stream a hub dataset, so that only what is used of it is downloaded."""
    import datasets  # takes a second to import, and a local corpus needs none of it

    datasets.disable_progress_bars()
    hub = corpus.hub
    try:
        rows = datasets.load_dataset(
            hub.name, hub.config, split=hub.split, revision=hub.commit, streaming=not is_offline()
        )
        yield from (_record(row, corpus, f"row {number}") for number, row in enumerate(rows, start=1))
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"Corpus {corpus.source.name!r} cannot be read from the hub ({reason}). It is written "
            "OWNER/NAME:CONFIG@SPLIT; configuration and split are on the dataset's page."
        ) from error


def _record(row: object, corpus: Corpus, where: str) -> Record:
    if not isinstance(row, dict):
        raise InputError(f"Corpus {corpus.source.name!r}: {where} is not a record with fields.")
    if corpus.text_field not in row:
        raise _no_field(corpus, where, row)
    text = row[corpus.text_field] or ""
    if not isinstance(text, str):
        raise InputError(
            f"Corpus {corpus.source.name!r}: {where} has no text in field {corpus.text_field!r}, but "
            f"{type(text).__name__}."
        )
    title = row.get(corpus.title_field)
    return (str(title) if title else None), text


def _no_field(corpus: Corpus, where: str, fields: Iterable[str]) -> InputError:
    return InputError(
        f"Corpus {corpus.source.name!r}: {where} has no field {corpus.text_field!r}; its fields are "
        f"{', '.join(sorted(fields))}. Name the one with the text in prepare.text_field."
    )


@contextmanager
def _lines(file: Path) -> Iterator[TextIO]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            yield lines
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text ({error}). Convert it first.") from None


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON ({error}).") from None
