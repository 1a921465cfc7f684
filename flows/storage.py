"""What lies on shared storage, seen from a project: checking that it is all there, and removing what nothing names.

Objects are named by pointers: those in artifacts/ (also of unfinished stages), and those in DVC's cache, from which a parameter
set back restores an earlier output. Everything else below the prefix is garbage: outputs of parameters that DVC has forgotten
(`dvc gc` first), and units of runs that were killed between an upload and its listing.
"""

import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

from fisherfold.run.errors import CorruptArtifact, StoreError
from fisherfold.run.objects import SETTING, file_system, persist, read_range, require_object, store_url
from fisherfold.run.pointers import SUFFIX, StoredObject, read_pointer
from fisherfold.run.workspace import Workspace
from flows.repository import repository

OBJECT_NAME = re.compile(r"[0-9a-f]{64}\.zarr\.zip")


def probe_store() -> None:
    """Write, read and remove a small object, if shared storage is set: what a run would need, found out before it starts.

    Raises:
        StoreError, CorruptArtifact: the setting, the credentials, the bucket or the server; see fisherfold/run/objects.py.
    """
    base = store_url()
    if base is None:
        return
    content = uuid4().bytes
    url = f"{base}/probe-{content.hex()}"
    system, path = file_system(url)
    try:
        persist("Writing a probe", url, lambda: system.pipe_file(path, content))
    except FileNotFoundError as error:
        raise StoreError(
            f"{SETTING}: {url} cannot be written ({error}). Create the bucket, or correct the setting."
        ) from None
    if read_range(url, 0, len(content)) != content:
        raise StoreError(
            f"{SETTING}: {url} reads back as something else. Use storage that shows what was written at once."
        )
    remove_objects([url])


def check_store(workspace: Workspace) -> int:
    """Probe shared storage, and print what is wrong with the objects that artifacts/ names; 1 if anything is."""
    probe_store()
    faults = damaged_objects(workspace)
    for fault in faults:
        print(fault)
    print(f"{len(published_pointers(workspace))} pointers, {len(faults)} faults")
    return 1 if faults else 0


def clean_store(workspaces: Sequence[Workspace], days: float, delete: bool) -> int:
    """Print the objects that no project names, and delete them if asked to."""
    unnamed = unnamed_objects(workspaces, timedelta(days=days))
    for url, size in unnamed.items():
        print(f"{size:>16,}  {url}")
    if delete:
        remove_objects(list(unnamed))
    done = "deleted" if delete else "to delete with --delete"
    print(f"{len(unnamed)} objects, {sum(unnamed.values()):,} bytes {done}")
    return 0


def published_pointers(workspace: Workspace) -> list[Path]:
    """The pointers below artifacts/, those of unfinished stages too."""
    return sorted(workspace.artifacts.rglob(f"*{SUFFIX}"))


def cached_pointers(workspace: Workspace) -> Iterator[Path]:
    """The pointers in DVC's cache.

    Raises:
        StoreError: the cache lists one and does not hold it, so what it names cannot be known.
    """
    with repository(workspace) as repo:
        cache = Path(repo.cache.local.path)
    for listing in cache.glob("*/*.dir"):
        for entry in json.loads(listing.read_text(encoding="utf-8")):
            if entry["relpath"].endswith(SUFFIX):
                pointer = cache / entry["md5"][:2] / entry["md5"][2:]
                if not pointer.exists():
                    raise StoreError(f"DVC's cache lists {entry['relpath']} and does not hold it: `dvc fetch` first.")
                yield pointer


def named_objects(workspace: Workspace) -> dict[str, StoredObject]:
    """Every object that the project names, by its URL."""
    pointers = [*published_pointers(workspace), *cached_pointers(workspace)]
    return {stored.url: stored for pointer in pointers for stored in read_pointer(pointer)}


def damaged_objects(workspace: Workspace) -> list[str]:
    """What is wrong with the objects that artifacts/ names, one text each; sizes are compared, nothing is downloaded.

    Raises:
        StoreError: the storage cannot be used.
    """
    found = []
    stored = {stored.url: stored for pointer in published_pointers(workspace) for stored in read_pointer(pointer)}
    for each in stored.values():
        try:
            require_object(each)
        except CorruptArtifact as error:
            found.append(str(error))
    return found


def unnamed_objects(workspaces: Sequence[Workspace], grace: timedelta) -> dict[str, int]:
    """Objects below the prefix that none of the projects names and that are older than `grace`: URL and size.

    Younger ones stay, since a run elsewhere may have sent them and not yet published.

    Raises:
        StoreError: the setting is missing, or the storage cannot be used.
    """
    base = store_url()
    if base is None:
        raise StoreError(f"{SETTING} is not set: nothing says where to look. Set it to s3://bucket/prefix.")
    named = {url for workspace in workspaces for url in named_objects(workspace)}
    system, root = file_system(base)

    def listed() -> list[dict]:
        return system.ls(root, detail=True, refresh=True)

    try:
        entries = persist("Listing", base, listed)
    except FileNotFoundError:
        return {}
    urls = {f"{base}/{Path(entry['name']).name}": entry for entry in entries if entry["type"] == "file"}
    return {
        url: entry["size"]
        for url, entry in urls.items()
        if OBJECT_NAME.fullmatch(Path(url).name) and url not in named and _age(entry) > grace
    }


def remove_objects(urls: Sequence[str]) -> None:
    """Delete objects for good."""
    for url in urls:
        system, path = file_system(url)
        persist("Removing", url, lambda system=system, path=path: system.rm_file(path))


def _age(entry: dict) -> timedelta:
    """How long ago an object was written; nothing known is young."""
    written = entry.get("LastModified") or entry.get("mtime") or entry.get("created")
    if isinstance(written, int | float):
        written = datetime.fromtimestamp(written, UTC)
    return datetime.now(UTC) - written if written else timedelta(0)
