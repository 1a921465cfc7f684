"""Shared storage: finished files as objects of a bucket, or below any other URL that fsspec opens.

With ``FISHERFOLD_STORE=s3://bucket/prefix`` in the environment of every worker, a finished group (one zip file, see
fisherfold/run/store.py) becomes one object, and a pointer of a few hundred bytes takes its place (fisherfold/run/pointers.py). What is
computed is the same bits, so the setting is no parameter. Endpoint and credentials are the protocol's own settings (for S3:
AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, a profile, a role).

    upload    An object is named by the SHA-256 of its content, so an upload is idempotent: repeated after a kill, or by two workers at
              once, it writes the same bytes under the same name. It is always sent, never skipped because something lies there: that
              is how a damaged object is healed. S3 shows an object only when all parts are in. The size is compared, then
              the pointer is written, then the local file removed; a unit is listed only after that. A kill in between
              leaves an object that nothing names (see flows/storage.py for cleaning up), never a name without its object.
    read      By ranges (fisherfold/run/object_group.py), each compared with its length and its checksums.
    failure   What may pass (server errors, time-outs, resets, "slow down") is tried again with back-off, TRIES times.
              What cannot (refused credentials, no such bucket) and what did not pass is a `StoreError` that names the setting; an
              object that is gone or damaged is a `CorruptArtifact` that names its URL. Finished units stay in either case.
"""

import os
import random
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from fisherfold.run.errors import CorruptArtifact, StoreError
from fisherfold.run.files import digest_file
from fisherfold.run.pointers import URL, StoredObject

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SETTING = "FISHERFOLD_STORE"
TRIES = 5
FIRST_DELAY = 1.0  # seconds; doubled after each try
PART_BYTES = 32 * 2**20  # of an upload in parts, PARTS_AT_ONCE of them in memory
PARTS_AT_ONCE = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"use_listings_cache": False, "config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 3}}}
}
"""How a file system is opened, by protocol. A part of an upload is tried three times before all of the upload is tried again."""
ATTRIBUTES: dict[str, dict[str, Any]] = {"s3": {"retries": 1}}  # s3fs would try each of those three times five times
UPLOAD_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"chunksize": PART_BYTES, "max_concurrency": PARTS_AT_ONCE}}
REFUSALS = (PermissionError, ValueError, TypeError)
REFUSALS_BY_NAME = ("CredentialsError", "ConfigNotFound", "ProfileNotFound", "ParamValidationError", "TokenError")
"""Errors that trying again does not cure; ends of names for those of libraries that are not imported here."""
Result = TypeVar("Result")
_jitter = random.Random()  # tenacity's own would draw from the global generator, which belongs to the stages


def store_url() -> str | None:
    """Where finished groups go, without a slash at the end; None if they stay where they are.

    Raises:
        StoreError: the setting is no URL, or holds a password.
    """
    url = os.environ.get(SETTING, "").strip().rstrip("/")
    if not url:
        return None
    if not URL.fullmatch(url) or "@" in url:
        raise StoreError(
            f"{SETTING} is not a URL such as s3://bucket/prefix. Credentials do not go there, since pointers would keep them: use "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role."
        )
    return url


def upload(path: Path, suffix: str) -> StoredObject:
    """Send a finished zip file to the store as one object.

    Raises:
        StoreError: the store refuses it, or stays unreachable.
    """
    base, digest, size = store_url(), digest_file(path), path.stat().st_size
    with zipfile.ZipFile(path) as file:
        stored = StoredObject(f"{base}/{digest}{suffix}", size, digest, file.start_dir)

    def send() -> None:
        system, target = file_system(stored.url)
        system.put_file(str(path), target, **UPLOAD_OPTIONS.get(_protocol(stored.url), {}))
        if (found := system.info(target)["size"]) != size:
            raise OSError(f"{found} bytes arrived instead of {size}")

    try:
        persist(f"Upload of {path.name}", stored.url, send)
    except FileNotFoundError as error:
        raise StoreError(
            f"{SETTING}: {stored.url} cannot be written ({error}). Create the bucket, or correct the setting."
        ) from None
    return stored


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of an object.

    Raises:
        StoreError: the store refuses it, or stays unreachable.
        CorruptArtifact: there is no such object, see `missing`.
    """

    def get() -> bytes:
        system, path = file_system(url)
        content = system.cat_file(path, start=start, end=stop)
        if len(content) != stop - start:
            raise OSError(f"{len(content)} bytes came instead of {stop - start}")
        return content

    try:
        return persist("Reading", url, get)
    except FileNotFoundError as error:
        raise missing(url, error) from None


def require_object(stored: StoredObject) -> None:
    """Check that an object is there in full, by its size.

    Raises:
        StoreError: the store refuses to say, or stays unreachable.
        CorruptArtifact: it is missing or has another size.
    """

    def size() -> int:
        system, path = file_system(stored.url)
        return system.info(path)["size"]

    try:
        found = persist("Looking up", stored.url, size)
    except FileNotFoundError as error:
        raise missing(stored.url, error) from None
    if found != stored.bytes:
        raise CorruptArtifact(f"{stored.url} has {found} bytes instead of {stored.bytes}. {CURE}")


def missing(url: str, error: Exception) -> CorruptArtifact:
    """The error that an object is not there."""
    return CorruptArtifact(
        f"{url} is missing: {error}. If the storage moved, AWS_ENDPOINT_URL or the profile may point to another one. {CURE}"
    )


CURE = "Copy the object back from a backup, or write it again with `dvc repro --force --single-item` of its stage."


def persist(doing: str, url: str, action: Callable[[], Result]) -> Result:
    """The result of `action`, which is tried again with back-off while its failure may pass.

    Raises:
        FileNotFoundError: there is no such object (nor bucket, perhaps).
        StoreError: it may not be done at all, or failed TRIES times.
    """
    tries = Retrying(retry=retry_if_exception(_may_pass), stop=stop_after_attempt(TRIES), wait=_delay, reraise=True)
    try:
        return tries(action)
    except (StoreError, FileNotFoundError):
        raise
    except Exception as error:  # every library has its own
        raise (_unreachable if _may_pass(error) else _refused)(doing, url, error) from error


def _may_pass(error: BaseException) -> bool:
    """Whether trying again may cure it; an interrupt of this process is none."""
    settled = (StoreError, FileNotFoundError, *REFUSALS)
    return (
        isinstance(error, Exception)
        and not isinstance(error, settled)
        and not type(error).__name__.endswith(REFUSALS_BY_NAME)
    )


def _delay(state: RetryCallState) -> float:
    """Seconds before the next try."""
    return FIRST_DELAY * 2 ** (state.attempt_number - 1) * _jitter.uniform(0.5, 1.5)


def _refused(doing: str, url: str, error: Exception) -> StoreError:
    return StoreError(
        f"{doing}: {url} was refused ({type(error).__name__}: {error}). Check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE), their rights to "
        f"read, write and list there, AWS_ENDPOINT_URL, and {SETTING}. Finished units are kept: run again."
    )


def _unreachable(doing: str, url: str, error: Exception) -> StoreError:
    return StoreError(
        f"{doing}: {url} failed {TRIES} times, the last with {type(error).__name__}: {error}. Check that the storage is up and that "
        f"AWS_ENDPOINT_URL and {SETTING} name it. Finished units are kept: run again."
    )


def file_system(url: str) -> tuple["AbstractFileSystem", str]:
    """The file system of a URL, and the path in it.

    Raises:
        StoreError: nothing that is installed opens such a URL.
    """
    system = _open_system(_protocol(url))
    return system, system._strip_protocol(url)


@lru_cache(maxsize=4)
def _open_system(protocol: str) -> "AbstractFileSystem":
    try:
        import fsspec

        system = fsspec.filesystem(protocol, **OPTIONS.get(protocol, {}))
    except ImportError as error:
        install = {"s3": "pip install 'fisherfold[s3]'"}.get(protocol, "the fsspec package for it")
        raise StoreError(
            f"{SETTING}: {protocol}:// needs a package that is not installed ({error}): {install}."
        ) from None
    except ValueError as error:
        raise StoreError(f"{SETTING}: nothing opens {protocol}:// ({error}). Use s3://bucket/prefix.") from None
    for name, value in ATTRIBUTES.get(protocol, {}).items():
        setattr(system, name, value)
    return system


def _protocol(url: str) -> str:
    return url.partition("://")[0]
