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

import numpy as np
import torch
import zarr
from zarr.codecs import Crc32cCodec

from stages.errors import CorruptArtifact

CHUNK_BYTES = 8 * 2**20
ARRAY_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")


def write_arrays(folder: Path, arrays: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write tensors as the arrays of one group; names may hold one or more ``/``. Pairs are taken one at a time."""
    group = _open(folder)
    for name, tensor in arrays.items() if isinstance(arrays, Mapping) else arrays:
        _check_name(name)
        values, attributes = _to_numpy(tensor)
        array = _create(group, name, values.shape, _chunks(values), values.dtype, attributes)
        array[...] = values


class RowWriter:
    """Arrays [rows, ...] of one new group in float32, written some rows at a time, in order.

    Args:
        folder: the group's folder.
        shapes: of whole arrays, by name.
        rows_per_chunk: rows to append at a time, so that every chunk is written once.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], rows_per_chunk: int) -> None:
        group = _open(folder)
        self._arrays: dict[str, zarr.Array] = {}
        self._written = dict.fromkeys(shapes, 0)
        for name, shape in shapes.items():
            _check_name(name)
            self._arrays[name] = _create(group, name, shape, (rows_per_chunk, *shape[1:]), np.dtype(np.float32), {})

    def append(self, name: str, rows: torch.Tensor) -> None:
        """Write the next rows of one array."""
        first = self._written[name]
        self._arrays[name][first : first + len(rows)] = _to_numpy(rows)[0]
        self._written[name] = first + len(rows)


def array_names(folder: Path) -> list[str]:
    """The names of all arrays of a group, sorted."""
    found = (path for path in folder.rglob("zarr.json") if json.loads(path.read_text())["node_type"] == "array")
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


def _open(folder: Path) -> zarr.Group:
    return zarr.open_group(store=str(folder), mode="a")


def _create(
    group: zarr.Group, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype, attributes: dict
) -> zarr.Array:
    codecs = [Crc32cCodec()]
    return group.create_array(name, shape=shape, chunks=chunks, dtype=dtype, compressors=codecs, attributes=attributes)


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
