"""Records of local files, for corpora and questions alike: one reader a format, one place for each error.

Formats by the end of the file's name, each also compressed (``.gz``, ``.bz2``, ``.xz``):

    .jsonl       a JSON value a line; also .ndjson
    .json        a list of records, or a mapping to records
    .csv, .tsv   a header, then rows
    .parquet     a table
    .arrow       a table, as the datasets library saves it: a file or a stream of record batches

Text is UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one. Lone surrogates, which JSON can escape and no text can hold,
become U+FFFD.
"""

import bz2
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from fisherfold.run.errors import InputError

Record = tuple[str, Any]
"""Where it stands (file and line), and what stands there: a mapping of fields, if the file is in order."""

COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ARROW_FILE = b"ARROW1"
MARKS = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""Encodings by the marks that a file may begin with, the longer ones first."""
LONGEST_FIELD = 2**31 - 1  # of a CSV file; the csv module's own limit is shorter than many a text
NOTES = {"dataset_info.json", "dataset_dict.json", "state.json"}
"""What the datasets library writes beside the tables of a data set that it saves."""
MISSING = object()


def file_format(file: Path) -> str:
    """The end of a file's name that says its format, without that of a compression: ``.csv`` of ``a.csv.gz``."""
    return (file.with_suffix("") if file.suffix.lower() in COMPRESSED else file).suffix.lower()


def files_of(path: Path, formats: Collection[str]) -> list[Path]:
    """The files of known formats that a path means: itself, or those below a folder, at any depth; hidden ones are left out."""
    if not path.is_dir():
        fits = path.is_file() or not path.exists()  # a recipe's file may not have been fetched yet
        return [path] if fits and file_format(path) in formats else []
    found = [file for file in path.rglob("*") if file.is_file() and file_format(file) in formats]
    if any(file_format(file) == ".arrow" for file in found):
        found = [file for file in found if file.name not in NOTES]
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))


def read_records(file: Path, fields: Sequence[str] = ()) -> Iterator[Record]:
    """The records of one file.

    Args:
        file: of a format in READERS.
        fields: those that are wanted, the needed one first; a Parquet file that has it is read no further than them.

    Raises:
        InputError: the file is not readable; the message names it, and the line.
    """
    return READERS[file_format(file)](file, fields)


@contextmanager
def open_text(file: Path) -> Iterator[TextIO]:
    """A text file to read, whatever its compression.

    Raises:
        InputError: its bytes are no text, or are damaged.
    """
    try:
        with _open_bytes(file) as probe:
            begin = probe.read(4096)
        encoding = next((name for mark, name in MARKS.items() if begin.startswith(mark)), "utf-8-sig")
        if encoding == "utf-8-sig" and b"\0" in begin:
            raise InputError(
                f"{file} is no text, or UTF-16 without its mark: it holds zero bytes. Convert it to UTF-8."
            )
        with _open_bytes(file) as content, TextIOWrapper(content, encoding=encoding, newline=_newline(file)) as lines:
            yield lines
    except UnicodeError as error:
        raise InputError(
            f"{file} is not UTF-8 text ({error}). Convert it first, as by `iconv -f latin1 -t utf-8`."
        ) from None
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise InputError(f"{file} cannot be read ({error or type(error).__name__}).") from None


def _open_bytes(file: Path) -> BinaryIO:
    opened: BinaryIO = COMPRESSED.get(file.suffix.lower(), open)(file, "rb")
    return opened


def _newline(file: Path) -> str | None:
    """CSV finds its own ends of lines: those inside quotes belong to the text."""
    return "" if file_format(file) in SEPARATORS else None


def parse_json(text: str, where: str) -> Any:
    """A JSON value, its lone surrogates mended.

    Raises:
        InputError: it is not valid; the message names `where`.
    """
    try:
        value = json.loads(text)
        return mended(value) if "\\u" in text else value
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON ({error}).") from None


def mended(value: Any) -> Any:
    """A JSON value without lone surrogates: each becomes U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [mended(entry) for entry in value]
    return {mended(key): mended(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def field(row: Mapping[str, Any], name: str) -> Any:
    """A field of a record, ``a.b`` being field b of field a where no field has that very name; MISSING if there is none."""
    if name in row:
        return row[name]
    head, dot, rest = name.partition(".")
    inner = row.get(head)
    return field(inner, rest) if dot and isinstance(inner, Mapping) else MISSING


def _json_lines(file: Path, _: Sequence[str]) -> Iterator[Record]:
    with open_text(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                yield where, parse_json(line, where)


def _json_records(file: Path, _: Sequence[str]) -> Iterator[Record]:
    with open_text(file) as lines:
        document = parse_json(lines.read(), str(file))
    if not isinstance(document, list | dict):
        raise InputError(f"{file} is neither a list of records nor a mapping to records, but {document!r:.40}.")
    rows = document.values() if isinstance(document, dict) else document
    for number, row in enumerate(rows, start=1):
        yield f"{file}, record {number}", row


SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    """The rows of a CSV file as they are, its header among them, and where each ends.

    Raises:
        InputError: it is not readable.
    """
    csv.field_size_limit(LONGEST_FIELD)
    with open_text(file) as lines:
        rows = csv.reader(
            lines, delimiter=SEPARATORS[file_format(file)], strict=True
        )  # else an open quote swallows the rest
        try:
            for row in rows:
                if row:
                    yield f"{file}, line {rows.line_num}", row
        except csv.Error as error:
            raise InputError(f"{file}, line {rows.line_num} is not valid CSV ({error}).") from None


def _csv_records(file: Path, _: Sequence[str]) -> Iterator[Record]:
    rows = read_rows(file)
    where, names = next(rows, ("", []))
    if len(set(names)) < len(names):
        raise InputError(f"{where}: the header names a column twice ({', '.join(names)}).")
    for where, row in rows:
        if len(row) > len(names):
            raise InputError(
                f"{where} has {len(row)} values, but the header has {len(names)}. Quote texts that hold the separator."
            )
        yield where, dict(zip(names, row))


def _parquet_records(file: Path, fields: Sequence[str]) -> Iterator[Record]:
    try:
        with pq.ParquetFile(file) as table:
            yield from _table_rows(
                file, table.iter_batches(columns=_columns(table.schema_arrow.names, fields), batch_size=1024)
            )
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise InputError(f"{file} is not a readable Parquet file ({error}).") from None


def _columns(present: Sequence[str], fields: Sequence[str]) -> list[str] | None:
    """The columns of a table that hold the fields, if the first of them has one; None for all."""
    wanted = [next((name for name in (each, each.partition(".")[0]) if name in present), "") for each in fields]
    return [name for name in dict.fromkeys(wanted) if name] if wanted and wanted[0] else None


def _arrow_records(file: Path, fields: Sequence[str]) -> Iterator[Record]:
    try:
        with pa.memory_map(str(file)) as mapped:
            yield from _table_rows(file, _record_batches(mapped, fields))
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise InputError(f"{file} is not a readable Arrow file ({error}).") from None


def _record_batches(mapped: pa.NativeFile, fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Of a file, which begins with its name, or of a stream."""
    whole = mapped.read(len(ARROW_FILE)) == ARROW_FILE
    mapped.seek(0)
    table = pa.ipc.open_file(mapped) if whole else pa.ipc.open_stream(mapped)
    columns = _columns(table.schema.names, fields)
    batches = (table.get_batch(number) for number in range(table.num_record_batches)) if whole else table
    for batch in batches:
        yield batch if columns is None else batch.select(columns)


def _table_rows(file: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{file}, row {number}", row


READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_records,
    ".csv": _csv_records,
    ".tsv": _csv_records,
    ".parquet": _parquet_records,
    ".arrow": _arrow_records,
}
"""Local formats of records by the end of the file's name."""
