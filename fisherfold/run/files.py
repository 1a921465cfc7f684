"""What identifies the files of an output: sizes and digests, in a manifest.

A published output is a folder with a ``manifest.json`` that lists every file with its size and SHA-256. The digest of
an output, or of a part of it, is the digest of that list, so naming an input costs no second read of the data. A file whose
digest was taken while it was written, or that a unit's list holds already, is not read again for it, whatever it is linked to.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fisherfold.run import pointers
from fisherfold.run.errors import CorruptArtifact

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a published output.

    Raises:
        CorruptArtifact: there is none, or it is not readable.
    """
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptArtifact(
            f"{folder} has no {MANIFEST}: stage {folder.name!r} has not finished. {_cure(folder)}"
        ) from None
    except ValueError as error:
        raise CorruptArtifact(f"{folder / MANIFEST} is not readable ({error}). {_cure(folder)}") from None


def verify_output(folder: Path, prefix: str = "") -> str:
    """Check that every listed file below `prefix` is there in full, and return the digest of that part.

    Sizes are compared, not contents: a flipped bit is caught by the checksum of the array when it is read. A pointer must
    name what the manifest lists; the object itself is not asked for.

    Raises:
        CorruptArtifact: a file is missing or has another size, or a pointer names another file.
    """
    files = {name: entry for name, entry in read_manifest(folder)["files"].items() if name.startswith(prefix)}
    for name, entry in files.items():
        if state := file_fault(folder / name, entry):
            raise CorruptArtifact(f"{folder / name} {state}. {_cure(folder)}")
    return digest_json(files)


def file_fault(path: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file that a manifest lists as `entry`, by its size or its pointer; None if nothing is."""
    pointer = pointers.pointer_file(path)
    if path.is_file():
        found = path.stat().st_size
        return None if found == entry["bytes"] else f"has {found} bytes instead of {entry['bytes']}"
    if not pointer.exists():
        return "is missing"
    return None if pointers.describe_pointer(pointer) == entry else f"is another one by {pointer.name}"


def _cure(folder: Path) -> str:
    return f"Restore it with `dvc checkout`, or write it again with `dvc repro --force --single-item {folder.name}`."


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        CorruptArtifact: there is no such file.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise CorruptArtifact(f"{path} is missing. Write it with `dvc repro`.") from None


def digest_json(value: object) -> str:
    """SHA-256 of a value's canonical JSON text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


_known: dict[tuple[int, ...], str] = {}  # digests of files that this process wrote, or found listed


def remember_digest(path: Path, digest: str) -> None:
    """Note the SHA-256 of a finished file, which holds for every hard link to it until it is written again."""
    _known[_identity(path.stat())] = digest


def _identity(state: os.stat_result) -> tuple[int, ...]:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def describe_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `folder` (or of `names`), by relative path, sorted; a pointer is listed as its file."""
    found = (
        names
        if names is not None
        else (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    )
    return dict(_describe_file(folder, name) for name in sorted(found))


def _describe_file(folder: Path, name: str) -> tuple[str, dict[str, Any]]:
    path = folder / name
    if name.endswith(pointers.SUFFIX):
        return name.removesuffix(pointers.SUFFIX), pointers.describe_pointer(path)
    state = path.stat()
    return name, {"bytes": state.st_size, "sha256": _known.get(_identity(state)) or digest_file(path)}
