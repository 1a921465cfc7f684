"""The password of a Prefect server that this project starts: without one every local user could start runs on it.

`fisherfold serve` keeps it in a file that its user alone may read, so that `prefect` and browsers can be given it; a temporary server's
lives in the environment of the run's own processes.
"""

import os
import secrets
import stat
from pathlib import Path

from prefect.settings import PREFECT_HOME, PREFECT_SERVER_API_AUTH_STRING

from fisherfold.run.errors import EngineError

FILE = "fisherfold-password"
USER = "fisherfold"


def new_secret() -> str:
    """``USER:PASSWORD``, the password drawn anew."""
    return f"{USER}:{secrets.token_urlsafe(24)}"


def lasting_secret() -> str:
    """The one that PREFECT_SERVER_API_AUTH_STRING gives, else that of the file, which is made if it is not there.

    Raises:
        EngineError: others may read the file, or it cannot be made.
    """
    given = PREFECT_SERVER_API_AUTH_STRING.value()
    if given:
        return given.get_secret_value() if hasattr(given, "get_secret_value") else str(given)
    path = secret_file()
    try:
        _make(path)
        state = path.stat()
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise EngineError(
            f"The password of Prefect's server cannot be kept in {path} ({error}). Set PREFECT_HOME."
        ) from None
    if state.st_uid != os.getuid() or stat.S_IMODE(state.st_mode) & 0o077 or ":" not in text:
        raise EngineError(
            f"{path} is not this user's alone, or holds no USER:PASSWORD: remove it, and another password is drawn."
        )
    return text


def where_it_is() -> str:
    """In words, for those who want to log in."""
    if PREFECT_SERVER_API_AUTH_STRING.value():
        return "those of PREFECT_SERVER_API_AUTH_STRING"
    return f"{secret_file()} (PREFECT_API_AUTH_STRING=$(cat {secret_file()}))"


def secret_file() -> Path:
    """Where `fisherfold serve` keeps its password."""
    return Path(PREFECT_HOME.value()) / FILE


def _make(path: Path) -> None:
    """Write a drawn password, whole and readable by this user alone from the start, unless the file is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{FILE}.{os.getpid()}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(f"{new_secret()}\n")
    try:
        os.link(partial, path)  # the first of several stays
    except FileExistsError:
        pass
    finally:
        partial.unlink()
