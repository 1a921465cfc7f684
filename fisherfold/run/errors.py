"""Every failure a user can meet, each with its own message: what failed, where, why and what to do."""

import errno

SAID = {
    "No space left on device": errno.ENOSPC,
    "database or disk is full": errno.ENOSPC,
    "Cannot allocate memory": errno.ENOMEM,
    "can't allocate memory": errno.ENOMEM,
    "out of memory": errno.ENOMEM,
}
"""What libraries in Rust, C++ and SQLite say, whose errors carry no number of the system's."""


class FisherfoldError(Exception):
    """Base of all errors that are the user's to read; the command line prints them without a traceback."""


class ParameterError(FisherfoldError):
    """A value in params.yaml (or given by ``--set``) is unknown or out of range."""


class InputError(FisherfoldError):
    """A model, corpus or question set cannot be used as asked."""


class CorruptArtifact(FisherfoldError):
    """A stage's output is missing, truncated or fails its checksum."""


class WorkspaceBusy(FisherfoldError):
    """Another process runs the same stage in this workspace."""


class NotEnoughDisk(FisherfoldError):
    """A stage would not fit on the disk."""


class StoreError(FisherfoldError):
    """Shared storage cannot be used as set, or stays unreachable."""


class NumericalError(FisherfoldError):
    """A quantity is not finite, or a decomposition cannot be trusted."""


class EngineError(FisherfoldError):
    """The engine, its cluster or the Prefect API cannot be used as asked."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its kind if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def system_number(error: BaseException) -> int | None:
    """The number (errno) of what the system refused, if that is what the error tells of."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    return next((number for words, number in SAID.items() if words in str(error)), None)
