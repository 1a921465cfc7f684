"""Tensors on disk: one Zarr group a file, whole arrays written at once, every chunk with a CRC-32C.

A group is a Zarr 3 hierarchy in an uncompressed zip file, which zarr opens as a ``ZipStore``: thousands of small arrays are then
one file to hash, link, check and list. Callers name it without its suffix. It has one writer and is never changed. To zarr a missing chunk
reads as zeros without an error; here it is an error, as a changed bit is. bfloat16 is stored as uint16 with an attribute. Groups of large files
are gathered as a folder of links: `statistics.parts/00000.zarr.zip` and so on are then the group `statistics`.

A finished group may move to shared storage (fisherfold/run/objects.py): a pointer then lies in the place of its file, and readers see no difference.
"""

import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from fisherfold.run.disk import link_or_copy
from fisherfold.run.errors import CorruptArtifact, StoreError
from fisherfold.run.group_writer import METADATA, SUFFIX, GroupWriter, check_name, group_file
from fisherfold.run.local_group import LocalGroup
from fisherfold.run.object_group import ObjectGroup
from fisherfold.run.objects import SETTING, store_url, upload
from fisherfold.run.pointers import pointer_file, read_pointer, write_pointer

PARTS = ".parts"
LINKED_BYTES = 2**20  # a smaller file is copied into a common one when groups are gathered: files cost DVC time, too


def array_names(group: Path) -> list[str]:
    """The names of all arrays of a group, sorted."""
    found = []
    for part in _parts(group):
        opened = _open_group(part)
        if isinstance(opened, LocalGroup):
            found += [name for name in opened.nodes if opened.metadata(name)["node_type"] == "array"]
        else:
            found += _array_names(opened)
    return sorted(found)


def _array_names(stored: ObjectGroup) -> list[str]:
    end = f"/{METADATA}"
    nodes = (key for key in stored.entries if key.endswith(end))
    return [key.removesuffix(end) for key in nodes if json.loads(stored.read(key) or b"{}")["node_type"] == "array"]


def read_array(group: Path, name: str, where: Any = ...) -> torch.Tensor:
    """Read one array (or the part that `where` selects).

    Raises:
        CorruptArtifact: there is no such group or array, or a chunk fails its checksum.
        StoreError: the group lies on shared storage that cannot be used.
    """
    check_name(name)
    path = group_file(group)
    try:
        opened = _open_group(_part_of(group, name))
        if isinstance(opened, LocalGroup):
            values, attributes = opened.read(name, where), opened.metadata(name)["attributes"]
        else:
            array = zarr.open_array(store=opened, path=name, mode="r")
            values, attributes = np.asarray(array[where]), array.attrs
    except (KeyError, FileNotFoundError):
        raise CorruptArtifact(f"{path} holds no array {name!r}. Write it again with `dvc repro --force`.") from None
    except (ValueError, RuntimeError, OSError, zipfile.BadZipFile) as error:
        raise CorruptArtifact(
            f"{path}, array {name!r} fails its checksum: {error}. Write it again with `dvc repro --force`."
        ) from error
    tensor = torch.from_numpy(np.ascontiguousarray(values).reshape(np.shape(values)))
    return tensor.view(torch.bfloat16) if attributes.get("dtype") == "bfloat16" else tensor


def read_in_turn(groups: Sequence[Path], names: Sequence[str]) -> Iterator[tuple[torch.Tensor, ...]]:
    """The arrays `names` of each group, one group in memory; of groups on shared storage, the next one is fetched meanwhile.

    Raises:
        CorruptArtifact, StoreError: see `read_array`.
    """
    if not any(pointer_file(group_file(group)).exists() for group in groups):
        yield from (tuple(read_array(group, name) for name in names) for group in groups)
        return
    with ThreadPoolExecutor(2 * len(names)) as pool:
        ahead: list[Future[torch.Tensor]] = []
        for group in groups:
            waiting, ahead = ahead, [pool.submit(read_array, group, name) for name in names]
            if waiting:
                yield tuple(array.result() for array in waiting)
                del waiting
        yield tuple(array.result() for array in ahead)


def parts_folder(group: Path) -> Path:
    """The folder of the files of a group that was gathered from large ones, each a group of some of its arrays."""
    return group.with_name(group.name + PARTS)


def _parts(group: Path) -> list[Path]:
    """The groups that hold the arrays of a group: itself, unless it is a folder of parts."""
    folder = parts_folder(group)
    if not folder.is_dir():
        return [group]
    return [path.with_name(path.name.removesuffix(SUFFIX)) for path in sorted(folder.glob(f"*{SUFFIX}"))]


def _part_of(group: Path, name: str) -> Path:
    folder = parts_folder(group)
    if not folder.is_dir():
        return group
    state = folder.stat()
    return folder / _index_parts(folder, state.st_mtime_ns, state.st_ino)[name]


@lru_cache(maxsize=8)
def _index_parts(folder: Path, modified: int, inode: int) -> dict[str, str]:
    """The part that holds each array, by the array's name."""
    group = folder.with_name(folder.name.removesuffix(PARTS))
    return {name: part.name for part in _parts(group) for name in LocalGroup(group_file(part)).nodes}


def _open_group(group: Path) -> LocalGroup | ObjectGroup:
    path = group_file(group)
    if path.exists():
        return _open_file(path, path.stat().st_mtime_ns)
    pointer = pointer_file(path)
    return _open_objects(pointer, pointer.stat().st_mtime_ns)


@lru_cache(maxsize=32)
def _open_file(path: Path, modified: int) -> LocalGroup:
    """The open file of a group; its list of entries is read once."""
    return LocalGroup(path)


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
    """Make one group of several that hold different arrays; groups of no array, no file, are passed over.

    Nothing large is copied: one group alone is linked, several become a folder of links (see `parts_folder`), of which small
    files share one. If one of them lies on shared storage, all go there, and the target is a pointer to all their objects.

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
    sizes = {group: group_file(group).stat().st_size for group in found}
    large = [group for group, size in sizes.items() if size >= LINKED_BYTES]
    small = [group for group, size in sizes.items() if size < LINKED_BYTES]
    folder = parts_folder(target)
    for number, group in enumerate(large):
        folder.mkdir(parents=True, exist_ok=True)
        link_or_copy(group_file(group), group_file(folder / f"{number:05d}"))
    if small or not large:
        _join(folder / f"{len(large):05d}" if large else target, small)


def _join(target: Path, groups: Iterable[Path]) -> None:
    with GroupWriter(target) as writer:
        for group in groups:
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
