"""Tensors on disk: one Zarr group a folder, whole arrays written at once, every chunk with a CRC-32C.

A group has one writer. A missing chunk reads as zeros without an error, so completeness is the manifest's business
(``workspace.verify_output``); a changed bit fails the checksum here. bfloat16 is stored as uint16 with an attribute.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import google_crc32c
import numpy as np
import torch
import zarr

from stages.errors import CorruptArtifact

METADATA = "zarr.json"
CHUNK_BYTES = 8 * 2**20
ARRAY_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")


def write_arrays(folder: Path, arrays: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write tensors as the arrays of one group; names may hold one or more ``/``. Pairs are taken one at a time."""
    for name, tensor in arrays.items() if isinstance(arrays, Mapping) else arrays:
        values, attributes = _to_numpy(tensor)
        ChunkWriter(folder, name, values.shape, values.dtype, _chunks(values), attributes).append(values)


class RowWriter:
    """Arrays [rows, ...] of one group in float32, written some rows at a time, in order.

    Args:
        folder: the group's folder.
        shapes: of whole arrays, by name.
        rows_per_chunk: rows to append at a time, fewer only at the end.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], rows_per_chunk: int) -> None:
        self._arrays = {
            name: ChunkWriter(folder, name, shape, np.dtype(np.float32), (rows_per_chunk, *shape[1:]), {})
            for name, shape in shapes.items()
        }

    def append(self, name: str, rows: torch.Tensor) -> None:
        """Write the next rows of one array."""
        self._arrays[name].append(_to_numpy(rows)[0])


class ChunkWriter:
    """Writes one new array in the Zarr 3 format, chunk by chunk.

    Reading goes through the zarr package; its writing takes about 3 ms an array, which thousands of small arrays add up.

    Raises:
        FileExistsError: the array exists.
    """

    def __init__(
        self, folder: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, chunks: tuple[int, ...], attributes: dict
    ) -> None:
        _check_name(name)
        self.folder, self.chunks, self._next = folder / name, chunks, 0
        self.folder.mkdir(parents=True)
        for group in self.folder.parents[: name.count("/") + 1]:
            if not (group / METADATA).exists():
                (group / METADATA).write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}))
        metadata = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},  # fewer folders
            "fill_value": dtype.type(0).item(),
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "attributes": attributes,
            "storage_transformers": [],
        }
        (self.folder / METADATA).write_text(json.dumps(metadata))

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
        content = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
        key = ["c", str(self._next), *["0"] * (len(self.chunks) - 1)] if self.chunks else ["c"]
        with (self.folder / ".".join(key)).open("wb") as file:
            file.write(content)
            file.write(google_crc32c.value(content).to_bytes(4, "little"))
        self._next += 1


def array_names(folder: Path) -> list[str]:
    """The names of all arrays of a group, sorted."""
    found = (path for path in folder.rglob(METADATA) if json.loads(path.read_text())["node_type"] == "array")
    return sorted(path.parent.relative_to(folder).as_posix() for path in found)


def read_array(folder: Path, name: str, where: object = ...) -> torch.Tensor:
    """Read one array (or the part that `where` selects).

    Raises:
        CorruptArtifact: there is no such array, or a chunk fails its checksum.
    """
    _check_name(name)
    try:
        array = zarr.open_array(store=str(folder), path=name, mode="r")
        values = torch.from_numpy(np.asarray(array[where], order="C"))
    except (KeyError, FileNotFoundError):
        raise CorruptArtifact(f"{folder} holds no array {name!r}. Write it again with `dvc repro --force`.") from None
    except (ValueError, RuntimeError, OSError) as error:
        raise CorruptArtifact(f"{folder}, array {name!r}: {error}. Write it again with `dvc repro --force`.") from error
    return values.view(torch.bfloat16) if array.attrs.get("dtype") == "bfloat16" else values


def gather_groups(target: Path, groups: Iterable[Path]) -> None:
    """Make one group of several that hold different arrays, by hard links where the file system has them."""
    for group in groups:
        for path in sorted(group.rglob("*")):
            if path.is_file() and not (twin := target / path.relative_to(group)).exists():
                twin.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path, twin)


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _to_numpy(tensor: torch.Tensor) -> tuple[np.ndarray, dict]:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy(), {"dtype": "bfloat16"}
    return tensor.numpy(), {}


def _chunks(values: np.ndarray) -> tuple[int, ...]:
    """Chunks that split the first axis only, of at most CHUNK_BYTES each."""
    row_bytes = max(1, values[:1].nbytes) if values.ndim else 1
    return (
        (max(1, min(values.shape[0], CHUNK_BYTES // row_bytes)), *(max(1, size) for size in values.shape[1:]))
        if values.ndim
        else ()
    )


def _check_name(name: str) -> None:
    if not ARRAY_NAME.fullmatch(name):
        raise ValueError(f"not an array name: {name!r}")
