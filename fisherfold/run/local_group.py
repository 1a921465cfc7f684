"""Reading a group from the file that holds it, straight into the tensor's memory.

It reads what ``fisherfold.run.group_writer`` writes: uncompressed chunks that split the first axis only, each followed by its CRC-32C. The
zarr package reads the same files; a call of it takes milliseconds, and stages make thousands.
"""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from fisherfold.run.group_writer import METADATA

HEADER = 30  # bytes of a local file header before its name
CHECKSUM = 4


class LocalGroup:
    """An open file of a group; its list of entries is read once.

    Raises:
        OSError, zipfile.BadZipFile: there is no such file, or it has no readable list of entries.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        with zipfile.ZipFile(self._file) as entries:
            self._entries = {entry.filename: entry for entry in entries.infolist()}
        self._metadata: dict[str, dict[str, Any]] = {}

    @property
    def nodes(self) -> list[str]:
        """The names of arrays and groups, but the root."""
        end = f"/{METADATA}"
        return [key.removesuffix(end) for key in self._entries if key.endswith(end)]

    def metadata(self, name: str) -> dict[str, Any]:
        """The metadata of an array or group.

        Raises:
            KeyError: there is none of this name.
            ValueError: it is damaged.
        """
        if name not in self._metadata:
            entry = self._entries[f"{name}/{METADATA}"]
            content = bytearray(entry.file_size)
            self._read(entry, content)
            self._metadata[name] = json.loads(content)
        return self._metadata[name]

    def read(self, name: str, where: Any = ...) -> np.ndarray:
        """An array, or the part that `where` selects; of a slice of the first axis, only its chunks are read.

        Raises:
            KeyError: there is no such array.
            ValueError, OSError: a chunk is missing, short or fails its checksum.
        """
        metadata = self.metadata(name)
        shape, dtype = metadata["shape"], np.dtype(metadata["data_type"])
        chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        if not shape:
            values = np.empty((1,), dtype)
            self._read_chunk(name, ["c"], values)
            return values.reshape(())
        low, high, rest = 0, shape[0], where
        if isinstance(where, slice) and where.step in (None, 1):
            (low, high, _), rest = where.indices(shape[0]), ...
        rows = np.empty((max(0, high - low), *shape[1:]), dtype)
        first = low // chunk[0] * chunk[0]
        for start in range(first, high, chunk[0]) if rows.size else ():
            place = ["c", str(start // chunk[0]), *["0"] * (len(shape) - 1)]
            whole = low <= start and start + chunk[0] <= high
            target = rows[start - low : start - low + chunk[0]] if whole else np.empty(chunk, dtype)
            self._read_chunk(name, place, target)
            if not whole:
                begin, end = max(low, start), min(high, start + chunk[0])
                rows[begin - low : end - low] = target[begin - start : end - start]
        return rows[rest]

    def _read_chunk(self, name: str, place: list[str], target: np.ndarray) -> None:
        key = f"{name}/{'.'.join(place)}"
        if key not in self._entries:
            raise ValueError(f"{key} is missing")
        checksum = bytearray(CHECKSUM)
        bits = target.reshape(-1).view(np.uint8).data
        self._read(self._entries[key], bits, checksum)
        if google_crc32c.value(bytes(bits)) != int.from_bytes(checksum, "little"):
            raise ValueError(f"{key} has another CRC-32C than when it was written")

    def _read(self, entry: zipfile.ZipInfo, *targets: bytearray | memoryview) -> None:
        if sum(map(len, targets)) != entry.file_size:
            raise ValueError(f"{entry.filename} has another size than its metadata says")
        header = bytearray(HEADER + len(entry.filename))
        if os.preadv(self._file.fileno(), [header, *targets], entry.header_offset) != len(header) + entry.file_size:
            raise ValueError(f"{entry.filename} is cut short")
        if header[HEADER:].decode() != entry.filename or any(header[28:HEADER]):
            raise ValueError(f"{entry.filename} does not lie where the list of entries says")
