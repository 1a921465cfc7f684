"""What a machine may lack or hold that would stop a run: proxies in the way of our own server, a user without a name or a home,
a temporary folder with so long a path that no socket fits below it.
"""

import os
import pwd
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from fisherfold.run.errors import EngineError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
SOCKET_PATH = 107  # bytes that Linux allows
OURS = len("/fisherfold-12345678/units")  # of that, for a socket in a folder of its own
RAYS = len("/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what is missing, for this process and those that it starts; what the user has set otherwise stays."""
    reach_directly(environment, *LOOPBACK)
    name_user(environment)


def reach_directly(environment: MutableMapping[str, str], *hosts: str) -> None:
    """Exempt hosts from the proxies, if there are any: a proxy knows nothing of this machine's own servers."""
    set_here = [name for name in environment if name.lower() in PROXIES and environment[name]]
    listed = [*_listed(environment, "no_proxy"), *_listed(environment, "NO_PROXY")]
    if set_here and "*" not in listed:
        exempt = ",".join(dict.fromkeys([*listed, *hosts]))
        environment["no_proxy"] = environment["NO_PROXY"] = exempt


def _listed(environment: MutableMapping[str, str], name: str) -> list[str]:
    return [host.strip() for host in environment.get(name, "").split(",") if host.strip()]


def name_user(environment: MutableMapping[str, str]) -> None:
    """Give a user whom the machine does not know, as in a container, a name, and one who has no home that can be written, a home."""
    user = os.getuid()
    try:
        home = pwd.getpwuid(user).pw_dir
    except KeyError:
        home = ""
        for name in ("USER", "LOGNAME"):
            environment.setdefault(name, f"user{user}")
    if not _writable(environment.get("HOME") or home):
        environment["HOME"] = str(_own_folder(f"fisherfold-home-{user}", tempfile.gettempdir()))


def _writable(folder: str) -> bool:
    return bool(folder) and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def _own_folder(name: str, base: str) -> Path:
    """A folder of this user alone below `base`; another one where somebody else has taken its name."""
    folder = Path(base) / name
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
    except OSError:
        state = None
    trusted = (
        state is not None and not folder.is_symlink() and state.st_uid == os.getuid() and not state.st_mode & 0o022
    )
    return folder if trusted else Path(tempfile.mkdtemp(prefix=f"{name}-", dir=base))


@contextmanager
def socket_folder() -> Iterator[Path]:
    """A folder of this user alone in which a socket's path is short enough; removed with the block.

    Raises:
        EngineError: there is none.
    """
    base = short_temporary(OURS)
    try:
        folder = tempfile.TemporaryDirectory(prefix="fisherfold-", dir=base, ignore_cleanup_errors=True)
    except OSError as error:
        raise EngineError(
            f"No socket can be made: the path of the temporary folder {tempfile.gettempdir()} is too long for one, and {base} cannot be "
            f"written ({error}). Set TMPDIR to a folder with a short path."
        ) from None
    with folder as name:
        yield Path(name)


def ray_folder() -> str | None:
    """Where Ray keeps its sockets if the temporary folder's path is too long for them; None leaves it to Ray, and to RAY_TMPDIR."""
    chosen = os.environ.get("RAY_TMPDIR") or fits(tempfile.gettempdir(), RAYS)
    return None if chosen else str(_own_folder(f"ray-{os.getuid()}", "/tmp"))


def short_temporary(needed: int) -> str:
    """The temporary folder, or the system's own where its path leaves fewer than `needed` bytes of a socket's."""
    return tempfile.gettempdir() if fits(tempfile.gettempdir(), needed) else "/tmp"


def fits(folder: str, needed: int) -> bool:
    """Whether a socket's path of `needed` bytes fits below a folder."""
    return len(os.fsencode(folder)) + needed <= SOCKET_PATH
