"""Pointers: a small JSON file that stands for a large one whose bytes lie on shared storage.

`shard-00000.zarr.zip.pointer.json` stands for `shard-00000.zarr.zip`. It names one object, or several that hold different arrays of
one group, each by URL, size and SHA-256. Manifests list the file that it stands for, so whoever names an output by its digest
sees no difference between a local file and an object.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from fisherfold.run.errors import CorruptArtifact

SUFFIX = ".pointer.json"
URL = re.compile(r"[a-z][a-z0-9+.\-]*://\S+")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredObject:
    """One zip file on shared storage.

    Attributes:
        url: where it lies, as fsspec writes it.
        bytes: its size.
        sha256: of its content.
        directory: offset of its list of entries, so that one range request reads it.
    """

    url: str
    bytes: int
    sha256: str
    directory: int

    def valid(self) -> bool:
        """Whether the fields can be what they say."""
        texts = all(isinstance(text, str) for text in (self.url, self.sha256))
        numbers = all(type(number) is int for number in (self.bytes, self.directory))
        return (
            texts
            and numbers
            and bool(URL.fullmatch(self.url) and SHA256.fullmatch(self.sha256))
            and 0 <= self.directory < self.bytes
        )


def pointer_file(path: Path) -> Path:
    """The pointer that stands for a file."""
    return path.with_name(path.name + SUFFIX)


def write_pointer(path: Path, objects: list[StoredObject]) -> None:
    """Write the pointer that stands for the file `path`; as a new file, since others may have the old one linked."""
    pointer_file(path).unlink(missing_ok=True)
    content = {"objects": [asdict(stored) for stored in objects]}
    pointer_file(path).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_pointer(pointer: Path) -> list[StoredObject]:
    """The objects that a pointer names.

    Raises:
        CorruptArtifact: it is not a pointer, or a field is out of range.
    """
    try:
        objects = [StoredObject(**entry) for entry in json.loads(pointer.read_text(encoding="utf-8"))["objects"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{pointer} is not a readable pointer ({error!r}). {CURE}") from None
    if not objects or not all(stored.valid() for stored in objects):
        raise CorruptArtifact(f"{pointer} does not name objects by URL, size and SHA-256. {CURE}")
    return objects


def describe_pointer(pointer: Path) -> dict[str, int | str]:
    """Size and SHA-256 of the file that a pointer stands for; of several objects, those of the list of them."""
    objects = read_pointer(pointer)
    digests = [stored.sha256 for stored in objects]
    together = hashlib.sha256("".join(digests).encode()).hexdigest()
    return {"bytes": sum(stored.bytes for stored in objects), "sha256": digests[0] if len(digests) == 1 else together}


CURE = "Restore it with `dvc checkout`, or write it again with `dvc repro --force --single-item` of its stage."
