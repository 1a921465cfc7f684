"""Tensors on disk: one Zarr group a file, whole arrays written at once, every chunk with a CRC-32C.

A group is a Zarr 3 hierarchy in an uncompressed zip file, which zarr opens as a ``ZipStore``: thousands of small arrays are then
one file to hash, link, check and list. Callers name it without its suffix. It has one writer and is never changed. A missing chunk reads as
zeros without an error, so completeness is the manifest's business (``workspace.verify_output``); a changed bit fails the checksum
here. bfloat16 is stored as uint16 with an attribute.

A finished group may move to shared storage (fisherfold/run/objects.py): a pointer then lies in the place of its file, and readers see no difference.
"""

import json
import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
import zarr
from zarr.abc.store import Store
from zarr.storage import ZipStore

from fisherfold.run.disk import link_or_copy
from fisherfold.run.errors import CorruptArtifact, StoreError
from fisherfold.run.object_group import ObjectGroup
from fisherfold.run.objects import SETTING, store_url, upload
from fisherfold.run.pointers import pointer_file, read_pointer, write_pointer

SUFFIX = ".zarr.zip"
METADATA = "zarr.json"
CHUNK_BYTES = 8 * 2**20
ARRAY_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the date of every entry: the same arrays are the same bytes


def group_file(group: Path) -> Path:
    """The file that holds a group."""
    return group.with_name(group.name + SUFFIX)


class GroupWriter:
    """Writes one new group; use as a context manager.

    Args:
        group: path of the group, without suffix; replaced if it exists.
    """

    def __init__(self, group: Path) -> None:
        path = group_file(group)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a new file: whoever has the old one open, or linked, keeps it
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self._groups: set[str] = set()
        self._add_group("")

    def __enter__(self) -> "GroupWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Write the list of entries; nothing can be read before."""
        self._zip.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one array; its name may hold one or more ``/``."""
        values, attributes = _to_numpy(tensor)
        chunks = chunk_shape(values.shape, values.itemsize)
        ChunkWriter(self, name, values.shape, values.dtype, chunks, attributes).append(values)

    def add(self, key: str, content: bytes | memoryview) -> None:
        """Write one entry of the Zarr hierarchy."""
        self._zip.writestr(zipfile.ZipInfo(key, EPOCH), content)

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
        _check_name(name)
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
        self.writer.add(f"{self.name}/{'.'.join(key)}", content + google_crc32c.value(content).to_bytes(4, "little"))
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

    def add(self, key: str, content: bytes | memoryview) -> None:
        self._count(key, len(content))

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


def array_names(group: Path) -> list[str]:
    """The names of all arrays of a group, sorted."""
    nodes = {name: content for name, content in _read_metadata(group) if json.loads(content)["node_type"] == "array"}
    return sorted(nodes)


def _read_metadata(group: Path) -> Iterator[tuple[str, bytes]]:
    """Every node of a group but its root, with its metadata."""
    path, end = group_file(group), f"/{METADATA}"
    if not path.exists() and pointer_file(path).exists():
        stored = _open_group(group)
        yield from ((key.removesuffix(end), stored.read(key)) for key in stored.entries if key.endswith(end))
        return
    with zipfile.ZipFile(path) as file:
        yield from ((key.removesuffix(end), file.read(key)) for key in file.namelist() if key.endswith(end))


def read_array(group: Path, name: str, where: object = ...) -> torch.Tensor:
    """Read one array (or the part that `where` selects).

    Raises:
        CorruptArtifact: there is no such group or array, or a chunk fails its checksum.
        StoreError: the group lies on shared storage that cannot be used.
    """
    _check_name(name)
    path = group_file(group)
    try:
        array = zarr.open_array(store=_open_group(group), path=name, mode="r")
        values = torch.from_numpy(np.asarray(array[where], order="C"))
    except (KeyError, FileNotFoundError):
        raise CorruptArtifact(f"{path} holds no array {name!r}. Write it again with `dvc repro --force`.") from None
    except (ValueError, RuntimeError, OSError, zipfile.BadZipFile) as error:
        raise CorruptArtifact(
            f"{path}, array {name!r} fails its checksum: {error}. Write it again with `dvc repro --force`."
        ) from error
    return values.view(torch.bfloat16) if array.attrs.get("dtype") == "bfloat16" else values


def read_in_turn(groups: Sequence[Path], names: Sequence[str]) -> Iterator[tuple[torch.Tensor, ...]]:
    """The arrays `names` of each group, one group in memory; of groups on shared storage, the next one is fetched meanwhile.

    Raises:
        CorruptArtifact, StoreError: see `read_array`.
    """
    if not any(pointer_file(group_file(group)).exists() for group in groups):
        yield from (tuple(read_array(group, name) for name in names) for group in groups)
        return
    with ThreadPoolExecutor(2 * len(names)) as pool:
        ahead: list[Future] = []
        for group in groups:
            waiting, ahead = ahead, [pool.submit(read_array, group, name) for name in names]
            if waiting:
                yield tuple(array.result() for array in waiting)
                del waiting
        yield tuple(array.result() for array in ahead)


def _open_group(group: Path) -> Store:
    path = group_file(group)
    if path.exists():
        return _open_file(path, path.stat().st_mtime_ns)
    pointer = pointer_file(path)
    return _open_objects(pointer, pointer.stat().st_mtime_ns)


@lru_cache(maxsize=32)
def _open_file(path: Path, modified: int) -> ZipStore:
    """The open file of a group; its list of entries is read once."""
    return ZipStore(path, mode="r", read_only=True)


@lru_cache(maxsize=256)
def _open_objects(pointer: Path, modified: int) -> ObjectGroup:
    """A group on shared storage; its list of entries is read once. No file stays open, so more of them may be kept."""
    return ObjectGroup(pointer)


def close_groups() -> None:
    """Close every file that `read_array` keeps open: a removed file holds its disk until then."""
    _open_file.cache_clear()


def offload_group(group: Path) -> None:
    """Move a finished group to shared storage if that is set: one object, and a pointer in the place of the file.

    Raises:
        StoreError: the storage refuses it or stays unreachable; the file stays where it is.
    """
    path = group_file(group)
    if store_url() and path.exists():
        write_pointer(path, [upload(path, SUFFIX)])
        path.unlink()


def gather_groups(target: Path, groups: Iterable[Path]) -> None:
    """Make one group of several that hold different arrays (one alone is linked); groups of no array, no file, are passed over.

    If one of them lies on shared storage, all go there, and the target is a pointer to all their objects.

    Raises:
        StoreError: some lie on shared storage, others do not, and it is not set.
    """
    found = [group for group in groups if any(path.exists() for path in _places(group))]
    if any(pointer_file(group_file(group)).exists() for group in found):
        _gather_objects(target, found)
        return
    if len(found) == 1:
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(group_file(found[0]), group_file(target))
        return
    with GroupWriter(target) as writer:
        for group in found:
            writer.copy(group)


def _places(group: Path) -> tuple[Path, Path]:
    return group_file(group), pointer_file(group_file(group))


def _gather_objects(target: Path, groups: Iterable[Path]) -> None:
    objects = []
    for group in groups:
        offload_group(group)  # a run that goes on with the setting changed has both
        path, pointer = _places(group)
        if not pointer.exists():
            raise StoreError(f"{path} is not on shared storage, though other parts are. Set {SETTING} again and go on.")
        objects += read_pointer(pointer)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_pointer(group_file(target), objects)


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


def _check_name(name: str) -> None:
    if not ARRAY_NAME.fullmatch(name):
        raise ValueError(f"not an array name: {name!r}")
