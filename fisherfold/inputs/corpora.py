"""The articles of a corpus: a recipe of ``data/corpora``, a local file or folder, or a dataset on the hub.

All are read as a stream of records (`records`) and never held whole. What an article is:
- a record of JSON Lines, JSON, CSV, Parquet or a hub dataset; records in a row with one title are one article;
- a record with messages instead of text: a conversation (`conversations`);
- in a text file, what stands between blank lines (a line, if there are none);
- in either, if the first line is a heading of the form `` = Title = `` (WikiText), all up to the next such heading.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, dropwhile, groupby
from pathlib import Path
from typing import Any, NamedTuple

from fisherfold.inputs import conversations
from fisherfold.inputs.conversations import Message, read_messages
from fisherfold.inputs.hub import HubUnknown, is_offline, resolve_dataset
from fisherfold.inputs.packages import fetch_file
from fisherfold.inputs.recipes import CorpusRecipe, Source, find_path, find_recipe, unknown_input
from fisherfold.inputs.records import (
    COMPRESSED,
    MISSING,
    READERS,
    field,
    file_format,
    files_of,
    open_text,
    read_records,
)
from fisherfold.run.errors import InputError, first_line
from fisherfold.run.params import PrepareParams
from fisherfold.run.workspace import Workspace

HEADING = re.compile(r"\s*= (?!=)(.*[^=\s]) =\s*")  # of the first level only: `` = = Section = = `` is not one
HUB_NAME = re.compile(r"(?P<name>[\w.\-]+(/[\w.\-]+)?)(:(?P<config>[^:@]+))?(@(?P<split>[^@]+))?")
DEFAULT_TEXT_FIELD = "text"
DEFAULT_TITLE_FIELD = "title"
TEXT = ".txt"
FORMATS = (TEXT, *READERS)


@dataclass(frozen=True)
class Article:
    """One document; `name` is its title, or its number in the corpus. A conversation has messages; its text tells it from others."""

    name: str
    text: str
    messages: tuple[Message, ...] = ()


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
    """The corpora of block `prepare`, in their order: those that calibration draws from, then those for evaluation alone.

    Raises:
        InputError: see `find_corpus`; or one is named twice.
    """
    names = [entry.source for entry in params.corpora + params.unseen_corpora]
    if len(set(names)) < len(names):
        raise InputError(
            f"prepare.corpus and prepare.unseen name a source twice: {', '.join(names)}. Name each once, with the sum of its shares, "
            "and under prepare.unseen only what calibration must not see."
        )
    asked = ["prepare.corpus"] * len(params.corpora) + ["prepare.unseen"] * len(params.unseen_corpora)
    return [find_corpus(workspace, name, params.text_field, key) for name, key in zip(names, asked, strict=True)]


def find_corpus(
    workspace: Workspace, name: str, text_field: str | None = None, parameter: str = "prepare.corpus"
) -> Corpus:
    """What a name in ``prepare.corpus`` or ``prepare.unseen`` means; hub datasets are written ``OWNER/NAME:CONFIG@SPLIT``, config and split optional.

    Raises:
        InputError: it is no recipe, no readable path, and nothing the hub knows.
    """
    recipe = find_recipe(workspace, "corpora", name, CorpusRecipe)
    if recipe:
        files = _corpus_files(parameter, name, fetch_file(recipe.file))
        return Corpus(
            Source.from_recipe(name, recipe), tuple(files), None, text_field or recipe.text_field, recipe.title_field
        )
    chosen = text_field or DEFAULT_TEXT_FIELD
    path = find_path(workspace, name)
    if path:
        files = _corpus_files(parameter, name, path)
        if text_field and any(file_format(file) == TEXT for file in files):
            raise InputError(
                f"prepare.text_field = {text_field!r}, but a text file has no fields. Set it to null for {name!r}."
            )
        return Corpus(Source.from_files(name, files), tuple(files), None, chosen)
    return _hub_corpus(workspace, parameter, name, chosen)


def _corpus_files(parameter: str, name: str, path: Path) -> list[Path]:
    files = files_of(path, FORMATS)
    if not files:
        raise InputError(
            f"{parameter} = {name!r}: {path} is not (or holds not) a file of a known format: {', '.join(FORMATS)}, or one of "
            f"these compressed ({', '.join(COMPRESSED)})."
        )
    return files


def _hub_corpus(workspace: Workspace, parameter: str, name: str, text_field: str) -> Corpus:
    parts = HUB_NAME.fullmatch(name)
    if not parts:
        why = "it cannot be a dataset on the hub (OWNER/NAME:CONFIG@SPLIT)"
        raise unknown_input(workspace, parameter, "corpora", name, why)
    commit, licence = None, None
    if not is_offline():  # else the datasets library reads its local cache
        try:
            entry = resolve_dataset(parts["name"])
        except HubUnknown as why:
            raise unknown_input(workspace, parameter, "corpora", name, str(why)) from None
        commit, licence = entry.commit, entry.licence
    hub = HubDataset(parts["name"], parts["config"], parts["split"] or "train", commit)
    return Corpus(Source(name, "hub", licence, commit or "local cache"), hub=hub, text_field=text_field)


class Entry(NamedTuple):
    """What one record holds: a title, if there is one, and a text or a conversation."""

    title: str | None
    text: str
    messages: tuple[Message, ...] = ()


def read_articles(corpus: Corpus) -> Iterator[Article]:
    """Every article of the corpus that has any text, in its order.

    Raises:
        InputError: a file is not readable, or a record lacks the text field; the message lists the fields it has.
    """
    files = chain.from_iterable(_file_entries(file, corpus) for file in corpus.files)
    entries = _hub_entries(corpus) if corpus.hub else files
    filled = dropwhile(lambda entry: not entry.text.strip(), entries)
    first = next(filled, Entry(None, ""))
    split = _split_at_headings if HEADING.fullmatch(first.text) else _join_by_title
    yield from (article for article in split(chain([first], filled)) if article.text.strip())


def _join_by_title(entries: Iterable[Entry]) -> Iterator[Article]:
    """Consecutive entries of one title as one article; one without title, or a conversation, is an article of its own."""
    numbered = enumerate(entries, start=1)
    for name, rows in groupby(numbered, key=lambda row: row[1].title or f"article {row[0]}"):
        joined = [entry for _, entry in rows]
        yield Article(name, "\n\n".join(entry.text for entry in joined), joined[0].messages)


def _split_at_headings(entries: Iterable[Entry]) -> Iterator[Article]:
    """Articles of WikiText lines: a heading opens one if a blank line is before it (or nothing).

    Different articles can share a title there (``<unk> <unk>``): the second one's name has a number.
    """
    name, after_blank = "", True
    lines: list[str] = []
    seen: Counter[str] = Counter()
    for _, line, _ in entries:
        heading = HEADING.fullmatch(line) if after_blank else None
        if heading:
            yield Article(name, "".join(lines))
            seen[heading[1]] += 1
            name, lines = heading[1] if seen[heading[1]] == 1 else f"{heading[1]} ({seen[heading[1]]})", []
        lines.append(line if line.endswith("\n") else f"{line}\n")
        after_blank = not line.strip()
    yield Article(name, "".join(lines))


def _file_entries(file: Path, corpus: Corpus) -> Iterator[Entry]:
    if file_format(file) == TEXT:
        yield from (Entry(None, text) for text in _texts(file))
    else:
        records = read_records(file, (corpus.text_field, corpus.title_field))
        yield from (_entry(row, corpus, where) for where, row in records)


def _texts(file: Path) -> Iterator[str]:
    """Lines of a text file with headings; else the blocks between its blank lines; else its lines."""
    with open_text(file) as lines:
        by_line = HEADING.fullmatch(next((line for line in lines if line.strip()), "")) or not _has_gap(lines)
    with open_text(file) as lines:
        for blank, block in groupby(lines, key=lambda line: not line.strip()):
            if by_line:
                yield from block
            elif not blank:
                yield "".join(block).rstrip("\n")


def _has_gap(lines: Iterable[str]) -> bool:
    """Whether a blank line stands before more text."""
    return any(line.strip() for line in dropwhile(str.strip, lines))


def _hub_entries(corpus: Corpus) -> Iterator[Entry]:
    """Stream a hub dataset, so that only what is used of it is downloaded."""
    import datasets  # takes a second to import, and a local corpus needs none of it

    datasets.disable_progress_bars()
    hub = corpus.hub
    assert hub is not None
    try:
        rows = datasets.load_dataset(
            hub.name, hub.config, split=hub.split, revision=hub.commit, streaming=not is_offline()
        )
        yield from (_entry(row, corpus, f"row {number}") for number, row in enumerate(rows, start=1))
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"Corpus {corpus.source.name!r} cannot be read from the hub ({first_line(error)}). It is written "
            "OWNER/NAME:CONFIG@SPLIT; configuration and split are on the dataset's page."
        ) from error


def _entry(row: Any, corpus: Corpus, where: str) -> Entry:
    if not isinstance(row, dict):
        raise InputError(f"Corpus {corpus.source.name!r}: {where} is not a record with fields, but {row!r:.40}.")
    content = _content(row, corpus, where)
    if isinstance(content, list):
        messages = read_messages(content, f"Corpus {corpus.source.name!r}: {where}")
        return Entry(None, json.dumps(messages, sort_keys=True, default=str) if messages else "", messages)
    if not isinstance(content, str):
        raise InputError(
            f"Corpus {corpus.source.name!r}: {where} has no text in field {corpus.text_field!r}, but "
            f"{type(content).__name__}."
        )
    title = field(row, corpus.title_field)
    return Entry(str(title) if title and title is not MISSING else None, content)


def _content(row: dict[str, Any], corpus: Corpus, where: str) -> Any:
    """The text of a record or its list of messages, null being no text."""
    names = (
        (corpus.text_field, *conversations.FIELDS) if corpus.text_field == DEFAULT_TEXT_FIELD else (corpus.text_field,)
    )
    found = next((value for value in (field(row, name) for name in names) if value is not MISSING), MISSING)
    if found is MISSING:
        raise InputError(
            f"Corpus {corpus.source.name!r}: {where} has no field {corpus.text_field!r}; its fields are "
            f"{', '.join(sorted(map(str, row)))}. Name the one with the text in prepare.text_field (a.b: field b of field a)."
        )
    return "" if found is None else found
