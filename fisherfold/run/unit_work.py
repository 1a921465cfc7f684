"""What a worker does with one unit, on whichever host: it checks that it may, writes into a folder of its own, makes that durable and visible.

A unit is written where it is computed, perhaps on another host that shares the file system, into a folder of that attempt's
own; it appears by a rename after its data is durable, and the process that holds the stage's lock alone lists it.
"""

import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from fisherfold.run.determinism import computing_threads, describe_machine, multiplying, placed
from fisherfold.run.disk import empty_folder, sync_folder, sync_tree
from fisherfold.run.engine import Files, Unit
from fisherfold.run.errors import EngineError
from fisherfold.run.files import describe_files, file_fault
from fisherfold.run.source import code_digest

SMALL = 2**22  # numbers that are worth a unit; a decoder block of a model with 0.1 billion parameters
SIGHT_SECONDS = 60.0  # that what another host has written may take to appear here: file systems cache folders
SHARED = "The project folder has to lie on a file system that all nodes share, under one path; `fisherfold doctor` names those without."


@dataclass(frozen=True)
class StageWork:
    """What the units of one stage have in common; sent with each to the process that computes it.

    Attributes:
        stage: its name.
        code: digest of its source text.
        machine: the device and libraries that its units are computed with, see `describe_machine`; None if it computes nothing.
        units: the folder that its units appear in.
        threads: that each computes with.
        placement: of the models that it loads, see `fisherfold.run.determinism`.
        products: of its matrices, see there; None: as they are.
    """

    stage: str
    code: str
    machine: Mapping[str, str] | None
    units: Path
    threads: int | None
    placement: str
    products: str | None


def write_unit(work: StageWork, name: str, unit: Unit) -> Files:
    """Run one unit, here and now, into ``units/name``; return its files. Runs on whichever host the engine chose.

    Raises:
        EngineError: this host must not, see `require_same`; and whatever the unit raises.
    """
    require_same(work)
    attempt = attempt_folder(work.units, name)
    try:
        with computing_threads(work.threads), placed(work.placement), multiplying(work.products):
            unit.work(attempt, *unit.arguments)
        return finish_unit(attempt, work.units / name)
    except BaseException:
        shutil.rmtree(attempt.parent, ignore_errors=True)
        raise


def share(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in their order, those next to each other together while their sizes stay below SMALL."""
    portions: list[list[str]] = []
    total = SMALL + 1
    for name, size in sizes.items():
        if total + size > SMALL:
            portions.append([])
            total = 0
        portions[-1].append(name)
        total += size
    return portions


def work_in_turn(folder: Path, work: Callable[..., None], pieces: Mapping[str, tuple[Any, ...]]) -> None:
    """Unit of work: several pieces, one after the other, each in a folder of its own."""
    for name, arguments in pieces.items():
        (folder / name).mkdir()
        work(folder / name, *arguments)


def require_same(work: StageWork) -> None:
    """Refuse to compute where the result could differ from that of other hosts, or never reach them.

    Raises:
        EngineError: this host has another source text, device or library, or does not see the stage's scratch folder.
    """
    host = socket.gethostname()
    if code_digest(work.stage) != work.code:
        raise EngineError(
            f"Stage {work.stage!r}: {host} has fisherfold with another source text, so its results could differ. "
            "Install the same version on all nodes; `fisherfold doctor` compares them."
        )
    if differences := _differences(work.machine):
        raise EngineError(
            f"Stage {work.stage!r}: {host} computes with {differences}, so its results could differ. Use the same devices and "
            "packages on all nodes (ATEN_CPU_CAPABILITY=avx2 makes processors alike); `fisherfold doctor` compares them."
        )
    if not comes_true(work.units.is_dir):
        raise EngineError(f"Stage {work.stage!r}: {work.units} is not to be seen on {host}. {SHARED}")


def _differences(expected: Mapping[str, str] | None) -> str:
    if expected is None:
        return ""
    here = describe_machine()
    return ", ".join(
        f"{part} {found!r} where others have {expected[part]!r}"
        for part, found in here.items()
        if found != expected[part]
    )


def attempt_folder(units: Path, name: str) -> Path:
    """An empty folder called `name` for one attempt at a unit: one on a host given up for lost may still write its own."""
    return empty_folder(units / f".{uuid4().hex}.partial" / name)


def finish_unit(attempt: Path, folder: Path) -> Files:
    """Make what an attempt has written durable, then visible as `folder`; return its files.

    Where an earlier attempt was faster, or was not listed before a kill, its folder stays if it holds the same bits in full.
    """
    files = describe_files(attempt)
    sync_tree(attempt)
    while not _appeared(attempt, folder):
        if describe_files(folder) == files:
            break
        folder.replace(attempt.with_name(f"{attempt.name}.incomplete"))
    shutil.rmtree(attempt.parent)
    sync_folder(folder.parent)
    return files


def _appeared(attempt: Path, folder: Path) -> bool:
    try:
        attempt.replace(folder)
    except OSError:
        if not folder.is_dir():
            raise
        return False
    return True


def require_sight(folder: Path, files: Files, stage: str) -> None:
    """Wait until this host sees a finished unit in full.

    Raises:
        EngineError: it does not, so that the workers' file system is not this one.
    """
    if not comes_true(lambda: not any(file_fault(folder / name, file) for name, file in files.items())):
        raise EngineError(
            f"Stage {stage!r}: a worker has written unit {folder.name!r} and {folder} is not to be seen in full on "
            f"{socket.gethostname()}. {SHARED}"
        )


def comes_true(condition: Callable[[], bool]) -> bool:
    """Whether a condition that depends on what another host has written holds within SIGHT_SECONDS."""
    tries = Retrying(
        retry=retry_if_result(lambda holds: not holds),
        stop=stop_after_delay(SIGHT_SECONDS),
        wait=wait_fixed(0.2),
        retry_error_callback=lambda _: False,
    )
    return tries(condition)
