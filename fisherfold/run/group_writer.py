"""Writing tensors: one Zarr group a file, whole arrays written at once, every chunk with a CRC-32C.

A file is written front to back and its SHA-256 taken on the way, so nothing that was written is read again to be described. See
``fisherfold.run.store`` for the format and for reading.
"""

import hashlib
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import google_crc32c
import numpy as np
import torch

from fisherfold.run.files import remember_digest

SUFFIX = ".zarr.zip"
METADATA = "zarr.json"
CHUNK_BYTES = 8 * 2**20
ARRAY_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the date of every entry: the same arrays are the same bytes
MODE = 0o600 << 16  # of an entry, as `zipfile` sets it


def group_file(group: Path) -> Path:
    """The file that holds a group."""
    return group.with_name(group.name + SUFFIX)


class DigestedFile:
    """A file that is written front to back; `digest` is the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._length = file, hashlib.sha256(), 0
        self._abandoned = False

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Write what still comes nowhere."""
        self._abandoned = True

    def write(self, content: bytes) -> int:
        if self._abandoned:
            return len(content)
        self._digest.update(content)
        self._length += len(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self._length

    def seek(self, offset: int) -> int:
        if offset != self._length and not self._abandoned:
            raise ValueError("a digested file is written front to back")
        return offset

    def flush(self) -> None:
        if not self._abandoned:
            self._file.flush()


class GroupWriter:
    """Writes one new group; use as a context manager.

    Args:
        group: path of the group, without suffix; replaced if it exists.
    """

    def __init__(self, group: Path) -> None:
        path = group_file(group)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a new file: whoever has the old one open, or linked, keeps it
        self._path, self._raw = path, path.open("wb")
        self._file = DigestedFile(self._raw)
        self._zip = zipfile.ZipFile(cast(BinaryIO, self._file), "w")
        self._groups: set[str] = set()
        self._add_group("")

    def __enter__(self) -> "GroupWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    def close(self) -> None:
        """Write the list of entries; nothing can be read before."""
        try:
            self._zip.close()
            self._raw.close()
        except BaseException:
            self._abandon()
            raise
        remember_digest(self._path, self._file.digest)

    def _abandon(self) -> None:
        """Leave the file without its list of entries, for which a full disk has no room, and which would make it look whole."""
        self._file.abandon()
        with suppress(OSError):
            self._raw.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one array; its name may hold one or more ``/``."""
        values, attributes = _to_numpy(tensor)
        chunks = chunk_shape(values.shape, values.itemsize)
        ChunkWriter(self, name, values.shape, values.dtype, chunks, attributes).append(values)

    def add(self, key: str, *content: bytes) -> None:
        """Write one entry of the Zarr hierarchy, its parts one after the other."""
        entry = zipfile.ZipInfo(key, EPOCH)
        entry.external_attr, entry.header_offset = MODE, self._file.tell()
        for part in content:
            entry.CRC = zlib.crc32(part, getattr(entry, "CRC", 0))
        entry.file_size = entry.compress_size = sum(map(len, content))
        try:
            for part in (entry.FileHeader(zip64=False), *content):
                self._file.write(part)
        except BaseException:
            self._abandon()
            raise
        self._zip.filelist.append(entry)
        self._zip.NameToInfo[key] = entry
        self._zip.start_dir = self._file.tell()

    def copy(self, source: Path) -> None:
        """Take over every array of another group."""
        with zipfile.ZipFile(group_file(source)) as other:
            for entry in other.infolist():
                if entry.filename not in self._groups:
                    self.add(entry.filename, other.read(entry))
                    if entry.filename.endswith(METADATA):
                        self._groups.add(entry.filename)

    def add_parents(self, name: str) -> None:
        """Write the metadata of the groups that an array's name passes through."""
        parts = name.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            self._add_group("/".join(parts[:depth]) + "/")

    def _add_group(self, prefix: str) -> None:
        key = prefix + METADATA
        if key not in self._groups:
            self._groups.add(key)
            self.add(key, json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}).encode())


def write_arrays(group: Path, arrays: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write tensors as the arrays of one group. Pairs are taken one at a time."""
    with GroupWriter(group) as writer:
        for name, tensor in arrays.items() if isinstance(arrays, Mapping) else arrays:
            writer.write(name, tensor)


class RowWriter:
    """Arrays [rows, ...] of one group, written some rows at a time, in order.

    Args:
        writer: the group.
        shapes: of whole arrays, by name.
        rows_per_chunk: rows to append at a time, fewer only at the end.
        dtypes: of arrays that are not float32.
    """

    def __init__(
        self,
        writer: GroupWriter,
        shapes: Mapping[str, tuple[int, ...]],
        rows_per_chunk: int,
        dtypes: Mapping[str, torch.dtype] = {},
    ) -> None:
        self._arrays = {}
        for name, shape in shapes.items():
            nothing, attributes = _to_numpy(torch.empty(0, dtype=dtypes.get(name, torch.float32)))
            chunks = (rows_per_chunk, *shape[1:])
            self._arrays[name] = ChunkWriter(writer, name, shape, nothing.dtype, chunks, attributes)

    def append(self, name: str, rows: torch.Tensor) -> None:
        """Write the next rows of one array."""
        self._arrays[name].append(_to_numpy(rows)[0])


class ChunkWriter:
    """Writes one new array in the Zarr 3 format, chunk by chunk.

    Reading goes through the zarr package; its writing takes about 3 ms an array, which thousands of small arrays add up.
    """

    def __init__(
        self,
        writer: GroupWriter,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        chunks: tuple[int, ...],
        attributes: dict[str, Any],
    ) -> None:
        check_name(name)
        self.writer, self.name, self.chunks, self._next = writer, name, chunks, 0
        writer.add_parents(name)
        metadata = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": dtype.type(0).item(),
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "attributes": attributes,
            "storage_transformers": [],
        }
        writer.add(f"{name}/{METADATA}", json.dumps(metadata).encode())

    def append(self, values: np.ndarray) -> None:
        """Write the next rows [rows, ...]; whole chunks of them, except at the end."""
        if not self.chunks:
            self._write(values)
        elif values.size:
            for first in range(0, len(values), self.chunks[0]):
                self._write(values[first : first + self.chunks[0]])

    def _write(self, rows: np.ndarray) -> None:
        if self.chunks and len(rows) < self.chunks[0]:  # a chunk at the edge is stored in full
            rows = np.concatenate([rows, np.zeros((self.chunks[0] - len(rows), *self.chunks[1:]), rows.dtype)])
        content = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<")).tobytes()
        key = ["c", str(self._next), *["0"] * (len(self.chunks) - 1)] if self.chunks else ["c"]
        self.writer.add(f"{self.name}/{'.'.join(key)}", content, google_crc32c.value(content).to_bytes(4, "little"))
        self._next += 1


class GroupSize(GroupWriter):
    """Counts the bytes of the file that a group would be, to the byte, and writes nothing.

    `total` is right at any time for the arrays counted so far.
    """

    def __init__(self) -> None:
        self._groups: set[str] = set()
        self._entries = self._contents = self._directory = 0
        self._add_group("")

    def close(self) -> None:
        """Nothing is open."""

    def add(self, key: str, *content: bytes) -> None:
        self._count(key, sum(map(len, content)))

    def array(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        rows_per_chunk: int | None = None,
    ) -> None:
        """Count one array, in the chunks of `write` or, if given, in those of a `RowWriter`."""
        nothing, attributes = _to_numpy(torch.empty(0, dtype=dtype))
        chunks = chunk_shape(shape, nothing.itemsize) if rows_per_chunk is None else (rows_per_chunk, *shape[1:])
        ChunkWriter(self, name, shape, nothing.dtype, chunks, attributes)
        number = (-(-shape[0] // chunks[0]) if math.prod(shape) else 0) if shape else 1
        for index in range(number):
            key = ".".join(["c", str(index), *["0"] * (len(shape) - 1)]) if shape else "c"
            self._count(f"{name}/{key}", nothing.itemsize * math.prod(chunks) + 4)

    def _count(self, key: str, content: int) -> None:
        far = self._contents > zipfile.ZIP64_LIMIT  # its offset takes an entry of its own
        self._directory += 46 + len(key) + (12 if far else 0)
        self._contents += 30 + len(key) + content
        self._entries += 1

    @property
    def total(self) -> int:
        """Bytes of the file: entries, directory, end record."""
        limits = (self._contents > zipfile.ZIP64_LIMIT, self._directory > zipfile.ZIP64_LIMIT)
        large = self._entries >= zipfile.ZIP_FILECOUNT_LIMIT or any(limits)
        return self._contents + self._directory + 22 + (76 if large else 0)


def _to_numpy(tensor: torch.Tensor) -> tuple[np.ndarray, dict[str, Any]]:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy(), {"dtype": "bfloat16"}
    return tensor.numpy(), {}


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Chunks that split the first axis only, into equal parts of at most about CHUNK_BYTES.

    A chunk at the edge is stored in full, so parts that are not equal would cost disk: of a Gram matrix of 9.4 MB, two chunks of 8 MiB.
    """
    if not shape:
        return ()
    row_bytes = itemsize * math.prod(shape[1:])
    parts = max(1, -(-shape[0] * row_bytes // CHUNK_BYTES))
    return (max(1, -(-shape[0] // parts)), *(max(1, size) for size in shape[1:]))


def check_name(name: str) -> None:
    """Raise ValueError if an array cannot have this name."""
    if not ARRAY_NAME.fullmatch(name):
        raise ValueError(f"not an array name: {name!r}")
