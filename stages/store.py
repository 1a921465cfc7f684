"""Tensors on disk: one Zarr group a folder, whole arrays written at once, every chunk with a CRC-32C.

A group has one writer. A missing chunk reads as zeros without an error, so completeness is the manifest's business
(``workspace.verify_output``); a changed bit fails the checksum here. bfloat16 is stored as uint16 with an attribute.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import zarr
from zarr.codecs import Crc32cCodec

from stages.errors import CorruptArtifact

CHUNK_BYTES = 8 * 2**20
ARRAY_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")


def write_arrays(folder: Path, arrays: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as the arrays of one group; names may hold one or more ``/``."""
    group = zarr.open_group(store=str(folder), mode="a")
    for name, tensor in arrays.items():
        _check_name(name)
        values, attributes = _to_numpy(tensor)
        array = group.create_array(
            name,
            shape=values.shape,
            chunks=_chunks(values),
            dtype=values.dtype,
            compressors=[Crc32cCodec()],
            attributes=attributes,
        )
        array[...] = values


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
