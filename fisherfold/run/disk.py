"""What stages do on the disk: ask for room, make a folder appear by one rename, flush what has to outlive a loss of power."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fisherfold.run.errors import NotEnoughDisk

SYNC_THREADS = 16
DISK_RESERVE = 64 * 2**20  # bytes left free for everything else on the disk


def require_disk(folder: Path, needed: int, stage: str) -> None:
    """Raise NotEnoughDisk unless `needed` bytes (and a small reserve) are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if needed + DISK_RESERVE > free:
        raise NotEnoughDisk(
            f"Stage {stage!r} needs {needed + DISK_RESERVE} bytes below {folder} and {free} are free. Nothing was started; "
            "make room (for instance with `dvc gc --workspace`) and run again."
        )


def empty_folder(path: Path) -> Path:
    """Make `path` an empty folder."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def replace_folder(source: Path, target: Path) -> None:
    """Make `target` a hard-linked (else copied) twin of `source`, by one rename."""
    staging = target.with_name(f"{target.name}.staging.partial")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging, copy_function=link_or_copy)
    if target.exists():
        old = empty_folder(target.with_name(f"{target.name}.old.partial"))
        target.replace(old)
        staging.replace(target)
        shutil.rmtree(old)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.replace(target)
    sync_folder(target.parent)


def link_or_copy(source: str | Path, target: str | Path) -> str | Path:
    """Make `target` the same file as `source`, by a hard link where the file system has them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to the disk."""
    with ThreadPoolExecutor(SYNC_THREADS) as pool:  # flushes at the same time share a commit of the file system
        list(pool.map(sync_folder, folder.rglob("*")))
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it to the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
