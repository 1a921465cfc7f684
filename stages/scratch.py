"""The scratch folder of a stage: finished units survive a kill, and the output appears by one rename.

    artifacts/<stage>.partial/lock                      held while a process runs the stage
    artifacts/<stage>.partial/<fingerprint>/units/…      one folder a finished unit
    artifacts/<stage>.partial/<fingerprint>/manifest.jsonl   one line a finished unit, written after its data is durable
    artifacts/<stage>.partial/<fingerprint>/out/         the finished output, hard-linked to artifacts/<stage>/

The fingerprint covers all that determines the result: parameters, digests of the inputs, source text. `out` is kept
until a later stage starts, because DVC deletes and hashes outputs itself and can be killed while it does.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel

from stages.errors import NotEnoughDisk, WorkspaceBusy
from stages.progress import announce, track
from stages.workspace import MANIFEST, Workspace, code_digest, describe_files, digest_json

UNIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
SYNC_THREADS = 16
DISK_RESERVE = 64 * 2**20  # bytes left free for everything else on the disk


class Scratch:
    """The restartable run of one stage.

    Use as a context manager. Inside: `if scratch.republish(): return`, then `map` over units, then `publish`.

    Args:
        workspace: the project folder.
        stage: name of the stage; its output is ``artifacts/<stage>``.
        params: the stage's own block of parameters.
        inputs: digest of every input, by name.

    Raises:
        WorkspaceBusy: on entry, when another process runs this stage here.
    """

    def __init__(self, workspace: Workspace, stage: str, params: BaseModel, inputs: Mapping[str, str]) -> None:
        self.workspace = workspace
        self.stage = stage
        determined_by = {
            "stage": stage,
            "params": params.model_dump(mode="json"),
            "inputs": dict(inputs),
            "code": code_digest(stage),
        }
        self.fingerprint = digest_json(determined_by)
        self.base = scratch_folder(workspace, stage)
        self.folder = self.base / self.fingerprint[:16]
        self.units = self.folder / "units"
        self._manifest = self.folder / "manifest.jsonl"

    def __enter__(self) -> "Scratch":
        self.units.mkdir(parents=True, exist_ok=True)
        self._lock = lock_stage(self.workspace, self.stage)
        self._finished = self._read_manifest()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def require_disk(self, needed: int) -> None:
        """Refuse to start when `needed` bytes do not fit, less what finished units hold already.

        Raises:
            NotEnoughDisk: names the bytes needed and free.
        """
        held = sum(
            file["bytes"]
            for unit, files in self._finished.items()
            for name, file in files.items()
            if (self.units / unit / name).exists()
        )
        require_disk(self.folder, max(0, needed - held), self.stage)

    def map(self, doing: str | None, work: Callable[..., None], units: Mapping[str, tuple]) -> dict[str, Path]:
        """Run `work(folder, *arguments)` for every unit that is not finished; return the folder of each unit.

        `work` writes its result into the empty folder that it is given. Arguments are paths and small values. No
        progress is shown if `doing` is None.
        """
        pending = {name: arguments for name, arguments in units.items() if name not in self._finished}
        if doing and len(pending) < len(units):
            announce(self.stage, f"{doing}: {len(units) - len(pending)} of {len(units)} units are finished already")
        items = pending.items()
        for name, arguments in track(self.stage, doing, items, len(pending)) if doing else items:
            with self.unit(name) as folder:
                work(folder, *arguments)
        return {name: self.units / name for name in units}

    def done(self, name: str) -> bool:
        """Whether a unit is finished."""
        return name in self._finished

    @contextmanager
    def unit(self, name: str) -> Iterator[Path]:
        """An empty folder to write one unit into; it becomes durable, then listed, when the block ends well."""
        if not UNIT_NAME.fullmatch(name):
            raise ValueError(f"not a unit name: {name!r}")
        partial = empty_folder(self.units / f"{name}.partial")
        yield partial
        files = describe_files(partial)
        sync_tree(partial)
        shutil.rmtree(self.units / name, ignore_errors=True)
        partial.replace(self.units / name)
        sync_folder(self.units)
        append_line(self._manifest, json.dumps({"unit": name, "files": files}, sort_keys=True))
        self._finished[name] = files

    def drop(self, name: str, part: str) -> None:
        """Free the disk of one file of a finished unit, when other finished units contain it; the unit stays listed."""
        (self.units / name / part).unlink(missing_ok=True)

    def republish(self) -> bool:
        """Publish again what this very stage finished before it was interrupted, if it did."""
        if not (self.folder / "out" / MANIFEST).exists():
            return False
        announce(self.stage, "finished before; publishing its output again")
        self._link_output()
        return True

    @contextmanager
    def publish(self) -> Iterator[Path]:
        """An empty folder to write the stage's output into; published as ``artifacts/<stage>`` when the block ends."""
        partial = empty_folder(self.folder / "out.partial")
        yield partial
        manifest = {"stage": self.stage, "files": describe_files(partial)}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        sync_tree(partial)
        partial.replace(self.folder / "out")
        sync_folder(self.folder)
        self._link_output()
        shutil.rmtree(self.units, ignore_errors=True)
        for other in self.base.iterdir():
            if other.is_dir() and other != self.folder:
                shutil.rmtree(other)

    def _link_output(self) -> None:
        replace_folder(self.folder / "out", self.workspace.out(self.stage))

    def _read_manifest(self) -> dict[str, dict]:
        """Finished units; a last line cut short by a kill is ignored, and so is whatever it would have listed."""
        if not self._manifest.exists():
            return {}
        finished = {}
        for line in self._manifest.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                break
            finished[entry["unit"]] = entry["files"]
        return finished


def scratch_folder(workspace: Workspace, stage: str) -> Path:
    return workspace.artifacts / f"{stage}.partial"


def lock_stage(workspace: Workspace, stage: str):
    """Hold the lock of a stage; released when the file is closed or the process ends.

    Raises:
        WorkspaceBusy: another process holds it.
    """
    path = scratch_folder(workspace, stage) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise WorkspaceBusy(
            f"Stage {stage!r} is already running in {workspace.root} (process {holder}). Wait for it, or end it and run again: "
            "finished units are kept."
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def clear_scratch(workspace: Workspace, stage: str) -> None:
    """Remove the scratch folder of a stage whose output is committed, unless a process runs it."""
    if scratch_folder(workspace, stage).exists():
        try:
            lock = lock_stage(workspace, stage)
        except WorkspaceBusy:
            return
        shutil.rmtree(scratch_folder(workspace, stage))
        lock.close()


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
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
