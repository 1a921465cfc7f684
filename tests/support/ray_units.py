"""Units of work that tests give to workers, which import them."""

import os
import signal
from functools import lru_cache
from pathlib import Path

from fisherfold.run.errors import NumericalError


@lru_cache(maxsize=1)
def loaded(marks: Path) -> int:
    """Something that takes long to load; leaves a mark every time."""
    (marks / f"loaded-{os.getpid()}").open("x").close()
    return os.getpid()


def describe_worker(folder: Path, marks: Path) -> None:
    print(f"unit {folder.name} speaks")
    loaded(marks)
    (folder / "worker").write_text(f"{os.getpid()} {os.environ['PREFECT_API_URL']}")


def die_at_first(folder: Path, marks: Path) -> None:
    """Kill the worker at the first attempt."""
    attempts = len(list(marks.glob("died-*")))
    (marks / f"died-{attempts}").touch()
    if not attempts:
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "attempts").write_text(str(attempts + 1))


def fail(folder: Path, marks: Path) -> None:
    """Fail by its own fault."""
    (marks / f"failed-{len(list(marks.glob('failed-*')))}").touch()
    raise NumericalError("this unit's data is bad")
