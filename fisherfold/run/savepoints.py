"""Savepoints: durable states of a unit that is not finished, so that a kill costs minutes of a long unit and not all of it.

    artifacts/<stage>.partial/<fingerprint>/savepoints/<unit>/<step>/…     the newest state, and `files/` as links to what the unit wrote

How often they are made changes no bit of a result: the state is exact. So it is a setting, FISHERFOLD_SAVE_SECONDS, and no parameter.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from fisherfold.run.disk import link_or_copy, sync_folder, sync_tree
from fisherfold.run.errors import ParameterError

SETTING = "FISHERFOLD_SAVE_SECONDS"
SECONDS = 180.0
FILES = "files"


def save_seconds() -> float:
    """Seconds of work between two savepoints of a unit.

    Raises:
        ParameterError: the environment holds no such number.
    """
    try:
        seconds = float(os.environ.get(SETTING) or SECONDS)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ParameterError(f"{SETTING}={os.environ[SETTING]!r} is not a number of seconds, 0 or more.")
    return seconds


@dataclass(frozen=True)
class SavepointPlace:
    """Where the savepoints of one unit lie, and how many seconds apart they are made; sent to whoever computes the unit."""

    folder: Path
    seconds: float


class Savepoints:
    """The savepoints of one unit, during one attempt at it.

    Args:
        place: of the unit.
        attempt: the folder that the unit writes into; its files are part of every savepoint, and must not be changed in place.
    """

    def __init__(self, place: SavepointPlace, attempt: Path) -> None:
        self._place, self._attempt = place, attempt
        self._last = time.monotonic()

    def restore(self) -> Path | None:
        """The folder of the newest state, after its files have been linked into the emptied attempt; None if there is no state."""
        shutil.rmtree(self._attempt)
        states = sorted(self._place.folder.glob("[0-9]*"))
        if not states:
            self._attempt.mkdir()
            return None
        shutil.copytree(states[-1] / FILES, self._attempt, copy_function=link_or_copy)
        return states[-1]

    def due(self) -> bool:
        """Whether the last one, or the attempt's begin, is long enough ago."""
        return time.monotonic() - self._last >= self._place.seconds

    @contextmanager
    def save(self, step: int) -> Iterator[Path]:
        """A folder to write the state after `step` steps into; durable, and the only one, when the block ends well."""
        partial = self._place.folder / f".{uuid4().hex}.partial"
        partial.mkdir(parents=True)
        yield partial
        shutil.copytree(self._attempt, partial / FILES, copy_function=link_or_copy)
        sync_tree(partial)
        target = self._place.folder / f"{step:08d}"
        try:
            partial.replace(target)
        except OSError:
            if not target.is_dir():
                raise
            shutil.rmtree(partial)  # another attempt was faster: the same bits
        sync_folder(self._place.folder)
        for state in self._place.folder.glob("[0-9]*"):
            if state.name < target.name:
                shutil.rmtree(state, ignore_errors=True)
        self._last = time.monotonic()
