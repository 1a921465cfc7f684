"""The scratch folder of a stage: finished units survive a kill, and the output appears by one rename.

    artifacts/<stage>.partial/lock                      held while a process runs the stage
    artifacts/<stage>.partial/<fingerprint>/units/…      one folder a finished unit
    artifacts/<stage>.partial/<fingerprint>/manifest.jsonl   one line a finished unit, written after its data is durable
    artifacts/<stage>.partial/<fingerprint>/out/         the finished output, hard-linked to artifacts/<stage>/

The fingerprint covers all that determines the result: parameters, digests of the inputs, source text. `out` is kept
until a later stage starts, because DVC deletes and hashes outputs itself and can be killed while it does.

A unit is written where it is computed, perhaps on another host that shares the file system, into a folder of that attempt's
own; it appears by a rename after its data is durable, and the process that holds the lock alone lists it.
"""

import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

from pydantic import BaseModel

from fisherfold.run.determinism import computing_threads
from fisherfold.run.disk import append_line, empty_folder, replace_folder, require_disk, sync_folder, sync_tree
from fisherfold.run.engine import Files, Unit, current_engine
from fisherfold.run.errors import EngineError, WorkspaceBusy
from fisherfold.run.files import MANIFEST, describe_files, digest_json, file_fault
from fisherfold.run.progress import announce, track
from fisherfold.run.source import code_digest
from fisherfold.run.workspace import Workspace

UNIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
SMALL = 2**22  # numbers that are worth a unit; a decoder block of a model with 0.1 billion parameters
SIGHT_SECONDS = 60.0  # that what another host has written may take to appear here: file systems cache folders
SHARED = "The project folder has to lie on a file system that all nodes share, under one path; `fisherfold doctor` names those without."


@dataclass(frozen=True)
class Desk:
    """Where the units of a stage are written and by which source text; sent with each to the process that computes it."""

    stage: str
    code: str
    units: Path
    threads: int | None


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
        self.threads = getattr(params, "threads", None)
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
        with ExitStack() as stack:
            stack.enter_context(lock_stage(self.workspace, self.stage))
            stack.enter_context(computing_threads(self.threads))
            for abandoned in self.units.glob(".*.partial"):
                shutil.rmtree(abandoned, ignore_errors=True)
            self._finished = self._read_manifest()
            self._held = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

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

    def map(
        self, doing: str, work: Callable[..., None], pieces: Mapping[str, tuple], sizes: Mapping[str, int] | None = None
    ) -> dict[str, Path]:
        """Run `work(folder, *arguments)` for every piece of work whose unit is not finished; return the folder of each piece.

        `work` writes its result into the empty folder that it is given. Arguments are paths and small values.

        Args:
            sizes: numbers that a piece computes on. Pieces so small that giving them out costs more than they do share a unit, as
                many as stay below SMALL; without sizes each is a unit.
        """
        portions = share(sizes) if sizes else [[name] for name in pieces]
        units, folders = {}, {}
        for first, *others in portions:
            name = f"{first}.and-{len(others)}-more" if others else first
            each = {piece: pieces[piece] for piece in (first, *others)}
            units[name] = (work_in_turn, (work, each)) if others else (work, pieces[first])
            folders |= {piece: self.units / name / piece if others else self.units / name for piece in each}
        for _ in self.run(doing, {name: Unit(*unit) for name, unit in units.items()}):
            pass
        return folders

    def run(self, doing: str, units: Mapping[str, Unit]) -> Iterator[str]:
        """Run every unit that is not finished on the current engine; yield the name of each when it is listed.

        Names of units that are finished already come first. See `Engine.run` for the order.

        Raises:
            EngineError: a unit that another host has written is not to be seen here.
        """
        for name in units:
            _check_name(name)
        pending = {name: unit for name, unit in units.items() if name not in self._finished}
        if len(pending) < len(units):
            announce(self.stage, f"{doing}: {len(units) - len(pending)} of {len(units)} units are finished already")
        yield from [name for name in units if name in self._finished]
        write = partial(write_unit, Desk(self.stage, code_digest(self.stage), self.units, self.threads))
        for name, files in track(self.stage, doing, current_engine().run(write, pending), len(pending)):
            self._list(name, files)
            yield name

    def done(self, name: str) -> bool:
        """Whether a unit is finished."""
        return name in self._finished

    @contextmanager
    def unit(self, name: str) -> Iterator[Path]:
        """An empty folder to write one unit into; it becomes durable, then listed, when the block ends well."""
        _check_name(name)
        attempt = attempt_folder(self.units, name)
        yield attempt
        self._list(name, finish_unit(attempt, self.units / name))

    def _list(self, name: str, files: Files) -> None:
        require_sight(self.units / name, files, self.stage)
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
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
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
        for line in self._manifest.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                break
            finished[entry["unit"]] = entry["files"]
        return finished


def write_unit(desk: Desk, name: str, unit: Unit) -> Files:
    """Run one unit, here and now, into ``units/name``; return its files. Runs on whichever host the engine chose.

    Raises:
        EngineError: this host must not, see `require_fellow`; and whatever the unit raises.
    """
    require_fellow(desk)
    attempt = attempt_folder(desk.units, name)
    try:
        with computing_threads(desk.threads):
            unit.work(attempt, *unit.arguments)
        return finish_unit(attempt, desk.units / name)
    except BaseException:
        shutil.rmtree(attempt.parent, ignore_errors=True)
        raise


def share(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in their order, those next to each other together while their sizes stay below SMALL."""
    portions, total = [], SMALL + 1
    for name, size in sizes.items():
        if total + size > SMALL:
            portions.append([])
            total = 0
        portions[-1].append(name)
        total += size
    return portions


def work_in_turn(folder: Path, work: Callable[..., None], pieces: Mapping[str, tuple]) -> None:
    """Unit of work: several pieces, one after the other, each in a folder of its own."""
    for name, arguments in pieces.items():
        (folder / name).mkdir()
        work(folder / name, *arguments)


def require_fellow(desk: Desk) -> None:
    """Refuse to compute where the result could differ from that of other hosts, or never reach them.

    Raises:
        EngineError: this host has another source text, or does not see the stage's scratch folder.
    """
    if code_digest(desk.stage) != desk.code:
        raise EngineError(
            f"Stage {desk.stage!r}: {socket.gethostname()} has fisherfold with another source text, so its results could differ. "
            "Install the same version on all nodes; `fisherfold doctor` compares them."
        )
    if not _comes_true(desk.units.is_dir):
        raise EngineError(f"Stage {desk.stage!r}: {desk.units} is not to be seen on {socket.gethostname()}. {SHARED}")


def attempt_folder(units: Path, name: str) -> Path:
    """An empty folder called `name` for one attempt at a unit: one on a host given up for lost may still write its own."""
    return empty_folder(units / f".{uuid4().hex}.partial" / name)


def finish_unit(attempt: Path, folder: Path) -> Files:
    """Make what an attempt has written durable, then visible as `folder`; return its files."""
    files = describe_files(attempt)
    sync_tree(attempt)
    try:
        attempt.replace(folder)
    except OSError:
        if not folder.is_dir():
            raise
        # else an earlier attempt was faster, or was not listed before a kill: the same bits
    shutil.rmtree(attempt.parent)
    sync_folder(folder.parent)
    return files


def require_sight(folder: Path, files: Files, stage: str) -> None:
    """Wait until this host sees a finished unit in full.

    Raises:
        EngineError: it does not, so that the workers' file system is not this one.
    """
    if not _comes_true(lambda: not any(file_fault(folder / name, file) for name, file in files.items())):
        raise EngineError(
            f"Stage {stage!r}: a worker has written unit {folder.name!r} and {folder} is not to be seen in full on "
            f"{socket.gethostname()}. {SHARED}"
        )


def _comes_true(condition: Callable[[], bool]) -> bool:
    """Whether a condition that depends on what another host has written holds within SIGHT_SECONDS."""
    deadline = time.monotonic() + SIGHT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _check_name(name: str) -> None:
    if not UNIT_NAME.fullmatch(name):
        raise ValueError(f"not a unit name: {name!r}")


def scratch_folder(workspace: Workspace, stage: str) -> Path:
    return workspace.artifacts / f"{stage}.partial"


def lock_stage(workspace: Workspace, stage: str):
    """Hold the lock of a stage; released when the file is closed or the process ends.

    Raises:
        WorkspaceBusy: another process holds it.
    """
    path = scratch_folder(workspace, stage) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")
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
