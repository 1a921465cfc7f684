"""Whether DVC was told to run a stage that it holds for up to date. It does not tell its stages, so its command line is read."""

import re
from collections.abc import Sequence
from pathlib import Path

import psutil

FORCE = re.compile(r"--force|-[a-zA-Z]*f[a-zA-Z]*")
RUNNING = {"repro", "exp", "experiments"}


def is_forced() -> bool:
    """Whether a process that this one descends from is `dvc repro --force`, or `dvc exp run --force`."""
    return any(forces(_command(parent)) for parent in psutil.Process().parents())


def forces(command: Sequence[str]) -> bool:
    """Whether a command line is DVC's, runs stages and forces them."""
    names = [Path(word).name for word in command[:3]]
    if "dvc" not in names:
        return False
    words = command[names.index("dvc") + 1 :]
    return not RUNNING.isdisjoint(words) and any(FORCE.fullmatch(word) for word in words)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
