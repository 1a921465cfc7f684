"""Safetensors checkpoints written one tensor at a time, so that no model is ever in memory whole.

A safetensors file is the length of its header (8 bytes, little endian), the header (JSON: name -> dtype, shape, offsets) and
the tensors' bytes. Wider dtypes come first, so every tensor is aligned.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fisherfold.run.errors import CorruptArtifact

SHARD_BYTES = 4 * 2**30
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: code for code, dtype in CODES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: what is known of it without reading it, and how to read it.

    Attributes:
        place: the file that has it as it is, and the offset of its first byte there; None if there is none.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    place: tuple[Path, int] | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "StoredTensor":
        """A tensor in memory."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def numbers(self) -> int:
        """How many numbers the tensor has."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """How many bytes it takes on disk."""
        return self.numbers * self.dtype.itemsize

    def cast(self, dtype: torch.dtype) -> "StoredTensor":
        """The same tensor in `dtype` if its numbers are not whole."""
        if not self.dtype.is_floating_point or self.dtype == dtype:
            return self
        return StoredTensor(self.shape, dtype, partial(_read_as, self.read, dtype))


def _read_as(read: Callable[[], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return read().to(dtype)


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder`, by name, sorted. Nothing but the headers is read.

    Raises:
        CorruptArtifact: a file is missing or not readable.
    """
    index = folder / INDEX
    try:
        files = (
            sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if index.exists()
            else [SINGLE]
        )
        found = {name: tensor for file in files for name, tensor in _read_file(folder / file).items()}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CorruptArtifact(
            f"The weights in {folder} are not readable ({error}). Write them again with `dvc repro --force`."
        ) from None
    return dict(sorted(found.items()))


def _read_file(path: Path) -> dict[str, StoredTensor]:
    with safe_open(path, framework="pt"):  # which checks that the file is whole
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: StoredTensor(
            tuple(entry["shape"]),
            CODES[entry["dtype"]],
            partial(_read_tensor, path, name),
            (path, 8 + length + entry["data_offsets"][0]),
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _read_tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def write_tensors(folder: Path, tensors: Mapping[str, StoredTensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write a checkpoint: one file, or shards of at most `shard_bytes` (unless one tensor is larger) and their index."""
    shards = _split(tensors, shard_bytes)
    if len(shards) == 1:
        _write_file(folder / SINGLE, {name: tensors[name] for name in shards[0]})
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    metadata = {"total_parameters": count_numbers(tensors), "total_size": count_bytes(tensors)}
    (folder / INDEX).write_text(
        json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n",
        encoding="utf-8",
    )


def count_numbers(tensors: Mapping[str, StoredTensor]) -> int:
    """Numbers of all tensors."""
    return sum(tensor.numbers for tensor in tensors.values())


def count_bytes(tensors: Mapping[str, StoredTensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.bytes for tensor in tensors.values())


def _split(tensors: Mapping[str, StoredTensor], shard_bytes: int) -> Sequence[list[str]]:
    """Names in the order given, cut where the next tensor would not fit."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        if shards[-1] and held + tensor.bytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += tensor.bytes
    return shards


def _write_file(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    ordered = sorted(tensors.items(), key=lambda entry: (-entry[1].dtype.itemsize, entry[0]))
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered:
            file.write(_bytes_of(name, tensor))


def _bytes_of(name: str, tensor: StoredTensor) -> memoryview:
    values = tensor.read()
    if tuple(values.shape) != tensor.shape or values.dtype != tensor.dtype:
        raise CorruptArtifact(
            f"Tensor {name!r} is {values.dtype} {tuple(values.shape)}, not {tensor.dtype} {tensor.shape} as announced."
        )
    return memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
