"""The scratch folder of a stage: finished units survive a kill, and the output appears by one rename.

    artifacts/.locks/<stage>                            held while a process runs the stage; it stays
    artifacts/<stage>.partial/<fingerprint>/units/…      one folder a finished unit
    artifacts/<stage>.partial/<fingerprint>/savepoints/…     of long units that are not finished, see fisherfold/run/savepoints.py
    artifacts/<stage>.partial/<fingerprint>/manifest.jsonl   one line a finished unit, written after its data is durable
    artifacts/<stage>.partial/<fingerprint>/out/         the finished output, hard-linked to artifacts/<stage>/

The fingerprint covers all that determines the result: parameters, digests of the inputs, source text, device and libraries. `out` is
kept until a later stage starts, because DVC deletes and hashes outputs itself and can be killed while it does.
Units are written by fisherfold/run/unit_work.py, perhaps on other hosts; the process that holds the lock alone lists them.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fisherfold.run.determinism import chosen_placement, computing_threads
from fisherfold.run.disk import append_line, empty_folder, replace_folder, require_disk, sync_folder, sync_tree
from fisherfold.run.engine import Files, Unit, current_engine
from fisherfold.run.errors import WorkspaceBusy
from fisherfold.run.files import MANIFEST, describe_files, digest_json, file_fault, remember_digest
from fisherfold.run.locks import Held, locked
from fisherfold.run.progress import announce, track
from fisherfold.run.savepoints import SavepointPlace, save_seconds
from fisherfold.run.source import code_digest
from fisherfold.run.unit_work import (
    StageWork,
    attempt_folder,
    finish_unit,
    require_sight,
    share,
    work_in_turn,
    write_unit,
)
from fisherfold.run.workspace import Workspace

UNIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


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
        self.params = params.model_dump(mode="json")
        self.threads = getattr(params, "threads", None)
        self._products = getattr(params, "products", None)
        self._machine = None if self.threads is None else current_engine().machine()
        determined_by = {
            "stage": stage,
            "params": self.params,
            "inputs": dict(inputs),
            "code": code_digest(stage),
            "machine": self._machine,
        }
        self.fingerprint = digest_json(determined_by)
        self.base = scratch_folder(workspace, stage)
        self.folder = self.base / self.fingerprint[:16]
        self.units = self.folder / "units"
        self._savepoints = self.folder / "savepoints"
        self._manifest = self.folder / "manifest.jsonl"

    def __enter__(self) -> "Scratch":
        with ExitStack() as stack:
            stack.enter_context(lock_stage(self.workspace, self.stage))
            self.units.mkdir(parents=True, exist_ok=True)
            stack.enter_context(computing_threads(self.threads))
            for abandoned in (*self.units.glob(".*.partial"), *self._savepoints.glob("*/.*.partial")):
                shutil.rmtree(abandoned, ignore_errors=True)
            self._finished = self._read_manifest()
            for name, files in self._finished.items():
                self._remember(name, files)
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
        self,
        doing: str,
        work: Callable[..., None],
        pieces: Mapping[str, tuple[Any, ...]],
        sizes: Mapping[str, int] | None = None,
    ) -> dict[str, Path]:
        """Run `work(folder, *arguments)` for every piece of work whose unit is not finished; return the folder of each piece.

        `work` writes its result into the empty folder that it is given. Arguments are paths and small values.

        Args:
            sizes: numbers that a piece computes on. Pieces so small that giving them out costs more than they do share a unit, as
                many as stay below SMALL; without sizes each is a unit.
        """
        portions = share(sizes) if sizes else [[name] for name in pieces]
        units: dict[str, tuple[Any, ...]] = {}
        folders: dict[str, Path] = {}
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
        code = code_digest(self.stage)
        work = StageWork(self.stage, code, self._machine, self.units, self.threads, chosen_placement(), self._products)
        write = partial(write_unit, work)
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
        self._note(name, files)

    def _note(self, name: str, files: Files) -> None:
        append_line(self._manifest, json.dumps({"unit": name, "files": files}, sort_keys=True))
        self._finished[name] = files
        self._remember(name, files)
        shutil.rmtree(self._savepoints / name, ignore_errors=True)

    def _remember(self, name: str, files: Files) -> None:
        """Nothing that a unit's list describes is read again when it is published."""
        for file, entry in files.items():
            path = self.units / name / file
            if path.is_file() and path.stat().st_size == entry["bytes"]:
                remember_digest(path, entry["sha256"])

    def savepoints(self, name: str) -> SavepointPlace:
        """Where a long unit may keep what it has so far.

        Raises:
            ParameterError: the environment asks for an impossible number of seconds between them.
        """
        _check_name(name)
        return SavepointPlace(self._savepoints / name, save_seconds())

    def drop(self, name: str, part: str) -> None:
        """Free the disk of one file of a finished unit, when other finished units contain it; the unit stays listed."""
        files = self._finished.get(name, {})
        if part in files:
            self._note(name, {file: entry for file, entry in files.items() if file != part})
        (self.units / name / part).unlink(missing_ok=True)

    def keep(self, name: str, source: Path) -> Path:
        """Keep a folder as long as the output, to be put in place with it again; what is kept."""
        replace_folder(source, self.folder / name)
        digests = json.dumps(describe_files(self.folder / name), sort_keys=True)
        (self.folder / f"{name}.json").write_text(digests, encoding="utf-8")
        return self.folder / name

    def republish(self, *kept: str) -> bool:
        """Publish again what this very stage finished before it was interrupted, if all digests confirm it, those of `kept` too."""
        manifest = self.folder / "out" / MANIFEST
        if not manifest.exists():
            return False
        listed = [
            ("out", _listed(manifest).get("files")),
            *((name, _listed(self.folder / f"{name}.json")) for name in kept),
        ]
        damaged = [name for name, files in listed if not _confirmed(self.folder / name, files)]
        if damaged:
            announce(self.stage, "finished before, but what was kept of it is damaged: it is computed again")
            shutil.rmtree(self.folder / "out")
            return False
        announce(self.stage, "finished before; publishing its output again")
        self._link_output()
        return True

    @contextmanager
    def publish(self) -> Iterator[Path]:
        """An empty folder to write the stage's output into; published as ``artifacts/<stage>`` when the block ends."""
        partial = empty_folder(self.folder / "out.partial")
        yield partial
        manifest = {"stage": self.stage, "params": self.params, "files": describe_files(partial)}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        sync_tree(partial)
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        partial.replace(self.folder / "out")
        sync_folder(self.folder)
        self._link_output()
        for used in (self.units, self._savepoints):
            shutil.rmtree(used, ignore_errors=True)
        for other in self.base.iterdir():
            if other.is_dir() and other != self.folder:
                shutil.rmtree(other)

    def _link_output(self) -> None:
        replace_folder(self.folder / "out", self.workspace.out(self.stage))

    def _read_manifest(self) -> dict[str, Files]:
        """Finished units whose files are there in full; a last line cut short by a kill is cut off, for the next would be glued to it."""
        if not self._manifest.exists():
            return {}
        finished: dict[str, Files] = {}
        whole = 0
        for line in self._manifest.read_bytes().splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            finished[entry["unit"]] = entry["files"]
            whole += len(line)
        os.truncate(self._manifest, whole)
        return {name: files for name, files in finished.items() if self._is_there(name, files)}

    def _is_there(self, name: str, files: Files) -> bool:
        return (self.units / name).is_dir() and not any(
            file_fault(self.units / name / file, each) for file, each in files.items()
        )


def _listed(path: Path) -> dict[str, Any]:
    """A list of digests; empty if it is not readable."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _confirmed(folder: Path, files: Files | None) -> bool:
    """Whether a folder holds the files of a list, no others, and their very bytes."""
    found = (
        {name: entry for name, entry in describe_files(folder).items() if name != MANIFEST} if folder.is_dir() else None
    )
    return bool(files) and found == files


def _check_name(name: str) -> None:
    if not UNIT_NAME.fullmatch(name):
        raise ValueError(f"not a unit name: {name!r}")


def scratch_folder(workspace: Workspace, stage: str) -> Path:
    """Where a stage keeps its units until it has published."""
    return workspace.artifacts / f"{stage}.partial"


def lock_file(workspace: Workspace, stage: str) -> Path:
    """The lock of a stage; beside the scratch folders, which come and go."""
    return workspace.artifacts / ".locks" / stage


@contextmanager
def lock_stage(workspace: Workspace, stage: str) -> Iterator[None]:
    """Hold the lock of a stage while the block runs.

    Raises:
        WorkspaceBusy: another process holds it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(lock_file(workspace, stage)))
        except Held as error:
            raise WorkspaceBusy(
                f"Stage {stage!r} is already running in {workspace.root} ({error}). Wait for it, or end it and run again: "
                "finished units are kept."
            ) from None
        yield


def clear_scratch(workspace: Workspace, stage: str) -> None:
    """Remove the scratch folder of a stage whose output is committed, unless a process runs it."""
    if scratch_folder(workspace, stage).exists():
        with suppress(WorkspaceBusy), lock_stage(workspace, stage):
            shutil.rmtree(scratch_folder(workspace, stage))


def forget_output(workspace: Workspace, stage: str) -> None:
    """Remove the finished output that is kept in the scratch folder of a stage, so that it is computed again."""
    for kept in scratch_folder(workspace, stage).glob("*/out"):
        shutil.rmtree(kept)
