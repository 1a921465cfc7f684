"""Reading a group that lies on shared storage: a Zarr store over the zip files of a pointer, by range requests.

Opening costs two requests an object: its size, and its list of entries. After that a chunk is one request, for exactly its bytes; a
small entry (the metadata of an array) brings the small ones after it along. Several chunks of an array are fetched at once. Each
entry is compared with its CRC-32 from the list, asked for once more if it differs, and a chunk's CRC-32C is zarr's to check.
"""

import asyncio
import io
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import NamedTuple

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype

from fisherfold.run.errors import CorruptArtifact
from fisherfold.run.objects import CURE, read_range, require_object
from fisherfold.run.pointers import StoredObject, read_pointer

SMALL = 16 * 2**10  # bytes of an entry that is kept once it has been read
READ_AHEAD = 256 * 2**10  # bytes of small entries that one request may bring
HEADER = 30  # bytes of a local file header before its name


class Entry(NamedTuple):
    """One entry of a zip file: its header, name and content are bytes `start` to `stop` of the object."""

    key: str
    start: int
    stop: int
    size: int
    checksum: int


class ObjectGroup(Store):
    """The read-only Zarr hierarchy of one pointer.

    Args:
        pointer: the file that names its objects.

    Raises:
        CorruptArtifact: an object is missing, has another size, or has no readable list of entries.
        StoreError: the store cannot be used.
    """

    supports_writes = supports_deletes = False
    supports_listing = True

    def __init__(self, pointer: Path) -> None:
        super().__init__(read_only=True)
        self._pointer = pointer
        self._entries: dict[str, tuple[StoredObject, list[Entry], int]] = {}
        self._small: dict[str, bytes] = {}
        for stored in read_pointer(pointer):
            entries = read_entries(stored)
            self._entries |= {entry.key: (stored, entries, place) for place, entry in enumerate(entries)}

    @property
    def entries(self) -> list[str]:
        """The keys of all entries."""
        return list(self._entries)

    def read(self, key: str) -> bytes | None:
        """The content of one entry; None if there is none.

        Raises:
            CorruptArtifact: it fails its checksum, twice.
        """
        if key in self._small or key not in self._entries:
            return self._small.get(key)
        stored, entries, place = self._entries[key]
        wanted = _with_small_followers(entries, place)
        for _ in range(2):
            contents = _split(read_range(stored.url, wanted[0].start, wanted[-1].stop), wanted)
            if contents is not None:
                break
        else:
            raise CorruptArtifact(f"{stored.url}, entry {key!r} fails its checksum. {CURE}")
        self._small |= {entry.key: content for entry, content in zip(wanted, contents) if entry.size <= SMALL}
        return contents[0]

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """See zarr.abc.store.Store; parts of an entry are not asked for, since the arrays here have no shards."""
        if byte_range is not None:
            raise NotImplementedError("part of an entry")
        content = await asyncio.to_thread(self.read, key)
        return None if content is None else prototype.buffer.from_bytes(content)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return key in self._entries

    async def set(self, key: str, value: Buffer) -> None:
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        raise NotImplementedError

    async def list(self) -> AsyncIterator[str]:
        for key in self._entries:
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in self._entries:
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        start = prefix.rstrip("/") + "/" if prefix else ""
        for name in dict.fromkeys(key[len(start) :].split("/")[0] for key in self._entries if key.startswith(start)):
            yield name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectGroup) and self._pointer == other._pointer


def read_entries(stored: StoredObject) -> list[Entry]:
    """The entries of a zip file, in the order of their bytes.

    Raises:
        CorruptArtifact: the object is missing or has another size, or its list cannot be read.
    """
    require_object(stored)
    tail = _Tail(read_range(stored.url, stored.directory, stored.bytes), stored.directory)
    try:
        with zipfile.ZipFile(tail) as file:
            found = sorted(file.infolist(), key=lambda info: info.header_offset)
    except (zipfile.BadZipFile, ValueError) as error:
        raise CorruptArtifact(f"{stored.url} has no readable list of entries ({error}). {CURE}") from None
    stops = [info.header_offset for info in found[1:]] + [stored.directory]
    return [
        Entry(info.filename, info.header_offset, stop, info.file_size, info.CRC) for info, stop in zip(found, stops)
    ]


class _Tail(io.RawIOBase):
    """The end of a file, as the whole file to `zipfile`, which reads no more of it than its list of entries."""

    def __init__(self, content: bytes, offset: int) -> None:
        self._content, self._offset, self._position = content, offset, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._offset + len(self._content)}
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        start = self._position - self._offset
        if start < 0:
            raise ValueError("the list of entries starts before its place")
        content = self._content[start:] if size < 0 else self._content[start : start + size]
        self._position += len(content)
        return content


def _with_small_followers(entries: list[Entry], place: int) -> list[Entry]:
    """The entry at `place`; if it is small, with the small ones after it that READ_AHEAD bytes hold."""
    first = entries[place]
    if first.size > SMALL:
        return [first]
    stop = bisect_right(entries, first.start + READ_AHEAD, key=lambda entry: entry.stop)
    wanted = [first]
    for entry in entries[place + 1 : stop]:
        if entry.size > SMALL:
            break
        wanted.append(entry)
    return wanted


def _split(content: bytes, entries: list[Entry]) -> list[bytes] | None:
    """The contents of adjacent entries; None if one of them fails its checksum."""
    parts = []
    for entry in entries:
        own = memoryview(content)[entry.start - entries[0].start : entry.stop - entries[0].start]
        data = HEADER + int.from_bytes(own[26:28], "little") + int.from_bytes(own[28:30], "little")
        parts.append(bytes(own[data : data + entry.size]))
        if zlib.crc32(parts[-1]) != entry.checksum:
            return None
    return parts
